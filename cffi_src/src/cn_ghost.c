/* SPDX-License-Identifier: Apache-2.0 */
#include "cn_ghost.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define TAG_MASK UINT32_C(0xfffffff)
#define USES_BITS 4

struct cn_ghost {
    uint32_t *table; /* sets * CN_GHOST_WAYS entries */
    uint64_t held;
    uint32_t sets;
};

static uint32_t set_count(uint64_t entries)
{
    uint64_t sets = entries / CN_GHOST_WAYS + (entries % CN_GHOST_WAYS != 0);

    if (sets < CN_GHOST_SETS_MIN)
        return CN_GHOST_SETS_MIN;
    return sets > CN_GHOST_SETS_MAX ? CN_GHOST_SETS_MAX : (uint32_t)sets;
}

static size_t table_bytes(uint32_t sets) { return (size_t)sets * CN_GHOST_WAYS * sizeof(uint32_t); }

/* mmap, not calloc: calloc clears recycled heap memory and so makes an unused table resident. */
static uint32_t *table_new(uint32_t sets)
{
    void *table = mmap(NULL, table_bytes(sets), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return table == MAP_FAILED ? NULL : table;
}

static uint32_t *set_of(const struct cn_ghost *ghost, uint32_t h)
{
    uint64_t set = ((uint64_t)h * ghost->sets) >> 32;

    return ghost->table + set * CN_GHOST_WAYS;
}

/* The h that was filed in this set with this tag: a set spans at most 2^28 values of h. */
static uint32_t hash_back(uint32_t set, uint32_t sets, uint32_t tag)
{
    uint64_t first = (((uint64_t)set << 32) + sets - 1) / sets;

    return (uint32_t)first + ((tag - (uint32_t)first) & TAG_MASK);
}

/* The way that holds tag, else the first empty one, else CN_GHOST_WAYS. Empty ones are last. */
static uint32_t find_way(const uint32_t *set, uint32_t tag)
{
    uint32_t way = 0;

    while (way < CN_GHOST_WAYS && set[way] != 0 && set[way] >> USES_BITS != tag)
        way++;
    return way;
}

static void put_entry(struct cn_ghost *ghost, uint32_t h, uint32_t uses)
{
    uint32_t *set = set_of(ghost, h);
    uint32_t tag = h & TAG_MASK;
    uint32_t way = find_way(set, tag);

    if (way == CN_GHOST_WAYS)
        way--; /* the oldest makes room */
    else if (set[way] == 0)
        ghost->held++;
    memmove(set + 1, set, way * sizeof(*set));
    set[0] = tag << USES_BITS | uses;
}

void cn_ghost_put(struct cn_ghost *ghost, uint64_t hash, uint32_t uses)
{
    if (uses < 1)
        uses = 1;
    if (uses > CN_GHOST_USES_MAX)
        uses = CN_GHOST_USES_MAX;
    put_entry(ghost, (uint32_t)(hash >> 32), uses);
}

uint32_t cn_ghost_take(struct cn_ghost *ghost, uint64_t hash)
{
    uint32_t h = (uint32_t)(hash >> 32);
    uint32_t *set = set_of(ghost, h);
    uint32_t way = find_way(set, h & TAG_MASK);
    uint32_t uses;

    if (way == CN_GHOST_WAYS || set[way] == 0)
        return 0;
    uses = set[way] & CN_GHOST_USES_MAX;
    memmove(set + way, set + way + 1, (CN_GHOST_WAYS - 1 - way) * sizeof(*set));
    set[CN_GHOST_WAYS - 1] = 0;
    ghost->held--;
    return uses;
}

/* Oldest ways first, so that among sets that become one the newest of each survive. */
static void refile(struct cn_ghost *to, const struct cn_ghost *from)
{
    for (uint32_t way = CN_GHOST_WAYS; way-- > 0;) {
        for (uint32_t set = 0; set < from->sets; set++) {
            uint32_t entry = from->table[(size_t)set * CN_GHOST_WAYS + way];

            if (entry != 0)
                put_entry(to, hash_back(set, from->sets, entry >> USES_BITS),
                          entry & CN_GHOST_USES_MAX);
        }
    }
}

void cn_ghost_resize(struct cn_ghost *ghost, uint64_t entries)
{
    struct cn_ghost other = {.sets = set_count(entries)};
    uint32_t quarter = ghost->sets / 4;

    if (other.sets >= ghost->sets - quarter && other.sets <= ghost->sets + quarter)
        return;
    other.table = table_new(other.sets);
    if (other.table == NULL)
        return;
    if (ghost->held != 0) /* an unused table is not read either */
        refile(&other, ghost);
    (void)munmap(ghost->table, table_bytes(ghost->sets));
    *ghost = other;
}

struct cn_ghost *cn_ghost_create(uint64_t entries)
{
    struct cn_ghost *ghost = calloc(1, sizeof(*ghost));

    if (ghost == NULL)
        return NULL;
    ghost->sets = set_count(entries);
    ghost->table = table_new(ghost->sets);
    if (ghost->table == NULL) {
        free(ghost);
        return NULL;
    }
    return ghost;
}

void cn_ghost_destroy(struct cn_ghost *ghost)
{
    if (ghost == NULL)
        return;
    (void)munmap(ghost->table, table_bytes(ghost->sets));
    free(ghost);
}

uint64_t cn_ghost_entries(const struct cn_ghost *ghost)
{
    return (uint64_t)ghost->sets * CN_GHOST_WAYS;
}

uint64_t cn_ghost_held(const struct cn_ghost *ghost) { return ghost->held; }
