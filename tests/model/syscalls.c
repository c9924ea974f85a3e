/* SPDX-License-Identifier: Apache-2.0 */
/* The few system calls of the core that a schedule can meet, and the one thread it starts. */
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "machine.h"
#include "pool.h"

int __wrap_clock_gettime(clockid_t clock, struct timespec *ret_time);
int __real_clock_gettime(clockid_t clock, struct timespec *ret_time);
long __wrap_syscall(long number, ...);
ssize_t __wrap_write(int fd, const void *data, size_t bytes);
ssize_t __real_write(int fd, const void *data, size_t bytes);
int __wrap_fstat(int fd, struct stat *ret_found);
int __real_fstat(int fd, struct stat *ret_found);
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

/* A doorbell of the model is no descriptor, and stays what it is. */
int __wrap_fstat(int fd, struct stat *ret_found)
{
    if (fd < POOL_DOORBELL_FD)
        return __real_fstat(fd, ret_found);
    *ret_found = (struct stat){.st_ino = (ino_t)fd};
    return 0;
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

void model_run_thread(void) { world->thread(world->thread_arg); }

/* A keeper of each schedule would run out of real ones. */
int __wrap_epoll_create1(int flags);
int __wrap_epoll_create1(int flags)
{
    (void)flags;
    return POOL_DOORBELL_FD - 1;
}

int __wrap_epoll_ctl(int epoll_fd, int op, int fd, void *event);
int __wrap_epoll_ctl(int epoll_fd, int op, int fd, void *event)
{
    (void)epoll_fd, (void)op, (void)fd, (void)event;
    return 0;
}

int __wrap_eventfd(unsigned int value, int flags);
int __wrap_eventfd(unsigned int value, int flags)
{
    (void)value, (void)flags;
    return POOL_DOORBELL_FD - 2;
}
