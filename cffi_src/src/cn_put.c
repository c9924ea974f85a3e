/* SPDX-License-Identifier: Apache-2.0 */
/* Putting a chunk: an extent from the stock, the caller's bytes, one ring record. */
#include "cn_client.h"
#include "cn_region.h"

#define ANSWER_MS 20u /* for a keeper to answer a WANT, whatever wait_ms says */
#define RETRY_MS 2u   /* between two WANTs while the pool is full */

/* Metadata lies behind the data, on a line of its own. */
static uint64_t meta_off(uint64_t data_bytes)
{
    return (data_bytes + CN_CACHELINE - 1) / CN_CACHELINE * CN_CACHELINE;
}

static uint64_t extent_for(uint64_t data_bytes, uint32_t meta_bytes)
{
    uint64_t bytes = meta_bytes == 0 ? data_bytes : meta_off(data_bytes) + meta_bytes;
    return (bytes + 4095) / 4096 * 4096;
}

static struct cn_stock_row *find_row(struct cn_client *c, uint64_t extent_bytes)
{
    for (uint32_t i = 0; i < CN_STOCK_ROWS; i++)
        if (cn_load_relaxed(&c->stock[i].extent_bytes) == extent_bytes)
            return &c->stock[i];
    return NULL;
}

/* The granted extent that ref names, if it is still ours: the keeper may have revoked it. */
static bool grant_of(struct cn_client *c, uint64_t ref, uint64_t extent_bytes,
                     struct cn_grant *ret_grant)
{
    uint32_t d = cn_ref_d(ref);
    if (d >= c->catalog.chunk_count)
        return false;
    const struct cn_chunk *chunk = &c->catalog.chunks[d];
    uint64_t word = cn_load_acquire(&chunk->word);
    uint64_t place = cn_load_relaxed(&chunk->place);
    uint64_t off = cn_load_relaxed(&chunk->data_off);
    uint32_t region = cn_place_region(place);
    uint64_t granted_bytes = (uint64_t)c->catalog.cold[d].extent_pages * 4096;
    if (cn_word_gen(word) != cn_ref_gen(ref) || cn_word_state(word) != CN_GRANTED ||
        cn_place_owner(place) != c->session_idx || granted_bytes < extent_bytes)
        return false;
    if (region >= c->region_count || c->rw[region].base == NULL || off > c->rw[region].bytes ||
        extent_bytes > c->rw[region].bytes - off)
        return false;
    *ret_grant = (struct cn_grant){c->rw[region].base + off, ref, extent_bytes};
    return true;
}

static bool take_from_stock(struct cn_client *c, uint64_t extent_bytes, struct cn_grant *ret_grant)
{
    struct cn_stock_row *row = find_row(c, extent_bytes);
    if (row == NULL)
        return false;
    for (uint32_t i = 0; i < CN_STOCK_SLOTS; i++) {
        uint64_t ref = cn_load_acquire(&row->slot[i]);
        /* Both sides take by compare-and-swap: a revoked slot is 0 before we can have it. */
        if (ref == 0 || !cn_cas(&row->slot[i], &ref, 0))
            continue;
        if (grant_of(c, ref, extent_bytes, ret_grant))
            return true;
        cn_abort(c, ref); /* the row went to another size since we found it */
    }
    return false;
}

struct want {
    uint64_t extent_bytes;
    uint64_t failed_before;
};

static bool stock_there(struct cn_client *c, uint64_t extent_bytes)
{
    struct cn_stock_row *row = find_row(c, extent_bytes);
    if (row == NULL)
        return false;
    for (uint32_t i = 0; i < CN_STOCK_SLOTS; i++)
        if (cn_load_relaxed(&row->slot[i]) != 0)
            return true;
    return false;
}

static bool want_answered(struct cn_client *c, uint64_t arg)
{
    const struct want *want = (const struct want *)(uintptr_t)arg;
    return cn_load_acquire(&c->head->want_failed) != want->failed_before ||
           stock_there(c, want->extent_bytes);
}

/* Ask once and wait for the answer. CN_EFULL: the keeper has nothing for us now. */
static int want_once(struct cn_client *c, uint64_t extent_bytes, struct cn_grant *ret_grant)
{
    struct want want = {extent_bytes, cn_load_acquire(&c->head->want_failed)};
    struct cn_record record = {.op = CN_OP_WANT, .arg = extent_bytes, .data_bytes = 1};
    int status = cn_submit(c, &record, ANSWER_MS);
    if (status != CN_OK)
        return status;
    if (!cn_doorbell_is_ours(c))
        return CN_ECLOSED; /* nobody hears us: only a new session helps */
    status = cn_wait_until(c, want_answered, (uint64_t)(uintptr_t)&want, ANSWER_MS);
    if (take_from_stock(c, extent_bytes, ret_grant))
        return CN_OK;
    return status == CN_ETIME ? CN_ETIME : CN_EFULL;
}

/* What can be said without asking the keeper; *ret_extent_bytes is what to ask it for. */
static int reserve_check(struct cn_client *c, uint64_t data_bytes, uint32_t meta_bytes,
                         uint64_t *ret_extent_bytes)
{
    int status = cn_usable(c);
    if (status != CN_OK)
        return status;
    if (c->role < CN_ROLE_WRITER)
        return CN_EACCES;
    if (data_bytes == 0 || meta_bytes > CN_META_BYTES_MAX)
        return CN_EINVAL;
    if (data_bytes > CN_CHUNK_BYTES_MAX)
        return CN_ETOOBIG;
    *ret_extent_bytes = extent_for(data_bytes, meta_bytes);
    return *ret_extent_bytes > c->largest_bytes ? CN_ETOOBIG : CN_OK;
}

int cn_reserve_now(struct cn_client *c, uint64_t data_bytes, uint32_t meta_bytes,
                   struct cn_grant *ret_grant)
{
    uint64_t extent_bytes;
    int status = reserve_check(c, data_bytes, meta_bytes, &extent_bytes);
    if (status != CN_OK)
        return status;
    return take_from_stock(c, extent_bytes, ret_grant) ? CN_OK : CN_EFULL;
}

int cn_reserve(struct cn_client *c, uint64_t data_bytes, uint32_t meta_bytes, uint32_t wait_ms,
               struct cn_grant *ret_grant)
{
    uint64_t extent_bytes;
    int status = reserve_check(c, data_bytes, meta_bytes, &extent_bytes);
    if (status != CN_OK)
        return status;
    if (take_from_stock(c, extent_bytes, ret_grant))
        return CN_OK;
    uint64_t deadline_ns = cn_now_ns() + (uint64_t)wait_ms * 1000000u;
    for (;;) {
        status = want_once(c, extent_bytes, ret_grant);
        uint64_t now = cn_now_ns();
        if (status == CN_OK || status == CN_ECLOSED)
            return status;
        if (now >= deadline_ns)
            return CN_EFULL;
        /* Refused: ask again in a moment. Not answered: one question is enough, wait for it. */
        uint32_t left_ms = (uint32_t)((deadline_ns - now) / 1000000u) + 1;
        cn_wait_until(c, stock_there, extent_bytes, status == CN_ETIME ? left_ms : RETRY_MS);
        if (take_from_stock(c, extent_bytes, ret_grant))
            return CN_OK;
    }
}

int cn_put_meta(struct cn_client *c, const struct cn_grant *grant, uint64_t data_bytes,
                const void *meta, uint32_t meta_bytes)
{
    if (cn_is_forked(c))
        return CN_EFORKED;
    if (extent_for(data_bytes, meta_bytes) > grant->extent_bytes || meta_bytes > CN_META_BYTES_MAX)
        return CN_EINVAL;
    memcpy((uint8_t *)grant->data + meta_off(data_bytes), meta, meta_bytes);
    return CN_OK;
}

int cn_commit(struct cn_client *c, const struct cn_put *put, uint32_t wait_ms)
{
    int status = cn_usable(c);
    if (status != CN_OK)
        return status;
    if (put->ns_slot >= CN_NAMESPACES_MAX || put->data_bytes == 0 ||
        put->data_bytes > CN_CHUNK_BYTES_MAX || put->meta_bytes > CN_META_BYTES_MAX)
        return CN_EINVAL;
    struct cn_record record; /* every field by itself: zeroing all of it first costs more */
    int32_t priority = put->priority;
    record.op = CN_OP_COMMIT;
    record.flags = (uint8_t)put->flags;
    record.priority = (int8_t)(priority < -128 ? -128 : priority > 127 ? 127 : priority);
    record.reserved0 = 0;
    record.ns_slot = (uint16_t)put->ns_slot;
    record.meta_bytes = (uint16_t)put->meta_bytes;
    record.grant = put->ref;
    memcpy(record.key, put->key, CN_KEY_BYTES);
    record.data_bytes = (uint32_t)put->data_bytes;
    record.crc32c = put->crc32c;
    record.position = put->position;
    record.ttl_s = put->ttl_s;
    record.cookie = record.arg = record.reserved[0] = record.reserved[1] = 0;
    if (put->parent_key != NULL) {
        memcpy(record.parent_key, put->parent_key, CN_KEY_BYTES);
        record.flags |= CN_RF_PARENT;
    } else {
        memset(record.parent_key, 0, CN_KEY_BYTES);
    }
    return cn_submit(c, &record, wait_ms);
}

int cn_abort(struct cn_client *c, uint64_t ref)
{
    if (cn_is_forked(c))
        return CN_EFORKED;
    struct cn_record record = {.op = CN_OP_ABORT, .grant = ref};
    int status = cn_submit(c, &record, 0);
    return status == CN_ERING ? CN_OK : status; /* it goes with the next record */
}

static int put_one(struct cn_client *c, const struct cn_put_many *args, uint32_t i,
                   uint32_t left_ms)
{
    struct cn_grant grant;
    int status = cn_reserve(c, args->data_bytes[i], 0, left_ms, &grant);
    if (status != CN_OK)
        return status;
    struct cn_put put = {
        .ref = grant.ref,
        .key = args->keys + (size_t)i * CN_KEY_BYTES,
        .parent_key = i == 0 ? args->parent_key : args->keys + (size_t)(i - 1) * CN_KEY_BYTES,
        .data_bytes = args->data_bytes[i],
        .ns_slot = args->ns_slot,
        .position =
            args->position == CN_POSITION_UNKNOWN ? CN_POSITION_UNKNOWN : args->position + i,
        .ttl_s = args->ttl_s,
        .priority = args->priority,
        .flags = args->flags,
    };
    if (args->crc != 0)
        put.flags |= CN_RF_CRC;
    status = args->crc != 0
                 ? cn_guarded_copy_in_crc32c(grant.data, args->data[i], put.data_bytes, &put.crc32c)
                 : cn_guarded_copy_in(grant.data, args->data[i], put.data_bytes);
    if (status == CN_OK)
        status = cn_commit(c, &put, left_ms > ANSWER_MS ? left_ms : ANSWER_MS);
    if (status != CN_OK)
        cn_abort(c, grant.ref);
    return status;
}

int cn_put_many(struct cn_client *c, const struct cn_put_many *args, uint32_t *ret_count)
{
    *ret_count = 0;
    if (args->key_count > CN_KEYS_PER_CALL_MAX)
        return CN_ELIMIT;
    uint64_t deadline_ns = cn_now_ns() + (uint64_t)args->wait_ms * 1000000u;
    for (uint32_t i = 0; i < args->key_count; i++) {
        int status = put_one(c, args, i, cn_left_ms(deadline_ns));
        if (status != CN_OK)
            return status;
        *ret_count = i + 1;
    }
    return CN_OK;
}
