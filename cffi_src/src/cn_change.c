/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Catalog changes. Each is a sequence of stores after any of which the keeper may die; what a crash
 * between two of them means stands in design-rationale 3 and docs/architecture.md.
 */
#include <string.h>

#include "cn_crash.h"
#include "cn_keeper.h"

#define NS_IN_S 1000000000ull

struct cn_key cn_chunk_key(const struct cn_keeper *k, uint32_t d)
{
    struct cn_key key;
    memcpy(&key, k->catalog.chunks[d].key, sizeof(key));
    return key;
}

struct cn_hash cn_chunk_hash(const struct cn_keeper *k, uint32_t d)
{
    struct cn_key key = cn_chunk_key(k, d);
    return cn_hash_key(k->catalog.hash_seed, cn_place_ns(k->catalog.chunks[d].place), &key);
}

void cn_chunk_publish(struct cn_keeper *k, uint32_t d, uint32_t gen, uint32_t state, uint32_t flags)
{
    /* Release: all other fields of the descriptor and its cold record come before it (I5). */
    cn_store_release(&k->catalog.chunks[d].word, cn_word(gen, state, flags));
}

uint32_t cn_live_of(const struct cn_keeper *k, uint64_t ref)
{
    uint32_t d = cn_ref_d(ref);
    if (ref == 0 || d >= k->catalog.chunk_count)
        return CN_NONE;
    uint64_t word = cn_chunk_word(k, d);
    return cn_word_gen(word) == cn_ref_gen(ref) && cn_word_state(word) == CN_LIVE ? d : CN_NONE;
}

/* ---- descriptors ---------------------------------------------------------- */

static uint32_t descriptor_take(struct cn_keeper *k)
{
    uint32_t d = k->free_head;
    if (d != CN_NONE) {
        k->free_head = k->nodes[d].next;
        return d;
    }
    return k->fresh < k->catalog.chunk_count ? k->fresh++ : CN_NONE;
}

void cn_descriptor_put(struct cn_keeper *k, uint32_t d)
{
    k->nodes[d].next = k->free_head;
    k->free_head = d;
}

static int extent_take(struct cn_keeper *k, uint64_t extent_bytes, uint32_t *ret_region,
                       uint64_t *ret_off, uint64_t *ret_bytes)
{
    int status = CN_ETOOBIG;
    for (uint32_t region = 0; region < k->region_count; region++) {
        int tried = cn_arena_alloc(k->arena[region], extent_bytes, ret_off, ret_bytes);
        *ret_region = region;
        if (tried == CN_OK)
            return CN_OK;
        if (tried != CN_ETOOBIG)
            status = tried;
    }
    return status;
}

static void grant_list_add(struct cn_keeper *k, struct cn_session *s, uint32_t d)
{
    k->nodes[d].prev = CN_NONE;
    k->nodes[d].next = s->grant_head;
    if (s->grant_head != CN_NONE)
        k->nodes[s->grant_head].prev = d;
    s->grant_head = d;
}

static void grant_list_drop(struct cn_keeper *k, struct cn_session *s, uint32_t d)
{
    uint32_t prev = k->nodes[d].prev;
    uint32_t next = k->nodes[d].next;
    if (prev == CN_NONE)
        s->grant_head = next;
    else
        k->nodes[prev].next = next;
    if (next != CN_NONE)
        k->nodes[next].prev = prev;
}

/* Fields of a descriptor that is about to be GRANTED or, for a move, LIVE. */
int cn_descriptor_fill(struct cn_keeper *k, uint64_t extent_bytes, uint32_t owner, uint32_t *ret_d)
{
    uint32_t region;
    uint64_t off;
    uint64_t bytes;
    if (k->free_head == CN_NONE && k->fresh >= k->catalog.chunk_count)
        return CN_ELIMIT;
    int status = extent_take(k, extent_bytes, &region, &off, &bytes);
    if (status != CN_OK)
        return status;
    uint32_t d = descriptor_take(k);
    struct cn_chunk *chunk = &k->catalog.chunks[d];
    cn_store_relaxed(&chunk->data_off, off);
    cn_store_relaxed(&chunk->size_crc, 0);
    cn_store_relaxed(&chunk->place, cn_place(region, 0, owner));
    memset(&k->catalog.cold[d], 0, sizeof(struct cn_cold));
    k->catalog.cold[d].extent_pages = (uint32_t)(bytes / CN_PAGE_BYTES);
    CN_CRASH_POINT(grant_fields);
    k->nodes[d] = (struct cn_policy_node){.prev = CN_NONE, .next = CN_NONE};
    k->children[d] = 0;
    *ret_d = d;
    return CN_OK;
}

/* The next generation of a FREE descriptor; 0 is no generation. */
uint32_t cn_next_gen(const struct cn_keeper *k, uint32_t d)
{
    uint32_t gen = cn_word_gen(cn_chunk_word(k, d)) + 1;
    return gen == 0 ? 1 : gen;
}

void cn_grant_adopt(struct cn_keeper *k, struct cn_session *s, uint32_t d)
{
    grant_list_add(k, s, d);
    s->granted_bytes += cn_extent_bytes(k, d);
    k->count.granted_bytes += cn_extent_bytes(k, d);
}

int cn_grant_one(struct cn_keeper *k, struct cn_session *s, uint64_t extent_bytes,
                 uint64_t *ret_ref)
{
    uint32_t d;
    int status = cn_descriptor_fill(k, extent_bytes, s->idx, &d);
    if (status != CN_OK)
        return status;
    uint32_t gen = cn_next_gen(k, d);
    cn_chunk_publish(k, d, gen, CN_GRANTED, 0);
    CN_CRASH_POINT(grant_word);
    cn_grant_adopt(k, s, d);
    k->count.grants++;
    *ret_ref = cn_ref(d, gen);
    return CN_OK;
}

/* The descriptor of a grant of this session, or CN_NONE for anything else. */
static uint32_t granted_to(const struct cn_keeper *k, const struct cn_session *s, uint64_t ref)
{
    uint32_t d = cn_ref_d(ref);
    if (ref == 0 || d >= k->catalog.chunk_count)
        return CN_NONE;
    uint64_t word = cn_chunk_word(k, d);
    bool ours = cn_word_gen(word) == cn_ref_gen(ref) && cn_word_state(word) == CN_GRANTED &&
                cn_place_owner(k->catalog.chunks[d].place) == s->idx;
    return ours ? d : CN_NONE;
}

static void grant_end(struct cn_keeper *k, struct cn_session *s, uint32_t d)
{
    grant_list_drop(k, s, d);
    s->granted_bytes -= cn_extent_bytes(k, d);
    k->count.granted_bytes -= cn_extent_bytes(k, d);
}

void cn_free(struct cn_keeper *k, uint32_t d)
{
    struct cn_chunk *chunk = &k->catalog.chunks[d];
    cn_chunk_publish(k, d, cn_word_gen(chunk->word), CN_FREE, 0);
    CN_CRASH_POINT(free_word);
    cn_arena_free(k->arena[cn_place_region(chunk->place)], chunk->data_off);
    cn_descriptor_put(k, d);
}

bool cn_grant_drop(struct cn_keeper *k, struct cn_session *s, uint64_t ref)
{
    uint32_t d = granted_to(k, s, ref);
    if (d == CN_NONE)
        return false;
    grant_end(k, s, d);
    cn_free(k, d);
    return true;
}

/* ---- commit --------------------------------------------------------------- */

static bool record_is_sound(const struct cn_keeper *k, const struct cn_record *r, uint32_t d)
{
    uint64_t end = r->data_bytes;
    if (r->meta_bytes > 0)
        end = (end + CN_CACHELINE - 1) / CN_CACHELINE * CN_CACHELINE + r->meta_bytes;
    return r->data_bytes > 0 && r->meta_bytes <= CN_META_BYTES_MAX && end <= cn_extent_bytes(k, d);
}

/* A namespace at its quota evicts its own; false when it cannot. */
static bool quota_allows(struct cn_keeper *k, uint32_t ns, uint64_t bytes)
{
    const struct cn_namespace *n = &k->catalog.namespaces[ns];
    if (n->quota_bytes == 0 || bytes > n->quota_bytes)
        return n->quota_bytes == 0;
    for (uint32_t round = 0; round < CN_SHIFT_MAX && n->live_bytes + bytes > n->quota_bytes;
         round++)
        if (cn_evict_batch(k, ns, n->live_bytes + bytes - n->quota_bytes, CN_BY_QUOTA) == 0)
            break;
    return n->live_bytes + bytes <= n->quota_bytes;
}

static uint32_t parent_from(struct cn_keeper *k, const struct cn_record *r)
{
    if ((r->flags & CN_RF_PARENT) == 0)
        return CN_NONE;
    struct cn_key key;
    memcpy(&key, r->parent_key, sizeof(key));
    struct cn_hash h = cn_hash_key(k->catalog.hash_seed, r->ns_slot, &key);
    uint32_t parent;
    uint64_t word;
    return cn_index_find(&k->catalog, h, r->ns_slot, &key, &parent, &word) ? parent : CN_NONE;
}

static void fill_cold(struct cn_keeper *k, const struct cn_session *s, const struct cn_record *r,
                      uint32_t d, uint32_t parent)
{
    struct cn_cold *cold = &k->catalog.cold[d];
    uint64_t sequence = k->catalog.super->sequence + 1;
    cn_store_relaxed(&k->catalog.super->sequence, sequence);
    cold->sequence = sequence;
    cold->committed_ns = k->realtime_ns;
    cold->expires_ns = r->ttl_s == 0 ? 0 : k->realtime_ns + r->ttl_s * NS_IN_S;
    cold->position = r->position;
    cold->meta_bytes = r->meta_bytes;
    cold->priority = r->priority;
    cold->writer = s->nonce;
    if (parent == CN_NONE)
        return;
    uint32_t parent_position = k->catalog.cold[parent].position;
    cold->parent = cn_ref(parent, cn_word_gen(cn_chunk_word(k, parent)));
    if (r->position == CN_POSITION_UNKNOWN && parent_position != CN_POSITION_UNKNOWN)
        cold->position = parent_position + 1;
    k->children[parent]++;
}

void cn_account_live(struct cn_keeper *k, uint32_t d, bool plus)
{
    struct cn_namespace *n = &k->catalog.namespaces[cn_place_ns(k->catalog.chunks[d].place)];
    uint64_t bytes = cn_extent_bytes(k, d);
    uint64_t sign = plus ? 1 : (uint64_t)-1;
    k->count.live_chunks += sign;
    k->count.live_bytes += sign * bytes;
    cn_store_relaxed(&n->live_chunks, n->live_chunks + sign);
    cn_store_relaxed(&n->live_bytes, n->live_bytes + sign * bytes);
}

static uint32_t flags_of(const struct cn_record *r)
{
    uint32_t flags = 0;
    if ((r->flags & CN_RF_CRC) != 0)
        flags |= CN_CF_CRC;
    if ((r->flags & CN_RF_COPY) != 0)
        flags |= CN_CF_COPY;
    if (r->meta_bytes > 0)
        flags |= CN_CF_META;
    return flags;
}

static int refuse_commit(struct cn_keeper *k, uint32_t d, uint64_t *counter, int status)
{
    (*counter)++;
    cn_free(k, d);
    return status;
}

int cn_link(struct cn_keeper *k, struct cn_session *s, const struct cn_record *r)
{
    uint32_t d = granted_to(k, s, r->grant);
    if (d == CN_NONE)
        return CN_EMISS; /* a replay, or a forged grant: nothing happens (I5) */
    grant_end(k, s, d);
    if (!cn_session_may_write(k, s, r->ns_slot))
        return refuse_commit(k, d, &k->count.refused, CN_EACCES);
    if (!record_is_sound(k, r, d))
        return refuse_commit(k, d, &k->count.bad_records, CN_EINVAL);
    struct cn_key key;
    memcpy(&key, r->key, sizeof(key));
    struct cn_hash h = cn_hash_key(k->catalog.hash_seed, r->ns_slot, &key);
    uint32_t present;
    uint64_t word;
    if (cn_index_find(&k->catalog, h, r->ns_slot, &key, &present, &word)) {
        cn_policy_touch(k, present);
        return refuse_commit(k, d, &k->count.duplicates, CN_OK);
    }
    if (!cn_index_room(&k->catalog, h) || !quota_allows(k, r->ns_slot, cn_extent_bytes(k, d)))
        return refuse_commit(k, d, &k->count.refused, CN_ELIMIT);

    struct cn_chunk *chunk = &k->catalog.chunks[d];
    uint32_t gen = cn_ref_gen(r->grant);
    uint32_t region = cn_place_region(chunk->place);
    for (uint32_t i = 0; i < 4; i++)
        cn_store_relaxed(&chunk->key[i], r->key[i]);
    cn_store_relaxed(&chunk->size_crc, (uint64_t)r->crc32c << 32 | r->data_bytes);
    cn_store_relaxed(&chunk->place, cn_place(region, r->ns_slot, s->idx));
    uint32_t parent = parent_from(k, r);
    fill_cold(k, s, r, d, parent);
    CN_CRASH_POINT(commit_fields);
    /* crash after it: LIVE, unlinked; recovery links it */
    cn_chunk_publish(k, d, gen, CN_LIVE, flags_of(r));
    CN_CRASH_POINT(commit_live);
    cn_index_insert(&k->catalog, h, d);
    CN_CRASH_POINT(commit_index);
    cn_policy_add(k, d, parent == CN_NONE && (r->flags & CN_RF_PARENT) != 0);
    cn_account_live(k, d, true);
    k->count.commits++;
    if (k->catalog.cold[d].expires_ns != 0)
        cn_timer_add(k, k->catalog.cold[d].expires_ns, cn_ref(d, gen));
    cn_event_put(k, CN_EVENT_STORED, CN_BY_NONE, d);
    return CN_OK;
}

/* ---- leaving -------------------------------------------------------------- */

static void chain_leave(struct cn_keeper *k, uint32_t d)
{
    uint32_t parent = cn_live_of(k, k->catalog.cold[d].parent);
    if (parent != CN_NONE && k->children[parent] > 0)
        k->children[parent]--;
    k->children[d] = 0;
}

static void count_pin(struct cn_keeper *k, uint32_t d, bool plus)
{
    uint64_t sign = plus ? 1 : (uint64_t)-1;
    k->count.pinned_chunks += sign;
    k->pinned_bytes += sign * cn_extent_bytes(k, d);
}

void cn_unlink_one(struct cn_keeper *k, uint32_t d, uint32_t kind, uint32_t reason)
{
    uint64_t word = cn_chunk_word(k, d);
    if (k->unlink.count == CN_UNLINK_BATCH)
        cn_unlink_flush(k);
    if ((cn_word_flags(word) & CN_CF_PINNED) != 0)
        count_pin(k, d, false);
    cn_policy_drop(k, d, reason == CN_BY_POLICY || reason == CN_BY_QUOTA);
    chain_leave(k, d);
    cn_account_live(k, d, false);
    if (kind != CN_EVENT_CLEARED) /* one event for all, put by the caller */
        cn_event_put(k, kind, reason, d);
    cn_chunk_publish(k, d, cn_word_gen(word), CN_DYING, cn_word_flags(word));
    CN_CRASH_POINT(dying_word);
    cn_index_remove(&k->catalog, cn_chunk_hash(k, d), d);
    CN_CRASH_POINT(dying_index);
    k->unlink.d[k->unlink.count++] = d;
}

void cn_lose(struct cn_keeper *k, uint32_t d)
{
    cn_unlink_one(k, d, CN_EVENT_EVICTED, CN_BY_LOSS);
    k->count.lost++;
}

bool cn_set_pin(struct cn_keeper *k, uint32_t d, uint64_t until_ns)
{
    uint64_t word = cn_chunk_word(k, d);
    if (until_ns <= k->realtime_ns)
        return false;
    if ((cn_word_flags(word) & CN_CF_PINNED) == 0) {
        if (k->pinned_bytes + cn_extent_bytes(k, d) > k->capacity_bytes / CN_PIN_SHARE)
            return false;
        cn_policy_drop(k, d, false);
        count_pin(k, d, true);
        cn_store_relaxed(&k->catalog.cold[d].pinned_ns, until_ns); /* a pin has an end */
        CN_CRASH_POINT(pin_end);
        cn_chunk_publish(k, d, cn_word_gen(word), CN_LIVE, cn_word_flags(word) | CN_CF_PINNED);
        CN_CRASH_POINT(pin_word);
    }
    cn_store_relaxed(&k->catalog.cold[d].pinned_ns, until_ns);
    cn_timer_add(k, until_ns, cn_ref(d, cn_word_gen(word)));
    return true;
}

void cn_clear_pin(struct cn_keeper *k, uint32_t d)
{
    uint64_t word = cn_chunk_word(k, d);
    if ((cn_word_flags(word) & CN_CF_PINNED) == 0)
        return;
    cn_store_relaxed(&k->catalog.cold[d].pinned_ns, 0);
    count_pin(k, d, false);
    CN_CRASH_POINT(unpin_end);
    cn_chunk_publish(k, d, cn_word_gen(word), CN_LIVE,
                     cn_word_flags(word) & ~(uint32_t)CN_CF_PINNED);
    cn_policy_add(k, d, false);
    cn_expire(k, d);
}

/* A crash between a pin's two stores leaves half of one: then there is none. */
static void pin_adopt(struct cn_keeper *k, uint32_t d)
{
    uint64_t word = cn_chunk_word(k, d);
    uint64_t until_ns = k->catalog.cold[d].pinned_ns;
    bool pinned = (cn_word_flags(word) & CN_CF_PINNED) != 0;
    if (pinned && until_ns != 0) {
        count_pin(k, d, true);
        cn_timer_add(k, until_ns, cn_ref(d, cn_word_gen(word)));
    } else if (pinned) {
        cn_chunk_publish(k, d, cn_word_gen(word), CN_LIVE,
                         cn_word_flags(word) & ~(uint32_t)CN_CF_PINNED);
    } else if (until_ns != 0) {
        cn_store_relaxed(&k->catalog.cold[d].pinned_ns, 0);
    }
}

void cn_live_adopt(struct cn_keeper *k, uint32_t d)
{
    const struct cn_cold *cold = &k->catalog.cold[d];
    uint32_t parent = cn_live_of(k, cold->parent);
    pin_adopt(k, d);
    if (parent != CN_NONE)
        k->children[parent]++;
    cn_account_live(k, d, true);
    if (cold->expires_ns != 0)
        cn_timer_add(k, cold->expires_ns, cn_ref(d, cn_word_gen(cn_chunk_word(k, d))));
}

void cn_set_crc(struct cn_keeper *k, uint64_t ref, uint32_t crc32c)
{
    uint32_t d = cn_live_of(k, ref);
    if (d == CN_NONE)
        return;
    uint64_t word = cn_chunk_word(k, d);
    uint64_t bytes = (uint32_t)k->catalog.chunks[d].size_crc;
    cn_store_relaxed(&k->catalog.chunks[d].size_crc, (uint64_t)crc32c << 32 | bytes);
    CN_CRASH_POINT(crc_value);
    uint32_t flags = (cn_word_flags(word) | CN_CF_CRC) & ~(uint32_t)CN_CF_UNVERIFIED;
    cn_chunk_publish(k, d, cn_word_gen(word), CN_LIVE, flags);
    CN_CRASH_POINT(crc_word);
    k->count.verified++;
}
