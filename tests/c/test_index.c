/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index finds what was inserted and nothing else, whatever it is filled with; keys are compared
 * whole and with their namespace (I8); every entry stays where it is.
 */
#include "check.h"
#include "cn_index.h"

enum { CHUNKS = 4096, NS = 3 };

struct table {
    struct cn_catalog catalog;
    struct cn_super super;
};

static struct table table_open(uint32_t chunks)
{
    struct table t = {0};
    uint32_t buckets = 1;
    while (buckets * CN_BUCKET_ENTRIES < 2 * chunks)
        buckets *= 2;
    t.catalog.chunk_count = chunks;
    t.catalog.bucket_mask = buckets - 1;
    t.catalog.hash_seed[0] = 0x1234;
    t.catalog.hash_seed[1] = 0x5678;
    t.catalog.chunks = aligned_alloc(CN_CACHELINE, chunks * sizeof(struct cn_chunk));
    t.catalog.index = aligned_alloc(CN_CACHELINE, buckets * sizeof(struct cn_bucket));
    CHECK(t.catalog.chunks != NULL && t.catalog.index != NULL);
    memset(t.catalog.chunks, 0, chunks * sizeof(struct cn_chunk));
    memset(t.catalog.index, 0, buckets * sizeof(struct cn_bucket));
    return t;
}

static void table_close(struct table *t)
{
    free(t->catalog.chunks);
    free(t->catalog.index);
}

static struct cn_key key_of(uint64_t n)
{
    struct cn_key key;
    uint64_t x = n * 0x9e3779b97f4a7c15ULL + 1;
    for (uint32_t i = 0; i < 4; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        key.word[i] = x;
    }
    return key;
}

static struct cn_hash hash_of(const struct table *t, uint32_t ns, const struct cn_key *key)
{
    return cn_hash_key(t->catalog.hash_seed, ns, key);
}

static void make_live(struct table *t, uint32_t d, uint32_t ns, const struct cn_key *key)
{
    struct cn_chunk *chunk = &t->catalog.chunks[d];
    memcpy(chunk->key, key->word, sizeof(chunk->key));
    chunk->place = cn_place(0, ns, 0);
    chunk->word = cn_word(1, CN_LIVE, 0);
}

static bool find(struct table *t, uint32_t ns, const struct cn_key *key, uint32_t *ret_d)
{
    uint64_t word;
    t->catalog.super = &t->super;
    return cn_index_find(&t->catalog, hash_of(t, ns, key), ns, key, ret_d, &word);
}

static int insert(struct table *t, uint32_t ns, const struct cn_key *key, uint32_t d)
{
    t->catalog.super = &t->super;
    return cn_index_insert(&t->catalog, hash_of(t, ns, key), d);
}

/* At the design load of one half every key has its place, and each is found under its own
 * number. */
static void every_inserted_key_is_found(void)
{
    struct table t = table_open(CHUNKS);
    uint32_t d;
    for (uint32_t n = 0; n < CHUNKS; n++) {
        struct cn_key key = key_of(n);
        CHECK(!find(&t, NS, &key, &d));
        make_live(&t, n, NS, &key);
        CHECK_EQ(insert(&t, NS, &key, n), CN_OK);
    }
    for (uint32_t n = 0; n < CHUNKS; n++) {
        struct cn_key key = key_of(n);
        CHECK(find(&t, NS, &key, &d));
        CHECK_EQ(d, n);
        CHECK(!find(&t, NS + 1, &key, &d));
        key.word[3] ^= 1;
        CHECK(!find(&t, NS, &key, &d));
    }
    table_close(&t);
}

/* No entry moves: the address of each is the same after every other insert and remove. */
static void entries_never_move(void)
{
    struct table t = table_open(CHUNKS);
    uint32_t buckets = t.catalog.bucket_mask + 1;
    uint64_t *before = calloc(buckets * CN_BUCKET_ENTRIES, sizeof(*before));
    CHECK(before != NULL);
    for (uint32_t n = 0; n < CHUNKS; n++) {
        struct cn_key key = key_of(n);
        make_live(&t, n, NS, &key);
        CHECK_EQ(insert(&t, NS, &key, n), CN_OK);
    }
    memcpy(before, t.catalog.index, buckets * sizeof(struct cn_bucket));
    for (uint32_t n = 0; n < CHUNKS; n += 2) {
        struct cn_key key = key_of(n);
        CHECK(cn_index_remove(&t.catalog, hash_of(&t, NS, &key), n));
        CHECK(!cn_index_remove(&t.catalog, hash_of(&t, NS, &key), n));
    }
    uint32_t gone = 0;
    const uint64_t *after = (const uint64_t *)t.catalog.index;
    for (uint32_t i = 0; i < buckets * CN_BUCKET_ENTRIES; i++) {
        CHECK(after[i] == before[i] || after[i] == 0);
        gone += after[i] != before[i];
    }
    CHECK_EQ(gone, CHUNKS / 2);
    free(before);
    table_close(&t);
}

/* A swing is one store: the entry names the new descriptor at the old place. */
static void a_swing_keeps_the_place(void)
{
    struct table t = table_open(64);
    struct cn_key key = key_of(7);
    uint32_t d;
    make_live(&t, 7, NS, &key);
    make_live(&t, 9, NS, &key);
    CHECK_EQ(insert(&t, NS, &key, 7), CN_OK);
    CHECK(!cn_index_swing(&t.catalog, hash_of(&t, NS, &key), 8, 9));
    CHECK(cn_index_swing(&t.catalog, hash_of(&t, NS, &key), 7, 9));
    CHECK(find(&t, NS, &key, &d));
    CHECK_EQ(d, 9);
    table_close(&t);
}

/* Only LIVE descriptors are found, whatever the index says (I5). */
static void the_descriptor_decides(void)
{
    static const uint32_t states[] = {CN_FREE, CN_GRANTED, CN_DYING, CN_POISONED, 77};
    struct table t = table_open(64);
    struct cn_key key = key_of(1);
    uint32_t d;
    make_live(&t, 1, NS, &key);
    CHECK_EQ(insert(&t, NS, &key, 1), CN_OK);
    for (size_t i = 0; i < sizeof(states) / sizeof(states[0]); i++) {
        t.catalog.chunks[1].word = cn_word(1, states[i], 0);
        CHECK(!find(&t, NS, &key, &d));
    }
    t.catalog.chunks[1].word = cn_word(1, CN_LIVE, 0);
    CHECK(find(&t, NS, &key, &d));
    table_close(&t);
}

/* Garbage in the index can only miss: no access leaves the table of descriptors (I4). */
static void garbage_entries_only_miss(void)
{
    struct table t = table_open(64);
    uint64_t x = 88172645463325252ull;
    uint64_t *entries = (uint64_t *)t.catalog.index;
    uint32_t d;
    for (uint32_t round = 0; round < 2000; round++) {
        struct cn_key key = key_of(round);
        uint32_t tag = cn_hash_tag(hash_of(&t, NS, &key));
        for (uint32_t i = 0; i < (t.catalog.bucket_mask + 1) * CN_BUCKET_ENTRIES; i++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            entries[i] = (uint64_t)tag << 32 | (uint32_t)(x >> 20);
        }
        CHECK(!find(&t, NS, &key, &d));
    }
    table_close(&t);
}

/* With all three buckets full the newcomer is refused, and nothing else changes. */
static void a_full_table_refuses(void)
{
    struct table t = table_open(64);
    uint32_t refused = 0;
    uint32_t placed = 0;
    for (uint32_t n = 0; placed < (t.catalog.bucket_mask + 1) * CN_BUCKET_ENTRIES; n++) {
        struct cn_key key = key_of(n);
        bool room = cn_index_room(&t.catalog, hash_of(&t, NS, &key));
        int status = insert(&t, NS, &key, placed % 64);
        CHECK_EQ(status, room ? CN_OK : CN_ELIMIT);
        placed += room;
        refused += !room;
    }
    CHECK(refused > 0);
    CHECK(t.super.index_third > 0);
    struct cn_key key = key_of(1000000);
    CHECK_EQ(insert(&t, NS, &key, 0), CN_ELIMIT);
    table_close(&t);
}

int main(void)
{
    RUN(every_inserted_key_is_found);
    RUN(entries_never_move);
    RUN(a_swing_keeps_the_place);
    RUN(the_descriptor_decides);
    RUN(garbage_entries_only_miss);
    RUN(a_full_table_refuses);
    return TEST_PASS;
}
