/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rings: every record arrives once and in order across the wrap, a full ring refuses and heals,
 * a client that does not drain its completions blocks nobody, and answers reach who asked.
 */
#include <pthread.h>

#include "pool_bed.h"

#define MIB (1024u * 1024u)

static int submit(struct cn_client *c, uint8_t op, uint64_t arg, uint32_t wait_ms)
{
    struct cn_record record = {.op = op, .arg = arg, .cookie = arg};
    return cn_submit(c, &record, wait_ms);
}

/* Several times around the ring, in batches of every size up to full. */
static void records_survive_the_wrap(void)
{
    struct bed bed = bed_open(4 * MIB, 256, 64, "lru");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    uint64_t aborts = 0;
    struct cn_session *session = bed.keeper->sessions[s.session];
    for (uint32_t batch = 1; batch <= CN_RING_RECORDS; batch += 61) {
        for (uint32_t i = 0; i < batch; i++)
            CHECK_EQ(submit(s.client, CN_OP_ABORT, 0, 0), CN_OK);
        aborts += batch;
        bed_settle(&bed);
        CHECK_EQ(session->sub_head, aborts);
        CHECK_EQ(s.client->head->sub_head, aborts);
    }
    CHECK(aborts > 4ull * CN_RING_RECORDS);
    CHECK_EQ(bed.keeper->count.bad_records, 0);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

/* 1,024 records fit; the next is refused at once or after its time, and goes through after a
 * round. */
static void a_full_ring_refuses_and_heals(void)
{
    struct bed bed = bed_open(4 * MIB, 256, 64, "lru");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint32_t i = 0; i < CN_RING_RECORDS; i++)
        CHECK_EQ(submit(s.client, CN_OP_NOP, 0, 0), CN_OK);
    CHECK_EQ(submit(s.client, CN_OP_NOP, 0, 0), CN_ERING);
    CHECK_EQ(submit(s.client, CN_OP_NOP, 0, 3), CN_ERING);
    CHECK_EQ(cn_flush(s.client, 1), CN_ETIME);
    CHECK(cn_keeper_step(bed.keeper) >= (int)CN_ROUND_RECORDS);
    CHECK_EQ(submit(s.client, CN_OP_NOP, 0, 0), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(cn_flush(s.client, 0), CN_OK);
    CHECK_EQ(bed.keeper->sessions[s.session]->sub_head, CN_RING_RECORDS + 1);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

/* A round takes at most 64 records of a ring: the second session's are not behind all of the
 * first. */
static void rounds_are_fair(void)
{
    struct bed bed = bed_open(4 * MIB, 256, 64, "lru");
    struct bed_session a = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_session b = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint32_t i = 0; i < CN_RING_RECORDS; i++)
        CHECK_EQ(submit(a.client, CN_OP_ABORT, 0, 0), CN_OK);
    CHECK_EQ(submit(b.client, CN_OP_ABORT, 0, 0), CN_OK);
    cn_keeper_step(bed.keeper);
    CHECK_EQ(bed.keeper->sessions[a.session]->sub_head, CN_ROUND_RECORDS);
    CHECK_EQ(bed.keeper->sessions[b.session]->sub_head, 1);
    bed_settle(&bed);
    bed_kill(&bed, &a);
    bed_kill(&bed, &b);
    bed_close(&bed);
}

/* 256 answers lie there, more are dropped, nobody waits; after draining there are answers again. */
static void undrained_completions_block_nobody(void)
{
    struct bed bed = bed_open(4 * MIB, 256, 64, "lru");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint64_t i = 1; i <= 2 * CN_COMPLETIONS; i++) {
        CHECK_EQ(submit(s.client, CN_OP_NOP, i, 0), CN_OK);
        bed_settle(&bed);
    }
    CHECK_EQ(s.client->head->comp_tail, CN_COMPLETIONS);
    for (uint64_t i = 0; i < CN_COMPLETIONS; i++)
        CHECK_EQ(s.client->comp[i].cookie, i + 1);
    s.client->comp_head = CN_COMPLETIONS;
    cn_store_release(&s.client->head->comp_head, CN_COMPLETIONS);
    CHECK_EQ(submit(s.client, CN_OP_NOP, 7777, 0), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(s.client->head->comp_tail, CN_COMPLETIONS + 1);
    CHECK_EQ(s.client->comp[0].cookie, 7777);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

/* A tail that cannot be breaks that ring alone; its leases and the other sessions go on. */
static void an_impossible_tail_breaks_one_ring(void)
{
    static const uint64_t tails[] = {CN_RING_RECORDS + 1, UINT64_MAX, 1ull << 63};
    for (size_t i = 0; i < sizeof(tails) / sizeof(tails[0]); i++) {
        struct bed bed = bed_open(4 * MIB, 256, 64, "lru");
        struct bed_session bad = bed_attach(&bed, CN_ROLE_WRITER);
        struct bed_session good = bed_attach(&bed, CN_ROLE_WRITER);
        struct bed_key key = bed_key(1);
        struct cn_view view;
        CHECK_EQ(bed_put(&bed, good.client, 1, 4096, NULL), CN_OK);
        bed_settle(&bed);
        CHECK_EQ(cn_lease(bad.client, bed.ns, key.bytes, &view), CN_OK);
        bad.client->head->sub_tail = bad.client->head->sub_head + tails[i];
        bed_settle(&bed);
        CHECK(bed.keeper->sessions[bad.session]->broken);
        CHECK_EQ(bed_put(&bed, good.client, 2, 4096, NULL), CN_OK);
        bed_settle(&bed);
        CHECK_EQ(bed.keeper->count.live_chunks, 2);
        bed_check_bytes(&view, 1);
        bed_kill(&bed, &bad);
        bed_kill(&bed, &good);
        bed_audit(&bed);
        bed_close(&bed);
    }
}

/* With a sleeping keeper every call is answered by a wake-up: its short nap is not what saves
 * it. */
static void a_sleeping_keeper_is_woken(void)
{
    struct bed bed = bed_open(4 * MIB, 256, 64, "lru");
    CHECK_EQ(cn_keeper_start(bed.keeper), CN_OK);
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint32_t i = 0; i < 300; i++) {
        while (cn_load_acquire(&s.client->catalog.super->sleeping) == 0)
            cn_cpu_relax();
        CHECK_EQ(submit(s.client, CN_OP_ABORT, 0, 0), CN_OK);
        CHECK_EQ(cn_flush(s.client, 10000), CN_OK);
    }
    CHECK_EQ(cn_keeper_stop(bed.keeper), CN_OK);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

enum { CALLERS = 3, CALLS = 200 };

struct caller {
    struct bed *bed;
    struct cn_client *client;
    uint64_t first;
};

static void *call_many(void *arg)
{
    const struct caller *caller = arg;
    for (uint64_t n = 0; n < CALLS; n++) {
        struct bed_key key = bed_key(caller->first + n);
        uint32_t done;
        CHECK_EQ(cn_keys_op(caller->client, CN_OP_DELETE, caller->bed->ns, key.bytes, 1, 0, 30000,
                            &done),
                 CN_OK);
        CHECK_EQ(done, 1);
    }
    return NULL;
}

/* Threads of one session that delete each their own keys: each call is told of its own one. */
static void answers_reach_their_callers(void)
{
    struct bed bed = bed_open(16 * MIB, 4096, 64, "lru");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < CALLERS * CALLS; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.live_chunks, CALLERS * CALLS);
    CHECK_EQ(cn_keeper_start(bed.keeper), CN_OK);
    pthread_t threads[CALLERS];
    struct caller callers[CALLERS];
    for (uint32_t i = 0; i < CALLERS; i++) {
        callers[i] = (struct caller){&bed, s.client, (uint64_t)i * CALLS};
        CHECK_EQ(pthread_create(&threads[i], NULL, call_many, &callers[i]), 0);
    }
    for (uint32_t i = 0; i < CALLERS; i++)
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
    CHECK_EQ(cn_keeper_stop(bed.keeper), CN_OK);
    CHECK_EQ(bed.keeper->count.live_chunks, 0);
    bed_kill(&bed, &s);
    bed_audit(&bed);
    bed_close(&bed);
}

int main(void)
{
    RUN(records_survive_the_wrap);
    RUN(a_full_ring_refuses_and_heals);
    RUN(rounds_are_fair);
    RUN(undrained_completions_block_nobody);
    RUN(an_impossible_tail_breaks_one_ring);
    RUN(a_sleeping_keeper_is_woken);
    RUN(answers_reach_their_callers);
    return TEST_PASS;
}
