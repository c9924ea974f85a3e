/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The client's side of the rings and the doorbell.
 *
 *   client: write record; release tail; full fence; load `sleeping`; 1 -> write(eventfd)
 *   keeper: store sleeping = 1; full fence; look at all tails again; nothing -> epoll_wait
 */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "cn_client.h"

#define SPIN_NS 30000u /* the keeper answers within a few microseconds when awake */
#define NAP_MS 5u      /* re-check even if a wake-up was missed with a dead keeper */

uint64_t cn_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint32_t cn_left_ms(uint64_t deadline_ns)
{
    uint64_t now = cn_now_ns();
    uint64_t left_ms = now < deadline_ns ? (deadline_ns - now) / 1000000u : 0;
    return left_ms > UINT32_MAX ? UINT32_MAX : (uint32_t)left_ms;
}

int cn_doorbell_take(struct cn_client *c, int fd)
{
    struct stat found;
    c->doorbell_fd = fd;
    if (fstat(fd, &found) != 0)
        return CN_ESYS;
    c->doorbell_dev = found.st_dev;
    c->doorbell_ino = found.st_ino;
    return CN_OK;
}

bool cn_doorbell_is_ours(struct cn_client *c)
{
    struct stat found;
    if (c->doorbell_fd < 0)
        return false;
    /* Eventfds share one inode: what is told apart is a file, a socket or a pipe. */
    if (fstat(c->doorbell_fd, &found) == 0 && found.st_dev == c->doorbell_dev &&
        found.st_ino == c->doorbell_ino)
        return true;
    c->doorbell_fd = -1; /* until the link makes a new session, only others wake the keeper */
    return false;
}

void cn_ring_doorbell(struct cn_client *c)
{
    cn_fence(); /* pairs with the keeper's fence between sleeping = 1 and its last look */
    if (cn_load_relaxed(&c->catalog.super->sleeping) == 0 || !cn_doorbell_is_ours(c))
        return;
    uint64_t one = 1;
    ssize_t ignored = write(c->doorbell_fd, &one, sizeof(one));
    (void)ignored; /* a full counter is a ringing doorbell */
}

static void futex_sleep(struct cn_client *c, uint32_t seen, uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    syscall(SYS_futex, &c->head->wake_seq, FUTEX_WAIT, seen, &t, NULL, 0);
}

static int wait_until(struct cn_client *c, cn_done_fn done, uint64_t arg, uint32_t wait_ms,
                      uint32_t nap_ms)
{
    uint64_t start = cn_now_ns();
    uint64_t wait_ns = (uint64_t)wait_ms * 1000000u;
    while (!done(c, arg)) {
        uint64_t waited = cn_now_ns() - start;
        if (waited >= wait_ns)
            return CN_ETIME;
        if (waited < SPIN_NS) {
            cn_cpu_relax();
            continue;
        }
        uint32_t seen = cn_load32_acquire(&c->head->wake_seq);
        cn_add_relaxed(&c->head->waiters, 1);
        cn_fence(); /* pairs with the keeper's fence between publishing and loading waiters */
        if (!done(c, arg)) {
            uint64_t left = wait_ns - waited;
            uint64_t nap = (uint64_t)nap_ms * 1000000u;
            futex_sleep(c, seen, left < nap ? left : nap);
        }
        cn_add_relaxed(&c->head->waiters, (uint64_t)-1);
    }
    return CN_OK;
}

int cn_wait_until(struct cn_client *c, cn_done_fn done, uint64_t arg, uint32_t wait_ms)
{
    return wait_until(c, done, arg, wait_ms, NAP_MS);
}

void cn_wake_waiters(struct cn_client *c)
{
    /* Another value than any waiter saw, so that one on its way into the kernel comes back, too. */
    cn_store32_release(&c->head->wake_seq, cn_load32_relaxed(&c->head->wake_seq) + 1);
    syscall(SYS_futex, &c->head->wake_seq, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static bool ring_has_room(struct cn_client *c, uint64_t tail)
{
    return tail - cn_load_acquire(&c->head->sub_head) < CN_RING_RECORDS;
}

/* 128 bytes in eight moves; for an assignment gcc writes a string instruction, four times
 * dearer. */
static inline void record_store(struct cn_record *to, const struct cn_record *from)
{
    typedef uint64_t lane __attribute__((vector_size(16), may_alias, aligned(8)));
    const lane *f = (const lane *)from;
    lane *t = (lane *)to;
    lane f0 = f[0], f1 = f[1], f2 = f[2], f3 = f[3];
    lane f4 = f[4], f5 = f[5], f6 = f[6], f7 = f[7];
    t[0] = f0, t[1] = f1, t[2] = f2, t[3] = f3;
    t[4] = f4, t[5] = f5, t[6] = f6, t[7] = f7;
}

static void put_record(struct cn_client *c, const struct cn_record *record)
{
    record_store(&c->sub[c->sub_tail % CN_RING_RECORDS], record);
    c->sub_tail++;
    /* Release: the record, and the bytes it speaks of, before the tail that shows it. */
    cn_store_release(&c->head->sub_tail, c->sub_tail);
}

/* What a full ring did not take goes first, or its extents would be lost to this session. */
static void give_back_owed(struct cn_client *c)
{
    while (c->owed_count > 0 && ring_has_room(c, c->sub_tail)) {
        struct cn_record record = {.op = CN_OP_ABORT, .grant = c->owed[--c->owed_count]};
        put_record(c, &record);
    }
}

static void owe(struct cn_client *c, uint64_t grant)
{
    pthread_mutex_lock(&c->sub_lock);
    if (c->owed_count < CN_OWED_MAX)
        c->owed[c->owed_count++] = grant;
    pthread_mutex_unlock(&c->sub_lock);
}

/* Never waits with the lock held: another caller may hold Python's GIL while it wants the lock. */
static bool try_submit(struct cn_client *c, const struct cn_record *record, uint64_t *ret_tail)
{
    pthread_mutex_lock(&c->sub_lock);
    give_back_owed(c);
    uint64_t tail = c->sub_tail;
    bool room = ring_has_room(c, tail);
    if (room)
        put_record(c, record);
    pthread_mutex_unlock(&c->sub_lock);
    *ret_tail = tail;
    return room;
}

static __attribute__((noinline)) int
submit_waiting(struct cn_client *c, const struct cn_record *record, uint32_t wait_ms)
{
    uint64_t tail;
    uint64_t deadline_ns = cn_now_ns() + (uint64_t)wait_ms * 1000000u;
    while (!try_submit(c, record, &tail)) {
        cn_ring_doorbell(c);
        if (cn_wait_until(c, ring_has_room, tail, cn_left_ms(deadline_ns)) == CN_OK)
            continue;
        if (record->op == CN_OP_ABORT)
            owe(c, record->grant); /* waits for nobody: destructors end here, with the GIL */
        return CN_ERING;
    }
    cn_ring_doorbell(c);
    return CN_OK;
}

int cn_submit(struct cn_client *c, const struct cn_record *record, uint32_t wait_ms)
{
    uint64_t tail;
    if (!try_submit(c, record, &tail))
        return submit_waiting(c, record, wait_ms); /* the clock is asked only here */
    cn_ring_doorbell(c);
    return CN_OK;
}

static bool drained(struct cn_client *c, uint64_t tail)
{
    return (int64_t)(cn_load_acquire(&c->head->sub_head) - tail) >= 0;
}

int cn_flush(struct cn_client *c, uint32_t wait_ms)
{
    int status = cn_usable(c);
    if (status != CN_OK)
        return status;
    pthread_mutex_lock(&c->sub_lock);
    give_back_owed(c);
    uint64_t tail = c->sub_tail;
    pthread_mutex_unlock(&c->sub_lock);
    cn_ring_doorbell(c);
    return cn_wait_until(c, drained, tail, wait_ms);
}

/* ---- operations that are answered ----------------------------------------- */

static bool completion_there(struct cn_client *c, uint64_t arg)
{
    (void)arg;
    return cn_load_acquire(&c->head->comp_tail) != c->comp_head;
}

/* Read completions until ours; op_lock is held. Leftovers of calls that timed out are passed
 * over. */
static int await_cookie(struct cn_client *c, uint64_t cookie, uint64_t deadline_ns,
                        uint64_t *ret_value)
{
    for (uint32_t looked = 0; looked < 2 * CN_COMPLETIONS; looked++) {
        int status = cn_wait_until(c, completion_there, 0, cn_left_ms(deadline_ns));
        if (status != CN_OK)
            return status;
        struct cn_completion completion = c->comp[c->comp_head % CN_COMPLETIONS];
        c->comp_head++;
        cn_store_release(&c->head->comp_head, c->comp_head);
        if (completion.cookie == cookie) {
            *ret_value = completion.value;
            return completion.status;
        }
    }
    return CN_ECORRUPT;
}

static int submit_keys(struct cn_client *c, struct cn_record *record, const uint8_t *keys,
                       uint32_t key_count, uint64_t deadline_ns)
{
    for (uint32_t i = 0; i < key_count; i++) {
        memcpy(record->key, keys + (size_t)i * CN_KEY_BYTES, CN_KEY_BYTES);
        int status = cn_submit(c, record, cn_left_ms(deadline_ns));
        if (status != CN_OK)
            return status;
    }
    return CN_OK;
}

/* pthread has no portable lock with a monotonic deadline: a clock that is set moves this one. */
static bool lock_within(pthread_mutex_t *lock, uint32_t wait_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += wait_ms / 1000;
    until.tv_nsec += (long)(wait_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    return pthread_mutex_timedlock(lock, &until) == 0;
}

int cn_keys_op(struct cn_client *c, uint32_t op, uint32_t ns_slot, const uint8_t *keys,
               uint32_t key_count, uint64_t arg, uint32_t wait_ms, uint32_t *ret_done)
{
    int status = cn_usable(c);
    if (status != CN_OK)
        return status;
    if (c->role < CN_ROLE_WRITER)
        return CN_EACCES;
    if (key_count > CN_KEYS_PER_CALL_MAX || ns_slot >= CN_NAMESPACES_MAX)
        return CN_ELIMIT;
    struct cn_record record = {.op = (uint8_t)op, .ns_slot = (uint16_t)ns_slot, .arg = arg};
    struct cn_record last = {.op = CN_OP_NOP, .ns_slot = (uint16_t)ns_slot};
    uint64_t done = 0;
    uint64_t deadline_ns = cn_now_ns() + (uint64_t)wait_ms * 1000000u;
    if (!lock_within(&c->op_lock, wait_ms))
        return CN_ETIME;
    /* a call that timed out left its count behind */
    status = cn_submit(c, &last, cn_left_ms(deadline_ns));
    last.cookie = c->next_cookie++;
    if (status == CN_OK)
        status = submit_keys(c, &record, keys, key_count, deadline_ns);
    if (status == CN_OK)
        status = cn_submit(c, &last, cn_left_ms(deadline_ns));
    if (status == CN_OK)
        status = await_cookie(c, last.cookie, deadline_ns, &done);
    pthread_mutex_unlock(&c->op_lock);
    *ret_done = (uint32_t)done;
    return status;
}

int cn_report(struct cn_client *c, uint32_t op, uint64_t ref, uint32_t crc32c)
{
    struct cn_record record = {.op = (uint8_t)op, .grant = ref, .crc32c = crc32c};
    return cn_submit(c, &record, 1000);
}

static bool event_there(struct cn_client *c, uint64_t sequence)
{
    return cn_load_acquire(&c->catalog.super->event_head) > sequence || cn_usable(c) != CN_OK;
}

int cn_events_wait(struct cn_client *c, uint64_t sequence, uint32_t wait_ms)
{
    int status = cn_usable(c);
    if (status != CN_OK)
        return status;
    cn_store_release(&c->head->follows, 1);
    /* No naps: who follows a quiet pool sleeps until an event, close or the deadline. */
    status = wait_until(c, event_there, sequence, wait_ms, wait_ms);
    return status == CN_OK ? cn_usable(c) : status;
}
