/* SPDX-License-Identifier: Apache-2.0 */
/* Claims: a namespace that is given a quota while it holds chunks goes on storing, by evicting its
 * own; a chunk larger than the quota is refused without evicting anything. */
#include "pool_bed.h"

static void quota_given_late(void)
{
    struct bed bed = bed_open(16 << 20, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < 20; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(cn_keeper_namespace_quota(bed.keeper, bed.ns, 20 * 4096), CN_OK);
    for (uint64_t n = 20; n < 25; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.refused, 0);
    CHECK_EQ(bed.keeper->count.evictions, 5);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static void larger_than_the_quota(void)
{
    struct bed bed = bed_open(16 << 20, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    CHECK_EQ(cn_keeper_namespace_quota(bed.keeper, bed.ns, 20 * 4096), CN_OK);
    for (uint64_t n = 0; n < 20; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(bed_put(&bed, s.client, 99, 21 * 4096, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.refused, 1);
    CHECK_EQ(bed.keeper->count.live_chunks, 20);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

int main(int argc, char **argv)
{
    alarm(10);
    if (argc < 2 || argv[1][0] == '1')
        quota_given_late();
    if (argc < 2 || argv[1][0] == '2')
        larger_than_the_quota();
    return 0;
}
