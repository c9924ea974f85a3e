/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is tried. Each is tiny on purpose: two tasks in a CI run, three at night.
 *
 * Keys are numbered; 0 is there (or is committed) at first, 1 is what takes its place. A pool of
 * one extent makes a second chunk reuse the extent and the descriptor of the first.
 */
#include "scenarios.h"

/* Take the only extent away from A and commit B in it; what is leased now stays, and that is
 * right. */
static void replace(uint32_t writer)
{
    for (uint32_t round = 0; round < 2; round++) {
        pool_want(writer);
        pool_step();
        if (!pool_stock_ready(writer))
            continue;
        pool_write(writer, B);
        pool_step();
        return;
    }
}

/* ---- acquire x evict ------------------------------------------------------ */

static void one_extent_with_a(void)
{
    pool_open(1, 2);
    pool_put(SECOND, A);
}

void acquire(void) { pool_read(FIRST, A); }

static void evict_and_refill(void) { replace(SECOND); }

void nothing_is_left(void)
{
    for (uint32_t n = A; n <= D; n++)
        pool_read(SECOND, n);
    pool_finish();
}

static const struct scenario acquire_evict = {
    .name = "acquire-evict",
    .claim = "a lease shows its own key's bytes, while the extent is evicted, granted, refilled",
    .setup = one_extent_with_a,
    .task = {acquire, evict_and_refill},
    .task_name = {"reader", "keeper"},
    .finish = nothing_is_left,
    .mortal = 1,
    .crashes = 1,
};

/* By reference, as a chunk's token is opened: the descriptor's generation is all there is. */
static struct cn_view view_of_a;

void take_token(void)
{
    cn_lease(pool.client[FIRST], pool.ns, pool_key(A), &view_of_a);
    cn_release(pool.client[FIRST], view_of_a.slot);
}

static void one_extent_and_a_token(void)
{
    one_extent_with_a();
    take_token();
}

void open_token(void)
{
    struct cn_view view;
    uint64_t key_head = cn_key_of(pool_key(A)).word[0];
    if (cn_lease_ref(pool.client[FIRST], view_of_a.ref, key_head, &view) != CN_OK)
        return;
    pool_check(&view, A);
    cn_release(pool.client[FIRST], view.slot);
}

static const struct scenario token_evict = {
    .name = "token-evict",
    .claim = "a token opens its own chunk or nothing",
    .setup = one_extent_and_a_token,
    .task = {open_token, evict_and_refill},
    .task_name = {"reader", "keeper"},
    .finish = nothing_is_left,
    .mortal = 1,
    .crashes = 1,
};

static void lease_many(void)
{
    uint8_t keys[2 * CN_KEY_BYTES];
    struct cn_view views[2];
    uint32_t count;
    memcpy(keys, pool_key(A), CN_KEY_BYTES);
    memcpy(keys + CN_KEY_BYTES, pool_key(B), CN_KEY_BYTES);
    cn_lease_many(pool.client[FIRST], pool.ns, keys, 2, views, &count);
    MODEL_CHECK(count < 2, "two chunks are leased in a pool that holds one");
    if (count == 1)
        pool_check(&views[0], A);
    cn_release_many(pool.client[FIRST], views, count);
}

static const struct scenario batch_evict = {
    .name = "batch-evict",
    .claim = "the same for a batch: publish all, one fence, validate all",
    .setup = one_extent_with_a,
    .task = {lease_many, evict_and_refill},
    .task_name = {"reader", "keeper"},
    .finish = nothing_is_left,
    .mortal = 1,
    .crashes = 1,
};

/* ---- threads of one client ------------------------------------------------ */

static const struct scenario threads_evict = {
    .name = "threads-evict",
    .claim = "two threads of one session take leases at once: the scan sees both",
    .setup = one_extent_with_a,
    .task = {acquire, acquire, evict_and_refill},
    .task_name = {"thread 1", "thread 2", "keeper"},
    .finish = nothing_is_left,
    .nightly = true,
};

/* Slots beyond the hot ones: the mark that the keeper scans to is raised by two threads at once. */
static void lease_batch(void)
{
    struct cn_view view;
    uint32_t count;
    cn_lease_many(pool.client[FIRST], pool.ns, pool_key(A), 1, &view, &count);
    if (count == 1)
        pool_check(&view, A);
    cn_release_many(pool.client[FIRST], &view, count);
}

static void delete_and_refill(void)
{
    pool_submit_key(SECOND, CN_OP_DELETE, A);
    pool_want(SECOND);
    pool_step();
    if (pool_stock_ready(SECOND))
        pool_write(SECOND, B);
}

static const struct scenario threads_batch = {
    .name = "threads-batch",
    .claim = "the same with slots above lease_high, which both threads raise",
    .setup = one_extent_with_a,
    .task = {lease_batch, lease_batch, delete_and_refill},
    .task_name = {"thread 1", "thread 2", "keeper"},
    .finish = nothing_is_left,
    .nightly = true,
};

/* ---- commit x match ------------------------------------------------------- */

static void match_both(void)
{
    uint8_t keys[2 * CN_KEY_BYTES];
    uint32_t count;
    memcpy(keys, pool_key(A), CN_KEY_BYTES);
    memcpy(keys + CN_KEY_BYTES, pool_key(B), CN_KEY_BYTES);
    cn_match(pool.client[FIRST], pool.ns, keys, 2, &count);
    MODEL_CHECK(count < 2, "A and B are matched at once in a pool that holds one chunk");
    pool_read(FIRST, B);
}

static const struct scenario commit_match = {
    .name = "commit-match",
    .claim = "a matched prefix was there as a whole; a leased key has its committed bytes",
    .setup = one_extent_with_a,
    .task = {match_both, evict_and_refill},
    .task_name = {"reader", "keeper"},
    .finish = nothing_is_left,
    .mortal = 1,
    .crashes = 1,
};

static void empty_with_grant(void)
{
    pool_open(1, 2);
    pool_want(FIRST);
    pool_settle();
}

static void write_a(void)
{
    pool_write(FIRST, A);
    pool_read(FIRST, A);
}

static void two_steps(void)
{
    pool_step();
    pool_step();
}

static void a_was_committed(void)
{
    pool_settle();
    MODEL_CHECK(pool_read(SECOND, A) || model_task_state(0) == TASK_KILLED, "A is missing");
    nothing_is_left();
}

static const struct scenario commit_link = {
    .name = "commit-link",
    .claim = "what the keeper links are the bytes that stood there at commit",
    .setup = empty_with_grant,
    .task = {write_a, two_steps},
    .task_name = {"writer", "keeper"},
    .finish = a_was_committed,
    .mortal = 1,
    .crashes = 1,
};

static void write_only(void) { pool_write(FIRST, A); }

static void read_as_second(void)
{
    if (!pool_read(SECOND, A))
        pool_read(SECOND, A);
}

static const struct scenario commit_match_3 = {
    .name = "commit-match-3",
    .claim = "the same with writer, keeper and reader as three tasks",
    .setup = empty_with_grant,
    .task = {write_only, two_steps, read_as_second},
    .task_name = {"writer", "keeper", "reader"},
    .finish = a_was_committed,
    .mortal = 1,
    .crashes = 1,
    .nightly = true,
};

/* ---- release x evict ------------------------------------------------------ */

static void a_is_leased(void)
{
    one_extent_with_a();
    cn_lease(pool.client[FIRST], pool.ns, pool_key(A), &view_of_a);
    pool_submit_key(SECOND, CN_OP_DELETE, A);
}

static void check_and_release(void)
{
    pool_check(&view_of_a, A);
    cn_release(pool.client[FIRST], view_of_a.slot);
}

static const struct scenario release_evict = {
    .name = "release-evict",
    .claim = "bytes read before the release are never the next owner's",
    .setup = a_is_leased,
    .task = {check_and_release, evict_and_refill},
    .task_name = {"reader", "keeper"},
    .finish = nothing_is_left,
    .mortal = 1,
    .crashes = 1,
};

/* ---- stock x revoke ------------------------------------------------------- */

static void only_extent_in_stock(void)
{
    pool_open(1, 2);
    pool_want(FIRST);
    pool_settle();
}

static void write_from_stock(void)
{
    if (pool_stock_ready(FIRST))
        pool_write(FIRST, A);
}

static const struct scenario stock_revoke = {
    .name = "stock-revoke",
    .claim = "an extent taken back out of a stock has one writer",
    .setup = only_extent_in_stock,
    .task = {write_from_stock, evict_and_refill},
    .task_name = {"writer", "keeper"},
    .finish = nothing_is_left,
    .mortal = 1,
    .crashes = 1,
};

/* ---- session death x evict ------------------------------------------------ */

/* A, an extent in the second client's stock, one in the first's. */
static void three_extents(void)
{
    pool_open(3, 2);
    pool_put(SECOND, A);
    pool_want(FIRST);
    pool_settle();
    MODEL_CHECK(pool_stock_ready(FIRST) && pool_stock_ready(SECOND) && pool_read(SECOND, A),
                "the three extents are not where they should be");
}

static void read_and_write(void)
{
    struct cn_view view;
    int status = cn_lease(pool.client[FIRST], pool.ns, pool_key(A), &view);
    if (pool_stock_ready(FIRST))
        pool_write(FIRST, C);
    if (status == CN_OK) {
        pool_check(&view, A);
        cn_release(pool.client[FIRST], view.slot);
    }
}

static void evict_and_bury(void)
{
    pool_submit_key(SECOND, CN_OP_DELETE, A);
    pool_want(SECOND);
    pool_step();
    if (model_is_dead(0))
        pool_end_session(FIRST);
    pool_write(SECOND, B);
    pool_step();
    if (pool_stock_ready(SECOND))
        pool_write(SECOND, D); /* in the extent of A, or of the dead */
    pool_step();
}

static const struct scenario death_evict = {
    .name = "death-evict",
    .claim = "a session killed at any step gives back leases, grants and stock",
    .setup = three_extents,
    .task = {read_and_write, evict_and_bury},
    .task_name = {"client", "keeper"},
    .finish = nothing_is_left,
    .mortal = 1,
    .crashes = 1,
};

/* ---- ring full x empty: the keeper's own thread, asleep and awake --------- */

static void submit_nothing(struct cn_client *c)
{
    struct cn_record record = {.op = CN_OP_ABORT};
    int status = cn_submit(c, &record, 1000000);
    MODEL_CHECK(status == CN_OK, "cn_submit: status %d", status);
}

/* One short of the end of the ring's array, so that what follows wraps around. */
static void sleeping_keeper(void)
{
    pool_open(1, 1);
    for (uint32_t i = 0; i < 2 * CN_RING_RECORDS - 1; i++) {
        submit_nothing(pool.client[FIRST]);
        if (i % 64 == 0)
            pool_settle();
    }
    pool_settle();
    cn_keeper_start(pool.keeper);
}

static void submit_and_flush(void)
{
    submit_nothing(pool.client[FIRST]);
    submit_nothing(pool.client[FIRST]);
    int status = cn_flush(pool.client[FIRST], 1000000);
    MODEL_CHECK(status == CN_OK, "cn_flush: status %d", status);
}

static void nobody_waits(void)
{
    const struct cn_session *s = pool.keeper->sessions[pool.session[FIRST]];
    /* What a client killed before it rang leaves behind is found when its session ends. */
    MODEL_CHECK(model_task_state(0) == TASK_KILLED || !cn_session_has_work(s),
                "the keeper sleeps with work in the ring");
    MODEL_CHECK(model_task_state(0) != TASK_READY, "the client waits for ever");
    MODEL_CHECK(model_task_state(0) != TASK_DONE || pool.keeper->count.bad_records == 0,
                "a record was torn");
    pool_finish();
}

static const struct scenario ring_empty = {
    .name = "ring-empty",
    .claim = "no wake-up is lost between a submission and a keeper that falls asleep",
    .setup = sleeping_keeper,
    .task = {submit_and_flush, model_run_thread},
    .task_name = {"client", "keeper"},
    .finish = nobody_waits,
    .mortal = 1,
    .crashes = 1,
};

static void full_ring(void)
{
    sleeping_keeper();
    for (uint32_t i = 0; i < CN_RING_RECORDS; i++)
        submit_nothing(pool.client[FIRST]);
}

static void submit_one(void) { submit_nothing(pool.client[FIRST]); }

static const struct scenario ring_full = {
    .name = "ring-full",
    .claim = "a client that waits for room is woken, and its record is not lost",
    .setup = full_ring,
    .task = {submit_one, model_run_thread},
    .task_name = {"client", "keeper"},
    .finish = nobody_waits,
};

static const struct scenario ring_full_crash = {
    .name = "ring-full-crash",
    .claim = "the same when the client may be killed while it waits",
    .setup = full_ring,
    .task = {submit_one, model_run_thread},
    .task_name = {"client", "keeper"},
    .finish = nobody_waits,
    .mortal = 1,
    .crashes = 1,
    .nightly = true,
};

static void two_rings(void)
{
    pool_open(1, 2);
    cn_keeper_start(pool.keeper);
}

static void flush_second(void)
{
    submit_nothing(pool.client[SECOND]);
    int status = cn_flush(pool.client[SECOND], 1000000);
    MODEL_CHECK(status == CN_OK, "cn_flush: status %d", status);
}

static void flush_first(void)
{
    submit_nothing(pool.client[FIRST]);
    int status = cn_flush(pool.client[FIRST], 1000000);
    MODEL_CHECK(status == CN_OK, "cn_flush: status %d", status);
}

static void neither_waits(void)
{
    MODEL_CHECK(model_task_state(1) == TASK_DONE, "the second client waits for ever");
    nobody_waits();
}

static const struct scenario ring_two = {
    .name = "ring-two",
    .claim = "the same with two clients and one keeper",
    .setup = two_rings,
    .task = {flush_first, flush_second, model_run_thread},
    .task_name = {"client 1", "client 2", "keeper"},
    .finish = neither_waits,
    .nightly = true,
};

const struct scenario *const model_scenarios[] = {
    &acquire_evict,
    &token_evict,
    &batch_evict,
    &commit_match,
    &commit_link,
    &release_evict,
    &stock_revoke,
    &death_evict,
    &ring_empty,
    &ring_full,
    &threads_evict,
    &threads_batch,
    &lease_move,
    &token_move,
    &lease_clear,
    &token_clear,
    &commit_match_3,
    &ring_two,
    &ring_full_crash,
    &both_move,
    &restart_dying_word,
    &restart_dying_index,
    &restart_dying_scanned,
    &restart_free_word,
    &restart_grant_word,
    &restart_commit_live,
    &restart_commit_index,
    &restart_writer,
    &restart_anywhere,
    NULL,
};
