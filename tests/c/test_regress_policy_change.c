/* SPDX-License-Identifier: Apache-2.0 */
/* Claim: a policy changed while chunks are resident keeps every chunk in exactly one queue. */
#include "pool_bed.h"

int main(void)
{
    alarm(10);
    struct bed bed = bed_open(16 << 20, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < 20; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    bed_settle(&bed);
    bed_audit(&bed);
    struct cn_keeper_config config = bed_config("lru");
    CHECK_EQ(cn_keeper_configure(bed.keeper, &config), CN_OK);
    bed_audit(&bed);
    for (uint64_t n = 20; n < 40; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    bed_settle(&bed);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
    return 0;
}
