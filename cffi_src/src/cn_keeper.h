/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The keeper: the one thread that changes the catalog (I1).
 *
 *   cn_keeper.c    the thread: rounds of work, sleep, life
 *   cn_command.c   what the control thread asks for
 *   cn_session.c   sessions: open, drain rings, death
 *   cn_access.c    what sessions used
 *   cn_stock.c     extents granted in advance
 *   cn_change.c    catalog changes, each in the store order of docs/architecture.md
 *   cn_move.c      a chunk to another extent
 *   cn_queue.c     eviction queues and timers
 *   cn_evict.c     scan of the lease tables, unlinking, limbo, victims, emptying slabs
 *   cn_event.c     the feed
 *   cn_recover.c   taking over what a dead keeper left
 *   cn_audit.c     do all tables agree?
 */
#ifndef CN_KEEPER_H
#define CN_KEEPER_H

#include <pthread.h>

#include "cn_api.h"
#include "cn_arena.h"
#include "cn_index.h"
#include "cn_policy.h"

/* records a ring and round, so that no session starves another */
#define CN_ROUND_RECORDS 64u
#define CN_UNLINK_BATCH 64u       /* victims between two looks at the rings */
#define CN_DOMAINS_MAX 12289u     /* (namespaces with a quota + 1) x 3 priority bands, + 1 */
#define CN_DOMAIN_NONE UINT16_MAX /* in no queue for a moment, while queues are made anew */
#define CN_BANDS 3u               /* priority < 0, 0, > 0 */
#define CN_SHIFT_MAX 64u          /* eviction rounds one WANT may cause before it is refused */
#define CN_PIN_SHARE 2u           /* pins may hold at most half of the pool */
#define CN_GRANT_SHARE 4u
#define CN_STOCK_IDLE_NS 100000000ull /* a stock unused for so long goes before any chunk */
#define CN_STOCK_SHARE 64u            /* a session's stock is at most 1/64 of the pool */
/* Between two looks at the lock of a session that may be dead, doubled each time. */
#define CN_DEATH_LOOK_NS 5000000ull
#define CN_DEATH_LOOK_EXITED_NS 40000000ull /* at most, once its process exited */
#define CN_DEATH_LOOK_MAX_NS 1000000000ull  /* at most, while the process lives */
#define CN_CHAIN_MAX CN_ACCESS_SLOTS

struct cn_row_state { /* what the keeper believes of one stock row */
    uint64_t extent_bytes;
    uint32_t filled;     /* when last looked at; clients only take */
    uint32_t target;     /* extents to keep in it */
    uint64_t used_ns;    /* monotonic */
    uint32_t used_round; /* for replacing the row used longest ago */
};

struct cn_session {
    struct cn_session_head *head; /* client-writable: read once, checked, never trusted (I4) */
    uint64_t *leases;
    struct cn_stock_row *stock;
    struct cn_record *sub;
    struct cn_completion *comp;
    uint64_t *access_log;
    uint64_t segment_bytes;
    uint64_t sub_head; /* private: the shared copy is output only */
    uint64_t comp_tail;
    uint64_t want_failed;
    uint64_t access_head;
    uint64_t access_read_ns; /* CLOCK_MONOTONIC */
    uint64_t nonce;
    uint64_t granted_bytes;
    /* keys that PIN, UNPIN, DELETE took effect on since the last NOP */
    uint64_t op_done;
    uint64_t hits, misses;   /* already folded */
    uint64_t death_check_ns; /* next look at the liveness lock; 0 = nobody suspects it */
    uint64_t death_period_ns;
    struct cn_row_state rows[CN_STOCK_ROWS];
    uint64_t tenant;     /* it may commit to namespaces of this tenant */
    uint32_t grant_head; /* its GRANTED descriptors, linked through the policy nodes */
    uint32_t idx;
    uint32_t role;
    uint32_t internal;
    /* its ring made no sense: not read any more, leases still count */
    bool broken;
    bool exited;         /* its pidfd fired */
    uint32_t rows_dirty; /* bit a row: refill it at the end of the round */
    int liveness_fd;
    int doorbell_fd;
    int pidfd;
};

struct cn_timer {   /* time-to-live or end of a pin */
    uint64_t at_ns; /* CLOCK_REALTIME */
    uint64_t ref;
};

struct cn_timers {
    struct cn_timer *heap;
    uint32_t count;
    uint32_t room;
};

/* System calls of the keeper, so that tests and the explorer bring their own. */
struct cn_keeper_ops {
    uint64_t (*realtime_ns)(void);
    uint64_t (*monotonic_ns)(void);
    void (*wake)(uint32_t *futex);    /* FUTEX_WAKE all; never blocks */
    bool (*is_dead)(int liveness_fd); /* flock on our own description */
};

struct cn_command {
    int (*run)(struct cn_keeper *k, void *args);
    void *args;
    int status;
    uint32_t done; /* futex */
    uint64_t next;
};

/* Descriptors on their way from LIVE to FREE together: one fence and one scan for all. */
struct cn_unlink {
    uint32_t d[CN_UNLINK_BATCH];
    uint32_t count;
};

struct cn_slab_ctx {
    struct cn_keeper *keeper;
    uint32_t region;
};

struct cn_keeper {
    struct cn_catalog catalog;
    struct cn_counters count; /* private copy; stored to the catalog as it changes */
    uint8_t *region_base[CN_REGIONS_MAX];
    struct cn_arena *arena[CN_REGIONS_MAX];
    struct cn_slab_ctx slab_ctx[CN_REGIONS_MAX];
    uint32_t region_count;
    uint64_t capacity_bytes;
    uint64_t high_bytes;
    uint64_t low_bytes;
    uint64_t pinned_bytes;
    uint32_t spin_us;
    char policy_name[32];

    struct cn_policy_node *nodes; /* one a descriptor */
    uint32_t *children;           /* resident chunks that name it as parent */
    uint32_t fresh;               /* descriptors from here on were never used */
    uint32_t free_head;           /* freed ones, linked through the nodes */
    struct cn_policy *domains[CN_DOMAINS_MAX];
    uint32_t domain_list[CN_DOMAINS_MAX];
    uint32_t domain_skips[CN_DOMAINS_MAX]; /* candidates of each passed over in this batch */
    uint32_t domain_count;

    struct cn_session *sessions[CN_SESSIONS_MAX];
    uint32_t session_list[CN_SESSIONS_MAX]; /* the scan set (I3) */
    uint32_t session_count;
    uint32_t turn; /* rotating start of the rounds */
    uint64_t next_nonce;

    struct cn_unlink unlink;
    uint32_t *limbo; /* DYING and leased when last looked at */
    uint32_t limbo_count;
    uint64_t *leased;      /* bit a descriptor: named by some table at the last scan */
    uint32_t *leased_list; /* the bits that are set */
    uint32_t leased_count;
    uint64_t leased_round; /* round of the last scan */
    uint64_t round;
    uint64_t limbo_look_ns;
    uint64_t shrink_again_ns;
    bool wanted;     /* somebody waits for memory */
    bool leaf_first; /* the policy evicts a chunk after those that depend on it */
    bool shrinking;  /* between the high- and the low-water mark */
    struct cn_timers timers;
    uint8_t *timed; /* scratch of timers_prune(), one a descriptor */
    uint64_t chain_hash[CN_CHAIN_MAX];
    uint32_t chain[CN_CHAIN_MAX];

    uint64_t realtime_ns; /* of this round */
    uint64_t monotonic_ns;
    struct cn_keeper_ops ops;
    const uint64_t *clock; /* instead of ops.realtime_ns(); written by whoever replays */
    pthread_t thread;
    bool running;
    bool stop;
    uint64_t commands; /* Treiber list of struct cn_command, pushed by others */
    int epoll_fd;
    int command_fd;
};

/* Relaxed is enough: a number, which orders nothing. */
static inline uint64_t cn_realtime_ns(const struct cn_keeper *k)
{
    return k->clock == NULL ? k->ops.realtime_ns() : cn_load_relaxed(k->clock);
}

/* ---- cn_change.c ---------------------------------------------------------- */

static inline uint64_t cn_extent_bytes(const struct cn_keeper *k, uint32_t d)
{
    return (uint64_t)k->catalog.cold[d].extent_pages * CN_PAGE_BYTES;
}
static inline uint64_t cn_chunk_word(const struct cn_keeper *k, uint32_t d)
{
    return cn_load_relaxed(&k->catalog.chunks[d].word);
}
/* Into the queue of its domain, as just used. orphan: its parent is named but not here, so no
 * prefix leads to it; it goes before everything else. */
void cn_policy_add(struct cn_keeper *k, uint32_t d, bool orphan);
struct cn_hash cn_chunk_hash(const struct cn_keeper *k, uint32_t d);
struct cn_key cn_chunk_key(const struct cn_keeper *k, uint32_t d);
/* Release: all other fields of the descriptor and its cold record come before it (I5). */
void cn_chunk_publish(struct cn_keeper *k, uint32_t d, uint32_t gen, uint32_t state,
                      uint32_t flags);
/* A descriptor with an extent and its fields, still FREE: the caller publishes it. */
int cn_descriptor_fill(struct cn_keeper *k, uint64_t extent_bytes, uint32_t owner, uint32_t *ret_d);
/* The next generation of a FREE descriptor; 0 is no generation. */
uint32_t cn_next_gen(const struct cn_keeper *k, uint32_t d);
void cn_account_live(struct cn_keeper *k, uint32_t d, bool plus);
/* Resident (LIVE) chunk that ref names, or CN_NONE. */
uint32_t cn_live_of(const struct cn_keeper *k, uint64_t ref);
uint32_t cn_parent_of(void *keeper, uint32_t d);
/* FREE -> GRANTED for a session. CN_EFULL, CN_ETOOBIG, CN_ELIMIT (no descriptor left). */
int cn_grant_one(struct cn_keeper *k, struct cn_session *s, uint64_t extent_bytes,
                 uint64_t *ret_ref);
/* A predecessor's grant, counted as ours. */
void cn_grant_adopt(struct cn_keeper *k, struct cn_session *s, uint32_t d);
/* A predecessor's chunk: pin, deadline, parent and sums. */
void cn_live_adopt(struct cn_keeper *k, uint32_t d);
void cn_descriptor_put(struct cn_keeper *k, uint32_t d);
/* GRANTED -> FREE, if ref is a grant of this session: a replay is a silent no-op (I5). */
bool cn_grant_drop(struct cn_keeper *k, struct cn_session *s, uint64_t ref);
/* GRANTED -> LIVE. The grant is used up whatever the answer. */
int cn_link(struct cn_keeper *k, struct cn_session *s, const struct cn_record *r);
/* LIVE -> DYING and out of index, policy and chain; freed by cn_unlink_flush(). */
void cn_unlink_one(struct cn_keeper *k, uint32_t d, uint32_t kind, uint32_t reason);
/* The same, for bytes that are not what was committed. */
void cn_lose(struct cn_keeper *k, uint32_t d);
/* One fence, one scan; unleased ones become FREE, the others wait in limbo. */
void cn_unlink_flush(struct cn_keeper *k);
void cn_free(struct cn_keeper *k, uint32_t d);
/* False: pins would take more than half of the pool. */
bool cn_set_pin(struct cn_keeper *k, uint32_t d, uint64_t until_ns);
void cn_clear_pin(struct cn_keeper *k, uint32_t d);
void cn_set_crc(struct cn_keeper *k, uint64_t ref, uint32_t crc32c);
/* Copy an unleased, unpinned chunk to another extent; false when there is none. */
struct cn_moved {
    uint64_t from, to; /* references of one chunk before and after */
};
bool cn_move(struct cn_keeper *k, uint32_t d, struct cn_moved *ret_moved);
/* Children of moved chunks name them where they are now: a chain stays one, and leaves from its
 * tail. moved: in ascending order of from. */
void cn_moved_adopt(struct cn_keeper *k, const struct cn_moved *moved, uint32_t count);
/* What a successor needs to know about its place in the queue. */
void cn_policy_save(struct cn_keeper *k, uint32_t d);
/* Into the queue of its domain as a predecessor saved it; called with the oldest first. */
void cn_policy_restore(struct cn_keeper *k, uint32_t d);
/* One use: a second writer brought the same key. */
void cn_policy_touch(struct cn_keeper *k, uint32_t d);
void cn_policy_drop(struct cn_keeper *k, uint32_t d, bool evicted);
/* Look at ref at that time (CLOCK_REALTIME); at most two entries a resident chunk are kept
 * (I10). */
int cn_timer_add(struct cn_keeper *k, uint64_t at_ns, uint64_t ref);
/* The next reference whose time has come. */
bool cn_timer_pop(struct cn_keeper *k, uint64_t *ret_ref);
/* Delete d if its time-to-live is over and no pin holds it. */
void cn_expire(struct cn_keeper *k, uint32_t d);

/* ---- cn_evict.c ----------------------------------------------------------- */

/* Mark in k->leased what any table names now. */
void cn_scan_leases(struct cn_keeper *k);
bool cn_is_leased(const struct cn_keeper *k, uint32_t d);
/* Evict up to one batch of unleased victims; ns 0: anywhere. Returns bytes of extents unlinked. */
uint64_t cn_evict_batch(struct cn_keeper *k, uint32_t ns, uint64_t want_bytes, uint32_t reason);
/* Free what left limbo. */
void cn_limbo_look(struct cn_keeper *k);
/* Empty the cheapest run of slabs by moving or evicting, so that an extent of this size fits. */
bool cn_reclaim(struct cn_keeper *k, uint64_t extent_bytes);
/* Work towards the low-water mark, one batch. True when there is more to do. */
bool cn_shrink(struct cn_keeper *k);
/* Room for one extent, by all means; false when nothing can leave now. */
bool cn_make_room(struct cn_keeper *k, uint64_t extent_bytes);

/* ---- cn_session.c --------------------------------------------------------- */

/* NULL: no memory, or no descriptor can be watched. */
struct cn_session *cn_session_new(struct cn_keeper *k, const struct cn_session_open *o,
                                  uint32_t idx, uint64_t nonce);
uint64_t cn_session_hits(const struct cn_session *s);
void cn_session_enter(struct cn_keeper *k, struct cn_session *s);
void cn_session_forget(struct cn_keeper *k, struct cn_session *s);
uint32_t cn_session_drain(struct cn_keeper *k, struct cn_session *s, uint32_t records_max);
void cn_session_read_access(struct cn_keeper *k, struct cn_session *s);
/* The same where half of the log is unread: whoever only reads is heard before an eviction, too. */
void cn_session_look_at_access(struct cn_keeper *k, struct cn_session *s);
void cn_session_publish(struct cn_keeper *k, struct cn_session *s, bool wake);
void cn_session_end(struct cn_keeper *k, struct cn_session *s);
bool cn_session_has_work(const struct cn_session *s);
/* May it change what is in this namespace? */
bool cn_session_may_write(const struct cn_keeper *k, const struct cn_session *s, uint32_t ns);
/* From now on it may commit to the namespaces of this tenant, and of no other. */
void cn_session_set_tenant(struct cn_keeper *k, struct cn_session *s, uint64_t tenant);
/* Take back what lies in its stock unused. Its rows are not filled again until it asks. */
uint32_t cn_session_revoke_stock(struct cn_keeper *k, struct cn_session *s);
/* Take back granted extents that lie in stocks which nobody used for so long. Returns how many. */
uint32_t cn_revoke_stock(struct cn_keeper *k, uint64_t idle_ns);
void cn_stock_want(struct cn_keeper *k, struct cn_session *s, const struct cn_record *r);
/* A grant of this size was used: its row is filled up at the end of the round. */
void cn_stock_used(struct cn_keeper *k, struct cn_session *s, const struct cn_record *r);
void cn_stock_refill(struct cn_keeper *k, struct cn_session *s);
void cn_session_fold(struct cn_keeper *k, struct cn_session *s);
int cn_do_session_open(struct cn_keeper *k, void *args);
int cn_do_session_confirm(struct cn_keeper *k, void *args);
int cn_do_session_hint(struct cn_keeper *k, void *args);
int cn_do_session_demote(struct cn_keeper *k, void *args);
int cn_do_session_info(struct cn_keeper *k, void *args);

/* Run on the keeper's thread and wait for it. */
int cn_call(struct cn_keeper *k, int (*run)(struct cn_keeper *, void *), void *args);
uint32_t cn_run_commands(struct cn_keeper *k);
int cn_do_configure(struct cn_keeper *k, void *args);

struct cn_hint_args {
    uint32_t session;
    uint64_t nonce;
};
struct cn_demote_args {
    uint32_t session;
    uint64_t nonce;
    uint32_t role;
};
struct cn_info_args {
    struct cn_session_info *infos;
    uint32_t max;
    uint32_t *count;
};

/* ---- cn_keeper.c ---------------------------------------------------------- */

/* A keeper of this catalog that has changed nothing yet. */
int cn_keeper_new(void *catalog, uint64_t catalog_bytes, void *const *regions,
                  struct cn_keeper **ret_keeper);
/* From here on we are the one who writes it (I1). */
void cn_keeper_take_office(struct cn_keeper *k, uint64_t start_ns);

/* ---- cn_event.c, cn_audit.c ----------------------------------------------- */

void cn_event_put(struct cn_keeper *k, uint32_t kind, uint32_t reason, uint32_t d);
void cn_counters_store(struct cn_keeper *k);
int cn_do_audit(struct cn_keeper *k, void *args);

#endif
