/* SPDX-License-Identifier: Apache-2.0 */
/* How long does it take to take over a dirty pool? CPU and wall time, chunk count as argument. */
#include <time.h>

#include "pool_bed.h"

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    uint32_t chunks = argc > 1 ? (uint32_t)atoi(argv[1]) : 1u << 20;
    struct bed bed = bed_open((uint64_t)chunks * 4096 * 5 / 4, chunks, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < chunks; n++) {
        struct bed_key parent = bed_key(n - 1);
        int status = bed_put(&bed, s.client, n, 16, n % 32 == 0 ? NULL : &parent);
        if (status != CN_OK)
            break;
    }
    bed_settle(&bed);
    uint64_t live = bed.keeper->count.live_chunks;
    struct cn_adopt_session old = {.segment = s.segment,
                                   .segment_bytes = cn_session_segment_bytes(512),
                                   .nonce = s.nonce,
                                   .session = s.session,
                                   .liveness_fd = -1,
                                   .doorbell_fd = -1,
                                   .pidfd = -1};
    for (int i = 0; i < 5; i++) {
        void *catalog = mmap(NULL, bed.catalog_bytes, PROT_READ | PROT_WRITE,
                             MAP_SHARED | (i & 1 ? MAP_POPULATE : 0), bed.catalog_fd, 0);
        double cpu = seconds(CLOCK_THREAD_CPUTIME_ID);
        double wall = seconds(CLOCK_MONOTONIC);
        struct cn_keeper_config config = bed_config("use-count");
        struct cn_recovery found;
        struct cn_keeper *keeper;
        int status = cn_keeper_adopt(catalog, bed.catalog_bytes, &bed.region, &config, &old, 1,
                                     &found, &keeper);
        CHECK_EQ(status, CN_OK);
        CHECK_EQ(found.live_chunks, live);
        printf("%llu chunks taken over: %.3f s of CPU, %.3f s\n", (unsigned long long)live,
               seconds(CLOCK_THREAD_CPUTIME_ID) - cpu, seconds(CLOCK_MONOTONIC) - wall);
    }
    return 0;
}
