/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Eviction policies: which chunk should leave next?
 *
 * Pure code: no I/O, no clock, no shared memory. Time (seconds) and the hash of a key are
 * arguments, so that the same code runs in the keeper, in the unit tests and over a trace in
 * bench/. A policy orders *evictable* chunks; whether a victim is leased is the keeper's
 * business.
 *
 * Nodes are one array per pool, indexed by descriptor and shared by all instances of the pool (a
 * namespace with a quota, and each priority band, has an instance of its own); a descriptor is
 * in at most one instance at a time. Everything here is keeper-private and rebuildable.
 */
#ifndef CN_POLICY_H
#define CN_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#define CN_NONE UINT32_MAX       /* no descriptor */
#define CN_POLICY_QUEUES_MAX 192 /* LFU: one list a priority; at most 255, see queue */

struct cn_policy_node { /* 16 bytes a descriptor */
    uint32_t prev;
    uint32_t next;
    uint32_t last_use_s;
    uint8_t uses;
    uint8_t queue;   /* index into heads + 1; 0 = in no list */
    uint16_t domain; /* the keeper's: which instance it is in */
};

_Static_assert(sizeof(struct cn_policy_node) == 16, "a node is 16 bytes a descriptor");

struct cn_policy_list {
    uint32_t head; /* most recent */
    uint32_t tail; /* next victim */
    uint32_t count;
};

struct cn_policy;

/* The parent of a resident chunk in its chain; CN_NONE when it is gone, unknown, or in another
 * instance (one that is in no list, pinned for example, is passed over by the policy itself). */
typedef uint32_t (*cn_policy_parent_fn)(void *ctx, uint32_t d);

struct cn_policy_ops {
    const char *name; /* as written in the configuration */
    /* Chunk d (hash of its key: hash) became resident. parent: the parent if it is resident *in
     * this instance*, else CN_NONE. When d follows its parent within one request, d must end up
     * *behind* (evicted before) it. */
    void (*insert)(struct cn_policy *p, uint32_t d, uint32_t parent, uint64_t hash, uint32_t now_s);
    /* One request used the chunks d[0..count) of this instance, first of the chain first. A commit
     * that turns out to be resident already is a touch of that one chunk. */
    void (*touch)(struct cn_policy *p, const uint32_t *d, const uint64_t *hash, uint32_t count,
                  uint32_t now_s);
    /* The best candidate, which stays where it is; CN_NONE when empty. */
    uint32_t (*victim)(struct cn_policy *p, uint32_t now_s);
    /* The candidate may not leave now (leased, or others depend on it): offer another one next.
     * In a row of victim() and skip() within one second no chunk comes twice before all came
     * once. */
    void (*skip)(struct cn_policy *p, uint32_t d, uint32_t now_s);
    /* d leaves. evicted: the policy's own choice, to be remembered; else deleted, pinned, moved. */
    void (*remove)(struct cn_policy *p, uint32_t d, uint64_t hash, bool evicted);
};

struct cn_policy {
    const struct cn_policy_ops *ops;
    struct cn_policy_node *nodes; /* the pool's array, not owned */
    uint32_t node_count;
    uint32_t capacity; /* chunks that fit, an estimate kept up to date by the keeper */
    cn_policy_parent_fn parent_of;
    void *parent_ctx;
    struct cn_policy_list lists[CN_POLICY_QUEUES_MAX];
    uint64_t nonempty[CN_POLICY_QUEUES_MAX / 64]; /* bit q: lists[q] holds something */
    struct cn_ghost *ghost;                       /* use-count: counts of evicted chunks */
    struct cn_stamps *stamps; /* use-count: last uses of sampled chunks; S3-FIFO: its ghost */
    double meangap_s;         /* use-count queues: mean reuse gap */
    uint32_t resident;        /* chunks in any list */
    uint32_t parked_s;        /* second in which chunks were last set aside by skip() */
    uint32_t clock;           /* LFU: priority of the last victim; S3-FIFO: ghost stamps */
    uint32_t last_insert;     /* use-count: spared while its own chain arrives */
};

/* NULL when name is unknown or memory is short. capacity > 0. */
struct cn_policy *cn_policy_create(const char *name, struct cn_policy_node *nodes,
                                   uint32_t node_count, uint32_t capacity,
                                   cn_policy_parent_fn parent_of, void *parent_ctx);
void cn_policy_destroy(struct cn_policy *p);

/* What insert() and later touches left, again: a chunk that was used so often, last at last_use_s.
 * Called with the oldest first. */
void cn_policy_readd(struct cn_policy *p, uint32_t d, uint32_t parent, uint64_t hash, uint32_t uses,
                     uint32_t last_use_s);

/* Capacity is an estimate in chunks; ghost tables keep what they hold when it grows or shrinks. */
void cn_policy_set_capacity(struct cn_policy *p, uint32_t capacity);

/* Name of policy i, or NULL beyond the last: "use-count", "lru", "lfu", "s3-fifo". 0 is the
 * default. */
const char *cn_policy_name(uint32_t i);

#endif
