/* SPDX-License-Identifier: Apache-2.0 */
/* What Python and the C tests may call. Everything is an int status or says otherwise. */
#ifndef CN_API_H
#define CN_API_H

#include <stdbool.h>

#include "cn_layout.h"
#include "cn_status.h"

/* cffi:begin */
struct cn_client;
struct cn_keeper;

/* ---- format --------------------------------------------------------------- */

struct cn_format {
    const char *pool_name;
    uint8_t pool_id[16];
    uint64_t hash_seed[2];
    uint64_t created_ns;      /* CLOCK_REALTIME, for people */
    uint64_t keeper_start_ns; /* start of this process since boot */
    uint8_t boot_id[16];      /* of the kernel */
    uint32_t chunk_count;     /* descriptors, rounded up to a multiple of 64 */
    uint32_t lease_slots;     /* a session, multiple of 512 */
    uint32_t event_count;     /* rounded up to a power of two */
    uint32_t region_count;
    struct cn_region_info regions[16];
};

/* Folded from size and offset of every shared field: two builds that agree may share a pool. */
uint64_t cn_abi_fingerprint(void);
/* Bytes of the catalog that f needs; 0 when f is out of range. */
uint64_t cn_catalog_bytes(const struct cn_format *f);
/* Format fresh, zeroed memory of exactly that many bytes. A catalog is never formatted twice. */
int cn_catalog_format(void *catalog, uint64_t catalog_bytes, const struct cn_format *f);
/* Is this a catalog that this build can read? Bounds, offsets, CRC: hostile input (I4). */
int cn_catalog_check(const void *catalog, uint64_t catalog_bytes);
uint64_t cn_session_segment_bytes(uint32_t lease_slots);

/* ---- keeper --------------------------------------------------------------- */

/* Live-changeable. high_water is a share of all region bytes, low_water a share of that. */
struct cn_keeper_config {
    double high_water;
    double low_water;
    const char *policy;
    uint32_t spin_us; /* how long the keeper polls before it sleeps */
    uint32_t reserved;
    uint64_t start_ns; /* of this process, since boot: who the keeper is, beside its pid */
};

/* On CN_OK the keeper owns segment (it unmaps it) and the descriptors (it closes them). */
struct cn_session_open {
    void *segment; /* mapped writable, cn_session_segment_bytes() long, zeroed */
    uint64_t segment_bytes;
    /* the keeper's own description of the segment: flock free = dead */
    int32_t liveness_fd;
    int32_t doorbell_fd; /* eventfd */
    int32_t pidfd;       /* -1 when the client gave none */
    uint32_t role;
    uint32_t pid;
    uint32_t uid;
    uint32_t gid;
    uint32_t internal; /* 1: the daemon's own session (checksums) */
    uint64_t start_ns;
    uint64_t lease_limit_bytes;
    const char *label;
    uint32_t ret_session;
    uint32_t opening; /* 1: its descriptor is sent after cn_keeper_session_confirm() only */
    uint64_t ret_nonce;
};

struct cn_namespace_open {
    uint8_t id[32];
    uint64_t tenant;
    uint64_t quota_bytes;
    const char *name;        /* "" = unnamed */
    const uint8_t *manifest; /* canonical msgpack */
    uint32_t manifest_bytes;
    uint32_t session; /* from now on it may commit to the tenant's namespaces; UINT32_MAX: nobody */
    uint64_t session_nonce; /* of that session: its index may have passed to another */
    uint32_t ret_slot;
    /* CN_EINVAL: the slot whose name this is, with another manifest, or the namespace's own slot:
     * it has another name already */
    uint32_t ret_bound_slot;
};

struct cn_session_info {
    uint64_t nonce;
    uint64_t leases;
    uint64_t leased_bytes;
    uint64_t granted_bytes;
    uint64_t limbo_chunks; /* chunks that would be free but for this session's leases */
    uint64_t hits;
    uint64_t misses;
    uint64_t lease_refused;
    uint32_t state;
    uint32_t role;
    uint32_t pid;
    uint32_t uid;
    uint32_t gid;
    uint32_t session;
};

/* catalog and regions stay mapped until cn_keeper_destroy(). Only a freshly formatted catalog. */
int cn_keeper_create(void *catalog, uint64_t catalog_bytes, void *const *regions,
                     const struct cn_keeper_config *config, struct cn_keeper **ret_keeper);
/* A session of a dead keeper, as custody and registry have it. On CN_OK the keeper owns segment and
 * descriptors. */
struct cn_adopt_session {
    void *segment; /* mapped writable, cn_session_segment_bytes() long */
    uint64_t segment_bytes;
    uint64_t nonce;
    uint32_t session; /* its place in the registry */
    int32_t liveness_fd;
    int32_t doorbell_fd;
    int32_t pidfd;
};

/* What a takeover found. */
struct cn_recovery {
    uint64_t live_chunks;
    uint64_t live_bytes;
    uint64_t sessions;
    uint64_t grants;     /* extents lent to writers, that are lent still */
    uint64_t returned;   /* lent to nobody any more: free again */
    uint64_t dying;      /* on their way out; freed once no table names them */
    uint64_t linked;     /* committed, and missing in the index until now */
    uint64_t twins;      /* second copies of a move */
    uint64_t unindexed;  /* entries of the index that named no chunk */
    uint64_t unverified; /* to be checked before their first use (I9) */
    uint64_t was_clean;
    uint64_t reserved;
};

/*
 * Take over the catalog of a keeper that is proved dead (I7). sessions: every one that the registry
 * has as OPEN. CN_EMISS: one of them is not there; CN_ECLOSED: the pool is retired; CN_EVERSION,
 * CN_ECORRUPT: it is not what this build can keep. On any error nothing was changed, and segments
 * and descriptors stay the caller's.
 */
int cn_keeper_adopt(void *catalog, uint64_t catalog_bytes, void *const *regions,
                    const struct cn_keeper_config *config, const struct cn_adopt_session *sessions,
                    uint32_t session_count, struct cn_recovery *ret_found,
                    struct cn_keeper **ret_keeper);
/* Start the one thread that writes the catalog (I1); all signals blocked, never touches Python. */
int cn_keeper_start(struct cn_keeper *keeper);
/* Stop and join it; the catalog is marked clean. Idempotent; never beside another call. */
int cn_keeper_stop(struct cn_keeper *keeper);
void cn_keeper_destroy(struct cn_keeper *keeper);
/* Without a thread: one round of work, for tests. Returns how much was done, or a status < 0. */
int cn_keeper_step(struct cn_keeper *keeper);

/* Each of these runs on the keeper's thread and waits for it. */
int cn_keeper_session_open(struct cn_keeper *keeper, struct cn_session_open *args);
/* It is in custody: from now on a successor must have it, too (I7). Or its client came back: its
 * lock is not looked at until the next hint. CN_EMISS: it has ended. */
int cn_keeper_session_confirm(struct cn_keeper *keeper, uint32_t session, uint64_t nonce);
/* A hint to look: the socket closed. The session ends on proof of death only (I6). */
int cn_keeper_session_hint(struct cn_keeper *keeper, uint32_t session, uint64_t nonce);
/* From now on the session has this role at most. A reader may commit to no namespace any more and
 * is granted nothing; what it was granted or leases stays its own (I6). CN_EMISS: it has ended. */
int cn_keeper_session_demote(struct cn_keeper *keeper, uint32_t session, uint64_t nonce,
                             uint32_t role);
int cn_keeper_namespace_open(struct cn_keeper *keeper, struct cn_namespace_open *args);
int cn_keeper_namespace_quota(struct cn_keeper *keeper, uint32_t slot, uint64_t quota_bytes);
int cn_keeper_configure(struct cn_keeper *keeper, const struct cn_keeper_config *config);
/* Fold the sessions' counters into the catalog's; then read them there. */
int cn_keeper_fold(struct cn_keeper *keeper);
int cn_keeper_session_info(struct cn_keeper *keeper, struct cn_session_info *ret_infos,
                           uint32_t infos_max, uint32_t *ret_count);
/* Unlink every chunk, pinned ones too; what somebody reads is freed when it is released. */
int cn_keeper_clear(struct cn_keeper *keeper, uint64_t *ret_dropped);
/* Unlink the chunks that these references name, as lost: their bytes are not what was committed.
 * What is of another generation, or not LIVE, is none of them. */
int cn_keeper_lose(struct cn_keeper *keeper, const uint64_t *refs, uint32_t count,
                   uint64_t *ret_dropped);
/* No more hits, for ever: clients see misses, then reconnect. */
int cn_keeper_retire(struct cn_keeper *keeper);
/* For replaying recorded time: recency, expiry and events go by *now_ns (as CLOCK_REALTIME, 8-byte
 * aligned, never going back), which anybody may advance while the keeper runs. NULL: the real
 * clock.
 * *now_ns outlives the keeper. Waiting and the death of sessions go by the real clock always. */
int cn_keeper_set_clock(struct cn_keeper *keeper, const uint64_t *now_ns);
/* Walk every table and count contradictions between descriptors, index, arena, queues: 0 is
 * right. */
int cn_keeper_audit(struct cn_keeper *keeper, uint64_t *ret_wrong);

/* ---- client --------------------------------------------------------------- */

struct cn_attach {
    int32_t catalog_fd; /* every descriptor stays the caller's: close it after the call */
    int32_t session_fd;
    int32_t doorbell_fd; /* duplicated */
    uint32_t region_count;
    int32_t region_ro_fd[16];
    int32_t region_rw_fd[16]; /* -1 for a reader */
    uint64_t catalog_bytes;
};

struct cn_view {
    void *data;
    uint64_t bytes;
    uint64_t ref; /* descriptor:32 (low) | generation:32 */
    uint32_t slot;
    uint32_t flags; /* of the chunk's word when it was leased */
};

struct cn_grant {
    void *data; /* writable, extent_bytes long */
    uint64_t ref;
    uint64_t extent_bytes;
};

struct cn_put {
    uint64_t ref; /* of the grant */
    const uint8_t *key;
    const uint8_t *parent_key; /* NULL: none */
    uint64_t data_bytes;
    uint32_t ns_slot;
    uint32_t meta_bytes;
    uint32_t position;
    uint32_t ttl_s;
    uint32_t crc32c;
    int32_t priority;
    uint32_t flags; /* enum cn_record_flag */
    uint32_t reserved;
};

/* Map everything, DONTFORK, check it, and own the mappings until cn_client_detach(). */
int cn_client_attach(const struct cn_attach *a, struct cn_client **ret_client, int *ret_errno);
/* Unmap. The caller has made sure that no lease and no grant is left (I3). */
void cn_client_detach(struct cn_client *client);
/* No new leases or grants; views that live stay good. */
void cn_client_close(struct cn_client *client);
/* Can it still wake the keeper? No, once this process closed the doorbell under it. */
bool cn_client_rings(struct cn_client *client);
/* Is this process a forked child of the one that attached? (I13) */
bool cn_client_forked(const struct cn_client *client);
/* Where a region is mapped in this process: for reading, or the second time for writing. CN_EMISS:
 * not mapped so. What drives a device needs it; everybody else is given addresses. */
int cn_client_region(const struct cn_client *client, uint32_t region, bool writable,
                     void **ret_base, uint64_t *ret_bytes);
const void *cn_client_catalog(const struct cn_client *client);
const void *cn_client_session(const struct cn_client *client);
uint64_t cn_client_boot_token(const struct cn_client *client);
uint32_t cn_client_leases(const struct cn_client *client);

/* Length of the longest present prefix of key_count keys of 32 bytes. Takes no lease. */
int cn_match(struct cn_client *client, uint32_t ns_slot, const uint8_t *keys, uint32_t key_count,
             uint32_t *ret_count);
/* CN_OK, CN_EMISS, CN_ELEASES (also counted), CN_EFORKED, CN_ECLOSED. */
int cn_lease(struct cn_client *client, uint32_t ns_slot, const uint8_t *key,
             struct cn_view *ret_view);
/* Lease the longest present prefix: publish all, one fence, validate all. */
int cn_lease_many(struct cn_client *client, uint32_t ns_slot, const uint8_t *keys,
                  uint32_t key_count, struct cn_view *ret_views, uint32_t *ret_count);
/* Lease by reference, with the first 8 bytes of the key for a token's sake. */
int cn_lease_ref(struct cn_client *client, uint64_t ref, uint64_t key_head,
                 struct cn_view *ret_view);
/* Exactly once a view (I3). Does nothing in a forked child. Any thread, takes no lock. */
void cn_release(struct cn_client *client, uint32_t slot);
void cn_release_many(struct cn_client *client, const struct cn_view *views, uint32_t count);
/* Before the first use of a view with CN_CF_UNVERIFIED (I9): check the bytes, once for each chunk.
 * CN_EMISS: they are not what was committed; the lease is released and counted as a miss. Reads the
 * whole chunk: give up the GIL. */
int cn_view_admit(struct cn_client *client, const struct cn_view *view);
/* The caller's metadata behind a leased chunk; *ret_bytes 0 when there is none. */
int cn_view_meta(const struct cn_client *client, const struct cn_view *view, const void **ret_meta,
                 uint32_t *ret_bytes);
/* The recorded CRC-32C of a leased chunk: CN_OK, or CN_EMISS when none is recorded. */
int cn_view_crc32c(const struct cn_client *client, const struct cn_view *view, uint32_t *ret_crc);
/* CRC of the bytes against the recorded one: CN_OK, CN_ELOST, CN_EMISS when none is recorded. */
int cn_view_verify(const struct cn_client *client, const struct cn_view *view);

/* An extent for data_bytes + meta_bytes from the stock; CN_EFULL when it has none of that size: the
 * call below asks the keeper. Never waits. */
int cn_reserve_now(struct cn_client *client, uint64_t data_bytes, uint32_t meta_bytes,
                   struct cn_grant *ret_grant);
/* The same, waiting at most wait_ms for the keeper; once asked, it has 20 ms to answer. */
int cn_reserve(struct cn_client *client, uint64_t data_bytes, uint32_t meta_bytes, uint32_t wait_ms,
               struct cn_grant *ret_grant);
/* Writes one ring record; no reply. On CN_OK the grant is used up, whatever the keeper makes of the
 * record; on an error it is still the caller's, to try again or abort. */
int cn_commit(struct cn_client *client, const struct cn_put *put, uint32_t wait_ms);
int cn_abort(struct cn_client *client, uint64_t ref);
/* Copy meta behind the data of a grant. */
int cn_put_meta(struct cn_client *client, const struct cn_grant *grant, uint64_t data_bytes,
                const void *meta, uint32_t meta_bytes);
/* Reserve, copy (with CRC when crc is set) and commit a prompt's chunks. Stops at the first that
 * cannot be placed; *ret_count were committed and the status says why it stopped. parent_key:
 * parent of the first, NULL for none; position: chain position of the first. */
struct cn_put_many {
    uint32_t ns_slot;
    uint32_t key_count;
    const uint8_t *keys;
    const void *const *data;
    const uint64_t *data_bytes;
    const uint8_t *parent_key;
    uint32_t position;
    uint32_t ttl_s;
    int32_t priority;
    uint32_t crc;
    uint32_t wait_ms;
    uint32_t flags;
};
int cn_put_many(struct cn_client *client, const struct cn_put_many *args, uint32_t *ret_count);
/* Everything this session submitted before the call is in the catalog. */
int cn_flush(struct cn_client *client, uint32_t wait_ms);
/* Submit op for each key and wait for the answers; *ret_done counts those that took effect. */
int cn_keys_op(struct cn_client *client, uint32_t op, uint32_t ns_slot, const uint8_t *keys,
               uint32_t key_count, uint64_t arg, uint32_t wait_ms, uint32_t *ret_done);
/* The daemon's own session: report the CRC of a leased chunk (CN_OP_CRC) or its loss
 * (CN_OP_LOST). */
int cn_report(struct cn_client *client, uint32_t op, uint64_t ref, uint32_t crc32c);

/* ---- inspection: catalog mapped read-only --------------------------------- */

/* Where key is: CN_OK and *ret_d, or CN_EMISS. */
int cn_find(const void *catalog, uint32_t ns_slot, const uint8_t *key, uint32_t *ret_d);
/* A consistent copy of descriptor d and its cold record; CN_EMISS unless it is LIVE. */
int cn_chunk_read(const void *catalog, uint32_t d, struct cn_chunk *ret_chunk,
                  struct cn_cold *ret_cold);
/* Events from *sequence on, at most max; *ret_lost were overwritten before; sequence moves on. */
int cn_events_read(const void *catalog, uint64_t *sequence, uint32_t max,
                   struct cn_event *ret_events, uint32_t *ret_count, uint64_t *ret_lost);
/* Sleep until an event may be there, at most wait_ms. */
int cn_events_wait(struct cn_client *client, uint64_t sequence, uint32_t wait_ms);

/* A pool as it is mapped for looking at it alone: without a session, or copied. */
struct cn_look {
    const void *catalog;
    uint64_t catalog_bytes;
    const void *region[16]; /* NULL: not mapped */
    uint64_t region_bytes[16];
};
/* Where lookups look for each of these copies: its tag, and three buckets. */
int cn_look_places(const struct cn_look *look, const struct cn_chunk *chunks, uint32_t count,
                   uint32_t *ret_tags, uint32_t *ret_buckets);
/* Do the bytes of each reference have the CRC-32C that is recorded? ret_status: CN_OK, CN_ELOST
 * (no, or they cannot be read), CN_EMISS (it has left meanwhile, or none is recorded), CN_ECORRUPT
 * (it lies outside what is mapped). Takes no lease, and so is no use of the chunk; a long call. */
int cn_look_verify(const struct cn_look *look, const uint64_t *refs, uint32_t count,
                   int32_t *ret_status);

/* ---- bytes ---------------------------------------------------------------- */

uint32_t cn_crc32c(uint32_t crc, const void *data, size_t bytes);
void cn_copy_in(void *dst, const void *src, size_t bytes);
uint32_t cn_copy_in_crc32c(void *dst, const void *src, size_t bytes);
void cn_copy_out(void *dst, const void *src, size_t bytes);
uint32_t cn_copy_out_crc32c(void *dst, const void *src, size_t bytes);
const char *cn_copy_kernel(void);
/* Granules of 2 MiB in the best slab for chunks of this size, and its waste in millionths. */
uint32_t cn_arena_slab_granules(uint64_t extent_bytes, uint32_t *ret_waste_ppm);
const char *cn_policy_name(uint32_t i);
/* cffi:end */

#endif
