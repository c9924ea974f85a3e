/* SPDX-License-Identifier: Apache-2.0 */
/* Claim: chunks of a low priority that are leased keep nobody from evicting the others by
 * policy. */
#include "pool_bed.h"

int main(void)
{
    alarm(30);
    struct bed bed = bed_open(8 << 20, 4096, 512, "use-count");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    struct cn_grant grant;
    cn_reserve(s.client, 4096, 0, 0, &grant);
    bed_settle(&bed);
    CHECK_EQ(cn_reserve(s.client, 4096, 0, 0, &grant), CN_OK);
    struct bed_key low = bed_key(1 << 20);
    struct cn_put put = {.ref = grant.ref,
                         .key = low.bytes,
                         .data_bytes = 4096,
                         .ns_slot = bed.ns,
                         .position = CN_POSITION_UNKNOWN,
                         .priority = -1};
    CHECK_EQ(cn_commit(s.client, &put, 0), CN_OK);
    bed_settle(&bed);
    struct cn_view view;
    CHECK_EQ(cn_lease(s.client, bed.ns, low.bytes, &view), CN_OK); /* one leased chunk of band 0 */
    for (uint64_t n = 0; n < 4000; n++)                            /* twice the pool, in band 1 */
        CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    bed_settle(&bed);
    uint64_t seq = 1, lost, by[8] = {0};
    struct cn_event events[64];
    uint32_t got;
    do {
        cn_events_read(bed.catalog, &seq, 64, events, &got, &lost);
        for (uint32_t i = 0; i < got; i++)
            by[events[i].what >> 8 & 255] += (events[i].what & 255) == CN_EVENT_EVICTED;
    } while (got > 0 || lost > 0);
    printf(
        "among the last events, evicted by policy %lu, by reclaim %lu; live bytes %lu, high %lu\n",
        by[CN_BY_POLICY], by[CN_BY_RECLAIM], bed.keeper->count.live_bytes, bed.keeper->high_bytes);
    CHECK(by[CN_BY_POLICY] > 0);
    CHECK(bed.keeper->count.live_bytes <= bed.keeper->high_bytes);
    cn_release(s.client, view.slot);
    bed_kill(&bed, &s);
    bed_close(&bed);
    return 0;
}
