/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The plain kernels, and the choice between the ISAs.
 *
 * Nothing is cached: what the CPU has is a few bits that libgcc and the C library already hold, and
 * to look again costs less than the shortest copy.
 */
#include "cn_copy.h"

#include <string.h>

#include "cn_atomic.h"
#include "cn_copy_isa.h"
#include "cn_crc32c.h"

static void cn_plain_copy_out(void *dst, const void *src, size_t bytes)
{
    if (bytes > 0)
        memcpy(dst, src, bytes);
}

/* The C library streams large copies with stores of its own choice and fences those itself. */
static void cn_plain_copy(void *dst, const void *src, size_t bytes)
{
    cn_plain_copy_out(dst, src, bytes);
    cn_fence_release();
}

/* In stretches, so that the second look at each finds it in the first-level cache. */
#define CN_PLAIN_STRETCH_BYTES 4096u

static uint32_t cn_plain_copy_out_crc32c(uint32_t crc, void *dst, const void *src, size_t bytes)
{
    char *to = dst;
    const char *from = src;
    while (bytes > 0) {
        const size_t n = bytes < CN_PLAIN_STRETCH_BYTES ? bytes : CN_PLAIN_STRETCH_BYTES;
        memcpy(to, from, n);
        crc = cn_crc32c_table(crc, from, n);
        to += n, from += n, bytes -= n;
    }
    return crc;
}

static uint32_t cn_plain_copy_crc32c(uint32_t crc, void *dst, const void *src, size_t bytes)
{
    crc = cn_plain_copy_out_crc32c(crc, dst, src, bytes);
    cn_fence_release();
    return crc;
}

static void cn_plain_fence(void) { cn_fence_release(); }

static const struct cn_copy_ops cn_ops_plain = {
    .name = "plain",
    .crc32c = cn_crc32c_table,
    .copy = cn_plain_copy,
    .copy_crc32c = cn_plain_copy_crc32c,
    .copy_out = cn_plain_copy_out,
    .copy_out_crc32c = cn_plain_copy_out_crc32c,
    .stream_piece = cn_plain_copy_out,
    .stream_piece_crc32c = cn_plain_copy_out_crc32c,
    .fence = cn_plain_fence,
};

#if !defined(__x86_64__) && !defined(__aarch64__)
bool cn_isa_present(enum cn_isa isa)
{
    (void)isa;
    return false;
}
#endif

static const struct cn_copy_ops *const cn_copy_tables[CN_ISA_COUNT] = {
    [CN_ISA_PLAIN] = &cn_ops_plain,
#if defined(__x86_64__)
    [CN_ISA_SSE42] = &cn_ops_sse42,
    [CN_ISA_AVX2] = &cn_ops_avx2,
    [CN_ISA_AVX512] = &cn_ops_avx512,
#elif defined(__aarch64__)
    [CN_ISA_NEON] = &cn_ops_neon,
#endif
};

const struct cn_copy_ops *cn_copy_ops_of(enum cn_isa isa)
{
    if (isa == CN_ISA_PLAIN)
        return &cn_ops_plain;
    return cn_isa_present(isa) ? cn_copy_tables[isa] : NULL;
}

const struct cn_copy_ops *cn_copy_best(void)
{
    for (int isa = CN_ISA_COUNT - 1; isa > CN_ISA_PLAIN; isa--)
        if (cn_isa_present((enum cn_isa)isa))
            return cn_copy_tables[isa];
    return &cn_ops_plain;
}

void cn_copy_in(void *dst, const void *src, size_t bytes) { cn_copy_best()->copy(dst, src, bytes); }

uint32_t cn_copy_in_crc32c(void *dst, const void *src, size_t bytes)
{
    return cn_copy_best()->copy_crc32c(0, dst, src, bytes);
}

void cn_copy_out(void *dst, const void *src, size_t bytes)
{
    cn_copy_best()->copy_out(dst, src, bytes);
}

uint32_t cn_copy_out_crc32c(void *dst, const void *src, size_t bytes)
{
    return cn_copy_best()->copy_out_crc32c(0, dst, src, bytes);
}
