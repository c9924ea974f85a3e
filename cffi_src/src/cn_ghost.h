/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ghost table: how often was this evicted chunk used before it left?
 *
 *   entry = tag:28 | uses:4, 0 = empty       sets of 8, newest first; a full one forgets its oldest
 *   set   = (h * sets) >> 32, tag = h & 0xfffffff, h = hash >> 32
 *
 * With at least 16 sets, set and tag together give h back, so that a table is resized without
 * losing what it holds. Two chunks are taken for one with a chance of at most 8 * sets / 2^32 a
 * lookup; that costs a wrong use count, never a wrong byte. Keeper-private and rebuildable: an
 * empty table is a valid one.
 */
#ifndef CN_GHOST_H
#define CN_GHOST_H

#include <stdint.h>

#define CN_GHOST_WAYS 8
#define CN_GHOST_USES_MAX 15
#define CN_GHOST_SETS_MIN 16
#define CN_GHOST_SETS_MAX (UINT32_C(1) << 28)

struct cn_ghost;

/* Room for entries, rounded up to whole sets. NULL when memory is short. Memory is touched when
 * used. */
struct cn_ghost *cn_ghost_create(uint64_t entries);
void cn_ghost_destroy(struct cn_ghost *ghost);

/* Remember that the chunk left after uses (clamped to 1 … CN_GHOST_USES_MAX); replaces an older
 * entry. */
void cn_ghost_put(struct cn_ghost *ghost, uint64_t hash, uint32_t uses);

/* The uses put for hash, which is forgotten by this; 0 when unknown. */
uint32_t cn_ghost_take(struct cn_ghost *ghost, uint64_t hash);

/*
 * Room for another number of entries; the newest of each set stay. Nothing happens while the
 * size wanted is within a quarter of the present one (capacity is an estimate that moves all the
 * time), or memory is short.
 */
void cn_ghost_resize(struct cn_ghost *ghost, uint64_t entries);

uint64_t cn_ghost_entries(const struct cn_ghost *ghost); /* room */
uint64_t cn_ghost_held(const struct cn_ghost *ghost);    /* entries in use */

#endif
