/* SPDX-License-Identifier: Apache-2.0 */
/* Making a catalog, and telling whether bytes are one that this build can read. */
#include <string.h>

#include "cn_api.h"
#include "cn_arena.h"
#include "cn_copy.h"
#include "cn_index.h"

#define IMMUTABLE_BYTES offsetof(struct cn_super, immutable_crc32c)

struct areas {
    uint64_t chunks_off, cold_off, index_off, slabs_off, namespaces_off, registry_off, events_off;
    uint64_t end_off;
    uint32_t chunk_count, bucket_count, event_count;
};

static uint32_t power_of_two(uint64_t at_least)
{
    uint64_t n = 1;
    while (n < at_least)
        n *= 2;
    return (uint32_t)n;
}

static uint64_t page_up(uint64_t bytes)
{
    return (bytes + CN_PAGE_BYTES - 1) / CN_PAGE_BYTES * CN_PAGE_BYTES;
}

static bool format_in_range(const struct cn_format *f)
{
    if (f->chunk_count == 0 || f->chunk_count > CN_CHUNKS_MAX)
        return false;
    if (f->lease_slots < 8 || f->lease_slots > CN_LEASE_SLOTS_MAX)
        return false;
    if (f->event_count == 0 || f->event_count > 1u << 24)
        return false;
    if (f->region_count == 0 || f->region_count > CN_REGIONS_MAX)
        return false;
    for (uint32_t i = 0; i < f->region_count; i++)
        if (f->regions[i].bytes < CN_GRANULE_BYTES || f->regions[i].bytes > 1ULL << 50)
            return false;
    return f->pool_name != NULL && f->pool_name[0] != 0 && strlen(f->pool_name) < 32;
}

static uint64_t granules_of(const struct cn_region_info *regions, uint32_t count)
{
    uint64_t granules = 0;
    for (uint32_t i = 0; i < count; i++)
        granules += regions[i].bytes / CN_GRANULE_BYTES;
    return granules;
}

static struct areas areas_of(uint32_t chunk_count, uint32_t event_count, uint64_t granules)
{
    struct areas a = {0};
    a.chunk_count = (chunk_count + 63) / 64 * 64;
    /* Two entries a descriptor: load at most 0.5, so a full bucket is rare (rationale, index). */
    a.bucket_count = power_of_two((uint64_t)a.chunk_count * 2 / CN_BUCKET_ENTRIES);
    a.event_count = power_of_two(event_count);
    a.chunks_off = CN_SUPER_BYTES;
    a.cold_off = page_up(a.chunks_off + (uint64_t)a.chunk_count * sizeof(struct cn_chunk));
    a.index_off = page_up(a.cold_off + (uint64_t)a.chunk_count * sizeof(struct cn_cold));
    a.slabs_off = page_up(a.index_off + (uint64_t)a.bucket_count * sizeof(struct cn_bucket));
    a.namespaces_off = page_up(a.slabs_off + granules * sizeof(uint64_t));
    a.registry_off = a.namespaces_off + (uint64_t)CN_NAMESPACES_MAX * sizeof(struct cn_namespace);
    a.events_off =
        page_up(a.registry_off + (uint64_t)CN_SESSIONS_MAX * sizeof(struct cn_session_entry));
    a.end_off = page_up(a.events_off + (uint64_t)a.event_count * sizeof(struct cn_event));
    return a;
}

uint64_t cn_catalog_bytes(const struct cn_format *f)
{
    if (!format_in_range(f))
        return 0;
    return areas_of(f->chunk_count, f->event_count, granules_of(f->regions, f->region_count))
        .end_off;
}

uint64_t cn_session_segment_bytes(uint32_t lease_slots) { return cn_session_bytes(lease_slots); }

int cn_catalog_format(void *catalog, uint64_t catalog_bytes, const struct cn_format *f)
{
    struct cn_super *super = catalog;
    if (!format_in_range(f) || catalog_bytes < cn_catalog_bytes(f))
        return CN_EINVAL;
    if (super->magic != 0)
        return CN_EINVAL; /* formatting always makes a new object (I5) */
    struct areas a =
        areas_of(f->chunk_count, f->event_count, granules_of(f->regions, f->region_count));
    super->layout_version = CN_LAYOUT_VERSION;
    super->endian = CN_ENDIAN;
    super->abi_fingerprint = cn_abi_fingerprint();
    memcpy(super->pool_id, f->pool_id, sizeof(super->pool_id));
    memcpy(super->hash_seed, f->hash_seed, sizeof(super->hash_seed));
    super->created_ns = f->created_ns;
    super->catalog_bytes = catalog_bytes;
    super->chunk_count = a.chunk_count;
    super->bucket_count = a.bucket_count;
    super->region_count = f->region_count;
    super->session_count = CN_SESSIONS_MAX;
    super->namespace_count = CN_NAMESPACES_MAX;
    super->event_count = a.event_count;
    super->lease_slots = f->lease_slots;
    super->session_bytes = (uint32_t)cn_session_bytes(f->lease_slots);
    super->chunks_off = a.chunks_off;
    super->cold_off = a.cold_off;
    super->index_off = a.index_off;
    super->slabs_off = a.slabs_off;
    super->namespaces_off = a.namespaces_off;
    super->registry_off = a.registry_off;
    super->events_off = a.events_off;
    strncpy(super->pool_name, f->pool_name, sizeof(super->pool_name) - 1);
    uint64_t first = 0;
    for (uint32_t i = 0; i < f->region_count; i++) {
        super->regions[i] = f->regions[i];
        super->regions[i].slabs_first = first;
        first += f->regions[i].bytes / CN_GRANULE_BYTES;
        super->capacity_bytes += f->regions[i].bytes / CN_GRANULE_BYTES * CN_GRANULE_BYTES;
    }
    super->event_head = 1;
    super->keeper_start_ns = f->keeper_start_ns;
    memcpy(super->boot_id, f->boot_id, sizeof(super->boot_id));
    super->magic = CN_MAGIC;
    super->immutable_crc32c = cn_crc32c(0, super, IMMUTABLE_BYTES);
    return CN_OK;
}

static int check_super(const struct cn_super *s, uint64_t catalog_bytes)
{
    if (s->magic != CN_MAGIC || s->endian != CN_ENDIAN)
        return CN_ECORRUPT;
    if (s->layout_version != CN_LAYOUT_VERSION || s->abi_fingerprint != cn_abi_fingerprint())
        return CN_EVERSION;
    if (s->immutable_crc32c != cn_crc32c(0, s, IMMUTABLE_BYTES))
        return CN_ECORRUPT;
    if (s->catalog_bytes > catalog_bytes || s->region_count == 0 ||
        s->region_count > CN_REGIONS_MAX || s->chunk_count == 0 || s->chunk_count > CN_CHUNKS_MAX)
        return CN_ECORRUPT;
    if (s->lease_slots > CN_LEASE_SLOTS_MAX || s->event_count == 0 || s->event_count > 1u << 24 ||
        s->session_count != CN_SESSIONS_MAX || s->namespace_count != CN_NAMESPACES_MAX)
        return CN_ECORRUPT;
    uint64_t first = 0;
    for (uint32_t i = 0; i < s->region_count; i++) {
        if (s->regions[i].bytes < CN_GRANULE_BYTES || s->regions[i].bytes > 1ULL << 50 ||
            s->regions[i].slabs_first != first)
            return CN_ECORRUPT;
        first += s->regions[i].bytes / CN_GRANULE_BYTES;
    }
    return CN_OK;
}

static int check_areas(const struct cn_super *s, uint64_t catalog_bytes)
{
    struct areas a =
        areas_of(s->chunk_count, s->event_count, granules_of(s->regions, s->region_count));
    bool same = s->chunk_count == a.chunk_count && s->bucket_count == a.bucket_count &&
                s->event_count == a.event_count && s->chunks_off == a.chunks_off &&
                s->cold_off == a.cold_off && s->index_off == a.index_off &&
                s->slabs_off == a.slabs_off && s->namespaces_off == a.namespaces_off &&
                s->registry_off == a.registry_off && s->events_off == a.events_off;
    return same && a.end_off <= catalog_bytes ? CN_OK : CN_ECORRUPT;
}

int cn_catalog_open(void *catalog, uint64_t catalog_bytes, struct cn_catalog *ret_catalog)
{
    if (catalog == NULL || catalog_bytes < CN_SUPER_BYTES)
        return CN_ECORRUPT;
    struct cn_super copy; /* one read, then checked, then used (I4) */
    memcpy(&copy, catalog, sizeof(copy));
    int status = check_super(&copy, catalog_bytes);
    if (status == CN_OK)
        status = check_areas(&copy, catalog_bytes);
    if (status != CN_OK)
        return status;
    uint8_t *base = catalog;
    *ret_catalog = (struct cn_catalog){
        .super = catalog,
        .chunks = (void *)(base + copy.chunks_off),
        .cold = (void *)(base + copy.cold_off),
        .index = (void *)(base + copy.index_off),
        .slabs = (void *)(base + copy.slabs_off),
        .namespaces = (void *)(base + copy.namespaces_off),
        .registry = (void *)(base + copy.registry_off),
        .events = (void *)(base + copy.events_off),
        .hash_seed = {copy.hash_seed[0], copy.hash_seed[1]},
        .chunk_count = copy.chunk_count,
        .bucket_mask = copy.bucket_count - 1,
        .event_mask = copy.event_count - 1,
        .lease_slots = copy.lease_slots,
    };
    return CN_OK;
}

int cn_catalog_check(const void *catalog, uint64_t catalog_bytes)
{
    struct cn_catalog ignored;
    return cn_catalog_open((void *)(uintptr_t)catalog, catalog_bytes, &ignored);
}
