/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A hostile catalog under a client that looks keys up in it: index, descriptors, cold records and
 * events say anything. No look-up faults or loops, and every view lies in its region (I4).
 *
 * An input is a list of patches: where:32, value:64; the lowest three bits of `where` say what is
 * patched. The catalog is put back before the next one.
 */
#include "../c/pool_bed.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
void fuzz_reached(void);

enum { PATCH_BYTES = 12, CHUNKS = 64, KEYS = 16, STORED = 8, VERIFY_BYTES_MAX = 65536 };
enum { AN_ENTRY, A_RAW_ENTRY, A_CHUNK, AN_IMPOSTOR, A_WORD, A_SUPER, A_COLD, AN_EVENT };

struct undo {
    uint64_t *p;
    uint64_t old;
};

static struct bed bed;
static struct bed_session s;
static uint8_t keys[KEYS * CN_KEY_BYTES];
static struct undo undo[8192];
static uint32_t undo_count;
static struct cn_catalog rw; /* the client's is read-only */
static struct {
    uint64_t leased, refused, corrupt, batches;
} reached;

/* Behind the last byte there is nothing: one step too far is a fault, not a lucky read. */
static void *map_before_a_hole(int fd, uint64_t bytes)
{
    uint64_t whole = (bytes + 4095) / 4096 * 4096;
    uint8_t *map = mmap(NULL, whole + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED);
    CHECK(mmap(map, whole, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == (void *)map);
    return map;
}

static void make_bed(void)
{
    bed = bed_open(4u << 20, CHUNKS, 64, "lru");
    s = bed_attach(&bed, CN_ROLE_WRITER);
    for (uint64_t n = 0; n < STORED; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 3000, NULL), CN_OK);
    bed_settle(&bed);
    for (uint64_t n = 0; n < KEYS; n++)
        memcpy(keys + n * CN_KEY_BYTES, bed_key(n).bytes, CN_KEY_BYTES);
    void *catalog = map_before_a_hole(bed.catalog_fd, bed.catalog_bytes);
    CHECK_EQ(cn_catalog_open(catalog, bed.catalog_bytes, &s.client->catalog), CN_OK);
    CHECK_EQ(cn_catalog_open(bed.catalog, bed.catalog_bytes, &rw), CN_OK);
    s.client->ro[0].base = map_before_a_hole(bed.region_fd, s.client->ro[0].bytes);
}

static void put(uint64_t *p, uint64_t value)
{
    if (undo_count == sizeof(undo) / sizeof(undo[0]))
        return;
    undo[undo_count++] = (struct undo){p, *p};
    *p = value;
}

static struct cn_key key_of(uint32_t n) { return cn_key_of(keys + n % KEYS * CN_KEY_BYTES); }

/* An entry that a look-up of this key believes, for a descriptor that may not even exist. */
static void put_entry(uint32_t where, uint64_t value)
{
    struct cn_key key = key_of(where >> 3);
    struct cn_hash h = cn_hash_key(rw.hash_seed, bed.ns, &key);
    struct cn_bucket *bucket = &rw.index[cn_hash_bucket(&rw, h, (where >> 16) % 3)];
    uint32_t d = (uint32_t)(value >> 1);
    put(&bucket->entry[(where >> 24) % CN_BUCKET_ENTRIES],
        (uint64_t)cn_hash_tag(h) << 32 | ((value & 1) != 0 ? d : d % CHUNKS));
}

/* A descriptor that says it is LIVE and this key's, of any place and size. */
static void put_impostor(uint32_t where, uint64_t value)
{
    struct cn_chunk *chunk = &rw.chunks[(where >> 16) % CHUNKS];
    struct cn_key key = key_of(where >> 3);
    for (uint32_t i = 0; i < 4; i++)
        put(&chunk->key[i], key.word[i]);
    put(&chunk->place, cn_place((where >> 24) & 1, bed.ns, 0));
    put(&chunk->word, cn_word((uint32_t)value, CN_LIVE, (uint32_t)(value >> 32)));
}

static void patch(uint32_t where, uint64_t value)
{
    uint32_t at = where >> 3;
    uint64_t *const super[] = {&rw.super->index_third, &rw.super->event_head, &rw.super->sequence,
                               &rw.super->pool_state};
    switch (where % 8) {
    case AN_ENTRY:
        put_entry(where, value);
        break;
    case A_RAW_ENTRY:
        put((uint64_t *)rw.index + at % ((rw.bucket_mask + 1) * CN_BUCKET_ENTRIES), value);
        break;
    case A_CHUNK:
        put((uint64_t *)rw.chunks + at % (CHUNKS * sizeof(struct cn_chunk) / 8), value);
        break;
    case AN_IMPOSTOR:
        put_impostor(where, value);
        break;
    case A_WORD:
        put(&rw.chunks[at % CHUNKS].word, value);
        break;
    case A_SUPER:
        put(super[at % 4], at % 4 == 3 ? value % 4 : value);
        break;
    case A_COLD:
        put((uint64_t *)rw.cold + at % (CHUNKS * sizeof(struct cn_cold) / 8), value);
        break;
    case AN_EVENT:
        put((uint64_t *)rw.events + at % ((rw.event_mask + 1) * sizeof(struct cn_event) / 8),
            value);
    }
}

/* All that a caller may do with a view. */
static void use(const struct cn_view *view)
{
    const struct cn_mapping *region = &s.client->ro[0];
    uint64_t off = (uint64_t)((const uint8_t *)view->data - (const uint8_t *)region->base);
    const void *meta;
    uint32_t meta_bytes;
    CHECK(off <= region->bytes && view->bytes <= region->bytes - off);
    if (view->bytes <= VERIFY_BYTES_MAX)
        cn_view_verify(s.client, view);
    if (cn_view_meta(s.client, view, &meta, &meta_bytes) == CN_OK && meta_bytes > 0)
        cn_crc32c(0, meta, meta_bytes);
    reached.leased++;
}

static void look_up(void)
{
    struct cn_view views[KEYS];
    uint32_t count;
    for (uint32_t n = 0; n < KEYS; n++) {
        int status = cn_lease(s.client, bed.ns, keys + n * CN_KEY_BYTES, &views[0]);
        reached.refused += status == CN_EMISS;
        reached.corrupt += status == CN_ECORRUPT;
        CHECK_EQ(cn_match(s.client, bed.ns, keys + n * CN_KEY_BYTES, KEYS - n, &count), CN_OK);
        if (status != CN_OK)
            continue;
        use(&views[0]);
        cn_release(s.client, views[0].slot);
    }
    CHECK_EQ(cn_lease_many(s.client, bed.ns, keys, KEYS, views, &count), CN_OK);
    reached.batches += count > 0;
    for (uint32_t i = 0; i < count; i++)
        use(&views[i]);
    cn_release_many(s.client, views, count);
}

static void look_around(uint64_t ref)
{
    const void *catalog = s.client->catalog.super;
    struct cn_view view;
    struct cn_chunk chunk;
    struct cn_cold cold;
    struct cn_event events[8];
    uint64_t sequence = ref;
    uint64_t lost;
    uint32_t count;
    uint32_t d;
    cn_find(catalog, bed.ns, keys, &d);
    cn_chunk_read(catalog, cn_ref_d(ref), &chunk, &cold);
    cn_events_read(catalog, &sequence, 8, events, &count, &lost);
    if (cn_lease_ref(s.client, ref, key_of(0).word[0], &view) != CN_OK)
        return;
    use(&view);
    cn_release(s.client, view.slot);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    uint64_t value = 0;
    if (bed.keeper == NULL)
        make_bed();
    for (size_t at = 0; at + PATCH_BYTES <= bytes; at += PATCH_BYTES) {
        uint32_t where;
        memcpy(&where, data + at, sizeof(where));
        memcpy(&value, data + at + 4, sizeof(value));
        patch(where, value);
    }
    look_up();
    look_around(value);
    look_around(cn_ref((uint32_t)value % CHUNKS, (uint32_t)(value >> 32)));
    CHECK_EQ(cn_client_leases(s.client), 0);
    while (undo_count > 0) {
        undo_count--;
        *undo[undo_count].p = undo[undo_count].old;
    }
    return 0;
}

/* Misses alone would say little. */
void fuzz_reached(void)
{
    printf("  reached: %llu views, %llu misses, %llu out of bounds, %llu batches\n",
           (unsigned long long)reached.leased, (unsigned long long)reached.refused,
           (unsigned long long)reached.corrupt, (unsigned long long)reached.batches);
    CHECK(reached.leased > 0 && reached.refused > 0 && reached.corrupt > 0 && reached.batches > 0);
}
