/* SPDX-License-Identifier: Apache-2.0 */
/* Who may leave, who must wait, and how memory is found for a size that has none. */
#include <stdlib.h>

#include "cn_crash.h"
#include "cn_keeper.h"

/* candidates passed over in one batch, besides the leased ones */
#define SHRINK_PAUSE_NS 2000000ull
#define VICTIM_SKIPS 512u

/* ---- the scan ------------------------------------------------------------- */

static void mark_leased(struct cn_keeper *k, uint64_t ref)
{
    uint32_t d = cn_ref_d(ref);
    if (d >= k->catalog.chunk_count || cn_word_gen(cn_chunk_word(k, d)) != cn_ref_gen(ref))
        return; /* stale, or nonsense from a hostile table: names nothing that could be freed */
    uint64_t bit = 1ull << (d % 64);
    if ((k->leased[d / 64] & bit) != 0)
        return;
    k->leased[d / 64] |= bit;
    k->leased_list[k->leased_count++] = d;
}

void cn_scan_leases(struct cn_keeper *k)
{
    for (uint32_t i = 0; i < k->leased_count; i++)
        k->leased[k->leased_list[i] / 64] = 0;
    k->leased_count = 0;
    k->leased_round = k->round;
    for (uint32_t i = 0; i < k->session_count; i++) {
        const struct cn_session *s = k->sessions[k->session_list[i]];
        /* Client-written: too small harms only the liar's own leases, too large is clamped. */
        uint64_t high = cn_load_acquire(&s->head->lease_high);
        if (high > k->catalog.lease_slots)
            high = k->catalog.lease_slots;
        for (uint64_t slot = 0; slot < high; slot++) {
            /* pairs with clear_slot()'s release */
            uint64_t ref = cn_load_acquire(&s->leases[slot]);
            if (ref != 0)
                mark_leased(k, ref);
        }
    }
}

bool cn_is_leased(const struct cn_keeper *k, uint32_t d)
{
    return (k->leased[d / 64] >> (d % 64) & 1) != 0;
}

void cn_unlink_flush(struct cn_keeper *k)
{
    if (k->unlink.count == 0)
        return;
    /* DYING before the scan: pairs with the reader's fence after its publish (I3) */
    cn_fence_keeper();
    cn_scan_leases(k);
    uint32_t n = k->unlink.count;
    CN_CRASH_POINT(dying_scanned);
    k->unlink.count = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t d = k->unlink.d[i];
        if (cn_is_leased(k, d))
            k->limbo[k->limbo_count++] = d;
        else
            cn_free(k, d);
    }
    k->count.limbo_chunks = k->limbo_count;
}

void cn_limbo_look(struct cn_keeper *k)
{
    k->limbo_look_ns = k->monotonic_ns;
    if (k->limbo_count == 0)
        return;
    cn_scan_leases(k);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < k->limbo_count; i++) {
        uint32_t d = k->limbo[i];
        if (cn_is_leased(k, d))
            k->limbo[kept++] = d;
        else
            cn_free(k, d);
    }
    k->limbo_count = kept;
    k->count.limbo_chunks = kept;
}

/* ---- victims -------------------------------------------------------------- */

static uint32_t now_s(const struct cn_keeper *k)
{
    return (uint32_t)(k->realtime_ns / 1000000000ull);
}

/* The domain to take from: the lowest priority band first, in it the one whose victim is oldest. */
static struct cn_policy *pick_domain(struct cn_keeper *k, uint32_t ns)
{
    struct cn_policy *best = NULL;
    uint32_t best_band = 0;
    uint32_t best_age = 0;
    for (uint32_t i = 0; i < k->domain_count; i++) {
        uint32_t id = k->domain_list[i];
        struct cn_policy *p = k->domains[id];
        if (k->domain_skips[id] >= p->resident || (ns != 0 && (id - 1) / CN_BANDS != ns))
            continue; /* empty, all of it was passed over in this batch, or not asked for */
        uint32_t band = (id - 1) % CN_BANDS;
        uint32_t victim = p->ops->victim(p, now_s(k));
        if (victim == CN_NONE)
            continue;
        uint32_t age = now_s(k) - k->nodes[victim].last_use_s;
        if (best == NULL || band < best_band || (band == best_band && age > best_age)) {
            best = p;
            best_band = band;
            best_age = age;
        }
    }
    return best;
}

static bool may_leave(const struct cn_keeper *k, uint32_t d)
{
    return !cn_is_leased(k, d) && !(k->leaf_first && k->children[d] > 0);
}

static void read_all_access(struct cn_keeper *k)
{
    for (uint32_t i = 0; i < k->session_count; i++)
        cn_session_read_access(k, k->sessions[k->session_list[i]]);
}

uint64_t cn_evict_batch(struct cn_keeper *k, uint32_t ns, uint64_t want_bytes, uint32_t reason)
{
    uint64_t bytes = 0;
    cn_unlink_flush(k);
    read_all_access(k);
    if (k->leased_round != k->round)
        cn_scan_leases(k);
    uint32_t skips = VICTIM_SKIPS + k->leased_count;
    for (uint32_t i = 0; i < k->domain_count; i++)
        k->domain_skips[k->domain_list[i]] = 0;
    while (k->unlink.count < CN_UNLINK_BATCH && bytes < want_bytes) {
        struct cn_policy *p = pick_domain(k, ns);
        if (p == NULL)
            break;
        uint32_t d = p->ops->victim(p, now_s(k));
        if (!may_leave(k, d)) {
            p->ops->skip(p, d, now_s(k));
            k->domain_skips[k->nodes[d].domain]++;
            if (skips-- == 0)
                break;
            continue;
        }
        uint32_t of = cn_place_ns(k->catalog.chunks[d].place);
        bytes += cn_extent_bytes(k, d);
        cn_unlink_one(k, d, CN_EVENT_EVICTED, reason);
        k->count.evictions++;
        cn_store_relaxed(&k->catalog.namespaces[of].evictions,
                         k->catalog.namespaces[of].evictions + 1);
    }
    cn_unlink_flush(k);
    return bytes;
}

bool cn_shrink(struct cn_keeper *k)
{
    if (k->count.live_bytes > k->high_bytes)
        k->shrinking = true;
    if (k->count.live_bytes <= k->low_bytes)
        k->shrinking = false;
    if (!k->shrinking || k->monotonic_ns < k->shrink_again_ns)
        return false;
    if (cn_evict_batch(k, 0, k->count.live_bytes - k->low_bytes, CN_BY_POLICY) > 0)
        return true;
    k->shrink_again_ns = k->monotonic_ns + SHRINK_PAUSE_NS; /* all that is left is in use */
    return false;
}

/* ---- room for one size ---------------------------------------------------- */

static bool room_for(struct cn_keeper *k, uint64_t extent_bytes)
{
    uint64_t off;
    uint64_t bytes;
    if (k->free_head == CN_NONE && k->fresh >= k->catalog.chunk_count)
        return false;
    for (uint32_t region = 0; region < k->region_count; region++) {
        if (cn_arena_alloc(k->arena[region], extent_bytes, &off, &bytes) == CN_OK) {
            cn_arena_free(k->arena[region], off);
            return true;
        }
    }
    return false;
}

bool cn_make_room(struct cn_keeper *k, uint64_t extent_bytes)
{
    uint64_t enough = extent_bytes > k->capacity_bytes / 64 ? extent_bytes : k->capacity_bytes / 64;
    uint64_t gone = 0;
    cn_limbo_look(k);
    /* There is memory, only in pieces: what lies unused in stocks goes before any chunk. */
    if (k->count.live_bytes + k->count.granted_bytes + extent_bytes <= k->high_bytes)
        cn_revoke_stock(k, CN_STOCK_IDLE_NS);
    for (uint32_t round = 0; round < CN_SHIFT_MAX && gone < enough; round++) {
        if (room_for(k, extent_bytes))
            return true;
        uint64_t bytes = cn_evict_batch(k, 0, enough - gone, CN_BY_POLICY);
        if (bytes == 0)
            break;
        gone += bytes;
    }
    if (room_for(k, extent_bytes))
        return true;
    cn_revoke_stock(k, 0);
    bool room = room_for(k, extent_bytes) || cn_reclaim(k, extent_bytes);
    k->wanted = !room;
    return room;
}

/* ---- emptying slabs ------------------------------------------------------- */

struct busy_list { /* offsets in one region that must not be touched, sorted */
    uint64_t *off;
    uint32_t count;
};

static int by_offset(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a;
    uint64_t y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static bool slab_is_busy(void *ctx, uint64_t slab_off, uint64_t slab_bytes)
{
    const struct busy_list *busy = ctx;
    uint32_t low = 0;
    uint32_t high = busy->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (busy->off[middle] < slab_off)
            low = middle + 1;
        else
            high = middle;
    }
    return low < busy->count && busy->off[low] < slab_off + slab_bytes;
}

/* Granted, dying, pinned or leased: its bytes stay where they are. */
static bool is_fixed(const struct cn_keeper *k, uint32_t d)
{
    uint64_t word = cn_chunk_word(k, d);
    if (cn_word_state(word) == CN_FREE)
        return false;
    return cn_word_state(word) != CN_LIVE || (cn_word_flags(word) & CN_CF_PINNED) != 0 ||
           cn_is_leased(k, d);
}

static bool collect_busy(struct cn_keeper *k, uint32_t region, struct busy_list *ret_busy)
{
    uint32_t room = 0;
    for (uint32_t d = 0; d < k->fresh; d++)
        room += is_fixed(k, d);
    uint64_t *off = malloc((room + 1) * sizeof(*off));
    if (off == NULL)
        return false;
    uint32_t count = 0;
    for (uint32_t d = 0; d < k->fresh && count < room; d++)
        if (is_fixed(k, d) && cn_place_region(k->catalog.chunks[d].place) == region)
            off[count++] = k->catalog.chunks[d].data_off;
    qsort(off, count, sizeof(*off), by_offset);
    *ret_busy = (struct busy_list){off, count};
    return true;
}

struct leaver { /* of a window: could not be moved */
    uint64_t sequence;
    uint32_t d;
};

static int newest_first(const void *a, const void *b)
{
    uint64_t x = ((const struct leaver *)a)->sequence;
    uint64_t y = ((const struct leaver *)b)->sequence;
    return x > y ? -1 : x < y;
}

static void evict_from_window(struct cn_keeper *k, uint32_t d)
{
    cn_unlink_one(k, d, CN_EVENT_EVICTED, CN_BY_RECLAIM);
    k->count.evictions++;
}

/* A child names a parent that was committed before it: the newest first is each chain from its
 * tail. */
static void evict_leavers(struct cn_keeper *k, struct leaver *leavers, uint32_t count)
{
    if (count > 0)
        qsort(leavers, count, sizeof(*leavers), newest_first);
    for (uint32_t i = 0; i < count; i++)
        evict_from_window(k, leavers[i].d);
}

static void empty_window(struct cn_keeper *k, uint32_t region, uint64_t off, uint64_t bytes)
{
    struct cn_moved *moved = malloc(bytes / CN_PAGE_BYTES * sizeof(*moved));
    struct leaver *leavers = malloc(bytes / CN_PAGE_BYTES * sizeof(*leavers));
    uint32_t moved_count = 0;
    uint32_t leaver_count = 0;
    for (uint32_t d = 0; d < k->fresh; d++) {
        const struct cn_chunk *chunk = &k->catalog.chunks[d];
        if (cn_word_state(cn_chunk_word(k, d)) != CN_LIVE ||
            cn_place_region(chunk->place) != region || chunk->data_off < off ||
            chunk->data_off >= off + bytes)
            continue;
        if (moved != NULL && cn_move(k, d, &moved[moved_count]))
            moved_count++;
        else if (leavers != NULL)
            leavers[leaver_count++] = (struct leaver){k->catalog.cold[d].sequence, d};
        else
            evict_from_window(k, d); /* no memory to put them in order */
    }
    cn_moved_adopt(k, moved, moved_count); /* the counts of children are right again */
    evict_leavers(k, leavers, leaver_count);
    free(moved);
    free(leavers);
    cn_unlink_flush(k);
}

bool cn_reclaim(struct cn_keeper *k, uint64_t extent_bytes)
{
    cn_scan_leases(k);
    for (uint32_t region = 0; region < k->region_count; region++) {
        struct busy_list busy;
        uint64_t off;
        uint64_t bytes;
        if (!collect_busy(k, region, &busy))
            return false;
        int status = cn_arena_reclaim_window(k->arena[region], extent_bytes, slab_is_busy, &busy,
                                             &off, &bytes);
        free(busy.off);
        if (status != CN_OK)
            continue;
        cn_arena_close_window(k->arena[region], off, bytes);
        empty_window(k, region, off, bytes);
        cn_arena_close_window(k->arena[region], 0, 0);
        if (room_for(k, extent_bytes))
            return true;
    }
    return false;
}
