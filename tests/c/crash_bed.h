/* SPDX-License-Identifier: Apache-2.0 */
/* What a pool goes through until its keeper dies, and what the test shares with that process. */
#ifndef CN_TEST_CRASH_BED_H
#define CN_TEST_CRASH_BED_H

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

/* A key is deleted and stored again by one batch of records; the keeper dies behind the second,
 * when the ring's head is not stored yet. */
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

#endif
