/* SPDX-License-Identifier: Apache-2.0 */
#include "cn_status.h"

const char *cn_status_text(int status)
{
    switch (status) {
    case CN_OK:
        return "done";
    case CN_EMISS:
        return "no such chunk";
    case CN_EFULL:
        return "no free extent within the wait";
    case CN_ETOOBIG:
        return "larger than the region or than 1 GiB";
    case CN_EINVAL:
        return "invalid argument";
    case CN_ECORRUPT:
        return "shared memory holds nonsense";
    case CN_EFORKED:
        return "the session belongs to the parent process";
    case CN_ECLOSED:
        return "the pool is closed or retired";
    case CN_ELEASES:
        return "lease table or leased-bytes limit reached";
    case CN_ERING:
        return "submission ring full within the wait";
    case CN_ETIME:
        return "deadline passed";
    case CN_ESYS:
        return "system call failed";
    case CN_EVERSION:
        return "another layout version or ABI fingerprint";
    case CN_EACCES:
        return "the role of this session does not allow it";
    case CN_ELIMIT:
        return "a limit is reached";
    case CN_ELOST:
        return "the bytes are gone or do not match their checksum";
    case CN_ENOMEM:
        return "private memory is short";
    default:
        return "unknown status";
    }
}
