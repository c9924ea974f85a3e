/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A slab under pressure goes to another size, a busy one does not; a slab table that contradicts
 * itself is refused without a trace.
 */
#include "arena_books.h"
#include "cn_arena_internal.h"

enum { SLABS = 16 };

static bool busy_below(void *ctx, uint64_t slab_off, uint64_t slab_bytes)
{
    CHECK(slab_bytes > 0);
    return slab_off < *(const uint64_t *)ctx;
}

static bool busy_always(void *ctx, uint64_t slab_off, uint64_t slab_bytes)
{
    (void)ctx, (void)slab_off, (void)slab_bytes;
    return true;
}

/* Sixteen slabs of two 1 MiB extents, one extent left in each but slab 5, which is full. */
static void fragmented(struct books *b)
{
    *b = books_open(SLABS * 2 * MIB);
    books_start(b, SLABS * 2 * MIB);
    for (uint64_t i = 0; i < 2 * SLABS; i++)
        CHECK_EQ(books_alloc(b, MIB), i * MIB);
    for (uint64_t i = 0; i < SLABS; i++) {
        if (i != 5)
            books_free(b, (2 * i + i % 2) * MIB);
    }
}

static uint64_t left_in(uint64_t slab) { return (2 * slab + 1 - slab % 2) * MIB; }

/* Half the region is free, yet no 8 MiB fit: emptying the cheapest window makes room for them. */
static void reclaim_defeats_fragmentation(void)
{
    struct books b;
    uint64_t off = 0, bytes = 0, busy_end = 4 * 2 * MIB;
    fragmented(&b);
    CHECK_EQ(books_try(&b, 8 * MIB), CN_EFULL);
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 8 * MIB, busy_below, &busy_end, &off, &bytes), CN_OK);
    CHECK_EQ(off, 6 * 2 * MIB); /* slabs below 4 are busy, 5 costs twice as much */
    CHECK_EQ(bytes, 8 * MIB);

    cn_arena_close_window(b.arena, off, bytes);
    for (uint64_t slab = 6; slab < 10; slab++) { /* move: allocate elsewhere, then free */
        const uint64_t to = books_alloc(&b, MIB);
        CHECK(to < off || to >= off + bytes);
        books_free(&b, left_in(slab));
    }
    CHECK_EQ(books_stats(&b).free_granules, 4);
    CHECK_EQ(books_try(&b, 8 * MIB), CN_EFULL); /* the closed window is nobody's yet */
    cn_arena_close_window(b.arena, 0, 0);
    CHECK_EQ(books_alloc(&b, 8 * MIB), off);
    CHECK_EQ(b.table[6], (uint64_t)2048 << 32 | 4 << 8 | CN_SLAB_HEAD);
    books_close(&b);
}

/* With every slab busy, or no stretch long enough between busy ones, there is no window. */
static void reclaim_respects_busy_slabs(void)
{
    struct books b;
    uint64_t off = 77, bytes = 77, busy_end = 10 * 2 * MIB;
    fragmented(&b);
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 4096, busy_always, NULL, &off, &bytes), CN_EFULL);
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 14 * MIB, busy_below, &busy_end, &off, &bytes),
             CN_EFULL);
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 0, NULL, NULL, &off, &bytes), CN_EINVAL);
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 64 * MIB, NULL, NULL, &off, &bytes), CN_ETOOBIG);
    CHECK(off == 77 && bytes == 77);
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 12 * MIB, busy_below, &busy_end, &off, &bytes),
             CN_OK);
    CHECK_EQ(off, busy_end);
    books_close(&b);
}

/* Free granules cost nothing, and no more of them are closed than the extent needs. */
static void reclaim_prefers_free_granules(void)
{
    struct books b;
    uint64_t off = 0, bytes = 0;
    fragmented(&b);
    books_free(&b, left_in(8)); /* kept as the empty slab of its class */
    books_free(&b, left_in(9));
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 4 * MIB, busy_below, &(uint64_t){0}, &off, &bytes),
             CN_OK);
    CHECK_EQ(off, 8 * 2 * MIB);
    CHECK_EQ(bytes, 4 * MIB);
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 6 * MIB, busy_below, &(uint64_t){0}, &off, &bytes),
             CN_OK);
    CHECK_EQ(bytes, 6 * MIB);
    CHECK(off == 7 * 2 * MIB || off == 8 * 2 * MIB);
    books_close(&b);
}

/* Free granules behind a slab that must go are closed as far as they are needed. */
static void reclaim_takes_no_more_than_needed(void)
{
    struct books b = books_open(30 * MIB);
    uint64_t off = 77, bytes = 0;
    books_start(&b, 30 * MIB);
    CHECK_EQ(books_alloc(&b, 20 * MIB), 0);
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 24 * MIB, NULL, NULL, &off, &bytes), CN_OK);
    CHECK_EQ(off, 0);
    CHECK_EQ(bytes, 24 * MIB);
    cn_arena_close_window(b.arena, off, bytes);
    CHECK_EQ(books_alloc(&b, 6 * MIB), 24 * MIB);
    books_close(&b);
}

/* After adoption slabs that hold something are filled before empty ones, which can be given up. */
static void adopted_slabs_are_filled_before_empty_ones(void)
{
    struct books b = books_open(6 * MIB);
    books_start(&b, 6 * MIB);
    for (uint32_t g = 0; g < 3; g++) {
        b.table[g] = cn_slab_word(256, 1);
        CHECK_EQ(cn_arena_adopt_slab(b.arena, g, b.table[g]), CN_OK);
    }
    CHECK_EQ(cn_arena_adopt_extent(b.arena, 4 * MIB), CN_OK);
    CHECK_EQ(books_alloc(&b, MIB), 5 * MIB);
    CHECK_EQ(books_alloc(&b, 4 * MIB), 0);
    CHECK_EQ(books_stats(&b).slab_count, 2);
    books_close(&b);
}

/* A window may be closed over anything: it takes slabs whole, and opening restores every count. */
static void window_opens_as_it_was_closed(void)
{
    struct books b;
    fragmented(&b);
    const struct cn_arena_stats before = books_stats(&b);
    const uint64_t free_before = cn_arena_free_extents(b.arena, MIB);
    CHECK_EQ(free_before, SLABS - 1);
    const uint64_t windows[][2] = {
        {MIB, 1}, {0, UINT64_MAX}, {3 * MIB, 20 * MIB}, {32 * MIB, MIB}, {UINT64_MAX, 4 * MIB}};
    const uint64_t closed[] = {1, SLABS - 1, 10, 0, 0};
    for (size_t i = 0; i < sizeof(closed) / sizeof(closed[0]); i++) {
        cn_arena_close_window(b.arena, windows[i][0], windows[i][1]); /* opens the one before */
        CHECK_EQ(cn_arena_free_extents(b.arena, MIB), free_before - closed[i]);
        stats_equal(before, books_stats(&b));
    }
    cn_arena_close_window(b.arena, 0, UINT64_MAX);
    CHECK_EQ(books_try(&b, MIB), CN_EFULL);
    uint64_t off = 0, bytes = 0;
    CHECK_EQ(cn_arena_reclaim_window(b.arena, MIB, NULL, NULL, &off, &bytes), CN_EFULL);
    cn_arena_close_window(b.arena, 0, 0);
    for (int i = 0; i < SLABS - 1; i++)
        books_alloc(&b, MIB);
    CHECK_EQ(books_try(&b, MIB), CN_EFULL);
    books_close(&b);
}

/* Words that no keeper writes, and slabs that overlap, are refused; nothing changes. */
static void adopt_refuses_contradictory_slabs(void)
{
    struct books b = books_open(GIB);
    books_start(&b, GIB);
    CHECK_EQ(cn_arena_adopt_slab(b.arena, 100, cn_slab_word(256, 4)), CN_OK);
    const struct cn_arena_stats before = books_stats(&b);
    const struct {
        uint32_t granule;
        uint64_t word;
    } wrong[] = {
        {512, cn_slab_word(256, 1)}, /* beyond the region */
        {UINT32_MAX, cn_slab_word(256, 1)},
        {512, 0},
        {0, UINT64_MAX},
        {0, cn_slab_word(256, 1) + 1},  /* unknown kind */
        {0, cn_slab_word(256, 1) - 1},  /* kind free, other bits not */
        {0, cn_slab_word(0, 1)},        /* no size */
        {0, cn_slab_word(256, 0)},      /* no granules */
        {0, cn_slab_word(513, 1)},      /* no extent fits */
        {0, cn_slab_word(256, 65)},     /* longer than any slab of this size */
        {0, cn_slab_word(262145, 513)}, /* above 1 GiB */
        {511, cn_slab_word(256, 2)},    /* leaves the region */
        {100, cn_slab_word(256, 4)},    /* adopted before */
        {101, cn_slab_word(256, 1)},    /* inside another */
        {99, cn_slab_word(256, 2)},     /* runs into another */
        {90, cn_slab_word(7680, 60)},   /* covers another */
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        CHECK_MSG(cn_arena_adopt_slab(b.arena, wrong[i].granule, wrong[i].word) == CN_ECORRUPT,
                  "granule %u word %#llx", wrong[i].granule, (unsigned long long)wrong[i].word);
        stats_equal(before, books_stats(&b));
    }
    CHECK_EQ(cn_arena_adopt_slab(b.arena, 101, 0), CN_OK);
    CHECK_EQ(cn_arena_adopt_slab(b.arena, 104, cn_slab_word(1, 1)), CN_OK);
    CHECK_EQ(b.stores, 0);
    books_close(&b);
}

/* More sizes than any keeper has are refused as well. */
static void adopt_refuses_too_many_classes(void)
{
    struct books b = books_open(64 * GIB);
    books_start(&b, 64 * GIB);
    for (uint32_t i = 0; i < CN_CLASSES_MAX; i++)
        CHECK_EQ(cn_arena_adopt_slab(b.arena, i, cn_slab_word(i % 512 + 1, 1)), CN_OK);
    for (uint32_t i = 512; i < CN_CLASSES_MAX; i++)
        CHECK_EQ(cn_arena_adopt_slab(b.arena, 2 * i, cn_slab_word(i + 1, 2 + i / 1024)), CN_OK);
    CHECK_EQ(books_stats(&b).class_count, CN_CLASSES_MAX);
    CHECK_EQ(cn_arena_adopt_slab(b.arena, 4096, cn_slab_word(5000, 10)), CN_ECORRUPT);
    CHECK_EQ(cn_arena_adopt_slab(b.arena, 4096, cn_slab_word(500, 1)), CN_OK);
    books_close(&b);
}

/* An extent outside every slab, off its grid, or named twice is refused; nothing changes. */
static void adopt_refuses_contradictory_extents(void)
{
    struct books b = books_open(64 * MIB);
    books_start(&b, 64 * MIB);
    CHECK_EQ(cn_arena_adopt_extent(b.arena, 0), CN_ECORRUPT);
    CHECK_EQ(cn_arena_adopt_slab(b.arena, 3, cn_slab_word(3, 1)), CN_OK);
    CHECK_EQ(cn_arena_adopt_extent(b.arena, 6 * MIB + 12 * KIB), CN_OK);
    const struct cn_arena_stats before = books_stats(&b);
    const uint64_t wrong[] = {0,
                              6 * MIB - 4096,
                              6 * MIB + 1,
                              6 * MIB + 4096,
                              6 * MIB + 12 * KIB,
                              6 * MIB + 170 * 12 * KIB, /* the slab's tail */
                              8 * MIB,
                              64 * MIB,
                              UINT64_MAX};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        CHECK_MSG(cn_arena_adopt_extent(b.arena, wrong[i]) == CN_ECORRUPT, "off %#llx",
                  (unsigned long long)wrong[i]);
        stats_equal(before, books_stats(&b));
    }
    CHECK_EQ(cn_arena_free_extents(b.arena, 12 * KIB), 169);
    CHECK_EQ(books_alloc(&b, 12 * KIB), 6 * MIB); /* allocation goes around what was adopted */
    CHECK_EQ(books_alloc(&b, 12 * KIB), 6 * MIB + 24 * KIB);
    books_close(&b);
}

int main(void)
{
    RUN(reclaim_defeats_fragmentation);
    RUN(reclaim_respects_busy_slabs);
    RUN(reclaim_prefers_free_granules);
    RUN(reclaim_takes_no_more_than_needed);
    RUN(adopted_slabs_are_filled_before_empty_ones);
    RUN(window_opens_as_it_was_closed);
    RUN(adopt_refuses_contradictory_slabs);
    RUN(adopt_refuses_too_many_classes);
    RUN(adopt_refuses_contradictory_extents);
    return TEST_PASS;
}
