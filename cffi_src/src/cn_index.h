/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index answers: which descriptors may hold this key? See cn_layout.h for its format.
 *
 * A hint. No entry ever moves and every change is one store, so a reader scans at most three
 * buckets whatever the keeper does meanwhile, and a keeper that dies anywhere leaves a valid index.
 */
#ifndef CN_INDEX_H
#define CN_INDEX_H

#include <string.h>

#include "cn_atomic.h"
#include "cn_layout.h"
#include "cn_status.h"

/* The explorer and TSan must see every load of an entry by itself. */
#if defined(__SSE2__) && !defined(CN_MODEL_CHECK) && !defined(CN_TSAN)
#define CN_INDEX_SSE2 1
#include <emmintrin.h>
#endif

/* The catalog as mapped, checked once: all later accesses are bounded by these numbers. */
struct cn_catalog {
    struct cn_super *super;
    struct cn_chunk *chunks;
    struct cn_cold *cold;
    struct cn_bucket *index;
    uint64_t *slabs;
    struct cn_namespace *namespaces;
    struct cn_session_entry *registry;
    struct cn_event *events;
    uint64_t hash_seed[2];
    uint32_t chunk_count;
    uint32_t bucket_mask;
    uint32_t event_mask;
    uint32_t lease_slots;
};

/* CN_OK, CN_EVERSION or CN_ECORRUPT. Nothing in *ret_catalog is used before the check is
 * through. */
int cn_catalog_open(void *catalog, uint64_t catalog_bytes, struct cn_catalog *ret_catalog);

/* As a caller has it: at any address. */
typedef uint64_t cn_key_word __attribute__((aligned(1), may_alias));

struct cn_key {
    cn_key_word word[4];
};

struct cn_hash {
    uint64_t h1;   /* tag from the high half, first bucket from the low half */
    uint64_t rest; /* what second and third bucket are mixed from, when needed */
};

static inline struct cn_key cn_key_of(const uint8_t *bytes)
{
    struct cn_key key;
    memcpy(&key, bytes, sizeof(key));
    return key;
}

static inline uint64_t cn_fold(uint64_t a, uint64_t b)
{
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Keys are chosen by clients: mixed with a seed of the pool, and with the namespace (I8). The
 * multiply-and-fold mixer is that of wyhash (Wang Yi, public domain). */
static inline struct cn_hash cn_hash_key(const uint64_t seed[2], uint32_t ns,
                                         const struct cn_key *key)
{
    uint64_t a = cn_fold(key->word[0] ^ seed[0], key->word[1] ^ 0xa0761d6478bd642fULL);
    uint64_t b = cn_fold(key->word[2] ^ seed[1], key->word[3] ^ ns ^ 0xe7037ed1a0b428dbULL);
    struct cn_hash h;
    h.h1 = cn_fold(a ^ 0x8ebc6af09c88c6e3ULL, b ^ 0x589965cc75374cc3ULL);
    h.rest = a + b + 0x1d8e4e27c47d124fULL;
    return h;
}

static inline uint32_t cn_hash_tag(struct cn_hash h) { return (uint32_t)(h.h1 >> 32) | 1u; }
static inline uint32_t cn_hash_bucket(const struct cn_catalog *c, struct cn_hash h, uint32_t which)
{
    if (which == 0)
        return (uint32_t)h.h1 & c->bucket_mask;
    uint64_t h2 = cn_fold(h.h1 ^ c->hash_seed[1], h.rest);
    return (uint32_t)(which == 1 ? h2 : h2 >> 32) & c->bucket_mask;
}

static inline bool cn_chunk_is(const struct cn_chunk *chunk, uint32_t ns, const struct cn_key *key)
{
    /* Races with reuse by design: the caller checks word again (I3). */
    uint64_t diff = cn_place_ns(cn_load_relaxed(&chunk->place)) ^ ns;
#ifdef CN_INDEX_SSE2
    const __m128i *stored = (const __m128i *)chunk->key;
    const __m128i *wanted = (const __m128i *)key->word;
    __m128i low = _mm_cmpeq_epi8(_mm_loadu_si128(stored), _mm_loadu_si128(wanted));
    __m128i high = _mm_cmpeq_epi8(_mm_loadu_si128(stored + 1), _mm_loadu_si128(wanted + 1));
    return ((uint32_t)_mm_movemask_epi8(_mm_and_si128(low, high)) ^ 0xffffu) == 0 && diff == 0;
#else
    for (uint32_t i = 0; i < 4; i++)
        diff |= cn_load_relaxed(&chunk->key[i]) ^ key->word[i];
    return diff == 0;
#endif
}

/* A bit for each entry of the bucket that carries this tag. */
static inline uint32_t cn_bucket_tags(const struct cn_bucket *bucket, uint32_t tag)
{
#ifdef CN_INDEX_SSE2
    /* Aligned 8-byte halves of a 16-byte load are never torn; what they say is only a hint (I5). */
    const __m128 *pairs = (const __m128 *)bucket;
    __m128i wanted = _mm_set1_epi32((int)tag);
    __m128i low = _mm_castps_si128(_mm_shuffle_ps(pairs[0], pairs[1], 0xdd));
    __m128i high = _mm_castps_si128(_mm_shuffle_ps(pairs[2], pairs[3], 0xdd));
    low = _mm_cmpeq_epi32(low, wanted);
    high = _mm_cmpeq_epi32(high, wanted);
    return (uint32_t)_mm_movemask_ps(_mm_castsi128_ps(low)) |
           (uint32_t)_mm_movemask_ps(_mm_castsi128_ps(high)) << 4;
#else
    uint32_t hits = 0;
    for (uint32_t i = 0; i < CN_BUCKET_ENTRIES; i++)
        hits |= (uint32_t)((uint32_t)(cn_load_relaxed(&bucket->entry[i]) >> 32) == tag) << i;
    return hits;
#endif
}

/* Look in one bucket. True: *ret_d is LIVE with this key, *ret_word its word as of the compare. */
static inline bool cn_bucket_find(const struct cn_catalog *c, const struct cn_bucket *bucket,
                                  uint32_t tag, uint32_t ns, const struct cn_key *key,
                                  uint32_t *ret_d, uint64_t *ret_word)
{
    for (uint32_t hits = cn_bucket_tags(bucket, tag); hits != 0; hits &= hits - 1) {
        uint32_t d = (uint32_t)cn_load_relaxed(&bucket->entry[__builtin_ctz(hits)]);
        if (d >= c->chunk_count)
            continue;
        /* pairs with the release of word in cn_chunk_publish(): key and place are visible */
        uint64_t word = cn_load_acquire(&c->chunks[d].word);
        if (cn_word_state(word) == CN_LIVE && cn_chunk_is(&c->chunks[d], ns, key)) {
            *ret_d = d;
            *ret_word = word;
            return true;
        }
    }
    return false;
}

/* The second and third bucket: 0.7 % of the chunks, and every miss. */
bool cn_index_find_rest(const struct cn_catalog *c, struct cn_hash h, uint32_t ns,
                        const struct cn_key *key, uint32_t *ret_d, uint64_t *ret_word);

/* The whole lookup; a reader trusts the answer only after publish-fence-validate (I3). */
static inline bool cn_index_find(const struct cn_catalog *c, struct cn_hash h, uint32_t ns,
                                 const struct cn_key *key, uint32_t *ret_d, uint64_t *ret_word)
{
    const struct cn_bucket *bucket = &c->index[cn_hash_bucket(c, h, 0)];
    if (__builtin_expect(cn_bucket_find(c, bucket, cn_hash_tag(h), ns, key, ret_d, ret_word), 1))
        return true;
    return cn_index_find_rest(c, h, ns, key, ret_d, ret_word);
}

/* Keeper only. CN_ELIMIT: all candidate buckets are full; nothing was changed. */
int cn_index_insert(struct cn_catalog *c, struct cn_hash h, uint32_t d);
/* Keeper only. True when an entry for d was there and is now empty. */
bool cn_index_remove(struct cn_catalog *c, struct cn_hash h, uint32_t d);
/* Keeper only: the entry of d names d2 from one store on. */
bool cn_index_swing(struct cn_catalog *c, struct cn_hash h, uint32_t d, uint32_t d2);
/* Keeper only: is there a place for one more entry? */
bool cn_index_room(const struct cn_catalog *c, struct cn_hash h);

#endif
