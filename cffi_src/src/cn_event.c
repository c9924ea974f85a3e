/* SPDX-License-Identifier: Apache-2.0 */
/* The event feed: see cn_layout.h for its format. */
#include <string.h>

#include "cn_crash.h"
#include "cn_keeper.h"

void cn_event_put(struct cn_keeper *k, uint32_t kind, uint32_t reason, uint32_t d)
{
    struct cn_super *super = k->catalog.super;
    uint64_t sequence = cn_load_relaxed(&super->event_head);
    struct cn_event *event = &k->catalog.events[sequence & k->catalog.event_mask];
    const struct cn_chunk *chunk = d == CN_NONE ? NULL : &k->catalog.chunks[d];
    uint64_t what = kind | (uint64_t)reason << 8;
    cn_store_release(&event->sequence, 0); /* invalid while it changes */
    CN_CRASH_POINT(event_begun);
    cn_fence_release(); /* pairs with the acquire fence in read_event() */
    cn_store_relaxed(&event->time_ns, k->realtime_ns);
    for (uint32_t i = 0; i < 4; i++)
        cn_store_relaxed(&event->key[i], chunk == NULL ? 0 : chunk->key[i]);
    if (chunk != NULL)
        what |= (uint64_t)cn_place_ns(chunk->place) << 16 | (uint64_t)(uint32_t)chunk->size_crc
                                                                << 32;
    cn_store_relaxed(&event->what, what);
    cn_store_relaxed(&event->chunk, chunk == NULL ? 0 : cn_ref(d, cn_word_gen(chunk->word)));
    cn_store_release(&event->sequence, sequence);
    CN_CRASH_POINT(event_written);
    cn_store_release(&super->event_head, sequence + 1);
    CN_CRASH_POINT(event_head);
}

static bool read_event(const struct cn_event *event, uint64_t sequence, struct cn_event *ret_event)
{
    if (cn_load_acquire(&event->sequence) != sequence)
        return false;
    struct cn_event copy = {.sequence = sequence};
    copy.time_ns = cn_load_relaxed(&event->time_ns);
    for (uint32_t i = 0; i < 4; i++)
        copy.key[i] = cn_load_relaxed(&event->key[i]);
    copy.what = cn_load_relaxed(&event->what);
    copy.chunk = cn_load_relaxed(&event->chunk);
    cn_fence_acquire(); /* pairs with the release fence in cn_event_put() */
    if (cn_load_relaxed(&event->sequence) != sequence)
        return false;
    *ret_event = copy;
    return true;
}

int cn_events_read(const void *catalog, uint64_t *sequence, uint32_t max,
                   struct cn_event *ret_events, uint32_t *ret_count, uint64_t *ret_lost)
{
    const struct cn_super *super = catalog;
    const struct cn_event *events = (const void *)((const uint8_t *)catalog + super->events_off);
    uint64_t size = super->event_count;
    uint64_t head = cn_load_acquire(&super->event_head);
    uint64_t next = *sequence == 0 ? 1 : *sequence;
    uint64_t oldest = head > size ? head - size : 1;
    uint64_t lost = next < oldest ? oldest - next : 0;
    uint32_t got = 0;
    next += lost;
    while (next < head && got < max) {
        if (read_event(&events[next % size], next, &ret_events[got])) {
            next++;
            got++;
            continue;
        }
        if (got > 0)
            break; /* overtaken: the gap belongs before what comes next */
        lost++;
        next++;
    }
    *sequence = next;
    *ret_count = got;
    *ret_lost = lost;
    return CN_OK;
}

void cn_counters_store(struct cn_keeper *k)
{
    uint64_t *to = (uint64_t *)&k->catalog.super->counters;
    const uint64_t *from = (const uint64_t *)&k->count;
    for (size_t i = 0; i < sizeof(k->count) / sizeof(uint64_t); i++)
        if (cn_load_relaxed(&to[i]) != from[i])
            cn_store_relaxed(&to[i], from[i]);
}
