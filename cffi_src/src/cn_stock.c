/* SPDX-License-Identifier: Apache-2.0 */
/* Extents granted in advance, so that a put asks nobody. Limited, and revocable while unused. */
#include "cn_crash.h"
#include "cn_keeper.h"

static uint32_t row_fill(const struct cn_session *s, uint32_t row)
{
    uint32_t filled = 0;
    for (uint32_t i = 0; i < CN_STOCK_SLOTS; i++)
        filled += cn_load_relaxed(&s->stock[row].slot[i]) != 0;
    return filled;
}

static uint32_t row_revoke(struct cn_keeper *k, struct cn_session *s, uint32_t row)
{
    uint32_t taken = 0;
    for (uint32_t i = 0; i < CN_STOCK_SLOTS; i++) {
        uint64_t ref = cn_load_acquire(&s->stock[row].slot[i]);
        if (ref != 0 && cn_cas(&s->stock[row].slot[i], &ref, 0))
            taken += cn_grant_drop(k, s, ref);
    }
    s->rows[row].target = 0;
    return taken;
}

uint32_t cn_session_revoke_stock(struct cn_keeper *k, struct cn_session *s)
{
    uint32_t taken = 0;
    for (uint32_t row = 0; row < CN_STOCK_ROWS; row++)
        taken += row_revoke(k, s, row);
    return taken;
}

uint32_t cn_revoke_stock(struct cn_keeper *k, uint64_t idle_ns)
{
    uint32_t taken = 0;
    for (uint32_t i = 0; i < k->session_count; i++) {
        struct cn_session *s = k->sessions[k->session_list[i]];
        for (uint32_t row = 0; row < CN_STOCK_ROWS; row++)
            if (k->monotonic_ns - s->rows[row].used_ns >= idle_ns)
                taken += row_revoke(k, s, row);
    }
    return taken;
}

/*
 * One extent a row, and besides at most 1/64 of the pool in all rows, so that one large size does
 * not starve the others; with what is being filled, at most a quarter.
 */
static bool grant_allowed(const struct cn_keeper *k, const struct cn_session *s,
                          uint64_t extent_bytes, uint32_t filled)
{
    uint64_t spare = filled == 0 ? 0 : extent_bytes;
    for (uint32_t row = 0; row < CN_STOCK_ROWS && spare > 0; row++)
        if (s->rows[row].filled > 1)
            spare += (s->rows[row].filled - 1) * s->rows[row].extent_bytes;
    if (s->granted_bytes == 0)
        return true;
    return spare <= k->capacity_bytes / CN_STOCK_SHARE &&
           s->granted_bytes + extent_bytes <= k->capacity_bytes / CN_GRANT_SHARE;
}

static void row_refill(struct cn_keeper *k, struct cn_session *s, uint32_t row, bool urgent)
{
    struct cn_row_state *state = &s->rows[row];
    uint32_t filled = row_fill(s, row);
    state->filled = filled;
    for (uint32_t i = 0; i < CN_STOCK_SLOTS && filled < state->target; i++) {
        if (cn_load_relaxed(&s->stock[row].slot[i]) != 0)
            continue;
        if (!grant_allowed(k, s, state->extent_bytes, filled))
            return;
        uint64_t ref;
        int status = cn_grant_one(k, s, state->extent_bytes, &ref);
        if (status != CN_OK && urgent && filled == 0 && status != CN_ETOOBIG &&
            cn_make_room(k, state->extent_bytes))
            status = cn_grant_one(k, s, state->extent_bytes, &ref);
        if (status != CN_OK)
            return;
        cn_store_release(&s->stock[row].slot[i], ref);
        CN_CRASH_POINT(grant_slot);
        state->filled = ++filled;
    }
}

/* The row of this size, or the one used longest ago, emptied for it. */
static uint32_t row_for(struct cn_keeper *k, struct cn_session *s, uint64_t extent_bytes)
{
    uint32_t oldest = 0;
    for (uint32_t row = 0; row < CN_STOCK_ROWS; row++) {
        if (s->rows[row].extent_bytes == extent_bytes)
            return row;
        if ((int32_t)(s->rows[row].used_round - s->rows[oldest].used_round) < 0)
            oldest = row;
    }
    row_revoke(k, s, oldest);
    s->rows[oldest] = (struct cn_row_state){.extent_bytes = extent_bytes};
    cn_store_release(&s->stock[oldest].extent_bytes, extent_bytes);
    CN_CRASH_POINT(stock_row);
    return oldest;
}

void cn_stock_want(struct cn_keeper *k, struct cn_session *s, const struct cn_record *r)
{
    uint64_t extent_bytes = r->arg;
    if (s->role < CN_ROLE_WRITER) {
        k->count.refused++;
        return;
    }
    bool sound = extent_bytes > 0 && extent_bytes % CN_PAGE_BYTES == 0 &&
                 extent_bytes <= CN_CHUNK_BYTES_MAX + 2 * CN_META_BYTES_MAX;
    if (!sound) {
        k->count.bad_records++;
        return;
    }
    uint32_t row = row_for(k, s, extent_bytes);
    struct cn_row_state *state = &s->rows[row];
    /* An empty row that is asked for again was too small: double it. */
    state->target = state->target == 0 ? 1 : state->target * 2;
    if (state->target > CN_STOCK_SLOTS)
        state->target = CN_STOCK_SLOTS;
    state->used_round = (uint32_t)k->round;
    state->used_ns = k->monotonic_ns;
    row_refill(k, s, row, true);
    if (row_fill(s, row) > 0)
        return;
    k->count.grants_failed++;
    cn_store_release(&s->head->want_failed, ++s->want_failed);
}

void cn_stock_used(struct cn_keeper *k, struct cn_session *s, const struct cn_record *r)
{
    uint64_t bytes = r->data_bytes;
    if (r->meta_bytes > 0)
        bytes = (bytes + CN_CACHELINE - 1) / CN_CACHELINE * CN_CACHELINE + r->meta_bytes;
    bytes = (bytes + CN_PAGE_BYTES - 1) / CN_PAGE_BYTES * CN_PAGE_BYTES;
    for (uint32_t row = 0; row < CN_STOCK_ROWS; row++) {
        if (s->rows[row].extent_bytes == bytes) {
            s->rows[row].used_round = (uint32_t)k->round;
            s->rows[row].used_ns = k->monotonic_ns;
            s->rows_dirty |= 1u << row;
        }
    }
}

void cn_stock_refill(struct cn_keeper *k, struct cn_session *s)
{
    for (uint32_t row = 0; row < CN_STOCK_ROWS; row++)
        if ((s->rows_dirty >> row & 1) != 0)
            row_refill(k, s, row, false);
    s->rows_dirty = 0;
}
