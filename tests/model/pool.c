/* SPDX-License-Identifier: Apache-2.0 */
#include "pool.h"

#include <stdlib.h>
#include <string.h>

struct pool pool; /* written by setup alone */

static const uint8_t manifest[] = {0x80};

int __wrap_cn_guarded_move(void *dst, const void *src, uint64_t bytes);

static void open_keeper(uint32_t extents)
{
    struct cn_format f = {.pool_name = "model",
                          .hash_seed = {0x1234, 0x5678},
                          .chunk_count = 64,
                          .lease_slots = 512,
                          .event_count = 64,
                          .region_count = 1};
    f.regions[0].bytes = (uint64_t)extents * POOL_EXTENT;
    uint64_t bytes = cn_catalog_bytes(&f);
    void *catalog = aligned_alloc(4096, bytes);
    void *region = aligned_alloc(4096, f.regions[0].bytes);
    struct cn_keeper_config config = {.high_water = 1, .low_water = 1, .policy = "lru"};
    if (catalog == NULL || region == NULL || cn_catalog_format(catalog, bytes, &f) != CN_OK ||
        cn_keeper_create(catalog, bytes, &region, &config, &pool.keeper) != CN_OK)
        model_violation("no keeper: is the world too small?");
    pool.region = region;
}

/* As cn_client_attach() leaves it, but for the mappings: both sides use the same addresses here. */
static struct cn_client *make_client(uint8_t *segment, uint32_t i)
{
    struct cn_client *c = aligned_alloc(CN_CACHELINE, sizeof(*c));
    memset(c, 0, sizeof(*c));
    struct cn_session_head *head = (void *)segment;
    c->mark = aligned_alloc(CN_CACHELINE, sizeof(uint64_t));
    *(uint64_t *)(uintptr_t)c->mark = 1;
    c->catalog = pool.keeper->catalog;
    c->head = head;
    c->lease_slots = head->lease_slots;
    c->session_idx = head->session_idx;
    c->role = head->role;
    c->lease_limit_bytes = head->lease_limit_bytes;
    c->stock = (void *)(segment + cn_session_stock_off());
    c->leases = (void *)(segment + cn_session_leases_off());
    c->sub = (void *)(segment + cn_session_sub_off(c->lease_slots));
    c->comp = (void *)(segment + cn_session_comp_off(c->lease_slots));
    c->access_log = (void *)(segment + cn_session_access_off(c->lease_slots));
    c->region_count = 1;
    c->largest_bytes = pool.keeper->catalog.super->regions[0].bytes;
    c->ro[0] = c->rw[0] =
        (struct cn_mapping){pool.region, pool.keeper->catalog.super->regions[0].bytes};
    c->slot_next = calloc(c->lease_slots, sizeof(*c->slot_next));
    c->slot_bytes = calloc(c->lease_slots, sizeof(*c->slot_bytes));
    cn_doorbell_take(c, POOL_DOORBELL_FD + (int)i);
    c->next_cookie = 1;
    pthread_mutex_init(&c->sub_lock, NULL);
    pthread_mutex_init(&c->op_lock, NULL);
    cn_slots_init(c);
    return c;
}

static void label_client(const struct cn_client *c, uint32_t i)
{
    static const char *const leases[] = {"lease", "lease of 1", "lease of 2"};
    static const char *const heads[] = {"session", "session 1", "session 2"};
    static const char *const stocks[] = {"stock", "stock of 1", "stock of 2"};
    model_label(c->leases, c->lease_slots * 8ull, 8, leases[i]);
    model_label(c->stock, CN_STOCK_ROWS * sizeof(struct cn_stock_row), 8, stocks[i]);
    model_label(c->head, sizeof(*c->head), sizeof(*c->head), heads[i]);
    model_label(&c->head->lease_high, 8, 8, "lease_high");
    model_label(&c->head->sub_tail, 8, 8, "sub_tail");
    model_label(&c->head->sub_head, 8, 8, "sub_head");
    model_label(&c->head->access_tail, 8, 8, "access_tail");
    model_label(&c->head->waiters, 8, 8, "waiters");
    model_label(&c->head->wake_seq, 8, 8, "wake_seq");
}

static void label_catalog(const struct cn_catalog *c)
{
    model_label(c->chunks, c->chunk_count * sizeof(struct cn_chunk), sizeof(struct cn_chunk),
                "chunk");
    model_label(&c->chunks[0].word, 8, 8, "chunk[0].word");
    model_label(&c->chunks[1].word, 8, 8, "chunk[1].word");
    model_label(c->index, (c->bucket_mask + 1ull) * sizeof(struct cn_bucket), 8, "index");
    model_label(c->events, (c->event_mask + 1ull) * sizeof(struct cn_event),
                sizeof(struct cn_event), "event");
    model_label(&c->super->sleeping, 8, 8, "sleeping");
    model_label(&c->super->event_head, 8, 8, "event_head");
    model_label(pool.region, c->super->regions[0].bytes, POOL_EXTENT / 2, "bytes");
}

static void attach(uint32_t i)
{
    uint64_t bytes = cn_session_segment_bytes(pool.keeper->catalog.lease_slots);
    struct cn_session_open open = {.segment = aligned_alloc(4096, bytes),
                                   .segment_bytes = bytes,
                                   .liveness_fd = -1,
                                   .doorbell_fd = -1,
                                   .pidfd = -1,
                                   .role = CN_ROLE_WRITER,
                                   .lease_limit_bytes = UINT64_MAX};
    if (cn_keeper_session_open(pool.keeper, &open) != CN_OK)
        model_violation("no session");
    pool.session[i] = open.ret_session;
    pool.nonce[i] = open.ret_nonce;
    pool.client[i] = make_client(open.segment, i);
    struct cn_namespace_open ns = {.id = {7},
                                   .name = "",
                                   .manifest = manifest,
                                   .manifest_bytes = 1,
                                   .session = open.ret_session,
                                   .session_nonce = open.ret_nonce};
    if (cn_keeper_namespace_open(pool.keeper, &ns) != CN_OK)
        model_violation("no namespace");
    pool.ns = ns.ret_slot;
    label_client(pool.client[i], i);
}

void pool_open(uint32_t extents, uint32_t clients)
{
    open_keeper(extents);
    label_catalog(&pool.keeper->catalog);
    for (uint32_t i = 0; i < clients; i++)
        attach(i);
    pool_settle();
}

const uint8_t *pool_key(uint32_t n)
{
    static const uint8_t keys[][CN_KEY_BYTES] = {{11, 1}, {22, 2, 9}, {33, 3, 7, 7}, {44, 4, 1}};
    return keys[n];
}

bool pool_stock_ready(uint32_t client)
{
    const struct cn_client *c = pool.client[client];
    for (uint32_t row = 0; row < CN_STOCK_ROWS; row++)
        for (uint32_t i = 0; i < CN_STOCK_SLOTS; i++)
            if (cn_load_relaxed(&c->stock[row].slot[i]) != 0)
                return true;
    return false;
}

void pool_want_large(uint32_t client, uint32_t extents)
{
    struct cn_record record = {
        .op = CN_OP_WANT, .arg = (uint64_t)extents * POOL_EXTENT, .data_bytes = 1};
    cn_submit(pool.client[client], &record, 0);
}

void pool_want(uint32_t client) { pool_want_large(client, 1); }

static uint64_t word_of(uint32_t n, uint32_t i) { return 0xb000u + n * 16 + i; }

static uint64_t *word_at(void *data, uint32_t i)
{
    uint8_t *extent = (uint8_t *)data + (size_t)(i / POOL_WORDS) * POOL_EXTENT;
    return (uint64_t *)(extent + (i % POOL_WORDS == 0 ? 0 : POOL_EXTENT - 8));
}

/* The words that are looked at alone, each copied by steps of its own. */
int __wrap_cn_guarded_move(void *dst, const void *src, uint64_t bytes)
{
    for (uint32_t i = 0; i < bytes / POOL_EXTENT * POOL_WORDS; i++)
        cn_store_relaxed(word_at(dst, i), cn_load_relaxed(word_at((void *)(uintptr_t)src, i)));
    return CN_OK;
}

void pool_write_large(uint32_t client, uint32_t n, uint32_t extents)
{
    struct cn_client *c = pool.client[client];
    uint64_t bytes = (uint64_t)extents * POOL_EXTENT;
    struct cn_grant grant;
    if (cn_reserve(c, bytes, 0, 0, &grant) != CN_OK)
        return;
    for (uint32_t i = 0; i < extents * POOL_WORDS; i++)
        cn_store_relaxed(word_at(grant.data, i), word_of(n, i));
    struct cn_put put = {.ref = grant.ref,
                         .key = pool_key(n),
                         .data_bytes = bytes,
                         .ns_slot = pool.ns,
                         .position = CN_POSITION_UNKNOWN};
    cn_commit(c, &put, 0);
}

void pool_write(uint32_t client, uint32_t n) { pool_write_large(client, n, 1); }

void pool_submit_key(uint32_t client, uint32_t op, uint32_t n)
{
    struct cn_record record = {.op = (uint8_t)op, .ns_slot = (uint16_t)pool.ns};
    memcpy(record.key, pool_key(n), CN_KEY_BYTES);
    cn_submit(pool.client[client], &record, 0);
}

void pool_put(uint32_t client, uint32_t n)
{
    pool_want(client);
    pool_settle();
    pool_write(client, n);
    pool_settle();
    MODEL_CHECK(pool_read(client, n), "key %u could not be put", n);
}

void pool_check(const struct cn_view *view, uint32_t n)
{
    for (uint32_t i = 0; i < view->bytes / POOL_EXTENT * POOL_WORDS; i++) {
        uint64_t got = cn_load_relaxed(word_at(view->data, i));
        MODEL_CHECK(got == word_of(n, i), "a lease of key %u shows 0x%llx, not 0x%llx", n,
                    (unsigned long long)got, (unsigned long long)word_of(n, i));
    }
}

bool pool_read(uint32_t client, uint32_t n)
{
    struct cn_view view;
    int status = cn_lease(pool.client[client], pool.ns, pool_key(n), &view);
    MODEL_CHECK(status == CN_OK || status == CN_EMISS, "cn_lease: status %d", status);
    if (status != CN_OK)
        return false;
    pool_check(&view, n);
    cn_release(pool.client[client], view.slot);
    return true;
}

void pool_step(void) { cn_keeper_step(pool.keeper); }

void pool_settle(void)
{
    while (cn_keeper_step(pool.keeper) > 0)
        ;
}

void pool_end_session(uint32_t client)
{
    cn_keeper_session_hint(pool.keeper, pool.session[client], pool.nonce[client]);
    pool_step();
}

void pool_take_over(void)
{
    struct cn_adopt_session sessions[POOL_CLIENTS];
    struct cn_keeper_config config = {.high_water = 1, .low_water = 1, .policy = "lru"};
    struct cn_recovery found;
    struct cn_super *super = pool.client[0]->catalog.super;
    void *region = pool.region;
    uint32_t count = 0;
    for (; count < POOL_CLIENTS && pool.client[count] != NULL; count++)
        sessions[count] =
            (struct cn_adopt_session){.segment = pool.client[count]->head,
                                      .segment_bytes = cn_session_segment_bytes(super->lease_slots),
                                      .nonce = pool.nonce[count],
                                      .session = pool.session[count],
                                      .liveness_fd = -1,
                                      .doorbell_fd = -1,
                                      .pidfd = -1};
    int status = cn_keeper_adopt(super, super->catalog_bytes, &region, &config, sessions, count,
                                 &found, &pool.keeper);
    MODEL_CHECK(status == CN_OK, "a takeover ends with status %d", status);
    for (uint32_t i = 0; i < count; i++) /* without a lock each would count as dead */
        pool.keeper->sessions[pool.session[i]]->death_check_ns = 0;
}

void pool_finish(void)
{
    const struct cn_keeper *k = pool.keeper;
    uint64_t wrong;
    pool.keeper->running = false; /* its thread was a task, and is over */
    pool_settle();
    cn_keeper_audit(pool.keeper, &wrong);
    MODEL_CHECK(wrong == 0, "the audit finds %llu contradictions before the sessions end",
                (unsigned long long)wrong);
    for (uint32_t i = 0; i < POOL_CLIENTS && pool.client[i] != NULL; i++)
        pool_end_session(i);
    pool_settle();
    cn_keeper_audit(pool.keeper, &wrong);
    MODEL_CHECK(wrong == 0, "the audit finds %llu contradictions", (unsigned long long)wrong);
    MODEL_CHECK(k->session_count == 0, "%u sessions are left", k->session_count);
    MODEL_CHECK(k->count.granted_bytes == 0, "granted extents are left");
    MODEL_CHECK(k->limbo_count == 0, "%u chunks are left in limbo", k->limbo_count);
}
