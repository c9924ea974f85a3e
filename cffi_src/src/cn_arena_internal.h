/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the allocator share. Keeper-private and rebuildable, every bit of it.
 *
 * Four arrays are made with the arena and never grow, so that nothing can fail for want of memory
 * later. A page of them is touched only when a granule it describes is used, and used_bits only for
 * slabs of more than 64 extents; others keep theirs in the slab, on the line that is touched
 * anyway:
 *
 *   free_bits   1 bit a granule    in no slab, and not withheld by a closed window
 *   head_of     4 bytes a granule  head granule + 1 of the slab that covers it, 0 = none
 *   slabs       32 bytes a granule the slab whose head this granule is
 *   used_bits   64 bytes a granule 1 bit an extent of the slab that begins there; a slab has no
 *                                  more extents than its granules have pages: no overlap here
 *
 * Each class keeps the slabs that have room in a list, the empty ones last: allocation fills slabs
 * that hold something first, and whoever looks for an empty slab looks at the tail.
 */
#ifndef CN_ARENA_INTERNAL_H
#define CN_ARENA_INTERNAL_H

#include <stddef.h>

#include "cn_arena.h"

#define CN_GRANULE_PAGES (CN_GRANULE_BYTES / CN_PAGE_BYTES)
#define CN_GRANULE_WORDS (CN_GRANULE_PAGES / 64)            /* of used_bits */
#define CN_EXTENT_PAGES_MAX (1u << 18)                      /* 1 GiB */
#define CN_GRANULES_MAX (1u << 24)                          /* 32 TiB */
#define CN_SLAB_RUN_MIN_CAP (0x8000000u / CN_GRANULE_BYTES) /* 128 MiB */
#define CN_CLASS_SLOTS (2u * CN_CLASSES_MAX)                /* of the hash; at most half full */
#define CN_RUN_HINTS 64u
#define CN_NOWHERE UINT32_MAX /* no slab, no class, no granule */

struct cn_slab {
    uint64_t bits;         /* allocated extents, when there are at most 64 */
    uint32_t extent_pages; /* 0: no slab begins at this granule */
    uint32_t prev;         /* in the class's list, by head granule */
    uint32_t next;
    uint16_t run_granules;
    uint16_t extent_count;
    uint16_t used_count;
    uint16_t class_idx;
    uint16_t hint;   /* words of allocated bits before this one are full */
    uint16_t closed; /* in a closed window: in no list, takes nothing new */
};
_Static_assert(sizeof(struct cn_slab) == 32, "two of them on a line");
_Static_assert(CN_SLAB_RUN_MIN_CAP *CN_GRANULE_PAGES <= UINT16_MAX &&
                   4 * CN_EXTENT_PAGES_MAX / CN_GRANULE_PAGES <= UINT16_MAX,
               "the longest slab and its extents can be counted");

struct cn_class {
    uint64_t free_count;   /* extents that could be allocated now */
    uint32_t extent_pages; /* 0: the entry is unused */
    uint32_t best_run;     /* granules of the slab with the best shape */
    uint32_t slab_count;
    uint32_t empty_count; /* slabs at the tail of the list without an extent */
    uint32_t head;        /* slabs with room */
    uint32_t tail;
};

struct cn_arena {
    cn_slab_store_fn store;
    void *store_ctx;
    void *arrays; /* the allocation that holds these four */
    uint64_t *free_bits;
    uint32_t *head_of;
    struct cn_slab *slabs;
    uint64_t *used_bits;
    uint64_t region_bytes;
    uint64_t used_pages;  /* in allocated extents */
    uint64_t waste_pages; /* tails of slabs */
    uint32_t granule_count;
    uint32_t slab_granules;
    uint32_t slab_count;
    uint32_t class_count;
    uint32_t class_top;    /* entries of classes at and behind it were never used */
    uint32_t empty_count;  /* of all classes */
    uint32_t window_first; /* granules of the closed window, [first, end); none: 0, 0 */
    uint32_t window_end;
    uint32_t run_hint[CN_RUN_HINTS + 1];   /* no run of r free granules begins before run_hint[r] */
    uint16_t class_slots[CN_CLASS_SLOTS];  /* class + 1 by extent_pages, linear probing; 0 = none */
    uint16_t class_unused[CN_CLASSES_MAX]; /* a stack of entries of classes, class_count in use */
    struct cn_class classes[CN_CLASSES_MAX];
};

static inline uint64_t cn_slab_word(uint32_t extent_pages, uint32_t run_granules)
{
    return (uint64_t)extent_pages << 32 | (uint64_t)run_granules << 8 | CN_SLAB_HEAD;
}

static inline uint32_t cn_granules_of(uint32_t extent_pages)
{
    return (extent_pages + CN_GRANULE_PAGES - 1) / CN_GRANULE_PAGES;
}

static inline uint64_t *cn_slab_bits(const struct cn_arena *a, uint32_t head)
{
    struct cn_slab *s = &a->slabs[head];
    return s->extent_count <= 64 ? &s->bits : &a->used_bits[(size_t)head * CN_GRANULE_WORDS];
}

static inline bool cn_bits_get(const uint64_t *words, uint32_t bit)
{
    return (words[bit / 64] >> (bit % 64) & 1) != 0;
}

/* The first bit in [from, end) that is value; end if there is none. */
static inline uint32_t cn_bits_next(const uint64_t *words, uint32_t from, uint32_t end, bool value)
{
    const uint64_t flip = value ? 0 : UINT64_MAX;
    if (from >= end)
        return end;
    uint32_t i = from / 64;
    uint64_t word = (words[i] ^ flip) & UINT64_MAX << (from % 64);
    while (word == 0) {
        if (++i >= (end + 63) / 64)
            return end;
        word = words[i] ^ flip;
    }
    const uint32_t bit = i * 64 + (uint32_t)__builtin_ctzll(word);
    return bit < end ? bit : end;
}

/* cn_arena_runs.c: free granules */
void cn_bits_fill(uint64_t *words, uint32_t from, uint32_t count, bool value);
/* First run of so many free granules, CN_NOWHERE if there is none. */
uint32_t cn_run_find(struct cn_arena *a, uint32_t run_granules);
/* Length of the longest free run, looking no further than one of most; 0 if it is below least. */
uint32_t cn_run_longest(struct cn_arena *a, uint32_t least, uint32_t most);
void cn_run_claim(struct cn_arena *a, uint32_t first, uint32_t run_granules);
void cn_run_release(struct cn_arena *a, uint32_t first, uint32_t run_granules);
/* Length of the slab with the least waste of at most limit granules (at least one extent fits). */
uint32_t cn_slab_shape(uint32_t extent_pages, uint32_t limit_granules);
/* The longest slab ever made for this size. */
uint32_t cn_slab_run_cap(uint32_t extent_pages);

/* cn_arena.c: classes, slabs */
/* Pages for data_bytes: CN_OK, CN_EINVAL (0 bytes), CN_ETOOBIG. */
int cn_pages_of(const struct cn_arena *a, uint64_t data_bytes, uint32_t *ret_pages);
uint32_t cn_class_find(const struct cn_arena *a, uint32_t extent_pages);
/* The class of this size, made if need be; CN_NOWHERE when the table is full. */
uint32_t cn_class_add(struct cn_arena *a, uint32_t extent_pages);
/* The smallest class above extent_pages of which at most 1/8 would be wasted. */
uint32_t cn_class_larger(const struct cn_arena *a, uint32_t extent_pages, bool with_room);
/* Make a slab of the free granules [first, first + run) in the private books. */
void cn_slab_enter(struct cn_arena *a, uint32_t class_idx, uint32_t first, uint32_t run_granules);
void cn_slab_return(struct cn_arena *a, uint32_t head);
void cn_slab_link_head(struct cn_arena *a, uint32_t head);
void cn_slab_unlink(struct cn_arena *a, uint32_t head);
/* The slab that has an extent beginning at off, and the number of that extent; CN_NOWHERE. */
uint32_t cn_slab_locate(const struct cn_arena *a, uint64_t off, uint32_t *ret_extent);
/* Book the free extent of this slab as allocated. */
void cn_slab_use(struct cn_arena *a, uint32_t head, uint32_t extent);

#endif
