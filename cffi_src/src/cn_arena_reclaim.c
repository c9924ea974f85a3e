/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Slabs under pressure, and slabs after a restart: which slabs are the cheapest to empty, how are
 * they kept empty meanwhile, and what did the predecessor have?
 */
#include "cn_arena_internal.h"

#include "cn_status.h"

/* A stretch of granules that a window takes whole, or cannot cross. */
struct cn_span {
    uint32_t first;
    uint32_t end;
    uint32_t used_pages;
    bool slab;
    bool barred; /* in the closed window */
};

struct cn_candidate {
    uint32_t first;
    uint32_t end;
    uint64_t used_pages;
};

struct cn_busy_ask {
    cn_slab_busy_fn fn;
    void *ctx;
};

static struct cn_span span_at(const struct cn_arena *a, uint32_t granule)
{
    if (a->head_of[granule] != 0) {
        const struct cn_slab *s = &a->slabs[granule];
        return (struct cn_span){
            .first = granule,
            .end = granule + s->run_granules,
            .used_pages = s->used_count * s->extent_pages,
            .slab = true,
            .barred = s->closed != 0,
        };
    }
    const bool withheld = !cn_bits_get(a->free_bits, granule);
    return (struct cn_span){
        .first = granule,
        .end = cn_bits_next(a->free_bits, granule, a->granule_count, withheld),
        .barred = withheld,
    };
}

static bool span_busy(const struct cn_span *span, const struct cn_busy_ask *busy)
{
    return span->slab && busy->fn &&
           busy->fn(busy->ctx, (uint64_t)span->first * CN_GRANULE_BYTES,
                    (uint64_t)(span->end - span->first) * CN_GRANULE_BYTES);
}

/* Cut free granules that the window does not need: closing it withholds them from everybody. */
static struct cn_candidate window_trim(const struct cn_arena *a, struct cn_candidate window,
                                       const struct cn_span *last, uint32_t need)
{
    if (a->head_of[window.first] == 0)
        window.first = window.end - need;
    else if (!last->slab)
        window.end = window.first + need; /* behind last->first: the window was too short */
    return window;
}

/* Slide over the region: for each end the shortest window that is long enough. */
static bool window_cheapest(const struct cn_arena *a, uint32_t need, const struct cn_busy_ask *busy,
                            struct cn_candidate *ret_best)
{
    struct cn_candidate best = {.used_pages = UINT64_MAX};
    struct cn_candidate window = {0};

    for (uint32_t g = 0; g < a->granule_count && best.used_pages > 0; g = window.end) {
        const struct cn_span span = span_at(a, g);
        /* A slab that alone costs as much as the best window is in no better one. */
        if (span.barred || span.used_pages >= best.used_pages || span_busy(&span, busy)) {
            window = (struct cn_candidate){.first = span.end, .end = span.end};
            continue;
        }
        window.end = span.end;
        window.used_pages += span.used_pages;
        struct cn_span left = span_at(a, window.first);
        while (window.end - left.end >= need) {
            window.first = left.end;
            window.used_pages -= left.used_pages;
            left = span_at(a, window.first);
        }
        if (window.end - window.first >= need && window.used_pages < best.used_pages)
            best = window_trim(a, window, &span, need);
    }
    *ret_best = best;
    return best.used_pages != UINT64_MAX;
}

/* When the table of classes is full, granules do not help: the cheapest slab that is its class. */
static bool class_cheapest(const struct cn_arena *a, const struct cn_busy_ask *busy,
                           struct cn_candidate *ret_best)
{
    struct cn_candidate best = {.used_pages = UINT64_MAX};

    for (uint32_t g = 0; g < a->granule_count;) {
        const struct cn_span span = span_at(a, g);
        g = span.end;
        if (!span.slab || span.barred || span.used_pages >= best.used_pages)
            continue;
        if (a->classes[a->slabs[span.first].class_idx].slab_count > 1 || span_busy(&span, busy))
            continue;
        best = (struct cn_candidate){span.first, span.end, span.used_pages};
    }
    *ret_best = best;
    return best.used_pages != UINT64_MAX;
}

int cn_arena_reclaim_window(const struct cn_arena *a, uint64_t data_bytes, cn_slab_busy_fn busy,
                            void *ctx, uint64_t *ret_off, uint64_t *ret_bytes)
{
    const struct cn_busy_ask ask = {busy, ctx};
    struct cn_candidate best = {0};
    uint32_t pages = 0;
    const int rc = cn_pages_of(a, data_bytes, &pages);
    if (rc != CN_OK)
        return rc;

    bool classes_full = false;
    if (a->class_count == CN_CLASSES_MAX && cn_class_find(a, pages) == CN_NOWHERE) {
        const uint32_t larger = cn_class_larger(a, pages, false);
        classes_full = larger == CN_NOWHERE;
        pages = classes_full ? pages : a->classes[larger].extent_pages;
    }
    const bool found = classes_full ? class_cheapest(a, &ask, &best)
                                    : window_cheapest(a, cn_granules_of(pages), &ask, &best);
    if (!found)
        return CN_EFULL;
    *ret_off = (uint64_t)best.first * CN_GRANULE_BYTES;
    *ret_bytes = (uint64_t)(best.end - best.first) * CN_GRANULE_BYTES;
    return CN_OK;
}

static void slab_close(struct cn_arena *a, uint32_t head)
{
    struct cn_slab *s = &a->slabs[head];
    if (s->used_count == 0) {
        cn_slab_return(a, head);
        return;
    }
    if (s->used_count < s->extent_count) {
        cn_slab_unlink(a, head);
        a->classes[s->class_idx].free_count -= s->extent_count - s->used_count;
    }
    s->closed = 1;
}

/* A closed slab holds something: it was given back otherwise. */
static void slab_open(struct cn_arena *a, uint32_t head)
{
    struct cn_slab *s = &a->slabs[head];
    s->closed = 0;
    if (s->used_count < s->extent_count) {
        cn_slab_link_head(a, head);
        a->classes[s->class_idx].free_count += s->extent_count - s->used_count;
    }
}

static void window_open(struct cn_arena *a)
{
    uint32_t g = a->window_first;
    const uint32_t end = a->window_end;

    a->window_first = a->window_end = 0;
    while (g < end) {
        const uint32_t first = g;
        if (a->head_of[g] != 0) {
            g += a->slabs[g].run_granules;
            slab_open(a, first);
            continue;
        }
        while (g < end && a->head_of[g] == 0)
            g++;
        cn_run_release(a, first, g - first);
    }
}

void cn_arena_close_window(struct cn_arena *a, uint64_t off, uint64_t bytes)
{
    const uint64_t arena_bytes = (uint64_t)a->granule_count * CN_GRANULE_BYTES;

    window_open(a);
    if (bytes == 0 || off >= arena_bytes)
        return;
    if (bytes > arena_bytes - off)
        bytes = arena_bytes - off;
    uint32_t first = (uint32_t)(off / CN_GRANULE_BYTES);
    uint32_t end = (uint32_t)((off + bytes + CN_GRANULE_BYTES - 1) / CN_GRANULE_BYTES);
    /* a slab is closed whole */
    if (a->head_of[first] != 0)
        first = a->head_of[first] - 1;
    if (a->head_of[end - 1] != 0)
        end = a->head_of[end - 1] - 1 + a->slabs[a->head_of[end - 1] - 1].run_granules;

    for (uint32_t g = first; g < end;) {
        const uint32_t head = g;
        g += a->head_of[g] != 0 ? a->slabs[g].run_granules : 1;
        if (a->head_of[head] != 0)
            slab_close(a, head);
    }
    cn_bits_fill(a->free_bits, first, end - first, false);
    a->window_first = first;
    a->window_end = end;
}

int cn_arena_adopt_slab(struct cn_arena *a, uint32_t granule, uint64_t word)
{
    const uint32_t pages = (uint32_t)(word >> 32);
    const uint32_t run = (uint32_t)word >> 8;

    if (granule >= a->granule_count)
        return CN_ECORRUPT;
    if (word == CN_SLAB_FREE)
        return CN_OK;
    if ((word & 0xff) != CN_SLAB_HEAD || pages == 0 || pages > CN_EXTENT_PAGES_MAX)
        return CN_ECORRUPT;
    if (run < cn_granules_of(pages) || run > cn_slab_run_cap(pages))
        return CN_ECORRUPT; /* no keeper makes such a slab */
    if (run > a->granule_count - granule)
        return CN_ECORRUPT;
    if (cn_bits_next(a->free_bits, granule, granule + run, false) != granule + run)
        return CN_ECORRUPT; /* overlaps another slab */
    const uint32_t class_idx = cn_class_add(a, pages);
    if (class_idx == CN_NOWHERE)
        return CN_ECORRUPT;
    cn_slab_enter(a, class_idx, granule, run);
    return CN_OK;
}

int cn_arena_adopt_extent(struct cn_arena *a, uint64_t off)
{
    uint32_t extent = 0;
    const uint32_t head = cn_slab_locate(a, off, &extent);
    if (head == CN_NOWHERE || a->slabs[head].closed)
        return CN_ECORRUPT;
    if (cn_bits_get(cn_slab_bits(a, head), extent))
        return CN_ECORRUPT; /* two descriptors name one extent */

    struct cn_slab *s = &a->slabs[head];
    if (s->used_count == 0) {
        /* slabs that hold something stand before the empty ones */
        cn_slab_unlink(a, head);
        cn_slab_link_head(a, head);
    }
    cn_slab_use(a, head, extent);
    return CN_OK;
}

void cn_arena_trim(struct cn_arena *a)
{
    for (uint32_t g = 0; g < a->granule_count; g++)
        if (a->slabs[g].extent_pages != 0 && a->slabs[g].used_count == 0 && !a->slabs[g].closed)
            cn_slab_return(a, g);
}
