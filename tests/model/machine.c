/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The machine that scenarios run on: tasks, their store buffers, memory and system calls.
 *
 * Everything a scenario allocates lies in one mapping at a fixed address, the world. After setup() it
 * is write-protected; the first write to a page saves the page, and every page ever written is put
 * back before the next schedule. So a schedule costs microseconds, whatever the pool's size.
 *
 * While a task runs, its buffered stores lie in memory (so that its plain loads see them, too) and
 * are taken out again before anybody else runs: what others see is what was flushed.
 */
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "cn_atomic.h"
#include "explorer.h"
#include "pool.h"

#define WORLD_ADDR ((uint8_t *)0x200000000000)
#define WORLD_BYTES (64ull << 20)
#define WORLD_WORDS (WORLD_BYTES / 8)
#define PAGE 4096u
#define PAGES (WORLD_BYTES / PAGE)
#define STACK_BYTES (256u * 1024u)
#define BUFFER_MAX 16u
#define LABELS_MAX 64u
#define TICK_NS 3000000u             /* each look at a clock: past every spin, below every deadline */

struct store {
    uint8_t *p;
    uint64_t value;
    uint64_t under;                  /* what memory holds for the others */
    uint32_t bytes;
    uint32_t step;
};

struct task {
    enum task_state state;
    bool started;
    bool killed;
    bool waits;                      /* in a futex */
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

struct world_head {                  /* first page of the world: goes back with the rest */
    uint64_t used;
    uint64_t dead[TASKS_MAX];
    uint64_t bells;
    uint64_t now_ns;                 /* of whoever runs alone */
    void *(*thread)(void *);
    void *thread_arg;
};

static struct world_head *const world = (struct world_head *)WORLD_ADDR;
static const struct scenario *scenario;
static struct machine_options options;
static struct task tasks[TASKS_MAX];
static int current = -1;             /* running task; -1: setup, finish or the search */
static bool world_open;
static jmp_buf main_jump;
static char message[512];
static uint32_t crashes;

static uint8_t readers[WORLD_WORDS]; /* bit a task */
static uint8_t writers[WORLD_WORDS];
static bool shared[WORLD_WORDS];
static uint32_t shared_words;

static uint8_t *saved[PAGES];
static uint32_t dirty[PAGES];
static uint32_t dirty_count;

static struct {
    const uint8_t *p;
    size_t bytes;
    size_t stride;
    const char *name;
} labels[LABELS_MAX];
static uint32_t label_count;

/* ---- leaving a schedule ------------------------------------------------------------------------------- */

static _Noreturn void leave(enum outcome outcome)
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

const char *machine_message(void)
{
    return message;
}

/* ---- the world -------------------------------------------------------------------------------------- */

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *p, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
void __real_free(void *p);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *p, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
void __wrap_free(void *p);

static bool in_world(const void *p)
{
    return (const uint8_t *)p >= WORLD_ADDR && (const uint8_t *)p < WORLD_ADDR + WORLD_BYTES;
}

/* The length stands before each block, for realloc. Nothing is used twice: free does nothing. */
static void *world_alloc(size_t bytes, size_t alignment)
{
    uint64_t off = (world->used + 8 + alignment - 1) / alignment * alignment;
    if (off + bytes > WORLD_BYTES)
        return NULL;
    world->used = off + bytes;
    memcpy(WORLD_ADDR + off - 8, &(uint64_t){bytes}, 8);
    return WORLD_ADDR + off;
}

void *__wrap_malloc(size_t bytes)
{
    return world_open ? world_alloc(bytes, 64) : __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes)
{
    if (!world_open)
        return __real_calloc(count, bytes);
    return world_alloc(count * bytes, 64); /* never used before, or put back: zero */
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes)
{
    return world_open ? world_alloc(bytes, alignment) : __real_aligned_alloc(alignment, bytes);
}

void *__wrap_realloc(void *p, size_t bytes)
{
    if (!world_open)
        return __real_realloc(p, bytes);
    void *fresh = world_alloc(bytes, 64);
    if (p != NULL && fresh != NULL) {
        uint64_t old;
        memcpy(&old, (uint8_t *)p - 8, 8);
        memcpy(fresh, p, old < bytes ? old : bytes);
    }
    return fresh;
}

void __wrap_free(void *p)
{
    if (!in_world(p))
        __real_free(p);
}

static void on_fault(int signal_number, siginfo_t *info, void *context)
{
    (void)signal_number;
    (void)context;
    size_t page = in_world(info->si_addr) ? (size_t)((uint8_t *)info->si_addr - WORLD_ADDR) / PAGE : 0;
    if (!in_world(info->si_addr) || saved[page] != NULL)
        model_violation("fault at %p", info->si_addr);
    saved[page] = __real_malloc(PAGE);
    if (saved[page] == NULL)
        abort();
    memcpy(saved[page], WORLD_ADDR + page * PAGE, PAGE);
    dirty[dirty_count++] = (uint32_t)page;
    mprotect(WORLD_ADDR + page * PAGE, PAGE, PROT_READ | PROT_WRITE);
}

static void world_restore(void)
{
    for (uint32_t i = 0; i < dirty_count; i++)
        memcpy(WORLD_ADDR + (size_t)dirty[i] * PAGE, saved[dirty[i]], PAGE);
}

static bool share(const void *p)
{
    size_t word = (size_t)((const uint8_t *)p - WORLD_ADDR) / 8;
    if (!shared[word])
        shared_words++;
    shared[word] = true;
    return true;
}

static void world_new(void)
{
    munmap(WORLD_ADDR, WORLD_BYTES);
    void *map = mmap(WORLD_ADDR, WORLD_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (map != (void *)WORLD_ADDR)
        abort();
    world->used = PAGE;
    for (uint32_t i = 0; i < dirty_count; i++) {
        __real_free(saved[dirty[i]]);
        saved[dirty[i]] = NULL;
    }
    dirty_count = 0;
    memset(readers, 0, sizeof(readers));
    memset(writers, 0, sizeof(writers));
    memset(shared, 0, sizeof(shared));
    shared_words = 0;
    label_count = 0;
    for (uint32_t i = 0; i < TASKS_MAX; i++)
        share(&world->dead[i]);
    share(&world->bells);
}

uint32_t machine_shared_words(void)
{
    return shared_words;
}

void model_label(const void *p, size_t bytes, size_t stride, const char *name)
{
    if (label_count == LABELS_MAX)
        abort();
    labels[label_count].p = p;
    labels[label_count].bytes = bytes;
    labels[label_count].stride = stride;
    labels[label_count++].name = name;
}

/* The smallest labelled range that holds p. */
void machine_name(const void *p, char *text, size_t bytes)
{
    size_t best = SIZE_MAX;
    snprintf(text, bytes, "%p", p);
    for (uint32_t i = 0; i < label_count; i++) {
        size_t off = (size_t)((const uint8_t *)p - labels[i].p);
        if ((const uint8_t *)p < labels[i].p || off >= labels[i].bytes || labels[i].stride >= best)
            continue;
        best = labels[i].stride;
        size_t rest = off % labels[i].stride;
        if (labels[i].stride == labels[i].bytes)
            snprintf(text, bytes, "%s", labels[i].name);
        else
            snprintf(text, bytes, "%s[%zu]", labels[i].name, off / labels[i].stride);
        if (rest != 0)
            snprintf(text + strlen(text), bytes - strlen(text), "+%zu", rest);
    }
}

/* ---- store buffers -------------------------------------------------------------------------------------- */

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

uint32_t machine_woken_by(uint32_t task)
{
    return tasks[task].woken_by;
}

/* ---- who can do what --------------------------------------------------------------------------------------- */

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

enum task_state model_task_state(uint32_t task)
{
    return tasks[task].state;
}

/* ---- switching -------------------------------------------------------------------------------------------------- */

static void task_main(void);

/*
 * A task that is done may be killed, too: from there the search moves the kill to earlier steps. Its
 * death is seen after all it stored: the exit path of the kernel empties the buffer.
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
static void schedule(int self)
{
    if (self >= 0)
        overlay_off(&tasks[self]);
    for (;;) {
        current = -1;
        int agent = search_choose();
        if (agent < 0)
            leave(agent == CHOICE_END ? RUN_ENDED
                                      : agent == CHOICE_PRUNE ? RUN_PRUNED : RUN_TOO_LONG);
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
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    scenario = s;
    options = *o;
    for (uint32_t i = 0; i < TASKS_MAX; i++)
        if (tasks[i].stack == NULL)
            tasks[i].stack = __real_aligned_alloc(PAGE, STACK_BYTES);
    world_new();
    world_open = true;
    if (_setjmp(main_jump) != 0) {
        fprintf(stderr, "%s: setup: %s\n", s->name, message);
        exit(2);
    }
    s->setup();
    world_open = false;
    mprotect(WORLD_ADDR, WORLD_BYTES, PROT_READ);
}

/* ---- accesses: what cn_atomic.h calls -------------------------------------------------------------------------- */

/* Is the word touched by two tasks, one of which writes? Found out on the way, for all schedules. */
static bool is_shared(const void *p, bool writes)
{
    if (!in_world(p))
        return false;
    size_t word = (size_t)((const uint8_t *)p - WORLD_ADDR) / 8;
    uint8_t bit = (uint8_t)(1u << current);
    readers[word] |= bit;
    if (writes)
        writers[word] |= bit;
    if (shared[word])
        return true;
    if (writers[word] == 0 || (readers[word] & (readers[word] - 1)) == 0)
        return false;
    share(p);
    leave(RUN_GREW);
}

/* A store of a task that may be killed right behind it: what comes after its death sees it. */
static bool may_be_last(const void *p, bool writes)
{
    return writes && options.crashes > 0 && (scenario->mortal >> current & 1) != 0 && in_world(p);
}

/* Before an access: true if it is one whose order matters. Locked ones empty the buffer either way. */
static bool at(enum op_kind kind, const void *p, bool writes)
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

void cn_model_store(uint64_t *p, uint64_t v)
{
    store(p, v, 8);
}

void cn_model_store32(uint32_t *p, uint32_t v)
{
    store(p, v, 4);
}

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

void cn_model_fence(void)
{
    at(OP_FENCE, NULL, false);
}

bool model_is_dead(uint32_t task)
{
    return cn_model_load(&world->dead[task]) != 0;
}

/* ---- system calls ------------------------------------------------------------------------------------------------- */

int __wrap_clock_gettime(clockid_t clock, struct timespec *ret_time);
int __real_clock_gettime(clockid_t clock, struct timespec *ret_time);
long __wrap_syscall(long number, ...);
ssize_t __wrap_write(int fd, const void *data, size_t bytes);
ssize_t __real_write(int fd, const void *data, size_t bytes);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int events_max, int timeout_ms);
int __wrap_pthread_create(pthread_t *ret_thread, const pthread_attr_t *attr, void *(*run)(void *),
                          void *arg);

int __wrap_clock_gettime(clockid_t clock, struct timespec *ret_time)
{
    if (!world_open)
        return __real_clock_gettime(clock, ret_time);
    uint64_t *now_ns = current < 0 ? &world->now_ns : &tasks[current].now_ns;
    *now_ns += TICK_NS;
    ret_time->tv_sec = (time_t)(*now_ns / 1000000000u);
    ret_time->tv_nsec = (long)(*now_ns % 1000000000u);
    return 0;
}

/* A sleep has no end but a wake-up: a lost one shows as a task that never goes on. */
static long futex_wait(const uint32_t *futex, uint32_t seen)
{
    if (current < 0)
        return -1;
    struct task *t = &tasks[current];
    at(OP_WAIT, futex, true);
    if (*futex != seen)
        return -1;
    t->futex = futex;
    t->waits = true;
    t->woken = false;
    t->next = (struct op){OP_WOKEN, false, NULL, futex};
    schedule(current);
    return 0;
}

static long futex_wake(const uint32_t *futex)
{
    if (current < 0)
        return 0;
    at(OP_WAKE, futex, true);
    for (uint32_t i = 0; i < TASKS_MAX; i++) {
        if (!tasks[i].waits || tasks[i].futex != futex)
            continue;
        tasks[i].waits = false;
        tasks[i].woken = true;
        tasks[i].woken_by = search_step();
    }
    return 0;
}

long __wrap_syscall(long number, ...)
{
    va_list args;
    va_start(args, number);
    const uint32_t *futex = va_arg(args, const uint32_t *);
    int op = va_arg(args, int);
    uint32_t value = va_arg(args, uint32_t);
    va_end(args);
    if (number != SYS_futex)
        model_violation("system call %ld is not modelled", number);
    return op == FUTEX_WAIT ? futex_wait(futex, value) : futex_wake(futex);
}

ssize_t __wrap_write(int fd, const void *data, size_t bytes)
{
    if (fd < POOL_DOORBELL_FD)
        return __real_write(fd, data, bytes);
    at(OP_BELL, &world->bells, true);
    for (uint32_t i = 0; world->bells == 0 && i < TASKS_MAX; i++)
        tasks[i].woken_by = tasks[i].next.kind == OP_POLL ? search_step() : tasks[i].woken_by;
    world->bells = 1;
    return (ssize_t)bytes;
}

/* Edge-triggered: any number of rings since the last look is one event. */
int __wrap_epoll_wait(int fd, struct epoll_event *events, int events_max, int timeout_ms)
{
    (void)fd;
    (void)events_max;
    if (timeout_ms >= 0)
        model_violation("the keeper sleeps with a timeout of %d ms: not modelled", timeout_ms);
    at(OP_POLL, &world->bells, true);
    world->bells = 0;
    events[0] = (struct epoll_event){.events = EPOLLIN};
    return 1;
}

int __wrap_pthread_create(pthread_t *ret_thread, const pthread_attr_t *attr, void *(*run)(void *),
                          void *arg)
{
    (void)attr;
    *ret_thread = pthread_self();
    world->thread = run;
    world->thread_arg = arg;
    return 0;
}

void model_run_thread(void)
{
    world->thread(world->thread_arg);
}
