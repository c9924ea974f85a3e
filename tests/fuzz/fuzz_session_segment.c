/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A client that writes garbage into its session: the keeper neither faults nor loops nor loses
 * count, and the other session's chunk stays what it was (I4).
 *
 * An input is a list of patches: where:32, value:64. Those with the highest bit of `where` go to a
 * word of one of the next records, the others to anywhere in the segment. Then the keeper makes a
 * few rounds over what lies in the ring, and every table is audited.
 */
#include "../c/pool_bed.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

void fuzz_reached(void);

enum { PATCH_BYTES = 12, ROUNDS = 20, RECORDS = 4, KEYS = 24 };
enum { OWN_GRANT = 1, OWN_SIZE = 2, OWN_KEY = 4, OWN_PARENT = 8 }; /* of a record's reserved[0] */
#define TO_RECORD 0x80000000u

static struct bed bed;
static struct bed_session bad;
static struct bed_session good;
static struct cn_view held;

static void make_bed(void)
{
    struct bed_key key = bed_key(1);
    bed = bed_open(8u << 20, 256, 64, "use-count");
    bad = bed_attach(&bed, CN_ROLE_WRITER);
    good = bed_attach(&bed, CN_ROLE_WRITER);
    CHECK_EQ(bed_put(&bed, good.client, 1, 6000, NULL), CN_OK);
    bed_settle(&bed);
    CHECK_EQ(cn_lease(good.client, bed.ns, key.bytes, &held), CN_OK);
}

static struct cn_record *next_record(struct cn_session *s, uint64_t i)
{
    return &s->sub[(s->sub_head + i) % CN_RING_RECORDS];
}

/* One of the grants that this session holds, in its stock or taken from it; 0: it has none. */
static uint64_t own_grant(const struct cn_session *s, uint64_t which)
{
    uint32_t d = s->grant_head;
    for (uint64_t i = 0; i < which % 8 && d != CN_NONE && bed.keeper->nodes[d].next != CN_NONE; i++)
        d = bed.keeper->nodes[d].next;
    return d == CN_NONE ? 0 : cn_ref(d, cn_word_gen(cn_chunk_word(bed.keeper, d)));
}

static void copy_key(uint64_t *ret_key, uint64_t n)
{
    struct bed_key key = bed_key(n % KEYS);
    memcpy(ret_key, key.bytes, sizeof(key.bytes));
}

/* Random grants, sizes and keys are refused at the first look; a liar knows what it was given. */
static void make_record_plausible(const struct cn_session *s, struct cn_record *r)
{
    uint64_t dice = r->reserved[0];
    r->op = (uint8_t)(r->op % 11);
    if (s->grant_head == CN_NONE && (dice & OWN_GRANT) != 0)
        r->op = CN_OP_WANT;
    if ((dice & OWN_GRANT) != 0)
        r->grant = own_grant(s, r->grant);
    if ((dice & OWN_SIZE) != 0) {
        r->arg = (1 + r->arg % 40) * CN_PAGE_BYTES;
        r->data_bytes = 1 + r->data_bytes % (2 * CN_PAGE_BYTES);
        r->meta_bytes = (uint16_t)(r->meta_bytes % 128);
    }
    if ((dice & OWN_KEY) != 0)
        copy_key(r->key, r->key[0]);
    if ((dice & OWN_PARENT) != 0) {
        r->flags |= CN_RF_PARENT;
        copy_key(r->parent_key, r->parent_key[0]);
    }
}

static void make_plausible(struct cn_session *s, size_t patches)
{
    for (uint64_t i = 0; i < RECORDS; i++) {
        struct cn_record *r = next_record(s, i);
        make_record_plausible(s, r);
        if (patches % 2 == 0)
            r->ns_slot = (uint16_t)bed.ns;
    }
    if (patches % 3 != 0)
        s->head->sub_tail = s->sub_head + RECORDS;
}

static void patch(struct cn_session *s, uint32_t where, const uint8_t *value)
{
    uint64_t words = cn_session_segment_bytes(bed.format.lease_slots) / 8;
    uint64_t *record = (uint64_t *)next_record(s, where >> 8 & (RECORDS - 1));
    if ((where & TO_RECORD) != 0)
        memcpy(record + where % (sizeof(struct cn_record) / 8), value, 8);
    else
        memcpy((uint64_t *)bad.segment + where % words, value, 8);
}

/* Who reads a chunk sees nothing of its neighbour. */
static void check_sizes(void)
{
    const struct cn_keeper *k = bed.keeper;
    for (uint32_t d = 0; d < k->fresh; d++)
        if (cn_word_state(cn_chunk_word(k, d)) == CN_LIVE)
            CHECK((uint32_t)k->catalog.chunks[d].size_crc <= cn_extent_bytes(k, d));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bed.keeper == NULL)
        make_bed();
    struct cn_session *s = bed.keeper->sessions[bad.session];
    s->broken = false; /* so that every input is read */
    for (size_t at = 0; at + PATCH_BYTES <= bytes; at += PATCH_BYTES) {
        uint32_t where;
        memcpy(&where, data + at, sizeof(where));
        patch(s, where, data + at + 4);
    }
    make_plausible(s, bytes / PATCH_BYTES);
    for (uint32_t i = 0; i < ROUNDS && cn_keeper_step(bed.keeper) > 0; i++)
        ;
    bed_check_bytes(&held, 1);
    bed_audit(&bed);
    check_sizes();
    return 0;
}

/* Refusals alone would say little. */
void fuzz_reached(void)
{
    const struct cn_counters *c = &bed.keeper->count;
    printf("  reached: %llu commits, %llu duplicates, %llu aborts, %llu evictions, %llu bad\n",
           (unsigned long long)c->commits, (unsigned long long)c->duplicates,
           (unsigned long long)c->aborts, (unsigned long long)c->evictions,
           (unsigned long long)c->bad_records);
    CHECK(c->commits > 0 && c->duplicates > 0 && c->aborts > 0 && c->bad_records > 0);
}
