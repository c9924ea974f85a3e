/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A keeper dies, and another takes its pool over, while somebody reads (I7).
 *
 * The first of the two dies at one crash point, which is the scenario's, and the second begins at
 * once, in the same task: every step of the takeover meets every step of the reader. That a death
 * at any step whatever leaves what can be taken over is shown by restart-anywhere.
 */
#include <setjmp.h>
#include <string.h>

#include "cn_crash.h"
#include "scenarios.h"

static sigjmp_buf death;
static const char *deadly;
static struct cn_keeper *first; /* pool.keeper is what a schedule before this one left there */

static void on_point(const char *point)
{
    if (strcmp(point, deadly) == 0)
        siglongjmp(death, 1);
}

/* Take the only extent away from A, and commit B in it. */
static void refill(void)
{
    for (uint32_t round = 0; round < 2; round++) {
        if (!pool_stock_ready(SECOND))
            pool_want(SECOND);
        pool_step();
        if (!pool_stock_ready(SECOND))
            continue;
        pool_write(SECOND, B);
        pool_step();
        return;
    }
}

static void die_and_be_followed(const char *point)
{
    pool.keeper = first;
    deadly = point;
    cn_crash_hook = on_point;
    if (sigsetjmp(death, 0) == 0)
        refill();
    cn_crash_hook = NULL;
    pool_take_over();
    refill();
}

static void one_extent_with_a(void)
{
    cn_crash_hook = NULL;
    pool_open(1, 2);
    pool_put(SECOND, A);
    take_token();
    first = pool.keeper;
}

static void whole_and_at_an_end(void)
{
    cn_crash_hook = NULL;
    nothing_is_left();
}

static void read_twice(void)
{
    acquire();
    open_token();
}

#define RESTART_AT(point)                                                                          \
    static void keepers_##point(void) { die_and_be_followed(#point); }                             \
    const struct scenario restart_##point = {                                                      \
        .name = "restart-" #point,                                                                 \
        .claim = "a lease shows its own key's bytes while a keeper dies at " #point                \
                 " and another goes on",                                                           \
        .setup = one_extent_with_a,                                                                \
        .task = {read_twice, keepers_##point},                                                     \
        .task_name = {"reader", "keepers"},                                                        \
        .finish = whole_and_at_an_end,                                                             \
        .mortal = 1,                                                                               \
        .crashes = 1,                                                                              \
    }

RESTART_AT(dying_word);
RESTART_AT(dying_index);
RESTART_AT(dying_scanned);
RESTART_AT(free_word);
RESTART_AT(grant_word);
RESTART_AT(commit_live);
RESTART_AT(commit_index);

/* ---- who is writing meanwhile --------------------------------------------- */

static void one_extent_in_a_stock(void)
{
    cn_crash_hook = NULL;
    pool_open(1, 2);
    pool_want(SECOND);
    pool_settle();
    first = pool.keeper;
}

static void write_b(void) { pool_write(SECOND, B); }

/* The only extent is being filled: nobody else gets it. */
static void take_over_and_write_c(void)
{
    pool.keeper = first;
    pool_take_over();
    pool_want(FIRST);
    pool_step();
    if (pool_stock_ready(FIRST))
        pool_write(FIRST, C);
    pool_step();
}

const struct scenario restart_writer = {
    .name = "restart-writer",
    .claim = "what is being filled while keepers change is nobody else's",
    .setup = one_extent_in_a_stock,
    .task = {write_b, take_over_and_write_c},
    .task_name = {"writer", "keeper"},
    .finish = whole_and_at_an_end,
    .mortal = 1,
    .crashes = 1,
};

/* ---- a death at any step -------------------------------------------------- */

static void take_over_if_it_died(void)
{
    if (model_task_state(1) == TASK_KILLED)
        pool_take_over();
    whole_and_at_an_end();
}

static void refill_alone(void)
{
    pool.keeper = first;
    cn_crash_hook = NULL;
    refill();
}

const struct scenario restart_anywhere = {
    .name = "restart-anywhere",
    .claim = "whatever step a keeper dies at, another finds one story, and loses no chunk",
    .setup = one_extent_with_a,
    .task = {acquire, refill_alone},
    .task_name = {"reader", "keeper"},
    .finish = take_over_if_it_died,
    .mortal = 3,
    .crashes = 2,
};
