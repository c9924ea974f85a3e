/* SPDX-License-Identifier: Apache-2.0 */
/* Claim: a reserve that nobody answers gives up after wait_ms, not after a multiple of it. */
#include "pool_bed.h"
#include <time.h>

int main(void)
{
    /* the keeper has no thread: a stopped daemon */
    struct bed bed = bed_open(8 << 20, 64, 512, "lru");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    struct timespec a, b;
    struct cn_grant grant;
    clock_gettime(CLOCK_MONOTONIC, &a);
    CHECK(cn_reserve(s.client, 4096, 0, 200, &grant) != CN_OK);
    clock_gettime(CLOCK_MONOTONIC, &b);
    double ms = (double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6;
    uint64_t asked = s.client->sub_tail;
    printf("reserve(wait_ms=200) took %.0f ms and left %lu WANT records\n", ms, asked);
    CHECK(asked <= 200 / 20 + 1);
    bed_kill(&bed, &s);
    bed_close(&bed);
    return 0;
}
