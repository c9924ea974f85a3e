/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CRC-32C is the same number on every ISA, for every alignment and length, whole or in pieces.
 */
#include <stdbool.h>

#include "check.h"
#include "cn_copy.h"
#include "cn_crc32c.h"
#include "vectors_crc32c.h"

enum { SHORT_BYTES = 1024, ALIGNMENTS = 64, LONG_BYTES = 1 << 20 };

static unsigned char *message; /* LONG_BYTES + ALIGNMENTS pseudo-random bytes */

static void message_make(void)
{
    uint64_t x = 0x9e3779b97f4a7c15u;
    message = malloc(LONG_BYTES + ALIGNMENTS);
    CHECK(message != NULL);
    for (size_t i = 0; i < LONG_BYTES + ALIGNMENTS; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        message[i] = (unsigned char)(x >> 32);
    }
}

/* The definition, one bit at a time: depends on no table and no instruction. */
static uint32_t crc_by_bits(const unsigned char *data, size_t bytes)
{
    uint32_t crc = ~0u;
    for (size_t i = 0; i < bytes; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (0x82f63b78u & (0u - (crc & 1u)));
    }
    return ~crc;
}

static const struct cn_copy_ops *ops; /* the ISA under test */

static void test_known_messages(void)
{
    for (size_t v = 0; v < sizeof(crc_vectors) / sizeof(crc_vectors[0]); v++) {
        const struct crc_vector *vector = &crc_vectors[v];
        CHECK_EQ(ops->crc32c(0, vector->data, vector->bytes), vector->crc);
    }
}

static void test_short_lengths_at_every_alignment(void)
{
    for (size_t at = 0; at < ALIGNMENTS; at++)
        for (size_t bytes = 0; bytes <= SHORT_BYTES; bytes++) {
            const uint32_t want = cn_crc32c_table(0, message + at, bytes);
            const uint32_t got = ops->crc32c(0, message + at, bytes);
            CHECK_MSG(got == want, "%s: at %zu, %zu bytes: 0x%08x, not 0x%08x", ops->name, at,
                      bytes, got, want);
        }
}

/* Lengths around the edges of each tier's block, where streams are joined and left over. */
static void test_long_lengths(void)
{
    for (size_t t = 0; t < CN_CRC_TIERS; t++)
        for (size_t blocks = 1; blocks <= 4; blocks++)
            for (size_t off = 0; off < 18; off++) {
                const size_t block_bytes = CN_CRC_STREAMS * cn_crc_tiers[t].stream_bytes;
                const size_t bytes = blocks * block_bytes + off - 9;
                const unsigned char *data = message + off;
                CHECK_EQ(ops->crc32c(7, data, bytes), cn_crc32c_table(7, data, bytes));
            }
    CHECK_EQ(ops->crc32c(0, message + 3, LONG_BYTES), cn_crc32c_table(0, message + 3, LONG_BYTES));
}

static void test_pieces_give_the_crc_of_the_whole(void)
{
    const uint32_t whole = ops->crc32c(0, message, LONG_BYTES);
    for (size_t cut = 1; cut < LONG_BYTES; cut = cut * 3 + 1) {
        const uint32_t first = ops->crc32c(0, message, cut);
        CHECK_EQ(ops->crc32c(first, message + cut, LONG_BYTES - cut), whole);
    }
}

static void test_one_flipped_bit_changes_the_crc(void)
{
    enum { BYTES = 13000 };
    const uint32_t before = ops->crc32c(0, message, BYTES);
    for (size_t bit = 0; bit < BYTES * 8; bit += 1009) {
        message[bit / 8] ^= (unsigned char)(1u << bit % 8);
        CHECK(ops->crc32c(0, message, BYTES) != before);
        message[bit / 8] ^= (unsigned char)(1u << bit % 8);
    }
    CHECK_EQ(ops->crc32c(0, message, BYTES), before);
}

static void test_null_of_no_length_is_not_looked_at(void)
{
    CHECK_EQ(ops->crc32c(0, NULL, 0), 0);
    CHECK_EQ(ops->crc32c(0x12345678u, NULL, 0), 0x12345678u);
}

static void test_table_is_the_definition(void)
{
    for (size_t bytes = 0; bytes <= 600; bytes++)
        CHECK_EQ(cn_crc32c_table(0, message + bytes % 8, bytes),
                 crc_by_bits(message + bytes % 8, bytes));
}

static void test_public_function_is_the_best_isa(void)
{
    CHECK_EQ(cn_crc32c(0, "123456789", 9), 0xe3069283u);
    CHECK_EQ(cn_crc32c(0, message, LONG_BYTES), cn_crc32c_table(0, message, LONG_BYTES));
}

int main(void)
{
    message_make();
    RUN(test_table_is_the_definition);
    RUN(test_public_function_is_the_best_isa);
    for (int isa = 0; isa < CN_ISA_COUNT; isa++) {
        ops = cn_copy_ops_of((enum cn_isa)isa);
        if (ops == NULL)
            continue;
        printf("%s:\n", ops->name);
        RUN(test_known_messages);
        RUN(test_short_lengths_at_every_alignment);
        RUN(test_long_lengths);
        RUN(test_pieces_give_the_crc_of_the_whole);
        RUN(test_one_flipped_bit_changes_the_crc);
        RUN(test_null_of_no_length_is_not_looked_at);
    }
    free(message);
    return TEST_PASS;
}
