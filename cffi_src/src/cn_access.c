/* SPDX-License-Identifier: Apache-2.0 */
/* What sessions used: their access logs feed the policies, their own counts the pool's. All of it
 * is the client's word, and worth no more (I4). */
#include "cn_keeper.h"

/* One chain, root first; entries of other domains break it. */
static void touch_chain(struct cn_keeper *k, uint32_t count)
{
    uint32_t now_s = (uint32_t)(k->realtime_ns / 1000000000ull);
    for (uint32_t from = 0; from < count;) {
        uint16_t domain = k->nodes[k->chain[from]].domain;
        uint32_t to = from + 1;
        while (to < count && k->nodes[k->chain[to]].domain == domain)
            to++;
        struct cn_policy *p = k->domains[domain];
        if (p != NULL)
            p->ops->touch(p, k->chain + from, k->chain_hash + from, to - from, now_s);
        for (uint32_t i = from; i < to; i++)
            cn_policy_save(k, k->chain[i]);
        from = to;
    }
}

void cn_session_read_access(struct cn_keeper *k, struct cn_session *s)
{
    uint64_t tail = cn_load_acquire(&s->head->access_tail);
    uint64_t pending = tail - s->access_head;
    if (pending == 0)
        return;
    if (pending > CN_ACCESS_SLOTS) {
        k->count.access_lost += pending - CN_ACCESS_SLOTS;
        s->access_head = tail - CN_ACCESS_SLOTS;
    }
    uint32_t count = 0;
    for (; s->access_head != tail; s->access_head++) {
        uint64_t ref = cn_load_relaxed(&s->access_log[s->access_head % CN_ACCESS_SLOTS]);
        uint32_t d = cn_live_of(k, ref);
        if (ref == 0) {
            touch_chain(k, count);
            count = 0;
        } else if (d != CN_NONE && k->nodes[d].queue != 0) {
            k->count.hit_bytes += (uint32_t)k->catalog.chunks[d].size_crc;
            k->chain[count] = d;
            k->chain_hash[count++] = cn_chunk_hash(k, d).h1;
        }
    }
    touch_chain(k, count);
}

void cn_session_look_at_access(struct cn_keeper *k, struct cn_session *s)
{
    uint64_t pending = cn_load_relaxed(&s->head->access_tail) - s->access_head;
    if (pending < CN_ACCESS_SLOTS / 2 || k->monotonic_ns - s->access_read_ns < CN_ACCESS_READ_NS)
        return;
    s->access_read_ns = k->monotonic_ns;
    cn_session_read_access(k, s);
}

/* Every hit is an entry of the access log, and so is the beginning of every batch. */
uint64_t cn_session_hits(const struct cn_session *s)
{
    uint64_t entries = cn_load_relaxed(&s->head->access_tail);
    uint64_t batches = cn_load_relaxed(&s->head->batches);
    return entries > batches ? entries - batches : 0;
}

/* A client's own counters; numbers that shrink are not believed. */
static uint64_t fold(uint64_t *folded, uint64_t seen)
{
    uint64_t more = seen > *folded ? seen - *folded : 0;
    *folded = seen;
    return more;
}

void cn_session_fold(struct cn_keeper *k, struct cn_session *s)
{
    cn_session_read_access(k, s); /* hit_bytes */
    k->count.hits += fold(&s->hits, cn_session_hits(s));
    k->count.misses += fold(&s->misses, cn_load_relaxed(&s->head->misses));
}
