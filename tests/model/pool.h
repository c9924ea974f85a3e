/* SPDX-License-Identifier: Apache-2.0 */
/* A pool for the explorer: a keeper and clients over plain memory of the world, no mappings. */
#ifndef CN_MODEL_POOL_H
#define CN_MODEL_POOL_H

#include "cn_client.h"
#include "cn_keeper.h"
#include "explorer.h"

#define POOL_DOORBELL_FD 100000 /* a client's doorbell; no such descriptor exists */
#define POOL_CLIENTS 3u
#define POOL_EXTENT (2u << 20) /* one granule: a pool of n extents has no room for n + 1 */
#define POOL_WORDS 2u          /* of an extent, written and checked: its first and its last */

extern struct pool {
    struct cn_keeper *keeper;
    uint8_t *region;
    struct cn_client *client[POOL_CLIENTS];
    uint32_t session[POOL_CLIENTS];
    uint64_t nonce[POOL_CLIENTS];
    uint32_t ns;
} pool;

void pool_open(uint32_t extents, uint32_t clients);
/* Key number n. */
const uint8_t *pool_key(uint32_t n);
/* An extent is ready in the client's stock, so that cn_reserve() will not wait. */
bool pool_stock_ready(uint32_t client);
/* Ask the keeper for one; the record lies in the ring until somebody steps it. */
void pool_want(uint32_t client);
void pool_want_large(uint32_t client, uint32_t extents);
/* Reserve from the stock, fill, commit key n. The record lies in the ring. */
void pool_write(uint32_t client, uint32_t n);
void pool_write_large(uint32_t client, uint32_t n, uint32_t extents);
void pool_submit_key(uint32_t client, uint32_t op, uint32_t n);
/* All of it, by whoever runs alone: want, step, write, step. */
void pool_put(uint32_t client, uint32_t n);
/* Whoever holds a lease reads what was committed under key n, and nothing else. */
void pool_check(const struct cn_view *view, uint32_t n);
/* Look key n up, check its bytes, release; true if it was there. */
bool pool_read(uint32_t client, uint32_t n);
void pool_step(void);
void pool_settle(void);
/* The process is gone: no access of it comes any more. */
void pool_end_session(uint32_t client);
/* The keeper is dead: another one takes its place, with every session (I7). */
void pool_take_over(void);
/* Every session ends; then nothing is leased or granted, and all tables agree. */
void pool_finish(void);

#endif
