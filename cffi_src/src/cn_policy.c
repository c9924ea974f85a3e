/* SPDX-License-Identifier: Apache-2.0 */
#include "cn_policy_impl.h"

#include <stdlib.h>

struct policy_kind {
    const struct cn_policy_ops *ops;
    uint32_t ghost_factor; /* entries for each chunk of capacity; 0 = no such table */
    uint32_t stamps_factor;
};

static const struct policy_kind kinds[] = {
    {&cn_policy_usecount_ops, CN_POLICY_USECOUNT_GHOST, CN_POLICY_USECOUNT_STAMPS},
    {&cn_policy_lru_ops, 0, 0},
    {&cn_policy_lfu_ops, 0, 0},
    {&cn_policy_s3fifo_ops, 0, CN_POLICY_S3FIFO_STAMPS},
};

#define KIND_COUNT ((uint32_t)(sizeof(kinds) / sizeof(kinds[0])))
#define MEANGAP_START_S 30.0

static bool same_text(const char *a, const char *b)
{
    while (*a != '\0' && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

static void lists_init(struct cn_policy *p)
{
    for (uint32_t q = 0; q < CN_POLICY_QUEUES_MAX; q++)
        p->lists[q] = (struct cn_policy_list){.head = CN_NONE, .tail = CN_NONE};
}

static bool tables_init(struct cn_policy *p, const struct policy_kind *kind)
{
    if (kind->ghost_factor != 0)
        p->ghost = cn_ghost_create((uint64_t)kind->ghost_factor * p->capacity);
    if (kind->stamps_factor != 0)
        p->stamps = cn_stamps_create((uint64_t)kind->stamps_factor * p->capacity);
    return (p->ghost != NULL || kind->ghost_factor == 0) &&
           (p->stamps != NULL || kind->stamps_factor == 0);
}

struct cn_policy *cn_policy_create(const char *name, struct cn_policy_node *nodes,
                                   uint32_t node_count, uint32_t capacity,
                                   cn_policy_parent_fn parent_of, void *parent_ctx)
{
    struct cn_policy *p;
    uint32_t kind = 0;

    while (kind < KIND_COUNT && !same_text(kinds[kind].ops->name, name))
        kind++;
    if (kind == KIND_COUNT || capacity == 0)
        return NULL;
    p = calloc(1, sizeof(*p));
    if (p == NULL)
        return NULL;
    p->ops = kinds[kind].ops;
    p->nodes = nodes;
    p->node_count = node_count;
    p->capacity = capacity;
    p->parent_of = parent_of;
    p->parent_ctx = parent_ctx;
    p->meangap_s = MEANGAP_START_S;
    p->last_insert = CN_NONE;
    lists_init(p);
    if (!tables_init(p, &kinds[kind])) {
        cn_policy_destroy(p);
        return NULL;
    }
    return p;
}

/* The nodes are the pool's: those still listed are taken out, so that another instance can have
 * them. */
void cn_policy_destroy(struct cn_policy *p)
{
    if (p == NULL)
        return;
    for (uint32_t q = 0; q < CN_POLICY_QUEUES_MAX; q++) {
        while (p->lists[q].head != CN_NONE)
            cn_policy_unlink(p, p->lists[q].head);
    }
    cn_ghost_destroy(p->ghost);
    cn_stamps_destroy(p->stamps);
    free(p);
}

void cn_policy_set_capacity(struct cn_policy *p, uint32_t capacity)
{
    if (capacity == 0)
        return;
    p->capacity = capacity;
    for (uint32_t kind = 0; kind < KIND_COUNT; kind++) {
        if (kinds[kind].ops != p->ops)
            continue;
        if (p->ghost != NULL)
            cn_ghost_resize(p->ghost, (uint64_t)kinds[kind].ghost_factor * capacity);
        if (p->stamps != NULL)
            cn_stamps_resize(p->stamps, (uint64_t)kinds[kind].stamps_factor * capacity);
    }
}

#define READD_TOUCHES_MAX 3u /* what S3-FIFO counts to; beyond it the order says more */

void cn_policy_readd(struct cn_policy *p, uint32_t d, uint32_t parent, uint64_t hash, uint32_t uses,
                     uint32_t last_use_s)
{
    uint32_t touches = p->ghost != NULL || uses == 0 ? 0 : uses - 1;

    if (p->ghost != NULL && uses > 1)
        cn_ghost_put(p->ghost, hash, uses - 1); /* as if it had been evicted, and came back */
    p->ops->insert(p, d, parent, hash, last_use_s);
    for (uint32_t i = 0; i < touches && i < READD_TOUCHES_MAX; i++)
        p->ops->touch(p, &d, &hash, 1, last_use_s);
}

const char *cn_policy_name(uint32_t i) { return i < KIND_COUNT ? kinds[i].ops->name : NULL; }

static void list_mark(struct cn_policy *p, uint32_t q)
{
    uint64_t bit = UINT64_C(1) << (q % 64);

    if (p->lists[q].count != 0)
        p->nonempty[q / 64] |= bit;
    else
        p->nonempty[q / 64] &= ~bit;
}

void cn_policy_unlink(struct cn_policy *p, uint32_t d)
{
    struct cn_policy_node *node = &p->nodes[d];
    struct cn_policy_list *list;
    uint32_t q;

    if (node->queue == 0)
        return;
    q = node->queue - 1u;
    list = &p->lists[q];
    if (node->prev != CN_NONE)
        p->nodes[node->prev].next = node->next;
    else
        list->head = node->next;
    if (node->next != CN_NONE)
        p->nodes[node->next].prev = node->prev;
    else
        list->tail = node->prev;
    list->count--;
    p->resident--;
    node->prev = CN_NONE;
    node->next = CN_NONE;
    node->queue = 0;
    list_mark(p, q);
}

/* d, in no list, goes right behind prev, a member of list q; prev CN_NONE: to the head. */
static void list_link(struct cn_policy *p, uint32_t q, uint32_t d, uint32_t prev)
{
    struct cn_policy_list *list = &p->lists[q];
    struct cn_policy_node *node = &p->nodes[d];
    uint32_t next = prev == CN_NONE ? list->head : p->nodes[prev].next;

    node->prev = prev;
    node->next = next;
    node->queue = (uint8_t)(q + 1);
    if (prev == CN_NONE)
        list->head = d;
    else
        p->nodes[prev].next = d;
    if (next == CN_NONE)
        list->tail = d;
    else
        p->nodes[next].prev = d;
    list->count++;
    p->resident++;
    list_mark(p, q);
}

void cn_policy_push(struct cn_policy *p, uint32_t q, uint32_t d, uint32_t now_s)
{
    cn_policy_unlink(p, d);
    list_link(p, q, d, CN_NONE);
    p->nodes[d].last_use_s = now_s;
}

void cn_policy_place(struct cn_policy *p, uint32_t q, uint32_t d, uint32_t anchor,
                     uint32_t request_s, uint32_t now_s)
{
    if (anchor == d || !cn_policy_listed(p, anchor) || cn_policy_queue(p, anchor) != q ||
        cn_policy_age_s(p, anchor, now_s) > request_s) {
        cn_policy_push(p, q, d, now_s);
        return;
    }
    cn_policy_unlink(p, d);
    list_link(p, q, d, anchor);
    p->nodes[d].last_use_s = p->nodes[anchor].last_use_s;
}

uint32_t cn_policy_lowest(const struct cn_policy *p, uint32_t first, uint32_t end)
{
    while (first < end) {
        uint64_t word = p->nonempty[first / 64] >> (first % 64);

        if (word != 0) {
            first += (uint32_t)__builtin_ctzll(word);
            return first < end ? first : end;
        }
        first = (first / 64 + 1) * 64;
    }
    return end;
}

void cn_policy_park(struct cn_policy *p, uint32_t q, uint32_t d, uint32_t now_s)
{
    p->parked_s = now_s;
    cn_policy_push(p, q, d, now_s);
}

bool cn_policy_unpark_due(struct cn_policy *p, uint32_t parked_count, uint32_t now_s)
{
    return parked_count != 0 && (parked_count == p->resident || p->parked_s != now_s);
}

/* Does the walk of cn_policy_heal() go on above x? */
static bool needs_healing(const struct cn_policy *p, uint32_t x, uint8_t uses, uint32_t now_s)
{
    return cn_policy_listed(p, x) &&
           (p->nodes[x].uses < uses || cn_policy_age_s(p, x, now_s) > CN_POLICY_REQUEST_S);
}

void cn_policy_heal(struct cn_policy *p, uint32_t first, uint8_t uses, uint32_t now_s,
                    uint32_t (*class_of)(uint8_t uses))
{
    uint32_t top = first;
    uint32_t steps = 0;
    uint32_t x = first;

    while (steps < CN_POLICY_CHAIN_MAX && needs_healing(p, top, uses, now_s)) {
        top = p->parent_of(p->parent_ctx, top);
        steps++;
    }
    for (; steps > 0; steps--) {
        struct cn_policy_node *node = &p->nodes[x];

        if (node->uses < uses)
            node->uses = uses;
        cn_policy_place(p, class_of(node->uses), x, top, CN_POLICY_REQUEST_S, now_s);
        x = p->parent_of(p->parent_ctx, x);
    }
}
