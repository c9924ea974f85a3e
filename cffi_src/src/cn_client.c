/* SPDX-License-Identifier: Apache-2.0 */
/* Attach and detach: mapping what the daemon sent, checking all of it before any use (I4). */
#include "cn_client.h"
#include "cn_arena.h"
#include "cn_region.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

static int sys_error(int *ret_errno)
{
    *ret_errno = errno;
    return CN_ESYS;
}

/* All of fd, DONTFORK: a child has neither the mapping nor the liveness lock (I13). */
static int map_object(int fd, uint64_t bytes, bool writable, struct cn_mapping *ret_map,
                      int *ret_errno)
{
    struct cn_syserr error = {0};
    void *base;
    int status = cn_region_map(fd, bytes, writable ? CN_MAP_WRITABLE : 0, &base, &error);
    if (status != CN_OK) {
        *ret_errno = error.err;
        return status;
    }
    *ret_map = (struct cn_mapping){base, bytes};
    return CN_OK;
}

static void unmap(struct cn_mapping *map)
{
    if (map->base != NULL)
        munmap(map->base, map->bytes);
    map->base = NULL;
}

static int make_mark(struct cn_client *c, int *ret_errno)
{
    uint64_t *mark =
        mmap(NULL, CN_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mark == MAP_FAILED)
        return sys_error(ret_errno);
    c->mark = mark;
    *mark = CN_MARK_OPEN;
    return madvise(mark, CN_PAGE_BYTES, MADV_WIPEONFORK) == 0 ? CN_OK : sys_error(ret_errno);
}

static int open_session(struct cn_client *c, int fd, int *ret_errno)
{
    uint64_t bytes = cn_session_bytes(c->catalog.lease_slots);
    int status = map_object(fd, bytes, true, &c->session_map, ret_errno);
    if (status != CN_OK)
        return status;
    struct cn_session_head *head = (void *)c->session_map.base;
    if (head->magic != CN_SESSION_MAGIC || head->lease_slots != c->catalog.lease_slots)
        return CN_ECORRUPT;
    if (head->layout_version != CN_LAYOUT_VERSION)
        return CN_EVERSION;
    c->head = head;
    c->lease_slots = head->lease_slots;
    c->session_idx = head->session_idx;
    c->role = head->role;
    c->lease_limit_bytes = head->lease_limit_bytes;
    c->limited = c->lease_limit_bytes < c->catalog.super->capacity_bytes;
    c->stock = (void *)(c->session_map.base + cn_session_stock_off());
    c->leases = (void *)(c->session_map.base + cn_session_leases_off());
    c->sub = (void *)(c->session_map.base + cn_session_sub_off(c->lease_slots));
    c->comp = (void *)(c->session_map.base + cn_session_comp_off(c->lease_slots));
    c->access_log = (void *)(c->session_map.base + cn_session_access_off(c->lease_slots));
    return CN_OK;
}

static int open_regions(struct cn_client *c, const struct cn_attach *a, int *ret_errno)
{
    const struct cn_super *super = c->catalog.super;
    if (a->region_count != super->region_count || a->region_count > CN_REGIONS_MAX)
        return CN_ECORRUPT;
    c->region_count = a->region_count;
    for (uint32_t i = 0; i < a->region_count; i++) {
        uint64_t bytes = super->regions[i].bytes;
        if (bytes > c->largest_bytes)
            c->largest_bytes = bytes;
        int status = map_object(a->region_ro_fd[i], bytes, false, &c->ro[i], ret_errno);
        if (status == CN_OK && a->region_rw_fd[i] >= 0)
            status = map_object(a->region_rw_fd[i], bytes, true, &c->rw[i], ret_errno);
        if (status != CN_OK)
            return status;
    }
    return CN_OK;
}

static int open_private(struct cn_client *c, int doorbell_fd, int *ret_errno)
{
    c->slot_next = calloc(c->lease_slots, sizeof(*c->slot_next));
    c->slot_bytes = calloc(c->lease_slots, sizeof(*c->slot_bytes));
    /* fresh mappings: what is never touched, as after a clean start, costs no memory */
    c->checked = calloc(c->catalog.chunk_count, sizeof(*c->checked));
    if (c->slot_next == NULL || c->slot_bytes == NULL || c->checked == NULL)
        return CN_ENOMEM;
    cn_slots_init(c);
    int fd = fcntl(doorbell_fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0 || cn_doorbell_take(c, fd) != CN_OK)
        return sys_error(ret_errno);
    return CN_OK;
}

static int attach(struct cn_client *c, const struct cn_attach *a, int *ret_errno)
{
    int status = map_object(a->catalog_fd, a->catalog_bytes, false, &c->catalog_map, ret_errno);
    if (status == CN_OK)
        status = cn_catalog_open(c->catalog_map.base, a->catalog_bytes, &c->catalog);
    if (status == CN_OK)
        status = make_mark(c, ret_errno);
    if (status == CN_OK)
        status = open_session(c, a->session_fd, ret_errno);
    if (status == CN_OK)
        status = open_regions(c, a, ret_errno);
    if (status == CN_OK)
        status = open_private(c, a->doorbell_fd, ret_errno);
    return status;
}

int cn_client_attach(const struct cn_attach *a, struct cn_client **ret_client, int *ret_errno)
{
    struct cn_client *c = aligned_alloc(CN_CACHELINE, sizeof(*c));
    if (c == NULL)
        return CN_ENOMEM;
    memset(c, 0, sizeof(*c));
    c->doorbell_fd = -1;
    c->next_cookie = 1;
    pthread_mutex_init(&c->sub_lock, NULL);
    pthread_mutex_init(&c->op_lock, NULL);
    *ret_errno = 0;
    int status = attach(c, a, ret_errno);
    if (status != CN_OK) {
        cn_client_detach(c);
        return status;
    }
    *ret_client = c;
    return CN_OK;
}

void cn_client_detach(struct cn_client *c)
{
    /* In a forked child the shared mappings are not there and their addresses may be someone
     * else's by now; the private memory may still be in use by nobody we know: leave it all. */
    if (c->mark != NULL && cn_is_forked(c))
        return;
    for (uint32_t i = 0; i < CN_REGIONS_MAX; i++) {
        unmap(&c->ro[i]);
        unmap(&c->rw[i]);
    }
    unmap(&c->session_map); /* with the last mapping goes the liveness lock (I6) */
    unmap(&c->catalog_map);
    if (c->mark != NULL)
        munmap(c->mark, CN_PAGE_BYTES);
    if (cn_doorbell_is_ours(c))
        close(c->doorbell_fd);
    free(c->slot_next);
    free(c->slot_bytes);
    free(c->checked);
    pthread_mutex_destroy(&c->sub_lock);
    pthread_mutex_destroy(&c->op_lock);
    free(c);
}

void cn_client_close(struct cn_client *c)
{
    if (cn_is_forked(c))
        return; /* the session is not mapped here (I13) */
    cn_store_release(c->mark, CN_MARK_CLOSED);
    cn_wake_waiters(c);
}

bool cn_client_rings(struct cn_client *c) { return cn_is_forked(c) || cn_doorbell_is_ours(c); }

bool cn_client_forked(const struct cn_client *c) { return cn_is_forked(c); }

int cn_client_region(const struct cn_client *c, uint32_t region, bool writable, void **ret_base,
                     uint64_t *ret_bytes)
{
    if (cn_is_forked(c))
        return CN_EFORKED; /* what is at that address here is not ours (I13) */
    if (region >= c->region_count)
        return CN_EINVAL;
    const struct cn_mapping *map = writable ? &c->rw[region] : &c->ro[region];
    *ret_base = map->base;
    *ret_bytes = map->bytes;
    return map->base != NULL ? CN_OK : CN_EMISS;
}

const void *cn_client_catalog(const struct cn_client *c) { return c->catalog_map.base; }

const void *cn_client_session(const struct cn_client *c) { return c->session_map.base; }

uint64_t cn_client_boot_token(const struct cn_client *c)
{
    return cn_is_forked(c) ? 0 : cn_load_acquire(&c->catalog.super->boot_token);
}

uint32_t cn_client_leases(const struct cn_client *c)
{
    uint32_t leases = 0;
    if (cn_is_forked(c))
        return 0;
    for (uint32_t slot = 0; slot < c->lease_slots; slot++)
        leases += cn_load_relaxed(&c->leases[slot]) != 0;
    return leases;
}
