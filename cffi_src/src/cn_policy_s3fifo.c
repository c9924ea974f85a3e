/* SPDX-License-Identifier: Apache-2.0 */
/*
 * S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): a small
 * queue takes what is new, a main queue what was used again on the way through it or soon after
 * leaving it (ghost). A hit only counts; order changes when victims are looked for.
 */
#include "cn_policy_impl.h"

enum { SMALL = 0, MAIN = 1, PARKED = 2 }; /* PARKED + SMALL, PARKED + MAIN */

#define USES_MAX 3
#define PROMOTE_ABOVE 1 /* small to main when used more often than this */
#define SMALL_SHARE 10  /* one in so many chunks of the capacity */
#define REQUEST_S 1     /* queues are short here: a late commit does not go behind its parent */

/*
 * The ghost holds the last capacity chunks that left the small queue and did not come back: a
 * stamp is the clock at that time, which goes on with each that leaves and back with each that
 * returns. (A table that just forgets the oldest of a set would lose single chunks of a chain,
 * and one missing chunk near the root wastes all that follow it.)
 */
static bool ghost_take(struct cn_policy *p, uint64_t hash)
{
    uint32_t stamp = cn_stamps_take(p->stamps, hash);

    if (stamp == 0 || p->clock - stamp >= p->capacity)
        return false;
    if (p->clock > 1)
        p->clock--;
    return true;
}

static void ghost_put(struct cn_policy *p, uint64_t hash)
{
    p->clock++;
    if (p->clock == 0) /* 0 means no stamp */
        p->clock++;
    cn_stamps_put(p->stamps, hash, p->clock);
}

static void s3_insert(struct cn_policy *p, uint32_t d, uint32_t parent, uint64_t hash,
                      uint32_t now_s)
{
    uint32_t q = ghost_take(p, hash) ? MAIN : SMALL;

    p->nodes[d].uses = 0;
    cn_policy_place(p, q, d, parent, REQUEST_S, now_s);
}

/* last_use_s stays the time of placing here: a FIFO queue is sorted by that. */
static void s3_touch(struct cn_policy *p, const uint32_t *d, const uint64_t *hash, uint32_t count,
                     uint32_t now_s)
{
    (void)hash;
    (void)now_s;
    for (uint32_t i = 0; i < count; i++) {
        if (cn_policy_listed(p, d[i]) && p->nodes[d[i]].uses < USES_MAX)
            p->nodes[d[i]].uses++;
    }
}

static void unpark(struct cn_policy *p, uint32_t q, uint32_t now_s)
{
    while (p->lists[PARKED + q].tail != CN_NONE)
        cn_policy_push(p, q, p->lists[PARKED + q].tail, now_s);
}

/* Does the next victim come from the small queue? Parked chunks count where they belong. */
static bool small_is_due(const struct cn_policy *p)
{
    uint32_t small = p->lists[SMALL].count + p->lists[PARKED + SMALL].count;

    if (p->lists[SMALL].count == 0 || p->lists[MAIN].count == 0)
        return p->lists[SMALL].count != 0;
    return small >= p->capacity / SMALL_SHARE;
}

/* Each move on consumes a use, so at most USES_MAX moves a chunk, paid for by its hits. */
static uint32_t s3_victim(struct cn_policy *p, uint32_t now_s)
{
    uint32_t parked = p->lists[PARKED + SMALL].count + p->lists[PARKED + MAIN].count;

    if (cn_policy_unpark_due(p, parked, now_s)) {
        unpark(p, SMALL, now_s);
        unpark(p, MAIN, now_s);
    }
    while (p->lists[SMALL].count + p->lists[MAIN].count != 0) {
        uint32_t q = small_is_due(p) ? SMALL : MAIN;
        uint32_t d = p->lists[q].tail;
        struct cn_policy_node *node = &p->nodes[d];

        if (q == SMALL && node->uses <= PROMOTE_ABOVE)
            return d;
        if (q == MAIN && node->uses == 0)
            return d;
        node->uses = q == SMALL ? 0 : (uint8_t)(node->uses - 1);
        cn_policy_push(p, MAIN, d, now_s);
    }
    return CN_NONE;
}

/* Goes round its own queue once more, as a used chunk does in main. No promotion: a writer holds
 * what it has just committed, which says nothing about the next use. */
static void s3_skip(struct cn_policy *p, uint32_t d, uint32_t now_s)
{
    if (cn_policy_listed(p, d) && cn_policy_queue(p, d) < PARKED)
        cn_policy_park(p, PARKED + cn_policy_queue(p, d), d, now_s);
}

static void s3_remove(struct cn_policy *p, uint32_t d, uint64_t hash, bool evicted)
{
    /* What main gives up had its chance. Only leaving the small queue is remembered. */
    if (evicted && cn_policy_listed(p, d) && cn_policy_queue(p, d) % PARKED == SMALL)
        ghost_put(p, hash);
    cn_policy_unlink(p, d);
}

const struct cn_policy_ops cn_policy_s3fifo_ops = {
    .name = "s3-fifo",
    .insert = s3_insert,
    .touch = s3_touch,
    .victim = s3_victim,
    .skip = s3_skip,
    .remove = s3_remove,
};
