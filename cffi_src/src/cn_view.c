/* SPDX-License-Identifier: Apache-2.0 */
/* What a leased chunk offers besides its bytes. */
#include "cn_client.h"
#include "cn_region.h"

int cn_view_meta(const struct cn_client *c, const struct cn_view *view, const void **ret_meta,
                 uint32_t *ret_bytes)
{
    uint32_t d = cn_ref_d(view->ref);
    if (d >= c->catalog.chunk_count)
        return CN_EINVAL;
    *ret_meta = NULL;
    *ret_bytes = 0;
    if ((view->flags & CN_CF_META) == 0)
        return CN_OK;
    const struct cn_cold *cold = &c->catalog.cold[d];
    uint64_t meta_off = (view->bytes + CN_CACHELINE - 1) / CN_CACHELINE * CN_CACHELINE;
    uint32_t bytes = cold->meta_bytes;
    if (bytes > CN_META_BYTES_MAX || meta_off + bytes > (uint64_t)cold->extent_pages * 4096)
        return CN_ECORRUPT;
    uint32_t region = cn_place_region(cn_load_relaxed(&c->catalog.chunks[d].place));
    uint64_t off = cn_load_relaxed(&c->catalog.chunks[d].data_off);
    if (region >= c->region_count || off + meta_off + bytes > c->ro[region].bytes)
        return CN_ECORRUPT;
    *ret_meta = (const uint8_t *)view->data + meta_off;
    *ret_bytes = bytes;
    return CN_OK;
}

int cn_view_crc32c(const struct cn_client *c, const struct cn_view *view, uint32_t *ret_crc)
{
    uint32_t d = cn_ref_d(view->ref);
    if (d >= c->catalog.chunk_count)
        return CN_EINVAL;
    const struct cn_chunk *chunk = &c->catalog.chunks[d];
    if ((cn_word_flags(cn_load_acquire(&chunk->word)) & CN_CF_CRC) == 0)
        return CN_EMISS;
    *ret_crc = (uint32_t)(cn_load_relaxed(&chunk->size_crc) >> 32);
    return CN_OK;
}

int cn_view_verify(const struct cn_client *c, const struct cn_view *view)
{
    uint32_t recorded;
    uint32_t crc;
    int status = cn_view_crc32c(c, view, &recorded);
    if (status != CN_OK)
        return status;
    if (cn_guarded_crc32c(0, view->data, view->bytes, &crc) != CN_OK)
        return CN_ELOST;
    return crc == recorded ? CN_OK : CN_ELOST;
}

int cn_view_admit(struct cn_client *c, const struct cn_view *view)
{
    uint32_t d = cn_ref_d(view->ref);
    if (d >= c->catalog.chunk_count)
        return CN_EINVAL;
    if (cn_load32_relaxed(&c->checked[d]) == cn_ref_gen(view->ref))
        return CN_OK;
    if (cn_view_verify(c, view) == CN_ELOST) {
        cn_release(c, view->slot);
        cn_store_relaxed(&c->head->misses, cn_load_relaxed(&c->head->misses) + 1);
        return CN_EMISS;
    }
    cn_store32_relaxed(&c->checked[d], cn_ref_gen(view->ref));
    return CN_OK;
}
