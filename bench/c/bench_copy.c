/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bandwidth of every copy kernel beside memcpy, over a pool larger than the cache. Prints JSON.
 *
 *   bench_copy [pool_mib] [rounds]
 *
 * "in" writes pool memory from a caller's buffer, warm (one buffer over and over) or cold (a walk
 * through 256 MiB); "out" reads pool memory into one warm buffer; "sum" reads pool memory. Kernels
 * take turns within a round and go on where the one before stopped, so that none finds its part of
 * the pool in the cache; figures are medians over rounds, ratios are to memcpy of the same round.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "cn_copy.h"

enum { MIB = 1 << 20, CALLER_BYTES = 256 * MIB, TURN_BYTES = 64 * MIB, ROUNDS_MAX = 101 };

enum verb { VERB_IN, VERB_IN_CRC, VERB_OUT, VERB_OUT_CRC, VERB_SUM, VERBS };
static const char *const verb_names[VERBS] = {"copy_in", "copy_in_crc32c", "copy_out",
                                              "copy_out_crc32c", "crc32c"};

/* Where the caller's bytes are. */
enum caller { CALLER_WARM, CALLER_COLD };

struct bench {
    char *pool, *caller;
    size_t pool_bytes, pool_off, caller_off;
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

/* One chunk; ops NULL is memcpy, in the direction of the verb. */
static void chunk_do(struct bench *b, const struct cn_copy_ops *ops, enum verb verb, char *pool,
                     char *caller, size_t bytes)
{
    const bool in = verb == VERB_IN || verb == VERB_IN_CRC;
    if (ops == NULL)
        memcpy(in ? pool : caller, in ? caller : pool, bytes);
    else if (verb == VERB_IN)
        ops->copy(pool, caller, bytes);
    else if (verb == VERB_IN_CRC)
        b->sink ^= ops->copy_crc32c(0, pool, caller, bytes);
    else if (verb == VERB_OUT)
        ops->copy_out(caller, pool, bytes);
    else if (verb == VERB_OUT_CRC)
        b->sink ^= ops->copy_out_crc32c(0, caller, pool, bytes);
    else
        b->sink ^= ops->crc32c(0, pool, bytes);
}

/* TURN_BYTES in chunks; returns GB/s. */
static double turn(struct bench *b, const struct cn_copy_ops *ops, enum verb verb,
                   enum caller where, size_t bytes)
{
    const double begin = now_s();
    for (size_t done = 0; done < TURN_BYTES; done += bytes) {
        if (b->pool_off + bytes > b->pool_bytes)
            b->pool_off = 0;
        if (where == CALLER_WARM || b->caller_off + bytes > CALLER_BYTES)
            b->caller_off = 0;
        chunk_do(b, ops, verb, b->pool + b->pool_off, b->caller + b->caller_off, bytes);
        b->pool_off += bytes;
        b->caller_off += bytes;
    }
    return TURN_BYTES / (now_s() - begin) / 1e9;
}

/* All ISAs and memcpy for one verb and size, interleaved. */
static void bench_one(struct bench *b, enum verb verb, enum caller where, size_t bytes, bool last)
{
    static double rate[CN_ISA_COUNT + 1][ROUNDS_MAX], ratio[CN_ISA_COUNT + 1][ROUNDS_MAX];
    for (int round = -1; round < b->rounds; round++) { /* round -1 warms up */
        const int at = round < 0 ? 0 : round;
        const double reference = turn(b, NULL, verb, where, bytes);
        rate[CN_ISA_COUNT][at] = reference;
        for (int isa = 0; isa < CN_ISA_COUNT; isa++) {
            const struct cn_copy_ops *ops = cn_copy_ops_of((enum cn_isa)isa);
            if (ops == NULL)
                continue;
            rate[isa][at] = turn(b, ops, verb, where, bytes);
            ratio[isa][at] = rate[isa][at] / reference;
        }
    }
    printf("  {\"verb\": \"%s\", \"chunk_bytes\": %zu, \"caller\": \"%s\", \"memcpy_gbps\": %.2f",
           verb_names[verb], bytes, where == CALLER_WARM ? "warm" : "cold",
           median(rate[CN_ISA_COUNT], b->rounds));
    for (int isa = 0; isa < CN_ISA_COUNT; isa++) {
        const struct cn_copy_ops *ops = cn_copy_ops_of((enum cn_isa)isa);
        if (ops != NULL)
            printf(", \"%s_gbps\": %.2f, \"%s_ratio\": %.2f", ops->name,
                   median(rate[isa], b->rounds), ops->name, median(ratio[isa], b->rounds));
    }
    printf("}%s\n", last ? "" : ",");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static const size_t sizes[] = {64 * 1024, MIB, 32 * MIB};
    enum { SIZES = sizeof(sizes) / sizeof(sizes[0]) };
    const size_t pool_mib = argc > 1 ? strtoul(argv[1], NULL, 10) : 1024;
    const int rounds = argc > 2 ? atoi(argv[2]) : 9;
    if (pool_mib < 64 || rounds < 1 || rounds > ROUNDS_MAX) {
        fprintf(stderr, "usage: bench_copy [pool_mib >= 64] [rounds 1..%d]\n", ROUNDS_MAX);
        return 2;
    }
    struct bench b = {.pool_bytes = pool_mib * MIB, .rounds = rounds};
    b.pool = mmap(NULL, b.pool_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    b.caller = mmap(NULL, CALLER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b.pool == MAP_FAILED || b.caller == MAP_FAILED) {
        fprintf(stderr, "bench_copy: no memory for a pool of %zu MiB\n", pool_mib);
        return 1;
    }
    memset(b.pool, 1, b.pool_bytes);
    memset(b.caller, 2, CALLER_BYTES);
    printf("{\"pool_bytes\": %zu, \"rounds\": %d, \"best\": \"%s\", \"results\": [\n", b.pool_bytes,
           rounds, cn_copy_best()->name);
    for (int s = 0; s < SIZES; s++)
        for (int verb = 0; verb < VERBS; verb++) {
            const bool last = s == SIZES - 1 && verb == VERBS - 1;
            if (verb == VERB_IN || verb == VERB_IN_CRC)
                bench_one(&b, (enum verb)verb, CALLER_COLD, sizes[s], false);
            bench_one(&b, (enum verb)verb, CALLER_WARM, sizes[s], last);
        }
    printf("], \"sink\": %u}\n", b.sink);
    return 0;
}
