/* SPDX-License-Identifier: Apache-2.0 */
/* Which slots of the own lease table are free. */
#include "cn_client.h"

#define HOT_SLOTS 64u
#define HOT_SLOTS_MIN 4u /* a power of two, as HOT_SLOTS */

/*
 * Slots are process-private, no mutex: destructors run anywhere, in any thread, in other calls.
 * The first few slots are claimed by compare-and-swap on the lease word itself: allocation, publish
 * and fence in one locked instruction, for the single leases of the hit path. The others are on a
 * tagged free list, from which a batch takes all it needs with one compare-and-swap.
 */
void cn_slots_init(struct cn_client *c)
{
    c->hot_slots = c->lease_slots >= 2 * HOT_SLOTS ? HOT_SLOTS : HOT_SLOTS_MIN;
    for (uint32_t slot = c->hot_slots; slot < c->lease_slots; slot++)
        c->slot_next[slot] = slot + 1 < c->lease_slots ? slot + 1 : CN_SLOT_NONE;
    c->free_head = c->hot_slots;
    cn_store_release(&c->head->lease_high, c->hot_slots);
}

uint32_t cn_slots_take(struct cn_client *c, uint32_t count, uint32_t *ret_slots)
{
    uint64_t head = cn_load_acquire(&c->free_head);
    for (;;) {
        uint32_t slot = (uint32_t)head;
        uint32_t taken = 0;
        while (taken < count && slot < c->lease_slots) {
            ret_slots[taken++] = slot;
            slot = cn_load32_relaxed(&c->slot_next[slot]);
        }
        if (taken == 0 || cn_cas(&c->free_head, &head, ((head >> 32) + 1) << 32 | slot))
            return taken;
    }
}

void cn_slots_put(struct cn_client *c, const uint32_t *slots, uint32_t count)
{
    if (count == 0)
        return;
    for (uint32_t i = 0; i + 1 < count; i++)
        cn_store32_relaxed(&c->slot_next[slots[i]], slots[i + 1]);
    uint64_t head = cn_load_relaxed(&c->free_head);
    do
        cn_store32_relaxed(&c->slot_next[slots[count - 1]], (uint32_t)head);
    while (!cn_cas(&c->free_head, &head, ((head >> 32) + 1) << 32 | slots[0]));
}
