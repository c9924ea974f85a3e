/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The machine that scenarios run on: tasks, their store buffers, and the accesses of cn_atomic.h.
 *
 * While a task runs, its buffered stores lie in memory (so that its plain loads see them, too) and
 * are taken out again before anybody else runs: what others see is what was flushed.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cn_atomic.h"
#include "machine.h"

#define STACK_BYTES (256u * 1024u)

static const struct scenario *scenario;
static struct machine_options options;
struct task tasks[TASKS_MAX];
int current = -1;
static jmp_buf main_jump;
static char message[512];
static uint32_t crashes;

/* ---- leaving a schedule --------------------------------------------------- */

_Noreturn void leave(enum outcome outcome)
{
    current = -1;
    _longjmp(main_jump, outcome);
}

void model_violation(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    leave(RUN_VIOLATED);
}

const char *machine_message(void) { return message; }

/* ---- store buffers -------------------------------------------------------- */

static void overlay_on(struct task *t)
{
    for (uint32_t i = 0; i < t->buffered; i++) {
        struct store *s = &t->buffer[i];
        s->under = 0;
        memcpy(&s->under, s->p, s->bytes);
        memcpy(s->p, &s->value, s->bytes);
    }
}

static void overlay_off(struct task *t)
{
    for (uint32_t i = t->buffered; i-- > 0;) {
        struct store *s = &t->buffer[i];
        if (memcmp(s->p, &s->value, s->bytes) != 0) {
            t->buffered = 0;
            model_violation("plain store to a word that others load atomically: %p", (void *)s->p);
        }
        memcpy(s->p, &s->under, s->bytes);
    }
}

static void flush_oldest(struct task *t)
{
    struct store oldest = t->buffer[0];
    t->buffered--;
    memmove(&t->buffer[0], &t->buffer[1], t->buffered * sizeof(t->buffer[0]));
    memcpy(oldest.p, &oldest.value, oldest.bytes);
    search_value(oldest.value);
}

uint32_t machine_oldest_store(uint32_t task)
{
    return tasks[task].buffered == 0 ? 0 : tasks[task].buffer[0].step;
}

uint32_t machine_woken_by(uint32_t task) { return tasks[task].woken_by; }

/* ---- who can do what ------------------------------------------------------ */

static bool run_enabled(const struct task *t)
{
    if (t->state != TASK_READY)
        return false;
    switch (t->next.kind) {
    case OP_START:
    case OP_LOAD:
        return true;
    case OP_STORE:
        return options.buffer == 0 || t->buffered < options.buffer;
    case OP_WOKEN:
        return t->woken;
    case OP_POLL:
        return t->buffered == 0 && world->bells != 0;
    default:
        return t->buffered == 0;
    }
}

static bool kill_enabled(uint32_t task)
{
    return crashes < options.crashes && (scenario->mortal >> task & 1) != 0 && !tasks[task].killed;
}

uint32_t machine_enabled(void)
{
    uint32_t enabled = 0;
    for (uint32_t i = 0; i < TASKS_MAX; i++) {
        if (scenario->task[i] == NULL)
            break;
        enabled |= (uint32_t)run_enabled(&tasks[i]) << agent_of(AGENT_RUN, i);
        enabled |= (uint32_t)(tasks[i].buffered > 0) << agent_of(AGENT_FLUSH, i);
        enabled |= (uint32_t)kill_enabled(i) << agent_of(AGENT_KILL, i);
    }
    return enabled;
}

static const uint64_t *cell_of(const void *p)
{
    return (const uint64_t *)((uintptr_t)p & ~(uintptr_t)7);
}

bool machine_next(uint32_t agent, struct op *ret_op)
{
    uint32_t task = agent_task(agent);
    const struct task *t = &tasks[task];
    switch (agent_kind(agent)) {
    case AGENT_RUN:
        *ret_op = t->next;
        return t->state == TASK_READY;
    case AGENT_FLUSH:
        if (t->buffered == 0)
            return false;
        *ret_op = (struct op){OP_FLUSH, true, cell_of(t->buffer[0].p), t->buffer[0].p};
        return true;
    default:
        *ret_op = (struct op){OP_KILL, false, NULL, &world->dead[task]};
        return kill_enabled(task);
    }
}

enum task_state model_task_state(uint32_t task) { return tasks[task].state; }

/* ---- switching ------------------------------------------------------------ */

static void task_main(void);

/*
 * A task that is done may be killed, too: from there the search moves the kill to earlier steps.
 * Its death is seen after all it stored: the exit path of the kernel empties the buffer.
 */
static void kill_task(struct task *t, uint32_t task)
{
    if (t->state == TASK_READY)
        t->state = TASK_KILLED;
    t->killed = true;
    crashes++;
    t->buffer[t->buffered++] = (struct store){
        .p = (uint8_t *)&world->dead[task], .value = 1, .bytes = 8, .step = search_step()};
}

static void start(struct task *t)
{
    t->started = true;
    getcontext(&t->context);
    t->context.uc_stack.ss_sp = t->stack;
    t->context.uc_stack.ss_size = STACK_BYTES;
    t->context.uc_link = NULL;
    makecontext(&t->context, task_main, 0);
    setcontext(&t->context);
    abort();
}

/* Let the search move agents until it is the calling task's turn (self -1: the main program). */
void schedule(int self)
{
    if (self >= 0)
        overlay_off(&tasks[self]);
    for (;;) {
        current = -1;
        int agent = search_choose();
        if (agent < 0)
            leave(agent == CHOICE_END     ? RUN_ENDED
                  : agent == CHOICE_PRUNE ? RUN_PRUNED
                                          : RUN_TOO_LONG);
        uint32_t task = agent_task((uint32_t)agent);
        struct task *t = &tasks[task];
        if (agent_kind((uint32_t)agent) == AGENT_FLUSH) {
            flush_oldest(t);
            continue;
        }
        if (agent_kind((uint32_t)agent) == AGENT_KILL) {
            kill_task(t, task);
            continue;
        }
        current = (int)task;
        if (current != self && (self < 0 || _setjmp(tasks[self].jump) == 0)) {
            if (!t->started)
                start(t);
            _longjmp(t->jump, 1);
        }
        overlay_on(&tasks[self]);
        return;
    }
}

static void task_main(void)
{
    int self = current;
    overlay_on(&tasks[self]);
    scenario->task[self]();
    tasks[self].state = TASK_DONE;
    schedule(self);
    abort();
}

static void run_tasks(void)
{
    for (uint32_t i = 0; i < TASKS_MAX; i++) {
        struct task *t = &tasks[i];
        t->state = scenario->task[i] == NULL ? TASK_DONE : TASK_READY;
        t->started = t->killed = t->waits = t->woken = false;
        t->woken_by = 0;
        t->buffered = 0;
        t->now_ns = TICK_NS;
        t->next = (struct op){.kind = OP_START};
    }
    crashes = 0;
    schedule(-1);
}

enum outcome machine_run(void)
{
    world_restore();
    world_open = true;
    int outcome = _setjmp(main_jump);
    if (outcome == 0)
        run_tasks();
    if (outcome == RUN_ENDED && scenario->finish != NULL) {
        outcome = _setjmp(main_jump);
        if (outcome == 0) {
            scenario->finish();
            outcome = RUN_ENDED;
        }
    }
    world_open = false;
    return (enum outcome)outcome;
}

void machine_open(const struct scenario *s, const struct machine_options *o)
{
    scenario = s;
    options = *o;
    for (uint32_t i = 0; i < TASKS_MAX; i++)
        if (tasks[i].stack == NULL)
            tasks[i].stack = aligned_alloc(4096, STACK_BYTES);
    world_new();
    world_open = true;
    if (_setjmp(main_jump) != 0) {
        fprintf(stderr, "%s: setup: %s\n", s->name, message);
        exit(2);
    }
    s->setup();
    world_open = false;
    world_protect();
}

/* ---- accesses: what cn_atomic.h calls ------------------------------------- */

/* A store of a task that may be killed right behind it: what comes after its death sees it. */
static bool may_be_last(const void *p, bool writes)
{
    return writes && options.crashes > 0 && (scenario->mortal >> current & 1) != 0 && in_world(p);
}

bool at(enum op_kind kind, const void *p, bool writes)
{
    if (current < 0)
        return false;
    struct task *t = &tasks[current];
    bool matters = p != NULL && (is_shared(p, writes) || may_be_last(p, writes));
    bool locked = kind != OP_LOAD && kind != OP_STORE;
    if (!matters && !(locked && t->buffered > 0))
        return false;
    bool buffered = kind == OP_STORE && options.buffer > 0;
    t->next = (struct op){kind, writes, matters && !buffered ? cell_of(p) : NULL, p};
    schedule(current);
    return matters;
}

static void store(void *p, uint64_t value, uint32_t bytes)
{
    bool matters = at(OP_STORE, p, true);
    if (matters)
        search_value(value);
    if (matters && options.buffer > 0) {
        struct task *t = &tasks[current];
        struct store *s = &t->buffer[t->buffered++];
        *s = (struct store){.p = p, .value = value, .bytes = bytes, .step = search_step()};
        memcpy(&s->under, p, bytes);
    }
    memcpy(p, &value, bytes);
}

uint64_t cn_model_load(const uint64_t *p)
{
    if (at(OP_LOAD, p, false))
        search_value(*p);
    return *p;
}

uint32_t cn_model_load32(const uint32_t *p)
{
    if (at(OP_LOAD, p, false))
        search_value(*p);
    return *p;
}

void cn_model_store(uint64_t *p, uint64_t v) { store(p, v, 8); }

void cn_model_store32(uint32_t *p, uint32_t v) { store(p, v, 4); }

bool cn_model_cas(uint64_t *p, uint64_t *expected, uint64_t v)
{
    bool matters = at(OP_CAS, p, true);
    bool same = *p == *expected;
    if (same)
        *p = v;
    else
        *expected = *p;
    if (matters)
        search_value(*p);
    return same;
}

uint64_t cn_model_add(uint64_t *p, uint64_t v)
{
    bool matters = at(OP_ADD, p, true);
    uint64_t before = *p;
    *p = before + v;
    if (matters)
        search_value(*p);
    return before;
}

void cn_model_fence(void) { at(OP_FENCE, NULL, false); }

bool model_is_dead(uint32_t task) { return cn_model_load(&world->dead[task]) != 0; }
