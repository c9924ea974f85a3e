/* SPDX-License-Identifier: Apache-2.0 */
/* The client's half of a session. Process-private; only lease words, rings and stock are shared. */
#ifndef CN_CLIENT_H
#define CN_CLIENT_H

#include <pthread.h>

#include "cn_api.h"
#include "cn_index.h"

/* Grants that may wait to be given back: more than that are not granted while the ring is full. */
#define CN_OWED_MAX (CN_STOCK_ROWS * CN_STOCK_SLOTS)

#define CN_SLOT_NONE UINT32_MAX

struct cn_mapping {
    uint8_t *base;
    uint64_t bytes;
};

struct cn_client {
    /* MADV_WIPEONFORK page: enum cn_mark, zero in a forked child (I13) */
    uint64_t *mark;
    struct cn_catalog catalog;
    uint64_t *leases; /* shared: our lease table */
    struct cn_session_head *head;
    uint32_t lease_slots;
    uint32_t region_count;
    uint64_t lease_limit_bytes;
    uint64_t largest_bytes; /* of one region: no chunk is larger */
    struct cn_mapping ro[CN_REGIONS_MAX];
    struct cn_mapping rw[CN_REGIONS_MAX];

    uint32_t *slot_next;  /* private: the free list's links */
    uint64_t *slot_bytes; /* private: what each slot holds */
    uint32_t *checked;    /* private: generation of each chunk that this process has checked */
    uint64_t *access_log;
    struct cn_stock_row *stock;
    struct cn_record *sub;
    struct cn_completion *comp;
    int doorbell_fd; /* -1: lost, see cn_ring_doorbell() */
    uint64_t doorbell_dev, doorbell_ino;
    uint32_t session_idx;
    uint32_t hot_slots; /* slots below it are claimed on the lease word itself */
    uint32_t hot_hint;  /* where a free one was last seen */
    uint32_t role;
    struct cn_mapping catalog_map;
    struct cn_mapping session_map;

    /* Tagged free list of lease slots: tag:32 (high) | slot:32; the tag defeats reuse (1.5). */
    uint64_t free_head __attribute__((aligned(CN_CACHELINE)));
    bool limited;          /* lease_limit_bytes is less than there is */
    uint64_t leased_bytes; /* racy sum; exact recount when it seems too much */
    uint64_t access_tail;
    uint64_t log_rung_ns; /* when the doorbell was last rung for the access log alone */

    pthread_mutex_t sub_lock __attribute__((aligned(CN_CACHELINE))); /* private, never shared */
    pthread_mutex_t op_lock; /* one caller at a time reads completions */
    uint64_t sub_tail;
    uint64_t comp_head;
    uint64_t next_cookie;
    uint64_t owed[CN_OWED_MAX]; /* under sub_lock: grants whose ABORT found the ring full */
    uint32_t owed_count;
};

enum cn_mark { CN_MARK_FORKED = 0, CN_MARK_OPEN = 1, CN_MARK_CLOSED = 2 };

static inline bool cn_is_forked(const struct cn_client *c)
{
    return cn_load_relaxed(c->mark) == CN_MARK_FORKED;
}

/* CN_OK when new leases and grants may be made. */
static inline int cn_usable(const struct cn_client *c)
{
    uint64_t mark = cn_load_relaxed(c->mark);
    if (__builtin_expect(mark == CN_MARK_OPEN, 1))
        return CN_OK;
    return mark == CN_MARK_FORKED ? CN_EFORKED : CN_ECLOSED;
}

/* CLOCK_MONOTONIC. */
uint64_t cn_now_ns(void);
/* What is left until then, rounded down; 0 when it is over. */
uint32_t cn_left_ms(uint64_t deadline_ns);
/* Private free list of slots, filled so that low slots come first. */
void cn_slots_init(struct cn_client *c);
/* Take up to count slots with one compare-and-swap; returns how many. */
uint32_t cn_slots_take(struct cn_client *c, uint32_t count, uint32_t *ret_slots);
void cn_slots_put(struct cn_client *c, const uint32_t *slots, uint32_t count);
/* Write one record; waits at most wait_ms for room. Rings the doorbell only if the keeper
 * sleeps. */
int cn_submit(struct cn_client *c, const struct cn_record *record, uint32_t wait_ms);
void cn_ring_doorbell(struct cn_client *c);
/* From now on fd is the doorbell, and c owns it. CN_ESYS with errno: it is no descriptor. */
int cn_doorbell_take(struct cn_client *c, int fd);
/* Is the descriptor still what it was? An engine that closed all it knew of may have given the
 * number to a file of its own. Forgets it when it is not. */
bool cn_doorbell_is_ours(struct cn_client *c);
/* Let every thread that sleeps in this session look again. */
void cn_wake_waiters(struct cn_client *c);

/* Sleep until done(c, arg) or the deadline; the keeper wakes us after it published anything. */
typedef bool (*cn_done_fn)(struct cn_client *c, uint64_t arg);
int cn_wait_until(struct cn_client *c, cn_done_fn done, uint64_t arg, uint32_t wait_ms);

#endif
