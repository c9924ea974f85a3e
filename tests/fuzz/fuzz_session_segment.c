/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A client that writes garbage into its session: the keeper neither faults nor loops nor loses
 * count, and the other session's chunk stays what it was (I4).
 *
 * An input is a list of patches to the segment: offset:32, value:64. Then the keeper makes a few
 * rounds over what lies in the ring, and every table is audited.
 */
#include "../c/pool_bed.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

enum { PATCH_BYTES = 12, ROUNDS = 20 };

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

/* Records that name this pool's namespace reach deeper than random ones. */
static void make_plausible(struct cn_session *s, size_t patches)
{
    for (uint64_t i = 0; i < 4; i++) {
        struct cn_record *r = &s->sub[(s->sub_head + i) % CN_RING_RECORDS];
        r->op = (uint8_t)(r->op % 11);
        if (patches % 2 == 0)
            r->ns_slot = (uint16_t)bed.ns;
    }
    if (patches % 3 != 0)
        s->head->sub_tail = s->sub_head + 4;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bed.keeper == NULL)
        make_bed();
    struct cn_session *s = bed.keeper->sessions[bad.session];
    uint64_t words = cn_session_segment_bytes(bed.format.lease_slots) / 8;
    s->broken = false; /* so that every input is read */
    for (size_t at = 0; at + PATCH_BYTES <= bytes; at += PATCH_BYTES) {
        uint32_t off;
        memcpy(&off, data + at, sizeof(off));
        memcpy((uint64_t *)bad.segment + off % words, data + at + 4, 8);
    }
    make_plausible(s, bytes / PATCH_BYTES);
    for (uint32_t i = 0; i < ROUNDS && cn_keeper_step(bed.keeper) > 0; i++)
        ;
    bed_check_bytes(&held, 1);
    bed_audit(&bed);
    return 0;
}
