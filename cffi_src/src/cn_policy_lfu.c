/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Least frequently used, with dynamic ageing (LFU-DA: Arlitt et al., "Evaluating content
 * management techniques for Web proxy caches", 2000): a chunk's priority is its uses plus the
 * priority that the last victim had when this chunk was last used. Without ageing, chunks of
 * conversations that were busy once stay for ever, and new ones compete for what is left;
 * halving all counts now and then needs a pass over the pool and a period to tune.
 *
 * Priorities lie in [floor, floor + USES_MAX], so priority modulo LISTS names the list. Ties go
 * by recency.
 */
#include "cn_policy_impl.h"

#define LISTS 128
#define PARKED LISTS
#define USES_MAX (LISTS - 1)

_Static_assert(PARKED < CN_POLICY_QUEUES_MAX, "a list for each priority, and the parked");

static void lfu_file(struct cn_policy *p, uint32_t d, uint32_t anchor, uint32_t now_s)
{
    uint32_t q = (p->clock + p->nodes[d].uses) % LISTS;

    cn_policy_place(p, q, d, anchor, CN_POLICY_REQUEST_S, now_s);
}

static void lfu_insert(struct cn_policy *p, uint32_t d, uint32_t parent, uint64_t hash,
                       uint32_t now_s)
{
    (void)hash;
    p->nodes[d].uses = 1;
    lfu_file(p, d, parent, now_s);
}

static void lfu_touch(struct cn_policy *p, const uint32_t *d, const uint64_t *hash, uint32_t count,
                      uint32_t now_s)
{
    uint32_t above = count != 0 ? p->parent_of(p->parent_ctx, d[0]) : CN_NONE;

    (void)hash;
    for (uint32_t i = count; i-- > 0;) {
        if (!cn_policy_listed(p, d[i]))
            continue;
        if (p->nodes[d[i]].uses < USES_MAX)
            p->nodes[d[i]].uses++;
        lfu_file(p, d[i], above, now_s);
    }
}

/* The list of the lowest priority, or PARKED when only parked chunks are left. */
static uint32_t lowest_list(const struct cn_policy *p)
{
    uint32_t start = p->clock % LISTS;
    uint32_t q = cn_policy_lowest(p, start, LISTS);

    if (q < LISTS)
        return q;
    q = cn_policy_lowest(p, 0, start);
    return q < start ? q : PARKED;
}

static uint32_t lfu_victim(struct cn_policy *p, uint32_t now_s)
{
    if (cn_policy_unpark_due(p, p->lists[PARKED].count, now_s)) {
        while (p->lists[PARKED].tail != CN_NONE)
            lfu_file(p, p->lists[PARKED].tail, CN_NONE, now_s);
    }
    return p->resident == 0 ? CN_NONE : p->lists[lowest_list(p)].tail;
}

/* Comes back with its uses on top of the present floor: as if used now, but not counted twice. */
static void lfu_skip(struct cn_policy *p, uint32_t d, uint32_t now_s)
{
    if (cn_policy_listed(p, d))
        cn_policy_park(p, PARKED, d, now_s);
}

/* The floor is the lowest priority present, which is not the victim's when others were skipped. */
static void lfu_remove(struct cn_policy *p, uint32_t d, uint64_t hash, bool evicted)
{
    uint32_t lowest = lowest_list(p);

    (void)hash;
    if (evicted && lowest != PARKED)
        p->clock += (lowest - p->clock) % LISTS;
    cn_policy_unlink(p, d);
}

const struct cn_policy_ops cn_policy_lfu_ops = {
    .name = "lfu",
    .insert = lfu_insert,
    .touch = lfu_touch,
    .victim = lfu_victim,
    .skip = lfu_skip,
    .remove = lfu_remove,
};
