/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies between caller memory and pool memory, and CRC-32C, chosen once for this CPU.
 *
 * Large copies store past the cache. A copy that may have done so ends with a store fence, so that
 * the commit record which follows a copy into the pool cannot overtake the bytes (I2).
 *
 * Source and destination never overlap. Any alignment and any length is right; with a length of 0
 * the pointers are not looked at. All functions: any thread, no state, no allocation.
 */
#ifndef CN_COPY_H
#define CN_COPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum cn_isa {
    CN_ISA_PLAIN = 0, /* memcpy and the slicing-by-8 table */
    CN_ISA_SSE42 = 1, /* SSE2 stores, crc32 and pclmulqdq */
    CN_ISA_AVX2 = 2,
    CN_ISA_AVX512 = 3,
    CN_ISA_NEON = 4, /* ARMv8 with the CRC and PMULL extensions */
    CN_ISA_COUNT = 5
};

/* From here on a copy into the pool stores past the cache; below, the next reader may well hit. */
#define CN_COPY_NT_BYTES ((size_t)32 * 1024)
/*
 * From here on so does a copy out of the pool: the caller's buffer is larger than the caches of a
 * core, and copying plus reading it back once costs no more than with cached stores.
 */
/* Below it the bytes may be cached, and there the C library is several times faster than our
 * loop. */
#define CN_COPY_OUT_WALK_BYTES ((size_t)2 * 1024 * 1024)
#define CN_COPY_OUT_NT_BYTES ((size_t)16 * 1024 * 1024)

/*
 * copy and copy_crc32c go into the pool; the four copies are fenced as said above. The two pieces
 * store past the cache whatever their length, and are not: who moves many of them calls fence once.
 */
struct cn_copy_ops {
    const char *name;
    uint32_t (*crc32c)(uint32_t crc, const void *data, size_t bytes);
    void (*copy)(void *dst, const void *src, size_t bytes);
    uint32_t (*copy_crc32c)(uint32_t crc, void *dst, const void *src, size_t bytes);
    void (*copy_out)(void *dst, const void *src, size_t bytes);
    uint32_t (*copy_out_crc32c)(uint32_t crc, void *dst, const void *src, size_t bytes);
    void (*stream_piece)(void *dst, const void *src, size_t bytes);
    uint32_t (*stream_piece_crc32c)(uint32_t crc, void *dst, const void *src, size_t bytes);
    void (*fence)(void);
};

/* The kernels of one ISA, or NULL when this CPU (or this build) lacks it. */
const struct cn_copy_ops *cn_copy_ops_of(enum cn_isa isa);

/* The fastest this CPU has. A few loads; safe from any thread. */
const struct cn_copy_ops *cn_copy_best(void);

/* CRC-32C (Castagnoli, reflected, init and xorout ~0) of data, continuing from crc (0 to begin). */
uint32_t cn_crc32c(uint32_t crc, const void *data, size_t bytes);
/* Into pool memory: non-temporal from CN_COPY_NT_BYTES on, ends with a store fence (I2). */
void cn_copy_in(void *dst, const void *src, size_t bytes);
uint32_t cn_copy_in_crc32c(void *dst, const void *src, size_t bytes);
/*
 * Out of pool memory into a caller's buffer, cached below CN_COPY_OUT_NT_BYTES. Fenced where it
 * streamed, so that another thread may be told of the bytes by an ordinary release store.
 */
void cn_copy_out(void *dst, const void *src, size_t bytes);
uint32_t cn_copy_out_crc32c(void *dst, const void *src, size_t bytes);

struct cn_pieces; /* cn_region.h */

/* May these pieces be gathered, or (skips: addresses of 0 are allowed) scattered? */
bool cn_pieces_sound(const struct cn_pieces *pieces, bool skips);
/*
 * Pieces of the caller's memory into the pool, one behind the other, and back. The length of all
 * together, not of one, decides whether they go past the cache; one fence at the end. crc is NULL,
 * or in and out.
 *
 * CN_OK, or CN_EINVAL when the arrays are not what cn_pieces_sound() saw: never a byte beyond
 * pieces->bytes, whoever writes to them meanwhile.
 */
int cn_copy_gather(const struct cn_copy_ops *ops, void *dst, const struct cn_pieces *pieces,
                   uint32_t *crc);
int cn_copy_scatter(const struct cn_copy_ops *ops, const struct cn_pieces *pieces, const void *src,
                    uint32_t *crc);

#endif
