/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mappings: how does a process get at the bytes of an object, where are they, and what happens when
 * they are gone?
 *
 * Everything here is process-private. Sizes are bytes; a region is a whole number of its pages.
 */
#ifndef CN_REGION_H
#define CN_REGION_H

#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
/* What a system call said, beside CN_ESYS: its errno and which call it was (enum cn_where). */
struct cn_syserr {
    int32_t err;
    uint32_t where;
};

enum cn_where {
    CN_AT_NOTHING = 0,
    CN_AT_FSTAT = 1,
    CN_AT_MMAP = 2,
    CN_AT_DONTFORK = 3,
    CN_AT_MUNMAP = 4,
    CN_AT_POPULATE = 5,
    CN_AT_SIGACTION = 6,
    CN_AT_GET_MEMPOLICY = 7
};

/* The system call that a where names, for messages; "" for one that is unknown. */
const char *cn_where_text(uint32_t where);

enum cn_map_flag {
    CN_MAP_WRITABLE = 1, /* PROT_READ | PROT_WRITE; without it PROT_READ */
    CN_MAP_HUGE = 2      /* ask for transparent huge pages; refusal is no error */
};

/*
 * Map the first bytes of the object behind fd, shared, at an address aligned to 2 MiB when bytes
 * is at least that. The mapping is MADV_DONTFORK (I13); fd may be closed afterwards.
 *
 * CN_OK, CN_EINVAL (bytes is 0, no multiple of the object's page, or fd is no file or device),
 * CN_ECORRUPT (the object is shorter than bytes: reading it would fault), CN_ESYS.
 */
int cn_region_map(int fd, uint64_t bytes, uint32_t flags, void **ret_addr,
                  struct cn_syserr *reterr_sys);

/* Undo cn_region_map(). CN_OK or CN_ESYS. */
int cn_region_unmap(void *addr, uint64_t bytes, struct cn_syserr *reterr_sys);

/*
 * Give every page of a writable mapping its memory now; contents stay as they are. addr is
 * page-aligned. Any number of threads may populate one mapping, others may use it meanwhile.
 *
 * CN_OK, CN_EINVAL (misaligned), or CN_ESYS with ENOMEM (no memory), EFAULT (the object ends
 * before, its file system or the huge pages are full), EHWPOISON. Never a SIGBUS, except where the
 * kernel is older than 5.14 and another handler took the place of the guard.
 */
int cn_region_populate(void *addr, uint64_t bytes, struct cn_syserr *reterr_sys);

/*
 * Install the process-wide SIGBUS handler that turns a fault inside the cn_guarded_* calls below
 * into CN_ELOST. Any other fault, one in a raw view above all, goes to the handler that was there
 * before, or takes its default action. Once in a process; more calls change nothing.
 */
int cn_guard_install(struct cn_syserr *reterr_sys);

/*
 * Copies and checksums over pool memory that may vanish (a truncated file, a poisoned page).
 * "in" guards dst, "out" and "crc32c" guard src, "move" guards both; the caller's own buffer is
 * never guarded. CN_OK, or CN_ELOST: dst then holds a part of the bytes, *ret_crc nothing new.
 * Before cn_guard_install() they are plain copies. Any thread; long calls.
 */
int cn_guarded_copy_out(void *dst, const void *src, uint64_t bytes);
int cn_guarded_copy_out_crc32c(void *dst, const void *src, uint64_t bytes, uint32_t *ret_crc);
int cn_guarded_copy_in(void *dst, const void *src, uint64_t bytes);
int cn_guarded_copy_in_crc32c(void *dst, const void *src, uint64_t bytes, uint32_t *ret_crc);
int cn_guarded_move(void *dst, const void *src, uint64_t bytes);
int cn_guarded_crc32c(uint32_t crc, const void *src, uint64_t bytes, uint32_t *ret_crc);

/* Pieces of the caller's memory that lie one behind the other in the pool. */
struct cn_pieces {
    const uint64_t *addresses;
    const uint64_t *lengths;
    uint64_t count;
    uint64_t bytes; /* of all together: cn_pieces_bytes() */
};

/* The sum of all lengths. CN_OK, or CN_EINVAL: larger than any memory. */
int cn_pieces_bytes(const uint64_t *lengths, uint64_t count, uint64_t *ret_bytes);

/*
 * Many pieces in one call: gather copies them to dst, scatter brings them back from src. Guarded
 * like the above: dst of gather, src of scatter. Kernels are chosen and stores are fenced once.
 *
 * crc is NULL, or the CRC-32C of what stands before these bytes (0 at the beginning), which becomes
 * that of both together: several calls, in order, make that of a whole. In scatter an address of 0
 * is a piece that nobody wants: it is skipped, and counts in the CRC all the same.
 *
 * CN_OK, CN_ELOST, or CN_EINVAL: the lengths do not have pieces->bytes together, or gather has an
 * address of 0, or a piece wraps around; *crc stays as it was. Another thread that writes to the
 * arrays meanwhile spoils the bytes, and makes nothing of the pool beyond pieces->bytes change.
 */
int cn_guarded_gather(void *dst, const struct cn_pieces *pieces, uint32_t *crc);
int cn_guarded_scatter(const struct cn_pieces *pieces, const void *src, uint32_t *crc);

/*
 * The NUMA node that holds the page at addr; a page that has no memory yet gets it by this call.
 *
 * CN_OK with *ret_known = 1, or with node 0 and *ret_known = 0 where the kernel has no answer
 * (built without NUMA, or the system call is forbidden, as in containers). CN_ESYS: EFAULT, not
 * mapped.
 */
int cn_numa_node_of(const void *addr, int32_t *ret_node, int32_t *ret_known,
                    struct cn_syserr *reterr_sys);
/* cffi:end */

/* The system calls behind the above, replaced by tests. */
struct cn_region_ops {
    int (*madvise)(void *addr, size_t bytes, int advice);
};
int cn_region_populate_with(const struct cn_region_ops *ops, void *addr, uint64_t bytes,
                            struct cn_syserr *reterr_sys);

struct cn_numa_ops {
    long (*get_mempolicy)(int *mode, const void *addr, unsigned long flags);
};
int cn_numa_node_of_with(const struct cn_numa_ops *ops, const void *addr, int32_t *ret_node,
                         int32_t *ret_known, struct cn_syserr *reterr_sys);

#endif
