/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copy and CRC kernels of aarch64.
 *
 * The CRC and PMULL instructions are written in assembly: gcc and clang disagree on how a function
 * asks for an extension, and the assembler takes the same directive from both.
 */
#include "cn_copy_isa.h"

#if defined(__aarch64__)

#include <arm_neon.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

static inline uint32_t cn_crc_u64(uint32_t crc, uint64_t word)
{
    uint32_t r;
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w1, %x2" : "=r"(r) : "r"(crc), "r"(word));
    return r;
}

static inline uint32_t cn_crc_u8(uint32_t crc, uint8_t byte)
{
    uint32_t r;
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w1, %w2" : "=r"(r) : "r"(crc), "r"(byte));
    return r;
}

static inline uint32_t cn_crc_join(uint32_t crc, uint32_t k)
{
    const uint64x2_t left = vdupq_n_u64(crc), right = vdupq_n_u64(k);
    uint64x2_t product;
    __asm__(".arch_extension aes\n\tpmull %0.1q, %1.1d, %2.1d"
            : "=w"(product)
            : "w"(left), "w"(right));
    return cn_crc_u64(0, vgetq_lane_u64(product, 0));
}

static inline void cn_cached_neon(char *dst, const char *src)
{
    for (size_t v = 0; v < CN_LINE_BYTES; v += 16)
        vst1q_u8((uint8_t *)dst + v, vld1q_u8((const uint8_t *)src + v));
}

/* STNP is a hint: cores that stream whole lines by themselves treat it as STP. */
static inline void cn_stream_neon(char *dst, const char *src)
{
    const uint8_t *from = (const uint8_t *)src;
    const uint8x16_t q0 = vld1q_u8(from), q1 = vld1q_u8(from + 16);
    const uint8x16_t q2 = vld1q_u8(from + 32), q3 = vld1q_u8(from + 48);
    char (*line)[CN_LINE_BYTES] = (char (*)[CN_LINE_BYTES])dst;
    __asm__("stnp %q1, %q2, [%5]\n\tstnp %q3, %q4, [%5, #32]"
            : "=m"(*line)
            : "w"(q0), "w"(q1), "w"(q2), "w"(q3), "r"(dst));
}

#define CN_CRC_U64(crc, word) cn_crc_u64((crc), (word))
#define CN_CRC_U8(crc, byte) cn_crc_u8((crc), (byte))
#define CN_CRC_JOIN(crc, k) cn_crc_join((crc), (k))
#define CN_STORE_FENCE() __asm__ volatile("dmb ish" ::: "memory")

#define CN_ISA neon
#define CN_TARGET
#include "cn_copy_kernel.h"

bool cn_isa_present(enum cn_isa isa)
{
    const unsigned long needed = HWCAP_CRC32 | HWCAP_PMULL;
    return isa == CN_ISA_NEON && (getauxval(AT_HWCAP) & needed) == needed;
}

#endif /* __aarch64__ */
