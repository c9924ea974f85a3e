/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loops for the Python benches, where an interpreter would be most of what is measured. The client
 * functions come as pointers from the process's own cenote, so that what runs is what is installed.
 * Each loop runs for a given time and says how many operations a second it did.
 */
#include <stddef.h>
#include <stdlib.h>
#include <time.h>

#include "cn_api.h"

enum { TURN = 1000 }; /* operations between two looks at the clock */

struct loop_core {
    int (*lease)(struct cn_client *, uint32_t, const uint8_t *, struct cn_view *);
    void (*release)(struct cn_client *, uint32_t);
    int (*reserve)(struct cn_client *, uint64_t, uint32_t, uint32_t, struct cn_grant *);
    int (*commit)(struct cn_client *, const struct cn_put *, uint32_t);
};

uint64_t loop_sink;

double loop_loads(const uint32_t *cycle, uint64_t lines, uint64_t from, double run_s);
double loop_hits(const struct loop_core *core, struct cn_client *client, uint32_t ns_slot,
                 const uint8_t *keys, uint64_t key_count, uint64_t from, double run_s);
int loop_cycle(uint32_t *ret_cycle, uint64_t lines, uint64_t seed);
int loop_fill(const struct loop_core *core, struct cn_client *client, uint32_t ns_slot,
              const uint8_t *keys, uint64_t key_count, uint64_t data_bytes);
double loop_touch(const uint8_t *data, uint64_t bytes, uint64_t page_bytes);
void loop_read(const uint64_t *words, uint64_t count);

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * 0x2545f4914f6cdd1dull;
}

/* A random cycle through the first word of every cache line. -1: no memory for it. */
int loop_cycle(uint32_t *ret_cycle, uint64_t lines, uint64_t seed)
{
    uint32_t *order = malloc(lines * sizeof(*order));
    uint64_t state = seed | 1;
    if (order == NULL)
        return -1;
    for (uint64_t i = 0; i < lines; i++)
        order[i] = (uint32_t)i;
    for (uint64_t i = lines - 1; i > 0; i--) {
        uint64_t j = random_next(&state) % (i + 1);
        uint32_t held = order[i];
        order[i] = order[j];
        order[j] = held;
    }
    for (uint64_t i = 0; i < lines; i++)
        ret_cycle[(uint64_t)order[i] * 16] = order[(i + 1) % lines];
    free(order);
    return 0;
}

/* Dependent loads: each one's address is the result of the one before. */
double loop_loads(const uint32_t *cycle, uint64_t lines, uint64_t from, double run_s)
{
    const double begun = now_s();
    uint32_t at = (uint32_t)(from % lines);
    uint64_t done = 0;
    double took = 0;
    while (took < run_s) {
        for (int i = 0; i < TURN; i++)
            at = cycle[(uint64_t)at * 16];
        done += TURN;
        took = now_s() - begun;
    }
    loop_sink += at;
    return (double)done / took;
}

/* Lease and release keys one by one, from key number *from* on. -1: one was not there. */
double loop_hits(const struct loop_core *core, struct cn_client *client, uint32_t ns_slot,
                 const uint8_t *keys, uint64_t key_count, uint64_t from, double run_s)
{
    const double begun = now_s();
    uint64_t at = from % key_count;
    uint64_t done = 0;
    double took = 0;
    while (took < run_s) {
        for (int i = 0; i < TURN; i++) {
            struct cn_view view;
            if (core->lease(client, ns_slot, keys + at * CN_KEY_BYTES, &view) != CN_OK)
                return -1;
            loop_sink += view.ref;
            core->release(client, view.slot);
            at = at + 1 == key_count ? 0 : at + 1;
        }
        done += TURN;
        took = now_s() - begun;
    }
    return (double)done / took;
}

/* Commit chunks whose memory is never touched: the catalog is what is wanted. */
int loop_fill(const struct loop_core *core, struct cn_client *client, uint32_t ns_slot,
              const uint8_t *keys, uint64_t key_count, uint64_t data_bytes)
{
    for (uint64_t i = 0; i < key_count; i++) {
        struct cn_grant grant;
        int status = core->reserve(client, data_bytes, 0, 10000, &grant);
        if (status != CN_OK)
            return status;
        struct cn_put put = {.ref = grant.ref,
                             .key = keys + i * CN_KEY_BYTES,
                             .data_bytes = data_bytes,
                             .ns_slot = ns_slot,
                             .position = CN_POSITION_UNKNOWN};
        status = core->commit(client, &put, 10000);
        if (status != CN_OK)
            return status;
    }
    return CN_OK;
}

/* Seconds to read one byte of each page. */
double loop_touch(const uint8_t *data, uint64_t bytes, uint64_t page_bytes)
{
    const double begun = now_s();
    uint64_t sum = 0;
    for (uint64_t at = 0; at < bytes; at += page_bytes)
        sum += data[at];
    const double took = now_s() - begun;
    loop_sink += sum;
    return took;
}

typedef uint64_t loop_line __attribute__((vector_size(64)));

/* Read memory as fast as it comes: several sums at once, so that no addition waits for another. */
void loop_read(const uint64_t *words, uint64_t count)
{
    const loop_line *lines = (const void *)words;
    loop_line sums[2] = {{0}, {0}};
    for (uint64_t i = 0; i + 2 <= count / 8; i += 2) {
        sums[0] += lines[i];
        sums[1] += lines[i + 1];
    }
    sums[0] += sums[1];
    for (uint64_t j = 0; j < 8; j++)
        loop_sink += sums[0][j];
}
