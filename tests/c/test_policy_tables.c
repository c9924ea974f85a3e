/* SPDX-License-Identifier: Apache-2.0 */
/* What is remembered of evicted chunks: saturation, resizing, no memory before use. */
#include <stdbool.h>
#include <stdint.h>

#include "check.h"
#include "cn_ghost.h"
#include "cn_policy_stamps.h"

static uint64_t mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static void ghost_keeps_the_newest_of_a_set(void)
{
    struct cn_ghost *ghost = cn_ghost_create(1);

    CHECK_EQ(cn_ghost_entries(ghost), CN_GHOST_SETS_MIN * CN_GHOST_WAYS);
    for (uint64_t n = 0; n < 20; n++) /* one set: the high bits are equal */
        cn_ghost_put(ghost, n << 32, 1 + (uint32_t)n % 15);
    CHECK_EQ(cn_ghost_held(ghost), CN_GHOST_WAYS);
    for (uint64_t n = 0; n < 20; n++)
        CHECK_EQ(cn_ghost_take(ghost, n << 32), n < 12 ? 0 : 1 + n % 15);
    CHECK_EQ(cn_ghost_held(ghost), 0);
    cn_ghost_put(ghost, 5, 99);
    cn_ghost_put(ghost, 5, 0); /* replaces, and counts as one use */
    CHECK_EQ(cn_ghost_held(ghost), 1);
    CHECK_EQ(cn_ghost_take(ghost, 5), 1);
    CHECK_EQ(cn_ghost_take(ghost, 5), 0);
    cn_ghost_destroy(ghost);
    cn_ghost_destroy(NULL);
}

static void ghost_saturates_without_growing(void)
{
    struct cn_ghost *ghost = cn_ghost_create(4096);
    uint32_t kept = 0;

    for (uint32_t n = 0; n < 100000; n++)
        cn_ghost_put(ghost, mix(n), 3);
    CHECK_EQ(cn_ghost_held(ghost), cn_ghost_entries(ghost));
    for (uint32_t n = 100000 - 2048; n < 100000; n++)
        kept += cn_ghost_take(ghost, mix(n)) == 3;
    CHECK_MSG(kept > 1950, "only %u of the newest 2048 are left", kept);
    cn_ghost_destroy(ghost);
}

static void tables_keep_what_they_hold_when_resized(void)
{
    struct cn_ghost *ghost = cn_ghost_create(8000);
    struct cn_stamps *stamps = cn_stamps_create(8000);
    const uint64_t sizes[] = {8100, 80000, 1000000, 30000, 8000, 4000};

    for (uint32_t n = 0; n < 1000; n++) {
        cn_ghost_put(ghost, mix(n), 1 + n % 15);
        cn_stamps_put(stamps, mix(n), 7 + n);
    }
    for (uint32_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        cn_ghost_resize(ghost, sizes[i]);
        cn_stamps_resize(stamps, sizes[i]);
    }
    CHECK(cn_ghost_entries(ghost) < 4200);
    for (uint32_t n = 0; n < 1000; n++) {
        CHECK_EQ(cn_ghost_take(ghost, mix(n)), 1 + n % 15);
        CHECK_EQ(cn_stamps_take(stamps, mix(n)), 7 + n);
    }
    cn_ghost_destroy(ghost);
    cn_stamps_destroy(stamps);
}

static long resident_kib(void)
{
    char line[256];
    long kib = -1;
    FILE *status = fopen("/proc/self/status", "r");

    CHECK(status != NULL);
    while (kib < 0 && fgets(line, sizeof(line), status) != NULL) {
        if (strncmp(line, "VmRSS:", 6) == 0)
            kib = strtol(line + 6, NULL, 10);
    }
    fclose(status);
    return kib;
}

static void an_unused_ghost_is_not_resident(void)
{
    if (getenv("CN_TEST_EMULATED") != NULL)
        return; /* what is resident there is the emulator's, not ours */
    long before = resident_kib();
    struct cn_ghost *ghost = cn_ghost_create(UINT64_C(1) << 26); /* 256 MiB */
    struct cn_stamps *stamps = cn_stamps_create(UINT64_C(1) << 25);

    cn_ghost_resize(ghost, UINT64_C(1) << 27);
    cn_stamps_resize(stamps, UINT64_C(1) << 26);
    CHECK_EQ(cn_ghost_take(ghost, mix(1)), 0);
    CHECK(resident_kib() - before < 8192);
    cn_ghost_destroy(ghost);
    cn_stamps_destroy(stamps);
}

int main(void)
{
    RUN(ghost_keeps_the_newest_of_a_set);
    RUN(ghost_saturates_without_growing);
    RUN(tables_keep_what_they_hold_when_resized);
    RUN(an_unused_ghost_is_not_resident);
    return TEST_PASS;
}
