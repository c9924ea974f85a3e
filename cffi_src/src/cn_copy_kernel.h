/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The body of the kernels, written once and included once per ISA (so: no include guard).
 *
 * The includer defines
 *   CN_ISA                      the name of the ISA; functions are called cn_<what>_<isa>
 *   CN_TARGET                   the attribute that lets the compiler use it, or nothing
 *   CN_FN(cached)(dst, src)     move 64 bytes
 *   CN_FN(stream)(dst, src)     move 64 bytes past the cache; dst is 64-byte aligned
 *   CN_CRC_U64(crc, word)       one step of the CRC register, also CN_CRC_U8
 *   CN_CRC_JOIN(crc, k)         crc times k times x^33 modulo P
 *   CN_STORE_FENCE()            orders streamed stores before every later store
 *
 * One loop moves and sums three stretches of a block at a time: the crc instruction has a latency
 * of three cycles and a throughput of one, and three streams keep more lines in flight than one.
 */
#define CN_INLINE static inline __attribute__((always_inline)) CN_TARGET

/* The last bytes of a buffer: fewer than a line, any alignment. */
CN_INLINE uint32_t CN_FN(rest)(uint32_t crc, char *dst, const char *src, size_t bytes, bool sum)
{
    if (bytes == 0)
        return crc;
    if (dst != NULL)
        memcpy(dst, src, bytes);
    if (!sum)
        return crc;
    for (; bytes >= 8; bytes -= 8, src += 8)
        crc = CN_CRC_U64(crc, cn_word_at(src));
    for (; bytes > 0; bytes--, src++)
        crc = CN_CRC_U8(crc, (uint8_t)*src);
    return crc;
}

CN_INLINE void CN_FN(line)(char *dst, const char *src, enum cn_store store)
{
    if (store == CN_STORE_STREAM)
        CN_FN(stream)(dst, src);
    else if (store == CN_STORE_CACHED)
        CN_FN(cached)(dst, src);
}

#define CN_SUM_WORDS(off)                                                                          \
    do {                                                                                           \
        a = CN_CRC_U64(a, cn_word_at(src + i + (off)));                                            \
        b = CN_CRC_U64(b, cn_word_at(src + n + i + (off)));                                        \
        c = CN_CRC_U64(c, cn_word_at(src + 2 * n + i + (off)));                                    \
    } while (0)

/* One block of three streams. next: what follows is a block too, so fetch its beginning. */
CN_INLINE uint32_t CN_FN(block)(uint32_t crc, char *dst, const char *src, bool next,
                                const struct cn_crc_tier *tier, bool sum, enum cn_store store)
{
    const size_t n = tier->stream_bytes;
    const size_t ahead_bytes = n < CN_AHEAD_BYTES ? n : CN_AHEAD_BYTES;
    const size_t ahead_last = next ? 2 * n + ahead_bytes : 0; /* 0: a line that is here already */
    uint32_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < n; i += CN_LINE_BYTES) {
        const char *ahead = src + i + (i < n - ahead_bytes ? ahead_bytes : ahead_last);
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + n);
        __builtin_prefetch(ahead + 2 * n);
        if (store != CN_STORE_NONE) {
            CN_FN(line)(dst + i, src + i, store);
            CN_FN(line)(dst + n + i, src + n + i, store);
            CN_FN(line)(dst + 2 * n + i, src + 2 * n + i, store);
        }
        if (sum) {
            CN_SUM_WORDS(0);
            CN_SUM_WORDS(8);
            CN_SUM_WORDS(16);
            CN_SUM_WORDS(24);
            CN_SUM_WORDS(32);
            CN_SUM_WORDS(40);
            CN_SUM_WORDS(48);
            CN_SUM_WORDS(56);
        }
    }
    return sum ? CN_CRC_JOIN(a, tier->join_two) ^ CN_CRC_JOIN(b, tier->join_one) ^ c : crc;
}
#undef CN_SUM_WORDS

/* dst is NULL and store is CN_STORE_NONE, or neither; sum and store are constants of the caller. */
CN_INLINE uint32_t CN_FN(walk)(uint32_t crc, char *dst, const char *src, size_t bytes, bool sum,
                               enum cn_store store)
{
    if (store == CN_STORE_STREAM) {
        size_t head_bytes = -(uintptr_t)dst & (CN_LINE_BYTES - 1);
        if (head_bytes > bytes)
            head_bytes = bytes;
        crc = CN_FN(rest)(crc, dst, src, head_bytes, sum);
        dst += head_bytes, src += head_bytes, bytes -= head_bytes;
    }
    for (size_t t = 0; t < CN_CRC_TIERS; t++) {
        const struct cn_crc_tier *tier = &cn_crc_tiers[t];
        const size_t block_bytes = CN_CRC_STREAMS * tier->stream_bytes;
        while (bytes >= block_bytes) {
            const bool next = bytes >= 2 * block_bytes;
            crc = CN_FN(block)(crc, dst, src, next, tier, sum, store);
            dst = cn_past(dst, block_bytes), src += block_bytes, bytes -= block_bytes;
        }
    }
    while (bytes >= CN_LINE_BYTES) {
        CN_FN(line)(dst, src, store);
        if (sum)
            crc = CN_FN(rest)(crc, NULL, src, CN_LINE_BYTES, true);
        dst = cn_past(dst, CN_LINE_BYTES), src += CN_LINE_BYTES, bytes -= CN_LINE_BYTES;
    }
    return CN_FN(rest)(crc, dst, src, bytes, sum);
}

CN_TARGET static uint32_t CN_FN(crc32c)(uint32_t crc, const void *data, size_t bytes)
{
    return ~CN_FN(walk)(~crc, NULL, data, bytes, true, CN_STORE_NONE);
}

CN_TARGET static void CN_FN(copy)(void *dst, const void *src, size_t bytes)
{
    if (bytes >= CN_COPY_NT_BYTES)
        (void)CN_FN(walk)(0, dst, src, bytes, false, CN_STORE_STREAM);
    else if (bytes > 0)
        memcpy(dst, src, bytes);
    CN_STORE_FENCE();
}

CN_TARGET static uint32_t CN_FN(copy_crc32c)(uint32_t crc, void *dst, const void *src, size_t bytes)
{
    if (bytes >= CN_COPY_NT_BYTES)
        crc = CN_FN(walk)(~crc, dst, src, bytes, true, CN_STORE_STREAM);
    else
        crc = CN_FN(walk)(~crc, dst, src, bytes, true, CN_STORE_CACHED);
    CN_STORE_FENCE();
    return ~crc;
}

CN_TARGET static void CN_FN(copy_out)(void *dst, const void *src, size_t bytes)
{
    if (bytes >= CN_COPY_OUT_NT_BYTES) {
        (void)CN_FN(walk)(0, dst, src, bytes, false, CN_STORE_STREAM);
        CN_STORE_FENCE();
    } else if (bytes >= CN_COPY_OUT_WALK_BYTES) {
        (void)CN_FN(walk)(0, dst, src, bytes, false, CN_STORE_CACHED);
    } else if (bytes > 0) {
        memcpy(dst, src, bytes);
    }
}

CN_TARGET static uint32_t CN_FN(copy_out_crc32c)(uint32_t crc, void *dst, const void *src,
                                                 size_t bytes)
{
    if (bytes < CN_COPY_OUT_NT_BYTES)
        return ~CN_FN(walk)(~crc, dst, src, bytes, true, CN_STORE_CACHED);
    crc = CN_FN(walk)(~crc, dst, src, bytes, true, CN_STORE_STREAM);
    CN_STORE_FENCE();
    return ~crc;
}

CN_TARGET static void CN_FN(stream_piece)(void *dst, const void *src, size_t bytes)
{
    (void)CN_FN(walk)(0, dst, src, bytes, false, CN_STORE_STREAM);
}

CN_TARGET static uint32_t CN_FN(stream_piece_crc32c)(uint32_t crc, void *dst, const void *src,
                                                     size_t bytes)
{
    return ~CN_FN(walk)(~crc, dst, src, bytes, true, CN_STORE_STREAM);
}

static void CN_FN(fence)(void) { CN_STORE_FENCE(); }

const struct cn_copy_ops CN_FN(ops) = {
    .name = CN_ISA_TEXT(CN_ISA),
    .crc32c = CN_FN(crc32c),
    .copy = CN_FN(copy),
    .copy_crc32c = CN_FN(copy_crc32c),
    .copy_out = CN_FN(copy_out),
    .copy_out_crc32c = CN_FN(copy_out_crc32c),
    .stream_piece = CN_FN(stream_piece),
    .stream_piece_crc32c = CN_FN(stream_piece_crc32c),
    .fence = CN_FN(fence),
};

#undef CN_INLINE
#undef CN_ISA
#undef CN_TARGET
