/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copy and CRC kernels of x86-64. The file compiles for the baseline; each kernel names its ISA.
 */
#include "cn_copy_isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define CN_CRC_ISA "sse4.2,pclmul"
#define CN_CRC_U64(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define CN_CRC_U8(crc, byte) _mm_crc32_u8((crc), (byte))
#define CN_CRC_JOIN(crc, k) cn_crc_join((crc), (k))
#define CN_STORE_FENCE() _mm_sfence()

__attribute__((target(CN_CRC_ISA))) static inline uint32_t cn_crc_join(uint32_t crc, uint32_t k)
{
    const __m128i product =
        _mm_clmulepi64_si128(_mm_cvtsi64_si128((int64_t)crc), _mm_cvtsi64_si128((int64_t)k), 0);
    return CN_CRC_U64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

/* Moves one 64-byte line with registers of `type`, by unaligned loads and the given store. */
#define CN_MOVE_LINE(type, load, store)                                                            \
    do {                                                                                           \
        for (size_t v = 0; v < CN_LINE_BYTES; v += sizeof(type))                                   \
            store((type *)(void *)(dst + v), load((const type *)(const void *)(src + v)));         \
    } while (0)

#define CN_LINE_FUNCTIONS(isa, isa_text, type, load, store, stream)                                \
    __attribute__((target(isa_text))) static inline void cn_cached_##isa(char *dst,                \
                                                                         const char *src)          \
    {                                                                                              \
        CN_MOVE_LINE(type, load, store);                                                           \
    }                                                                                              \
    __attribute__((target(isa_text))) static inline void cn_stream_##isa(char *dst,                \
                                                                         const char *src)          \
    {                                                                                              \
        CN_MOVE_LINE(type, load, stream);                                                          \
    }

CN_LINE_FUNCTIONS(sse42, CN_CRC_ISA, __m128i, _mm_loadu_si128, _mm_storeu_si128, _mm_stream_si128)
CN_LINE_FUNCTIONS(avx2, "avx2," CN_CRC_ISA, __m256i, _mm256_loadu_si256, _mm256_storeu_si256,
                  _mm256_stream_si256)
CN_LINE_FUNCTIONS(avx512, "avx512f," CN_CRC_ISA, __m512i, _mm512_loadu_si512, _mm512_storeu_si512,
                  _mm512_stream_si512)

#define CN_ISA sse42
#define CN_TARGET __attribute__((target(CN_CRC_ISA)))
#include "cn_copy_kernel.h"

#define CN_ISA avx2
#define CN_TARGET __attribute__((target("avx2," CN_CRC_ISA)))
#include "cn_copy_kernel.h"

#define CN_ISA avx512
#define CN_TARGET __attribute__((target("avx512f," CN_CRC_ISA)))
#include "cn_copy_kernel.h"

/* __builtin_cpu_supports() asks xgetbv too: registers that the kernel does not save are absent. */
bool cn_isa_present(enum cn_isa isa)
{
    const bool crc = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
    switch (isa) {
    case CN_ISA_SSE42:
        return crc;
    case CN_ISA_AVX2:
        return crc && __builtin_cpu_supports("avx2");
    case CN_ISA_AVX512:
        return crc && __builtin_cpu_supports("avx512f");
    default:
        return false;
    }
}

#endif /* __x86_64__ */
