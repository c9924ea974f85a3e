/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Classes and slabs: the arena's life, allocation, release, counts. Contracts in cn_arena.h, the
 * data structures in cn_arena_internal.h.
 */
#include "cn_arena_internal.h"

#include <stdlib.h>
#include <string.h>

#include "cn_status.h"

/* A request may waste at most this part of a foreign extent: 1/8. */
#define CN_INNER_WASTE_SHARE 8u
#define CN_LINE_BYTES 64u

static size_t lines_up(size_t bytes)
{
    return (bytes + CN_LINE_BYTES - 1) / CN_LINE_BYTES * CN_LINE_BYTES;
}

/* All arrays in one piece of zeros, each on a cache line of its own. */
static int arena_allocate_arrays(struct cn_arena *a)
{
    const size_t count = a->granule_count;
    const size_t free_bytes = lines_up((count + 63) / 64 * sizeof(*a->free_bits));
    const size_t head_bytes = lines_up(count * sizeof(*a->head_of));
    const size_t slab_bytes = lines_up(count * sizeof(*a->slabs));
    const size_t used_bytes = count * CN_GRANULE_WORDS * sizeof(*a->used_bits);

    a->arrays = calloc(1, CN_LINE_BYTES + free_bytes + head_bytes + slab_bytes + used_bytes);
    if (!a->arrays)
        return CN_ENOMEM;
    char *at = (char *)lines_up((size_t)(uintptr_t)a->arrays);
    a->free_bits = (void *)at;
    a->head_of = (void *)(at + free_bytes);
    a->slabs = (void *)(at + free_bytes + head_bytes);
    a->used_bits = (void *)(at + free_bytes + head_bytes + slab_bytes);
    return CN_OK;
}

int cn_arena_create(uint64_t region_bytes, cn_slab_store_fn store, void *ctx,
                    struct cn_arena **ret_arena)
{
    if (!store || !ret_arena || region_bytes < CN_GRANULE_BYTES)
        return CN_EINVAL;
    if (region_bytes / CN_GRANULE_BYTES > CN_GRANULES_MAX)
        return CN_ELIMIT;

    struct cn_arena *a = calloc(1, sizeof(*a));
    if (!a)
        return CN_ENOMEM;
    a->store = store;
    a->store_ctx = ctx;
    a->region_bytes = region_bytes;
    a->granule_count = (uint32_t)(region_bytes / CN_GRANULE_BYTES);
    for (uint32_t i = 0; i < CN_CLASSES_MAX; i++)
        a->class_unused[i] = (uint16_t)i;
    if (arena_allocate_arrays(a) != CN_OK) {
        cn_arena_destroy(a);
        return CN_ENOMEM;
    }
    cn_bits_fill(a->free_bits, 0, a->granule_count, true);
    *ret_arena = a;
    return CN_OK;
}

void cn_arena_destroy(struct cn_arena *a)
{
    if (!a)
        return;
    free(a->arrays);
    free(a);
}

int cn_pages_of(const struct cn_arena *a, uint64_t data_bytes, uint32_t *ret_pages)
{
    if (data_bytes == 0)
        return CN_EINVAL;
    if (data_bytes > (uint64_t)CN_EXTENT_PAGES_MAX * CN_PAGE_BYTES)
        return CN_ETOOBIG;
    const uint32_t pages = (uint32_t)((data_bytes + CN_PAGE_BYTES - 1) / CN_PAGE_BYTES);
    if (cn_granules_of(pages) > a->granule_count)
        return CN_ETOOBIG;
    *ret_pages = pages;
    return CN_OK;
}

/* Classes */

static uint32_t class_slot_of(uint32_t extent_pages)
{
    /* Fibonacci hashing: sizes come in regular steps, the product's high bits do not. */
    return (uint32_t)(extent_pages * UINT32_C(2654435769)) >> 21u;
}
_Static_assert(CN_CLASS_SLOTS == 1u << (32u - 21u), "class_slot_of() yields a slot");

/* The slot that holds extent_pages, or the empty one where it would go. */
static uint32_t class_probe(const struct cn_arena *a, uint32_t extent_pages)
{
    uint32_t slot = class_slot_of(extent_pages);
    while (a->class_slots[slot] != 0 &&
           a->classes[a->class_slots[slot] - 1].extent_pages != extent_pages)
        slot = (slot + 1) % CN_CLASS_SLOTS; /* half the slots are empty: this ends */
    return slot;
}

uint32_t cn_class_find(const struct cn_arena *a, uint32_t extent_pages)
{
    const uint32_t entry = a->class_slots[class_probe(a, extent_pages)];
    return entry == 0 ? CN_NOWHERE : entry - 1;
}

uint32_t cn_class_add(struct cn_arena *a, uint32_t extent_pages)
{
    const uint32_t slot = class_probe(a, extent_pages);
    if (a->class_slots[slot] != 0)
        return a->class_slots[slot] - 1u;
    if (a->class_count == CN_CLASSES_MAX)
        return CN_NOWHERE;

    const uint32_t cap = cn_slab_run_cap(extent_pages);
    const uint16_t idx = a->class_unused[a->class_count++];
    a->class_slots[slot] = (uint16_t)(idx + 1);
    if (idx >= a->class_top)
        a->class_top = idx + 1u;
    a->classes[idx] = (struct cn_class){
        .extent_pages = extent_pages,
        .best_run = cn_slab_shape(extent_pages, cap < a->granule_count ? cap : a->granule_count),
        .head = CN_NOWHERE,
        .tail = CN_NOWHERE,
    };
    return idx;
}

/* Take the class out of the hash; entries behind it that probed past it move up. */
static void class_drop(struct cn_arena *a, uint32_t class_idx)
{
    uint32_t hole = class_probe(a, a->classes[class_idx].extent_pages);
    uint32_t slot = (hole + 1) % CN_CLASS_SLOTS;

    for (; a->class_slots[slot] != 0; slot = (slot + 1) % CN_CLASS_SLOTS) {
        const struct cn_class *c = &a->classes[a->class_slots[slot] - 1];
        const uint32_t travelled = (slot - class_slot_of(c->extent_pages)) % CN_CLASS_SLOTS;
        if (travelled < (slot - hole) % CN_CLASS_SLOTS)
            continue; /* its own slot lies behind the hole */
        a->class_slots[hole] = a->class_slots[slot];
        hole = slot;
    }
    a->class_slots[hole] = 0;
    a->classes[class_idx].extent_pages = 0;
    a->class_unused[--a->class_count] = (uint16_t)class_idx;
}

uint32_t cn_class_larger(const struct cn_arena *a, uint32_t extent_pages, bool with_room)
{
    uint32_t best = CN_NOWHERE;
    uint32_t best_pages = UINT32_MAX;

    for (uint32_t i = 0; i < a->class_top; i++) {
        const struct cn_class *c = &a->classes[i];
        if (c->extent_pages <= extent_pages || c->extent_pages >= best_pages)
            continue;
        if ((c->extent_pages - extent_pages) * CN_INNER_WASTE_SHARE > c->extent_pages)
            continue;
        if (with_room && c->free_count == 0)
            continue;
        best = i;
        best_pages = c->extent_pages;
    }
    return best;
}

/* Slabs */

void cn_slab_link_head(struct cn_arena *a, uint32_t head)
{
    struct cn_slab *s = &a->slabs[head];
    struct cn_class *c = &a->classes[s->class_idx];
    s->prev = CN_NOWHERE;
    s->next = c->head;
    if (c->head == CN_NOWHERE)
        c->tail = head;
    else
        a->slabs[c->head].prev = head;
    c->head = head;
}

static void slab_link_tail(struct cn_arena *a, uint32_t head)
{
    struct cn_slab *s = &a->slabs[head];
    struct cn_class *c = &a->classes[s->class_idx];
    s->next = CN_NOWHERE;
    s->prev = c->tail;
    if (c->tail == CN_NOWHERE)
        c->head = head;
    else
        a->slabs[c->tail].next = head;
    c->tail = head;
}

void cn_slab_unlink(struct cn_arena *a, uint32_t head)
{
    const struct cn_slab *s = &a->slabs[head];
    struct cn_class *c = &a->classes[s->class_idx];
    if (s->prev == CN_NOWHERE)
        c->head = s->next;
    else
        a->slabs[s->prev].next = s->next;
    if (s->next == CN_NOWHERE)
        c->tail = s->prev;
    else
        a->slabs[s->next].prev = s->prev;
}

void cn_slab_enter(struct cn_arena *a, uint32_t class_idx, uint32_t first, uint32_t run_granules)
{
    struct cn_class *c = &a->classes[class_idx];
    const uint32_t run_pages = run_granules * CN_GRANULE_PAGES;

    cn_run_claim(a, first, run_granules);
    for (uint32_t g = first; g < first + run_granules; g++)
        a->head_of[g] = first + 1;
    /* used_bits need no clearing: every extent that was here before has been freed */
    a->slabs[first] = (struct cn_slab){
        .extent_pages = c->extent_pages,
        .run_granules = (uint16_t)run_granules,
        .extent_count = (uint16_t)(run_pages / c->extent_pages),
        .class_idx = (uint16_t)class_idx,
    };
    slab_link_tail(a, first);
    c->slab_count++;
    c->empty_count++;
    c->free_count += a->slabs[first].extent_count;
    a->empty_count++;
    a->slab_count++;
    a->slab_granules += run_granules;
    a->waste_pages += run_pages % c->extent_pages;
}

/* An empty slab gives its granules back; its class goes with its last slab. */
void cn_slab_return(struct cn_arena *a, uint32_t head)
{
    struct cn_slab *s = &a->slabs[head];
    struct cn_class *c = &a->classes[s->class_idx];
    const uint32_t run = s->run_granules;

    /* The other granules of a run hold 0 for as long as they are not heads: the head is the one
     * word that changes, when a slab is made and when it is given back. */
    a->store(a->store_ctx, head, CN_SLAB_FREE);
    if (!s->closed) {
        cn_slab_unlink(a, head);
        c->free_count -= s->extent_count;
        c->empty_count--;
        a->empty_count--;
        cn_run_release(a, head, run); /* a closed window withholds its granules until it opens */
    }
    memset(&a->head_of[head], 0, run * sizeof(a->head_of[0]));
    a->slab_count--;
    a->slab_granules -= run;
    a->waste_pages -= run * CN_GRANULE_PAGES % s->extent_pages;
    s->extent_pages = 0;
    if (--c->slab_count == 0)
        class_drop(a, s->class_idx);
}

/* What was kept as hysteresis goes when somebody else needs the granules, or the class. */
static void slabs_return_empty(struct cn_arena *a)
{
    for (uint32_t i = 0; i < a->class_top && a->empty_count > 0; i++) {
        while (a->classes[i].empty_count > 0)
            cn_slab_return(a, a->classes[i].tail);
    }
}

/* A slab for the class, of the best length or of a shorter one. */
static bool slab_make(struct cn_arena *a, uint32_t class_idx)
{
    const uint32_t pages = a->classes[class_idx].extent_pages;
    uint32_t run = a->classes[class_idx].best_run;
    uint32_t first = cn_run_find(a, run);

    if (first == CN_NOWHERE && a->empty_count > 0) {
        slabs_return_empty(a); /* none is of this class: it has no room */
        first = cn_run_find(a, run);
    }
    if (first == CN_NOWHERE) {
        const uint32_t longest = cn_run_longest(a, cn_granules_of(pages), run);
        if (longest == 0)
            return false;
        run = cn_slab_shape(pages, longest);
        first = cn_run_find(a, run);
    }
    cn_slab_enter(a, class_idx, first, run);
    a->store(a->store_ctx, first, cn_slab_word(pages, run));
    return true;
}

/* A class with room for an extent of so many pages, by every means short of taking from others. */
static uint32_t class_make_room(struct cn_arena *a, uint32_t pages)
{
    if (a->class_count == CN_CLASSES_MAX && cn_class_find(a, pages) == CN_NOWHERE)
        slabs_return_empty(a);
    const uint32_t own = cn_class_add(a, pages);
    if (own != CN_NOWHERE) {
        if (slab_make(a, own))
            return own;
        if (a->classes[own].slab_count == 0)
            class_drop(a, own);
    }
    const uint32_t larger = cn_class_larger(a, pages, true);
    if (larger != CN_NOWHERE || own != CN_NOWHERE)
        return larger;
    /* No class can be added: a new slab of a size that is there already serves as well. */
    const uint32_t grown = cn_class_larger(a, pages, false);
    return grown != CN_NOWHERE && slab_make(a, grown) ? grown : CN_NOWHERE;
}

void cn_slab_use(struct cn_arena *a, uint32_t head, uint32_t extent)
{
    struct cn_slab *s = &a->slabs[head];
    struct cn_class *c = &a->classes[s->class_idx];

    cn_slab_bits(a, head)[extent / 64] |= (uint64_t)1 << (extent % 64);
    if (s->used_count == 0) {
        c->empty_count--;
        a->empty_count--;
    }
    s->used_count++;
    c->free_count--;
    a->used_pages += s->extent_pages;
    if (s->used_count == s->extent_count) {
        s->hint = s->extent_count / 64; /* the next free one says where to look */
        cn_slab_unlink(a, head);
    }
}

/* The lowest free extent of a slab that has room. */
static uint32_t slab_first_free(const struct cn_arena *a, uint32_t head)
{
    const struct cn_slab *s = &a->slabs[head];
    if (s->extent_count <= 64)
        return (uint32_t)__builtin_ctzll(~s->bits);
    const uint64_t *words = &a->used_bits[(size_t)head * CN_GRANULE_WORDS];
    return cn_bits_next(words, s->hint * 64u, s->extent_count, false);
}

int cn_arena_alloc(struct cn_arena *a, uint64_t data_bytes, uint64_t *ret_off,
                   uint64_t *ret_extent_bytes)
{
    uint32_t pages = 0;
    const int rc = cn_pages_of(a, data_bytes, &pages);
    if (rc != CN_OK)
        return rc;
    uint32_t class_idx = cn_class_find(a, pages);
    if (class_idx == CN_NOWHERE || a->classes[class_idx].head == CN_NOWHERE)
        class_idx = class_make_room(a, pages);
    if (class_idx == CN_NOWHERE)
        return CN_EFULL;

    const uint32_t head = a->classes[class_idx].head;
    struct cn_slab *s = &a->slabs[head];
    const uint32_t extent = slab_first_free(a, head);
    s->hint = (uint16_t)(extent / 64);
    cn_slab_use(a, head, extent);
    *ret_off =
        (uint64_t)head * CN_GRANULE_BYTES + (uint64_t)extent * s->extent_pages * CN_PAGE_BYTES;
    *ret_extent_bytes = (uint64_t)s->extent_pages * CN_PAGE_BYTES;
    return CN_OK;
}

uint32_t cn_slab_locate(const struct cn_arena *a, uint64_t off, uint32_t *ret_extent)
{
    const uint64_t granule = off / CN_GRANULE_BYTES;
    if (granule >= a->granule_count || off % CN_PAGE_BYTES != 0 || a->head_of[granule] == 0)
        return CN_NOWHERE;
    const uint32_t head = a->head_of[granule] - 1;
    const struct cn_slab *s = &a->slabs[head];
    const uint32_t page = (uint32_t)(off / CN_PAGE_BYTES - (uint64_t)head * CN_GRANULE_PAGES);
    const uint32_t extent = page / s->extent_pages;
    if (extent * s->extent_pages != page || extent >= s->extent_count)
        return CN_NOWHERE;
    *ret_extent = extent;
    return head;
}

/* The slab and number of an extent that is allocated. */
static uint32_t slab_locate_used(const struct cn_arena *a, uint64_t off, uint32_t *ret_extent)
{
    const uint32_t head = cn_slab_locate(a, off, ret_extent);
    if (head == CN_NOWHERE)
        return CN_NOWHERE;
    const bool used = cn_bits_get(cn_slab_bits(a, head), *ret_extent);
    return used ? head : CN_NOWHERE;
}

/* After an extent of an open slab was freed: its place in the list, and what is kept. */
static void slab_relink(struct cn_arena *a, uint32_t head)
{
    struct cn_slab *s = &a->slabs[head];
    struct cn_class *c = &a->classes[s->class_idx];
    const bool was_full = s->used_count + 1 == s->extent_count;

    c->free_count++;
    if (s->used_count > 0) {
        if (was_full)
            cn_slab_link_head(a, head);
        return;
    }
    if (!was_full)
        cn_slab_unlink(a, head);
    slab_link_tail(a, head);
    c->empty_count++;
    a->empty_count++;
    if (c->empty_count > 1)
        cn_slab_return(a, s->prev); /* keep the one used last; those before it in the tail go */
}

int cn_arena_free(struct cn_arena *a, uint64_t off)
{
    uint32_t extent = 0;
    const uint32_t head = slab_locate_used(a, off, &extent);
    if (head == CN_NOWHERE)
        return CN_EINVAL;

    struct cn_slab *s = &a->slabs[head];
    const uint32_t word = extent / 64;
    cn_slab_bits(a, head)[word] &= ~((uint64_t)1 << (extent % 64));
    if (word < s->hint)
        s->hint = (uint16_t)word;
    s->used_count--;
    a->used_pages -= s->extent_pages;
    if (!s->closed)
        slab_relink(a, head);
    else if (s->used_count == 0)
        cn_slab_return(a, head);
    return CN_OK;
}

uint64_t cn_arena_extent_bytes(const struct cn_arena *a, uint64_t off)
{
    uint32_t extent = 0;
    const uint32_t head = slab_locate_used(a, off, &extent);
    return head == CN_NOWHERE ? 0 : (uint64_t)a->slabs[head].extent_pages * CN_PAGE_BYTES;
}

void cn_arena_stats(const struct cn_arena *a, struct cn_arena_stats *ret_stats)
{
    *ret_stats = (struct cn_arena_stats){
        .region_bytes = a->region_bytes,
        .extent_bytes = a->used_pages * CN_PAGE_BYTES,
        .slab_bytes = (uint64_t)a->slab_granules * CN_GRANULE_BYTES,
        .waste_bytes = a->waste_pages * CN_PAGE_BYTES,
        .free_granules = a->granule_count - a->slab_granules,
        .slab_count = a->slab_count,
        .class_count = a->class_count,
    };
}

uint64_t cn_arena_free_extents(const struct cn_arena *a, uint64_t data_bytes)
{
    uint32_t pages = 0;
    if (cn_pages_of(a, data_bytes, &pages) != CN_OK)
        return 0;
    const uint32_t class_idx = cn_class_find(a, pages);
    return class_idx == CN_NOWHERE ? 0 : a->classes[class_idx].free_count;
}
