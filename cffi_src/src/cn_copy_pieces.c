/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many pieces of the caller's memory, one behind the other in the pool.
 *
 * An engine's pages are short (4 to 64 KiB) and many. A fence waits for every store before it, and
 * short copies are cached: copied one by one into the pool, they would do both once a page.
 */
#include <stdbool.h>
#include <stdint.h>

#include "cn_atomic.h"
#include "cn_copy.h"
#include "cn_region.h"
#include "cn_status.h"

/* Shorter pieces are mostly beginnings and ends of lines, which cannot be streamed. */
#define CN_PIECE_STREAM_BYTES 512u
/* How much of the next piece is fetched beforehand: the CPU does not guess where it is. */
#define CN_PIECE_HEAD_BYTES 2048u
#define CN_LINE_BYTES 64u

struct cn_piece {
    uint64_t addr;
    uint64_t bytes;
};

/*
 * Piece i, when left bytes are left for it and what follows. Read once, for its arrays may change
 * at any time: an engine's other threads see them.
 */
static bool cn_piece_at(const struct cn_pieces *pieces, uint64_t i, uint64_t left,
                        struct cn_piece *ret_piece)
{
    ret_piece->addr = cn_load_relaxed(&pieces->addresses[i]);
    ret_piece->bytes = cn_load_relaxed(&pieces->lengths[i]);
    return ret_piece->bytes <= left && ret_piece->addr <= UINTPTR_MAX - ret_piece->bytes;
}

int cn_pieces_bytes(const uint64_t *lengths, uint64_t count, uint64_t *ret_bytes)
{
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t piece_bytes = cn_load_relaxed(&lengths[i]);
        if (piece_bytes > (uint64_t)PTRDIFF_MAX - bytes)
            return CN_EINVAL;
        bytes += piece_bytes;
    }
    *ret_bytes = bytes;
    return CN_OK;
}

bool cn_pieces_sound(const struct cn_pieces *pieces, bool skips)
{
    uint64_t left = pieces->bytes;
    struct cn_piece piece;
    if (left > (uint64_t)PTRDIFF_MAX)
        return false;
    for (uint64_t i = 0; i < pieces->count; i++) {
        if (!cn_piece_at(pieces, i, left, &piece) || (piece.addr == 0 && !skips))
            return false;
        left -= piece.bytes;
    }
    return left == 0;
}

/* The beginning of piece i as a source: at its own address, or at src where that is not 0. To fetch
 * from a wrong address does nothing; whoever moves the piece looks at it. */
static void cn_piece_fetch(const struct cn_pieces *pieces, uint64_t i, uintptr_t src)
{
    if (i >= pieces->count)
        return;
    const uintptr_t from = src != 0 ? src : (uintptr_t)cn_load_relaxed(&pieces->addresses[i]);
    const uint64_t bytes = cn_load_relaxed(&pieces->lengths[i]);
    for (uintptr_t off = 0; off < CN_PIECE_HEAD_BYTES && off < bytes; off += CN_LINE_BYTES)
        __builtin_prefetch((const void *)(from + off));
}

/* One piece, either way; returns the CRC as it is after it. */
static uint32_t cn_piece_move(const struct cn_copy_ops *ops, bool stream, bool sum, uint32_t crc,
                              void *dst, const void *src, size_t bytes)
{
    if (stream && bytes >= CN_PIECE_STREAM_BYTES) {
        if (sum)
            return ops->stream_piece_crc32c(crc, dst, src, bytes);
        ops->stream_piece(dst, src, bytes);
        return crc;
    }
    if (sum)
        return ops->copy_out_crc32c(crc, dst, src, bytes);
    ops->copy_out(dst, src, bytes);
    return crc;
}

int cn_copy_gather(const struct cn_copy_ops *ops, void *dst, const struct cn_pieces *pieces,
                   uint32_t *crc)
{
    const bool stream = pieces->bytes >= CN_COPY_NT_BYTES;
    const bool sum = crc != NULL;
    uint32_t reached = sum ? *crc : 0;
    uint64_t left = pieces->bytes;
    char *to = dst;
    struct cn_piece piece;
    for (uint64_t i = 0; i < pieces->count; i++) {
        if (!cn_piece_at(pieces, i, left, &piece) || piece.addr == 0)
            break;
        cn_piece_fetch(pieces, i + 1, 0);
        reached = cn_piece_move(ops, stream, sum, reached, to, (const void *)(uintptr_t)piece.addr,
                                (size_t)piece.bytes);
        to += piece.bytes, left -= piece.bytes;
    }
    ops->fence();
    if (left != 0)
        return CN_EINVAL;
    if (sum)
        *crc = reached;
    return CN_OK;
}

int cn_copy_scatter(const struct cn_copy_ops *ops, const struct cn_pieces *pieces, const void *src,
                    uint32_t *crc)
{
    const bool stream = pieces->bytes >= CN_COPY_OUT_NT_BYTES;
    const bool sum = crc != NULL;
    uint32_t reached = sum ? *crc : 0;
    uint64_t left = pieces->bytes;
    const char *from = src;
    struct cn_piece piece;
    for (uint64_t i = 0; i < pieces->count; i++) {
        if (!cn_piece_at(pieces, i, left, &piece))
            break;
        cn_piece_fetch(pieces, i + 1, (uintptr_t)from + piece.bytes);
        if (piece.addr != 0)
            reached = cn_piece_move(ops, stream, sum, reached, (void *)(uintptr_t)piece.addr, from,
                                    (size_t)piece.bytes);
        else if (sum)
            reached = ops->crc32c(reached, from, (size_t)piece.bytes);
        from += piece.bytes, left -= piece.bytes;
    }
    if (stream)
        ops->fence();
    if (left != 0)
        return CN_EINVAL;
    if (sum)
        *crc = reached;
    return CN_OK;
}
