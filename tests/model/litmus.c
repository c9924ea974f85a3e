/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Textbook programs whose possible results under sequential consistency and x86-TSO are known
 * (Sewell et al., "x86-TSO", CACM 2010). If the explorer finds more it invents, if fewer it
 * overlooks.
 */
#include <stdlib.h>

#include "cn_atomic.h"
#include "explorer.h"

static uint64_t *x, *y, *r; /* x and y are the memory, r[] what was loaded */

static void setup(void)
{
    x = calloc(8, 8);
    y = calloc(8, 8);
    r = calloc(8, 8);
}

static void results(void)
{
    model_outcome(r[0] | r[1] << 8 | r[2] << 16 | r[3] << 24 | *x << 32 | *y << 40);
}

static void sb_1(void)
{
    cn_store_relaxed(x, 1);
    r[0] = cn_load_relaxed(y);
}
static void sb_2(void)
{
    cn_store_relaxed(y, 1);
    r[1] = cn_load_relaxed(x);
}

static const struct scenario sb = {
    .name = "litmus-sb",
    .claim = "store buffering: both may load 0 under TSO, not under SC",
    .setup = setup,
    .task = {sb_1, sb_2},
    .task_name = {"1", "2"},
    .finish = results,
    .outcomes_sc = 3,
    .outcomes_tso = 4,
};

static void sbf_1(void)
{
    cn_store_relaxed(x, 1);
    cn_fence();
    r[0] = cn_load_relaxed(y);
}
static void sbf_2(void)
{
    cn_store_relaxed(y, 1);
    cn_fence();
    r[1] = cn_load_relaxed(x);
}

static const struct scenario sb_fences = {
    .name = "litmus-sb-fences",
    .claim = "with a fence on both sides TSO is as SC",
    .setup = setup,
    .task = {sbf_1, sbf_2},
    .task_name = {"1", "2"},
    .finish = results,
    .outcomes_sc = 3,
    .outcomes_tso = 3,
};

static const struct scenario sb_one_fence = {
    .name = "litmus-sb-fence",
    .claim = "a fence on one side alone does not help",
    .setup = setup,
    .task = {sbf_1, sb_2},
    .task_name = {"1", "2"},
    .finish = results,
    .outcomes_sc = 3,
    .outcomes_tso = 4,
};

static void mp_1(void)
{
    cn_store_relaxed(x, 1);
    cn_store_relaxed(y, 1);
}
static void mp_2(void)
{
    r[0] = cn_load_relaxed(y);
    r[1] = cn_load_relaxed(x);
}

static const struct scenario mp = {
    .name = "litmus-mp",
    .claim = "message passing: stores are seen in their order",
    .setup = setup,
    .task = {mp_1, mp_2},
    .task_name = {"1", "2"},
    .finish = results,
    .outcomes_sc = 3,
    .outcomes_tso = 3,
};

static void lb_1(void)
{
    r[0] = cn_load_relaxed(x);
    cn_store_relaxed(y, 1);
}
static void lb_2(void)
{
    r[1] = cn_load_relaxed(y);
    cn_store_relaxed(x, 1);
}

static const struct scenario lb = {
    .name = "litmus-lb",
    .claim = "load buffering: no load is later than its task's next store",
    .setup = setup,
    .task = {lb_1, lb_2},
    .task_name = {"1", "2"},
    .finish = results,
    .outcomes_sc = 3,
    .outcomes_tso = 3,
};

/* n6: each sees its own store before it is flushed. */
static void n6_1(void)
{
    cn_store_relaxed(x, 1);
    r[0] = cn_load_relaxed(x);
    r[1] = cn_load_relaxed(y);
}
static void n6_2(void)
{
    cn_store_relaxed(y, 2);
    cn_store_relaxed(x, 2);
}

static const struct scenario n6 = {
    .name = "litmus-n6",
    .claim = "own stores are seen first",
    .setup = setup,
    .task = {n6_1, n6_2},
    .task_name = {"1", "2"},
    .finish = results,
    .outcomes_sc = 4,
    .outcomes_tso = 5,
};

static void add_1(void)
{
    r[0] = cn_add_relaxed(x, 1);
    r[1] = cn_add_relaxed(x, 1);
}
static void add_2(void) { r[2] = cn_add_relaxed(x, 1); }

static const struct scenario adds = {
    .name = "litmus-adds",
    .claim = "locked additions are whole",
    .setup = setup,
    .task = {add_1, add_2},
    .task_name = {"1", "2"},
    .finish = results,
    .outcomes_sc = 3,
    .outcomes_tso = 3,
};

static void iriw_w(void)
{
    cn_store_relaxed(x, 1);
    cn_store_relaxed(x, 2);
}
static void iriw_1(void)
{
    r[0] = cn_load_relaxed(x);
    r[1] = cn_load_relaxed(x);
}
static void iriw_2(void)
{
    r[2] = cn_load_relaxed(x);
    r[3] = cn_load_relaxed(x);
}

/* Each reader sees one of 6 non-decreasing pairs, whatever the other sees. */
static const struct scenario coherence = {
    .name = "litmus-coherence",
    .claim = "nobody sees one word go back",
    .setup = setup,
    .task = {iriw_w, iriw_1, iriw_2},
    .task_name = {"writer", "1", "2"},
    .finish = results,
    .outcomes_sc = 36,
    .outcomes_tso = 36,
};

static void kill_1(void)
{
    cn_store_relaxed(x, 1);
    cn_store_relaxed(y, 1);
    cn_store_relaxed(x, 2);
}
static void kill_2(void) { r[0] = cn_load_relaxed(y); }

/* Memory ends as 0,0 1,0 1,1 or 2,1; 1 was loaded in the last two at most: 6 outcomes. */
static const struct scenario crash = {
    .name = "litmus-crash",
    .claim = "a task is killed at every step that others can notice",
    .setup = setup,
    .task = {kill_1, kill_2},
    .task_name = {"victim", "2"},
    .finish = results,
    .mortal = 1,
    .crashes = 1,
    .outcomes_sc = 6,
    .outcomes_tso = 6,
};

const struct scenario *const model_litmus[] = {
    &sb, &sb_fences, &sb_one_fence, &mp, &lb, &n6, &adds, &coherence, &crash, NULL,
};

/* ---- random programs: the reduced search must find what the search of every order finds ---- */

#define PROGRAM_STEPS 3u

static uint32_t program_steps;
static struct program_step {
    uint32_t op;
    uint32_t word;
    uint32_t value;
} program[TASKS_MAX][PROGRAM_STEPS];

static void run_program(uint32_t task)
{
    for (uint32_t i = 0; i < program_steps; i++) {
        const struct program_step *step = &program[task][i];
        uint64_t *p = step->word == 0 ? x : y;
        uint64_t expected = 0;
        switch (step->op) {
        case 0:
        case 1:
            r[task] = r[task] * 8 + cn_load_relaxed(p);
            break;
        case 2:
        case 3:
            cn_store_relaxed(p, step->value);
            break;
        case 4:
            cn_fence();
            break;
        case 5:
            cn_cas(p, &expected, step->value);
            r[task] = r[task] * 8 + expected;
            break;
        default:
            r[task] = r[task] * 8 + model_is_dead(0);
        }
    }
}

static void program_1(void) { run_program(0); }
static void program_2(void) { run_program(1); }
static void program_3(void) { run_program(2); }

static void program_results(void)
{
    model_outcome(r[0] | r[1] << 16 | r[2] << 32 | *x << 48 | *y << 52);
}

/* Where task 1 may be killed, what it had loaded dies with it: nobody else can know. */
static void mortal_results(void) { model_outcome(r[1] << 16 | r[2] << 32 | *x << 48 | *y << 52); }

const struct scenario *model_random_program(uint32_t seed)
{
    static struct scenario s;
    bool three = seed % 4 == 0; /* tasks; every order of theirs is many */
    bool killed = seed % 4 == 1;
    program_steps = three ? 2 : PROGRAM_STEPS;
    uint32_t random = seed * 2654435761u + 1;
    for (uint32_t task = 0; task < TASKS_MAX; task++) {
        for (uint32_t i = 0; i < PROGRAM_STEPS; i++) {
            random = random * 1664525u + 1013904223u;
            program[task][i] =
                (struct program_step){(random >> 24) % 7, random >> 20 & 1, 1 + (random >> 16 & 3)};
        }
    }
    s = (struct scenario){
        .name = "random",
        .claim = "as many outcomes as without reduction",
        .setup = setup,
        .task = {program_1, program_2, three ? program_3 : NULL},
        .task_name = {"1", "2", "3"},
        .finish = killed ? mortal_results : program_results,
        .mortal = 1,
        .crashes = killed,
    };
    return &s;
}
