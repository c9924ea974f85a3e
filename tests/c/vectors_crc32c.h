/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CRC-32C of known messages: RFC 3720 appendix B.4, the catalogue's check value, and short texts.
 */
#ifndef CN_VECTORS_CRC32C_H
#define CN_VECTORS_CRC32C_H

#include <stdint.h>

struct crc_vector {
    const char *data;
    uint32_t bytes;
    uint32_t crc;
};

/* clang-format off */
static const struct crc_vector crc_vectors[] = {
    {"", 0, 0x00000000u},
    {"a", 1, 0xc1d04330u},
    {"abc", 3, 0x364b3fb7u},
    {"123456789", 9, 0xe3069283u},
    {"The quick brown fox jumps over the lazy dog", 43, 0x22620404u},
    /* RFC 3720 B.4: 32 bytes of zeros, of ones, ascending, descending. */
    {"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 32, 0x8a9136aau},
    {"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"
     "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 32, 0x62a8ab43u},
    {"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f"
     "\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f", 32, 0x46dd794eu},
    {"\x1f\x1e\x1d\x1c\x1b\x1a\x19\x18\x17\x16\x15\x14\x13\x12\x11\x10"
     "\x0f\x0e\x0d\x0c\x0b\x0a\x09\x08\x07\x06\x05\x04\x03\x02\x01\x00", 32, 0x113fdb5cu},
    /* RFC 3720 B.4: an iSCSI SCSI Read (10) command. */
    {"\x01\xc0\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
     "\x14\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x14\x00\x00\x00\x18"
     "\x28\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00", 48, 0xd9963a56u},
};
/* clang-format on */

#endif
