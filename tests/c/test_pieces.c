/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many pieces in one call: as memcpy and the table's CRC would do them one by one, with every
 * kernel; nothing beyond the end whatever the arrays say; lost bytes are reported.
 */
#include <stdbool.h>

#include "check_region.h"
#include "cn_copy.h"
#include "cn_crc32c.h"

enum { PAGES_BYTES = 24 << 20, PIECES_MAX = 600, EDGE_BYTES = 64, EDGE = 0xa5 };

static unsigned char *pages, *whole, *back; /* PAGES_BYTES each, and the edges of whole */
static const struct cn_copy_ops *ops;       /* the ISA under test */
static uint64_t addresses[PIECES_MAX], lengths[PIECES_MAX];
static uint64_t state = 0x2545f4914f6cdd1du;

static uint64_t draw(uint64_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (state >> 20) % below;
}

static void rooms_make(void)
{
    pages = aligned_alloc(4096, PAGES_BYTES);
    whole = aligned_alloc(4096, PAGES_BYTES + 4096);
    back = aligned_alloc(4096, PAGES_BYTES);
    CHECK(pages != NULL && whole != NULL && back != NULL);
    for (size_t i = 0; i < PAGES_BYTES; i++)
        pages[i] = (unsigned char)draw(256);
}

/* count pieces of up to most bytes anywhere in pages, of any alignment unless aligned. */
static struct cn_pieces pieces_draw(uint64_t count, uint64_t most, bool aligned)
{
    struct cn_pieces pieces = {addresses, lengths, count, 0};
    for (uint64_t i = 0; i < count; i++) {
        lengths[i] = aligned ? most : draw(most + 1);
        uint64_t off = draw(PAGES_BYTES - most);
        addresses[i] = (uintptr_t)pages + (aligned ? off / most * most : off);
    }
    CHECK_EQ(cn_pieces_bytes(lengths, count, &pieces.bytes), CN_OK);
    return pieces;
}

/* Gather to whole, between edges; the same piece by piece is the yardstick. */
static void gather_check(const struct cn_pieces *pieces, uint32_t before)
{
    unsigned char *to = whole + EDGE_BYTES;
    uint32_t want = before, crc = before;
    memset(whole, EDGE, pieces->bytes + 2 * EDGE_BYTES);
    CHECK_EQ(cn_copy_gather(ops, to, pieces, &crc), CN_OK);
    for (uint64_t i = 0, off = 0; i < pieces->count; off += lengths[i], i++) {
        const void *piece = (const void *)(uintptr_t)addresses[i];
        CHECK_MEM_EQ(to + off, piece, lengths[i]);
        want = cn_crc32c_table(want, piece, lengths[i]);
    }
    CHECK_EQ(crc, want);
    for (int i = 0; i < EDGE_BYTES; i++)
        CHECK(whole[i] == EDGE && to[pieces->bytes + (size_t)i] == EDGE);
    memset(to, 0, pieces->bytes);
    CHECK_EQ(cn_copy_gather(ops, to, pieces, NULL), CN_OK);
    CHECK_EQ(cn_crc32c_table(before, to, pieces->bytes), want);
}

/* Scatter whole to back, pieces of it side by side in another order, every third one skipped. */
static void scatter_check(const struct cn_pieces *pieces, bool sum)
{
    const unsigned char *from = whole + EDGE_BYTES;
    uint32_t crc = 77;
    uint64_t off = pieces->bytes;
    for (uint64_t i = 0; i < pieces->count; i++) {
        off -= lengths[i];
        addresses[i] = i % 3 == 2 ? 0 : (uintptr_t)back + off;
    }
    memset(back, EDGE, pieces->bytes);
    CHECK_EQ(cn_copy_scatter(ops, pieces, from, sum ? &crc : NULL), CN_OK);
    off = 0;
    for (uint64_t i = 0; i < pieces->count; off += lengths[i], i++) {
        const unsigned char *to = back + pieces->bytes - off - lengths[i];
        if (addresses[i] != 0)
            CHECK_MEM_EQ(to, from + off, lengths[i]);
        for (uint64_t k = 0; addresses[i] == 0 && k < lengths[i]; k++)
            CHECK_EQ(to[k], EDGE);
    }
    CHECK_EQ(crc, sum ? cn_crc32c_table(77, from, pieces->bytes) : 77);
}

static void both_ways(uint64_t count, uint64_t most, bool aligned)
{
    const struct cn_pieces pieces = pieces_draw(count, most, aligned);
    gather_check(&pieces, (uint32_t)draw(UINT32_MAX));
    scatter_check(&pieces, true);
    scatter_check(&pieces, false);
}

static void pieces_of_any_length(void)
{
    both_ways(0, 1, false);
    both_ways(1, 1, false);
    for (int i = 0; i < 20; i++) {
        both_ways(1 + draw(50), 200, false);   /* cached */
        both_ways(1 + draw(50), 3000, false);  /* some of them streamed */
        both_ways(1 + draw(50), 20000, false); /* most */
    }
    both_ways(64, 32768, true);
    both_ways(544, 32768, true); /* 17 MiB: scatter streams as well */
    both_ways(2, 9 << 20, true);
}

static void calls_in_order_make_one_crc(void)
{
    const struct cn_pieces all = pieces_draw(100, 5000, false);
    uint32_t want = 0, crc = 0;
    uint64_t off = 0;
    CHECK_EQ(cn_copy_gather(ops, whole, &all, &want), CN_OK);
    for (uint64_t i = 0; i < all.count; i += 20) {
        struct cn_pieces some = {addresses + i, lengths + i, 20, 0};
        CHECK_EQ(cn_pieces_bytes(some.lengths, some.count, &some.bytes), CN_OK);
        CHECK_EQ(cn_copy_gather(ops, back + off, &some, &crc), CN_OK);
        off += some.bytes;
    }
    CHECK_EQ(crc, want);
    CHECK_MEM_EQ(back, whole, all.bytes);
}

/* As if another thread had written to the arrays after they were looked at. */
static void arrays_that_grow_end_the_copy(void)
{
    struct cn_pieces pieces = pieces_draw(10, 4096, true);
    uint32_t crc = 5;
    memset(whole, EDGE, pieces.bytes + EDGE_BYTES);
    lengths[9] = 8192;
    CHECK_EQ(cn_copy_gather(ops, whole, &pieces, &crc), CN_EINVAL);
    CHECK_EQ(cn_copy_scatter(ops, &pieces, whole, &crc), CN_EINVAL);
    lengths[9] = 0;
    CHECK_EQ(cn_copy_gather(ops, whole, &pieces, &crc), CN_EINVAL);
    CHECK_EQ(cn_copy_scatter(ops, &pieces, whole, &crc), CN_EINVAL);
    lengths[9] = 4096, addresses[9] = 0;
    CHECK_EQ(cn_copy_gather(ops, whole, &pieces, &crc), CN_EINVAL);
    CHECK_EQ(crc, 5);
    for (size_t i = 0; i < EDGE_BYTES; i++)
        CHECK_EQ(whole[pieces.bytes + i], EDGE);
}

static void wrong_arguments_change_nothing(void)
{
    const uint64_t huge[] = {UINT64_MAX, 2}, half[] = {PTRDIFF_MAX, 1};
    uint64_t bytes = 3;
    CHECK_EQ(cn_pieces_bytes(huge, 2, &bytes), CN_EINVAL);
    CHECK_EQ(cn_pieces_bytes(half, 2, &bytes), CN_EINVAL);
    CHECK_EQ(bytes, 3);
    CHECK_EQ(cn_pieces_bytes(NULL, 0, &bytes), CN_OK);
    CHECK_EQ(bytes, 0);

    uint32_t crc = 5;
    const struct cn_pieces right = pieces_draw(10, 4096, true);
    struct cn_pieces wrong = right;
    memset(whole, EDGE, right.bytes);
    wrong.bytes = right.bytes - 1;
    CHECK_EQ(cn_guarded_gather(whole, &wrong, &crc), CN_EINVAL);
    CHECK_EQ(cn_guarded_scatter(&wrong, whole, &crc), CN_EINVAL);
    wrong.bytes = right.bytes + 1;
    CHECK_EQ(cn_guarded_gather(whole, &wrong, &crc), CN_EINVAL);
    CHECK_EQ(cn_guarded_scatter(&wrong, whole, &crc), CN_EINVAL);
    wrong.bytes = UINT64_MAX;
    CHECK_EQ(cn_guarded_gather(whole, &wrong, &crc), CN_EINVAL);
    addresses[3] = UINT64_MAX - 10; /* ends behind the last byte there is */
    CHECK_EQ(cn_guarded_gather(whole, &right, &crc), CN_EINVAL);
    CHECK_EQ(cn_guarded_scatter(&right, whole, &crc), CN_EINVAL);
    addresses[3] = 0;
    CHECK_EQ(cn_guarded_gather(whole, &right, &crc), CN_EINVAL);
    CHECK_EQ(crc, 5);
    for (uint64_t i = 0; i < right.bytes; i++)
        CHECK(whole[i] == EDGE);
}

static void lost_bytes_are_reported(void)
{
    int fd = object_new(OBJECT_BYTES);
    char *pool = object_map(fd, OBJECT_BYTES, CN_MAP_WRITABLE);
    const struct cn_pieces pieces = pieces_draw(256, 16384, true);
    uint32_t crc = 0, again = 0;
    CHECK_EQ(cn_guarded_gather(pool, &pieces, &crc), CN_OK);
    CHECK_EQ(crc, cn_crc32c_table(0, pool, pieces.bytes));
    for (uint64_t i = 0; i < pieces.count; i++)
        addresses[i] = (uintptr_t)back + i * 16384;
    CHECK_EQ(cn_guarded_scatter(&pieces, pool, &again), CN_OK);
    CHECK_EQ(again, crc);
    CHECK_MEM_EQ(back, pool, pieces.bytes);

    CHECK_EQ(ftruncate(fd, OBJECT_BYTES / 4), 0);
    close(fd);
    CHECK_EQ(cn_guarded_gather(pool, &pieces, &crc), CN_ELOST);
    CHECK_EQ(cn_guarded_gather(pool, &pieces, NULL), CN_ELOST);
    CHECK_EQ(cn_guarded_scatter(&pieces, pool, &crc), CN_ELOST);
    CHECK_EQ(cn_guarded_scatter(&pieces, pool, NULL), CN_ELOST);
    CHECK_EQ(crc, again);
    object_unmap(pool, OBJECT_BYTES);
}

/* Whose piece it is that faults: the caller's own, whose fault stays what it was. */
static void fault_in_a_piece(void)
{
    int fd = object_new(OBJECT_BYTES);
    addresses[0] = (uintptr_t)object_map(fd, OBJECT_BYTES, CN_MAP_WRITABLE);
    lengths[0] = 4096;
    const struct cn_pieces pieces = {addresses, lengths, 1, 4096};
    CHECK_EQ(ftruncate(fd, 0), 0);
    (void)cn_guarded_gather(whole, &pieces, NULL);
}

int main(void)
{
    rooms_make();
    for (int isa = 0; isa < CN_ISA_COUNT; isa++) {
        ops = cn_copy_ops_of((enum cn_isa)isa);
        if (ops == NULL)
            continue;
        printf("%s:\n", ops->name);
        RUN(pieces_of_any_length);
        RUN(calls_in_order_make_one_crc);
        RUN(arrays_that_grow_end_the_copy);
    }
    RUN(wrong_arguments_change_nothing);
    CHECK_EQ(cn_guard_install(&sys), CN_OK);
    RUN(lost_bytes_are_reported);
    CHECK(died_of(in_child(fault_in_a_piece), SIGBUS));
    free(pages), free(whole), free(back);
    return TEST_PASS;
}
