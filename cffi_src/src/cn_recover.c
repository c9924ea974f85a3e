/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Taking over what a dead keeper left (I5, I7).
 *
 * First everything is looked at, and nothing changed: every session is mapped, slabs, extents and
 * descriptors are one story. Only then the new keeper takes office and puts right what its
 * predecessor was in the middle of; each of its stores may be the last, and the next keeper begins
 * again. Readers go on all the time: a chunk is missing in the index for a moment at worst.
 */
#include <stdlib.h>
#include <string.h>

#include "cn_crash.h"
#include "cn_keeper.h"

#define DIRTY_STARTS 4u
#define RADIX_BITS 11u
#define RADIX (1u << RADIX_BITS)

struct takeover {
    struct cn_keeper *k;
    struct cn_recovery *found;
    uint8_t *state;       /* of each descriptor, as found */
    struct cn_hash *hash; /* of the LIVE ones */
    uint64_t *indexed;    /* bit a descriptor: the index names it */
    bool dirty;
};

/* ---- sessions: all of them, before anything changes (I7) ------------------ */

/* Numbers on the client's page: each read once and bounded (I4). A record that is seen again names
 * a grant that is none any more, so too low a head is harmless (I5). */
static void adopt_rings(struct cn_session *s)
{
    struct cn_session_head *head = s->head;
    uint64_t tail = cn_load_acquire(&head->sub_tail);
    uint64_t done = cn_load_relaxed(&head->sub_head);
    s->sub_head = tail - done > CN_RING_RECORDS ? tail : done;
    uint64_t taken = cn_load_relaxed(&head->comp_head);
    uint64_t given = cn_load_relaxed(&head->comp_tail);
    s->comp_tail = given - taken > CN_COMPLETIONS ? taken : given;
    s->access_head = cn_load_acquire(&head->access_tail); /* what was read of it is not known */
    s->want_failed = cn_load_relaxed(&head->want_failed);
    s->hits = cn_session_hits(s); /* nearly all of it was counted */
    s->misses = cn_load_relaxed(&head->misses);
}

static void adopt_stock(const struct cn_keeper *k, struct cn_session *s)
{
    for (uint32_t row = 0; row < CN_STOCK_ROWS; row++) {
        uint64_t bytes = cn_load_relaxed(&s->stock[row].extent_bytes);
        if (bytes == 0 || bytes % CN_PAGE_BYTES != 0 || bytes > k->capacity_bytes)
            continue;
        s->rows[row] = (struct cn_row_state){.extent_bytes = bytes, .target = 1};
    }
}

static int adopt_session(struct cn_keeper *k, const struct cn_adopt_session *from)
{
    if (from->session >= CN_SESSIONS_MAX || k->sessions[from->session] != NULL ||
        from->segment == NULL || from->segment_bytes < cn_session_bytes(k->catalog.lease_slots))
        return CN_EINVAL;
    const struct cn_session_entry *entry = &k->catalog.registry[from->session];
    uint32_t role = (uint32_t)(entry->word >> 8) & 0xff;
    if ((entry->word & 0xff) != CN_SESSION_OPEN || entry->nonce != from->nonce)
        return CN_EINVAL;
    struct cn_session_open o = {.segment = from->segment,
                                .segment_bytes = from->segment_bytes,
                                .liveness_fd = from->liveness_fd,
                                .doorbell_fd = from->doorbell_fd,
                                .pidfd = from->pidfd,
                                .role = role > CN_ROLE_ADMIN ? CN_ROLE_READER : role};
    struct cn_session *s = cn_session_new(k, &o, from->session, from->nonce);
    if (s == NULL)
        return CN_ENOMEM;
    s->tenant = entry->tenant;
    s->death_check_ns = 1; /* its socket is gone, too: look at its lock */
    s->death_period_ns = CN_DEATH_LOOK_NS;
    adopt_rings(s);
    adopt_stock(k, s);
    cn_session_enter(k, s);
    return CN_OK;
}

static int adopt_sessions(struct cn_keeper *k, const struct cn_adopt_session *sessions,
                          uint32_t count)
{
    uint32_t open = 0;
    for (uint32_t i = 0; i < count; i++) {
        int status = adopt_session(k, &sessions[i]);
        if (status != CN_OK)
            return status;
    }
    for (uint32_t i = 0; i < CN_SESSIONS_MAX; i++) {
        const struct cn_session_entry *entry = &k->catalog.registry[i];
        open += (entry->word & 0xff) == CN_SESSION_OPEN;
        if (entry->nonce >= k->next_nonce)
            k->next_nonce = entry->nonce + 1;
    }
    return open == count ? CN_OK : CN_EMISS;
}

/* They are the caller's again: nothing is unmapped or closed. */
static void release_sessions(struct cn_keeper *k)
{
    while (k->session_count > 0) {
        struct cn_session *s = k->sessions[k->session_list[0]];
        s->liveness_fd = s->doorbell_fd = s->pidfd = -1;
        cn_session_forget(k, s);
    }
}

/* ---- slabs, extents, descriptors: do they fit together? ------------------- */

static int adopt_slabs(struct cn_keeper *k)
{
    for (uint32_t region = 0; region < k->region_count; region++) {
        const struct cn_region_info *info = &k->catalog.super->regions[region];
        for (uint64_t g = 0; g < info->bytes / CN_GRANULE_BYTES; g++) {
            uint64_t word = cn_load_relaxed(&k->catalog.slabs[info->slabs_first + g]);
            int status = cn_arena_adopt_slab(k->arena[region], (uint32_t)g, word);
            if (status != CN_OK)
                return status;
        }
    }
    return CN_OK;
}

static int adopt_extent(struct takeover *t, uint32_t d)
{
    const struct cn_keeper *k = t->k;
    const struct cn_chunk *chunk = &k->catalog.chunks[d];
    uint32_t region = cn_place_region(chunk->place);
    uint32_t ns = cn_place_ns(chunk->place);
    if (region >= k->region_count || t->state[d] > CN_POISONED)
        return CN_ECORRUPT;
    int status = cn_arena_adopt_extent(k->arena[region], chunk->data_off);
    if (status != CN_OK)
        return status;
    uint64_t extent = cn_arena_extent_bytes(k->arena[region], chunk->data_off);
    if (extent != cn_extent_bytes(k, d) || (uint32_t)chunk->size_crc > extent)
        return CN_ECORRUPT;
    if (t->state[d] == CN_LIVE &&
        (ns == 0 || ns >= CN_NAMESPACES_MAX || k->catalog.namespaces[ns].word == 0))
        return CN_ECORRUPT;
    return CN_OK;
}

static int adopt_descriptors(struct takeover *t)
{
    struct cn_keeper *k = t->k;
    for (uint32_t d = 0; d < k->catalog.chunk_count; d++) {
        uint64_t word = cn_chunk_word(k, d);
        t->state[d] = (uint8_t)cn_word_state(word);
        if (word != 0)
            k->fresh = d + 1;
        if (t->state[d] == CN_FREE)
            continue;
        int status = adopt_extent(t, d);
        if (status != CN_OK)
            return status;
        if (t->state[d] == CN_LIVE)
            t->hash[d] = cn_chunk_hash(k, d);
    }
    return CN_OK;
}

/* ---- putting right -------------------------------------------------------- */

/* Nobody was sent them. */
static void end_openings(struct cn_keeper *k)
{
    for (uint32_t i = 0; i < CN_SESSIONS_MAX; i++)
        if ((k->catalog.registry[i].word & 0xff) == CN_SESSION_OPENING)
            cn_store_release(&k->catalog.registry[i].word, CN_SESSION_FREE);
}

static void note_start(struct takeover *t)
{
    struct cn_super *super = t->k->catalog.super;
    if (!t->dirty)
        return;
    for (uint32_t i = DIRTY_STARTS - 1; i > 0; i--)
        cn_store_relaxed(&super->dirty_starts_ns[i], super->dirty_starts_ns[i - 1]);
    cn_store_relaxed(&super->dirty_starts_ns[0], t->k->realtime_ns);
    CN_CRASH_POINT(takeover_noted);
}

/* A change may have happened whose event was not written: followers see a gap, and look again. */
static void skip_an_event(struct cn_keeper *k)
{
    struct cn_super *super = k->catalog.super;
    uint64_t sequence = cn_load_relaxed(&super->event_head);
    cn_store_release(&k->catalog.events[sequence & k->catalog.event_mask].sequence, 0);
    cn_store_release(&super->event_head, sequence + 1);
    CN_CRASH_POINT(takeover_event);
}

/* Counters of what happened go on; sums are made anew. */
static void adopt_counters(struct cn_keeper *k)
{
    uint64_t sessions = k->count.sessions;
    k->count = k->catalog.super->counters;
    k->count.live_chunks = k->count.live_bytes = k->count.granted_bytes = 0;
    k->count.limbo_chunks = k->count.pinned_chunks = k->count.namespaces = 0;
    k->count.sessions = sessions;
    for (uint32_t slot = 1; slot < CN_NAMESPACES_MAX; slot++) {
        struct cn_namespace *n = &k->catalog.namespaces[slot];
        if (n->word == 0)
            break; /* slots are given out in order, and never back */
        cn_store_relaxed(&n->live_bytes, 0);
        cn_store_relaxed(&n->live_chunks, 0);
        k->count.namespaces++;
    }
}

static bool leads_to(const struct takeover *t, uint32_t d, uint32_t bucket, uint64_t entry)
{
    const struct cn_catalog *c = &t->k->catalog;
    if (cn_hash_tag(t->hash[d]) != entry >> 32)
        return false;
    for (uint32_t which = 0; which < 3; which++)
        if (cn_hash_bucket(c, t->hash[d], which) == bucket)
            return true;
    return false;
}

/* The index is a hint: entries that name nothing go, readers never see it empty. */
static void clean_index(struct takeover *t)
{
    struct cn_catalog *c = &t->k->catalog;
    for (uint32_t b = 0; b <= c->bucket_mask; b++) {
        for (uint32_t i = 0; i < CN_BUCKET_ENTRIES; i++) {
            uint64_t entry = cn_load_relaxed(&c->index[b].entry[i]);
            uint32_t d = (uint32_t)entry;
            if (entry == 0)
                continue;
            if (d < c->chunk_count && t->state[d] == CN_LIVE && leads_to(t, d, b, entry)) {
                t->indexed[d / 64] |= 1ull << (d % 64);
                continue;
            }
            cn_store_release(&c->index[b].entry[i], 0);
            CN_CRASH_POINT(takeover_index);
            t->found->unindexed++;
        }
    }
}

static void begin_dying(struct takeover *t, uint32_t d)
{
    struct cn_keeper *k = t->k;
    uint64_t word = cn_chunk_word(k, d);
    cn_chunk_publish(k, d, cn_word_gen(word), CN_DYING, cn_word_flags(word));
    t->state[d] = CN_DYING;
    CN_CRASH_POINT(takeover_twin);
}

/* LIVE, and no entry: its keeper died before the index, or between the two of a move. */
static void link_missing(struct takeover *t, uint32_t d)
{
    struct cn_keeper *k = t->k;
    struct cn_key key = cn_chunk_key(k, d);
    struct cn_hash h = t->hash[d];
    uint32_t other;
    uint64_t word;
    if (cn_index_find(&k->catalog, h, cn_place_ns(k->catalog.chunks[d].place), &key, &other,
                      &word)) {
        t->found->twins++; /* of one key and equal bytes: the index names the one that counts */
        begin_dying(t, d);
    } else if (cn_index_insert(&k->catalog, h, d) == CN_OK) {
        t->found->linked++;
        CN_CRASH_POINT(takeover_linked);
    } else {
        begin_dying(t, d); /* nobody could ever find it */
    }
}

static void link_all(struct takeover *t)
{
    for (uint32_t d = 0; d < t->k->fresh; d++)
        if (t->state[d] == CN_LIVE && (t->indexed[d / 64] >> (d % 64) & 1) == 0)
            link_missing(t, d);
}

/* I9: what was written while a keeper died may be anything, until its checksum says no. */
static void doubt(struct takeover *t, uint32_t d)
{
    uint64_t word = cn_chunk_word(t->k, d);
    uint32_t flags = cn_word_flags(word);
    if (t->dirty && (flags & CN_CF_CRC) != 0 && (flags & CN_CF_UNVERIFIED) == 0) {
        cn_chunk_publish(t->k, d, cn_word_gen(word), CN_LIVE, flags | CN_CF_UNVERIFIED);
        CN_CRASH_POINT(takeover_doubt);
    }
    t->found->unverified += (cn_word_flags(cn_chunk_word(t->k, d)) & CN_CF_UNVERIFIED) != 0;
}

static void settle_granted(struct takeover *t, uint32_t d)
{
    struct cn_keeper *k = t->k;
    uint32_t owner = cn_place_owner(k->catalog.chunks[d].place);
    struct cn_session *s = owner < CN_SESSIONS_MAX ? k->sessions[owner] : NULL;
    if (s != NULL) {
        cn_grant_adopt(k, s, d);
        t->found->grants++;
        return;
    }
    cn_free(k, d);
    t->found->returned++;
}

static void settle_descriptors(struct takeover *t)
{
    struct cn_keeper *k = t->k;
    for (uint32_t d = k->fresh; d-- > 0;) { /* so that the lowest are taken first */
        if (t->state[d] == CN_FREE)
            cn_descriptor_put(k, d);
        else if (t->state[d] == CN_GRANTED)
            settle_granted(t, d);
        else if (t->state[d] == CN_DYING)
            k->limbo[k->limbo_count++] = d;
        if (t->state[d] != CN_LIVE)
            continue;
        doubt(t, d);
        cn_live_adopt(k, d);
    }
    t->found->dying = k->limbo_count;
    CN_CRASH_POINT(takeover_settled);
}

/* ---- queues: the order of last uses --------------------------------------- */

static uint32_t used_s(const struct cn_keeper *k, uint32_t d)
{
    const struct cn_cold *cold = &k->catalog.cold[d];
    return cold->last_use_s != 0 ? cold->last_use_s : (uint32_t)(cold->committed_ns / 1000000000u);
}

struct used {
    uint32_t at_s;
    uint32_t d;
};

/* One pass of a radix sort, stable: Knuth, TAOCP 3, 5.2.5. */
static void sort_pass(const struct used *from, struct used *to, uint32_t count, uint32_t shift)
{
    uint32_t place[RADIX] = {0};
    uint32_t sum = 0;
    for (uint32_t i = 0; i < count; i++)
        place[from[i].at_s >> shift & (RADIX - 1)]++;
    for (uint32_t i = 0; i < RADIX; i++) {
        uint32_t n = place[i];
        place[i] = sum;
        sum += n;
    }
    for (uint32_t i = 0; i < count; i++)
        to[place[from[i].at_s >> shift & (RADIX - 1)]++] = from[i];
}

static int restore_queues(struct takeover *t)
{
    struct cn_keeper *k = t->k;
    uint32_t count = 0;
    struct used *used = calloc(2 * ((size_t)k->count.live_chunks + 1), sizeof(*used));
    if (used == NULL)
        return CN_ENOMEM;
    struct used *spare = used + k->count.live_chunks + 1;
    for (uint32_t d = 0; d < k->fresh; d++)
        if (t->state[d] == CN_LIVE && (cn_word_flags(cn_chunk_word(k, d)) & CN_CF_PINNED) == 0)
            used[count++] = (struct used){used_s(k, d), d};
    sort_pass(used, spare, count, 0);
    sort_pass(spare, used, count, RADIX_BITS);
    sort_pass(used, spare, count, 2 * RADIX_BITS);
    for (uint32_t i = 0; i < count; i++)
        cn_policy_restore(k, spare[i].d);
    free(used);
    return CN_OK;
}

/* ---- all of it ------------------------------------------------------------ */

static int look(struct takeover *t, const struct cn_adopt_session *sessions, uint32_t count)
{
    struct cn_keeper *k = t->k;
    const struct cn_super *super = k->catalog.super;
    if (super->pool_state == CN_POOL_RETIRED)
        return CN_ECLOSED;
    int status = adopt_sessions(k, sessions, count);
    if (status == CN_OK)
        status = adopt_slabs(k);
    if (status == CN_OK)
        status = adopt_descriptors(t);
    return status;
}

/* Memory is all there: nothing in here can fail but the queues, which are no promise. */
static void repair(struct takeover *t, uint64_t start_ns)
{
    struct cn_keeper *k = t->k;
    note_start(t);
    cn_keeper_take_office(k, start_ns);
    end_openings(k);
    skip_an_event(k);
    adopt_counters(k);
    clean_index(t);
    link_all(t);
    settle_descriptors(t);
    (void)restore_queues(t);
    for (uint32_t i = 0; i < k->region_count; i++)
        cn_arena_trim(k->arena[i]);
    cn_fence_keeper(); /* DYING, its own and its predecessor's, before the scan (I3) */
    CN_CRASH_POINT(takeover_fenced);
    cn_limbo_look(k);
    t->found->live_chunks = k->count.live_chunks;
    t->found->live_bytes = k->count.live_bytes;
    t->found->sessions = k->session_count;
    cn_counters_store(k);
}

static int take_over(struct takeover *t, const struct cn_keeper_config *config,
                     const struct cn_adopt_session *sessions, uint32_t count)
{
    struct cn_keeper *k = t->k;
    size_t chunks = k->catalog.chunk_count;
    struct cn_keeper_config copy = *config;
    t->state = calloc(chunks, sizeof(*t->state));
    t->hash = calloc(chunks, sizeof(*t->hash));
    t->indexed = calloc((chunks + 63) / 64, sizeof(*t->indexed));
    if (t->state == NULL || t->hash == NULL || t->indexed == NULL)
        return CN_ENOMEM;
    k->realtime_ns = cn_realtime_ns(k);
    k->monotonic_ns = k->ops.monotonic_ns();
    t->dirty = k->catalog.super->clean == 0;
    t->found->was_clean = !t->dirty;
    int status = look(t, sessions, count);
    if (status == CN_OK)
        status = cn_do_configure(k, &copy);
    if (status == CN_OK)
        repair(t, copy.start_ns);
    return status;
}

int cn_keeper_adopt(void *catalog, uint64_t catalog_bytes, void *const *regions,
                    const struct cn_keeper_config *config, const struct cn_adopt_session *sessions,
                    uint32_t session_count, struct cn_recovery *ret_found,
                    struct cn_keeper **ret_keeper)
{
    struct takeover t = {.found = ret_found};
    memset(ret_found, 0, sizeof(*ret_found));
    int status = cn_keeper_new(catalog, catalog_bytes, regions, &t.k);
    if (status != CN_OK)
        return status;
    status = take_over(&t, config, sessions, session_count);
    free(t.state);
    free(t.hash);
    free(t.indexed);
    if (status != CN_OK) {
        release_sessions(t.k);
        cn_keeper_destroy(t.k);
        return status;
    }
    *ret_keeper = t.k;
    return CN_OK;
}
