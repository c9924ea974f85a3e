/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Thousands of random operations against a reference that knows the owner of every page.
 *
 * The reference trusts only the slab table, as a successor would: every extent lies in a slab of
 * its size, none overlaps, EFULL is said only when there is no room, the reclaim window is the
 * cheapest of all, and an arena rebuilt from the table and the extents says what the first one
 * said.
 *
 *   test_arena_model [seed [operations]]      without arguments: eight seeds
 */
#include "arena_books.h"
#include "cn_arena_internal.h"

enum { GRANULES = 150, PAGES = GRANULES * 512, LIVE_MAX = 4096 };

struct extent {
    uint64_t off;
    uint32_t pages;
};

struct model {
    struct books *books;
    struct books spare[2]; /* the arena in use and its successor */
    uint32_t owner[PAGES]; /* index in live + 1 */
    struct extent live[LIVE_MAX];
    uint32_t live_count;
    uint32_t closed_first; /* granules */
    uint32_t closed_end;
    uint64_t rng_state;
    uint32_t fulls, windows, rebuilds;
};

static uint64_t rng(struct model *m, uint64_t below)
{
    uint64_t x = m->rng_state;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    m->rng_state = x;
    return (x >> 11) % below;
}

/* KV sizes of real models, small records, and now and then anything. */
static uint64_t size_draw(struct model *m)
{
    static const uint64_t models[] = {32 * MIB, 10 * MIB, 14 * MIB,       17989632, 8 * MIB,
                                      16 * MIB, MIB,      MIB + 64 * KIB, 640 * KIB};
    const uint64_t kind = rng(m, 100);
    if (kind < 45)
        return models[rng(m, sizeof(models) / sizeof(models[0]))];
    if (kind < 80)
        return 1 + rng(m, 64 * KIB);
    if (kind < 97)
        return 1 + rng(m, 4 * MIB);
    return 1 + rng(m, 90 * MIB);
}

static bool granule_closed(const struct model *m, uint32_t g)
{
    return g >= m->closed_first && g < m->closed_end;
}

/* Allocated pages of the slab at head, from the reference alone. */
static uint32_t slab_used_pages(const struct model *m, uint32_t head)
{
    const uint32_t run = word_run(m->books->table[head]);
    uint32_t used = 0;
    for (uint32_t page = head * 512; page < (head + run) * 512; page++)
        used += m->owner[page] != 0;
    return used;
}

/* Would any way that the contract names have found room? */
static bool room_for(const struct model *m, uint32_t pages)
{
    uint32_t free_run = 0;
    for (uint32_t g = 0; g < GRANULES;) {
        const uint64_t word = m->books->table[g];
        if (word == 0) {
            free_run = granule_closed(m, g++) ? 0 : free_run + 1;
        } else {
            const uint32_t extent = word_pages(word), used = slab_used_pages(m, g);
            const bool has_room = used / extent < word_run(word) * 512 / extent;
            const bool closed = granule_closed(m, g);
            if (!closed && has_room && extent >= pages && (extent - pages) * 8 <= extent)
                return true;
            free_run = closed || used > 0 ? 0 : free_run + word_run(word);
            g += word_run(word);
        }
        if (free_run >= (pages + 511) / 512)
            return true;
    }
    return false;
}

static bool model_alloc(struct model *m, uint64_t data_bytes)
{
    uint64_t off = 0, extent_bytes = 0;
    const uint32_t want = (uint32_t)((data_bytes + 4095) / 4096);
    if (m->live_count == LIVE_MAX)
        return false;
    const int rc = cn_arena_alloc(m->books->arena, data_bytes, &off, &extent_bytes);
    if (rc != CN_OK) {
        CHECK_EQ(rc, CN_EFULL);
        CHECK_MSG(!room_for(m, want), "EFULL for %u pages with room left", want);
        m->fulls++;
        return false;
    }
    const uint32_t pages = (uint32_t)(extent_bytes / 4096), first = (uint32_t)(off / 4096);
    CHECK(pages >= want && (pages - want) * 8 <= pages && first + pages <= PAGES);
    const uint32_t head = books_head_of(m->books, first / 512);
    CHECK(head != UINT32_MAX && !granule_closed(m, head));
    CHECK_EQ(word_pages(m->books->table[head]), pages);
    CHECK_EQ((first - head * 512) % pages, 0);
    CHECK(first + pages <= (head + word_run(m->books->table[head])) * 512);
    m->live[m->live_count++] = (struct extent){off, pages};
    for (uint32_t page = first; page < first + pages; page++) {
        CHECK_MSG(m->owner[page] == 0, "page %u belongs to two extents", page);
        m->owner[page] = m->live_count;
    }
    return true;
}

static void model_free(struct model *m, uint32_t i)
{
    const struct extent gone = m->live[i];
    const uint32_t first = (uint32_t)(gone.off / 4096);
    CHECK_EQ(cn_arena_extent_bytes(m->books->arena, gone.off), gone.pages * KIB * 4);
    CHECK_EQ(cn_arena_free(m->books->arena, gone.off), CN_OK);
    CHECK_EQ(cn_arena_free(m->books->arena, gone.off), CN_EINVAL);
    memset(&m->owner[first], 0, gone.pages * sizeof(m->owner[0]));
    const struct extent last = m->live[--m->live_count];
    if (i == m->live_count)
        return;
    m->live[i] = last;
    for (uint32_t page = 0; page < last.pages; page++)
        m->owner[last.off / 4096 + page] = i + 1;
}

/* In each class's list: every open slab with room, once, the empty ones last and counted. */
static void lists_check(const struct model *m)
{
    const struct cn_arena *a = m->books->arena;
    uint32_t listed = 0, with_room = 0, empty = 0;
    for (uint32_t g = 0; g < GRANULES; g++) {
        const struct cn_slab *s = &a->slabs[g];
        with_room += s->extent_pages != 0 && !s->closed && s->used_count < s->extent_count;
    }
    for (uint32_t i = 0; i < CN_CLASSES_MAX; i++) {
        uint32_t empty_here = 0, prev = CN_NOWHERE;
        if (a->classes[i].extent_pages == 0)
            continue;
        CHECK_EQ(cn_class_find(a, a->classes[i].extent_pages), i);
        for (uint32_t at = a->classes[i].head; at != CN_NOWHERE; at = a->slabs[at].next) {
            CHECK_EQ(a->slabs[at].prev, prev);
            CHECK_EQ(a->slabs[at].class_idx, i);
            empty_here += a->slabs[at].used_count == 0;
            CHECK(empty_here == 0 || a->slabs[at].used_count == 0);
            listed++;
            prev = at;
        }
        CHECK_EQ(a->classes[i].tail, prev);
        CHECK_EQ(a->classes[i].empty_count, empty_here);
        empty += empty_here;
    }
    CHECK_EQ(listed, with_room);
    CHECK_EQ(a->empty_count, empty);
}

/* The counts follow from the table and the live extents; free extents from the two as well. */
static void model_check(const struct model *m)
{
    uint64_t slab_bytes = 0, waste_bytes = 0, extent_bytes = 0;
    uint32_t slabs = 0;
    lists_check(m);
    for (uint32_t i = 0; i < m->live_count; i++) {
        const uint32_t head = books_head_of(m->books, (uint32_t)(m->live[i].off / (2 * MIB)));
        CHECK(head != UINT32_MAX);
        CHECK_EQ(word_pages(m->books->table[head]), m->live[i].pages);
        extent_bytes += m->live[i].pages * KIB * 4;
    }
    for (uint32_t g = 0; g < GRANULES; g++) {
        const uint64_t word = m->books->table[g];
        if (word == 0)
            continue;
        uint64_t free_count = 0;
        for (uint32_t other = 0; other < GRANULES; other++) {
            const uint64_t same = m->books->table[other];
            if (word_pages(same) == word_pages(word) && !granule_closed(m, other))
                free_count += word_run(same) * 512 / word_pages(same) -
                              slab_used_pages(m, other) / word_pages(same);
        }
        CHECK_EQ(cn_arena_free_extents(m->books->arena, word_pages(word) * KIB * 4), free_count);
        slabs++;
        slab_bytes += word_run(word) * 2 * MIB;
        waste_bytes += word_run(word) * 512 % word_pages(word) * 4 * KIB;
    }
    const struct cn_arena_stats stats = books_stats(m->books);
    CHECK_EQ(stats.extent_bytes, extent_bytes);
    CHECK_EQ(stats.slab_bytes, slab_bytes);
    CHECK_EQ(stats.waste_bytes, waste_bytes);
    CHECK_EQ(stats.slab_count, slabs);
    CHECK_EQ(stats.free_granules, GRANULES - slab_bytes / (2 * MIB));
}

static bool slab_busy(void *ctx, uint64_t slab_off, uint64_t slab_bytes)
{
    const struct model *m = ctx;
    const uint32_t head = (uint32_t)(slab_off / (2 * MIB));
    CHECK_EQ(word_run(m->books->table[head]) * 2 * MIB, slab_bytes);
    return (head * 2654435761u >> 16) % 5 == 0;
}

/* Cost in pages of the whole slabs in [first, end); UINT32_MAX if it cuts or holds what it may
 * not. */
static uint32_t window_cost(struct model *m, uint32_t first, uint32_t end)
{
    uint32_t cost = 0;
    for (uint32_t g = first; g < end;) {
        const uint64_t word = m->books->table[g];
        if (word == 0 && books_head_of(m->books, g) != UINT32_MAX)
            return UINT32_MAX;
        if (word != 0 &&
            (g + word_run(word) > end || slab_busy(m, g * 2 * MIB, word_run(word) * 2 * MIB)))
            return UINT32_MAX;
        cost += word == 0 ? 0 : slab_used_pages(m, g);
        g += word == 0 ? 1 : word_run(word);
    }
    return cost;
}

static uint32_t window_cost_min(struct model *m, uint32_t need)
{
    uint32_t best = UINT32_MAX;
    for (uint32_t first = 0; first + need <= GRANULES; first++) {
        uint32_t end = first + need; /* the shortest that does not cut a slab at its end */
        const uint32_t head = end < GRANULES ? books_head_of(m->books, end) : UINT32_MAX;
        if (head != UINT32_MAX && head != end)
            end = head + word_run(m->books->table[head]);
        const uint32_t cost = window_cost(m, first, end);
        best = cost < best ? cost : best;
    }
    return best;
}

/* Empty the cheapest window while others go on, then the extent fits. */
static void model_reclaim(struct model *m)
{
    const uint64_t data_bytes = size_draw(m);
    const uint32_t need = (uint32_t)((data_bytes + 2 * MIB - 1) / (2 * MIB));
    uint64_t off = 0, bytes = 0;
    const uint32_t least = window_cost_min(m, need);
    const int rc = cn_arena_reclaim_window(m->books->arena, data_bytes, slab_busy, m, &off, &bytes);
    CHECK_EQ(rc, least == UINT32_MAX ? CN_EFULL : CN_OK);
    if (rc != CN_OK)
        return;
    const uint32_t first = (uint32_t)(off / (2 * MIB)), end = (uint32_t)((off + bytes) / (2 * MIB));
    CHECK(end <= GRANULES && end - first >= need);
    CHECK_EQ(window_cost(m, first, end), least);

    cn_arena_close_window(m->books->arena, off, bytes);
    m->closed_first = first, m->closed_end = end;
    m->windows++;
    for (int i = 0; i < 20; i++)
        model_alloc(m, size_draw(m));
    model_check(m);
    if (rng(m, 8) != 0) { /* else: given up half way */
        for (uint32_t i = m->live_count; i-- > 0;) {
            if (granule_closed(m, (uint32_t)(m->live[i].off / (2 * MIB))))
                model_free(m, i);
        }
        for (uint32_t g = first; g < end; g++)
            CHECK_EQ(m->books->table[g], 0);
        cn_arena_close_window(m->books->arena, 0, 0);
        m->closed_first = m->closed_end = 0;
        CHECK(m->live_count == LIVE_MAX || model_alloc(m, data_bytes));
    }
    cn_arena_close_window(m->books->arena, 0, 0);
    m->closed_first = m->closed_end = 0;
}

/* A second arena from the recorded words and the live extents takes over. */
static void model_rebuild(struct model *m)
{
    struct books *next = m->books == &m->spare[0] ? &m->spare[1] : &m->spare[0];
    *next = books_open(GRANULES * 2 * MIB);
    books_start(next, GRANULES * 2 * MIB);
    memcpy(next->table, m->books->table, GRANULES * sizeof(next->table[0]));
    for (uint32_t g = 0; g < GRANULES; g++)
        CHECK_EQ(cn_arena_adopt_slab(next->arena, g, next->table[g]), CN_OK);
    for (uint32_t i = m->live_count; i-- > 0;) {
        CHECK_EQ(cn_arena_adopt_extent(next->arena, m->live[i].off), CN_OK);
        CHECK_EQ(cn_arena_adopt_extent(next->arena, m->live[i].off), CN_ECORRUPT);
    }
    CHECK_EQ(next->stores, 0);
    stats_equal(books_stats(m->books), books_stats(next));
    books_close(m->books);
    m->books = next;
    m->rebuilds++;
    model_check(m);
}

static void model_run(uint64_t seed, uint32_t operations)
{
    struct model *m = calloc(1, sizeof(*m));
    CHECK(m != NULL);
    m->rng_state = seed * 2654435761u + 1;
    m->books = &m->spare[0];
    *m->books = books_open(GRANULES * 2 * MIB);
    books_start(m->books, GRANULES * 2 * MIB);
    for (uint32_t i = 0; i < operations; i++) {
        const uint64_t kind = rng(m, 1000);
        const bool filling = i / 500 % 2 == 0; /* waves: fill to the brim, then drain */
        if (kind >= 998)
            model_rebuild(m);
        else if (kind >= 990)
            model_reclaim(m);
        else if (kind < (filling ? 700 : 400) || m->live_count == 0)
            model_alloc(m, size_draw(m));
        else
            model_free(m, (uint32_t)rng(m, m->live_count));
        if (i % 64 == 0)
            model_check(m);
    }
    while (m->live_count > 0)
        model_free(m, m->live_count - 1);
    model_check(m);
    CHECK(model_alloc(m, GRANULES * 2 * MIB)); /* nothing is left that could not be given up */
    printf("  seed %llu: %u operations, %u full, %u windows, %u rebuilds\n",
           (unsigned long long)seed, operations, m->fulls, m->windows, m->rebuilds);
    books_close(m->books);
    free(m);
}

int main(int argc, char **argv)
{
    const uint32_t operations = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 0) : 4000;
    if (argc > 1) {
        model_run(strtoull(argv[1], NULL, 0), operations);
        return TEST_PASS;
    }
    for (uint64_t seed = 1; seed <= 8; seed++)
        model_run(seed, operations);
    return TEST_PASS;
}
