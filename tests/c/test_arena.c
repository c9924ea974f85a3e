/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The allocator gives exact, disjoint extents inside the region, refuses what cannot be, changes
 * nothing when it refuses, and gives granules to whoever needs them.
 */
#include "arena_books.h"

enum { CLASSES = CN_CLASSES_MAX };

static uint64_t rng_state = 20240607;

static uint64_t rng(uint64_t below)
{
    rng_state ^= rng_state << 13, rng_state ^= rng_state >> 7, rng_state ^= rng_state << 17;
    return (rng_state >> 11) % below;
}

/* Regions below a granule or above 32 TiB, and a missing callback, are refused. */
static void create_refuses_nonsense(void)
{
    struct cn_arena *arena = NULL;
    CHECK_EQ(cn_arena_create(0, books_store, NULL, &arena), CN_EINVAL);
    CHECK_EQ(cn_arena_create(2 * MIB - 1, books_store, NULL, &arena), CN_EINVAL);
    CHECK_EQ(cn_arena_create(64 * MIB, NULL, NULL, &arena), CN_EINVAL);
    CHECK_EQ(cn_arena_create(UINT64_MAX, books_store, NULL, &arena), CN_ELIMIT);
    CHECK(arena == NULL);
    cn_arena_destroy(NULL);
}

/* 0 bytes are an error; more than the region or 1 GiB can never fit. Nothing is stored. */
static void alloc_refuses_sizes_that_cannot_fit(void)
{
    struct books b = books_open(6 * MIB);
    books_start(&b, 6 * MIB);
    CHECK_EQ(books_try(&b, 0), CN_EINVAL);
    CHECK_EQ(books_try(&b, 6 * MIB + 1), CN_ETOOBIG);
    CHECK_EQ(books_try(&b, GIB + 1), CN_ETOOBIG);
    CHECK_EQ(books_try(&b, UINT64_MAX), CN_ETOOBIG);
    CHECK_EQ(cn_arena_free_extents(b.arena, 0), 0);
    CHECK_EQ(cn_arena_free_extents(b.arena, UINT64_MAX), 0);
    CHECK_EQ(b.stores, 0);
    CHECK_EQ(books_alloc(&b, 6 * MIB), 0);
    books_close(&b);

    b = books_open(4 * GIB);
    books_start(&b, 4 * GIB);
    CHECK_EQ(books_try(&b, GIB + 1), CN_ETOOBIG);
    books_alloc(&b, GIB);
    books_alloc(&b, GIB - 1);
    CHECK_EQ(books_stats(&b).class_count, 1);
    books_close(&b);
}

/* Every extent of a slab has exactly the requested size in pages, and none overlaps another. */
static void extents_are_exact_and_disjoint(void)
{
    static const uint64_t sizes[] = {1,       4096,     4097,     12288,    100 * KIB, MIB,
                                     MIB + 1, 17989632, 80 * MIB, 92 * MIB, 200 * MIB};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct books b = books_open(GIB);
        books_start(&b, GIB);
        const uint64_t bytes = (sizes[i] + 4095) / 4096 * 4096;
        uint64_t next = books_alloc(&b, sizes[i]);
        CHECK_EQ(next, 0);
        const uint64_t in_slab = word_run(b.table[0]) * 2 * MIB / bytes;
        CHECK_EQ(cn_arena_free_extents(b.arena, sizes[i]), in_slab - 1);
        for (uint64_t n = 1; n < in_slab; n++) {
            CHECK_EQ(books_alloc(&b, sizes[i]), next + bytes);
            next += bytes;
        }
        CHECK_EQ(b.stores, 1);
        CHECK_EQ(word_pages(b.table[0]), bytes / 4096);
        CHECK_EQ(books_stats(&b).extent_bytes, in_slab * bytes);
        CHECK_EQ(books_stats(&b).waste_bytes, word_run(b.table[0]) * 2 * MIB - in_slab * bytes);
        books_close(&b);
    }
}

/* An offset that is no allocated extent is refused by free and has no size; nothing changes. */
static void free_refuses_foreign_offsets(void)
{
    struct books b = books_open(64 * MIB);
    books_start(&b, 64 * MIB);
    const uint64_t first = books_alloc(&b, 12 * KIB); /* 170 extents and a tail of 8 KiB */
    const uint64_t second = books_alloc(&b, 12 * KIB);
    books_free(&b, second);
    const struct cn_arena_stats before = books_stats(&b);
    const uint64_t wrong[] = {first + 1,      first + 4096,      second,
                              170 * 12 * KIB, 2 * MIB,           64 * MIB - 4096,
                              64 * MIB,       UINT64_MAX - 4095, UINT64_MAX};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        CHECK_MSG(cn_arena_free(b.arena, wrong[i]) == CN_EINVAL, "off %#llx",
                  (unsigned long long)wrong[i]);
        CHECK_EQ(cn_arena_extent_bytes(b.arena, wrong[i]), 0);
    }
    stats_equal(before, books_stats(&b));
    CHECK_EQ(cn_arena_extent_bytes(b.arena, first), 12 * KIB);
    books_free(&b, first);
    CHECK_EQ(cn_arena_free(b.arena, first), CN_EINVAL);
    books_close(&b);
}

/* What lies behind the last whole granule is never given out. */
static void tail_of_region_is_unused(void)
{
    struct books b = books_open(7 * MIB - 4096);
    books_start(&b, 7 * MIB - 4096);
    for (int i = 0; i < 3 * 512; i++)
        books_alloc(&b, 1);
    CHECK_EQ(books_try(&b, 1), CN_EFULL);
    CHECK_EQ(books_stats(&b).region_bytes, 7 * MIB - 4096);
    CHECK_EQ(books_stats(&b).free_granules, 0);
    books_close(&b);
}

/* One empty slab a class stays; another class that needs its granules gets them before EFULL. */
static void empty_slab_is_kept_until_wanted(void)
{
    struct books b = books_open(8 * MIB);
    uint64_t off[8];
    books_start(&b, 8 * MIB);
    for (int i = 0; i < 8; i++)
        off[i] = books_alloc(&b, MIB);
    for (int i = 0; i < 8; i++)
        books_free(&b, off[i]);
    CHECK_EQ(books_stats(&b).slab_count, 1);
    CHECK_EQ(cn_arena_free_extents(b.arena, MIB), 2);
    const uint32_t stores = b.stores;
    for (int i = 0; i < 100; i++)
        books_free(&b, books_alloc(&b, MIB));
    CHECK_EQ(b.stores, stores); /* that is what it is kept for */
    books_alloc(&b, 8 * MIB);
    CHECK_EQ(books_stats(&b).class_count, 1);
    CHECK_EQ(cn_arena_free_extents(b.arena, MIB), 0);
    books_close(&b);
}

/* Without a run for the best slab a shorter one is made, as long as one extent fits. */
static void shorter_slab_when_runs_are_short(void)
{
    const uint64_t bytes = 17989632; /* 17.16 MiB: nine granules for one, 43 for the best slab */
    struct books b = books_open(64 * MIB);
    books_start(&b, 64 * MIB);
    books_alloc(&b, bytes);
    books_alloc(&b, bytes);
    books_alloc(&b, bytes);
    CHECK_EQ(books_try(&b, bytes), CN_EFULL);
    books_close(&b);

    b = books_open(18 * MIB);
    books_start(&b, 18 * MIB);
    books_alloc(&b, bytes);
    CHECK_EQ(word_run(b.table[0]), 9);
    CHECK_EQ(books_try(&b, bytes), CN_EFULL);
    books_close(&b);
}

/* A full region serves a request from a free extent at most 1/8 larger, and from no larger one. */
static void larger_extent_when_full(void)
{
    struct books b = books_open(4 * MIB);
    uint64_t off[4], extent_bytes = 0, taken = 0;
    books_start(&b, 4 * MIB);
    for (int i = 0; i < 4; i++)
        off[i] = books_alloc(&b, MIB);
    books_free(&b, off[2]);
    CHECK_EQ(books_try(&b, MIB - MIB / 8 - 4096), CN_EFULL);
    CHECK_EQ(books_stats(&b).class_count, 1);
    CHECK_EQ(cn_arena_alloc(b.arena, MIB - MIB / 8, &taken, &extent_bytes), CN_OK);
    CHECK_EQ(taken, off[2]);
    CHECK_EQ(extent_bytes, MIB);
    CHECK_EQ(books_try(&b, MIB - MIB / 8), CN_EFULL);
    books_close(&b);
}

/* However extents of small slabs come and go, the lowest free one of the slab is taken next. */
static void small_extents_are_reused(void)
{
    struct books b = books_open(2 * MIB);
    bool used[512] = {false};
    books_start(&b, 2 * MIB);
    for (int i = 0; i < 100000; i++) {
        const uint64_t extent = rng(512), lowest_off = extent * 4096;
        if (used[extent]) {
            books_free(&b, lowest_off);
            used[extent] = false;
        }
        if (rng(512) < 2) { /* fill it up */
            for (uint64_t n = 0; n < 512; n++) {
                if (!used[n])
                    CHECK_EQ(books_alloc(&b, 4096), n * 4096);
                used[n] = true;
            }
            CHECK_EQ(books_try(&b, 4096), CN_EFULL);
        }
    }
    books_close(&b);
}

/* Hundreds of sizes that come and go are one class each for as long as they have a slab. */
static void classes_come_and_go(void)
{
    enum { SIZES = 1500 };
    struct books b = books_open(64 * GIB);
    static uint64_t off[SIZES];
    static bool live[SIZES], seen[SIZES + 301];
    uint32_t live_count = 0;
    books_start(&b, 64 * GIB);
    for (int i = 0; i < 20000; i++) {
        const uint64_t n = rng(SIZES);
        if (live[n]) {
            books_free(&b, off[n]);
            live[n] = false, live_count--;
        } else if (live_count < CLASSES) {
            off[n] = books_alloc(&b, (300 + n) * 4096);
            live[n] = true, live_count++;
        }
        if (i % 500 != 0)
            continue;
        uint32_t distinct = 0;
        memset(seen, 0, sizeof(seen));
        for (uint32_t g = 0; g < b.granules; g++) {
            const uint32_t pages = word_pages(b.table[g]);
            distinct += pages != 0 && !seen[pages == 0 ? 0 : pages - 300];
            if (pages != 0)
                seen[pages - 300] = true;
        }
        CHECK_EQ(books_stats(&b).class_count, distinct);
    }
    books_close(&b);
}

/* 1,024 sizes at a time; the next one borrows or waits, and gets in when a size is gone. */
static void classes_have_a_limit(void)
{
    struct books b = books_open(64 * GIB);
    static uint64_t off[CLASSES];
    uint64_t taken = 0, extent_bytes = 0, win_off = 0, win_bytes = 0;
    books_start(&b, 64 * GIB);
    for (uint64_t i = 0; i < CLASSES; i++)
        off[i] = books_alloc(&b, (1000 + i) * 4096);
    CHECK_EQ(books_stats(&b).class_count, CLASSES);
    CHECK_EQ(books_try(&b, 800 * 4096), CN_EFULL);
    CHECK_EQ(books_try(&b, 3000 * 4096), CN_EFULL);
    for (int i = 0; i < 100; i++) { /* more than the slab of 1,000 pages has */
        CHECK_EQ(cn_arena_alloc(b.arena, 999 * 4096, &taken, &extent_bytes), CN_OK);
        CHECK(extent_bytes >= 1000 * 4096 && extent_bytes * 7 <= 999 * 4096 * 8);
    }
    CHECK_EQ(books_stats(&b).class_count, CLASSES);
    /* reclaim names the cheapest slab that is the only one of its size */
    CHECK_EQ(cn_arena_reclaim_window(b.arena, 3000 * 4096, NULL, NULL, &win_off, &win_bytes),
             CN_OK);
    const uint32_t head = (uint32_t)(win_off / (2 * MIB));
    CHECK_EQ(win_bytes, word_run(b.table[head]) * 2 * MIB);
    const uint64_t class_bytes = word_pages(b.table[head]) * UINT64_C(4096);
    cn_arena_close_window(b.arena, win_off, win_bytes);
    books_free(&b, off[class_bytes / 4096 - 1000]);
    cn_arena_close_window(b.arena, 0, 0);
    CHECK_EQ(books_stats(&b).class_count, CLASSES - 1);
    books_alloc(&b, 3000 * 4096);
    CHECK_EQ(books_try(&b, 4000 * 4096), CN_EFULL);
    books_free(&b, off[CLASSES - 1]); /* kept as an empty slab, given up for a new size */
    CHECK_EQ(books_stats(&b).class_count, CLASSES);
    books_alloc(&b, 4000 * 4096);
    books_close(&b);
}

/* 524,288 granules, each a slab: exact to the last byte, holes found, hopeless searches refused. */
static void terabyte_is_kept_in_order(void)
{
    const uint32_t granules = 512 * 1024;
    struct books b = books_open(1024 * GIB);
    books_start(&b, 1024 * GIB);
    for (uint32_t g = 0; g < granules; g++)
        CHECK_EQ(books_alloc(&b, 2 * MIB), g * 2 * MIB);
    CHECK_EQ(books_try(&b, 1), CN_EFULL);
    CHECK_EQ(books_stats(&b).extent_bytes, 1024 * GIB);
    for (uint32_t g = 1; g < granules; g += 2)
        books_free(&b, g * 2 * MIB);
    for (int i = 0; i < 1000; i++)
        CHECK_EQ(books_try(&b, 4 * MIB), CN_EFULL);
    books_free(&b, 400000 * 2 * MIB);
    CHECK_EQ(books_alloc(&b, 6 * MIB), 399999 * 2 * MIB);
    CHECK_EQ(books_try(&b, 4 * MIB), CN_EFULL);
    CHECK_EQ(books_stats(&b).slab_count, granules / 2);
    for (uint32_t g = 0; g < granules; g += 2) {
        if (g != 400000)
            books_free(&b, g * 2 * MIB);
    }
    books_free(&b, 399999 * 2 * MIB);
    books_alloc(&b, GIB);
    books_close(&b);
}

/* The best slab is the shortest with at most 0.5 % waste, else the one with the least. */
static void shape_matches_exhaustive_search(void)
{
    uint32_t ppm = 0;
    CHECK_EQ(cn_arena_slab_granules(0, &ppm), 0);
    CHECK_EQ(cn_arena_slab_granules(GIB + 1, &ppm), 0);
    for (int i = 0; i < 3000; i++) {
        const uint64_t bytes = (1 + rng(i < 2000 ? 32768 : 262144)) * 4096;
        const uint64_t cap = 4 * bytes > 128 * MIB ? (4 * bytes + 2 * MIB - 1) / (2 * MIB) : 64;
        uint64_t best = 0, best_ppm = 1000001;
        for (uint64_t run = (bytes + 2 * MIB - 1) / (2 * MIB); run <= cap; run++) {
            const uint64_t waste = run * 2 * MIB % bytes;
            if (waste * 200 <= run * 2 * MIB) {
                best_ppm = waste * 1000000 / (run * 2 * MIB);
                break;
            }
            best = waste * 1000000 / (run * 2 * MIB);
            best_ppm = best < best_ppm ? best : best_ppm;
        }
        const uint32_t run = cn_arena_slab_granules(bytes, &ppm);
        CHECK(run <= cap && run * 2 * MIB >= bytes);
        CHECK_EQ(ppm, best_ppm);
        CHECK_EQ(ppm, run * 2 * MIB % bytes * 1000000 / (run * 2 * MIB));
    }
}

int main(void)
{
    RUN(create_refuses_nonsense);
    RUN(alloc_refuses_sizes_that_cannot_fit);
    RUN(extents_are_exact_and_disjoint);
    RUN(free_refuses_foreign_offsets);
    RUN(tail_of_region_is_unused);
    RUN(empty_slab_is_kept_until_wanted);
    RUN(shorter_slab_when_runs_are_short);
    RUN(larger_extent_when_full);
    RUN(small_extents_are_reused);
    RUN(classes_come_and_go);
    RUN(classes_have_a_limit);
    RUN(terabyte_is_kept_in_order);
    RUN(shape_matches_exhaustive_search);
    return TEST_PASS;
}
