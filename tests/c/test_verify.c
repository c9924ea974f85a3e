/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Looking at a pool without a session, and dropping what is lost: the bytes of exactly one
 * generation are judged, and of what leads nowhere nothing is read (I4).
 */
#include "pool_bed.h"

#define MIB (1024u * 1024u)
#define CHUNKS 20u

static struct bed_session with_chunks(struct bed *bed)
{
    *bed = bed_open(16 * MIB, 4096, 512, "lru");
    struct bed_session s = bed_attach(bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < CHUNKS; n++)
        CHECK_EQ(bed_put(bed, s.client, n, 5000 + n, NULL), CN_OK);
    bed_settle(bed);
    return s;
}

static void finish(struct bed *bed, struct bed_session *s)
{
    bed_kill(bed, s);
    bed_audit(bed);
    bed_close(bed);
}

static struct cn_look look_at(const struct bed *bed)
{
    return (struct cn_look){.catalog = bed->catalog,
                            .catalog_bytes = bed->catalog_bytes,
                            .region = {bed->region},
                            .region_bytes = {bed->format.regions[0].bytes}};
}

static struct cn_chunk *chunk_of(const struct bed *bed, uint64_t n, uint64_t *ret_ref)
{
    struct bed_key key = bed_key(n);
    uint32_t d;
    CHECK_EQ(cn_find(bed->catalog, bed->ns, key.bytes, &d), CN_OK);
    struct cn_chunk *chunk = &bed->keeper->catalog.chunks[d];
    *ret_ref = cn_ref(d, cn_word_gen(chunk->word));
    return chunk;
}

static int verify(const struct bed *bed, uint64_t ref)
{
    struct cn_look look = look_at(bed);
    int32_t status = 1;
    CHECK_EQ(cn_look_verify(&look, &ref, 1, &status), CN_OK);
    return status;
}

/* One bit, first or last, of one chunk is told from the bytes of all others. */
static void a_flipped_bit_is_found(void)
{
    struct bed bed;
    struct bed_session s = with_chunks(&bed);
    uint8_t *region = bed.region;
    for (uint64_t n = 0; n < CHUNKS; n++) {
        uint64_t ref;
        uint64_t off = chunk_of(&bed, n, &ref)->data_off + (n % 2 == 0 ? 0 : 5000 + n - 1);
        CHECK_EQ(verify(&bed, ref), CN_OK);
        region[off] ^= (uint8_t)(1u << n % 8);
        CHECK_EQ(verify(&bed, ref), CN_ELOST);
        region[off] ^= (uint8_t)(1u << n % 8);
        CHECK_EQ(verify(&bed, ref), CN_OK);
    }
    CHECK_EQ(cn_client_leases(s.client), 0);
    finish(&bed, &s);
}

/* Another generation, another state, no checksum, no such descriptor: nothing to be judged. */
static void what_has_left_is_not_judged(void)
{
    struct bed bed;
    struct bed_session s = with_chunks(&bed);
    uint64_t ref;
    struct cn_chunk *chunk = chunk_of(&bed, 3, &ref);
    uint64_t word = chunk->word;
    CHECK_EQ(verify(&bed, ref + (1ull << 32)), CN_EMISS);
    CHECK_EQ(verify(&bed, cn_ref(4096, 1)), CN_EMISS);
    CHECK_EQ(verify(&bed, UINT64_MAX), CN_EMISS);
    chunk->word = cn_word(cn_ref_gen(ref), CN_DYING, CN_CF_CRC);
    CHECK_EQ(verify(&bed, ref), CN_EMISS);
    chunk->word = cn_word(cn_ref_gen(ref), CN_LIVE, 0);
    CHECK_EQ(verify(&bed, ref), CN_EMISS);
    chunk->word = word;
    finish(&bed, &s);
}

/* No byte outside what is mapped is read. */
static void nonsense_leads_nowhere(void)
{
    struct bed bed;
    struct bed_session s = with_chunks(&bed);
    uint64_t ref;
    struct cn_chunk *chunk = chunk_of(&bed, 3, &ref);
    struct cn_chunk kept = *chunk;
    chunk->data_off = 16 * MIB - 4999;
    CHECK_EQ(verify(&bed, ref), CN_ECORRUPT);
    chunk->data_off = UINT64_MAX;
    CHECK_EQ(verify(&bed, ref), CN_ECORRUPT);
    *chunk = kept;
    chunk->place = cn_place(1, bed.ns, 0);
    CHECK_EQ(verify(&bed, ref), CN_ECORRUPT);
    chunk->place = cn_place(200, bed.ns, 0);
    CHECK_EQ(verify(&bed, ref), CN_ECORRUPT);
    *chunk = kept;
    CHECK_EQ(verify(&bed, ref), CN_OK);
    struct cn_look look = look_at(&bed);
    look.catalog_bytes = CN_SUPER_BYTES;
    CHECK_EQ(cn_look_verify(&look, &ref, 1, &(int32_t){0}), CN_ECORRUPT);
    finish(&bed, &s);
}

/* The bucket of every chunk's entry is one of the three, and the entry carries the tag. */
static void lookups_are_told_where_the_index_has_them(void)
{
    struct bed bed;
    struct bed_session s = with_chunks(&bed);
    struct cn_look look = look_at(&bed);
    for (uint64_t n = 0; n < CHUNKS; n++) {
        uint64_t ref;
        uint32_t tag;
        uint32_t buckets[3];
        uint32_t found = 0;
        struct cn_chunk copy = *chunk_of(&bed, n, &ref);
        CHECK_EQ(cn_look_places(&look, &copy, 1, &tag, buckets), CN_OK);
        for (uint32_t which = 0; which < 3; which++)
            for (uint32_t i = 0; i < CN_BUCKET_ENTRIES; i++)
                found += bed.keeper->catalog.index[buckets[which]].entry[i] ==
                         ((uint64_t)tag << 32 | cn_ref_d(ref));
        CHECK(found >= 1);
    }
    finish(&bed, &s);
}

/* The chunk goes, pinned or not, with an event that says why; other references do nothing. */
static void lost_chunks_are_dropped(void)
{
    struct bed bed;
    struct bed_session s = with_chunks(&bed);
    uint64_t refs[5] = {0, UINT64_MAX, cn_ref(4095, 1), 0, 0};
    struct bed_key key = bed_key(7);
    chunk_of(&bed, 7, &refs[3]);
    uint32_t d = cn_ref_d(refs[3]);
    refs[4] = refs[3] + (1ull << 32);
    CHECK(cn_set_pin(bed.keeper, d, UINT64_MAX));
    uint64_t dropped;
    CHECK_EQ(cn_keeper_lose(bed.keeper, refs, 5, &dropped), CN_OK);
    CHECK_EQ(dropped, 1);
    CHECK_EQ(cn_find(bed.catalog, bed.ns, key.bytes, &d), CN_EMISS);
    CHECK_EQ(bed.keeper->count.lost, 1);
    CHECK_EQ(bed.keeper->count.pinned_chunks, 0);
    uint64_t last = bed.keeper->catalog.super->event_head - 1;
    const struct cn_event *event = &bed.keeper->catalog.events[last % 1024];
    CHECK_EQ(event->what & 0xffff, CN_EVENT_EVICTED | CN_BY_LOSS << 8);
    CHECK_EQ(cn_keeper_lose(bed.keeper, refs, 5, &dropped), CN_OK);
    CHECK_EQ(dropped, 0);
    finish(&bed, &s);
}

int main(void)
{
    RUN(a_flipped_bit_is_found);
    RUN(what_has_left_is_not_judged);
    RUN(nonsense_leads_nowhere);
    RUN(lookups_are_told_where_the_index_has_them);
    RUN(lost_chunks_are_dropped);
    return TEST_PASS;
}
