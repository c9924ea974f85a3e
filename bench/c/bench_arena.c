/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What do an allocation and a release cost the keeper? Prints JSON, nanoseconds an operation.
 *
 *   bench_arena [extents]             at most so many extents a size; default 1,000,000
 *
 * fill: allocate in order until the region is full. churn: full region, free a random extent and
 * allocate one again (the pair). full: the refusal. drain: free all in random order. mixed: sizes
 * from 4 KiB to 1 MiB drawn at random, half of the extents live. Medians over rounds.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "cn_arena.h"
#include "cn_status.h"

enum { ROUNDS = 5, EXTENTS_MAX = 4 * 1000 * 1000, FULL_TRIES = 20000, KIB = 1024 };

struct bench {
    struct cn_arena *arena;
    uint64_t *table;
    uint64_t *offs;
    uint64_t rng_state;
};

static uint64_t rng(struct bench *b)
{
    uint64_t x = b->rng_state;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return b->rng_state = x;
}

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void store(void *ctx, uint32_t granule, uint64_t word)
{
    struct bench *b = ctx;
    b->table[granule] = word;
}

static void die(const char *what)
{
    fprintf(stderr, "bench_arena: %s\n", what);
    exit(1);
}

static int compare(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double median(double *values)
{
    qsort(values, ROUNDS, sizeof(*values), compare);
    return values[ROUNDS / 2];
}

static void bench_open(struct bench *b, uint64_t region_bytes)
{
    b->table = calloc(region_bytes / CN_GRANULE_BYTES, sizeof(*b->table));
    if (!b->table || cn_arena_create(region_bytes, store, b, &b->arena) != CN_OK)
        die("no memory for the books of the arena");
}

static void bench_close(struct bench *b)
{
    cn_arena_destroy(b->arena);
    free(b->table);
}

static uint64_t must_alloc(struct bench *b, uint64_t bytes)
{
    uint64_t off = 0, extent_bytes = 0;
    if (cn_arena_alloc(b->arena, bytes, &off, &extent_bytes) != CN_OK)
        die("the region is full too early");
    return off;
}

static void must_free(struct bench *b, uint64_t off)
{
    if (cn_arena_free(b->arena, off) != CN_OK)
        die("an extent is not known any more");
}

static void shuffle(struct bench *b, uint64_t count)
{
    for (uint64_t i = count; i > 1; i--) {
        const uint64_t j = rng(b) % i, off = b->offs[i - 1];
        b->offs[i - 1] = b->offs[j];
        b->offs[j] = off;
    }
}

static void size_round(struct bench *b, uint64_t bytes, uint64_t count, double ret_ns[4])
{
    uint64_t off = 0, extent_bytes = 0;
    bench_open(b, count * bytes);
    double start = now_ns();
    for (uint64_t i = 0; i < count; i++)
        b->offs[i] = must_alloc(b, bytes);
    ret_ns[0] = (now_ns() - start) / (double)count;

    start = now_ns();
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t victim = rng(b) % count;
        must_free(b, b->offs[victim]);
        b->offs[victim] = must_alloc(b, bytes);
    }
    ret_ns[1] = (now_ns() - start) / (double)count;

    start = now_ns();
    for (int i = 0; i < FULL_TRIES; i++) {
        if (cn_arena_alloc(b->arena, bytes, &off, &extent_bytes) != CN_EFULL)
            die("a full region gave an extent");
    }
    ret_ns[2] = (now_ns() - start) / FULL_TRIES;

    shuffle(b, count);
    start = now_ns();
    for (uint64_t i = 0; i < count; i++)
        must_free(b, b->offs[i]);
    ret_ns[3] = (now_ns() - start) / (double)count;
    bench_close(b);
}

static void size_report(struct bench *b, uint64_t bytes, uint64_t extents)
{
    static const char *const names[4] = {"fill", "churn", "full", "drain"};
    const uint64_t per_granule = CN_GRANULE_BYTES / bytes;
    const uint64_t fit = (UINT64_C(1) << 40) / bytes;
    const uint64_t count = (extents < fit ? extents : fit) / per_granule * per_granule;
    double ns[ROUNDS][4], column[ROUNDS];

    for (int round = 0; round < ROUNDS; round++)
        size_round(b, bytes, count, ns[round]);
    printf("    {\"extent_bytes\": %" PRIu64 ", \"extents\": %" PRIu64, bytes, count);
    for (int verb = 0; verb < 4; verb++) {
        for (int round = 0; round < ROUNDS; round++)
            column[round] = ns[round][verb];
        printf(", \"%s_ns\": %.1f", names[verb], median(column));
    }
    printf("},\n");
}

static double mixed_round(struct bench *b, uint64_t count)
{
    bench_open(b, count * 640 * KIB);
    const double start = now_ns();
    for (uint64_t i = 0; i < 2 * count; i++) {
        const uint64_t slot = i < count / 2 ? i : rng(b) % (count / 2);
        if (i >= count / 2)
            must_free(b, b->offs[slot]);
        b->offs[slot] = must_alloc(b, (1 + rng(b) % 256) * 4 * KIB);
    }
    const double ns = (now_ns() - start) / (double)(2 * count);
    bench_close(b);
    return ns;
}

int main(int argc, char **argv)
{
    static const uint64_t sizes[] = {4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB};
    const uint64_t extents = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000 * 1000;
    struct bench b = {.rng_state = 88172645463325252u};
    double mixed[ROUNDS];
    if (extents < 512 || extents > EXTENTS_MAX) {
        fprintf(stderr, "bench_arena: %s extents: give 512 to %d\n", argv[1], EXTENTS_MAX);
        return 2;
    }
    b.offs = calloc(extents, sizeof(*b.offs));
    if (!b.offs)
        die("no memory for the offsets");
    printf("{\n  \"bench\": \"arena\", \"rounds\": %d,\n  \"rows\": [\n", ROUNDS);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        size_report(&b, sizes[i], extents);
    for (int round = 0; round < ROUNDS; round++)
        mixed[round] = mixed_round(&b, extents);
    printf("    {\"extent_bytes\": \"4096..1048576\", \"extents\": %" PRIu64
           ", \"mixed_ns\": %.1f}\n  ]\n}\n",
           extents / 2, median(mixed));
    free(b.offs);
    return 0;
}
