/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The explorer: the shipped C code under every schedule that matters.
 *
 * A scenario is a handful of tasks over one pool. The core is compiled with CN_MODEL_CHECK, so that
 * each atomic access of cn_atomic.h is a step of its own, and the search decides before each step
 * which agent moves:
 *
 *   RUN x     task x performs its next access and goes on to the one after it
 *   FLUSH x   the oldest store in x's FIFO store buffer becomes visible (x86-TSO)
 *   KILL x    task x ends here, as by SIGKILL, at most `crashes` times a schedule
 *
 *   machine.c     tasks and store buffers
 *   world.c       memory that goes back to its first state
 *   syscalls.c    futex, doorbell, clock
 *   search.c      which schedules: depth first, dynamic partial-order reduction, sleep sets
 *   litmus.c      textbook programs whose results are known: is the explorer itself right?
 *   pool.c        a pool without mappings; scenarios*.c what is tried on it; main.c the command
 *
 * A load sees its own task's buffered stores first; a fence, a locked operation or a system call
 * waits until the task's buffer is empty. Plain accesses between two atomic ones belong to the step
 * before them and are no points of interleaving: a scenario that wants to see single bytes reads
 * and writes them with cn_load_relaxed() and cn_store_relaxed().
 */
#ifndef CN_MODEL_EXPLORER_H
#define CN_MODEL_EXPLORER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TASKS_MAX 3u
#define AGENTS (3u * TASKS_MAX)
#define STEPS_MAX 8000u

/* ---- what a scenario says ------------------------------------------------- */

struct scenario {
    const char *name;
    const char *claim;
    void (*setup)(void); /* once; all it makes is put back before each schedule */
    void (*task[TASKS_MAX])(void);
    const char *task_name[TASKS_MAX];
    void (*finish)(void); /* at the end of each schedule, alone */
    uint32_t mortal;      /* bit a task: may be killed */
    uint32_t crashes;
    uint32_t buffer;      /* stores a buffer holds, 0 = MODEL_BUFFER */
    bool nightly;         /* takes longer than a CI run should */
    uint32_t outcomes_sc; /* how many different model_outcome()s there must be */
    uint32_t outcomes_tso;
};

#define MODEL_BUFFER 8u

/* Ended by NULL. */
extern const struct scenario *const model_litmus[];
extern const struct scenario *const model_scenarios[];
/* A random program of a few steps; the same for the same seed. */
const struct scenario *model_random_program(uint32_t seed);

enum task_state { TASK_READY, TASK_DONE, TASK_KILLED };
enum task_state model_task_state(uint32_t task);
/* An access of the calling task: was `task` killed? */
bool model_is_dead(uint32_t task);
/* For traces: bytes at p, in elements of stride bytes, are called name[0], name[1] ... */
void model_label(const void *p, size_t bytes, size_t stride, const char *name);
/* What a schedule came to, for scenarios that count the possible results. */
void model_outcome(uint64_t outcome);
/* This schedule shows a defect: it is reported and the search ends. */
_Noreturn void model_violation(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define MODEL_CHECK(condition, ...)                                                                \
    do {                                                                                           \
        if (!(condition))                                                                          \
            model_violation(__VA_ARGS__);                                                          \
    } while (0)

/* The function and argument of the thread that setup "started" last (pthread_create is ours). */
void model_run_thread(void);

/* ---- between machine.c and search.c --------------------------------------- */

enum agent_kind { AGENT_RUN, AGENT_FLUSH, AGENT_KILL };
enum op_kind {
    OP_START,
    OP_LOAD,
    OP_STORE,
    OP_CAS,
    OP_ADD,
    OP_FENCE,
    OP_WAIT,
    OP_WOKEN,
    OP_WAKE,
    OP_BELL,
    OP_POLL,
    OP_FLUSH,
    OP_KILL
};

struct op {
    enum op_kind kind;
    bool writes;
    const uint64_t *cell; /* the word of memory whose order matters, or NULL */
    const void *addr;     /* for the trace */
};

static inline uint32_t agent_of(enum agent_kind kind, uint32_t task)
{
    return (uint32_t)kind * TASKS_MAX + task;
}
static inline uint32_t agent_task(uint32_t agent) { return agent % TASKS_MAX; }
static inline enum agent_kind agent_kind(uint32_t agent)
{
    return (enum agent_kind)(agent / TASKS_MAX);
}

enum outcome {
    RUN_ENDED = 1, /* nobody can move any more, and finish() was content */
    RUN_PRUNED,    /* the search has seen an equivalent one */
    RUN_GREW,      /* a word turned out to be shared: begin again */
    RUN_VIOLATED,
    RUN_TOO_LONG
};

struct machine_options {
    uint32_t buffer; /* 0: sequential consistency */
    uint32_t crashes;
};

void machine_open(const struct scenario *scenario, const struct machine_options *options);
enum outcome machine_run(void);
/* Agents that can move now, as bits. */
uint32_t machine_enabled(void);
/* What agent would do next; false when it has nothing to do, ever or for now. */
bool machine_next(uint32_t agent, struct op *ret_op);
/* Number of the step that put the oldest store into the buffer of task; 0: none. */
uint32_t machine_oldest_store(uint32_t task);
/* Number of the step without which task would still sleep; 0: none. */
uint32_t machine_woken_by(uint32_t task);
uint32_t machine_shared_words(void);
const char *machine_message(void);
/* Name of an address, into text. */
void machine_name(const void *p, char *text, size_t bytes);

/* The next agent, or CHOICE_*. Called before each step. */
#define CHOICE_END (-1)
#define CHOICE_PRUNE (-2)
#define CHOICE_TOO_LONG (-3)
int search_choose(void);
/* Number of the step that is being taken, from 1. */
uint32_t search_step(void);
/* The step being taken saw or made this value. */
void search_value(uint64_t value);

struct search_result {
    uint64_t schedules;
    uint64_t pruned;
    double seconds;
    enum outcome outcome; /* RUN_ENDED: all were explored */
    bool stopped;         /* by the time limit */
    uint32_t outcomes;    /* different ones */
};

/* seconds_max 0: no limit. */
void search_all(const struct scenario *s, const struct machine_options *o, double seconds_max,
                struct search_result *ret_result);
/* The same without any reduction, for programs of a few steps. */
void search_every_order(const struct scenario *s, const struct machine_options *o,
                        struct search_result *ret_result);
/* Integers: number of shared words, then one agent a step. Returns what the replay came to. */
enum outcome search_replay(const struct scenario *s, const struct machine_options *o,
                           const uint32_t *list, uint32_t count);
/* The schedule of the last run, as search_replay() takes it. */
uint32_t search_schedule(uint32_t *ret_list, uint32_t list_max);
void search_print_trace(const struct scenario *s);

#endif
