/* SPDX-License-Identifier: Apache-2.0 */
/* Put, get, evict, die: the keeper stepped by hand, every table audited after each case. */
#include "pool_bed.h"

#define MIB (1024u * 1024u)

static void a_put_chunk_is_found_with_its_bytes(void)
{
    struct bed bed = bed_open(16 * MIB, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    CHECK_EQ(bed_put(&bed, s.client, 1, 10000, NULL), CN_OK);
    bed_settle(&bed);
    struct bed_key key = bed_key(1);
    struct cn_view view;
    CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &view), CN_OK);
    CHECK_EQ(view.bytes, 10000);
    bed_check_bytes(&view, 1);
    CHECK_EQ(cn_view_verify(s.client, &view), CN_OK);
    CHECK_EQ(cn_client_leases(s.client), 1);
    cn_release(s.client, view.slot);
    CHECK_EQ(cn_client_leases(s.client), 0);
    struct bed_key other = bed_key(2);
    CHECK_EQ(cn_lease(s.client, bed.ns, other.bytes, &view), CN_EMISS);
    CHECK_EQ(cn_lease(s.client, bed.ns + 1, key.bytes, &view), CN_EMISS);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_audit(&bed);
    bed_close(&bed);
}

static void a_second_writer_of_a_key_is_dropped(void)
{
    struct bed bed = bed_open(16 * MIB, 4096, 512, "lru");
    struct bed_session a = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_session b = bed_attach(&bed, CN_ROLE_WRITER);
    CHECK_EQ(bed_put(&bed, a.client, 5, 4096, NULL), CN_OK);
    CHECK_EQ(bed_put(&bed, b.client, 5, 4096, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.live_chunks, 1);
    CHECK_EQ(bed.keeper->count.duplicates, 1);
    bed_audit(&bed);
    bed_kill(&bed, &a);
    bed_kill(&bed, &b);
    CHECK_EQ(bed.keeper->count.granted_bytes, 0);
    bed_audit(&bed);
    bed_close(&bed);
}

static void eviction_spares_what_is_leased(void)
{
    struct bed bed = bed_open(8 * MIB, 4096, 512, "lru");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    struct cn_view held;
    struct bed_key first = bed_key(0);
    CHECK_EQ(bed_put(&bed, s.client, 0, 65536, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(cn_lease(s.client, bed.ns, first.bytes, &held), CN_OK);
    for (uint64_t n = 1; n < 1000; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 65536, NULL), CN_OK);
    bed_settle(&bed);
    CHECK(bed.keeper->count.evictions > 800);
    CHECK(bed.keeper->count.live_bytes <= bed.keeper->high_bytes);
    bed_check_bytes(&held, 0);
    struct cn_view view;
    CHECK_EQ(cn_lease(s.client, bed.ns, first.bytes, &view), CN_OK);
    cn_release(s.client, view.slot);
    cn_release(s.client, held.slot);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static void a_deleted_chunk_stays_while_somebody_reads_it(void)
{
    struct bed bed = bed_open(8 * MIB, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_key key = bed_key(3);
    struct cn_view view;
    struct cn_view again;
    CHECK_EQ(bed_put(&bed, s.client, 3, 5000, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &view), CN_OK);
    struct cn_record record = {.op = CN_OP_DELETE, .ns_slot = (uint16_t)bed.ns};
    memcpy(record.key, key.bytes, CN_KEY_BYTES);
    CHECK_EQ(cn_submit(s.client, &record, 0), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &again), CN_EMISS);
    CHECK_EQ(bed.keeper->limbo_count, 1);
    bed_check_bytes(&view, 3);
    CHECK_EQ(cn_lease_ref(s.client, view.ref, 0, &again), CN_EMISS);
    cn_release(s.client, view.slot);
    bed_audit(&bed);
    CHECK_EQ(bed.keeper->limbo_count, 0);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static void a_dead_session_gives_everything_back(void)
{
    struct bed bed = bed_open(8 * MIB, 4096, 512, "s3-fifo");
    struct bed_session a = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_session b = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_key key = bed_key(9);
    struct cn_view view;
    struct cn_grant grant;
    CHECK_EQ(bed_put(&bed, a.client, 9, 70000, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(cn_lease(b.client, bed.ns, key.bytes, &view), CN_OK);
    CHECK(cn_reserve(b.client, 8192, 0, 0, &grant) != CN_OK);
    bed_settle(&bed);
    CHECK_EQ(cn_reserve(b.client, 8192, 0, 0, &grant), CN_OK);
    CHECK(bed.keeper->count.granted_bytes > 0);
    bed_kill(&bed, &b);
    bed_kill(&bed, &a);
    CHECK_EQ(bed.keeper->count.granted_bytes, 0);
    CHECK_EQ(bed.keeper->session_count, 0);
    CHECK_EQ(bed.keeper->count.live_chunks, 1);
    bed_audit(&bed);
    bed_close(&bed);
}

static void sizes_change_and_slabs_follow(void)
{
    struct bed bed = bed_open(32 * MIB, 8192, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    static const uint64_t sizes[] = {65536, 3 * MIB, 4096, 1000000, 7 * MIB, 200000};
    for (uint64_t n = 0; n < 600; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, sizes[n / 100], NULL), CN_OK);
    bed_settle(&bed);
    bed_audit(&bed);
    uint32_t present = 0;
    for (uint64_t n = 500; n < 600; n++) {
        struct bed_key key = bed_key(n);
        struct cn_view view;
        if (cn_lease(s.client, bed.ns, key.bytes, &view) == CN_OK) {
            bed_check_bytes(&view, n);
            cn_release(s.client, view.slot);
            present++;
        }
    }
    CHECK(present >= 90);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

/* Every second chunk is deleted, so that there is room for what a slab has when it is wanted. */
static void a_chain_stays_one_when_its_chunks_move(void)
{
    enum { CHAIN = 8, CHUNKS = 1600 };
    struct bed bed = bed_open(32 * MIB, 8192, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < CHUNKS; n++) {
        struct bed_key parent = bed_key(n - 1);
        CHECK_EQ(bed_put(&bed, s.client, n, 16384, n % CHAIN == 0 ? NULL : &parent), CN_OK);
    }
    bed_settle(&bed);
    for (uint64_t n = 0; n < CHUNKS; n++) {
        struct bed_key key = bed_key(n);
        struct cn_record gone = {.op = CN_OP_DELETE, .ns_slot = (uint16_t)bed.ns};
        memcpy(gone.key, key.bytes, sizeof(key.bytes));
        if (n % CHAIN >= CHAIN / 2)
            CHECK_EQ(cn_submit(s.client, &gone, 0), CN_OK);
        bed_settle(&bed);
    }
    CHECK(cn_reclaim(bed.keeper, 8 * MIB));
    CHECK(bed.keeper->count.moves > 0);
    bed_audit(&bed);
    for (uint64_t n = 0; n < CHUNKS; n++) {
        struct bed_key key = bed_key(n);
        struct bed_key before = bed_key(n - 1);
        uint32_t d;
        uint32_t parent;
        if (n % CHAIN == 0 || cn_find(bed.catalog, bed.ns, key.bytes, &d) != CN_OK)
            continue;
        CHECK_EQ(cn_find(bed.catalog, bed.ns, before.bytes, &parent), CN_OK);
        CHECK_EQ(cn_live_of(bed.keeper, bed.keeper->catalog.cold[d].parent), parent);
    }
    bed_kill(&bed, &s);
    bed_audit(&bed);
    bed_close(&bed);
}

static void a_batch_ends_at_the_first_absent_key(void)
{
    struct bed bed = bed_open(16 * MIB, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    enum { N = 400, HOLE = 300 };
    static uint8_t keys[N * CN_KEY_BYTES];
    static struct cn_view views[N];
    for (uint64_t n = 0; n < N; n++) {
        struct bed_key key = bed_key(n);
        memcpy(keys + n * CN_KEY_BYTES, key.bytes, CN_KEY_BYTES);
        if (n != HOLE)
            CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    }
    bed_settle(&bed);
    uint32_t count;
    CHECK_EQ(cn_match(s.client, bed.ns, keys, N, &count), CN_OK);
    CHECK_EQ(count, HOLE);
    CHECK_EQ(cn_lease_many(s.client, bed.ns, keys, N, views, &count), CN_OK);
    CHECK_EQ(count, HOLE);
    CHECK_EQ(cn_client_leases(s.client), HOLE);
    for (uint64_t n = 0; n < HOLE; n++)
        bed_check_bytes(&views[n], n);
    cn_release_many(s.client, views, count);
    CHECK_EQ(cn_client_leases(s.client), 0);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

/* Eight sizes in turn: one extent of each, and beside them 1/64 of the pool (decision 0012). */
static void a_stock_keeps_its_limit(void)
{
    struct bed bed = bed_open(64 * MIB, 4096, 512, "lru");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < 120; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, (n % CN_STOCK_ROWS + 1) * 65536, NULL), CN_OK);
    bed_settle(&bed);
    uint64_t spare = 0;
    for (uint32_t row = 0; row < CN_STOCK_ROWS; row++) {
        uint32_t filled = 0;
        for (uint32_t i = 0; i < CN_STOCK_SLOTS; i++)
            filled += s.client->stock[row].slot[i] != 0;
        CHECK(filled >= 1);
        spare += (filled - 1) * s.client->stock[row].extent_bytes;
    }
    CHECK(spare <= 64 * MIB / 64);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    CHECK_EQ(bed.keeper->count.granted_bytes, 0);
    bed_close(&bed);
}

static uint64_t frozen_ns(void) { return 1000000000u; }

/* Half of a log is read though no record comes and nothing is evicted; not again at once. */
static void a_pure_reader_is_heard(void)
{
    struct bed bed = bed_open(16 * MIB, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_key key = bed_key(1);
    struct cn_view view;
    CHECK_EQ(bed_put(&bed, s.client, 1, 4096, NULL), CN_OK);
    bed_settle(&bed);
    struct cn_session *session = bed.keeper->sessions[s.session];
    for (uint64_t half = 0; half < 2; half++) {
        session->access_read_ns = 0;
        for (uint32_t i = 0; i < CN_ACCESS_SLOTS / 2; i++) {
            CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &view), CN_OK);
            cn_release(s.client, view.slot);
        }
        bed_settle(&bed);
        CHECK_EQ(session->access_head, s.client->access_tail);
    }
    for (uint32_t i = 0; i < 3 * CN_ACCESS_SLOTS; i++) {
        CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &view), CN_OK);
        cn_release(s.client, view.slot);
    }
    bed.keeper->ops.monotonic_ns = frozen_ns;
    session->access_read_ns = frozen_ns(); /* it was read a moment ago */
    uint64_t before = session->access_head;
    bed_settle(&bed);
    CHECK_EQ(session->access_head, before);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static void a_full_lease_table_is_a_miss(void)
{
    struct bed bed = bed_open(16 * MIB, 4096, 64, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_key key = bed_key(1);
    struct cn_view views[64];
    struct cn_view more;
    CHECK_EQ(bed_put(&bed, s.client, 1, 4096, NULL), CN_OK);
    bed_settle(&bed);
    for (uint32_t i = 0; i < 64; i++)
        CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &views[i]), CN_OK);
    CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &more), CN_ELEASES);
    cn_release_many(s.client, views, 64);
    CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &more), CN_OK);
    cn_release(s.client, more.slot);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static void nonsense_in_a_session_harms_only_its_owner(void)
{
    struct bed bed = bed_open(16 * MIB, 4096, 512, "use-count");
    struct bed_session bad = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_session good = bed_attach(&bed, CN_ROLE_WRITER);
    uint64_t bytes = cn_session_segment_bytes(bed.format.lease_slots);
    uint64_t x = 88172645463325252ull;
    for (uint32_t round = 0; round < 200; round++) {
        for (uint64_t i = 0; i < bytes / 8; i++) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            ((uint64_t *)bad.segment)[i] = round % 2 == 0 ? x : x & 0xffff00000fffull;
        }
        struct cn_session *s = bed.keeper->sessions[bad.session];
        s->broken = false; /* so that every round's records are read */
        bad.segment = s->head;
        s->head->sub_tail = s->sub_head + 1 + x % CN_RING_RECORDS;
        bed_settle(&bed);
        CHECK_EQ(bed_put(&bed, good.client, round, 6000, NULL), CN_OK);
    }
    bed_settle(&bed);
    CHECK(bed.keeper->count.bad_records > 0);
    CHECK(bed.keeper->count.live_chunks >= 190);
    bed_audit(&bed);
    bed_kill(&bed, &bad);
    bed_kill(&bed, &good);
    bed_audit(&bed);
    bed_close(&bed);
}

static void a_replayed_record_changes_nothing(void)
{
    struct bed bed = bed_open(16 * MIB, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    CHECK_EQ(bed_put(&bed, s.client, 1, 4096, NULL), CN_OK);
    bed_settle(&bed);
    struct cn_session *session = bed.keeper->sessions[s.session];
    uint64_t commits = bed.keeper->count.commits;
    session->sub_head -= 1;
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.commits, commits);
    CHECK_EQ(bed.keeper->count.live_chunks, 1);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static void every_policy_survives_a_full_pool(void)
{
    for (uint32_t i = 0; cn_policy_name(i) != NULL; i++) {
        struct bed bed = bed_open(8 * MIB, 1024, 512, cn_policy_name(i));
        struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
        for (uint64_t n = 0; n < 3000; n++) {
            struct bed_key parent = bed_key(n - 1);
            CHECK_EQ(bed_put(&bed, s.client, n, 16384 + (n % 3) * 4096, n % 8 ? &parent : NULL),
                     CN_OK);
            struct bed_key key = bed_key(n * 7919 % (n + 1));
            struct cn_view view;
            if (cn_lease(s.client, bed.ns, key.bytes, &view) == CN_OK)
                cn_release(s.client, view.slot);
        }
        bed_settle(&bed);
        CHECK(bed.keeper->count.evictions > 2000);
        bed_audit(&bed);
        bed_kill(&bed, &s);
        bed_close(&bed);
    }
}

static void a_running_keeper_serves_and_stops(void)
{
    struct bed bed = bed_open(16 * MIB, 4096, 512, "use-count");
    CHECK_EQ(cn_keeper_start(bed.keeper), CN_OK);
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < 2000; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 20000, NULL), CN_OK);
    CHECK_EQ(cn_flush(s.client, 5000), CN_OK);
    struct bed_key last = bed_key(1999);
    struct cn_view view;
    CHECK_EQ(cn_lease(s.client, bed.ns, last.bytes, &view), CN_OK);
    bed_check_bytes(&view, 1999);
    cn_release(s.client, view.slot);
    uint32_t done;
    CHECK_EQ(cn_keys_op(s.client, CN_OP_DELETE, bed.ns, last.bytes, 1, 0, 5000, &done), CN_OK);
    CHECK_EQ(done, 1);
    CHECK_EQ(cn_keys_op(s.client, CN_OP_DELETE, bed.ns, last.bytes, 1, 0, 5000, &done), CN_OK);
    CHECK_EQ(done, 0);
    bed_audit(&bed);
    CHECK_EQ(cn_keeper_stop(bed.keeper), CN_OK);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

int main(void)
{
    RUN(a_put_chunk_is_found_with_its_bytes);
    RUN(a_second_writer_of_a_key_is_dropped);
    RUN(eviction_spares_what_is_leased);
    RUN(a_deleted_chunk_stays_while_somebody_reads_it);
    RUN(a_dead_session_gives_everything_back);
    RUN(sizes_change_and_slabs_follow);
    RUN(a_chain_stays_one_when_its_chunks_move);
    RUN(a_batch_ends_at_the_first_absent_key);
    RUN(a_stock_keeps_its_limit);
    RUN(a_pure_reader_is_heard);
    RUN(a_full_lease_table_is_a_miss);
    RUN(nonsense_in_a_session_harms_only_its_owner);
    RUN(a_replayed_record_changes_nothing);
    RUN(every_policy_survives_a_full_pool);
    RUN(a_running_keeper_serves_and_stops);
    return TEST_PASS;
}
