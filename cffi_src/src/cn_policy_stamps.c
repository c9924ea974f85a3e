/* SPDX-License-Identifier: Apache-2.0 */
#include "cn_policy_stamps.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct cn_stamps {
    uint64_t *table; /* sets * CN_STAMPS_WAYS entries */
    uint32_t sets;
    bool used;
};

static uint32_t set_count(uint64_t entries)
{
    uint64_t sets = entries / CN_STAMPS_WAYS + 1;

    return sets > CN_STAMPS_SETS_MAX ? CN_STAMPS_SETS_MAX : (uint32_t)sets;
}

static size_t table_bytes(uint32_t sets)
{
    return (size_t)sets * CN_STAMPS_WAYS * sizeof(uint64_t);
}

static uint64_t *table_new(uint32_t sets)
{
    void *table = mmap(NULL, table_bytes(sets), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return table == MAP_FAILED ? NULL : table;
}

static uint64_t *set_of(const struct cn_stamps *stamps, uint32_t h)
{
    uint64_t set = ((uint64_t)h * stamps->sets) >> 32;

    return stamps->table + set * CN_STAMPS_WAYS;
}

/* The way that holds h, else the first empty one, else CN_STAMPS_WAYS. Empty ones are last. */
static uint32_t find_way(const uint64_t *set, uint32_t h)
{
    uint32_t way = 0;

    while (way < CN_STAMPS_WAYS && set[way] != 0 && set[way] >> 32 != h)
        way++;
    return way;
}

static void put_entry(struct cn_stamps *stamps, uint64_t entry)
{
    uint64_t *set = set_of(stamps, (uint32_t)(entry >> 32));
    uint32_t way = find_way(set, (uint32_t)(entry >> 32));

    if (way == CN_STAMPS_WAYS)
        way--; /* the oldest makes room */
    memmove(set + 1, set, way * sizeof(*set));
    set[0] = entry;
    stamps->used = true;
}

void cn_stamps_put(struct cn_stamps *stamps, uint64_t hash, uint32_t stamp)
{
    put_entry(stamps, (hash & ~UINT64_C(0xffffffff)) | stamp);
}

uint32_t cn_stamps_take(struct cn_stamps *stamps, uint64_t hash)
{
    uint32_t h = (uint32_t)(hash >> 32);
    uint64_t *set = set_of(stamps, h);
    uint32_t way = find_way(set, h);
    uint32_t stamp;

    if (way == CN_STAMPS_WAYS || set[way] == 0)
        return 0;
    stamp = (uint32_t)set[way];
    memmove(set + way, set + way + 1, (CN_STAMPS_WAYS - 1 - way) * sizeof(*set));
    set[CN_STAMPS_WAYS - 1] = 0;
    return stamp;
}

void cn_stamps_resize(struct cn_stamps *stamps, uint64_t entries)
{
    struct cn_stamps other = {.sets = set_count(entries)};
    uint32_t quarter = stamps->sets / 4;

    if (other.sets >= stamps->sets - quarter && other.sets <= stamps->sets + quarter)
        return;
    other.table = table_new(other.sets);
    if (other.table == NULL)
        return;
    for (uint32_t way = CN_STAMPS_WAYS; stamps->used && way-- > 0;) { /* the oldest first */
        for (uint32_t set = 0; set < stamps->sets; set++) {
            uint64_t entry = stamps->table[(size_t)set * CN_STAMPS_WAYS + way];

            if (entry != 0)
                put_entry(&other, entry);
        }
    }
    (void)munmap(stamps->table, table_bytes(stamps->sets));
    *stamps = other;
}

struct cn_stamps *cn_stamps_create(uint64_t entries)
{
    struct cn_stamps *stamps = calloc(1, sizeof(*stamps));

    if (stamps == NULL)
        return NULL;
    stamps->sets = set_count(entries);
    stamps->table = table_new(stamps->sets);
    if (stamps->table == NULL) {
        free(stamps);
        return NULL;
    }
    return stamps;
}

void cn_stamps_destroy(struct cn_stamps *stamps)
{
    if (stamps == NULL)
        return;
    (void)munmap(stamps->table, table_bytes(stamps->sets));
    free(stamps);
}
