/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the CRC-32C kernels share: the table implementation and the constants that join streams.
 */
#ifndef CN_CRC32C_H
#define CN_CRC32C_H

#include <stddef.h>
#include <stdint.h>

#define CN_CRC_STREAMS 3
#define CN_CRC_TIERS 3

/*
 * How long the three streams of one block are, and how two of them are moved past what follows.
 *
 * crc(A|B|C) = crc(A) x^(16 n) + crc(B) x^(8 n) + crc(C) modulo P, for streams of n bytes. The
 * carry-less product of two reflected words, reduced by the crc32 instruction, has gained x^33;
 * hence join_one = x^(8 n - 33) and join_two = x^(16 n - 33), reflected.
 */
struct cn_crc_tier {
    size_t stream_bytes; /* a multiple of 64 */
    uint32_t join_one;
    uint32_t join_two;
};

extern const struct cn_crc_tier cn_crc_tiers[CN_CRC_TIERS];

/* The table implementation; register form without init and xorout is not exposed. */
uint32_t cn_crc32c_table(uint32_t crc, const void *data, size_t bytes);

#endif
