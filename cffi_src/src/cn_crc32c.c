/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CRC-32C by table (slicing by 8), for CPUs without the instruction and as the yardstick of tests.
 */
#include "cn_crc32c.h"

#include <string.h>

#include "cn_copy.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "slicing by 8 reads words as little endian"
#endif

const struct cn_crc_tier cn_crc_tiers[CN_CRC_TIERS] = {
    {4096, 0x82f89c77u, 0x54a86326u},
    {1024, 0x170076fau, 0xa51b6135u},
    {256, 0xb9e02b86u, 0xdd7e3b0cu},
};

/*
 * A CRC is linear over xor, so a table of 256 is spanned by its entries at 1, 2, 4 ... 128.
 * Row k holds the remainder of a byte followed by k zero bytes.
 */
#define CN_SPAN1(x, b0) (x), (x) ^ (b0)
#define CN_SPAN2(x, b0, b1) CN_SPAN1(x, b0), CN_SPAN1((x) ^ (b1), b0)
#define CN_SPAN3(x, b0, b1, b2) CN_SPAN2(x, b0, b1), CN_SPAN2((x) ^ (b2), b0, b1)
#define CN_SPAN4(x, b0, b1, b2, b3) CN_SPAN3(x, b0, b1, b2), CN_SPAN3((x) ^ (b3), b0, b1, b2)
#define CN_SPAN5(x, b0, b1, b2, b3, b4)                                                            \
    CN_SPAN4(x, b0, b1, b2, b3), CN_SPAN4((x) ^ (b4), b0, b1, b2, b3)
#define CN_SPAN6(x, b0, b1, b2, b3, b4, b5)                                                        \
    CN_SPAN5(x, b0, b1, b2, b3, b4), CN_SPAN5((x) ^ (b5), b0, b1, b2, b3, b4)
#define CN_SPAN7(x, b0, b1, b2, b3, b4, b5, b6)                                                    \
    CN_SPAN6(x, b0, b1, b2, b3, b4, b5), CN_SPAN6((x) ^ (b6), b0, b1, b2, b3, b4, b5)
#define CN_ROW(b0, b1, b2, b3, b4, b5, b6, b7)                                                     \
    {CN_SPAN7(0u, b0, b1, b2, b3, b4, b5, b6), CN_SPAN7(b7, b0, b1, b2, b3, b4, b5, b6)}

/* clang-format off */
static const uint32_t cn_crc_rows[8][256] = {
    CN_ROW(0xf26b8303u, 0xe13b70f7u, 0xc79a971fu, 0x8ad958cfu,
           0x105ec76fu, 0x20bd8edeu, 0x417b1dbcu, 0x82f63b78u),
    CN_ROW(0x13a29877u, 0x274530eeu, 0x4e8a61dcu, 0x9d14c3b8u,
           0x3fc5f181u, 0x7f8be302u, 0xff17c604u, 0xfbc3faf9u),
    CN_ROW(0xa541927eu, 0x4f6f520du, 0x9edea41au, 0x38513ec5u,
           0x70a27d8au, 0xe144fb14u, 0xc76580d9u, 0x8b277743u),
    CN_ROW(0xdd45aab8u, 0xbf672381u, 0x7b2231f3u, 0xf64463e6u,
           0xe964b13du, 0xd725148bu, 0xaba65fe7u, 0x52a0c93fu),
    CN_ROW(0x38116facu, 0x7022df58u, 0xe045beb0u, 0xc5670b91u,
           0x8f2261d3u, 0x1ba8b557u, 0x37516aaeu, 0x6ea2d55cu),
    CN_ROW(0xef306b19u, 0xdb8ca0c3u, 0xb2f53777u, 0x6006181fu,
           0xc00c303eu, 0x85f4168du, 0x0e045bebu, 0x1c08b7d6u),
    CN_ROW(0x68032cc8u, 0xd0065990u, 0xa5e0c5d1u, 0x4e2dfd53u,
           0x9c5bfaa6u, 0x3d5b83bdu, 0x7ab7077au, 0xf56e0ef4u),
    CN_ROW(0x493c7d27u, 0x9278fa4eu, 0x211d826du, 0x423b04dau,
           0x847609b4u, 0x0d006599u, 0x1a00cb32u, 0x34019664u),
};
/* clang-format on */

/* The part of a word's remainder that its byte with k bytes after it contributes. */
static inline uint32_t cn_crc_row(unsigned k, uint64_t word)
{
    return cn_crc_rows[k][(uint8_t)(word >> (56u - 8u * k))];
}

uint32_t cn_crc32c_table(uint32_t crc, const void *data, size_t bytes)
{
    const unsigned char *p = data;
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t w;
        memcpy(&w, p, sizeof(w));
        w ^= crc;
        crc = cn_crc_row(7, w) ^ cn_crc_row(6, w) ^ cn_crc_row(5, w) ^ cn_crc_row(4, w) ^
              cn_crc_row(3, w) ^ cn_crc_row(2, w) ^ cn_crc_row(1, w) ^ cn_crc_row(0, w);
    }
    for (; bytes > 0; bytes--, p++)
        crc = (crc >> 8u) ^ cn_crc_rows[0][(uint8_t)crc ^ *p];
    return ~crc;
}

uint32_t cn_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    return cn_copy_best()->crc32c(crc, data, bytes);
}
