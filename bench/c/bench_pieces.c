/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages of an engine's cache into the pool and back: one call for all, beside memcpy of the same
 * pages and beside one copy of as many bytes that are contiguous. Prints JSON.
 *
 *   bench_pieces [pool_mib] [rounds]
 *
 * The pages lie in another order than their places in the chunk, in memory of the engine's that is
 * as large as the pool. Contestants take turns within a round and go on where the one before
 * stopped, so that none finds its pages or its chunk in the cache; figures are medians over rounds,
 * ratios are to the references of the same round.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "cn_copy.h"
#include "cn_region.h"

enum { KIB = 1 << 10, MIB = 1 << 20, CHUNK_BYTES = 16 * MIB, TURNS = 4, ROUNDS_MAX = 101 };

enum way { WAY_MEMCPY, WAY_CONTIGUOUS, WAY_CONTIGUOUS_CRC, WAY_PIECES, WAY_PIECES_CRC, WAYS };

struct bench {
    char *pool, *engine;
    size_t bytes, pool_off; /* of the pool, and of the engine's memory */
    uint64_t *pages, *lengths;
    size_t page_bytes, page_count, page_at;
    int rounds;
    uint32_t sink; /* keeps the sums alive */
};

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int compare(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof(*values), compare);
    return values[count / 2];
}

/* Every page of the engine's memory, shuffled. */
static void pages_make(struct bench *b, size_t page_bytes)
{
    uint64_t x = 0x2545f4914f6cdd1du;
    b->page_bytes = page_bytes, b->page_count = b->bytes / page_bytes, b->page_at = 0;
    for (size_t i = 0; i < b->page_count; i++) {
        b->pages[i] = (uintptr_t)b->engine + i * page_bytes;
        b->lengths[i] = page_bytes;
    }
    for (size_t i = b->page_count - 1; i > 0; i--) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        const size_t k = (x >> 20) % (i + 1);
        const uint64_t page = b->pages[i];
        b->pages[i] = b->pages[k], b->pages[k] = page;
    }
}

static void pages_memcpy(const struct cn_pieces *pieces, char *chunk, size_t page_bytes, bool in)
{
    for (size_t i = 0; i < pieces->count; i++) {
        char *page = (char *)(uintptr_t)pieces->addresses[i];
        memcpy(in ? chunk + i * page_bytes : page, in ? page : chunk + i * page_bytes, page_bytes);
    }
}

static void chunk_do(struct bench *b, enum way way, bool in, const struct cn_pieces *pieces,
                     char *chunk, char *contiguous)
{
    uint32_t crc = 0;
    uint32_t *sum = way == WAY_PIECES_CRC ? &crc : NULL;
    if (way == WAY_MEMCPY)
        pages_memcpy(pieces, chunk, b->page_bytes, in);
    else if (way == WAY_CONTIGUOUS)
        (in ? cn_copy_in : cn_copy_out)(in ? chunk : contiguous, in ? contiguous : chunk,
                                        CHUNK_BYTES);
    else if (way == WAY_CONTIGUOUS_CRC)
        crc = (in ? cn_copy_in_crc32c : cn_copy_out_crc32c)(in ? chunk : contiguous,
                                                            in ? contiguous : chunk, CHUNK_BYTES);
    else if (in)
        (void)cn_guarded_gather(chunk, pieces, sum);
    else
        (void)cn_guarded_scatter(pieces, chunk, sum);
    b->sink ^= crc;
}

/* TURNS chunks; returns GB/s. */
static double turn(struct bench *b, enum way way, bool in)
{
    const size_t count = CHUNK_BYTES / b->page_bytes;
    const double begin = now_s();
    for (int i = 0; i < TURNS; i++) {
        if (b->pool_off + CHUNK_BYTES > b->bytes)
            b->pool_off = 0, b->page_at = 0;
        const struct cn_pieces pieces = {b->pages + b->page_at, b->lengths, count, CHUNK_BYTES};
        chunk_do(b, way, in, &pieces, b->pool + b->pool_off, b->engine + b->pool_off);
        b->pool_off += CHUNK_BYTES, b->page_at += count;
    }
    return (double)TURNS * CHUNK_BYTES / (now_s() - begin) / 1e9;
}

static void bench_one(struct bench *b, bool in, bool last)
{
    static double rate[WAYS][ROUNDS_MAX], of_memcpy[WAYS][ROUNDS_MAX], of_one[WAYS][ROUNDS_MAX];
    for (int round = -1; round < b->rounds; round++) { /* round -1 warms up */
        const int at = round < 0 ? 0 : round;
        for (int way = 0; way < WAYS; way++) {
            rate[way][at] = turn(b, (enum way)way, in);
            of_memcpy[way][at] = rate[way][at] / rate[WAY_MEMCPY][at];
            if (way >= WAY_PIECES)
                of_one[way][at] = rate[way][at] / rate[way - WAY_PIECES + WAY_CONTIGUOUS][at];
        }
    }
    for (int way = WAY_PIECES; way < WAYS; way++)
        printf(
            "  {\"verb\": \"%s%s\", \"page_bytes\": %zu, \"gbps\": %.2f, \"memcpy_ratio\": %.2f, "
            "\"contiguous_ratio\": %.2f, \"memcpy_gbps\": %.2f}%s\n",
            in ? "gather" : "scatter", way == WAY_PIECES_CRC ? "_crc32c" : "", b->page_bytes,
            median(rate[way], b->rounds), median(of_memcpy[way], b->rounds),
            median(of_one[way], b->rounds), median(rate[WAY_MEMCPY], b->rounds),
            last && way == WAYS - 1 ? "" : ",");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static const size_t sizes[] = {4 * KIB, 16 * KIB, 32 * KIB};
    enum { SIZES = sizeof(sizes) / sizeof(sizes[0]) };
    const size_t pool_mib = argc > 1 ? strtoul(argv[1], NULL, 10) : 1024;
    const int rounds = argc > 2 ? atoi(argv[2]) : 9;
    if (pool_mib < 64 || rounds < 1 || rounds > ROUNDS_MAX) {
        fprintf(stderr, "usage: bench_pieces [pool_mib >= 64] [rounds 1..%d]\n", ROUNDS_MAX);
        return 2;
    }
    struct bench b = {.bytes = pool_mib * MIB, .rounds = rounds};
    b.pool = mmap(NULL, b.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    b.engine = mmap(NULL, b.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    b.pages = malloc(b.bytes / sizes[0] * sizeof(*b.pages));
    b.lengths = malloc(b.bytes / sizes[0] * sizeof(*b.lengths));
    if (b.pool == MAP_FAILED || b.engine == MAP_FAILED || b.pages == NULL || b.lengths == NULL) {
        fprintf(stderr, "bench_pieces: no memory for two times %zu MiB\n", pool_mib);
        return 1;
    }
    memset(b.pool, 1, b.bytes);
    memset(b.engine, 2, b.bytes);
    printf("{\"chunk_bytes\": %d, \"rounds\": %d, \"best\": \"%s\", \"results\": [\n", CHUNK_BYTES,
           rounds, cn_copy_best()->name);
    for (int s = 0; s < SIZES; s++) {
        pages_make(&b, sizes[s]);
        bench_one(&b, true, false);
        bench_one(&b, false, s == SIZES - 1);
    }
    printf("], \"sink\": %u}\n", b.sink);
    free(b.pages), free(b.lengths);
    return 0;
}
