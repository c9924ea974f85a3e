/* SPDX-License-Identifier: Apache-2.0 */
/* Claim: a page that is gone under a copy of the keeper's costs that chunk, not the daemon. */
#include "cn_region.h"
#include "pool_bed.h"

static int copy_lost(struct cn_keeper *k, void *args)
{
    (void)k;
    char to[64];
    return cn_guarded_copy_out(to, args, sizeof(to));
}

static int move_into_lost(struct cn_keeper *k, void *args)
{
    (void)k;
    static char from[4096];
    /* what cn_move() calls: dst is pool, too */
    return cn_guarded_copy_out(args, from, sizeof(from));
}

int main(int argc, char **argv)
{
    alarm(10);
    struct bed bed = bed_open(8 << 20, 64, 512, "lru");
    struct cn_syserr err;
    CHECK_EQ(cn_guard_install(&err), CN_OK);
    void *gone;
    int fd = bed_object(4096, &gone);
    CHECK_EQ(ftruncate(fd, 0), 0);
    if (argc < 2 || argv[1][0] == '1') {
        CHECK_EQ(cn_keeper_start(bed.keeper), CN_OK);
        CHECK_EQ(cn_call(bed.keeper, copy_lost, gone), CN_ELOST);
    } else {
        /* no thread: signals are not blocked */
        CHECK_EQ(move_into_lost(bed.keeper, gone), CN_ELOST);
    }
    bed_close(&bed);
    return 0;
}
