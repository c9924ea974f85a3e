/* SPDX-License-Identifier: Apache-2.0 */
/* Which queue a chunk is in, and what must happen to it at a time of day. Keeper-private. */
#include <stdlib.h>
#include <string.h>

#include "cn_keeper.h"

enum { TIMED_PIN = 1, TIMED_TTL = 2 };

#define NS_IN_S 1000000000ull

uint32_t cn_parent_of(void *keeper, uint32_t d)
{
    const struct cn_keeper *k = keeper;
    uint32_t parent = cn_live_of(k, k->catalog.cold[d].parent);
    /* Only one of the same queue set: a chain may cross from one tenant's domain to another. */
    if (parent == CN_NONE || k->nodes[parent].domain != k->nodes[d].domain ||
        k->nodes[parent].queue == 0)
        return CN_NONE;
    return parent;
}

/* ---- domains: a policy instance for each quota namespace, or the rest, and priority band ---- */

static uint32_t band_of(int8_t priority) { return priority < 0 ? 0 : priority == 0 ? 1 : 2; }

static uint32_t capacity_in_chunks(const struct cn_keeper *k)
{
    uint64_t mean = k->count.live_chunks == 0 ? 65536 : k->count.live_bytes / k->count.live_chunks;
    uint64_t chunks = k->high_bytes / (mean == 0 ? 1 : mean);
    if (chunks > k->catalog.chunk_count)
        chunks = k->catalog.chunk_count;
    return chunks == 0 ? 1 : (uint32_t)chunks;
}

static struct cn_policy *domain_of(struct cn_keeper *k, uint32_t ns, uint32_t band,
                                   uint16_t *ret_id)
{
    uint32_t group = k->catalog.namespaces[ns].quota_bytes != 0 ? ns : 0;
    uint32_t id = group * CN_BANDS + band + 1;
    if (k->domains[id] == NULL) {
        k->domains[id] = cn_policy_create(k->policy_name, k->nodes, k->catalog.chunk_count,
                                          capacity_in_chunks(k), cn_parent_of, k);
        if (k->domains[id] == NULL)
            return NULL;
        k->domain_list[k->domain_count++] = id;
    }
    *ret_id = (uint16_t)id;
    return k->domains[id];
}

/* A chunk is worth no more than its prefix: not more than its parent, and little without one. */
static uint32_t band_in_chain(const struct cn_keeper *k, uint32_t d, bool orphan)
{
    uint32_t band = band_of(k->catalog.cold[d].priority);
    uint32_t parent = cn_live_of(k, k->catalog.cold[d].parent);
    if (orphan)
        return 0;
    if (parent == CN_NONE || k->nodes[parent].domain == 0)
        return band;
    uint32_t above = (k->nodes[parent].domain - 1u) % CN_BANDS;
    return band < above ? band : above;
}

void cn_policy_add(struct cn_keeper *k, uint32_t d, bool orphan)
{
    uint16_t id;
    uint32_t ns = cn_place_ns(k->catalog.chunks[d].place);
    struct cn_policy *p = domain_of(k, ns, band_in_chain(k, d, orphan), &id);
    if (p == NULL)
        return; /* memory is short: the chunk stays until it is deleted or the pool restarts */
    k->nodes[d].domain = id;
    cn_policy_set_capacity(p, capacity_in_chunks(k));
    p->ops->insert(p, d, cn_parent_of(k, d), cn_chunk_hash(k, d).h1,
                   (uint32_t)(k->realtime_ns / NS_IN_S));
    cn_policy_save(k, d);
}

void cn_policy_save(struct cn_keeper *k, uint32_t d)
{
    struct cn_cold *cold = &k->catalog.cold[d];
    cold->uses = k->nodes[d].uses; /* advisory: who reads it meanwhile may see either */
    cn_store32_relaxed(&cold->last_use_s, k->nodes[d].last_use_s);
}

void cn_policy_restore(struct cn_keeper *k, uint32_t d)
{
    const struct cn_cold *cold = &k->catalog.cold[d];
    uint16_t id;
    uint32_t ns = cn_place_ns(k->catalog.chunks[d].place);
    struct cn_policy *p = domain_of(k, ns, band_in_chain(k, d, false), &id);
    if (p == NULL)
        return;
    k->nodes[d].domain = id;
    cn_policy_readd(p, d, cn_parent_of(k, d), cn_chunk_hash(k, d).h1, cold->uses, cold->last_use_s);
}

void cn_policy_touch(struct cn_keeper *k, uint32_t d)
{
    struct cn_policy *p = k->domains[k->nodes[d].domain];
    uint64_t hash = cn_chunk_hash(k, d).h1;
    if (k->nodes[d].queue != 0 && p != NULL)
        p->ops->touch(p, &d, &hash, 1, (uint32_t)(k->realtime_ns / NS_IN_S));
    cn_policy_save(k, d);
}

void cn_policy_drop(struct cn_keeper *k, uint32_t d, bool evicted)
{
    struct cn_policy *p = k->domains[k->nodes[d].domain];
    if (k->nodes[d].queue != 0 && p != NULL)
        p->ops->remove(p, d, cn_chunk_hash(k, d).h1, evicted);
    k->nodes[d].domain = 0;
}

/* ---- timers: a binary heap of (time, ref); a ref that is gone by then is passed over ---- */

static void timer_swap(struct cn_timers *t, uint32_t a, uint32_t b)
{
    struct cn_timer held = t->heap[a];
    t->heap[a] = t->heap[b];
    t->heap[b] = held;
}

static void timer_push(struct cn_timers *t, struct cn_timer timer)
{
    uint32_t i = t->count++;
    t->heap[i] = timer;
    for (; i > 0 && t->heap[i].at_ns < t->heap[(i - 1) / 2].at_ns; i = (i - 1) / 2)
        timer_swap(t, i, (i - 1) / 2);
}

/* Of each resident chunk its time-to-live once and its pin once; all else is stale. */
static void timers_prune(struct cn_keeper *k)
{
    struct cn_timers *t = &k->timers;
    uint32_t count = t->count;
    t->count = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t d = cn_live_of(k, t->heap[i].ref);
        uint64_t at_ns = t->heap[i].at_ns;
        if (d == CN_NONE)
            continue;
        if (at_ns == k->catalog.cold[d].pinned_ns && (k->timed[d] & TIMED_PIN) == 0)
            k->timed[d] |= TIMED_PIN;
        else if (at_ns == k->catalog.cold[d].expires_ns && (k->timed[d] & TIMED_TTL) == 0)
            k->timed[d] |= TIMED_TTL;
        else
            continue;
        timer_push(t, t->heap[i]); /* never past i: what is kept is no more than what was read */
    }
    memset(k->timed, 0, k->fresh);
}

static bool timers_grow(struct cn_timers *t)
{
    uint32_t room = t->room == 0 ? 64 : t->room * 2;
    struct cn_timer *heap = realloc(t->heap, room * sizeof(*heap));
    if (heap == NULL)
        return false;
    t->heap = heap;
    t->room = room;
    return true;
}

int cn_timer_add(struct cn_keeper *k, uint64_t at_ns, uint64_t ref)
{
    struct cn_timers *t = &k->timers;
    if (t->count == t->room) {
        timers_prune(k);
        if (t->count * 2 >= t->room && !timers_grow(t) && t->count == t->room)
            return CN_ENOMEM;
    }
    timer_push(t, (struct cn_timer){at_ns, ref});
    return CN_OK;
}

bool cn_timer_pop(struct cn_keeper *k, uint64_t *ret_ref)
{
    struct cn_timers *t = &k->timers;
    if (t->count == 0 || t->heap[0].at_ns > k->realtime_ns)
        return false;
    *ret_ref = t->heap[0].ref;
    t->heap[0] = t->heap[--t->count];
    for (uint32_t i = 0;;) {
        uint32_t least = i;
        for (uint32_t child = 2 * i + 1; child <= 2 * i + 2; child++)
            if (child < t->count && t->heap[child].at_ns < t->heap[least].at_ns)
                least = child;
        if (least == i)
            return true;
        timer_swap(t, i, least);
        i = least;
    }
}

void cn_expire(struct cn_keeper *k, uint32_t d)
{
    const struct cn_cold *cold = &k->catalog.cold[d];
    if (cold->expires_ns == 0 || cold->expires_ns > k->realtime_ns || cold->pinned_ns != 0)
        return;
    cn_unlink_one(k, d, CN_EVENT_EVICTED, CN_BY_TTL);
    k->count.expirations++;
}
