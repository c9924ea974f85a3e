/* SPDX-License-Identifier: Apache-2.0 */
/* What machine.c, world.c and syscalls.c share. */
#ifndef CN_MODEL_MACHINE_H
#define CN_MODEL_MACHINE_H

#include <setjmp.h>
#include <ucontext.h>

#include "explorer.h"

#define TICK_NS 3000000u /* each look at a clock: past every spin, below every deadline */
#define BUFFER_MAX 16u

struct store {
    uint8_t *p;
    uint64_t value;
    uint64_t under; /* what memory holds for the others */
    uint32_t bytes;
    uint32_t step;
};

struct task {
    enum task_state state;
    bool started;
    bool killed;
    bool waits; /* in a futex */
    bool woken;
    uint32_t woken_by;
    const void *futex;
    struct op next;
    struct store buffer[BUFFER_MAX + 1]; /* and its death */
    uint32_t buffered;
    uint64_t now_ns;
    ucontext_t context;
    jmp_buf jump;
    uint8_t *stack;
};

struct world_head { /* first page of the world: goes back with the rest */
    uint64_t used;
    uint64_t dead[TASKS_MAX];
    uint64_t bells;
    uint64_t now_ns; /* of whoever runs alone */
    void *(*thread)(void *);
    void *thread_arg;
};

extern struct world_head *const world;
extern struct task tasks[TASKS_MAX];
extern int current;     /* running task; -1: setup, finish or the search */
extern bool world_open; /* allocations lie in the world */

/* Empty memory, everything protected by world_protect() saved at its first write. */
void world_new(void);
void world_protect(void);
void world_restore(void);
bool in_world(const void *p);
/* Accesses of this word are steps, in all schedules. */
void share(const void *p);
/* Is the word touched by two tasks, one of which writes? Found out on the way. */
bool is_shared(const void *p, bool writes);
_Noreturn void leave(enum outcome outcome);
/* Before an access: true if it is one whose order matters. Locked ones empty the buffer either
 * way. */
bool at(enum op_kind kind, const void *p, bool writes);
/* Let others move until it is the turn of task self. */
void schedule(int self);

#endif
