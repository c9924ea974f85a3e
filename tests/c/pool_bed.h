/* SPDX-License-Identifier: Apache-2.0 */
/* A whole pool in one process: memfds, a keeper stepped by hand or running, attached clients. */
#ifndef CN_TEST_POOL_BED_H
#define CN_TEST_POOL_BED_H

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "cn_api.h"
#include "cn_arena.h"
#include "cn_client.h"
#include "cn_keeper.h"

struct bed {
    struct cn_format format;
    struct cn_keeper *keeper;
    void *catalog;
    void *region;
    uint64_t catalog_bytes;
    int catalog_fd;
    int region_fd;
    uint32_t ns;
};

static inline int bed_object(uint64_t bytes, void **ret_map)
{
    int fd = memfd_create("cenote-test", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    *ret_map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(*ret_map != MAP_FAILED);
    return fd;
}

static inline struct cn_keeper_config bed_config(const char *policy)
{
    return (struct cn_keeper_config){
        .high_water = 0.9, .low_water = 0.9, .policy = policy, .spin_us = 20};
}

/* One region of region_bytes; chunk_count descriptors. */
static inline struct bed bed_open(uint64_t region_bytes, uint32_t chunk_count, uint32_t lease_slots,
                                  const char *policy)
{
    struct bed bed = {.format = {.pool_name = "test",
                                 .pool_id = {1, 2, 3},
                                 .hash_seed = {0x1234, 0x5678},
                                 .chunk_count = chunk_count,
                                 .lease_slots = lease_slots,
                                 .event_count = 1024,
                                 .region_count = 1}};
    bed.format.regions[0].bytes = region_bytes;
    bed.catalog_bytes = cn_catalog_bytes(&bed.format);
    CHECK(bed.catalog_bytes > 0);
    bed.catalog_fd = bed_object(bed.catalog_bytes, &bed.catalog);
    bed.region_fd = bed_object(region_bytes, &bed.region);
    CHECK_EQ(cn_catalog_format(bed.catalog, bed.catalog_bytes, &bed.format), CN_OK);
    struct cn_keeper_config config = bed_config(policy);
    CHECK_EQ(cn_keeper_create(bed.catalog, bed.catalog_bytes, &bed.region, &config, &bed.keeper),
             CN_OK);
    return bed;
}

struct bed_session {
    struct cn_client *client;
    uint32_t session;
    uint64_t nonce;
    void *segment;
};

static inline struct bed_session bed_attach(struct bed *bed, uint32_t role)
{
    struct bed_session s;
    uint64_t bytes = cn_session_segment_bytes(bed->format.lease_slots);
    int fd = bed_object(bytes, &s.segment);
    int doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct cn_session_open open = {.segment = s.segment,
                                   .segment_bytes = bytes,
                                   .liveness_fd = -1,
                                   .doorbell_fd = dup(doorbell),
                                   .pidfd = -1,
                                   .role = role,
                                   .lease_limit_bytes = UINT64_MAX,
                                   .label = "bed"};
    CHECK_EQ(cn_keeper_session_open(bed->keeper, &open), CN_OK);
    struct cn_attach attach = {.catalog_fd = bed->catalog_fd,
                               .session_fd = fd,
                               .doorbell_fd = doorbell,
                               .region_count = 1,
                               .region_ro_fd = {bed->region_fd},
                               .region_rw_fd = {role >= CN_ROLE_WRITER ? bed->region_fd : -1},
                               .catalog_bytes = bed->catalog_bytes};
    int err;
    CHECK_EQ(cn_client_attach(&attach, &s.client, &err), CN_OK);
    close(fd);
    close(doorbell);
    s.session = open.ret_session;
    s.nonce = open.ret_nonce;
    static const uint8_t manifest[] = {0x80};
    struct cn_namespace_open ns = {.id = {7},
                                   .name = "",
                                   .manifest = manifest,
                                   .manifest_bytes = 1,
                                   .session = s.session,
                                   .session_nonce = s.nonce};
    CHECK_EQ(cn_keeper_namespace_open(bed->keeper, &ns), CN_OK);
    bed->ns = ns.ret_slot;
    return s;
}

/* The process is gone: its mapping and its session. */
static inline void bed_kill(struct bed *bed, struct bed_session *s)
{
    cn_client_detach(s->client);
    CHECK_EQ(cn_keeper_session_hint(bed->keeper, s->session, s->nonce), CN_OK);
    cn_keeper_step(bed->keeper);
    munmap(s->segment, cn_session_segment_bytes(bed->format.lease_slots));
}

static inline void bed_settle(struct bed *bed)
{
    while (cn_keeper_step(bed->keeper) > 0)
        ;
}

static inline void bed_audit(struct bed *bed)
{
    uint64_t wrong;
    CHECK_EQ(cn_keeper_audit(bed->keeper, &wrong), CN_OK);
    CHECK_EQ(wrong, 0);
}

static inline void bed_close(struct bed *bed)
{
    cn_keeper_destroy(bed->keeper);
    munmap(bed->catalog, bed->catalog_bytes);
    munmap(bed->region, bed->format.regions[0].bytes);
    close(bed->catalog_fd);
    close(bed->region_fd);
}

struct bed_key {
    uint8_t bytes[CN_KEY_BYTES];
};

static inline struct bed_key bed_key(uint64_t n)
{
    struct bed_key key;
    uint64_t x = n + 1;
    for (uint32_t i = 0; i < 4; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        uint64_t word = x * 0x2545f4914f6cdd1dULL;
        memcpy(key.bytes + 8 * i, &word, 8);
    }
    return key;
}

/* What chunk n holds at byte i. */
static inline uint8_t bed_byte(uint64_t n, uint64_t i)
{
    return (uint8_t)(n * 31 + i * 7 + (i >> 8));
}

/* Reserve (stepping the keeper by hand if it has no thread), fill and commit. */
static inline int bed_put(struct bed *bed, struct cn_client *c, uint64_t n, uint64_t bytes,
                          const struct bed_key *parent)
{
    struct cn_grant grant;
    int status = CN_EFULL;
    for (int i = 0; i < 3 && status != CN_OK; i++) {
        if (!bed->keeper->running)
            bed_settle(bed);
        status = cn_reserve(c, bytes, 0, 0, &grant);
        if (!bed->keeper->running)
            bed_settle(bed);
    }
    if (status != CN_OK)
        return status;
    for (uint64_t i = 0; i < bytes; i++)
        ((uint8_t *)grant.data)[i] = bed_byte(n, i);
    struct bed_key key = bed_key(n);
    struct cn_put put = {.ref = grant.ref,
                         .key = key.bytes,
                         .parent_key = parent == NULL ? NULL : parent->bytes,
                         .data_bytes = bytes,
                         .ns_slot = bed->ns,
                         .position = CN_POSITION_UNKNOWN,
                         .crc32c = cn_crc32c(0, grant.data, bytes),
                         .flags = CN_RF_CRC};
    return cn_commit(c, &put, 0);
}

static inline void bed_check_bytes(const struct cn_view *view, uint64_t n)
{
    for (uint64_t i = 0; i < view->bytes; i++)
        CHECK_EQ(((const uint8_t *)view->data)[i], bed_byte(n, i));
}

#endif
