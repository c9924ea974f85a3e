/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A window of slabs was emptied in the order of its descriptors: of chunks that could not be moved,
 * a parent left before its children, which no prefix led to any more.
 */
#include "pool_bed.h"

#define MIB (1ull << 20)
#define BYTES 65536u
#define CHUNKS 110u /* of 8 MiB: little room to move to */
#define CHAIN 10u

static uint32_t number_of(const struct cn_event *event)
{
    for (uint32_t n = 0; n < CHUNKS; n++)
        if (memcmp(event->key, bed_key(n).bytes, CN_KEY_BYTES) == 0)
            return n;
    return CHUNKS;
}

/* ret_turn[n]: the how-manieth to leave was chunk n, or 0. */
static uint32_t turns(const struct bed *bed, uint32_t *ret_turn)
{
    static struct cn_event events[1024];
    uint64_t sequence = 0;
    uint64_t lost;
    uint32_t count;
    uint32_t left = 0;
    CHECK_EQ(cn_events_read(bed->catalog, &sequence, 1024, events, &count, &lost), CN_OK);
    CHECK_EQ(lost, 0);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t n = number_of(&events[i]);
        if ((events[i].what & 0xff) == CN_EVENT_EVICTED && n < CHUNKS)
            ret_turn[n] = ++left;
    }
    return left;
}

static void a_window_is_emptied_from_the_tails_of_its_chains(void)
{
    struct bed bed = bed_open(8 * MIB, 1024, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    uint32_t turn[CHUNKS] = {0};
    for (uint64_t n = 0; n < CHUNKS; n++) {
        struct bed_key parent = bed_key(n - 1);
        CHECK_EQ(bed_put(&bed, s.client, n, BYTES, n % CHAIN == 0 ? NULL : &parent), CN_OK);
    }
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.evictions, 0);
    cn_revoke_stock(bed.keeper, 0);
    CHECK(cn_reclaim(bed.keeper, 4 * MIB));
    CHECK(turns(&bed, turn) > 2 * CHAIN);
    for (uint32_t n = 0; n < CHUNKS; n++)
        CHECK(n % CHAIN == 0 || turn[n] == 0 || turn[n - 1] == 0 || turn[n] < turn[n - 1]);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

int main(void)
{
    RUN(a_window_is_emptied_from_the_tails_of_its_chains);
    return TEST_PASS;
}
