/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moving a chunk to another extent: two descriptors, one store in the index (I5).
 *
 * Readers of the old extent keep it until they let go; a crash in between leaves two LIVE
 * descriptors of one key with equal bytes, of which the index names one.
 */
#include "cn_crash.h"
#include "cn_keeper.h"
#include "cn_region.h"

/* d2 takes the place of d in its queue; the policy sees no difference. */
static void policy_replace(struct cn_keeper *k, uint32_t d, uint32_t d2)
{
    struct cn_policy_node *node = &k->nodes[d];
    struct cn_policy *p = k->domains[node->domain];
    k->nodes[d2] = *node;
    if (node->queue == 0 || p == NULL)
        return;
    struct cn_policy_list *list = &p->lists[node->queue - 1];
    if (node->prev == CN_NONE)
        list->head = d2;
    else
        k->nodes[node->prev].next = d2;
    if (node->next == CN_NONE)
        list->tail = d2;
    else
        k->nodes[node->next].prev = d2;
    *node = (struct cn_policy_node){.prev = CN_NONE, .next = CN_NONE};
}

static uint8_t *chunk_bytes(const struct cn_keeper *k, uint32_t d)
{
    const struct cn_chunk *chunk = &k->catalog.chunks[d];
    return k->region_base[cn_place_region(chunk->place)] + chunk->data_off;
}

static void move_cold(struct cn_keeper *k, uint32_t d, uint32_t d2)
{
    uint32_t pages = k->catalog.cold[d2].extent_pages;
    k->catalog.cold[d2] = k->catalog.cold[d];
    k->catalog.cold[d2].extent_pages = pages;
    k->children[d2] = 0; /* they name d until cn_moved_adopt() */
}

bool cn_move(struct cn_keeper *k, uint32_t d, struct cn_moved *ret_moved)
{
    struct cn_chunk *chunk = &k->catalog.chunks[d];
    uint64_t word = cn_chunk_word(k, d);
    uint32_t d2;
    if (cn_descriptor_fill(k, cn_extent_bytes(k, d), 0, &d2) != CN_OK)
        return false;
    struct cn_chunk *copy = &k->catalog.chunks[d2];
    if (cn_guarded_move(chunk_bytes(k, d2), chunk_bytes(k, d), cn_extent_bytes(k, d)) != CN_OK) {
        cn_free(k, d2);
        return false;
    }
    for (uint32_t i = 0; i < 4; i++)
        cn_store_relaxed(&copy->key[i], chunk->key[i]);
    cn_store_relaxed(&copy->size_crc, chunk->size_crc);
    cn_store_relaxed(&copy->place,
                     cn_place(cn_place_region(copy->place), cn_place_ns(chunk->place), 0));
    move_cold(k, d, d2);
    CN_CRASH_POINT(move_fields);
    uint32_t gen2 = cn_next_gen(k, d2);
    cn_chunk_publish(k, d2, gen2, CN_LIVE, cn_word_flags(word));
    CN_CRASH_POINT(move_live);
    cn_index_swing(&k->catalog, cn_chunk_hash(k, d), d, d2);
    CN_CRASH_POINT(move_index);
    policy_replace(k, d, d2);
    cn_account_live(k, d2, true);
    cn_account_live(k, d, false);
    if (k->catalog.cold[d2].expires_ns != 0) /* pinned chunks are not moved */
        cn_timer_add(k, k->catalog.cold[d2].expires_ns, cn_ref(d2, gen2));
    cn_chunk_publish(k, d, cn_word_gen(word), CN_DYING, cn_word_flags(word));
    CN_CRASH_POINT(move_dying);
    if (k->unlink.count == CN_UNLINK_BATCH)
        cn_unlink_flush(k);
    k->unlink.d[k->unlink.count++] = d;
    k->count.moves++;
    *ret_moved = (struct cn_moved){cn_ref(d, cn_word_gen(word)), cn_ref(d2, gen2)};
    return true;
}

/* Where the chunk that ref names went, or 0. moved is in ascending order of descriptors. */
static uint64_t moved_to(const struct cn_moved *moved, uint32_t count, uint64_t ref)
{
    uint32_t low = 0;
    uint32_t high = count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (cn_ref_d(moved[middle].from) < cn_ref_d(ref))
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && moved[low].from == ref ? moved[low].to : 0;
}

void cn_moved_adopt(struct cn_keeper *k, const struct cn_moved *moved, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        k->children[cn_ref_d(moved[i].from)] = k->children[cn_ref_d(moved[i].to)] = 0;
    for (uint32_t d = 0; count > 0 && d < k->fresh; d++) {
        struct cn_cold *cold = &k->catalog.cold[d];
        if (cold->parent == 0 || cn_word_state(cn_chunk_word(k, d)) != CN_LIVE)
            continue;
        uint64_t to = moved_to(moved, count, cold->parent);
        if (to == 0)
            continue;
        cn_store_relaxed(&cold->parent, to);
        CN_CRASH_POINT(move_parent);
        k->children[cn_ref_d(to)]++;
    }
}
