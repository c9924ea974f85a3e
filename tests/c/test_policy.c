/* SPDX-License-Identifier: Apache-2.0 */
/* What holds for every eviction policy: order along chains, skip, whole lists. */
#include "policy_bed.h"

static void names_and_bad_arguments(void)
{
    struct bed bed;

    CHECK(strcmp(cn_policy_name(0), "use-count") == 0);
    CHECK(cn_policy_name(4) == NULL && cn_policy_name(UINT32_MAX) == NULL);
    CHECK(cn_policy_create("mru", bed.nodes, NODES, 8, parent_of, &bed) == NULL);
    CHECK(cn_policy_create("", bed.nodes, NODES, 8, parent_of, &bed) == NULL);
    CHECK(cn_policy_create("lru", bed.nodes, NODES, 0, parent_of, &bed) == NULL);
    cn_policy_destroy(NULL);
}

static void every_policy_is_empty_at_first(void)
{
    struct bed bed;

    for (uint32_t i = 0; cn_policy_name(i) != NULL; i++) {
        bed_open(&bed, cn_policy_name(i), 8);
        CHECK_EQ(bed.p->ops->victim(bed.p, 5), CN_NONE);
        bed.p->ops->touch(bed.p, NULL, NULL, 0, 5);
        bed.p->ops->remove(bed.p, 3, hash_of(3), true);
        bed.p->ops->skip(bed.p, 3, 5);
        check_lists(&bed, true);
        bed_close(&bed);
    }
}

static void chains_are_cut_from_their_tails(void)
{
    struct bed bed;

    for (uint32_t i = 0; cn_policy_name(i) != NULL; i++) {
        bed_open(&bed, cn_policy_name(i), 64);
        request(&bed, 0, 6, 100);
        request(&bed, 10, 4, 100);
        if (strcmp(bed.p->ops->name, "s3-fifo") != 0) /* FIFO: true within a request only */
            request(&bed, 0, 8, 200);                 /* two more chunks behind the six */
        if (strcmp(bed.p->ops->name, "lru") == 0) {
            for (uint32_t d = 13; d >= 10; d--)
                CHECK_EQ(evict(&bed, 300), d);
        }
        while (bed.p->resident != 0) {
            uint32_t d = evict(&bed, 300);

            for (uint32_t child = 0; child < NODES; child++)
                CHECK_MSG(bed.parent[child] != d || bed.nodes[child].queue == 0,
                          "%s: %u left before %u", bed.p->ops->name, d, child);
        }
        bed_close(&bed);
    }
}

/* The reference: one relinking of the whole chain, suffix first, over a plain array. */
static void model_request(uint32_t *order, uint32_t *count, uint32_t first, uint32_t n)
{
    for (uint32_t d = first + n; d-- > first;) {
        uint32_t at = 0;

        while (at < *count && order[at] != d)
            at++;
        if (at == *count)
            (*count)++;
        memmove(order + 1, order, at * sizeof(*order));
        order[0] = d;
    }
}

static void lru_in_two_steps_equals_relinking_in_one(void)
{
    struct bed bed;
    uint32_t order[NODES];
    uint32_t count = 0;

    bed_open(&bed, "lru", NODES);
    for (uint32_t step = 0; step < 400; step++) {
        uint32_t first = (uint32_t)(mix(step) % 12) * 40;
        uint32_t n = 1 + (uint32_t)(mix(step + 1000) % 40);
        uint32_t d;

        request(&bed, first, n, 10 + step * 7);
        model_request(order, &count, first, n);
        d = bed.p->lists[0].head;
        for (uint32_t i = 0; i < count; i++, d = bed.nodes[d].next)
            CHECK_EQ(d, order[i]);
        check_lists(&bed, true);
    }
    bed_close(&bed);
}

static void late_commits_bring_their_ancestors_along(void)
{
    struct bed bed;
    const char *names[] = {"lru", "use-count"};

    for (uint32_t i = 0; i < 2; i++) {
        bed_open(&bed, names[i], 64);
        request(&bed, 0, 5, 100);
        request(&bed, 10, 5, 150);
        insert(&bed, 5, 4, 200); /* a chunk of a long answer, long after the request */
        CHECK_EQ(bed.p->lists[0].head, 0);
        for (uint32_t d = 0; d < 5; d++)
            CHECK_EQ(bed.nodes[d].next, d + 1);
        CHECK_EQ(bed.nodes[5].next, 10);
        check_lists(&bed, true);
        bed_close(&bed);
    }
}

static void a_recommitted_middle_goes_between(void)
{
    struct bed bed;
    uint32_t orphan = 3;
    uint64_t hash = hash_of(3);

    bed_open(&bed, "lru", 64);
    request(&bed, 0, 4, 100);
    bed.p->ops->remove(bed.p, 2, hash_of(2), false);
    request(&bed, 0, 2, 200);
    insert(&bed, 2, 1, 200);
    bed.p->ops->touch(bed.p, &orphan, &hash, 1, 200); /* its commit: it is there already */
    for (uint32_t d = 0; d < 3; d++)
        CHECK_EQ(bed.nodes[d].next, d + 1);
    bed_close(&bed);
}

static void parent_cycles_and_absent_parents_end(void)
{
    struct bed bed;

    for (uint32_t i = 0; cn_policy_name(i) != NULL; i++) {
        bed_open(&bed, cn_policy_name(i), 64);
        request(&bed, 0, 3, 100);
        bed.parent[0] = 2;
        insert(&bed, 3, 2, 900);
        insert(&bed, 4, 4, 900);         /* its own parent */
        insert(&bed, 5, NODES + 7, 900); /* no such descriptor */
        insert(&bed, 6, 100, 900);       /* in no list: pinned */
        check_lists(&bed, true);
        CHECK_EQ(bed.p->resident, 7);
        bed_close(&bed);
    }
}

static void skip_visits_all(void)
{
    struct bed bed;

    for (uint32_t i = 0; cn_policy_name(i) != NULL; i++) {
        bool seen[NODES] = {false};

        bed_open(&bed, cn_policy_name(i), 100);
        for (uint32_t r = 0; r < 40; r++)
            request(&bed, (uint32_t)(mix(r) % 8) * 20, 1 + (uint32_t)(mix(r + 99) % 20), 50 + r);
        for (uint32_t round = 0; round < 2; round++) {
            memset(seen, 0, sizeof(seen));
            for (uint32_t n = 0; n < bed.p->resident; n++) {
                uint32_t d = bed.p->ops->victim(bed.p, 500 + round);

                CHECK_MSG(d != CN_NONE && !seen[d], "%s: %u came twice", bed.p->ops->name, d);
                seen[d] = true;
                bed.p->ops->skip(bed.p, d, 500 + round);
                check_lists(&bed, true);
            }
        }
        CHECK(bed.p->ops->victim(bed.p, 501) != CN_NONE);
        check_lists(&bed, true);
        bed_close(&bed);
    }
}

static void a_skipped_chunk_is_offered_again(void)
{
    struct bed bed;

    for (uint32_t i = 0; cn_policy_name(i) != NULL; i++) {
        uint32_t last = CN_NONE;

        bed_open(&bed, cn_policy_name(i), 8);
        insert(&bed, 0, CN_NONE, 10);
        insert(&bed, 1, CN_NONE, 11);
        CHECK_EQ(bed.p->ops->victim(bed.p, 20), 0);
        bed.p->ops->skip(bed.p, 0, 20);
        CHECK_EQ(evict(&bed, 20), 1);
        last = evict(&bed, 21);
        CHECK_EQ(last, 0);
        CHECK_EQ(evict(&bed, 21), CN_NONE);
        bed_close(&bed);
    }
}

static void lists_stay_whole_under_random_operations(void)
{
    struct bed bed;

    for (uint32_t i = 0; cn_policy_name(i) != NULL; i++) {
        uint32_t now_s = 0;

        bed_open(&bed, cn_policy_name(i), 60);
        for (uint32_t step = 0; step < 20000; step++) {
            uint64_t dice = mix(step + i * 1000003);
            uint32_t d = (uint32_t)(dice >> 32) % NODES;
            uint32_t victim;
            bool empty;

            now_s += (dice >> 8) % 50 == 0;
            switch (dice % 8) {
            case 0:
            case 1:
                request(&bed, d - d % 32, 1 + (uint32_t)(dice >> 20) % 32, now_s);
                break;
            case 2:
                bed.p->ops->remove(bed.p, d, hash_of(d), (dice >> 16) % 2 == 0);
                break;
            case 3:
                cn_policy_set_capacity(bed.p, 1 + (uint32_t)(dice >> 40) % 200);
                break;
            case 4:
                victim = bed.p->ops->victim(bed.p, now_s);
                if (victim != CN_NONE)
                    bed.p->ops->skip(bed.p, victim, now_s);
                break;
            default:
                empty = bed.p->resident == 0;
                CHECK_EQ(evict(&bed, now_s) == CN_NONE, empty);
            }
            if (step % 16 == 0)
                check_lists(&bed, true);
        }
        while (evict(&bed, now_s) != CN_NONE)
            ;
        CHECK_EQ(bed.p->resident, 0);
        bed_close(&bed);
    }
}

int main(void)
{
    RUN(names_and_bad_arguments);
    RUN(every_policy_is_empty_at_first);
    RUN(chains_are_cut_from_their_tails);
    RUN(lru_in_two_steps_equals_relinking_in_one);
    RUN(late_commits_bring_their_ancestors_along);
    RUN(a_recommitted_middle_goes_between);
    RUN(parent_cycles_and_absent_parents_end);
    RUN(skip_visits_all);
    RUN(a_skipped_chunk_is_offered_again);
    RUN(lists_stay_whole_under_random_operations);
    return TEST_PASS;
}
