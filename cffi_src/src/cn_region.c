/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#endif
#include "cn_region.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <ucontext.h>
#include <unistd.h>

#include "cn_atomic.h"
#include "cn_copy.h"
#include "cn_status.h"

#define CN_ALIGN_BYTES ((size_t)2 << 20) /* so that huge pages of either kind can serve us */
#define CN_HUGETLBFS_MAGIC 0x958458f6ul
#define CN_MADV_POPULATE_WRITE 23 /* Linux 5.14; older headers lack the name */

static int cn_sys_fail(struct cn_syserr *reterr_sys, enum cn_where where)
{
    reterr_sys->err = errno;
    reterr_sys->where = where;
    return CN_ESYS;
}

const char *cn_where_text(uint32_t where)
{
    static const char *const texts[] = {
        [CN_AT_NOTHING] = "",
        [CN_AT_FSTAT] = "fstat",
        [CN_AT_MMAP] = "mmap",
        [CN_AT_DONTFORK] = "madvise(MADV_DONTFORK)",
        [CN_AT_MUNMAP] = "munmap",
        [CN_AT_POPULATE] = "madvise(MADV_POPULATE_WRITE)",
        [CN_AT_SIGACTION] = "sigaction",
        [CN_AT_GET_MEMPOLICY] = "get_mempolicy",
    };
    return where < sizeof(texts) / sizeof(texts[0]) ? texts[where] : "";
}

/* ---- mapping -------------------------------------------------------------- */

/* May the first bytes of fd be mapped? Another process made the object, so it is looked at (I4). */
static int cn_region_check(int fd, uint64_t bytes, bool *ret_hugetlb, struct cn_syserr *reterr_sys)
{
    struct stat st;
    struct statfs fs;
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);

    if (fstat(fd, &st) != 0 || fstatfs(fd, &fs) != 0)
        return cn_sys_fail(reterr_sys, CN_AT_FSTAT);
    bool device = S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode);
    if (!device && !S_ISREG(st.st_mode))
        return CN_EINVAL;
    bool hugetlb = !device && (unsigned long)fs.f_type == CN_HUGETLBFS_MAGIC;
    if (hugetlb)
        page_bytes = (uint64_t)fs.f_bsize;
    if (bytes == 0 || bytes % page_bytes != 0 || bytes > (uint64_t)PTRDIFF_MAX)
        return CN_EINVAL;
    if (!device && (uint64_t)st.st_size < bytes)
        return CN_ECORRUPT;
    *ret_hugetlb = hugetlb;
    return CN_OK;
}

/* mmap at a 2 MiB boundary: over a reservation of our own, so that nobody can be there. */
static void *cn_map_aligned(int fd, size_t bytes, int prot)
{
    size_t span_bytes = bytes + CN_ALIGN_BYTES;
    char *span =
        mmap(NULL, span_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (span == MAP_FAILED) /* address space is short: alignment is a wish */
        return mmap(NULL, bytes, prot, MAP_SHARED, fd, 0);

    size_t head_bytes = (CN_ALIGN_BYTES - (uintptr_t)span % CN_ALIGN_BYTES) % CN_ALIGN_BYTES;
    char *addr = span + head_bytes;
    if (mmap(addr, bytes, prot, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        int err = errno;
        munmap(span, span_bytes);
        errno = err;
        return MAP_FAILED;
    }
    if (head_bytes > 0)
        munmap(span, head_bytes);
    munmap(addr + bytes, CN_ALIGN_BYTES - head_bytes);
    return addr;
}

int cn_region_map(int fd, uint64_t bytes, uint32_t flags, void **ret_addr,
                  struct cn_syserr *reterr_sys)
{
    bool hugetlb = false;
    int rc = cn_region_check(fd, bytes, &hugetlb, reterr_sys);
    if (rc != CN_OK)
        return rc;

    int prot = (flags & CN_MAP_WRITABLE) != 0 ? PROT_READ | PROT_WRITE : PROT_READ;
    /* The kernel itself aligns hugetlb mappings to their page. */
    void *addr = bytes < CN_ALIGN_BYTES || hugetlb
                     ? mmap(NULL, (size_t)bytes, prot, MAP_SHARED, fd, 0)
                     : cn_map_aligned(fd, (size_t)bytes, prot);
    if (addr == MAP_FAILED)
        return cn_sys_fail(reterr_sys, CN_AT_MMAP);
    if (madvise(addr, (size_t)bytes, MADV_DONTFORK) != 0) {
        rc = cn_sys_fail(reterr_sys, CN_AT_DONTFORK);
        munmap(addr, (size_t)bytes);
        return rc;
    }
    if ((flags & CN_MAP_HUGE) != 0 && !hugetlb)
        (void)madvise(addr, (size_t)bytes, MADV_HUGEPAGE);
    *ret_addr = addr;
    return CN_OK;
}

int cn_region_unmap(void *addr, uint64_t bytes, struct cn_syserr *reterr_sys)
{
    if (munmap(addr, (size_t)bytes) != 0)
        return cn_sys_fail(reterr_sys, CN_AT_MUNMAP);
    return CN_OK;
}

/* ---- the SIGBUS guard ----------------------------------------------------- */

struct cn_span {
    uintptr_t begin;
    uintptr_t end;
};

struct cn_guard {
    sigjmp_buf jump;
    struct cn_span dst; /* empty when the caller's own */
    struct cn_span src;
};

/*
 * The one exception to "no globals": a signal handler belongs to the process, and finds its
 * thread's guard without an argument. Initial-exec, so that the handler's first look allocates
 * nothing.
 */
#if defined(__GLIBC__)
#define CN_TLS_MODEL __attribute__((tls_model("initial-exec")))
#else
#define CN_TLS_MODEL
#endif
static _Thread_local struct cn_guard *cn_guard_current CN_TLS_MODEL;
static struct sigaction cn_guard_previous;
static pthread_once_t cn_guard_once = PTHREAD_ONCE_INIT;
static int cn_guard_errno;

static bool cn_span_holds(const struct cn_span *span, uintptr_t addr, uintptr_t slack_bytes)
{
    return span->begin < span->end && addr < span->end && addr >= span->begin - slack_bytes;
}

static bool cn_guard_owns(const struct cn_guard *guard, const siginfo_t *info)
{
    uintptr_t addr = (uintptr_t)info->si_addr;
    uintptr_t slack_bytes = 0;

    if (guard == NULL || info->si_code <= 0) /* <= 0: sent by a process, not a fault */
        return false;
#ifdef BUS_MCEERR_AR
    /* A poisoned page is reported by its beginning, which may lie before our first byte. */
    if (info->si_code == BUS_MCEERR_AR && info->si_addr_lsb > 0 && info->si_addr_lsb < 40)
        slack_bytes = ((uintptr_t)1 << info->si_addr_lsb) - 1;
#endif
    return cn_span_holds(&guard->dst, addr, slack_bytes) ||
           cn_span_holds(&guard->src, addr, slack_bytes);
}

/* Not ours: do what would have happened without us. */
static void cn_guard_chain(int sig, siginfo_t *info, void *context)
{
    const struct sigaction *previous = &cn_guard_previous;

    if ((previous->sa_flags & SA_SIGINFO) != 0) {
        previous->sa_sigaction(sig, info, context);
        return;
    }
    bool sent = info->si_code <= 0;
    if (previous->sa_handler == SIG_IGN && sent)
        return;
    if (previous->sa_handler != SIG_DFL && previous->sa_handler != SIG_IGN) {
        previous->sa_handler(sig);
        return;
    }
    struct sigaction fallback = {.sa_handler = SIG_DFL};
    sigaction(sig, &fallback, NULL);
    if (sent)
        (void)raise(sig);
    /* else the instruction faults again when we return, so that the core shows it. */
}

static void cn_guard_on_sigbus(int sig, siginfo_t *info, void *context)
{
    int err = errno;
    struct cn_guard *guard = cn_guard_current;

    if (cn_guard_owns(guard, info)) {
        /* The mask of the faulting code, put back here: sigsetjmp() would save it in advance, which
         * costs every copy a system call. */
        const ucontext_t *interrupted = context;
        pthread_sigmask(SIG_SETMASK, &interrupted->uc_sigmask, NULL);
        siglongjmp(guard->jump, 1);
    }
    cn_guard_chain(sig, info, context);
    errno = err;
}

static void cn_guard_install_once(void)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK};
    action.sa_sigaction = cn_guard_on_sigbus;
    (void)sigemptyset(&action.sa_mask);

    if (sigaction(SIGBUS, NULL, &cn_guard_previous) != 0 || sigaction(SIGBUS, &action, NULL) != 0)
        cn_guard_errno = errno;
}

int cn_guard_install(struct cn_syserr *reterr_sys)
{
    int err = pthread_once(&cn_guard_once, cn_guard_install_once);
    errno = err != 0 ? err : cn_guard_errno;
    return errno != 0 ? cn_sys_fail(reterr_sys, CN_AT_SIGACTION) : CN_OK;
}

enum cn_guarded_kind {
    CN_GUARDED_OUT,
    CN_GUARDED_OUT_CRC,
    CN_GUARDED_IN,
    CN_GUARDED_IN_CRC,
    CN_GUARDED_CRC,
    CN_GUARDED_GATHER,
    CN_GUARDED_SCATTER,
    CN_GUARDED_TOUCH
};

struct cn_guarded_op {
    enum cn_guarded_kind kind;
    bool dst_in_pool;
    bool src_in_pool;
    void *dst;
    const void *src;
    size_t bytes;
    uint32_t crc; /* in and out */
    const struct cn_pieces *pieces;
    bool sum;   /* of the pieces */
    int status; /* of the pieces */
};

/* A write to each page that changes nothing, also beside other writers. */
static void cn_touch_pages(void *addr, size_t bytes)
{
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);

    for (size_t off = 0; off < bytes; off += page_bytes) {
        uint64_t *word = (uint64_t *)((char *)addr + off);
        uint64_t value = cn_load_relaxed(word);
        (void)cn_cas(word, &value, value);
    }
}

static void cn_guarded_act(struct cn_guarded_op *op)
{
    switch (op->kind) {
    case CN_GUARDED_OUT:
        cn_copy_out(op->dst, op->src, op->bytes);
        return;
    case CN_GUARDED_OUT_CRC:
        op->crc = cn_copy_out_crc32c(op->dst, op->src, op->bytes);
        return;
    case CN_GUARDED_IN:
        cn_copy_in(op->dst, op->src, op->bytes);
        return;
    case CN_GUARDED_IN_CRC:
        op->crc = cn_copy_in_crc32c(op->dst, op->src, op->bytes);
        return;
    case CN_GUARDED_CRC:
        op->crc = cn_crc32c(op->crc, op->src, op->bytes);
        return;
    case CN_GUARDED_GATHER:
        op->status = cn_copy_gather(cn_copy_best(), op->dst, op->pieces, op->sum ? &op->crc : NULL);
        return;
    case CN_GUARDED_SCATTER:
        op->status =
            cn_copy_scatter(cn_copy_best(), op->pieces, op->src, op->sum ? &op->crc : NULL);
        return;
    case CN_GUARDED_TOUCH:
        cn_touch_pages(op->dst, op->bytes);
        return;
    }
}

static struct cn_span cn_span_of(const void *addr, size_t bytes, bool in_pool)
{
    struct cn_span span = {(uintptr_t)addr, in_pool ? (uintptr_t)addr + bytes : (uintptr_t)addr};
    return span;
}

static int cn_guarded_run(struct cn_guarded_op *op)
{
    struct cn_guard guard;
    guard.dst = cn_span_of(op->dst, op->bytes, op->dst_in_pool);
    guard.src = cn_span_of(op->src, op->bytes, op->src_in_pool);

    if (sigsetjmp(guard.jump, 0) != 0) {
        cn_guard_current = NULL; /* guarded operations never nest */
        return CN_ELOST;
    }
    cn_guard_current = &guard;
    __asm__("" ::: "memory"); /* the handler of this very thread must see the guard */
    cn_guarded_act(op);
    __asm__("" ::: "memory");
    cn_guard_current = NULL;
    return CN_OK;
}

int cn_guarded_copy_out(void *dst, const void *src, uint64_t bytes)
{
    struct cn_guarded_op op = {
        .kind = CN_GUARDED_OUT, .src_in_pool = true, .dst = dst, .src = src, .bytes = bytes};
    return cn_guarded_run(&op);
}

int cn_guarded_copy_in(void *dst, const void *src, uint64_t bytes)
{
    struct cn_guarded_op op = {
        .kind = CN_GUARDED_IN, .dst_in_pool = true, .dst = dst, .src = src, .bytes = bytes};
    return cn_guarded_run(&op);
}

int cn_guarded_move(void *dst, const void *src, uint64_t bytes)
{
    struct cn_guarded_op op = {.kind = CN_GUARDED_IN,
                               .dst_in_pool = true,
                               .src_in_pool = true,
                               .dst = dst,
                               .src = src,
                               .bytes = bytes};
    return cn_guarded_run(&op);
}

static int cn_guarded_crc_run(struct cn_guarded_op *op, uint32_t *ret_crc)
{
    int rc = cn_guarded_run(op);
    if (rc == CN_OK)
        *ret_crc = op->crc;
    return rc;
}

int cn_guarded_copy_out_crc32c(void *dst, const void *src, uint64_t bytes, uint32_t *ret_crc)
{
    struct cn_guarded_op op = {
        .kind = CN_GUARDED_OUT_CRC, .src_in_pool = true, .dst = dst, .src = src, .bytes = bytes};
    return cn_guarded_crc_run(&op, ret_crc);
}

int cn_guarded_copy_in_crc32c(void *dst, const void *src, uint64_t bytes, uint32_t *ret_crc)
{
    struct cn_guarded_op op = {
        .kind = CN_GUARDED_IN_CRC, .dst_in_pool = true, .dst = dst, .src = src, .bytes = bytes};
    return cn_guarded_crc_run(&op, ret_crc);
}

int cn_guarded_crc32c(uint32_t crc, const void *src, uint64_t bytes, uint32_t *ret_crc)
{
    struct cn_guarded_op op = {
        .kind = CN_GUARDED_CRC, .src_in_pool = true, .src = src, .bytes = bytes, .crc = crc};
    return cn_guarded_crc_run(&op, ret_crc);
}

static int cn_guarded_pieces_run(struct cn_guarded_op *op, uint32_t *crc)
{
    if (!cn_pieces_sound(op->pieces, op->kind == CN_GUARDED_SCATTER))
        return CN_EINVAL;
    op->bytes = op->pieces->bytes;
    op->sum = crc != NULL;
    op->crc = crc != NULL ? *crc : 0;
    int rc = cn_guarded_run(op);
    if (rc == CN_OK)
        rc = op->status;
    if (rc == CN_OK && crc != NULL)
        *crc = op->crc;
    return rc;
}

int cn_guarded_gather(void *dst, const struct cn_pieces *pieces, uint32_t *crc)
{
    struct cn_guarded_op op = {
        .kind = CN_GUARDED_GATHER, .dst_in_pool = true, .dst = dst, .pieces = pieces};
    return cn_guarded_pieces_run(&op, crc);
}

int cn_guarded_scatter(const struct cn_pieces *pieces, const void *src, uint32_t *crc)
{
    struct cn_guarded_op op = {
        .kind = CN_GUARDED_SCATTER, .src_in_pool = true, .src = src, .pieces = pieces};
    return cn_guarded_pieces_run(&op, crc);
}

/* ---- pre-touch ------------------------------------------------------------ */

/* Kernels before 5.14, and sandboxes: one write a page, faults turned into the kernel's EFAULT. */
static int cn_populate_by_hand(void *addr, size_t bytes, struct cn_syserr *reterr_sys)
{
    struct cn_guarded_op op = {
        .kind = CN_GUARDED_TOUCH, .dst_in_pool = true, .dst = addr, .bytes = bytes};

    int rc = cn_guard_install(reterr_sys);
    if (rc != CN_OK)
        return rc;
    if (cn_guarded_run(&op) == CN_OK)
        return CN_OK;
    errno = EFAULT;
    return cn_sys_fail(reterr_sys, CN_AT_POPULATE);
}

int cn_region_populate_with(const struct cn_region_ops *ops, void *addr, uint64_t bytes,
                            struct cn_syserr *reterr_sys)
{
    if ((uintptr_t)addr % (uintptr_t)sysconf(_SC_PAGESIZE) != 0)
        return CN_EINVAL;
    if (bytes == 0 || ops->madvise(addr, (size_t)bytes, CN_MADV_POPULATE_WRITE) == 0)
        return CN_OK;
    if (errno != EINVAL)
        return cn_sys_fail(reterr_sys, CN_AT_POPULATE);
    /* EINVAL: the kernel lacks it, or it is a read-only mapping, which a touch by hand would
     * kill. */
    if (ops->madvise(addr, 0, CN_MADV_POPULATE_WRITE) == 0) {
        errno = EINVAL;
        return cn_sys_fail(reterr_sys, CN_AT_POPULATE);
    }
    return cn_populate_by_hand(addr, (size_t)bytes, reterr_sys);
}

int cn_region_populate(void *addr, uint64_t bytes, struct cn_syserr *reterr_sys)
{
    static const struct cn_region_ops kernel = {.madvise = madvise};
    return cn_region_populate_with(&kernel, addr, bytes, reterr_sys);
}
