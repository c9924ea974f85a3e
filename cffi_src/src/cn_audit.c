/* SPDX-License-Identifier: Apache-2.0 */
/* Do descriptors, index, arenas, namespaces and counters tell the same story? For tests and
 * the request `audit`. */
#include <stdlib.h>
#include <string.h>

#include "cn_keeper.h"

struct sums {
    uint64_t live_chunks, live_bytes, granted_bytes, dying, free_descriptors, pinned, extents;
};

static uint64_t audit_descriptor(struct cn_keeper *k, uint32_t d, struct sums *sums)
{
    const struct cn_chunk *chunk = &k->catalog.chunks[d];
    uint32_t state = cn_word_state(chunk->word);
    uint64_t wrong = 0;
    if (state == CN_FREE) {
        sums->free_descriptors++;
        return 0;
    }
    uint32_t region = cn_place_region(chunk->place);
    if (region >= k->region_count)
        return 1;
    uint64_t extent = cn_arena_extent_bytes(k->arena[region], chunk->data_off);
    wrong += extent != cn_extent_bytes(k, d);
    wrong += (uint32_t)chunk->size_crc > extent;
    sums->extents += extent;
    if (state == CN_GRANTED)
        sums->granted_bytes += extent;
    if (state == CN_DYING)
        sums->dying++;
    if (state != CN_LIVE)
        return wrong;
    sums->live_chunks++;
    sums->live_bytes += extent;
    bool pinned = (cn_word_flags(chunk->word) & CN_CF_PINNED) != 0;
    sums->pinned += pinned;
    wrong += pinned == (k->nodes[d].queue != 0);
    struct cn_key key = cn_chunk_key(k, d);
    uint32_t found;
    uint64_t word;
    uint32_t ns = cn_place_ns(chunk->place);
    wrong +=
        !cn_index_find(&k->catalog, cn_chunk_hash(k, d), ns, &key, &found, &word) || found != d;
    return wrong;
}

/* Every entry of the index names a LIVE chunk whose key leads to it. */
static uint64_t audit_index(struct cn_keeper *k)
{
    uint64_t wrong = 0;
    for (uint32_t b = 0; b <= k->catalog.bucket_mask; b++) {
        for (uint32_t i = 0; i < CN_BUCKET_ENTRIES; i++) {
            uint64_t entry = k->catalog.index[b].entry[i];
            uint32_t d = (uint32_t)entry;
            if (entry == 0)
                continue;
            wrong += d >= k->catalog.chunk_count || cn_word_state(cn_chunk_word(k, d)) != CN_LIVE ||
                     cn_hash_tag(cn_chunk_hash(k, d)) != (uint32_t)(entry >> 32);
        }
    }
    return wrong;
}

static uint64_t audit_queues(struct cn_keeper *k)
{
    uint64_t wrong = 0;
    uint64_t queued = 0;
    for (uint32_t i = 0; i < k->domain_count; i++)
        queued += k->domains[k->domain_list[i]]->resident;
    wrong += queued != k->count.live_chunks - k->count.pinned_chunks;
    uint64_t free_list = k->catalog.chunk_count - k->fresh;
    for (uint32_t d = k->free_head; d != CN_NONE && free_list <= k->catalog.chunk_count;
         d = k->nodes[d].next)
        free_list++;
    uint64_t free_words = 0;
    for (uint32_t d = 0; d < k->catalog.chunk_count; d++)
        free_words += cn_word_state(cn_chunk_word(k, d)) == CN_FREE;
    return wrong + (free_list != free_words);
}

static uint64_t audit_sessions(struct cn_keeper *k)
{
    uint64_t granted = 0;
    uint64_t wrong = 0;
    for (uint32_t i = 0; i < k->session_count; i++) {
        const struct cn_session *s = k->sessions[k->session_list[i]];
        uint64_t listed = 0;
        uint32_t steps = 0;
        for (uint32_t d = s->grant_head; d != CN_NONE && steps <= k->catalog.chunk_count;
             d = k->nodes[d].next, steps++)
            listed += cn_extent_bytes(k, d);
        wrong += listed != s->granted_bytes;
        granted += listed;
    }
    return wrong + (granted != k->count.granted_bytes);
}

/* The keeper counts for each chunk the LIVE ones that name it as their parent. */
static uint64_t audit_children(struct cn_keeper *k)
{
    uint64_t wrong = 0;
    uint32_t *counted = calloc(k->catalog.chunk_count, sizeof(*counted));
    if (counted == NULL)
        return 0;
    for (uint32_t d = 0; d < k->catalog.chunk_count; d++) {
        uint32_t parent = cn_word_state(cn_chunk_word(k, d)) == CN_LIVE
                              ? cn_live_of(k, k->catalog.cold[d].parent)
                              : CN_NONE;
        if (parent != CN_NONE)
            counted[parent]++;
    }
    for (uint32_t d = 0; d < k->catalog.chunk_count; d++)
        wrong += cn_word_state(cn_chunk_word(k, d)) == CN_LIVE && counted[d] != k->children[d];
    free(counted);
    return wrong;
}

int cn_do_audit(struct cn_keeper *k, void *args)
{
    uint64_t *wrong = args;
    struct sums sums = {0};
    cn_unlink_flush(k);
    cn_limbo_look(k);
    for (uint32_t d = 0; d < k->catalog.chunk_count; d++)
        *wrong += audit_descriptor(k, d, &sums);
    *wrong += audit_index(k) + audit_queues(k) + audit_sessions(k) + audit_children(k);
    *wrong += sums.live_chunks != k->count.live_chunks;
    *wrong += sums.live_bytes != k->count.live_bytes;
    *wrong += sums.granted_bytes != k->count.granted_bytes;
    *wrong += sums.dying != k->limbo_count;
    *wrong += sums.pinned != k->count.pinned_chunks;
    uint64_t allocated = 0;
    for (uint32_t i = 0; i < k->region_count; i++) {
        struct cn_arena_stats stats;
        cn_arena_stats(k->arena[i], &stats);
        allocated += stats.extent_bytes;
    }
    *wrong += allocated != sums.extents;
    return CN_OK;
}
