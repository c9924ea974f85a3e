/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Drives an eviction policy over a trace as the keeper does: a request first touches the chunks
 * that are its longest resident prefix, then its other chunks are committed one by one, each
 * after its parent. A block is its own descriptor, so that nothing here depends on how
 * descriptors are reused.
 */
#include <stdlib.h>
#include <string.h>

#include "cn_policy.h"

struct trace_view {
    uint32_t blocks;        /* distinct */
    const uint32_t *parent; /* [blocks], CN_NONE for the first of a chain */
    const uint64_t *hash;   /* [blocks] */
    uint32_t requests;
    const uint64_t *first; /* [requests + 1] index into chains */
    const uint32_t *chains;
    const uint32_t *now_s; /* [requests] */
};

struct sim {
    const struct trace_view *trace;
    struct cn_policy *policy;
    struct cn_policy_node *nodes;
    uint32_t *children;   /* resident ones, by block */
    uint64_t *chain_hash; /* the hashes of one request */
    uint32_t capacity;
    uint32_t low;    /* evict down to this many when full */
    int leaves_only; /* a chunk leaves after those that depend on it */
    uint64_t skips;
};

int policy_sim_run(const char *name, uint32_t capacity, uint32_t low, int leaves_only,
                   const struct trace_view *trace, uint32_t *ret_hits, uint64_t *ret_skips);

static uint32_t parent_of(void *ctx, uint32_t d)
{
    return ((const struct trace_view *)ctx)->parent[d];
}

static int resident(const struct sim *s, uint32_t d) { return s->nodes[d].queue != 0; }

static void count_child(struct sim *s, uint32_t d, uint32_t step)
{
    if (s->trace->parent[d] != CN_NONE)
        s->children[s->trace->parent[d]] += step;
}

/* One victim. Like the keeper it gives up after as many skips as chunks are resident. */
static int evict_one(struct sim *s, uint32_t now_s)
{
    uint32_t tries = s->policy->resident;

    while (tries-- > 0) {
        uint32_t d = s->policy->ops->victim(s->policy, now_s);

        if (s->leaves_only && s->children[d] != 0) {
            s->policy->ops->skip(s->policy, d, now_s);
            s->skips++;
            continue;
        }
        s->policy->ops->remove(s->policy, d, s->trace->hash[d], true);
        count_child(s, d, UINT32_MAX);
        return 1;
    }
    return 0;
}

static void commit(struct sim *s, uint32_t d, uint32_t now_s)
{
    if (s->policy->resident >= s->capacity) {
        while (s->policy->resident > s->low && evict_one(s, now_s))
            ;
    }
    s->policy->ops->insert(s->policy, d, s->trace->parent[d], s->trace->hash[d], now_s);
    count_child(s, d, 1);
}

static uint32_t request(struct sim *s, const uint32_t *chain, uint32_t count, uint32_t now_s)
{
    uint32_t hits = 0;

    while (hits < count && resident(s, chain[hits])) {
        s->chain_hash[hits] = s->trace->hash[chain[hits]];
        hits++;
    }
    s->policy->ops->touch(s->policy, chain, s->chain_hash, hits, now_s);
    for (uint32_t i = hits; i < count; i++) {
        if (resident(s, chain[i]))
            s->policy->ops->touch(s->policy, &chain[i], &s->trace->hash[chain[i]], 1, now_s);
        else
            commit(s, chain[i], now_s);
    }
    return hits;
}

static int sim_open(struct sim *s, const char *name)
{
    s->nodes = calloc(s->trace->blocks, sizeof(*s->nodes));
    s->children = calloc(s->trace->blocks, sizeof(*s->children));
    s->chain_hash = calloc(s->trace->blocks, sizeof(*s->chain_hash));
    if (s->nodes == NULL || s->children == NULL || s->chain_hash == NULL)
        return -1;
    s->policy = cn_policy_create(name, s->nodes, s->trace->blocks, s->capacity, parent_of,
                                 (void *)(uintptr_t)s->trace);
    return s->policy == NULL ? -1 : 0;
}

static void sim_close(struct sim *s)
{
    cn_policy_destroy(s->policy);
    free(s->nodes);
    free(s->children);
    free(s->chain_hash);
}

/* ret_hits[requests]: blocks of each request inside its longest resident prefix. -1: bad name, no
 * memory. */
int policy_sim_run(const char *name, uint32_t capacity, uint32_t low, int leaves_only,
                   const struct trace_view *trace, uint32_t *ret_hits, uint64_t *ret_skips)
{
    struct sim s = {.trace = trace, .capacity = capacity, .low = low, .leaves_only = leaves_only};

    if (sim_open(&s, name) != 0) {
        sim_close(&s);
        return -1;
    }
    for (uint32_t r = 0; r < trace->requests; r++) {
        uint64_t first = trace->first[r];

        ret_hits[r] = request(&s, trace->chains + first, (uint32_t)(trace->first[r + 1] - first),
                              trace->now_s[r]);
    }
    *ret_skips = s.skips;
    sim_close(&s);
    return 0;
}
