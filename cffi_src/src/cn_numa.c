/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cn_region.h"
#include "cn_status.h"

/* From the kernel's ABI; libnuma, which has them, is no dependency of ours. */
#define CN_MPOL_F_NODE 1ul
#define CN_MPOL_F_ADDR 2ul

static long cn_sys_get_mempolicy(int *mode, const void *addr, unsigned long flags)
{
#ifdef SYS_get_mempolicy
    return syscall(SYS_get_mempolicy, mode, NULL, 0ul, addr, flags);
#else
    (void)mode, (void)addr, (void)flags;
    errno = ENOSYS;
    return -1;
#endif
}

int cn_numa_node_of_with(const struct cn_numa_ops *ops, const void *addr, int32_t *ret_node,
                         int32_t *ret_known, struct cn_syserr *reterr_sys)
{
    int node = 0;
    bool known = ops->get_mempolicy(&node, addr, CN_MPOL_F_NODE | CN_MPOL_F_ADDR) == 0;

    /* EPERM: the default seccomp filter of container engines. */
    if (!known && errno != ENOSYS && errno != EPERM) {
        reterr_sys->err = errno;
        reterr_sys->where = CN_AT_GET_MEMPOLICY;
        return CN_ESYS;
    }
    *ret_node = known ? node : 0;
    *ret_known = known;
    return CN_OK;
}

int cn_numa_node_of(const void *addr, int32_t *ret_node, int32_t *ret_known,
                    struct cn_syserr *reterr_sys)
{
    static const struct cn_numa_ops kernel = {.get_mempolicy = cn_sys_get_mempolicy};
    return cn_numa_node_of_with(&kernel, addr, ret_node, ret_known, reterr_sys);
}
