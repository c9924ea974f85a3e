/* SPDX-License-Identifier: Apache-2.0 */
#ifndef CN_STATUS_H
#define CN_STATUS_H
/* cffi:begin */
/* 0 or negative; never mixed with counts. cn_status_text() gives the one-line meaning. */
enum cn_status {
    CN_OK = 0,
    CN_EMISS = -1,     /* no such chunk: absent, evicted, or not trusted (I3) */
    CN_EFULL = -2,     /* no free extent, and none within the wait */
    CN_ETOOBIG = -3,   /* can never fit: larger than the region or than 1 GiB */
    CN_EINVAL = -4,    /* the caller's argument is wrong */
    CN_ECORRUPT = -5,  /* shared memory holds nonsense; nothing was done */
    CN_EFORKED = -6,   /* a forked child used its parent's session (I13) */
    CN_ECLOSED = -7,   /* the pool handle is closed, or the pool is retired */
    CN_ELEASES = -8,   /* lease table or leased-bytes limit reached */
    CN_ERING = -9,     /* submission ring full within the wait */
    CN_ETIME = -10,    /* the deadline passed */
    CN_ESYS = -11,     /* a system call failed; errno is beside it */
    CN_EVERSION = -12, /* another layout version or ABI fingerprint */
    CN_EACCES = -13,   /* the session's role does not allow it */
    CN_ELIMIT = -14,   /* a named limit is reached (I10) */
    CN_ELOST = -15,    /* the bytes are gone: SIGBUS in a guarded copy, or a bad checksum */
    CN_ENOMEM = -16    /* private memory is short */
};
const char *cn_status_text(int status);
/* cffi:end */
#endif
