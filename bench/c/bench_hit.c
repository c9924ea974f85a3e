/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What does a hit cost, against what one load from memory of the catalog's size costs?
 *
 *   bench_hit [chunks ...]          default 10000 100000 1000000 4000000; one JSON object a line
 *
 * Chunks are 4 KiB extents in a sparse region that is never touched: the catalog is what is
 * measured. The reference is a chain of dependent loads over private memory of the same size and
 * page size, measured in the same rounds. Medians of ROUNDS.
 */
#include <sched.h>
#include <sys/wait.h>
#include <time.h>

#include "../../tests/c/pool_bed.h"

enum { ROUNDS = 9, CALLS = 200000, BATCH_KEYS = 512, HOT_KEYS = 64 };

static uint64_t random_state = 88172645463325252ull;
static uint64_t sink;

static uint64_t random_next(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1dULL;
}

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values)
{
    qsort(values, ROUNDS, sizeof(*values), by_value);
    return values[ROUNDS / 2];
}

static void fill(struct bed *bed, struct cn_client *c, uint64_t chunks)
{
    CHECK_EQ(cn_keeper_start(bed->keeper), CN_OK);
    for (uint64_t n = 0; n < chunks; n++) {
        struct cn_grant grant;
        CHECK_EQ(cn_reserve(c, 4096, 0, 1000, &grant), CN_OK);
        struct bed_key key = bed_key(n);
        struct cn_put put = {.ref = grant.ref,
                             .key = key.bytes,
                             .data_bytes = 4096,
                             .ns_slot = bed->ns,
                             .position = CN_POSITION_UNKNOWN};
        CHECK_EQ(cn_commit(c, &put, 1000), CN_OK);
    }
    CHECK_EQ(cn_flush(c, 10000), CN_OK);
    CHECK_EQ(cn_keeper_stop(bed->keeper), CN_OK);
    /* A few in a million find all three buckets full and are dropped; the rest must be there. */
    CHECK(bed->keeper->count.live_chunks + bed->keeper->count.refused == chunks);
    CHECK(bed->keeper->count.refused <= chunks / 50000);
}

/* A random cycle through all cache lines of memory of this size. */
static uint32_t *make_cycle(uint64_t lines)
{
    uint32_t *order = malloc(lines * sizeof(*order));
    uint32_t *cycle =
        mmap(NULL, lines * 64, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(order != NULL && cycle != MAP_FAILED);
    for (uint64_t i = 0; i < lines; i++)
        order[i] = (uint32_t)i;
    for (uint64_t i = lines - 1; i > 0; i--) {
        uint64_t j = random_next() % i;
        uint32_t held = order[i];
        order[i] = order[j];
        order[j] = held;
    }
    for (uint64_t i = 0; i < lines; i++)
        cycle[(uint64_t)order[i] * 16] = order[(i + 1) % lines];
    free(order);
    return cycle;
}

struct bench {
    struct bed bed;
    struct cn_client *client;
    uint64_t chunks;
    uint32_t *cycle;
    uint64_t lines;
    uint8_t *keys; /* CALLS random keys that are present */
};

static double dependent_load(const struct bench *b)
{
    uint32_t at = (uint32_t)(random_next() % b->lines);
    double start = now_ns();
    for (int i = 0; i < CALLS; i++)
        at = b->cycle[(uint64_t)at * 16];
    sink += at;
    return (now_ns() - start) / CALLS;
}

static double independent_hits(const struct bench *b)
{
    uint64_t sum = 0; /* in a register: a sum in memory is a chain through every hit */
    double start = now_ns();
    for (int i = 0; i < CALLS; i++) {
        struct cn_view view;
        CHECK(cn_lease(b->client, b->bed.ns, b->keys + (size_t)i * 32, &view) == CN_OK);
        sum += view.ref;
        cn_release(b->client, view.slot);
    }
    sink += sum;
    return (now_ns() - start) / CALLS;
}

/*
 * The next key is chosen by the last result, so that no two hits overlap. It is one of two that lie
 * side by side: a caller's keys are in its cache, and a third miss to fetch one would not be ours.
 */
static double dependent_hits(const struct bench *b)
{
    uint64_t at = 0;
    double start = now_ns();
    for (int i = 0; i < CALLS; i++) {
        struct cn_view view;
        CHECK(cn_lease(b->client, b->bed.ns, b->keys + at * 32, &view) == CN_OK);
        cn_release(b->client, view.slot);
        at = ((uint64_t)i + (view.ref & 1)) % CALLS;
    }
    return (now_ns() - start) / CALLS;
}

static double hot_hits(const struct bench *b)
{
    uint64_t sum = 0;
    double start = now_ns();
    for (int i = 0; i < CALLS; i++) {
        struct cn_view view;
        CHECK(cn_lease(b->client, b->bed.ns, b->keys + (size_t)(i % HOT_KEYS) * 32, &view) ==
              CN_OK);
        sum += view.ref;
        cn_release(b->client, view.slot);
    }
    sink += sum;
    return (now_ns() - start) / CALLS;
}

static double batch_leases(const struct bench *b)
{
    static struct cn_view views[BATCH_KEYS];
    uint32_t count;
    double start = now_ns();
    for (int i = 0; i + BATCH_KEYS <= CALLS; i += BATCH_KEYS) {
        cn_lease_many(b->client, b->bed.ns, b->keys + (size_t)i * 32, BATCH_KEYS, views, &count);
        CHECK(count == BATCH_KEYS);
        cn_release_many(b->client, views, count);
    }
    return (now_ns() - start) / (CALLS / BATCH_KEYS * BATCH_KEYS);
}

static double batch_matches(const struct bench *b)
{
    uint32_t count;
    double start = now_ns();
    for (int i = 0; i + BATCH_KEYS <= CALLS; i += BATCH_KEYS) {
        cn_match(b->client, b->bed.ns, b->keys + (size_t)i * 32, BATCH_KEYS, &count);
        CHECK(count == BATCH_KEYS);
    }
    return (now_ns() - start) / (CALLS / BATCH_KEYS * BATCH_KEYS);
}

struct row {
    const char *name;
    double (*run)(const struct bench *b);
    double value[ROUNDS];
};

static void measure(const struct bench *b)
{
    struct row rows[] = {
        {"dependent_load_ns", dependent_load, {0}}, {"hit_ns", independent_hits, {0}},
        {"hit_dependent_ns", dependent_hits, {0}},  {"hit_hot_ns", hot_hits, {0}},
        {"lease_many_512_ns", batch_leases, {0}},   {"match_512_ns", batch_matches, {0}},
    };
    enum { N = sizeof(rows) / sizeof(rows[0]) };
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < N; i++)
            rows[i].value[round] = rows[i].run(b);
    printf("{\"bench\": \"hit\", \"chunks\": %llu, \"catalog_mb\": %.0f",
           (unsigned long long)b->chunks, (double)b->lines * 64 / 1e6);
    double load = median(rows[0].value);
    for (int i = 0; i < N; i++) {
        double value = median(rows[i].value);
        printf(", \"%s\": %.1f, \"%.*s_ratio\": %.2f", rows[i].name, value,
               (int)strlen(rows[i].name) - 3, rows[i].name, value / load);
    }
    printf("}\n");
    fflush(stdout);
}

static void bench(uint64_t chunks)
{
    uint64_t region_bytes = (chunks * 4096 * 5 / 4 + (64u << 20)) & ~((2ull << 20) - 1);
    struct bench b = {.chunks = chunks};
    b.bed = bed_open(region_bytes, (uint32_t)chunks + 4096, 8192, "use-count");
    struct bed_session s = bed_attach(&b.bed, CN_ROLE_WRITER);
    b.client = s.client;
    fill(&b.bed, b.client, chunks);
    const struct cn_super *super = b.bed.catalog;
    b.lines = ((uint64_t)super->chunk_count + super->bucket_count) * 64 / 64;
    b.cycle = make_cycle(b.lines);
    b.keys = malloc((size_t)CALLS * 32);
    for (int i = 0; i < CALLS;) {
        struct bed_key key = bed_key(random_next() % chunks);
        uint32_t d;
        memcpy(b.keys + (size_t)i * 32, key.bytes, 32);
        i += cn_find(b.bed.catalog, b.bed.ns, key.bytes, &d) == CN_OK;
    }
    measure(&b);
    free(b.keys);
    munmap(b.cycle, b.lines * 64);
    bed_kill(&b.bed, &s);
    bed_close(&b.bed);
}

int main(int argc, char **argv)
{
    static const uint64_t sizes[] = {10000, 100000, 1000000, 4000000};
    if (argc == 1)
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
            bench(sizes[i]);
    for (int i = 1; i < argc; i++)
        bench(strtoull(argv[i], NULL, 10));
    return sink == 42;
}
