/* SPDX-License-Identifier: Apache-2.0 */
/* A policy over a few nodes, requests as the keeper passes them on; a checker of its lists. */
#ifndef CN_TEST_POLICY_BED_H
#define CN_TEST_POLICY_BED_H

#include <stdbool.h>
#include <stdint.h>

#include "check.h"
#include "cn_policy.h"

#define NODES 512

struct bed {
    struct cn_policy *p;
    struct cn_policy_node nodes[NODES];
    uint32_t parent[NODES];
};

static inline uint64_t mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static inline uint64_t hash_of(uint32_t d) { return mix(d) | 1; /* never sampled */ }

static inline uint32_t parent_of(void *ctx, uint32_t d) { return ((struct bed *)ctx)->parent[d]; }

static inline void bed_open(struct bed *bed, const char *name, uint32_t capacity)
{
    memset(bed, 0, sizeof(*bed));
    for (uint32_t d = 0; d < NODES; d++)
        bed->parent[d] = CN_NONE;
    bed->p = cn_policy_create(name, bed->nodes, NODES, capacity, parent_of, bed);
    CHECK_MSG(bed->p != NULL, "%s", name);
}

static inline void bed_close(struct bed *bed)
{
    cn_policy_destroy(bed->p);
    for (uint32_t d = 0; d < NODES; d++)
        CHECK_EQ(bed->nodes[d].queue, 0);
}

static inline void insert(struct bed *bed, uint32_t d, uint32_t parent, uint32_t now_s)
{
    bed->parent[d] = parent;
    bed->p->ops->insert(bed->p, d, parent, hash_of(d), now_s);
}

/* A request for first, first + 1, …: hits are touched, the others committed one by one. */
static inline void request(struct bed *bed, uint32_t first, uint32_t count, uint32_t now_s)
{
    uint32_t d[NODES] = {0};
    uint64_t hash[NODES] = {0};
    uint32_t hits = 0;

    while (hits < count && bed->nodes[first + hits].queue != 0) {
        d[hits] = first + hits;
        hash[hits] = hash_of(first + hits);
        hits++;
    }
    bed->p->ops->touch(bed->p, d, hash, hits, now_s);
    for (uint32_t i = hits; i < count; i++)
        insert(bed, first + i, i == 0 ? CN_NONE : first + i - 1, now_s);
}

static inline uint32_t evict(struct bed *bed, uint32_t now_s)
{
    uint32_t d = bed->p->ops->victim(bed->p, now_s);

    if (d != CN_NONE)
        bed->p->ops->remove(bed->p, d, hash_of(d), true);
    return d;
}

/* Every list is linked both ways, counted and marked; every listed node is in exactly one. */
static inline void check_lists(const struct bed *bed, bool sorted)
{
    const struct cn_policy *p = bed->p;
    uint32_t listed = 0;
    uint32_t walked = 0;

    for (uint32_t q = 0; q < CN_POLICY_QUEUES_MAX; q++) {
        const struct cn_policy_list *list = &p->lists[q];
        uint32_t prev = CN_NONE;
        uint32_t count = 0;

        for (uint32_t d = list->head; d != CN_NONE; d = p->nodes[d].next) {
            CHECK(d < NODES && count <= list->count);
            CHECK_EQ(p->nodes[d].queue, q + 1);
            CHECK_EQ(p->nodes[d].prev, prev);
            CHECK(!sorted || prev == CN_NONE ||
                  p->nodes[prev].last_use_s >= p->nodes[d].last_use_s);
            prev = d;
            count++;
        }
        CHECK_EQ(list->tail, prev);
        CHECK_EQ(list->count, count);
        CHECK_EQ((p->nonempty[q / 64] >> (q % 64)) & 1, count != 0);
        walked += count;
    }
    for (uint32_t d = 0; d < NODES; d++)
        listed += p->nodes[d].queue != 0;
    CHECK_EQ(walked, p->resident);
    CHECK_EQ(listed, p->resident);
}

#endif
