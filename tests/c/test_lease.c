/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Leases one at a time and in batches: slots are used again and never twice, limits are misses, a
 * token opens its own chunk only, and a lease outlives everything but its release (I3).
 */
#include "pool_bed.h"

#define MIB (1024u * 1024u)

static struct bed_session with_chunks(struct bed *bed, uint32_t slots, uint64_t chunks)
{
    *bed = bed_open(16 * MIB, 4096, slots, "lru");
    struct bed_session s = bed_attach(bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < chunks; n++)
        CHECK_EQ(bed_put(bed, s.client, n, 4096, NULL), CN_OK);
    bed_settle(bed);
    return s;
}

static void finish(struct bed *bed, struct bed_session *s)
{
    CHECK_EQ(cn_client_leases(s->client), 0);
    bed_audit(bed);
    bed_kill(bed, s);
    bed_audit(bed);
    bed_close(bed);
}

static int lease(struct bed *bed, struct bed_session *s, uint64_t n, struct cn_view *ret_view)
{
    struct bed_key key = bed_key(n);
    return cn_lease(s->client, bed->ns, key.bytes, ret_view);
}

/* Whatever the mixture of single and batch leases, no slot has two holders, and all can be had. */
static void no_slot_has_two_holders(void)
{
    enum { SLOTS = 512, CHUNKS = 256 };
    struct bed bed;
    struct bed_session s = with_chunks(&bed, SLOTS, CHUNKS);
    static uint8_t keys[CHUNKS * CN_KEY_BYTES];
    static struct cn_view views[SLOTS];
    for (uint64_t n = 0; n < CHUNKS; n++)
        memcpy(keys + n * CN_KEY_BYTES, bed_key(n).bytes, CN_KEY_BYTES);
    for (uint32_t round = 0; round < 20; round++) {
        bool held[SLOTS] = {false};
        uint32_t count = 0;
        while (count < SLOTS) {
            uint32_t batch = 1 + (count * 7 + round) % 90;
            uint32_t got = 1;
            if (batch > SLOTS - count || batch % 3 == 0 || count >= SLOTS - 130) {
                if (lease(&bed, &s, batch % CHUNKS, &views[count]) != CN_OK)
                    break;
            } else {
                CHECK_EQ(cn_lease_many(s.client, bed.ns, keys, batch, views + count, &got), CN_OK);
            }
            CHECK(got > 0);
            for (uint32_t i = count; i < count + got; i++) {
                CHECK(views[i].slot < SLOTS && !held[views[i].slot]);
                held[views[i].slot] = true;
            }
            count += got;
        }
        CHECK_EQ(count, SLOTS);
        CHECK_EQ(cn_client_leases(s.client), SLOTS);
        CHECK_EQ(lease(&bed, &s, 0, &(struct cn_view){0}), CN_ELEASES);
        for (uint32_t i = 0; i < count / 2; i++)
            cn_release(s.client, views[i].slot);
        cn_release_many(s.client, views + count / 2, count - count / 2);
        CHECK_EQ(cn_client_leases(s.client), 0);
    }
    finish(&bed, &s);
}

/* All slots in use lie below what the keeper scans. */
static void every_lease_is_below_the_high_mark(void)
{
    enum { SLOTS = 512 };
    struct bed bed;
    struct bed_session s = with_chunks(&bed, SLOTS, 1);
    static struct cn_view views[SLOTS];
    for (uint32_t i = 0; i < SLOTS; i++) {
        CHECK_EQ(lease(&bed, &s, 0, &views[i]), CN_OK);
        CHECK(views[i].slot < s.client->head->lease_high);
    }
    cn_release_many(s.client, views, SLOTS);
    finish(&bed, &s);
}

/* A token opens its chunk while it is there; not with another key, another generation, another
 * d. */
static void a_token_opens_its_own_chunk(void)
{
    struct bed bed;
    struct bed_session s = with_chunks(&bed, 64, 2);
    struct cn_view first;
    struct cn_view again;
    uint64_t head;
    memcpy(&head, bed_key(0).bytes, sizeof(head));
    CHECK_EQ(lease(&bed, &s, 0, &first), CN_OK);
    CHECK_EQ(cn_lease_ref(s.client, first.ref, head, &again), CN_OK);
    CHECK(again.data == first.data && again.slot != first.slot);
    bed_check_bytes(&again, 0);
    cn_release(s.client, again.slot);
    CHECK_EQ(cn_lease_ref(s.client, first.ref, head + 1, &again), CN_EMISS);
    CHECK_EQ(cn_lease_ref(s.client, first.ref + (1ull << 32), head, &again), CN_EMISS);
    CHECK_EQ(cn_lease_ref(s.client, first.ref | 0xffffffff, head, &again), CN_EMISS);
    CHECK_EQ(cn_lease_ref(s.client, 0, head, &again), CN_EMISS);
    cn_release(s.client, first.slot);
    finish(&bed, &s);
}

/* A dead token stays dead when its descriptor and its extent belong to another chunk. */
static void a_token_of_a_reused_descriptor_misses(void)
{
    struct bed bed = bed_open(2 * MIB, 64, 64, "lru");
    CHECK_EQ(cn_keeper_configure(
                 bed.keeper,
                 &(struct cn_keeper_config){.high_water = 1, .low_water = 1, .policy = "lru"}),
             CN_OK);
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    struct cn_view view;
    uint64_t head;
    uint64_t dead_ref = 0;
    memcpy(&head, bed_key(0).bytes, sizeof(head));
    for (uint64_t n = 0; n < 40; n++) {
        CHECK_EQ(bed_put(&bed, s.client, n, 2 * MIB, NULL), CN_OK);
        bed_settle(&bed);
        CHECK_EQ(lease(&bed, &s, n, &view), CN_OK);
        if (n == 0)
            dead_ref = view.ref;
        else
            CHECK_EQ(cn_lease_ref(s.client, dead_ref, head, &(struct cn_view){0}), CN_EMISS);
        cn_release(s.client, view.slot);
    }
    CHECK(cn_ref_d(view.ref) == cn_ref_d(dead_ref) && view.ref != dead_ref);
    finish(&bed, &s);
}

/* A retired pool gives no more leases, and what is held stays good until it is released. */
static void a_retired_pool_misses(void)
{
    struct bed bed;
    struct bed_session s = with_chunks(&bed, 64, 2);
    struct cn_view held;
    struct cn_view view;
    uint8_t key[CN_KEY_BYTES];
    uint32_t count = 7;
    memcpy(key, bed_key(1).bytes, CN_KEY_BYTES);
    CHECK_EQ(lease(&bed, &s, 0, &held), CN_OK);
    CHECK_EQ(cn_keeper_retire(bed.keeper), CN_OK);
    CHECK_EQ(lease(&bed, &s, 1, &view), CN_EMISS);
    CHECK_EQ(cn_match(s.client, bed.ns, key, 1, &count), CN_OK);
    CHECK_EQ(count, 0);
    CHECK_EQ(cn_lease_many(s.client, bed.ns, key, 1, &view, &count), CN_OK);
    CHECK_EQ(count, 0);
    bed_check_bytes(&held, 0);
    cn_release(s.client, held.slot);
    finish(&bed, &s);
}

/* After close: no new lease, and the old one is released as always. */
static void a_closed_client_keeps_what_it_holds(void)
{
    struct bed bed;
    struct bed_session s = with_chunks(&bed, 64, 1);
    struct cn_view held;
    CHECK_EQ(lease(&bed, &s, 0, &held), CN_OK);
    cn_client_close(s.client);
    CHECK_EQ(lease(&bed, &s, 0, &(struct cn_view){0}), CN_ECLOSED);
    bed_check_bytes(&held, 0);
    cn_release(s.client, held.slot);
    finish(&bed, &s);
}

/* Too many keys for one call are refused before anything is touched. */
static void an_oversized_batch_is_refused(void)
{
    struct bed bed;
    struct bed_session s = with_chunks(&bed, 64, 1);
    uint32_t count = 0;
    uint8_t key[CN_KEY_BYTES] = {0};
    CHECK_EQ(cn_match(s.client, bed.ns, key, CN_KEYS_PER_CALL_MAX + 1, &count), CN_ELIMIT);
    CHECK_EQ(cn_lease_many(s.client, bed.ns, key, CN_KEYS_PER_CALL_MAX + 1, NULL, &count),
             CN_ELIMIT);
    CHECK_EQ(cn_lease_many(s.client, bed.ns, key, 0, NULL, &count), CN_OK);
    CHECK_EQ(count, 0);
    finish(&bed, &s);
}

int main(void)
{
    RUN(no_slot_has_two_holders);
    RUN(every_lease_is_below_the_high_mark);
    RUN(a_token_opens_its_own_chunk);
    RUN(a_token_of_a_reused_descriptor_misses);
    RUN(a_retired_pool_misses);
    RUN(a_closed_client_keeps_what_it_holds);
    RUN(an_oversized_batch_is_refused);
    return TEST_PASS;
}
