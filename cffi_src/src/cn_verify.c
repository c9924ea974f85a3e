/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What `cenote verify` asks of a pool that it only looks at.
 *
 * Without a session: what it reads must not count as used, be kept from eviction, or fall under
 * the limit of a reader. So bytes are read first, and believed only if the chunk was there all the
 * time: an extent is not written again before its descriptor has left LIVE (I2).
 */
#include "cn_api.h"
#include "cn_index.h"
#include "cn_region.h"

static int open_look(const struct cn_look *look, struct cn_catalog *ret_catalog)
{
    return cn_catalog_open((void *)(uintptr_t)look->catalog, look->catalog_bytes, ret_catalog);
}

int cn_look_places(const struct cn_look *look, const struct cn_chunk *chunks, uint32_t count,
                   uint32_t *ret_tags, uint32_t *ret_buckets)
{
    struct cn_catalog c;
    int status = open_look(look, &c);
    if (status != CN_OK)
        return status;
    for (uint32_t i = 0; i < count; i++) {
        struct cn_key key;
        memcpy(&key, chunks[i].key, sizeof(key));
        struct cn_hash h = cn_hash_key(c.hash_seed, cn_place_ns(chunks[i].place), &key);
        ret_tags[i] = cn_hash_tag(h);
        for (uint32_t which = 0; which < 3; which++)
            ret_buckets[(size_t)i * 3 + which] = cn_hash_bucket(&c, h, which);
    }
    return CN_OK;
}

static int verify_one(const struct cn_look *look, const struct cn_catalog *c, uint64_t ref)
{
    uint32_t d = cn_ref_d(ref);
    if (d >= c->chunk_count)
        return CN_EMISS;
    const struct cn_chunk *chunk = &c->chunks[d];
    uint64_t word = cn_load_acquire(&chunk->word); /* pairs with cn_chunk_publish() */
    if (cn_word_gen(word) != cn_ref_gen(ref) || cn_word_state(word) != CN_LIVE ||
        (cn_word_flags(word) & CN_CF_CRC) == 0)
        return CN_EMISS;
    uint64_t off = cn_load_relaxed(&chunk->data_off);
    uint64_t size_crc = cn_load_relaxed(&chunk->size_crc);
    uint64_t bytes = (uint32_t)size_crc;
    uint32_t region = cn_place_region(cn_load_relaxed(&chunk->place));
    uint32_t crc = 0;
    int status = CN_ECORRUPT;
    if (region < CN_REGIONS_MAX && look->region[region] != NULL &&
        off <= look->region_bytes[region] && bytes <= look->region_bytes[region] - off)
        status = cn_guarded_crc32c(0, (const uint8_t *)look->region[region] + off, bytes, &crc);
    if (status == CN_OK && crc != (uint32_t)(size_crc >> 32))
        status = CN_ELOST;
    cn_fence_acquire(); /* the bytes before the word: whoever wrote others saw it leave LIVE */
    uint64_t again = cn_load_relaxed(&chunk->word);
    bool there = cn_word_gen(again) == cn_ref_gen(ref) && cn_word_state(again) == CN_LIVE;
    return there ? status : CN_EMISS;
}

int cn_look_verify(const struct cn_look *look, const uint64_t *refs, uint32_t count,
                   int32_t *ret_status)
{
    struct cn_catalog c;
    int status = open_look(look, &c);
    for (uint32_t i = 0; status == CN_OK && i < count; i++)
        ret_status[i] = verify_one(look, &c, refs[i]);
    return status;
}
