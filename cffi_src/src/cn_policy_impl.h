/* SPDX-License-Identifier: Apache-2.0 */
/* What the policies share: linked lists over the pool's nodes, and the order along a chain. */
#ifndef CN_POLICY_IMPL_H
#define CN_POLICY_IMPL_H

#include "cn_ghost.h"
#include "cn_policy.h"
#include "cn_policy_stamps.h"

/* A commit this long after its parent's last use still belongs to the same request (prefill takes a
 * while). */
#define CN_POLICY_REQUEST_S 4
/* Longest walk towards the root of a chain: the limit of keys a call. */
#define CN_POLICY_CHAIN_MAX 65536

extern const struct cn_policy_ops cn_policy_usecount_ops;
extern const struct cn_policy_ops cn_policy_lru_ops;
extern const struct cn_policy_ops cn_policy_lfu_ops;
extern const struct cn_policy_ops cn_policy_s3fifo_ops;

/* Entries that a policy wants in its ghost and stamp tables for each chunk of capacity. */
#define CN_POLICY_USECOUNT_GHOST 4
#define CN_POLICY_USECOUNT_STAMPS 1 /* one key in 16 is sampled: covers 16 * capacity chunks */
#define CN_POLICY_S3FIFO_STAMPS 2   /* half of them valid, so that hardly a set overflows */

static inline bool cn_policy_listed(const struct cn_policy *p, uint32_t d)
{
    return d < p->node_count && p->nodes[d].queue != 0;
}

/* The list that holds d, which must be listed. */
static inline uint32_t cn_policy_queue(const struct cn_policy *p, uint32_t d)
{
    return p->nodes[d].queue - 1u;
}

/* Seconds since d was last used; a clock that went backwards counts as no time. */
static inline uint32_t cn_policy_age_s(const struct cn_policy *p, uint32_t d, uint32_t now_s)
{
    return now_s > p->nodes[d].last_use_s ? now_s - p->nodes[d].last_use_s : 0;
}

static inline bool cn_policy_sampled(uint64_t hash) { return hash % 16 == 0; }

/* Take d out of its list, if it is in one. */
void cn_policy_unlink(struct cn_policy *p, uint32_t d);

/* Put d, wherever it was, at the head of list q, used now. */
void cn_policy_push(struct cn_policy *p, uint32_t q, uint32_t d, uint32_t now_s);

/*
 * Put d, wherever it was, into list q: right behind anchor and as old as it if anchor is in q
 * and was used in the last request_s seconds, else at the head. Lists stay sorted by last_use_s.
 */
void cn_policy_place(struct cn_policy *p, uint32_t q, uint32_t d, uint32_t anchor,
                     uint32_t request_s, uint32_t now_s);

/* The lowest non-empty list in [first, end), or end. */
uint32_t cn_policy_lowest(const struct cn_policy *p, uint32_t first, uint32_t end);

/*
 * skip() of the policies with several lists sets the candidate aside in list q, so that the
 * choice between lists cannot come back to it. True when it is time to put the parked ones back:
 * a second later, or when nothing else is left.
 */
void cn_policy_park(struct cn_policy *p, uint32_t q, uint32_t d, uint32_t now_s);
bool cn_policy_unpark_due(struct cn_policy *p, uint32_t parked_count, uint32_t now_s);

/*
 * A use of a suffix is a use of its prefix: every ancestor of a chunk, from its parent first on,
 * gets at least uses and is relinked when it has fewer or was not used within this request,
 * suffix first. Ends at the first ancestor that has both, so that each step is paid for by a use
 * that was not known before.
 */
void cn_policy_heal(struct cn_policy *p, uint32_t first, uint8_t uses, uint32_t now_s,
                    uint32_t (*class_of)(uint8_t uses));

#endif
