/* SPDX-License-Identifier: Apache-2.0 */
/* The keeper's thread: rounds of work, the doorbell, commands from the control thread. */
#include "cn_keeper.h"
#include "cn_crash.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TAG_COMMAND UINT64_MAX
#define LIMBO_LOOK_NS 2000000ull /* while memory is wanted and readers hold dying chunks */
#define SPIN_MAX 10u
#define TIMERS_A_ROUND 64u
#define EPOLL_EVENTS 64

/* ---- real system calls ---------------------------------------------------- */

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t sys_realtime_ns(void) { return clock_ns(CLOCK_REALTIME); }
static uint64_t sys_monotonic_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

static void sys_wake(uint32_t *futex)
{
    syscall(SYS_futex, futex, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static bool sys_is_dead(int liveness_fd)
{
    if (liveness_fd < 0)
        return true; /* a session without a lock (tests) is dead when somebody says so */
    if (flock(liveness_fd, LOCK_EX | LOCK_NB) != 0)
        return false;
    flock(liveness_fd, LOCK_UN);
    return true;
}

#ifdef CN_CRASH_POINTS
void (*cn_crash_hook)(const char *point);
#endif

static const struct cn_keeper_ops real_ops = {
    sys_realtime_ns,
    sys_monotonic_ns,
    sys_wake,
    sys_is_dead,
};

/* ---- rounds --------------------------------------------------------------- */

static uint32_t drain_all(struct cn_keeper *k)
{
    uint32_t done = 0;
    k->turn++;
    for (uint32_t i = 0; i < k->session_count; i++) {
        uint32_t at = (k->turn + i) % k->session_count;
        done += cn_session_drain(k, k->sessions[k->session_list[at]], CN_ROUND_RECORDS);
    }
    return done;
}

/* No work in the sense of a round: it is not worth staying awake for. */
static void look_at_access(struct cn_keeper *k)
{
    for (uint32_t i = 0; i < k->session_count; i++)
        cn_session_look_at_access(k, k->sessions[k->session_list[i]]);
}

static void on_timer(struct cn_keeper *k, uint32_t d)
{
    uint64_t pinned_ns = k->catalog.cold[d].pinned_ns;
    if (pinned_ns != 0 && pinned_ns <= k->realtime_ns)
        cn_clear_pin(k, d);
    else
        cn_expire(k, d);
}

static uint32_t run_timers(struct cn_keeper *k)
{
    uint64_t ref;
    uint32_t done = 0;
    while (done < TIMERS_A_ROUND && cn_timer_pop(k, &ref)) {
        uint32_t d = cn_live_of(k, ref);
        if (d != CN_NONE)
            on_timer(k, d);
        done++;
    }
    cn_unlink_flush(k);
    return done;
}

/* Look at the liveness lock of sessions that may be dead; how many were. */
static uint32_t look_for_dead(struct cn_keeper *k)
{
    uint32_t ended = 0;
    for (uint32_t i = 0; i < k->session_count; i++) {
        struct cn_session *s = k->sessions[k->session_list[i]];
        if (s->death_check_ns == 0 || s->death_check_ns > k->monotonic_ns)
            continue;
        if (k->ops.is_dead(s->liveness_fd)) {
            cn_session_end(k, s);
            i--; /* the last of the list took its place */
            ended++;
            continue;
        }
        /* Who lives and only closed its socket, or passed the mapping on, is looked at ever
         * less. */
        uint64_t most = s->exited ? CN_DEATH_LOOK_EXITED_NS : CN_DEATH_LOOK_MAX_NS;
        if (s->death_period_ns < most)
            s->death_period_ns *= 2;
        s->death_check_ns = k->monotonic_ns + s->death_period_ns;
    }
    return ended;
}

/* ns until the next look at a liveness lock, 0 = none. */
static uint64_t next_death_look(const struct cn_keeper *k)
{
    uint64_t now = k->ops.monotonic_ns();
    uint64_t next = 0;
    for (uint32_t i = 0; i < k->session_count; i++) {
        const struct cn_session *s = k->sessions[k->session_list[i]];
        if (s->death_check_ns == 0)
            continue;
        uint64_t left = s->death_check_ns > now ? s->death_check_ns - now : 1;
        next = next == 0 || left < next ? left : next;
    }
    return next;
}

static void wake_followers(struct cn_keeper *k, uint64_t events_before)
{
    if (cn_load_relaxed(&k->catalog.super->event_head) == events_before)
        return;
    cn_fence(); /* event_head before follows: pairs with the fence of a client about to sleep */
    for (uint32_t i = 0; i < k->session_count; i++) {
        struct cn_session *s = k->sessions[k->session_list[i]];
        if (cn_load_relaxed(&s->head->follows) != 0)
            cn_session_publish(k, s, true);
    }
}

static uint32_t look_at_limbo(struct cn_keeper *k)
{
    if (k->limbo_count == 0 || k->monotonic_ns - k->limbo_look_ns < LIMBO_LOOK_NS)
        return 0;
    uint32_t before = k->limbo_count;
    cn_limbo_look(k);
    if (k->limbo_count < before)
        k->wanted = false;
    return before - k->limbo_count;
}

int cn_keeper_step(struct cn_keeper *k)
{
    k->round++;
    k->realtime_ns = cn_realtime_ns(k);
    k->monotonic_ns = k->ops.monotonic_ns();
    uint64_t events_before = cn_load_relaxed(&k->catalog.super->event_head);
    uint32_t done = cn_run_commands(k);
    done += drain_all(k);
    look_at_access(k);
    done += run_timers(k);
    done += look_at_limbo(k);
    done += cn_shrink(k);
    done += look_for_dead(k);
    wake_followers(k, events_before);
    cn_counters_store(k);
    return (int)done;
}

/* ---- sleeping ------------------------------------------------------------- */

static bool anything_to_do(struct cn_keeper *k)
{
    if (cn_load_acquire(&k->commands) != 0)
        return true;
    for (uint32_t i = 0; i < k->session_count; i++)
        if (cn_session_has_work(k->sessions[k->session_list[i]]))
            return true;
    return false;
}

static int sleep_ms(struct cn_keeper *k)
{
    uint64_t ns = next_death_look(k);
    if (k->limbo_count > 0 && k->wanted && (ns == 0 || ns > LIMBO_LOOK_NS))
        ns = LIMBO_LOOK_NS;
    if (k->timers.count > 0) {
        uint64_t at = k->timers.heap[0].at_ns;
        uint64_t now = cn_realtime_ns(k);
        uint64_t left = at > now ? at - now : 1;
        ns = ns == 0 || left < ns ? left : ns;
    }
    if (ns == 0)
        return -1;
    return ns > 60000000000ull ? 60000 : (int)(ns / 1000000u) + 1;
}

static void on_wakeup(struct cn_keeper *k, uint64_t tag)
{
    if (tag == TAG_COMMAND || (tag & 1) == 0)
        return; /* doorbells: the rings themselves say what there is to do */
    struct cn_session *s = tag >> 1 < CN_SESSIONS_MAX ? k->sessions[tag >> 1] : NULL;
    if (s == NULL)
        return;
    s->exited = true; /* its pidfd fired; the lock follows with the last mapping */
    s->death_check_ns = k->ops.monotonic_ns();
    s->death_period_ns = CN_DEATH_LOOK_NS;
}

static void sleep_once(struct cn_keeper *k)
{
    struct epoll_event events[EPOLL_EVENTS];
    struct cn_super *super = k->catalog.super;
    cn_store_relaxed(&super->sleeping, 1);
    cn_fence(); /* pairs with the client's fence between its tail and its load of sleeping */
    if (!anything_to_do(k)) {
        int n = epoll_wait(k->epoll_fd, events, EPOLL_EVENTS, sleep_ms(k));
        for (int i = 0; i < n; i++)
            on_wakeup(k, events[i].data.u64);
        k->count.wakeups++;
    }
    cn_store_relaxed(&super->sleeping, 0);
}

/*
 * How long to poll before sleeping: spin_us, and longer while work comes more often than it takes
 * to wake this thread, so that a stream of puts rings no doorbell. gap_ns: mean time between two
 * rounds that had work, each counted as at most SPIN_MAX times spin_us.
 */
static uint64_t spin_ns(const struct cn_keeper *k, uint64_t gap_ns)
{
    uint64_t least = (uint64_t)k->spin_us * 1000u;
    if (gap_ns * 2 <= least || gap_ns * 2 > SPIN_MAX * least)
        return least;
    return gap_ns * 2;
}

static uint64_t mean_gap_ns(const struct cn_keeper *k, uint64_t mean_ns, uint64_t gap_ns)
{
    uint64_t most = SPIN_MAX * (uint64_t)k->spin_us * 1000u;
    return (mean_ns * 7 + (gap_ns < most ? gap_ns : most)) / 8;
}

static void *keeper_main(void *arg)
{
    struct cn_keeper *k = arg;
    uint64_t worked_ns = k->ops.monotonic_ns();
    uint64_t awake_ns = worked_ns;
    uint64_t gap_ns = 0;
    while (!k->stop) {
        if (cn_keeper_step(k) > 0) {
            gap_ns = mean_gap_ns(k, gap_ns, k->monotonic_ns - worked_ns);
            worked_ns = awake_ns = k->monotonic_ns;
            continue;
        }
        if (k->monotonic_ns - awake_ns < spin_ns(k, gap_ns)) {
            cn_cpu_relax();
            continue;
        }
        sleep_once(k);
        awake_ns = k->ops.monotonic_ns();
    }
    return NULL;
}

/* ---- life ----------------------------------------------------------------- */

static void store_slab(void *ctx, uint32_t granule, uint64_t word)
{
    const struct cn_slab_ctx *slab = ctx;
    const struct cn_catalog *c = &slab->keeper->catalog;
    cn_store_release(&c->slabs[c->super->regions[slab->region].slabs_first + granule], word);
    CN_CRASH_POINT(slab_word);
}

static int open_arenas(struct cn_keeper *k, void *const *regions)
{
    const struct cn_super *super = k->catalog.super;
    k->region_count = super->region_count;
    k->capacity_bytes = super->capacity_bytes;
    for (uint32_t i = 0; i < k->region_count; i++) {
        k->region_base[i] = regions[i];
        k->slab_ctx[i].keeper = k;
        k->slab_ctx[i].region = i;
        int status =
            cn_arena_create(super->regions[i].bytes, store_slab, &k->slab_ctx[i], &k->arena[i]);
        if (status != CN_OK)
            return status;
    }
    return CN_OK;
}

static int open_private(struct cn_keeper *k)
{
    size_t chunks = k->catalog.chunk_count;
    size_t leases = (size_t)CN_SESSIONS_MAX * k->catalog.lease_slots;
    /* calloc of this size is fresh mappings: what is never touched costs no memory */
    k->nodes = calloc(chunks, sizeof(*k->nodes));
    k->children = calloc(chunks, sizeof(*k->children));
    k->limbo = calloc(chunks, sizeof(*k->limbo));
    k->timed = calloc(chunks, sizeof(*k->timed));
    k->leased = calloc((chunks + 63) / 64, sizeof(*k->leased));
    k->leased_list = calloc(leases < chunks ? leases : chunks, sizeof(*k->leased_list));
    k->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    k->command_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (k->nodes == NULL || k->children == NULL || k->limbo == NULL || k->timed == NULL ||
        k->leased == NULL || k->leased_list == NULL)
        return CN_ENOMEM;
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data = {.u64 = TAG_COMMAND}};
    if (k->epoll_fd < 0 || k->command_fd < 0 ||
        epoll_ctl(k->epoll_fd, EPOLL_CTL_ADD, k->command_fd, &event) != 0)
        return CN_ESYS;
    return CN_OK;
}

int cn_keeper_new(void *catalog, uint64_t catalog_bytes, void *const *regions,
                  struct cn_keeper **ret_keeper)
{
    struct cn_keeper *k = calloc(1, sizeof(*k));
    if (k == NULL)
        return CN_ENOMEM;
    k->epoll_fd = k->command_fd = -1;
    k->free_head = CN_NONE;
    k->next_nonce = 1;
    k->round = 1;
    k->ops = real_ops;
    int status = cn_catalog_open(catalog, catalog_bytes, &k->catalog);
    if (status == CN_OK)
        status = open_private(k);
    if (status == CN_OK)
        status = open_arenas(k, regions);
    if (status != CN_OK) {
        cn_keeper_destroy(k);
        return status;
    }
    *ret_keeper = k;
    return CN_OK;
}

void cn_keeper_take_office(struct cn_keeper *k, uint64_t start_ns)
{
    struct cn_super *super = k->catalog.super;
    uint64_t token = k->ops.realtime_ns() | 1;
    super->keeper_pid = (uint64_t)getpid();
    super->keeper_start_ns = start_ns;
    cn_store_release(&super->clean, 0); /* before the first change */
    CN_CRASH_POINT(office_clean);
    if (token <= super->boot_token)
        token = super->boot_token + 2; /* the clock was set back: still another one */
    cn_store_release(&super->boot_token, token);
    CN_CRASH_POINT(office_token);
    cn_store_release(&super->pool_state, CN_POOL_SERVING);
}

int cn_keeper_create(void *catalog, uint64_t catalog_bytes, void *const *regions,
                     const struct cn_keeper_config *config, struct cn_keeper **ret_keeper)
{
    struct cn_keeper *k;
    struct cn_keeper_config copy = *config;
    int status = cn_keeper_new(catalog, catalog_bytes, regions, &k);
    if (status != CN_OK)
        return status;
    status = k->catalog.super->boot_token == 0 ? CN_OK : CN_EINVAL; /* used: cn_keeper_adopt() */
    if (status == CN_OK)
        status = cn_do_configure(k, &copy);
    if (status != CN_OK) {
        cn_keeper_destroy(k);
        return status;
    }
    cn_keeper_take_office(k, copy.start_ns);
    *ret_keeper = k;
    return CN_OK;
}

int cn_keeper_start(struct cn_keeper *k)
{
    sigset_t all;
    sigset_t before;
    if (k->running)
        return CN_EINVAL;
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* a guarded copy may fault; blocked, that would end the process */
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the thread is born with all others blocked */
    k->stop = false;
    k->running = true;
    int failed = pthread_create(&k->thread, NULL, keeper_main, k);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed != 0)
        k->running = false;
    return failed == 0 ? CN_OK : CN_ESYS;
}

static int do_stop(struct cn_keeper *k, void *args)
{
    (void)args;
    k->stop = true;
    return CN_OK;
}

int cn_keeper_stop(struct cn_keeper *k)
{
    if (!k->running)
        return CN_OK;
    cn_call(k, do_stop, NULL);
    pthread_join(k->thread, NULL);
    k->running = false;
    cn_store_release(&k->catalog.super->clean, 1);
    return CN_OK;
}

void cn_keeper_destroy(struct cn_keeper *k)
{
    cn_keeper_stop(k);
    while (k->session_count > 0)
        cn_session_forget(k, k->sessions[k->session_list[0]]);
    for (uint32_t i = 0; i < k->domain_count; i++)
        cn_policy_destroy(k->domains[k->domain_list[i]]);
    for (uint32_t i = 0; i < k->region_count; i++)
        if (k->arena[i] != NULL)
            cn_arena_destroy(k->arena[i]);
    if (k->epoll_fd >= 0)
        close(k->epoll_fd);
    if (k->command_fd >= 0)
        close(k->command_fd);
    free(k->nodes);
    free(k->children);
    free(k->limbo);
    free(k->timed);
    free(k->leased);
    free(k->leased_list);
    free(k->timers.heap);
    free(k);
}
