/* SPDX-License-Identifier: Apache-2.0 */
/* Claims: a takeover reads what a client wrote once and bounded (I4), takes over nothing that it
 * cannot keep, and changes nothing then (I7); a chunk in doubt is checked before its use (I9); a
 * session commits to namespaces of its tenant alone (I8). Deaths are in crash_points.c. */
#include "pool_bed.h"

#define MIB (1024u * 1024u)

static struct cn_adopt_session kept(const struct bed *bed, const struct bed_session *s)
{
    return (struct cn_adopt_session){.segment = s->segment,
                                     .segment_bytes =
                                         cn_session_segment_bytes(bed->format.lease_slots),
                                     .nonce = s->nonce,
                                     .session = s->session,
                                     .liveness_fd = -1,
                                     .doorbell_fd = -1,
                                     .pidfd = -1};
}

/* The old keeper is as good as dead: it is not called again. */
static int succeed(struct bed *bed, const struct cn_adopt_session *sessions, uint32_t count,
                   struct cn_recovery *ret_found)
{
    struct cn_keeper_config config = bed_config("use-count");
    struct cn_keeper *dead = bed->keeper;
    int status = cn_keeper_adopt(bed->catalog, bed->catalog_bytes, &bed->region, &config, sessions,
                                 count, ret_found, &bed->keeper);
    cn_keeper_destroy(dead);
    for (uint32_t i = 0; status == CN_OK && i < count; i++)
        bed->keeper->sessions[sessions[i].session]->death_check_ns = 0; /* there is no lock here */
    return status;
}

static void what_a_client_wrote_harms_itself_only(void)
{
    struct cn_recovery found;
    for (uint32_t seed = 1; seed <= 200; seed++) {
        struct bed bed = bed_open(16 * MIB, 1024, 512, "use-count");
        struct bed_session good = bed_attach(&bed, CN_ROLE_WRITER);
        struct bed_session evil = bed_attach(&bed, CN_ROLE_WRITER);
        for (uint64_t n = 0; n < 20; n++)
            CHECK_EQ(bed_put(&bed, good.client, n, 65536, NULL), CN_OK);
        CHECK_EQ(bed_put(&bed, evil.client, 20, 4096, NULL), CN_OK);
        bed_settle(&bed);
        uint64_t *words = evil.segment;
        uint64_t x = seed;
        size_t count = cn_session_segment_bytes(512) / 8;
        for (size_t i = 0; i < count; i++) {
            x = x * 6364136223846793005ull + 1442695040888963407ull;
            if (x % 3 != 0)
                words[i] = seed % 2 == 0 ? x : x >> 33 % (seed % 61 + 1);
        }
        struct cn_adopt_session both[] = {kept(&bed, &good), kept(&bed, &evil)};
        CHECK_EQ(succeed(&bed, both, 2, &found), CN_OK);
        CHECK_EQ(found.live_chunks, 21);
        bed_settle(&bed);
        bed_audit(&bed);
        for (uint64_t n = 100; n < 110; n++)
            CHECK_EQ(bed_put(&bed, good.client, n, 65536, NULL), CN_OK);
        bed_settle(&bed);
        struct bed_key key = bed_key(105);
        struct cn_view view;
        CHECK_EQ(cn_lease(good.client, bed.ns, key.bytes, &view), CN_OK);
        bed_check_bytes(&view, 105);
        cn_release(good.client, view.slot);
        bed_audit(&bed);
        bed_kill(&bed, &evil);
        bed_kill(&bed, &good);
        CHECK_EQ(bed.keeper->count.granted_bytes, 0);
        bed_close(&bed);
    }
}

static void with_a_session_missing_nothing_is_changed(void)
{
    struct bed bed = bed_open(16 * MIB, 1024, 512, "use-count");
    struct bed_session a = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_session b = bed_attach(&bed, CN_ROLE_READER);
    struct cn_recovery found;
    struct cn_keeper *keeper = bed.keeper;
    struct cn_keeper_config config = bed_config("lru");
    CHECK_EQ(bed_put(&bed, a.client, 1, 65536, NULL), CN_OK);
    bed_settle(&bed);
    void *before = malloc(bed.catalog_bytes);
    CHECK(before != NULL);
    memcpy(before, bed.catalog, bed.catalog_bytes);
    struct cn_adopt_session one = kept(&bed, &a);
    struct cn_adopt_session other = kept(&bed, &b);
    other.nonce++;
    struct cn_adopt_session twice[] = {one, one};
    struct cn_adopt_session wrong[] = {one, other};
#define ADOPT(sessions, count)                                                                     \
    cn_keeper_adopt(bed.catalog, bed.catalog_bytes, &bed.region, &config, sessions, count, &found, \
                    &bed.keeper)
    CHECK_EQ(ADOPT(&one, 1), CN_EMISS);
    CHECK_EQ(ADOPT(NULL, 0), CN_EMISS);
    CHECK_EQ(ADOPT(twice, 2), CN_EINVAL);
    CHECK_EQ(ADOPT(wrong, 2), CN_EINVAL);
    CHECK_MEM_EQ(before, bed.catalog, bed.catalog_bytes);
    keeper->catalog.chunks[0].data_off = 1ull << 40;
    struct cn_adopt_session both[] = {one, kept(&bed, &b)};
    CHECK_EQ(ADOPT(both, 2), CN_ECORRUPT);
    keeper->catalog.chunks[0].data_off = 0;
    CHECK_MEM_EQ(before, bed.catalog, bed.catalog_bytes);
    free(before);
    bed.keeper = keeper;
    bed_kill(&bed, &a);
    bed_kill(&bed, &b);
    bed_close(&bed);
}

static void a_chunk_in_doubt_is_checked_once(void)
{
    struct bed bed = bed_open(16 * MIB, 1024, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    struct cn_recovery found;
    struct cn_view view;
    for (uint64_t n = 0; n < 2; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 65536, NULL), CN_OK);
    bed_settle(&bed);
    struct cn_adopt_session one = kept(&bed, &s);
    CHECK_EQ(succeed(&bed, &one, 1, &found), CN_OK);
    CHECK_EQ(found.unverified, 2);
    for (uint64_t n = 0; n < 2; n++) {
        struct bed_key key = bed_key(n);
        CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &view), CN_OK);
        CHECK((view.flags & CN_CF_UNVERIFIED) != 0);
        uint8_t *bytes =
            (uint8_t *)bed.region + bed.keeper->catalog.chunks[cn_ref_d(view.ref)].data_off;
        bytes[77] ^= n == 1;
        CHECK_EQ(cn_view_admit(s.client, &view), n == 1 ? CN_EMISS : CN_OK);
        bytes[77] ^= n == 0; /* what was checked is not looked at again */
        CHECK_EQ(n == 1 ? CN_OK : cn_view_admit(s.client, &view), CN_OK);
        if (n == 0)
            cn_release(s.client, view.slot);
        CHECK_EQ(cn_client_leases(s.client), 0);
    }
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static uint32_t open_ns(struct bed *bed, const struct bed_session *s, uint8_t id, uint64_t tenant)
{
    static const uint8_t manifest[] = {0x80};
    struct cn_namespace_open ns = {.id = {id},
                                   .tenant = tenant,
                                   .name = "",
                                   .manifest = manifest,
                                   .manifest_bytes = 1,
                                   .session = s->session,
                                   .session_nonce = s->nonce};
    CHECK_EQ(cn_keeper_namespace_open(bed->keeper, &ns), CN_OK);
    return ns.ret_slot;
}

static void a_session_writes_for_its_tenant_alone(void)
{
    struct bed bed = bed_open(16 * MIB, 1024, 512, "use-count");
    struct bed_session a = bed_attach(&bed, CN_ROLE_WRITER);
    struct bed_session b = bed_attach(&bed, CN_ROLE_WRITER);
    uint32_t of_a = open_ns(&bed, &a, 21, 1);
    uint32_t of_b = open_ns(&bed, &b, 22, 2);
    struct cn_recovery found;
    struct cn_adopt_session both[] = {kept(&bed, &a), kept(&bed, &b)};
    CHECK_EQ(succeed(&bed, both, 2, &found), CN_OK); /* the registry remembers it */
    bed.ns = of_b;
    CHECK_EQ(bed_put(&bed, a.client, 1, 4096, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.refused, 1);
    CHECK_EQ(bed.keeper->count.live_chunks, 0);
    CHECK_EQ(bed_put(&bed, b.client, 1, 4096, NULL), CN_OK);
    bed.ns = of_a;
    CHECK_EQ(bed_put(&bed, a.client, 2, 4096, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.live_chunks, 2);
    bed_kill(&bed, &a);
    bed_kill(&bed, &b);
    bed_audit(&bed);
    bed_close(&bed);
}

int main(void)
{
    what_a_client_wrote_harms_itself_only();
    with_a_session_missing_nothing_is_changed();
    a_chunk_in_doubt_is_checked_once();
    a_session_writes_for_its_tenant_alone();
    return TEST_PASS;
}
