/* SPDX-License-Identifier: Apache-2.0 */
/* Claims: a session whose role is taken away stores, pins and deletes no more through its ring,
 * each try is counted, its unused stock goes back and is not filled again, what it took out stays
 * its own until given back (I6); a writer that was an admin goes on; a successor is left alone. */
#include "pool_bed.h"

static void submit(struct bed *bed, const struct bed_session *s, uint32_t op, uint64_t n,
                   uint64_t arg)
{
    struct bed_key key = bed_key(n);
    struct cn_record record = {.op = (uint8_t)op, .ns_slot = (uint16_t)bed->ns, .arg = arg};
    memcpy(record.key, key.bytes, CN_KEY_BYTES);
    CHECK_EQ(cn_submit(s->client, &record, 0), CN_OK);
    bed_settle(bed);
}

static struct cn_grant reserved(struct bed *bed, const struct bed_session *s)
{
    struct cn_grant grant;
    cn_reserve(s->client, 4096, 0, 0, &grant); /* nobody answers: the keeper is stepped by hand */
    bed_settle(bed);
    CHECK_EQ(cn_reserve(s->client, 4096, 0, 0, &grant), CN_OK);
    return grant;
}

static int commit(struct bed *bed, const struct bed_session *s, uint64_t ref, uint64_t n)
{
    struct bed_key key = bed_key(n);
    struct cn_put put = {.ref = ref,
                         .key = key.bytes,
                         .data_bytes = 4096,
                         .ns_slot = bed->ns,
                         .position = CN_POSITION_UNKNOWN};
    int status = cn_commit(s->client, &put, 0);
    bed_settle(bed);
    return status;
}

static void a_demoted_session_changes_nothing(void)
{
    struct bed bed = bed_open(16 << 20, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    const struct cn_counters *count = &bed.keeper->count;
    for (uint64_t n = 0; n < 20; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    struct cn_grant grant = reserved(&bed, &s);
    CHECK(count->granted_bytes > 4096); /* one taken out, and a stock */

    CHECK_EQ(cn_keeper_session_demote(bed.keeper, s.session, s.nonce, CN_ROLE_READER), CN_OK);
    CHECK_EQ(count->granted_bytes, 4096);
    CHECK_EQ(bed.keeper->catalog.registry[s.session].word >> 8 & 0xff, CN_ROLE_READER);
    bed_audit(&bed);

    CHECK_EQ(commit(&bed, &s, grant.ref, 99), CN_OK);
    CHECK_EQ(count->refused, 1);
    submit(&bed, &s, CN_OP_DELETE, 1, 0);
    submit(&bed, &s, CN_OP_PIN, 2, UINT64_MAX);
    submit(&bed, &s, CN_OP_UNPIN, 2, 0);
    submit(&bed, &s, CN_OP_WANT, 0, 4096);
    CHECK_EQ(count->refused, 5);
    CHECK_EQ(count->bad_records, 0);
    CHECK_EQ(count->granted_bytes, 0);
    CHECK_EQ(count->deletions, 0);
    CHECK_EQ(count->pinned_chunks, 0);
    CHECK_EQ(count->live_chunks, 20);

    struct bed_key key = bed_key(1);
    struct cn_view view;
    CHECK_EQ(cn_lease(s.client, bed.ns, key.bytes, &view), CN_OK);
    cn_release(s.client, view.slot);
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_audit(&bed);
    bed_close(&bed);
}

/* The namespace may be asked for once more before the client hears of it. */
static void a_demoted_session_opens_no_namespace(void)
{
    struct bed bed = bed_open(16 << 20, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    static const uint8_t manifest[] = {0x80};
    struct cn_namespace_open ns = {.id = {7},
                                   .name = "",
                                   .manifest = manifest,
                                   .manifest_bytes = 1,
                                   .session = s.session,
                                   .session_nonce = s.nonce};
    CHECK_EQ(cn_keeper_session_demote(bed.keeper, s.session, s.nonce, CN_ROLE_READER), CN_OK);
    CHECK_EQ(cn_keeper_namespace_open(bed.keeper, &ns), CN_OK);
    CHECK(!cn_session_may_write(bed.keeper, bed.keeper->sessions[s.session], ns.ret_slot));
    CHECK_EQ(cn_keeper_session_demote(bed.keeper, s.session, s.nonce, CN_ROLE_ADMIN), CN_OK);
    CHECK_EQ(bed.keeper->sessions[s.session]->role, CN_ROLE_READER);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static void an_admin_becomes_a_writer(void)
{
    struct bed bed = bed_open(16 << 20, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_ADMIN);
    CHECK_EQ(cn_keeper_session_demote(bed.keeper, s.session, s.nonce, CN_ROLE_WRITER), CN_OK);
    CHECK_EQ(bed_put(&bed, s.client, 1, 4096, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(bed.keeper->count.live_chunks, 1);
    CHECK_EQ(bed.keeper->count.refused, 0);
    bed_kill(&bed, &s);
    bed_close(&bed);
}

static void whom_it_does_not_mean_stays(void)
{
    struct bed bed = bed_open(16 << 20, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    struct cn_keeper *k = bed.keeper;
    CHECK_EQ(cn_keeper_session_demote(k, s.session, s.nonce + 1, CN_ROLE_READER), CN_EMISS);
    CHECK_EQ(cn_keeper_session_demote(k, CN_SESSIONS_MAX, s.nonce, CN_ROLE_READER), CN_EMISS);
    CHECK_EQ(cn_keeper_session_demote(k, s.session, s.nonce, 0), CN_EINVAL);
    CHECK_EQ(cn_keeper_session_demote(k, s.session, s.nonce, CN_ROLE_ADMIN + 1), CN_EINVAL);
    CHECK_EQ(k->sessions[s.session]->role, CN_ROLE_WRITER);
    CHECK(cn_session_may_write(k, k->sessions[s.session], bed.ns));
    bed_kill(&bed, &s);
    bed_close(&bed);
}

int main(void)
{
    RUN(a_demoted_session_changes_nothing);
    RUN(a_demoted_session_opens_no_namespace);
    RUN(an_admin_becomes_a_writer);
    RUN(whom_it_does_not_mean_stays);
    return TEST_PASS;
}
