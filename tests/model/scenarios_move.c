/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Chunks that leave without being evicted: moved to another extent, or cleared with all others.
 *
 * The keeper's task may be killed here, too: nobody takes its pool over, and those who read it go
 * on with what it left.
 */
#include "scenarios.h"

/* What another client sees of a pool whose keeper died: whole chunks, or none. */
static void nothing_is_left_or_keeper_died(void)
{
    uint32_t keeper = model_task_state(2) == TASK_KILLED ? 2 : 1;
    if (model_task_state(keeper) != TASK_KILLED) {
        nothing_is_left();
        return;
    }
    for (uint32_t n = A; n <= D; n++)
        pool_read(FIRST, n);
}

/* ---- acquire x move ------------------------------------------------------- */

/* Free, A, free: room for two extents is made by moving A, and by nothing else. */
static void a_in_the_way(void)
{
    pool_open(3, 2);
    pool_put(SECOND, C);
    pool_put(SECOND, A);
    pool_submit_key(SECOND, CN_OP_DELETE, C);
    pool_settle();
    cn_revoke_stock(pool.keeper, 0);
    take_token();
}

/* B, of two extents, takes the place that A leaves; while that is leased it cannot, rightly so. */
static void move_and_refill(void)
{
    bool room = cn_reclaim(pool.keeper, 2 * POOL_EXTENT);
    MODEL_CHECK(!room || pool.keeper->count.moves == 1, "room for B, and A was not moved");
    cn_limbo_look(pool.keeper);
    if (pool.keeper->count.moves == 0 || pool.keeper->limbo_count > 0)
        return;
    pool_want_large(SECOND, 2);
    pool_step();
    MODEL_CHECK(pool_stock_ready(SECOND), "there is room for B, and it is not granted");
    pool_write_large(SECOND, B, 2);
    pool_step();
}

/* Nobody takes A away: it is found where it was or where it is, at the second try at the latest. */
static void acquire_twice(void)
{
    MODEL_CHECK(pool_read(FIRST, A) || pool_read(FIRST, A), "A is lost by its move");
}

static void a_is_there(void)
{
    bool reader_lives = model_task_state(0) != TASK_KILLED;
    MODEL_CHECK(!reader_lives || pool_read(FIRST, A), "A is lost by its move");
    nothing_is_left_or_keeper_died();
}

const struct scenario lease_move = {
    .name = "lease-move",
    .claim = "a key that moves is found, with its own bytes, while its old extent is refilled",
    .setup = a_in_the_way,
    .task = {acquire_twice, move_and_refill},
    .task_name = {"reader", "keeper"},
    .finish = a_is_there,
    .mortal = 3,
    .crashes = 1,
};

const struct scenario token_move = {
    .name = "token-move",
    .claim = "a token of a chunk that moves opens its own bytes or nothing",
    .setup = a_in_the_way,
    .task = {open_token, move_and_refill},
    .task_name = {"reader", "keeper"},
    .finish = a_is_there,
    .mortal = 3,
    .crashes = 1,
};

const struct scenario both_move = {
    .name = "both-move",
    .claim = "the same for both at once, as threads of one client",
    .setup = a_in_the_way,
    .task = {acquire_twice, open_token, move_and_refill},
    .task_name = {"thread 1", "thread 2", "keeper"},
    .finish = a_is_there,
    .nightly = true,
};

/* ---- acquire x clear ------------------------------------------------------ */

static void one_extent_with_a(void)
{
    pool_open(1, 2);
    pool_put(SECOND, A);
    take_token();
}

static void clear_and_refill(void)
{
    uint64_t dropped;
    cn_keeper_clear(pool.keeper, &dropped);
    pool_want(SECOND);
    pool_step();
    if (pool_stock_ready(SECOND))
        pool_write(SECOND, B);
    pool_step();
}

const struct scenario lease_clear = {
    .name = "lease-clear",
    .claim = "a lease shows its own key's bytes, while the pool is cleared and refilled",
    .setup = one_extent_with_a,
    .task = {acquire, clear_and_refill},
    .task_name = {"reader", "keeper"},
    .finish = nothing_is_left_or_keeper_died,
    .mortal = 3,
    .crashes = 1,
};

const struct scenario token_clear = {
    .name = "token-clear",
    .claim = "the same for a token",
    .setup = one_extent_with_a,
    .task = {open_token, clear_and_refill},
    .task_name = {"reader", "keeper"},
    .finish = nothing_is_left_or_keeper_died,
    .mortal = 3,
    .crashes = 1,
};
