/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stamp table: when was the chunk with this hash last seen?
 *
 *   entry = h:32 | stamp:32, h = hash >> 32, all zero = empty     sets of 8, newest first
 *   set   = (h * sets) >> 32
 *
 * What a stamp counts is the caller's: seconds, or evictions. A false answer (another chunk with
 * the same h) costs a wrong choice of victim, never a wrong byte. Keeper-private and
 * rebuildable.
 */
#ifndef CN_POLICY_STAMPS_H
#define CN_POLICY_STAMPS_H

#include <stdbool.h>
#include <stdint.h>

#define CN_STAMPS_WAYS 8
#define CN_STAMPS_SETS_MAX (UINT32_C(1) << 28)

struct cn_stamps;

/* Room for entries, rounded up to whole sets. NULL when memory is short; touched as it is used. */
struct cn_stamps *cn_stamps_create(uint64_t entries);
void cn_stamps_destroy(struct cn_stamps *stamps);

/* stamp > 0. Of a full set the oldest entry is forgotten. */
void cn_stamps_put(struct cn_stamps *stamps, uint64_t hash, uint32_t stamp);

/* The stamp put for hash, which is forgotten by this; 0 when there is none. */
uint32_t cn_stamps_take(struct cn_stamps *stamps, uint64_t hash);

/* As cn_ghost_resize(): keeps the newest; nothing happens within a quarter of the present size. */
void cn_stamps_resize(struct cn_stamps *stamps, uint64_t entries);

#endif
