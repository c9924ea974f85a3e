/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A hostile superblock: cn_catalog_check() refuses it, or every look-up in it stays inside the
 * mapping (I4). The first byte of an input says whether its CRC is made right, so that checks
 * behind it are reached; the next eight are XORed into the catalog's length; patches of the
 * superblock follow: offset:16, value:64.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cn_api.h"
#include "cn_index.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static uint8_t *catalog;
static uint64_t catalog_bytes;
static struct cn_super good;

/* The mapping ends at an unmapped page: one step too far is a fault, not a lucky read. */
static void make_catalog(void)
{
    struct cn_format f = {.pool_name = "fuzz",
                          .chunk_count = 64,
                          .lease_slots = 512,
                          .event_count = 64,
                          .region_count = 1};
    f.regions[0].bytes = 4u << 20;
    catalog_bytes = cn_catalog_bytes(&f);
    uint64_t pages = (catalog_bytes + 4095) / 4096 * 4096;
    uint8_t *map =
        mmap(NULL, pages + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map + pages, 4096, PROT_NONE) != 0)
        abort();
    catalog = map + (pages - catalog_bytes) / 64 * 64;
    if (cn_catalog_format(catalog, catalog_bytes, &f) != CN_OK ||
        cn_catalog_check(catalog, catalog_bytes) != CN_OK)
        abort();
    memcpy(&good, catalog, sizeof(good));
}

static void look_around(void)
{
    struct cn_chunk chunk;
    struct cn_cold cold;
    struct cn_event events[8];
    uint8_t key[CN_KEY_BYTES] = {1};
    uint64_t sequence = 0;
    uint64_t lost;
    uint32_t count;
    uint32_t d;
    cn_find(catalog, 1, key, &d);
    cn_chunk_read(catalog, 0, &chunk, &cold);
    cn_chunk_read(catalog, UINT32_MAX, &chunk, &cold);
    cn_events_read(catalog, &sequence, 8, events, &count, &lost);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (catalog == NULL)
        make_catalog();
    if (bytes < 9)
        return 0;
    uint64_t length_noise;
    memcpy(&length_noise, data + 1, 8);
    memcpy(catalog, &good, sizeof(good));
    for (size_t at = 9; at + 10 <= bytes; at += 10) {
        uint16_t off;
        memcpy(&off, data + at, 2);
        memcpy(catalog + off % (sizeof(good) - 8), data + at + 2, 8);
    }
    struct cn_super *super = (struct cn_super *)catalog;
    if ((data[0] & 1) != 0)
        super->immutable_crc32c = cn_crc32c(0, super, offsetof(struct cn_super, immutable_crc32c));
    if ((data[0] & 2) != 0)
        cn_catalog_check(catalog, catalog_bytes < length_noise ? catalog_bytes : length_noise);
    if (cn_catalog_check(catalog, catalog_bytes) == CN_OK)
        look_around();
    return 0;
}
