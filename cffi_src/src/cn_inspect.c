/* SPDX-License-Identifier: Apache-2.0 */
/* Looking at a catalog that is mapped read-only, while its keeper changes it. */
#include "cn_api.h"
#include "cn_copy.h"
#include "cn_index.h"

static int open_catalog(const void *catalog, struct cn_catalog *ret_catalog)
{
    const struct cn_super *super = catalog;
    return cn_catalog_open((void *)(uintptr_t)catalog, super->catalog_bytes, ret_catalog);
}

int cn_find(const void *catalog, uint32_t ns_slot, const uint8_t *key_bytes, uint32_t *ret_d)
{
    struct cn_catalog c;
    int status = open_catalog(catalog, &c);
    if (status != CN_OK)
        return status;
    struct cn_key key = cn_key_of(key_bytes);
    uint64_t word;
    struct cn_hash h = cn_hash_key(c.hash_seed, ns_slot, &key);
    return cn_index_find(&c, h, ns_slot, &key, ret_d, &word) ? CN_OK : CN_EMISS;
}

int cn_chunk_read(const void *catalog, uint32_t d, struct cn_chunk *ret_chunk,
                  struct cn_cold *ret_cold)
{
    const struct cn_super *super = catalog;
    if (d >= super->chunk_count)
        return CN_EINVAL;
    const uint8_t *base = catalog;
    const struct cn_chunk *chunk = (const struct cn_chunk *)(base + super->chunks_off) + d;
    const struct cn_cold *cold = (const struct cn_cold *)(base + super->cold_off) + d;
    uint64_t word = cn_load_acquire(&chunk->word); /* pairs with cn_chunk_publish() */
    if (cn_word_state(word) != CN_LIVE)
        return CN_EMISS;
    struct cn_chunk copy = {.word = word};
    for (uint32_t i = 0; i < 4; i++)
        copy.key[i] = cn_load_relaxed(&chunk->key[i]);
    copy.data_off = cn_load_relaxed(&chunk->data_off);
    copy.size_crc = cn_load_relaxed(&chunk->size_crc);
    copy.place = cn_load_relaxed(&chunk->place);
    *ret_cold = *cold;
    cn_fence_acquire();
    uint64_t again = cn_load_relaxed(&chunk->word);
    if (cn_word_gen(again) != cn_word_gen(word) || cn_word_state(again) != CN_LIVE)
        return CN_EMISS; /* it changed under our eyes */
    *ret_chunk = copy;
    return CN_OK;
}

const char *cn_copy_kernel(void) { return cn_copy_best()->name; }
