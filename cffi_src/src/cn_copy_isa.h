/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernels of every ISA share with each other and with the choice between them.
 */
#ifndef CN_COPY_ISA_H
#define CN_COPY_ISA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cn_copy.h"
#include "cn_crc32c.h"

#if defined(__x86_64__)
extern const struct cn_copy_ops cn_ops_sse42;
extern const struct cn_copy_ops cn_ops_avx2;
extern const struct cn_copy_ops cn_ops_avx512;
#elif defined(__aarch64__)
extern const struct cn_copy_ops cn_ops_neon;
#endif

/* True when this CPU, and the operating system for its wide registers, has the ISA. */
bool cn_isa_present(enum cn_isa isa);

/* Two steps each, so that CN_ISA is replaced before it is pasted or quoted. */
#define CN_FN_PASTE(name, isa) cn_##name##_##isa
#define CN_FN_OF(name, isa) CN_FN_PASTE(name, isa)
#define CN_FN(name) CN_FN_OF(name, CN_ISA)
#define CN_TEXT_QUOTE(text) #text
#define CN_ISA_TEXT(isa) CN_TEXT_QUOTE(isa)

#define CN_LINE_BYTES 64u
/* How far ahead each of the three streams is prefetched. */
#define CN_AHEAD_BYTES 2048u

enum cn_store {
    CN_STORE_NONE,   /* sum only */
    CN_STORE_CACHED, /* the destination is read again soon */
    CN_STORE_STREAM  /* the destination goes past the cache */
};

/* NULL, the destination of a sum, stays where it is. */
static inline char *cn_past(char *dst, size_t bytes) { return dst == NULL ? NULL : dst + bytes; }

static inline uint64_t cn_word_at(const char *p)
{
    uint64_t w;
    memcpy(&w, p, sizeof(w));
    return w;
}

#endif
