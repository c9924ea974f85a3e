/* SPDX-License-Identifier: Apache-2.0 */
/* What each eviction policy decides, in hand-made cases. */
#include "cn_ghost.h"
#include "policy_bed.h"

#define SAMPLED UINT64_C(0x123456789abcde0)

static void lfu_keeps_what_is_used_more_until_it_is_old(void)
{
    struct bed bed;

    bed_open(&bed, "lfu", 8);
    for (uint32_t n = 0; n < 5; n++)
        request(&bed, 0, 1, n);
    insert(&bed, 1, CN_NONE, 10);
    insert(&bed, 2, CN_NONE, 11);
    CHECK_EQ(evict(&bed, 12), 1);
    CHECK_EQ(evict(&bed, 12), 2);
    for (uint32_t n = 0; n < 3; n++) { /* the floor rises by one a victim: 3, 4, 5 */
        insert(&bed, 3 + n, CN_NONE, 20);
        CHECK_EQ(evict(&bed, 20), 3 + n);
    }
    insert(&bed, 9, CN_NONE, 30);
    CHECK_EQ(evict(&bed, 30), 0); /* aged out, although it was used five times */
    bed_close(&bed);
}

static void lfu_counts_to_its_limit(void)
{
    struct bed bed;

    bed_open(&bed, "lfu", 8);
    for (uint32_t n = 0; n < 1000; n++) {
        request(&bed, 0, 1, n);
        insert(&bed, 1, CN_NONE, n);
        CHECK_EQ(evict(&bed, n) == CN_NONE, 0);
        check_lists(&bed, false);
        if (bed.nodes[0].queue == 0)
            insert(&bed, 0, CN_NONE, n);
        if (bed.nodes[1].queue != 0)
            bed.p->ops->remove(bed.p, 1, hash_of(1), false);
    }
    bed_close(&bed);
}

static void s3fifo_promotes_what_was_used_twice(void)
{
    struct bed bed;

    bed_open(&bed, "s3-fifo", 20); /* the small queue is due from two chunks on */
    insert(&bed, 0, CN_NONE, 1);
    insert(&bed, 1, CN_NONE, 2);
    insert(&bed, 2, CN_NONE, 3);
    request(&bed, 0, 1, 4);
    request(&bed, 0, 1, 5);
    request(&bed, 1, 1, 5);
    CHECK_EQ(evict(&bed, 6), 1); /* one use is not enough; 0 went to the main queue on the way */
    CHECK_EQ(bed.p->lists[1].head, 0);
    insert(&bed, 1, CN_NONE, 7); /* remembered by the ghost */
    CHECK_EQ(bed.p->lists[1].head, 1);
    CHECK_EQ(evict(&bed, 8), 0); /* small is not due: the main queue's oldest, unused since */
    insert(&bed, 0, CN_NONE, 9); /* what main gave up is not remembered */
    CHECK_EQ(bed.p->lists[0].head, 0);
    bed_close(&bed);
}

static void usecount_counts_survive_eviction(void)
{
    struct bed bed;

    bed_open(&bed, "use-count", 64);
    request(&bed, 0, 4, 10);
    request(&bed, 0, 4, 20);
    CHECK_EQ(bed.nodes[3].uses, 2);
    CHECK_EQ(bed.p->lists[1].count, 4);
    while (evict(&bed, 30) != CN_NONE)
        ;
    CHECK_EQ(cn_ghost_held(bed.p->ghost), 4);
    request(&bed, 0, 4, 40);
    CHECK_EQ(bed.nodes[0].uses, 3);
    CHECK_EQ(bed.p->lists[2].count, 4);
    bed.p->ops->remove(bed.p, 3, hash_of(3), false); /* deleted: no trace is left */
    insert(&bed, 3, 2, 41);
    CHECK_EQ(bed.nodes[3].uses, 1);
    bed_close(&bed);
}

static void usecount_heals_lost_ghosts_along_the_chain(void)
{
    struct bed bed;

    bed_open(&bed, "use-count", 64);
    request(&bed, 0, 6, 10);
    request(&bed, 0, 6, 20);
    while (evict(&bed, 30) != CN_NONE)
        ;
    for (uint32_t d = 0; d < 5; d++)
        CHECK_EQ(cn_ghost_take(bed.p->ghost, hash_of(d)), 2);
    request(&bed, 0, 5, 40);
    CHECK_EQ(bed.p->lists[0].count, 5);
    insert(&bed, 5, 4, 40); /* its count was kept: the whole prefix was used as often */
    CHECK_EQ(bed.p->lists[2].count, 6);
    CHECK_EQ(bed.p->lists[2].head, 0);
    for (uint32_t d = 0; d < 5; d++) {
        CHECK_EQ(bed.nodes[d].uses, 3);
        CHECK_EQ(bed.nodes[d].next, d + 1);
    }
    check_lists(&bed, true);
    bed_close(&bed);
}

static void usecount_spares_the_chain_that_arrives(void)
{
    struct bed bed;

    bed_open(&bed, "use-count", 8);
    request(&bed, 0, 4, 10);
    request(&bed, 0, 4, 11);
    request(&bed, 10, 4, 12);
    CHECK_EQ(evict(&bed, 12), 3); /* not 13, although its queue scores lower */
    bed.p->ops->remove(bed.p, 0, hash_of(0), false);
    bed.p->ops->remove(bed.p, 1, hash_of(1), false);
    bed.p->ops->remove(bed.p, 2, hash_of(2), false);
    CHECK_EQ(evict(&bed, 12), 13); /* nothing else is left */
    bed_close(&bed);
}

static void usecount_age_outweighs_use_in_the_end(void)
{
    struct bed bed;

    bed_open(&bed, "use-count", 8);
    request(&bed, 0, 1, 10);
    request(&bed, 0, 1, 11);
    insert(&bed, 1, CN_NONE, 12);
    insert(&bed, 2, CN_NONE, 20);
    CHECK_EQ(bed.p->ops->victim(bed.p, 21), 1); /* 1.0 / (60 + 9) against 1.5 / (60 + 10) */
    request(&bed, 1, 1, 9000);
    bed.p->ops->remove(bed.p, 2, hash_of(2), false);
    insert(&bed, 3, CN_NONE, 9001);
    insert(&bed, 4, CN_NONE, 9002);
    CHECK_EQ(evict(&bed, 9003), 0);
    bed_close(&bed);
}

static void usecount_learns_the_mean_gap_from_the_sample(void)
{
    struct bed bed;
    uint32_t d = 0;
    uint64_t hash = SAMPLED;

    bed_open(&bed, "use-count", 8);
    bed.p->ops->insert(bed.p, d, CN_NONE, hash, 10);
    for (uint32_t n = 1; n <= 10000; n++)
        bed.p->ops->touch(bed.p, &d, &hash, 1, 10 + 100 * n);
    CHECK(bed.p->meangap_s > 99.0 && bed.p->meangap_s < 100.0);
    bed.p->ops->remove(bed.p, d, hash, true);
    bed.p->ops->insert(bed.p, d, CN_NONE, hash, 2000000); /* gaps across an eviction count */
    CHECK(bed.p->meangap_s > 800.0);
    bed.p->ops->touch(bed.p, &d, &hash, 1, 1999000); /* a clock that went back does not */
    CHECK(bed.p->meangap_s > 800.0);
    bed_close(&bed);
}

int main(void)
{
    RUN(lfu_keeps_what_is_used_more_until_it_is_old);
    RUN(lfu_counts_to_its_limit);
    RUN(s3fifo_promotes_what_was_used_twice);
    RUN(usecount_counts_survive_eviction);
    RUN(usecount_heals_lost_ghosts_along_the_chain);
    RUN(usecount_spares_the_chain_that_arrives);
    RUN(usecount_age_outweighs_use_in_the_end);
    RUN(usecount_learns_the_mean_gap_from_the_sample);
    return TEST_PASS;
}
