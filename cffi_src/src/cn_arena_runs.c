/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs of free granules: where is the first one that is long enough, and how long should it be?
 *
 * First fit over a bitmap. A hint for each length up to CN_RUN_HINTS says where no search needs to
 * look again; a longer run starts at the hint of the longest. A released run lowers only the hints
 * of the lengths that it, with its free neighbours, can serve, so that a hole of one granule does
 * not send the search for forty over the whole region again.
 */
#include "cn_arena_internal.h"

void cn_bits_fill(uint64_t *words, uint32_t from, uint32_t count, bool value)
{
    while (count > 0) {
        const uint32_t shift = from % 64;
        const uint32_t n = count < 64 - shift ? count : 64 - shift;
        const uint64_t mask = (n == 64 ? UINT64_MAX : ((uint64_t)1 << n) - 1) << shift;
        if (value)
            words[from / 64] |= mask;
        else
            words[from / 64] &= ~mask;
        from += n;
        count -= n;
    }
}

static uint32_t min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }

/* No run of run_granules or more is free anywhere. */
static void run_note_none(struct cn_arena *a, uint32_t run_granules)
{
    for (uint32_t r = run_granules; r <= CN_RUN_HINTS; r++)
        a->run_hint[r] = a->granule_count;
}

uint32_t cn_run_find(struct cn_arena *a, uint32_t run_granules)
{
    const uint32_t count = a->granule_count;
    uint32_t at = a->run_hint[min_u32(run_granules, CN_RUN_HINTS)];

    while (count - at >= run_granules) {
        at = cn_bits_next(a->free_bits, at, count, true);
        const uint32_t end_max = at + min_u32(run_granules, count - at);
        const uint32_t end = cn_bits_next(a->free_bits, at, end_max, false);
        if (end - at == run_granules) {
            if (run_granules <= CN_RUN_HINTS)
                a->run_hint[run_granules] = at;
            return at;
        }
        at = end;
    }
    run_note_none(a, run_granules);
    return CN_NOWHERE;
}

uint32_t cn_run_longest(struct cn_arena *a, uint32_t least, uint32_t most)
{
    const uint32_t count = a->granule_count;
    uint32_t at = a->run_hint[min_u32(least, CN_RUN_HINTS)];
    uint32_t longest = 0;

    while (count - at >= least) {
        at = cn_bits_next(a->free_bits, at, count, true);
        const uint32_t end = cn_bits_next(a->free_bits, at, count, false);
        if (end - at > longest)
            longest = end - at;
        if (longest >= most)
            return most;
        at = end;
    }
    if (longest < least)
        longest = 0;
    run_note_none(a, longest > 0 ? longest + 1 : least);
    return longest;
}

void cn_run_claim(struct cn_arena *a, uint32_t first, uint32_t run_granules)
{
    cn_bits_fill(a->free_bits, first, run_granules, false);
}

/* Free granules just before first, counted up to 63. */
static uint32_t run_free_before(const struct cn_arena *a, uint32_t first)
{
    const uint32_t i = first / 64;
    const uint32_t shift = first % 64;
    const uint64_t below = i > 0 ? a->free_bits[i - 1] : 0;
    const uint64_t word = shift == 0 ? below : a->free_bits[i] << (64 - shift) | below >> shift;

    if (word == UINT64_MAX)
        return 63;
    return (uint32_t)__builtin_clzll(~word);
}

void cn_run_release(struct cn_arena *a, uint32_t first, uint32_t run_granules)
{
    const uint32_t end = first + run_granules;
    /* A free neighbour of 64 or more has lowered every hint to its own start already. */
    const uint32_t start = first - run_free_before(a, first);
    const uint32_t end_max = end + min_u32(CN_RUN_HINTS, a->granule_count - end);
    const uint32_t merged = cn_bits_next(a->free_bits, end, end_max, false) - start;
    const uint32_t longest = min_u32(merged, CN_RUN_HINTS);

    cn_bits_fill(a->free_bits, first, run_granules, true);
    for (uint32_t r = 1; r <= longest; r++)
        a->run_hint[r] = min_u32(a->run_hint[r], start);
}

uint32_t cn_slab_run_cap(uint32_t extent_pages)
{
    const uint32_t four_extents = cn_granules_of(4 * extent_pages);
    return four_extents > CN_SLAB_RUN_MIN_CAP ? four_extents : CN_SLAB_RUN_MIN_CAP;
}

uint32_t cn_slab_shape(uint32_t extent_pages, uint32_t limit_granules)
{
    uint32_t best_run = cn_granules_of(extent_pages);
    uint64_t best_waste = best_run * CN_GRANULE_PAGES % extent_pages;

    for (uint32_t run = best_run; run <= limit_granules; run++) {
        const uint64_t waste = run * CN_GRANULE_PAGES % extent_pages;
        if (waste * 200 <= (uint64_t)run * CN_GRANULE_PAGES)
            return run;
        if (waste * best_run < best_waste * run) {
            best_waste = waste;
            best_run = run;
        }
    }
    return best_run;
}

uint32_t cn_arena_slab_granules(uint64_t extent_bytes, uint32_t *ret_waste_ppm)
{
    if (extent_bytes == 0 || extent_bytes > (uint64_t)CN_EXTENT_PAGES_MAX * CN_PAGE_BYTES)
        return 0;
    const uint32_t pages = (uint32_t)((extent_bytes + CN_PAGE_BYTES - 1) / CN_PAGE_BYTES);
    const uint32_t run = cn_slab_shape(pages, cn_slab_run_cap(pages));
    const uint64_t run_pages = (uint64_t)run * CN_GRANULE_PAGES;
    if (ret_waste_ppm)
        *ret_waste_ppm = (uint32_t)(run_pages % pages * 1000000 / run_pages);
    return run;
}
