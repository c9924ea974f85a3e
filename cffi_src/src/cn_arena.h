/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Slabs and extents of one region: where do the next n bytes go?
 *
 * A region is a row of 2 MiB granules. A slab is a run of granules cut into extents of one exact
 * size, a multiple of 4 KiB. The slab table in the catalog (one word a granule, written here
 * through the callback) is the record from which a successor rebuilds everything else; the rest is
 * keeper-private. A slab changes its size only when empty (I5).
 */
#ifndef CN_ARENA_H
#define CN_ARENA_H

#include <stdbool.h>
#include <stdint.h>

#define CN_GRANULE_BYTES 0x200000u /* 2 MiB */
#define CN_PAGE_BYTES 4096u
#define CN_CLASSES_MAX 1024 /* distinct extent sizes in a region at one time (I10) */

struct cn_arena;

/* Store word into the slab table entry of granule g: one 8-byte store, in the order of the calls.
 * Head granule: extent_pages:32 | run_granules:24 | CN_SLAB_HEAD:8. Other granules of the run and
 * free granules: 0. Head is stored last when a slab is made and first when it is given back. */
#define CN_SLAB_FREE 0u
#define CN_SLAB_HEAD 1u
typedef void (*cn_slab_store_fn)(void *ctx, uint32_t granule, uint64_t word);

int cn_arena_create(uint64_t region_bytes, cn_slab_store_fn store, void *ctx,
                    struct cn_arena **ret_arena);
void cn_arena_destroy(struct cn_arena *a);

/* An extent of at least data_bytes (rounded up to a page). CN_OK, CN_EFULL (no room now: evict or
 * reclaim), CN_ETOOBIG (can never fit this region). *ret_extent_bytes is the exact extent size. */
int cn_arena_alloc(struct cn_arena *a, uint64_t data_bytes, uint64_t *ret_off,
                   uint64_t *ret_extent_bytes);
/* Give the extent at off back; CN_EINVAL (nothing changed) if off is no allocated extent. An empty
 * slab returns its granules at once, except one kept per class that was used last (hysteresis). */
int cn_arena_free(struct cn_arena *a, uint64_t off);
/* Size of the allocated extent at off, 0 if off is not the start of one. */
uint64_t cn_arena_extent_bytes(const struct cn_arena *a, uint64_t off);

/* Recovery: first every slab of the table, then every extent that a descriptor names. CN_ECORRUPT
 * when a word or an offset contradicts what was adopted before; nothing changes then. */
int cn_arena_adopt_slab(struct cn_arena *a, uint32_t granule, uint64_t word);
int cn_arena_adopt_extent(struct cn_arena *a, uint64_t off);

/* Then give back what the predecessor had made and not filled yet. */
void cn_arena_trim(struct cn_arena *a);

/* The window of whole slabs and free granules that is cheapest to empty so that an extent of
 * data_bytes fits: fewest allocated bytes, no slab for which busy(ctx, slab_off, slab_bytes) is
 * true (leased or granted extents). CN_OK and the byte range, or CN_EFULL. O(number of slabs). */
typedef bool (*cn_slab_busy_fn)(void *ctx, uint64_t slab_off, uint64_t slab_bytes);
int cn_arena_reclaim_window(const struct cn_arena *a, uint64_t data_bytes, cn_slab_busy_fn busy,
                            void *ctx, uint64_t *ret_off, uint64_t *ret_bytes);
/* While a window is closed no extent in it is allocated (its chunks are being moved out);
 * opening it again is explicit. One window at a time; give 0, 0 to open. */
void cn_arena_close_window(struct cn_arena *a, uint64_t off, uint64_t bytes);

struct cn_arena_stats {
    uint64_t region_bytes;
    uint64_t extent_bytes; /* allocated, in whole extents */
    uint64_t slab_bytes;   /* in slabs */
    uint64_t waste_bytes;  /* tails of slabs that no extent covers */
    uint64_t free_granules;
    uint32_t slab_count;
    uint32_t class_count;
};
void cn_arena_stats(const struct cn_arena *a, struct cn_arena_stats *ret_stats);
/* Free extents of exactly this size class, without making a slab. */
uint64_t cn_arena_free_extents(const struct cn_arena *a, uint64_t data_bytes);
/* Granules of the best slab for one extent size: least waste at most max(128 MiB, 4 extents), the
 * smallest of those within 0.5 %; and the share of it wasted, in millionths. */
uint32_t cn_arena_slab_granules(uint64_t extent_bytes, uint32_t *ret_waste_ppm);

#endif
