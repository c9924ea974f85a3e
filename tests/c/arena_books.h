/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An arena together with the slab table that it writes, every store checked as it comes.
 */
#ifndef CN_TEST_ARENA_BOOKS_H
#define CN_TEST_ARENA_BOOKS_H

#include <stdbool.h>
#include <stdint.h>

#include "check.h"
#include "cn_arena.h"
#include "cn_status.h"

#define KIB UINT64_C(1024)
#define MIB (KIB * 1024)
#define GIB (MIB * 1024)

struct books {
    struct cn_arena *arena;
    uint64_t *table; /* what a successor would find */
    uint32_t granules;
    uint32_t stores;
};

static inline uint32_t word_pages(uint64_t word) { return (uint32_t)(word >> 32); }

static inline uint32_t word_run(uint64_t word) { return (uint32_t)word >> 8; }

/* Head granule of the slab that covers g by the table; UINT32_MAX if none does. */
static inline uint32_t books_head_of(const struct books *b, uint32_t g)
{
    for (uint32_t head = g + 1; head-- > 0 && g - head <= 2048;) {
        if (b->table[head] != 0)
            return head + word_run(b->table[head]) > g ? head : UINT32_MAX;
    }
    return UINT32_MAX;
}

/* A slab is made of free granules only and changes only by being given back (I5). */
static inline void books_store(void *ctx, uint32_t granule, uint64_t word)
{
    struct books *b = ctx;
    CHECK(granule < b->granules);
    b->stores++;
    if (word == 0) {
        CHECK(b->table[granule] != 0);
        b->table[granule] = 0;
        return;
    }
    CHECK_EQ(word & 0xff, CN_SLAB_HEAD);
    const uint32_t run = word_run(word);
    CHECK(word_pages(word) > 0 && run > 0 && run <= b->granules - granule);
    CHECK(word_pages(word) <= run * 512u);
    CHECK(books_head_of(b, granule) == UINT32_MAX);
    for (uint32_t g = granule; g < granule + run; g++)
        CHECK_MSG(b->table[g] == 0, "slab at %u runs into the one at %u", granule, g);
    b->table[granule] = word;
}

static inline struct books books_open(uint64_t region_bytes)
{
    struct books b = {.granules = (uint32_t)(region_bytes / CN_GRANULE_BYTES)};
    b.table = calloc(b.granules, sizeof(*b.table));
    CHECK(b.table != NULL);
    return b;
}

/* The books must stay where they are: the arena knows their address. */
static inline void books_start(struct books *b, uint64_t region_bytes)
{
    CHECK_EQ(cn_arena_create(region_bytes, books_store, b, &b->arena), CN_OK);
}

static inline void books_close(struct books *b)
{
    cn_arena_destroy(b->arena);
    free(b->table);
}

static inline uint64_t books_alloc(struct books *b, uint64_t data_bytes)
{
    uint64_t off = 0, extent_bytes = 0;
    CHECK_EQ(cn_arena_alloc(b->arena, data_bytes, &off, &extent_bytes), CN_OK);
    CHECK_EQ(cn_arena_extent_bytes(b->arena, off), extent_bytes);
    CHECK(extent_bytes >= data_bytes && extent_bytes % CN_PAGE_BYTES == 0);
    CHECK(off % CN_PAGE_BYTES == 0);
    CHECK(off + extent_bytes <= (uint64_t)b->granules * CN_GRANULE_BYTES);
    return off;
}

static inline int books_try(struct books *b, uint64_t data_bytes)
{
    uint64_t off = 77, extent_bytes = 77;
    const int rc = cn_arena_alloc(b->arena, data_bytes, &off, &extent_bytes);
    if (rc != CN_OK)
        CHECK(off == 77 && extent_bytes == 77); /* results are written on success only */
    return rc;
}

static inline void books_free(struct books *b, uint64_t off)
{
    CHECK_EQ(cn_arena_free(b->arena, off), CN_OK);
}

static inline struct cn_arena_stats books_stats(const struct books *b)
{
    struct cn_arena_stats stats;
    cn_arena_stats(b->arena, &stats);
    return stats;
}

static inline void stats_equal(struct cn_arena_stats left, struct cn_arena_stats right)
{
    CHECK_EQ(left.region_bytes, right.region_bytes);
    CHECK_EQ(left.extent_bytes, right.extent_bytes);
    CHECK_EQ(left.slab_bytes, right.slab_bytes);
    CHECK_EQ(left.waste_bytes, right.waste_bytes);
    CHECK_EQ(left.free_granules, right.free_granules);
    CHECK_EQ(left.slab_count, right.slab_count);
    CHECK_EQ(left.class_count, right.class_count);
}

#endif
