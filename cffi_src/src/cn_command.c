/* SPDX-License-Identifier: Apache-2.0 */
/* What the control thread asks of the keeper: run on the keeper's thread, one at a time (I1). */
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cn_crash.h"
#include "cn_keeper.h"

static void futex_wake(uint32_t *futex)
{
    syscall(SYS_futex, futex, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

uint32_t cn_run_commands(struct cn_keeper *k)
{
    uint64_t head = cn_load_acquire(&k->commands);
    while (head != 0 && !cn_cas(&k->commands, &head, 0))
        ;
    uint32_t done = 0;
    while (head != 0) {
        struct cn_command *command = (struct cn_command *)(uintptr_t)head;
        head = command->next;
        command->status = command->run(k, command->args);
        cn_unlink_flush(k);
        cn_counters_store(k);
        cn_store32_release(&command->done, 1);
        futex_wake(&command->done);
        done++;
    }
    return done;
}

int cn_call(struct cn_keeper *k, int (*run)(struct cn_keeper *, void *), void *args)
{
    if (!k->running) {
        k->realtime_ns = cn_realtime_ns(k);
        k->monotonic_ns = k->ops.monotonic_ns();
        int status = run(k, args);
        cn_unlink_flush(k);
        cn_counters_store(k);
        return status;
    }
    struct cn_command command = {.run = run, .args = args};
    uint64_t head = cn_load_relaxed(&k->commands);
    do
        command.next = head;
    while (!cn_cas(&k->commands, &head, (uint64_t)(uintptr_t)&command));
    uint64_t one = 1;
    ssize_t ignored = write(k->command_fd, &one, sizeof(one));
    (void)ignored;
    while (cn_load32_acquire(&command.done) == 0)
        syscall(SYS_futex, &command.done, FUTEX_WAIT, 0, NULL, NULL, 0);
    return command.status;
}

static uint32_t namespace_by_name(struct cn_keeper *k, const struct cn_namespace_open *o)
{
    for (uint32_t slot = 1; slot < CN_NAMESPACES_MAX && k->catalog.namespaces[slot].word != 0;
         slot++) {
        const struct cn_namespace *n = &k->catalog.namespaces[slot];
        if (n->tenant == o->tenant && strncmp(n->name, o->name, sizeof(n->name)) == 0)
            return slot;
    }
    return 0;
}

/* The slot of this id, or the first free one (*ret_free), or 0. */
static uint32_t namespace_by_id(struct cn_keeper *k, const uint8_t *id, uint32_t *ret_free)
{
    *ret_free = 0;
    for (uint32_t slot = 1; slot < CN_NAMESPACES_MAX; slot++) {
        const struct cn_namespace *n = &k->catalog.namespaces[slot];
        if (n->word == 0) {
            *ret_free = slot;
            return 0;
        }
        if (memcmp(n->id, id, sizeof(n->id)) == 0)
            return slot;
    }
    return 0;
}

static void namespace_write(struct cn_keeper *k, uint32_t slot, const struct cn_namespace_open *o)
{
    struct cn_namespace *n = &k->catalog.namespaces[slot];
    memcpy(n->id, o->id, sizeof(n->id));
    n->tenant = o->tenant;
    n->quota_bytes = o->quota_bytes;
    n->created_ns = k->realtime_ns;
    n->manifest_bytes = o->manifest_bytes;
    memcpy(n->manifest, o->manifest, o->manifest_bytes);
    strncpy(n->name, o->name, sizeof(n->name) - 1);
    cn_store_release(&n->word, 1); /* fields first */
    CN_CRASH_POINT(ns_word);
    k->count.namespaces++;
}

/* A namespace has one name; ret_bound_slot is its own slot when that is another one. */
static bool namespace_name(struct cn_keeper *k, uint32_t slot, struct cn_namespace_open *o)
{
    struct cn_namespace *n = &k->catalog.namespaces[slot];
    if (n->name[0] != 0) {
        o->ret_bound_slot = slot;
        return false;
    }
    strncpy(n->name, o->name, sizeof(n->name) - 1);
    CN_CRASH_POINT(ns_name);
    return true;
}

static int do_namespace_open(struct cn_keeper *k, void *args)
{
    struct cn_namespace_open *o = args;
    if (o->manifest_bytes == 0 || o->manifest_bytes > CN_MANIFEST_BYTES_MAX || o->name == NULL ||
        strlen(o->name) >= sizeof(k->catalog.namespaces[0].name))
        return CN_EINVAL;
    uint32_t free_slot;
    uint32_t slot = namespace_by_id(k, o->id, &free_slot);
    uint32_t bound = o->name[0] == 0 ? 0 : namespace_by_name(k, o);
    o->ret_bound_slot = bound;
    if (bound != 0 && bound != slot)
        return CN_EINVAL;
    if (slot == 0 && free_slot == 0)
        return CN_ELIMIT;
    if (slot == 0)
        namespace_write(k, slot = free_slot, o);
    else if (o->name[0] != 0 && bound == 0 && !namespace_name(k, slot, o))
        return CN_EINVAL;
    struct cn_session *s = o->session < CN_SESSIONS_MAX ? k->sessions[o->session] : NULL;
    /* not its successor in the same place, and nobody who was demoted meanwhile */
    if (s != NULL && s->nonce == o->session_nonce && s->role >= CN_ROLE_WRITER)
        cn_session_set_tenant(k, s, o->tenant);
    o->ret_slot = slot;
    return CN_OK;
}

/* Chunks that were taken out of their queues go into those they belong to now. */
static void requeue(struct cn_keeper *k)
{
    for (uint32_t d = 0; d < k->fresh; d++) {
        if (k->nodes[d].domain == CN_DOMAIN_NONE) {
            k->nodes[d].domain = 0;
            cn_policy_add(k, d, false);
        }
    }
}

/* Its chunks move between the queue of all and one of its own, from which its quota evicts. */
static void requeue_namespace(struct cn_keeper *k, uint32_t slot)
{
    for (uint32_t d = 0; d < k->fresh; d++) {
        if (cn_word_state(cn_chunk_word(k, d)) != CN_LIVE || k->nodes[d].queue == 0 ||
            cn_place_ns(k->catalog.chunks[d].place) != slot)
            continue;
        cn_policy_drop(k, d, false);
        k->nodes[d].domain = CN_DOMAIN_NONE;
    }
    requeue(k);
}

struct quota_args {
    uint32_t slot;
    uint64_t bytes;
};

static int do_namespace_quota(struct cn_keeper *k, void *args)
{
    const struct quota_args *quota = args;
    if (quota->slot == 0 || quota->slot >= CN_NAMESPACES_MAX ||
        k->catalog.namespaces[quota->slot].word == 0)
        return CN_EMISS;
    bool own_queue = k->catalog.namespaces[quota->slot].quota_bytes != 0;
    cn_store_relaxed(&k->catalog.namespaces[quota->slot].quota_bytes, quota->bytes);
    CN_CRASH_POINT(ns_quota);
    if (own_queue != (quota->bytes != 0))
        requeue_namespace(k, quota->slot);
    return CN_OK;
}

/* All resident chunks, in descriptor order, into fresh queues of another policy. */
static void change_policy(struct cn_keeper *k, const char *name)
{
    /* All out of the old lists before the first is in a new one: an insert looks at its parent. */
    for (uint32_t d = 0; d < k->fresh; d++)
        if (cn_word_state(cn_chunk_word(k, d)) == CN_LIVE && k->nodes[d].queue != 0)
            k->nodes[d].domain = CN_DOMAIN_NONE;
    for (uint32_t i = 0; i < k->domain_count; i++) {
        cn_policy_destroy(k->domains[k->domain_list[i]]);
        k->domains[k->domain_list[i]] = NULL;
    }
    k->domain_count = 0;
    strncpy(k->policy_name, name, sizeof(k->policy_name) - 1);
    k->leaf_first = strcmp(name, cn_policy_name(0)) == 0;
    requeue(k);
}

static bool policy_known(const char *name)
{
    for (uint32_t i = 0; cn_policy_name(i) != NULL; i++)
        if (strcmp(cn_policy_name(i), name) == 0)
            return true;
    return false;
}

int cn_do_configure(struct cn_keeper *k, void *args)
{
    const struct cn_keeper_config *c = args;
    bool sane = c->high_water > 0 && c->high_water <= 1 && c->low_water > 0 && c->low_water <= 1;
    if (!sane || c->policy == NULL || !policy_known(c->policy))
        return CN_EINVAL;
    k->high_bytes = (uint64_t)((double)k->capacity_bytes * c->high_water);
    k->low_bytes = (uint64_t)((double)k->high_bytes * c->low_water);
    k->spin_us = c->spin_us;
    if (strcmp(c->policy, k->policy_name) != 0)
        change_policy(k, c->policy);
    return CN_OK;
}

static void store_arena_counters(struct cn_keeper *k)
{
    k->count.extent_bytes = k->count.free_bytes = k->count.waste_bytes = 0;
    for (uint32_t i = 0; i < k->region_count; i++) {
        struct cn_arena_stats stats;
        cn_arena_stats(k->arena[i], &stats);
        k->count.extent_bytes += stats.extent_bytes;
        k->count.waste_bytes += stats.waste_bytes;
        k->count.free_bytes += stats.region_bytes - stats.extent_bytes - stats.waste_bytes;
    }
}

static int do_fold(struct cn_keeper *k, void *args)
{
    (void)args;
    cn_limbo_look(k);
    for (uint32_t i = 0; i < k->session_count; i++)
        cn_session_fold(k, k->sessions[k->session_list[i]]);
    store_arena_counters(k);
    cn_counters_store(k);
    return CN_OK;
}

static int do_clear(struct cn_keeper *k, void *args)
{
    uint64_t *dropped = args;
    cn_unlink_flush(k);
    for (uint32_t d = 0; d < k->fresh; d++) {
        if (cn_word_state(cn_chunk_word(k, d)) != CN_LIVE)
            continue;
        cn_unlink_one(k, d, CN_EVENT_CLEARED, CN_BY_ADMIN);
        k->limbo[k->limbo_count++] = d; /* one fence and one scan for all of them */
        k->unlink.count = 0;
        CN_CRASH_POINT(clear_one);
        (*dropped)++;
    }
    cn_fence_keeper();
    cn_limbo_look(k);
    cn_event_put(k, CN_EVENT_CLEARED, CN_BY_ADMIN, CN_NONE);
    return CN_OK;
}

struct lose_args {
    const uint64_t *refs;
    uint32_t count;
    uint64_t *dropped;
};

static int do_lose(struct cn_keeper *k, void *args)
{
    const struct lose_args *lose = args;
    for (uint32_t i = 0; i < lose->count; i++) {
        uint32_t d = cn_live_of(k, lose->refs[i]);
        if (d == CN_NONE)
            continue;
        cn_lose(k, d);
        (*lose->dropped)++;
    }
    return CN_OK;
}

static int do_retire(struct cn_keeper *k, void *args)
{
    (void)args;
    cn_store_release(&k->catalog.super->pool_state, CN_POOL_RETIRED);
    CN_CRASH_POINT(retired);
    return CN_OK;
}

static int do_set_clock(struct cn_keeper *k, void *args)
{
    if ((uintptr_t)args % sizeof(uint64_t) != 0)
        return CN_EINVAL;
    k->clock = args;
    return CN_OK;
}

int cn_keeper_session_open(struct cn_keeper *k, struct cn_session_open *args)
{
    return cn_call(k, cn_do_session_open, args);
}

int cn_keeper_session_hint(struct cn_keeper *k, uint32_t session, uint64_t nonce)
{
    struct cn_hint_args args = {session, nonce};
    return cn_call(k, cn_do_session_hint, &args);
}

int cn_keeper_session_confirm(struct cn_keeper *k, uint32_t session, uint64_t nonce)
{
    struct cn_hint_args args = {session, nonce};
    return cn_call(k, cn_do_session_confirm, &args);
}

int cn_keeper_session_demote(struct cn_keeper *k, uint32_t session, uint64_t nonce, uint32_t role)
{
    struct cn_demote_args args = {session, nonce, role};
    return cn_call(k, cn_do_session_demote, &args);
}

int cn_keeper_namespace_open(struct cn_keeper *k, struct cn_namespace_open *args)
{
    return cn_call(k, do_namespace_open, args);
}

int cn_keeper_namespace_quota(struct cn_keeper *k, uint32_t slot, uint64_t quota_bytes)
{
    struct quota_args args = {slot, quota_bytes};
    return cn_call(k, do_namespace_quota, &args);
}

int cn_keeper_configure(struct cn_keeper *k, const struct cn_keeper_config *config)
{
    struct cn_keeper_config copy = *config;
    return cn_call(k, cn_do_configure, &copy);
}

int cn_keeper_fold(struct cn_keeper *k) { return cn_call(k, do_fold, NULL); }

int cn_keeper_session_info(struct cn_keeper *k, struct cn_session_info *ret_infos,
                           uint32_t infos_max, uint32_t *ret_count)
{
    struct cn_info_args args = {ret_infos, infos_max, ret_count};
    return cn_call(k, cn_do_session_info, &args);
}

int cn_keeper_set_clock(struct cn_keeper *k, const uint64_t *now_ns)
{
    return cn_call(k, do_set_clock, (void *)(uintptr_t)now_ns);
}

int cn_keeper_clear(struct cn_keeper *k, uint64_t *ret_dropped)
{
    *ret_dropped = 0;
    return cn_call(k, do_clear, ret_dropped);
}

int cn_keeper_lose(struct cn_keeper *k, const uint64_t *refs, uint32_t count, uint64_t *ret_dropped)
{
    struct lose_args args = {refs, count, ret_dropped};
    *ret_dropped = 0;
    return cn_call(k, do_lose, &args);
}

int cn_keeper_retire(struct cn_keeper *k) { return cn_call(k, do_retire, NULL); }

int cn_keeper_audit(struct cn_keeper *k, uint64_t *ret_wrong)
{
    *ret_wrong = 0;
    return cn_call(k, cn_do_audit, ret_wrong);
}
