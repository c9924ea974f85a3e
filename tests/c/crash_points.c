/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Claim: a keeper that dies at any step of any catalog change leaves a pool that another takes
 * over: no committed chunk is lost or torn, no table contradicts another, and it goes on (I5, I7).
 *
 *   crash_points [ROUNDS] kill at every point, and at every point of the takeover after it
 *   crash_points --list   the points that the scenario passes, one a line
 *
 * The keeper and its clients are a child process that ends at a crash point. Session segments are
 * made by the parent, which is the custody.
 */
#include <sys/wait.h>

#include "crash_bed.h"

/* ---- taking over ---------------------------------------------------------- */

static int take_over(struct custody *c, struct cn_recovery *ret_found)
{
    struct bed *bed = &c->bed;
    struct cn_adopt_session sessions[SEGMENTS];
    uint32_t count = 0;
    struct cn_catalog catalog;
    CHECK_EQ(cn_catalog_open(bed->catalog, bed->catalog_bytes, &catalog), CN_OK);
    for (uint32_t i = 0; i < CN_SESSIONS_MAX; i++) {
        if ((catalog.registry[i].word & 0xff) != CN_SESSION_OPEN)
            continue;
        CHECK(shared->segment_of[i] > 0); /* kept before it was OPEN (I7) */
        sessions[count++] = (struct cn_adopt_session){
            .segment = c->map[shared->segment_of[i] - 1],
            .segment_bytes = cn_session_segment_bytes(bed->format.lease_slots),
            .nonce = catalog.registry[i].nonce,
            .session = i,
            .liveness_fd = -1,
            .doorbell_fd = -1,
            .pidfd = -1};
    }
    struct cn_keeper_config config = bed_config("use-count");
    int status = cn_keeper_adopt(bed->catalog, bed->catalog_bytes, &bed->region, &config, sessions,
                                 count, ret_found, &bed->keeper);
    for (uint32_t i = 0; i < count && status == CN_OK; i++)
        bed->keeper->sessions[sessions[i].session]->death_check_ns = 0; /* they live: no lock */
    return status;
}

static uint64_t key_number(const struct cn_chunk *chunk)
{
    for (uint64_t n = 0; n < KEYS; n++) {
        struct bed_key key = bed_key(n);
        if (memcmp(key.bytes, chunk->key, CN_KEY_BYTES) == 0)
            return n;
    }
    CHECK_MSG(false, "a key that nobody wrote");
    return 0;
}

/* Bit a key: it is LIVE somewhere, its bytes are right. */
static void committed(const struct bed *bed, uint8_t *ret_there)
{
    struct cn_catalog c;
    CHECK_EQ(cn_catalog_open(bed->catalog, bed->catalog_bytes, &c), CN_OK);
    memset(ret_there, 0, KEYS);
    for (uint32_t d = 0; d < c.chunk_count; d++) {
        const struct cn_chunk *chunk = &c.chunks[d];
        if (cn_word_state(chunk->word) != CN_LIVE)
            continue;
        uint64_t n = key_number(chunk);
        const uint8_t *bytes = (const uint8_t *)bed->region + chunk->data_off;
        uint64_t size = (uint32_t)chunk->size_crc;
        for (uint64_t i = 0; i < size; i += 97)
            CHECK_EQ(bytes[i], bed_byte(n, i));
        CHECK_EQ(cn_crc32c(0, bytes, size), chunk->size_crc >> 32);
        ret_there[n] = 1;
    }
}

static void everything_is_there(struct custody *c, const uint8_t *before)
{
    static uint8_t after[KEYS];
    struct bed *bed = &c->bed;
    bed_audit(bed);
    committed(bed, after);
    CHECK_MEM_EQ(before, after, KEYS);
    for (uint64_t n = 0; n < KEYS; n++) {
        struct bed_key key = bed_key(n);
        uint32_t d;
        if (before[n])
            CHECK_EQ(cn_find(bed->catalog, bed->ns, key.bytes, &d), CN_OK);
    }
}

/* The pool is one that can be used: everything leaves, and as much comes in as into a new one. */
static void it_goes_on(struct custody *c)
{
    struct bed *bed = &c->bed;
    for (uint32_t i = 0; i < bed->keeper->session_count; i++)
        bed->keeper->sessions[bed->keeper->session_list[i]]->death_check_ns = 1;
    bed_settle(bed);
    CHECK_EQ(bed->keeper->session_count, 0);
    CHECK_EQ(bed->keeper->count.granted_bytes, 0);
    uint64_t dropped;
    CHECK_EQ(cn_keeper_clear(bed->keeper, &dropped), CN_OK);
    bed_settle(bed);
    CHECK_EQ(bed->keeper->limbo_count, 0);
    struct cn_arena_stats stats;
    cn_arena_stats(bed->keeper->arena[0], &stats);
    CHECK_EQ(stats.extent_bytes, 0);
    struct bed_session w = bed_attach(bed, CN_ROLE_WRITER);
    for (uint64_t n = 480; n < 540; n++)
        CHECK_EQ(bed_put(bed, w.client, n, 65536, NULL), CN_OK);
    bed_settle(bed);
    CHECK_EQ(bed->keeper->count.live_chunks, 60);
    bed_audit(bed);
    bed_kill(bed, &w);
    bed_audit(bed);
}

/* ---- worlds --------------------------------------------------------------- */

static struct custody make_world(void)
{
    struct custody c = {.bed = {.format = {.pool_name = "test",
                                           .pool_id = {1, 2, 3},
                                           .hash_seed = {0x1234, 0x5678},
                                           .chunk_count = 1024,
                                           .lease_slots = 512,
                                           .event_count = 1024,
                                           .region_count = 1}}};
    c.bed.format.regions[0].bytes = 16 * MIB;
    c.bed.catalog_bytes = cn_catalog_bytes(&c.bed.format);
    c.bed.catalog_fd = bed_object(c.bed.catalog_bytes, &c.bed.catalog);
    c.bed.region_fd = bed_object(16 * MIB, &c.bed.region);
    c.bed.ns = 1;
    CHECK_EQ(cn_catalog_format(c.bed.catalog, c.bed.catalog_bytes, &c.bed.format), CN_OK);
    for (uint32_t i = 0; i < SEGMENTS; i++)
        c.fd[i] = bed_object(cn_session_segment_bytes(512), &c.map[i]);
    memset(shared->segment_of, 0, sizeof(shared->segment_of));
    return c;
}

static void end_world(struct custody *c)
{
    if (c->bed.keeper != NULL)
        cn_keeper_destroy(c->bed.keeper);
    munmap(c->bed.catalog, c->bed.catalog_bytes);
    munmap(c->bed.region, 16 * MIB);
    close(c->bed.catalog_fd);
    close(c->bed.region_fd);
    for (uint32_t i = 0; i < SEGMENTS; i++) {
        munmap(c->map[i], cn_session_segment_bytes(512));
        close(c->fd[i]);
    }
}

static int in_child(struct custody *c, void (*run)(struct custody *))
{
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        cn_crash_hook = on_point;
        run(c);
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_MSG(WIFEXITED(status), "killed by signal %d at %s", WTERMSIG(status), shared->target);
    return WEXITSTATUS(status);
}

static void live(struct custody *c)
{
    struct cn_keeper_config config = bed_config("use-count");
    CHECK_EQ(cn_keeper_create(c->bed.catalog, c->bed.catalog_bytes, &c->bed.region, &config,
                              &c->bed.keeper),
             CN_OK);
    scenario(c);
}

static void succeed(struct custody *c)
{
    struct cn_recovery found;
    CHECK_EQ(take_over(c, &found), CN_OK);
}

struct aim {
    char name[48];
    uint32_t hits;
};

static uint32_t points_hit(struct aim *ret_aims)
{
    uint32_t n = 0;
    for (; n < POINTS_MAX && shared->points[n].name[0] != 0; n++) {
        memcpy(ret_aims[n].name, shared->points[n].name, sizeof(ret_aims[n].name));
        ret_aims[n].hits = shared->points[n].hits;
    }
    return n;
}

/* A first keeper dies at that point; a second one, when second is not NULL, at that. Returns false
 * when the second came through, for this point is not on its way. */
static bool crash_at(const struct aim *first, uint32_t hit, const struct aim *second,
                     struct aim *ret_takeover, uint32_t *ret_takeover_count)
{
    static uint8_t before[KEYS];
    struct custody c = make_world();
    aim(first->name, hit);
    CHECK_EQ(in_child(&c, live), CRASHED);
    cover(first->name);
    committed(&c.bed, before);
    bool died = true;
    if (second != NULL) {
        aim(second->name, 1);
        died = in_child(&c, succeed) == CRASHED;
        if (died)
            cover(second->name);
        if (ret_takeover != NULL)
            *ret_takeover_count = points_hit(ret_takeover);
    }
    struct cn_recovery found;
    int status = take_over(&c, &found);
    CHECK_MSG(status == CN_OK, "taken over with status %d after %s", status, first->name);
    CHECK_EQ(found.was_clean, 0);
    everything_is_there(&c, before);
    it_goes_on(&c);
    end_world(&c);
    return died;
}

/* A pool that was given up is taken over by nobody. */
static void crash_after_retirement(void)
{
    struct custody c = make_world();
    struct cn_recovery found;
    aim("retired", 1);
    CHECK_EQ(in_child(&c, live), CRASHED);
    cover("retired");
    CHECK_EQ(take_over(&c, &found), CN_ECLOSED);
    end_world(&c);
}

static void a_deletion_is_not_repeated(void)
{
    struct custody c = make_world();
    struct cn_recovery found;
    struct bed_key key = bed_key(5);
    uint32_t d;
    aim("nowhere", 1);
    CHECK_EQ(in_child(&c, delete_and_store), CRASHED);
    CHECK_EQ(take_over(&c, &found), CN_OK);
    bed_settle(&c.bed);
    CHECK_EQ(cn_find(c.bed.catalog, c.bed.ns, key.bytes, &d), CN_OK);
    bed_audit(&c.bed);
    end_world(&c);
}

/* At so many of the times that the scenario passes the point. */
static uint32_t crash_here(const struct aim *point, uint32_t rounds)
{
    static struct aim takeover[POINTS_MAX];
    uint32_t takeover_count = 0;
    uint32_t runs = 0;
    for (uint32_t i = 0; i < rounds; i++) {
        uint32_t hit = 1 + i * point->hits / rounds;
        if (i > 0 && hit == 1 + (i - 1) * point->hits / rounds)
            continue;
        static const struct aim nowhere = {.name = "nowhere"};
        crash_at(point, hit, NULL, NULL, NULL);
        crash_at(point, hit, &nowhere, takeover, &takeover_count);
        for (uint32_t t = 0; t < takeover_count; t++)
            CHECK(crash_at(point, hit, &takeover[t], NULL, NULL));
        runs += 2 + takeover_count;
    }
    return runs;
}

int main(int argc, char **argv)
{
    static struct aim aims[POINTS_MAX];
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    struct custody c = make_world();
    aim("nowhere", 1);
    CHECK_EQ(in_child(&c, live), 0);
    uint32_t count = points_hit(aims);
    bool list = argc > 1 && strcmp(argv[1], "--list") == 0;
    uint32_t rounds = argc > 1 && !list ? (uint32_t)atoi(argv[1]) : 1;
    uint32_t runs = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (list)
            printf("%s %u\n", aims[i].name, aims[i].hits);
        else if (strcmp(aims[i].name, "retired") == 0)
            crash_after_retirement();
        else
            runs += crash_here(&aims[i], rounds);
    }
    if (!list)
        a_deletion_is_not_repeated();
    for (uint32_t i = 0; i < POINTS_MAX && covered[i][0] != 0; i++)
        printf("covered %s\n", covered[i]);
    if (!list)
        printf("%u points, %u deaths, every chunk there after each\n", count, runs);
    return TEST_PASS;
}
