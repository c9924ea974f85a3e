/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Leases: how a reader holds bytes without telling anybody.
 *
 *   reader: store (d, g) in my table; full fence; load d's word and the pool's state again
 *   keeper: store (g, DYING); clear the index; full fence; load all tables
 *
 * Each side stores before it loads what the other stores, with a full fence between, so at least
 * one of them sees the other (store buffering): the reader lets go, or the keeper waits (I3).
 */
#include "cn_client.h"

#define HOT_PROBES 4u /* claims tried before the free list is asked */
#define BATCH 256u    /* keys looked up together, for the prefetches to overlap */

/* The hit path calls nothing that returns to it and saves no registers; what is rare is jumped
 * to. */
#define HOT static inline __attribute__((always_inline))
#define COLD static __attribute__((noinline))
#define LIKELY(condition) __builtin_expect(!!(condition), 1)

/* ---- one lease ------------------------------------------------------------ */

static void publish(struct cn_client *c, uint32_t slot, uint64_t ref)
{
    /* The keeper scans to this mark (I3): of two threads that raise it neither may lower it. */
    uint64_t high = cn_load_relaxed(&c->head->lease_high);
    while (slot >= high && !cn_cas(&c->head->lease_high, &high, (uint64_t)slot + 1))
        ;
    cn_store_relaxed(&c->leases[slot], ref);
}

/* After the fence: is the chunk that ref names still there for us? */
HOT bool valid(const struct cn_client *c, uint64_t ref, uint64_t *ret_word)
{
    /* pairs with the keeper's store of DYING before its fence */
    uint64_t word = cn_load_acquire(&c->catalog.chunks[cn_ref_d(ref)].word);
    *ret_word = word;
    uint64_t differs = word ^ cn_word(cn_ref_gen(ref), CN_LIVE, 0);
    return LIKELY(differs <= cn_word(0, 0, UINT32_MAX)) && /* in flags at most */
           LIKELY(cn_load_relaxed(&c->catalog.super->pool_state) == CN_POOL_SERVING);
}

HOT void clear_slot(struct cn_client *c, uint32_t slot)
{
    /* Release: every read of the bytes comes before it. Pairs with the keeper's acquire scan. */
    cn_store_release(&c->leases[slot], 0);
}

/* Bounds of the bytes; the descriptor is leased, so its fields do not change (I2). */
HOT int fill_view(struct cn_client *c, uint64_t ref, uint64_t word, uint32_t slot,
                  struct cn_view *ret_view)
{
    const struct cn_chunk *chunk = &c->catalog.chunks[cn_ref_d(ref)];
    uint64_t off = cn_load_relaxed(&chunk->data_off);
    uint64_t bytes = (uint32_t)cn_load_relaxed(&chunk->size_crc);
    uint32_t region = cn_place_region(cn_load_relaxed(&chunk->place));
    if (region >= c->region_count || off > c->ro[region].bytes || bytes > c->ro[region].bytes - off)
        return CN_ECORRUPT;
    *ret_view = (struct cn_view){
        .data = c->ro[region].base + off,
        .bytes = bytes,
        .ref = ref,
        .slot = slot,
        .flags = cn_word_flags(word),
    };
    return CN_OK;
}

/*
 * Leased bytes are limited, so that one reader cannot pin the pool. The running sum is not atomic:
 * under Python's GIL it is exact, beside threads without it a lost update costs accuracy, where a
 * locked add would cost every hit 5 ns. When it says "too much", the slots are counted exactly.
 */
static bool bytes_allowed(struct cn_client *c, uint64_t more)
{
    if (!c->limited || cn_load_relaxed(&c->leased_bytes) + more <= c->lease_limit_bytes)
        return true;
    uint64_t exact = 0;
    uint64_t high = cn_load_relaxed(&c->head->lease_high);
    for (uint32_t slot = 0; slot < high && slot < c->lease_slots; slot++)
        if (cn_load_relaxed(&c->leases[slot]) != 0)
            exact += cn_load_relaxed(&c->slot_bytes[slot]);
    cn_store_relaxed(&c->leased_bytes, exact);
    return exact + more <= c->lease_limit_bytes;
}

static void count_leased(struct cn_client *c, const struct cn_view *view)
{
    if (!c->limited)
        return;
    cn_store_relaxed(&c->slot_bytes[view->slot], view->bytes);
    cn_store_relaxed(&c->leased_bytes, cn_load_relaxed(&c->leased_bytes) + view->bytes);
}

static void count_unleased(struct cn_client *c, uint64_t bytes)
{
    uint64_t sum = cn_load_relaxed(&c->leased_bytes);
    cn_store_relaxed(&c->leased_bytes, sum > bytes ? sum - bytes : 0);
}

static void count(uint64_t *counter, uint64_t by)
{
    cn_store_relaxed(counter, cn_load_relaxed(counter) + by);
}

/*
 * Recency for the keeper: our own ring, read before the next eviction; full means overwritten. Its
 * tail also counts the hits, so that a hit needs no counter of its own.
 */
HOT bool log_entry(struct cn_client *c, uint64_t ref)
{
    uint64_t tail = cn_load_relaxed(&c->access_tail);
    cn_store_relaxed(&c->access_log[tail % CN_ACCESS_SLOTS], ref);
    cn_store_relaxed(&c->access_tail, ++tail);
    cn_store_release(&c->head->access_tail, tail);
    return LIKELY(tail % (CN_ACCESS_SLOTS / 2) != 0);
}

/*
 * Once in 4,096 hits, so that a pure reader's recency is not lost, and at most once in
 * CN_ACCESS_READ_NS, so that a fast one does not keep the keeper busy: of that one it reads a
 * sample.
 */
COLD int log_doorbell(struct cn_client *c)
{
    uint64_t now_ns = cn_now_ns();
    if (now_ns - cn_load_relaxed(&c->log_rung_ns) >= CN_ACCESS_READ_NS) {
        cn_store_relaxed(&c->log_rung_ns, now_ns);
        cn_ring_doorbell(c);
    }
    return CN_OK;
}

static void log_access(struct cn_client *c, uint64_t ref)
{
    if (!log_entry(c, ref))
        log_doorbell(c);
}

COLD int refuse(struct cn_client *c)
{
    count(&c->head->lease_refused, 1);
    count(&c->head->misses, 1);
    return CN_ELEASES;
}
COLD int miss(struct cn_client *c)
{
    count(&c->head->misses, 1);
    return CN_EMISS;
}

/* Claim, publish and fence in one. The hint goes to the next slot, and back at a release. */
HOT bool claim_hot(struct cn_client *c, uint32_t slot, uint64_t ref)
{
    if (cn_load_relaxed(&c->leases[slot]) != 0 || !cn_claim_fenced(&c->leases[slot], ref))
        return false;
    cn_store32_relaxed(&c->hot_hint, (slot + 1) & (c->hot_slots - 1));
    return true;
}

/* CN_SLOT_NONE when the slots looked at are busy. */
static uint32_t publish_hot(struct cn_client *c, uint64_t ref, uint32_t probes)
{
    uint32_t hint = cn_load32_relaxed(&c->hot_hint);
    for (uint32_t i = 0; i < probes; i++) {
        uint32_t slot = (hint + i) & (c->hot_slots - 1);
        if (claim_hot(c, slot, ref))
            return slot;
    }
    return CN_SLOT_NONE;
}

static uint32_t publish_one(struct cn_client *c, uint64_t ref)
{
    uint32_t slot = publish_hot(c, ref, HOT_PROBES);
    if (__builtin_expect(slot != CN_SLOT_NONE, 1))
        return slot;
    if (cn_slots_take(c, 1, &slot) == 0)
        return publish_hot(c, ref, c->hot_slots);
    publish(c, slot, ref);
    cn_fence_reader(); /* pairs with cn_fence_keeper() in cn_unlink_flush() */
    return slot;
}

/* Cleared once, by its holder (I3). */
static void give_back(struct cn_client *c, uint32_t slot)
{
    clear_slot(c, slot);
    if (slot < c->hot_slots)
        cn_store32_relaxed(&c->hot_hint, slot);
    else
        cn_slots_put(c, &slot, 1);
}

COLD int let_go(struct cn_client *c, uint32_t slot, int status)
{
    give_back(c, slot);
    return status == CN_EMISS ? miss(c) : status;
}

/* Publish-fence-validate one reference that was seen LIVE a moment ago. */
COLD int take(struct cn_client *c, uint64_t ref, struct cn_view *ret_view)
{
    uint64_t bytes = (uint32_t)cn_load_relaxed(&c->catalog.chunks[cn_ref_d(ref)].size_crc);
    if (!bytes_allowed(c, bytes))
        return refuse(c);
    uint32_t slot = publish_one(c, ref);
    if (slot == CN_SLOT_NONE)
        return refuse(c);
    uint64_t word;
    int status = CN_EMISS;
    if (valid(c, ref, &word))
        status = fill_view(c, ref, word, slot, ret_view);
    if (status != CN_OK)
        return let_go(c, slot, status);
    count_leased(c, ret_view);
    log_access(c, ref);
    return CN_OK;
}

/* The same where nothing is in the way: no byte limit, and the slot last released is free. */
HOT int take_hot(struct cn_client *c, uint64_t ref, struct cn_view *ret_view)
{
    uint32_t slot = cn_load32_relaxed(&c->hot_hint);
    if (!LIKELY(!c->limited && claim_hot(c, slot, ref)))
        return take(c, ref, ret_view);
    uint64_t word;
    if (!LIKELY(valid(c, ref, &word)))
        return let_go(c, slot, CN_EMISS);
    if (!LIKELY(fill_view(c, ref, word, slot, ret_view) == CN_OK))
        return let_go(c, slot, CN_ECORRUPT);
    return LIKELY(log_entry(c, ref)) ? CN_OK : log_doorbell(c);
}

/* The second and third bucket: 0.7 % of the chunks, and every miss. */
COLD int lease_rest(struct cn_client *c, uint32_t ns_slot, const uint8_t *key_bytes,
                    struct cn_view *ret_view)
{
    struct cn_key key = cn_key_of(key_bytes);
    struct cn_hash h = cn_hash_key(c->catalog.hash_seed, ns_slot, &key);
    uint32_t d;
    uint64_t word;
    if (!cn_index_find_rest(&c->catalog, h, ns_slot, &key, &d, &word))
        return miss(c);
    return take(c, cn_ref(d, cn_word_gen(word)), ret_view);
}

int cn_lease(struct cn_client *c, uint32_t ns_slot, const uint8_t *key_bytes,
             struct cn_view *ret_view)
{
    int status = cn_usable(c);
    if (!LIKELY(status == CN_OK))
        return status;
    const struct cn_key *key = (const struct cn_key *)key_bytes;
    struct cn_hash h = cn_hash_key(c->catalog.hash_seed, ns_slot, key);
    const struct cn_bucket *bucket = &c->catalog.index[cn_hash_bucket(&c->catalog, h, 0)];
    uint32_t d;
    uint64_t word;
    if (!LIKELY(cn_bucket_find(&c->catalog, bucket, cn_hash_tag(h), ns_slot, key, &d, &word)))
        return lease_rest(c, ns_slot, key_bytes, ret_view);
    return take_hot(c, cn_ref(d, cn_word_gen(word)), ret_view);
}

int cn_lease_ref(struct cn_client *c, uint64_t ref, uint64_t key_head, struct cn_view *ret_view)
{
    int status = cn_usable(c);
    if (status != CN_OK)
        return status;
    /* Looked at before it is published: a dead token must not occupy the keeper's scans (1.7). */
    uint32_t d = cn_ref_d(ref);
    uint64_t word;
    if (d >= c->catalog.chunk_count || !valid(c, ref, &word) ||
        cn_load_relaxed(&c->catalog.chunks[d].key[0]) != key_head)
        return miss(c);
    return take(c, ref, ret_view);
}

COLD void release_any(struct cn_client *c, uint32_t slot)
{
    if (slot >= c->lease_slots)
        return;
    if (c->limited)
        count_unleased(c, cn_load_relaxed(&c->slot_bytes[slot]));
    give_back(c, slot);
}

void cn_release(struct cn_client *c, uint32_t slot)
{
    if (!LIKELY(!cn_is_forked(c)))
        return;
    if (!LIKELY(slot < c->hot_slots && !c->limited)) {
        release_any(c, slot);
        return;
    }
    clear_slot(c, slot);
    cn_store32_relaxed(&c->hot_hint, slot);
}

void cn_release_many(struct cn_client *c, const struct cn_view *views, uint32_t view_count)
{
    if (cn_is_forked(c))
        return;
    for (uint32_t done = 0; done < view_count;) {
        uint32_t slots[BATCH];
        uint32_t n = 0;
        uint64_t bytes = 0;
        for (; n < BATCH && done < view_count; done++) {
            uint32_t slot = views[done].slot;
            bytes += c->limited ? cn_load_relaxed(&c->slot_bytes[slot]) : 0;
            clear_slot(c, slot);
            if (slot >= c->hot_slots)
                slots[n++] = slot;
        }
        count_unleased(c, bytes);
        cn_slots_put(c, slots, n);
    }
}

/* ---- batches -------------------------------------------------------------- */

struct batch {
    struct cn_key key[BATCH];
    struct cn_hash hash[BATCH];
    uint64_t ref[BATCH];
};

/* Hash all, prefetch buckets, then prefetch the descriptors that the tags suggest. */
static void batch_prefetch(const struct cn_client *c, uint32_t ns, const uint8_t *keys, uint32_t n,
                           struct batch *b)
{
    const struct cn_catalog *cat = &c->catalog;
    for (uint32_t i = 0; i < n; i++) {
        b->key[i] = cn_key_of(keys + (size_t)i * CN_KEY_BYTES);
        b->hash[i] = cn_hash_key(cat->hash_seed, ns, &b->key[i]);
        __builtin_prefetch(&cat->index[cn_hash_bucket(cat, b->hash[i], 0)]);
    }
    for (uint32_t i = 0; i < n; i++) {
        const struct cn_bucket *bucket = &cat->index[cn_hash_bucket(cat, b->hash[i], 0)];
        uint32_t tag = cn_hash_tag(b->hash[i]);
        for (uint32_t e = 0; e < CN_BUCKET_ENTRIES; e++) {
            uint64_t entry = cn_load_relaxed(&bucket->entry[e]);
            uint32_t d = (uint32_t)entry;
            if ((uint32_t)(entry >> 32) == tag && d < cat->chunk_count)
                __builtin_prefetch(&cat->chunks[d]);
        }
    }
}

/* How many of the n keys, from the first on, are there; their references in b->ref. */
static uint32_t batch_find(const struct cn_client *c, uint32_t ns, uint32_t n, struct batch *b)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t d;
        uint64_t word;
        if (!cn_index_find(&c->catalog, b->hash[i], ns, &b->key[i], &d, &word))
            return i;
        b->ref[i] = cn_ref(d, cn_word_gen(word));
    }
    return n;
}

/* A hint only, so the words need not be looked at twice: a key reused between word and key compare
 * would be a wrong yes. Compare word again after the keys (seqlock reader). */
static uint32_t batch_confirm(const struct cn_client *c, const struct batch *b, uint32_t n)
{
    cn_fence_acquire();
    for (uint32_t i = 0; i < n; i++) {
        uint64_t word = cn_load_relaxed(&c->catalog.chunks[cn_ref_d(b->ref[i])].word);
        if (cn_word_gen(word) != cn_ref_gen(b->ref[i]) || cn_word_state(word) != CN_LIVE)
            return i;
    }
    return n;
}

int cn_match(struct cn_client *c, uint32_t ns_slot, const uint8_t *keys, uint32_t key_count,
             uint32_t *ret_count)
{
    int status = cn_usable(c);
    if (status != CN_OK)
        return status;
    if (key_count > CN_KEYS_PER_CALL_MAX)
        return CN_ELIMIT;
    uint32_t done = 0;
    struct batch b;
    bool serving = cn_load_relaxed(&c->catalog.super->pool_state) == CN_POOL_SERVING;
    while (serving && done < key_count) {
        uint32_t n = key_count - done < BATCH ? key_count - done : BATCH;
        batch_prefetch(c, ns_slot, keys + (size_t)done * CN_KEY_BYTES, n, &b);
        uint32_t found = batch_confirm(c, &b, batch_find(c, ns_slot, n, &b));
        done += found;
        if (found < n)
            break;
    }
    *ret_count = done;
    return CN_OK;
}

/* How many of the n found chunks the byte limit lets us hold. */
static uint32_t batch_allowed(struct cn_client *c, const struct batch *b, uint32_t n)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < n; i++)
        bytes += (uint32_t)cn_load_relaxed(&c->catalog.chunks[cn_ref_d(b->ref[i])].size_crc);
    while (n > 0 && !bytes_allowed(c, bytes))
        bytes -= (uint32_t)cn_load_relaxed(&c->catalog.chunks[cn_ref_d(b->ref[--n])].size_crc);
    return n;
}

/* Publish all, one fence, validate all; the views up to the first that did not hold. */
static uint32_t batch_take(struct cn_client *c, const struct batch *b, uint32_t n,
                           struct cn_view *ret_views)
{
    uint32_t slots[BATCH];
    uint32_t got = cn_slots_take(c, n, slots);
    for (uint32_t i = 0; i < got; i++)
        publish(c, slots[i], b->ref[i]);
    while (got < n && (slots[got] = publish_hot(c, b->ref[got], c->hot_slots)) != CN_SLOT_NONE)
        got++;         /* the list is empty: what is left are the slots of single leases */
    cn_fence_reader(); /* pairs with cn_fence_keeper() in cn_unlink_flush() */
    uint32_t good = 0;
    uint64_t word;
    while (good < got && valid(c, b->ref[good], &word) &&
           fill_view(c, b->ref[good], word, slots[good], &ret_views[good]) == CN_OK)
        count_leased(c, &ret_views[good++]);
    for (uint32_t i = good; i < got; i++)
        give_back(c, slots[i]);
    if (got < n)
        count(&c->head->lease_refused, n - got);
    for (uint32_t i = 0; i < good; i++)
        log_access(c, b->ref[i]);
    return good;
}

int cn_lease_many(struct cn_client *c, uint32_t ns_slot, const uint8_t *keys, uint32_t key_count,
                  struct cn_view *ret_views, uint32_t *ret_count)
{
    int status = cn_usable(c);
    if (status != CN_OK)
        return status;
    if (key_count > CN_KEYS_PER_CALL_MAX)
        return CN_ELIMIT;
    uint32_t done = 0;
    struct batch b;
    log_access(c, 0); /* a chain begins here */
    count(&c->head->batches, 1);
    while (done < key_count) {
        uint32_t n = key_count - done < BATCH ? key_count - done : BATCH;
        batch_prefetch(c, ns_slot, keys + (size_t)done * CN_KEY_BYTES, n, &b);
        uint32_t present = batch_find(c, ns_slot, n, &b);
        uint32_t found = batch_allowed(c, &b, present);
        count(&c->head->lease_refused, present - found);
        uint32_t good = batch_take(c, &b, found, ret_views + done);
        done += good;
        if (good < n)
            break;
    }
    if (done < key_count)
        count(&c->head->misses, 1);
    *ret_count = done;
    return CN_OK;
}
