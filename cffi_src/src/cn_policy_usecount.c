/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Use-count queues, the default: three LRU queues by use count (1, 2, 3 and more). Counts
 * survive eviction in a ghost table and never rise along a chain towards its tail. The tail with
 * the lowest
 *
 *     1.5^class / (2 * meangap + age)
 *
 * leaves; meangap is the mean time between two uses of a chunk, learned from one in 16. See
 * docs/eviction.md.
 */
#include "cn_policy_impl.h"

#define CLASSES 3
#define PARKED CLASSES
#define USES_MAX CN_GHOST_USES_MAX
#define MEANGAP_WEIGHT (1.0 / 1250.0)
#define SCORE_LAST 1e9 /* above every score: only when there is nothing else */

static const double class_weight[CLASSES] = {1.0, 1.5, 2.25};

static uint32_t class_of(uint8_t uses)
{
    return uses >= CLASSES ? CLASSES - 1u : uses == 0 ? 0u : uses - 1u;
}

/*
 * Learn from the time between two uses of a sampled chunk, whether or not it was resident in
 * between: gaps of resident chunks alone say how long chunks stay, not when they are wanted
 * again. Within one second is within one request or a burst of them.
 */
static void learn_gap(struct cn_policy *p, uint64_t hash, uint32_t now_s)
{
    uint32_t last_s;

    if (!cn_policy_sampled(hash))
        return;
    last_s = cn_stamps_take(p->stamps, hash);
    if (last_s != 0 && now_s > last_s)
        p->meangap_s += (now_s - last_s - p->meangap_s) * MEANGAP_WEIGHT;
    cn_stamps_put(p->stamps, hash, now_s != 0 ? now_s : 1);
}

static void uc_insert(struct cn_policy *p, uint32_t d, uint32_t parent, uint64_t hash,
                      uint32_t now_s)
{
    uint32_t before = cn_ghost_take(p->ghost, hash);
    uint8_t uses = (uint8_t)(before < USES_MAX ? before + 1 : USES_MAX);

    learn_gap(p, hash, now_s);
    p->nodes[d].uses = uses;
    cn_policy_heal(p, parent, uses, now_s, class_of);
    cn_policy_place(p, class_of(uses), d, parent, CN_POLICY_REQUEST_S, now_s);
    p->last_insert = d;
}

/* First pass of a touch, last of the chain first: no chunk was used less often than those behind
 * it. */
static void count_uses(struct cn_policy *p, const uint32_t *d, const uint64_t *hash, uint32_t count,
                       uint32_t now_s)
{
    uint8_t most = 0;

    for (uint32_t i = count; i-- > 0;) {
        struct cn_policy_node *node;

        if (!cn_policy_listed(p, d[i]))
            continue;
        node = &p->nodes[d[i]];
        learn_gap(p, hash[i], now_s);
        most = node->uses > most ? node->uses : most;
        node->uses = (uint8_t)(most < USES_MAX ? most + 1 : USES_MAX);
    }
}

static void uc_touch(struct cn_policy *p, const uint32_t *d, const uint64_t *hash, uint32_t count,
                     uint32_t now_s)
{
    uint32_t above;

    if (count == 0)
        return;
    above = p->parent_of(p->parent_ctx, d[0]);
    count_uses(p, d, hash, count, now_s);
    if (cn_policy_listed(p, d[0]))
        cn_policy_heal(p, above, p->nodes[d[0]].uses, now_s, class_of);
    for (uint32_t i = count; i-- > 0;) {
        if (cn_policy_listed(p, d[i]))
            cn_policy_place(p, class_of(p->nodes[d[i]].uses), d[i], above, CN_POLICY_REQUEST_S,
                            now_s);
    }
}

static void unpark(struct cn_policy *p, uint32_t now_s)
{
    while (p->lists[PARKED].tail != CN_NONE) {
        uint32_t d = p->lists[PARKED].tail;

        cn_policy_push(p, class_of(p->nodes[d].uses), d, now_s);
    }
}

/*
 * The tail with the lowest score. A queue whose tail is the chunk inserted last holds nothing
 * but the chain that is just being committed: to make room for a chain out of its own beginning
 * would waste both.
 */
static uint32_t uc_victim(struct cn_policy *p, uint32_t now_s)
{
    uint32_t best = CN_NONE;
    double best_score = 0.0;

    if (cn_policy_unpark_due(p, p->lists[PARKED].count, now_s))
        unpark(p, now_s);
    for (uint32_t k = 0; k < CLASSES; k++) {
        uint32_t d = p->lists[k].tail;
        double score;

        if (d == CN_NONE)
            continue;
        score = class_weight[k] / (2.0 * p->meangap_s + cn_policy_age_s(p, d, now_s));
        if (d == p->last_insert && cn_policy_age_s(p, d, now_s) <= CN_POLICY_REQUEST_S)
            score += SCORE_LAST;
        if (best == CN_NONE || score < best_score) {
            best = d;
            best_score = score;
        }
    }
    return best;
}

/* Comes back to the head of its own queue: a lease is a use now, and it was counted when it was
 * taken. */
static void uc_skip(struct cn_policy *p, uint32_t d, uint32_t now_s)
{
    if (cn_policy_listed(p, d))
        cn_policy_park(p, PARKED, d, now_s);
}

static void uc_remove(struct cn_policy *p, uint32_t d, uint64_t hash, bool evicted)
{
    if (evicted && cn_policy_listed(p, d))
        cn_ghost_put(p->ghost, hash, p->nodes[d].uses);
    cn_policy_unlink(p, d);
}

const struct cn_policy_ops cn_policy_usecount_ops = {
    .name = "use-count",
    .insert = uc_insert,
    .touch = uc_touch,
    .victim = uc_victim,
    .skip = uc_skip,
    .remove = uc_remove,
};
