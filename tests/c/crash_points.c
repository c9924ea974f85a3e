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

#include "pool_bed.h"

#include "cn_crash.h"

#define MIB (1024u * 1024u)
#define POINTS_MAX 128
#define SEGMENTS 4
#define KEYS 600
#define CRASHED 42

struct shared { /* with the children */
    struct {
        char name[48];
        uint32_t hits;
    } points[POINTS_MAX];
    uint32_t segment_of[CN_SESSIONS_MAX]; /* number + 1; 0: not in custody */
    char target[48];
    uint32_t at_hit;
};

static struct shared *shared;
static char covered[POINTS_MAX][48]; /* points at which a keeper died */

struct custody {
    struct bed bed;
    int fd[SEGMENTS];
    void *map[SEGMENTS];
};

static void on_point(const char *name)
{
    uint32_t i = 0;
    while (i < POINTS_MAX && shared->points[i].name[0] != 0 &&
           strcmp(shared->points[i].name, name) != 0)
        i++;
    CHECK(i < POINTS_MAX);
    snprintf(shared->points[i].name, sizeof(shared->points[i].name), "%s", name);
    shared->points[i].hits++;
    if (strcmp(shared->target, name) == 0 && shared->points[i].hits == shared->at_hit)
        _exit(CRASHED);
}

static void cover(const char *name)
{
    uint32_t i = 0;
    while (i < POINTS_MAX - 1 && covered[i][0] != 0 && strcmp(covered[i], name) != 0)
        i++;
    snprintf(covered[i], sizeof(covered[i]), "%s", name);
}

static void aim(const char *name, uint32_t hit)
{
    memset(shared->points, 0, sizeof(shared->points));
    memset(shared->target, 0, sizeof(shared->target));
    snprintf(shared->target, sizeof(shared->target), "%s", name);
    shared->at_hit = hit;
}

/* ---- what the pool goes through ------------------------------------------- */

static struct bed_session enter(struct custody *c, uint32_t number, uint32_t role)
{
    struct bed *bed = &c->bed;
    struct bed_session s = {.segment = c->map[number]};
    uint64_t bytes = cn_session_segment_bytes(bed->format.lease_slots);
    int doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct cn_session_open open = {.segment = s.segment,
                                   .segment_bytes = bytes,
                                   .liveness_fd = -1,
                                   .doorbell_fd = -1,
                                   .pidfd = -1,
                                   .role = role,
                                   .opening = 1,
                                   .lease_limit_bytes = UINT64_MAX,
                                   .label = "crash"};
    CHECK_EQ(cn_keeper_session_open(bed->keeper, &open), CN_OK);
    s.session = open.ret_session;
    s.nonce = open.ret_nonce;
    shared->segment_of[s.session] = number + 1;
    CHECK_EQ(cn_keeper_session_confirm(bed->keeper, s.session, s.nonce), CN_OK);
    struct cn_attach attach = {.catalog_fd = bed->catalog_fd,
                               .session_fd = c->fd[number],
                               .doorbell_fd = doorbell,
                               .region_count = 1,
                               .region_ro_fd = {bed->region_fd},
                               .region_rw_fd = {role >= CN_ROLE_WRITER ? bed->region_fd : -1},
                               .catalog_bytes = bed->catalog_bytes};
    int err;
    CHECK_EQ(cn_client_attach(&attach, &s.client, &err), CN_OK);
    return s;
}

static uint32_t open_ns(struct bed *bed, const struct bed_session *s, uint8_t id, const char *name,
                        uint64_t quota_bytes)
{
    static const uint8_t manifest[] = {0x80};
    struct cn_namespace_open ns = {.id = {id},
                                   .quota_bytes = quota_bytes,
                                   .name = name,
                                   .manifest = manifest,
                                   .manifest_bytes = 1,
                                   .session = s->session,
                                   .session_nonce = s->nonce};
    CHECK_EQ(cn_keeper_namespace_open(bed->keeper, &ns), CN_OK);
    return ns.ret_slot;
}

static void submit(struct bed *bed, const struct bed_session *s, uint32_t op, uint64_t n,
                   uint64_t arg)
{
    struct bed_key key = bed_key(n);
    struct cn_record record = {
        .op = (uint8_t)op, .ns_slot = (uint16_t)bed->ns, .arg = arg, .cookie = 7};
    memcpy(record.key, key.bytes, CN_KEY_BYTES);
    CHECK_EQ(cn_submit(s->client, &record, 0), CN_OK);
    bed_settle(bed);
}

static void end_session(struct bed *bed, struct bed_session *s)
{
    cn_client_close(s->client);
    CHECK_EQ(cn_keeper_session_hint(bed->keeper, s->session, s->nonce), CN_OK);
    cn_keeper_step(bed->keeper);
    shared->segment_of[s->session] = 0;
}

static void chain(struct bed *bed, const struct bed_session *s, uint64_t from, uint64_t to,
                  uint64_t bytes)
{
    for (uint64_t n = from; n < to; n++) {
        struct bed_key parent = bed_key(n - 1);
        CHECK_EQ(bed_put(bed, s->client, n, bytes, n % 8 == 0 ? NULL : &parent), CN_OK);
    }
    bed_settle(bed);
}

/* A clock of the test's own, so that a time-to-live and a pin can end. */
static uint64_t now_ns = 1000000000000000000ull;

static void scenario(struct custody *c)
{
    struct bed *bed = &c->bed;
    CHECK_EQ(cn_keeper_set_clock(bed->keeper, &now_ns), CN_OK);
    struct bed_session reader = enter(c, 0, CN_ROLE_READER);
    struct bed_session a = enter(c, 1, CN_ROLE_WRITER);
    bed->ns = open_ns(bed, &a, 7, "", 0);
    open_ns(bed, &a, 7, "named", 0);
    chain(bed, &a, 0, 60, 65536);
    CHECK_EQ(bed_put(bed, a.client, 5, 65536, NULL), CN_OK); /* a second time */
    bed_settle(bed);
    struct cn_view view;
    struct bed_key key = bed_key(10);
    CHECK_EQ(cn_lease(reader.client, bed->ns, key.bytes, &view), CN_OK); /* and never lets go */
    struct bed_session b = enter(c, 2, CN_ROLE_WRITER);
    open_ns(bed, &b, 7, "", 0);
    submit(bed, &a, CN_OP_DELETE, 10, 0); /* into limbo */
    submit(bed, &a, CN_OP_DELETE, 11, 0);
    submit(bed, &a, CN_OP_PIN, 12, now_ns + 5000000000ull);
    submit(bed, &a, CN_OP_PIN, 13, now_ns + 900000000000ull);
    submit(bed, &a, CN_OP_UNPIN, 13, 0);
    submit(bed, &a, CN_OP_NOP, 0, 0);
    CHECK_EQ(cn_keeper_namespace_quota(bed->keeper, bed->ns, 14 * MIB), CN_OK);
    now_ns += 10000000000ull;
    bed_settle(bed);
    chain(bed, &b, 100, 400, 65536);       /* evicts */
    chain(bed, &b, 400, 420, 3 * MIB / 2); /* slabs go to another size: moves and reclaims */
    uint32_t d;
    struct bed_key late = bed_key(419);
    CHECK_EQ(cn_find(bed->catalog, bed->ns, late.bytes, &d), CN_OK);
    cn_set_crc(bed->keeper, cn_ref(d, cn_word_gen(cn_chunk_word(bed->keeper, d))),
               cn_word_gen(bed->keeper->catalog.chunks[d].size_crc));
    end_session(bed, &b);
    chain(bed, &a, 440, 460, 4096);
    struct bed_session again = enter(c, 3, CN_ROLE_ADMIN);
    CHECK_EQ(cn_keeper_session_demote(bed->keeper, again.session, again.nonce, CN_ROLE_READER),
             CN_OK);
    uint64_t dropped;
    CHECK_EQ(cn_keeper_clear(bed->keeper, &dropped), CN_OK);
    chain(bed, &a, 460, 480, 10000);
    bed_audit(bed);
    CHECK_EQ(cn_keeper_retire(bed->keeper), CN_OK);
}

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

/* A key is deleted and stored again by one batch of records; the keeper dies behind the second, when
 * the ring's head is not stored yet. */
static void delete_and_store(struct custody *c)
{
    struct bed *bed = &c->bed;
    struct cn_keeper_config config = bed_config("use-count");
    CHECK_EQ(
        cn_keeper_create(bed->catalog, bed->catalog_bytes, &bed->region, &config, &bed->keeper),
        CN_OK);
    struct bed_session s = enter(c, 0, CN_ROLE_WRITER);
    bed->ns = open_ns(bed, &s, 7, "", 0);
    CHECK_EQ(bed_put(bed, s.client, 5, 65536, NULL), CN_OK);
    bed_settle(bed);
    struct cn_record record = {.op = CN_OP_DELETE, .ns_slot = (uint16_t)bed->ns};
    struct bed_key key = bed_key(5);
    memcpy(record.key, key.bytes, CN_KEY_BYTES);
    struct cn_grant grant;
    CHECK_EQ(cn_reserve(s.client, 65536, 0, 0, &grant), CN_OK);
    CHECK_EQ(cn_submit(s.client, &record, 0), CN_OK);
    struct cn_put put = {.ref = grant.ref,
                         .key = key.bytes,
                         .data_bytes = 65536,
                         .ns_slot = bed->ns,
                         .position = CN_POSITION_UNKNOWN};
    CHECK_EQ(cn_commit(s.client, &put, 0), CN_OK);
    aim("record_done", 2);
    bed_settle(bed);
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
