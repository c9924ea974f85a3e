/* SPDX-License-Identifier: Apache-2.0 */
/* Claims: a chunk whose time-to-live passed while it was pinned is gone when it is unpinned; the
 * keeper's timers are bounded by what is resident, not by what was ever stored or pinned (I10). */
#include "pool_bed.h"

static void key_op(struct bed *bed, struct cn_client *c, uint32_t op, uint64_t n, uint64_t arg)
{
    struct bed_key key = bed_key(n);
    struct cn_record r = {.op = (uint8_t)op, .ns_slot = (uint16_t)bed->ns, .arg = arg};
    memcpy(r.key, key.bytes, 32);
    CHECK_EQ(cn_submit(c, &r, 0), CN_OK);
    bed_settle(bed);
}

static void unpin_after_ttl(void)
{
    static uint64_t now = 1000000000000ull;
    struct bed bed = bed_open(16 << 20, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    CHECK_EQ(cn_keeper_set_clock(bed.keeper, &now), CN_OK);
    struct cn_grant grant;
    cn_reserve(s.client, 4096, 0, 0, &grant);
    bed_settle(&bed);
    CHECK_EQ(cn_reserve(s.client, 4096, 0, 0, &grant), CN_OK);
    struct bed_key key = bed_key(1);
    struct cn_put put = {.ref = grant.ref,
                         .key = key.bytes,
                         .data_bytes = 4096,
                         .ns_slot = bed.ns,
                         .position = CN_POSITION_UNKNOWN,
                         .ttl_s = 10};
    CHECK_EQ(cn_commit(s.client, &put, 0), CN_OK);
    bed_settle(&bed);
    key_op(&bed, s.client, CN_OP_PIN, 1, INT64_MAX);
    now += 20 * 1000000000ull;
    bed_settle(&bed);
    key_op(&bed, s.client, CN_OP_UNPIN, 1, 0);
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.live_chunks, 0);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static void timers_are_bounded(void)
{
    struct bed bed = bed_open(16 << 20, 64, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    CHECK_EQ(bed_put(&bed, s.client, 1, 4096, NULL), CN_OK);
    bed_settle(&bed);
    for (uint32_t i = 0; i < 100000; i++)
        key_op(&bed, s.client, CN_OP_PIN, 1, INT64_MAX);
    printf("timers after pinning one chunk 100000 times: %u\n", bed.keeper->timers.count);
    CHECK(bed.keeper->timers.count <= 4 * bed.keeper->catalog.chunk_count + 64);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

int main(int argc, char **argv)
{
    alarm(20);
    if (argc < 2 || argv[1][0] == '1')
        unpin_after_ttl();
    if (argc < 2 || argv[1][0] == '2')
        timers_are_bounded();
    return 0;
}
