/* SPDX-License-Identifier: Apache-2.0 */
#include "cn_index.h"

bool cn_index_find_rest(const struct cn_catalog *c, struct cn_hash h, uint32_t ns,
                        const struct cn_key *key, uint32_t *ret_d, uint64_t *ret_word)
{
    uint32_t tag = cn_hash_tag(h);
    const struct cn_bucket *second = &c->index[cn_hash_bucket(c, h, 1)];
    if (cn_bucket_find(c, second, tag, ns, key, ret_d, ret_word))
        return true;
    if (cn_load_relaxed(&c->super->index_third) == 0)
        return false;
    const struct cn_bucket *third = &c->index[cn_hash_bucket(c, h, 2)];
    return cn_bucket_find(c, third, tag, ns, key, ret_d, ret_word);
}

static uint64_t *find_entry(struct cn_catalog *c, struct cn_hash h, uint64_t wanted,
                            uint32_t *ret_which)
{
    for (uint32_t which = 0; which < 3; which++) {
        struct cn_bucket *bucket = &c->index[cn_hash_bucket(c, h, which)];
        for (uint32_t i = 0; i < CN_BUCKET_ENTRIES; i++) {
            if (cn_load_relaxed(&bucket->entry[i]) == wanted) {
                *ret_which = which;
                return &bucket->entry[i];
            }
        }
    }
    return NULL;
}

static uint64_t entry_of(struct cn_hash h, uint32_t d)
{
    return (uint64_t)cn_hash_tag(h) << 32 | d;
}

bool cn_index_room(const struct cn_catalog *c, struct cn_hash h)
{
    uint32_t which;
    return find_entry((struct cn_catalog *)c, h, 0, &which) != NULL;
}

int cn_index_insert(struct cn_catalog *c, struct cn_hash h, uint32_t d)
{
    uint32_t which;
    uint64_t *entry = find_entry(c, h, 0, &which);
    if (entry == NULL)
        return CN_ELIMIT;
    if (which == 2) {
        uint64_t third = cn_load_relaxed(&c->super->index_third);
        cn_store_release(&c->super->index_third, third + 1);
    }
    cn_store_release(entry, entry_of(h, d));
    return CN_OK;
}

bool cn_index_remove(struct cn_catalog *c, struct cn_hash h, uint32_t d)
{
    uint32_t which;
    uint64_t *entry = find_entry(c, h, entry_of(h, d), &which);
    if (entry == NULL)
        return false;
    cn_store_release(entry, 0);
    return true;
}

bool cn_index_swing(struct cn_catalog *c, struct cn_hash h, uint32_t d, uint32_t d2)
{
    uint32_t which;
    uint64_t *entry = find_entry(c, h, entry_of(h, d), &which);
    if (entry == NULL)
        return false;
    cn_store_release(entry, entry_of(h, d2));
    return true;
}
