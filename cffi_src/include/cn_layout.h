/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The shared-memory format of a pool: what every process that maps it must agree on.
 *
 * Three kinds of object. A *region* is chunk bytes and nothing else. The *catalog* is written by
 * the keeper alone (I1) and mapped read-only by everybody. A *session* belongs to one client and
 * the keeper. No pointer lies in any of them: offsets and indices only, each read once, checked,
 * then used (I4). All integers are little-endian. Structures are naturally aligned and have no
 * padding; reserved bytes are zero.
 *
 *   catalog:  superblock | descriptors | cold records | index | slab table | namespaces
 *             | session registry | event feed            (offsets in the superblock)
 *   session:  header | stock rows | lease table | submission ring | completion ring | access log
 *
 * Authoritative: descriptors, cold records, slab heads, namespaces, registry. Rebuildable: the
 * index. Advisory: counters, events, access logs.
 */
#ifndef CN_LAYOUT_H
#define CN_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
#define CN_LAYOUT_VERSION 2
#define CN_MAGIC 0x31656c6f6f706e63ULL         /* "cnpoole1" */
#define CN_SESSION_MAGIC 0x31737365736e6563ULL /* "censess1" */
#define CN_ENDIAN 0x01020304

#define CN_CACHELINE 64
#define CN_KEY_BYTES 32
#define CN_CHUNK_BYTES_MAX 1073741824ULL
#define CN_META_BYTES_MAX 4096
#define CN_REGIONS_MAX 16
#define CN_SESSIONS_MAX 1024
#define CN_NAMESPACES_MAX 4096
#define CN_MANIFEST_BYTES_MAX 3840
#define CN_NAME_BYTES_MAX 64
#define CN_KEYS_PER_CALL_MAX 65536
#define CN_LEASE_SLOTS_MAX 65536
#define CN_CHUNKS_MAX 67108864
#define CN_STOCK_ROWS 8
#define CN_STOCK_SLOTS 56
#define CN_RING_RECORDS 1024
#define CN_COMPLETIONS 256
#define CN_ACCESS_SLOTS 8192
#define CN_BUCKET_ENTRIES 8
#define CN_POSITION_UNKNOWN 0xffffffff
#define CN_SUPER_BYTES 4096
#define CN_TENANT_NONE 0xffffffffffffffffULL /* a session that opened no namespace yet */

/* Chunk states. FREE is zero, so that fresh memory is a table of free descriptors. */
enum cn_state {
    CN_FREE = 0,
    CN_GRANTED = 1, /* lent to a writer: in its stock, or being filled */
    CN_LIVE = 2,    /* committed: readers may lease it */
    CN_DYING = 3,   /* unlinked; free once no table names it */
    CN_POISONED = 4 /* the medium failed under it; never granted again */
};

/* word flags, bits 0..23 */
enum cn_chunk_flag {
    CN_CF_PINNED = 1,
    CN_CF_UNVERIFIED = 2, /* survived a dirty start: check the CRC before the first use (I9) */
    CN_CF_CRC = 4,        /* crc32c is valid */
    CN_CF_META = 8,       /* caller metadata lies behind the data */
    CN_CF_COPY = 16       /* a peer has the original: evicted before any original */
};

/*
 * One chunk, one cache line. Answers: given a descriptor index, what bytes are these, may I use
 * them?
 *
 *   offset  size  field       written by           ordering
 *        0     8  word        keeper               release; readers acquire, twice (I3)
 *        8    32  key         keeper, before LIVE  relaxed words, published by word
 *       40     8  data_off    keeper, at grant     published by word; offset in the region
 *       48     8  size_crc    keeper, before LIVE  data_bytes:32 (low) | crc32c:32 (high)
 *       56     8  place       keeper, at grant     region:8 (low)|reserved:8|namespace:16|owner:32
 *
 * word = generation:32 (high) | state:8 | flags:24 (low). The generation is never 0 once granted
 * and is bumped when a FREE descriptor is granted (I5). owner is the session index while GRANTED.
 * Authoritative. Valid if and only if state is known and data_off + data_bytes lies in its region.
 */
struct cn_chunk {
    uint64_t word;
    uint64_t key[4];
    uint64_t data_off;
    uint64_t size_crc;
    uint64_t place;
};

/*
 * What the hit path does not need. Written before word becomes LIVE; pins, deadlines and use counts
 * change while it is LIVE, each by one store, and so does parent when the parent was moved: a
 * reference that is not LIVE names a parent that counts as absent.
 */
struct cn_cold {
    uint64_t parent;       /* descriptor:32 (low) | generation:32, 0 = none */
    uint64_t sequence;     /* of the commit; grows over the pool's life */
    uint64_t committed_ns; /* CLOCK_REALTIME */
    uint64_t expires_ns;   /* CLOCK_REALTIME, 0 = never */
    uint64_t pinned_ns;    /* CLOCK_REALTIME until which it is pinned, 0 = not */
    uint32_t position;     /* in its chain, or CN_POSITION_UNKNOWN */
    uint32_t extent_pages; /* of the extent, 4 KiB each */
    uint16_t meta_bytes;   /* opaque caller bytes, at data_bytes rounded up to 64 */
    int8_t priority;
    uint8_t uses;        /* advisory: the policy's use count, for the keeper's successor */
    uint32_t last_use_s; /* advisory: CLOCK_REALTIME seconds */
    uint64_t writer;     /* session nonce of the writer */
};

/*
 * The index answers: which descriptors may hold this key? Entry = tag:32 (high) | descriptor:32
 * (low), 0 = empty; the tag is odd. Three candidate buckets from disjoint bits of the mixed key;
 * entries never move; every change is one 8-byte store. A hint: the descriptor decides (I5).
 */
struct cn_bucket {
    uint64_t entry[CN_BUCKET_ENTRIES];
};

/* One mapped medium. Immutable. */
struct cn_region_info {
    uint64_t bytes;
    uint64_t slabs_first; /* index of its first granule in the slab table */
    uint32_t page_bytes;
    uint16_t medium;      /* enum cn_medium */
    int16_t node;         /* NUMA node, -1 = not bound */
    uint16_t visibility;  /* 0 single-host, 1 coherent, 2 flush */
    uint16_t persistence; /* 0 process, 1 host */
    uint32_t owner;       /* partition owner on shared media, 0 = whole */
    uint64_t reserved[4];
};

enum cn_medium { CN_MEDIUM_SHM = 1, CN_MEDIUM_MEMFD = 2, CN_MEDIUM_FILE = 3, CN_MEDIUM_DEVDAX = 4 };

enum cn_pool_state { CN_POOL_SERVING = 1, CN_POOL_RETIRED = 2 };

/* Written by the keeper alone; a reader sees each word whole, not the set of them. */
struct cn_counters {
    uint64_t commits;
    uint64_t duplicates; /* commits of a key that was there */
    uint64_t evictions;
    uint64_t deletions;
    uint64_t expirations;
    uint64_t aborts;
    uint64_t refused;     /* records dropped: quota, index full, not allowed to this session */
    uint64_t bad_records; /* ring records that made no sense (I4) */
    uint64_t grants;
    uint64_t grants_failed;
    uint64_t moves; /* chunks moved to empty a slab */
    uint64_t live_chunks;
    uint64_t live_bytes;    /* extents of LIVE chunks */
    uint64_t granted_bytes; /* extents of GRANTED descriptors */
    uint64_t limbo_chunks;  /* DYING and still leased */
    uint64_t pinned_chunks;
    uint64_t hits; /* folded in from the sessions */
    uint64_t misses;
    uint64_t hit_bytes; /* of the hits whose log entries were read in time */
    uint64_t sessions;
    uint64_t sessions_opened;
    uint64_t sessions_died; /* ended with their process, not by close */
    uint64_t namespaces;
    uint64_t verified;     /* checksums made or checked in the background */
    uint64_t lost;         /* chunks dropped for a bad checksum or a failed medium */
    uint64_t extent_bytes; /* in slabs, allocated */
    uint64_t free_bytes;   /* granules and extents not allocated */
    uint64_t waste_bytes;  /* slab tails */
    uint64_t access_lost;  /* access log entries overwritten before they were read */
    uint64_t wakeups;      /* keeper sleeps ended */
    uint64_t reserved[2];
};

/*
 * Superblock. Bytes 0..2047 are immutable, bytes 2040..2043 their CRC-32C (over 0..2039).
 * A client checks magic, version, fingerprint, endianness and CRC before it looks at anything else.
 */
struct cn_super {
    uint64_t magic;
    uint32_t layout_version;
    uint32_t endian;
    uint64_t abi_fingerprint;
    uint8_t pool_id[16];
    uint64_t created_ns;
    uint64_t catalog_bytes;
    uint64_t hash_seed[2];
    uint64_t capacity_bytes; /* of all regions */
    uint32_t chunk_count;
    uint32_t bucket_count; /* a power of two */
    uint32_t region_count;
    uint32_t session_count;
    uint32_t namespace_count;
    uint32_t event_count; /* a power of two */
    uint32_t lease_slots;
    uint32_t session_bytes;
    uint64_t chunks_off;
    uint64_t cold_off;
    uint64_t index_off;
    uint64_t slabs_off;
    uint64_t namespaces_off;
    uint64_t registry_off;
    uint64_t events_off;
    char pool_name[32];
    uint64_t reserved0[15];
    struct cn_region_info regions[CN_REGIONS_MAX];
    uint64_t reserved1[87];
    uint32_t immutable_crc32c; /* offset 2040 */
    uint32_t reserved2;

    uint64_t pool_state;  /* offset 2048: its own line, read on every hit */
    uint64_t boot_token;  /* of the keeper in office; tells clients to reconnect */
    uint64_t index_third; /* entries ever put into a third bucket; 0: two are enough */
    uint64_t reserved3[5];

    uint64_t sleeping; /* offset 2112: its own line, it flips */
    uint64_t reserved4[7];

    uint64_t keeper_pid;      /* offset 2176 */
    uint64_t keeper_start_ns; /* process start, CLOCK_BOOTTIME based */
    uint8_t boot_id[16];      /* of the kernel */
    uint64_t clean;           /* 1 only between a clean stop and the next start */
    uint64_t sequence;        /* last commit sequence */
    uint64_t reserved5[2];

    uint64_t dirty_starts_ns[4]; /* offset 2240: the last ones, for the crash-loop rule */
    uint64_t region_verdict[4];  /* of `cenote qualify` */

    uint64_t event_head; /* offset 2304: sequence of the next event; its own line */
    uint64_t reserved6[7];

    struct cn_counters counters; /* offset 2368 */
    uint64_t reserved7[184];
};

/* A namespace: one identity, one tenant (I8). Slot 0 is never used. */
struct cn_namespace {
    uint64_t word;        /* 0 = free, 1 = in use; stored last */
    uint8_t id[32];       /* SHA-256 over the canonical manifest and the tenant's salt */
    uint64_t tenant;      /* tag of the salt, 0 = none */
    uint64_t quota_bytes; /* 0 = none */
    uint64_t live_bytes;
    uint64_t live_chunks;
    uint64_t evictions;
    uint64_t created_ns;
    uint64_t reserved[13];
    uint32_t manifest_bytes;
    uint32_t reserved1;
    char name[CN_NAME_BYTES_MAX - 8];
    uint8_t manifest[CN_MANIFEST_BYTES_MAX];
};

enum cn_role { CN_ROLE_READER = 1, CN_ROLE_WRITER = 2, CN_ROLE_ADMIN = 3 };
enum cn_session_state {
    CN_SESSION_FREE = 0,
    CN_SESSION_OPEN = 1,
    CN_SESSION_DYING = 2,
    CN_SESSION_OPENING = 3 /* not in custody yet, so its descriptor went to nobody */
};

/* Who is attached. Fields first, word last. */
struct cn_session_entry {
    uint64_t word; /* state:8 (low) | role:8 | reserved */
    uint64_t nonce;
    uint64_t attached_ns; /* CLOCK_REALTIME */
    uint64_t start_ns;    /* of the process, as the daemon read it */
    uint32_t pid;         /* as the daemon sees it, 0 = in another pid namespace */
    uint32_t uid;
    uint32_t gid;
    uint32_t reserved0;
    uint64_t leases; /* at the keeper's last look */
    uint64_t leased_bytes;
    uint64_t granted_bytes;
    uint64_t lease_limit_bytes;
    char label[40];  /* of the client's choosing, for people */
    uint64_t tenant; /* it may commit to namespaces of this tenant, or CN_TENANT_NONE */
};

enum cn_event_kind {
    CN_EVENT_STORED = 1,
    CN_EVENT_EVICTED = 2,
    CN_EVENT_DELETED = 3,
    CN_EVENT_CLEARED = 4 /* everything went at once */
};

enum cn_event_reason {
    CN_BY_NONE = 0,
    CN_BY_POLICY = 1, /* the pool was at its high-water mark */
    CN_BY_QUOTA = 2,  /* its namespace was at its quota */
    CN_BY_TTL = 3,
    CN_BY_CLIENT = 4,
    CN_BY_LOSS = 5,    /* bad checksum or failed medium */
    CN_BY_RECLAIM = 6, /* its slab went to another size */
    CN_BY_ADMIN = 7
};

/*
 * The feed answers: what happened to this key? A ring; event n lies in slot n % event_count and is
 * valid if and only if its sequence is n before and after it was copied. A follower that finds a
 * larger one has a gap and says so.
 */
struct cn_event {
    uint64_t sequence; /* stored last; starts at 1 */
    uint64_t time_ns;  /* CLOCK_REALTIME */
    uint64_t key[4];
    uint64_t what;  /* kind:8 (low) | reason:8 | namespace:16 | data_bytes:32 */
    uint64_t chunk; /* descriptor:32 (low) | generation:32 */
};

/* Session header: one page. */
struct cn_session_head {
    /* line 0: written once by the daemon; a client copies and checks */
    uint64_t magic;
    uint32_t layout_version;
    uint32_t session_idx;
    uint64_t nonce;
    uint32_t lease_slots;
    uint32_t role;
    uint64_t lease_limit_bytes;
    uint64_t reserved0[3];

    uint64_t lease_high; /* line 1: client. Slots at and above it are empty */
    uint64_t reserved1[7];

    uint64_t sub_tail; /* line 2: client */
    uint64_t access_tail;
    uint64_t comp_head;
    uint64_t waiters; /* threads asleep on wake_seq */
    uint64_t follows; /* 1: wake me for events */
    uint64_t reserved2[3];

    uint64_t sub_head; /* line 3: keeper; output only, never read back by it */
    uint64_t comp_tail;
    uint32_t wake_seq; /* futex */
    uint32_t reserved3;
    uint64_t want_failed; /* WANTs answered with nothing */
    uint64_t reserved4[4];

    uint64_t batches; /* line 4: client. Hits = access_tail - batches */
    uint64_t misses;
    uint64_t reserved4a;
    uint64_t lease_refused; /* table or byte limit reached: answered as a miss */
    uint64_t reserved5[4];

    uint64_t reserved6[472];
};

/* Granted extents of one size, ready to be filled. Both sides take a slot by compare-and-swap. */
struct cn_stock_row {
    uint64_t extent_bytes; /* 0 = unused row */
    uint64_t reserved[7];
    uint64_t slot[CN_STOCK_SLOTS]; /* descriptor:32 (low) | generation:32, 0 = empty */
};

enum cn_op {
    CN_OP_COMMIT = 1,
    CN_OP_ABORT = 2, /* give a grant back */
    CN_OP_WANT = 3,  /* arg: extent bytes; data_bytes: how many */
    CN_OP_PIN = 4,   /* arg: CLOCK_REALTIME ns until which */
    CN_OP_UNPIN = 5,
    CN_OP_DELETE = 6,
    CN_OP_CRC = 7,  /* daemon's scrubber only: the CRC of (grant) is crc32c */
    CN_OP_LOST = 8, /* daemon's scrubber only: (grant) does not match its CRC */
    CN_OP_NOP = 9   /* answers with a completion: everything before it was done */
};

enum cn_record_flag { CN_RF_CRC = 1, CN_RF_PARENT = 2, CN_RF_COPY = 4 };

/* Submission record. */
struct cn_record {
    uint8_t op;
    uint8_t flags;
    int8_t priority;
    uint8_t reserved0;
    uint16_t ns_slot;
    uint16_t meta_bytes;
    uint64_t grant; /* descriptor:32 (low) | generation:32 */
    uint64_t key[4];
    uint64_t parent_key[4];
    uint32_t data_bytes;
    uint32_t crc32c;
    uint32_t position;
    uint32_t ttl_s;
    uint64_t cookie; /* not 0: answer with a completion that carries it */
    uint64_t arg;
    uint64_t reserved[2];
};

/* Completion record. The keeper writes at most as many as there is room for, and never waits. */
struct cn_completion {
    uint64_t cookie;
    int32_t status;
    uint32_t op;
    uint64_t value;
    uint64_t reserved[5];
};
/* cffi:end */

/* How often an access log is read that nothing else makes the keeper read, at most. */
#define CN_ACCESS_READ_NS 10000000u

#define CN_SIZE(type, bytes) _Static_assert(sizeof(struct type) == (bytes), "ABI: " #type)
#define CN_AT(type, field, off)                                                                    \
    _Static_assert(offsetof(struct type, field) == (off), "ABI: " #type "." #field)

CN_SIZE(cn_chunk, 64);
CN_AT(cn_chunk, key, 8);
CN_AT(cn_chunk, data_off, 40);
CN_AT(cn_chunk, size_crc, 48);
CN_AT(cn_chunk, place, 56);
CN_SIZE(cn_cold, 64);
CN_SIZE(cn_bucket, CN_CACHELINE);
CN_SIZE(cn_region_info, 64);
CN_SIZE(cn_counters, 256);
CN_SIZE(cn_super, CN_SUPER_BYTES);
CN_AT(cn_super, regions, 320);
CN_AT(cn_super, immutable_crc32c, 2040);
CN_AT(cn_super, pool_state, 2048);
CN_AT(cn_super, sleeping, 2112);
CN_AT(cn_super, keeper_pid, 2176);
CN_AT(cn_super, dirty_starts_ns, 2240);
CN_AT(cn_super, event_head, 2304);
CN_AT(cn_super, counters, 2368);
CN_SIZE(cn_namespace, 4096);
CN_AT(cn_namespace, manifest, 256);
CN_SIZE(cn_session_entry, 128);
CN_SIZE(cn_event, 64);
CN_SIZE(cn_session_head, 4096);
CN_AT(cn_session_head, lease_high, 64);
CN_AT(cn_session_head, sub_tail, 128);
CN_AT(cn_session_head, sub_head, 192);
CN_AT(cn_session_head, wake_seq, 208);
CN_AT(cn_session_head, batches, 256);
CN_SIZE(cn_stock_row, 512);
CN_SIZE(cn_record, 128);
CN_AT(cn_record, key, 16);
CN_AT(cn_record, cookie, 96);
CN_SIZE(cn_completion, 64);

/* Words and their parts. */
static inline uint64_t cn_word(uint32_t gen, uint32_t state, uint32_t flags)
{
    return (uint64_t)gen << 32 | (uint64_t)state << 24 | (flags & 0xffffffu);
}
static inline uint32_t cn_word_gen(uint64_t word) { return (uint32_t)(word >> 32); }
static inline uint32_t cn_word_state(uint64_t word) { return (uint32_t)(word >> 24) & 0xffu; }
static inline uint32_t cn_word_flags(uint64_t word) { return (uint32_t)word & 0xffffffu; }

/* A reference: lease word, grant, token, parent. Never 0, because generations begin at 1. */
static inline uint64_t cn_ref(uint32_t d, uint32_t gen) { return (uint64_t)gen << 32 | d; }
static inline uint32_t cn_ref_d(uint64_t ref) { return (uint32_t)ref; }
static inline uint32_t cn_ref_gen(uint64_t ref) { return (uint32_t)(ref >> 32); }

static inline uint64_t cn_place(uint32_t region, uint32_t ns, uint32_t owner)
{
    return (uint64_t)owner << 32 | (uint64_t)(ns & 0xffffu) << 16 | (region & 0xffu);
}
static inline uint32_t cn_place_region(uint64_t place) { return (uint32_t)place & 0xffu; }
static inline uint32_t cn_place_ns(uint64_t place) { return (uint32_t)(place >> 16) & 0xffffu; }
static inline uint32_t cn_place_owner(uint64_t place) { return (uint32_t)(place >> 32); }

/* Offsets inside a session segment, from the number of lease slots. */
static inline uint64_t cn_session_stock_off(void) { return sizeof(struct cn_session_head); }
static inline uint64_t cn_session_leases_off(void)
{
    return cn_session_stock_off() + CN_STOCK_ROWS * sizeof(struct cn_stock_row);
}
static inline uint64_t cn_session_sub_off(uint32_t lease_slots)
{
    return cn_session_leases_off() + ((uint64_t)lease_slots * 8 + 4095) / 4096 * 4096;
}
static inline uint64_t cn_session_comp_off(uint32_t lease_slots)
{
    return cn_session_sub_off(lease_slots) + CN_RING_RECORDS * sizeof(struct cn_record);
}
static inline uint64_t cn_session_access_off(uint32_t lease_slots)
{
    return cn_session_comp_off(lease_slots) + CN_COMPLETIONS * sizeof(struct cn_completion);
}
static inline uint64_t cn_session_bytes(uint32_t lease_slots)
{
    return cn_session_access_off(lease_slots) + CN_ACCESS_SLOTS * 8ULL;
}

#endif
