/* SPDX-License-Identifier: Apache-2.0 */
/* Real objects to map, and children that may die of what they do to them. */
#ifndef CN_TEST_CHECK_REGION_H
#define CN_TEST_CHECK_REGION_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "cn_region.h"
#include "cn_status.h"

#define MIB (1024u * 1024)
#define OBJECT_BYTES (8u * MIB)
#define EXIT_HANDLED 42 /* a child: the handler that was there before ours ran */

static struct cn_syserr sys;

static inline int object_new(uint64_t bytes)
{
    int fd = memfd_create("cn-test", MFD_CLOEXEC);
    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, (off_t)bytes), 0);
    return fd;
}

static inline char *object_map(int fd, uint64_t bytes, uint32_t flags)
{
    void *addr = NULL;
    CHECK_EQ(cn_region_map(fd, bytes, flags, &addr, &sys), CN_OK);
    return addr;
}

static inline void object_unmap(void *addr, uint64_t bytes)
{
    CHECK_EQ(cn_region_unmap(addr, bytes, &sys), CN_OK);
}

/* Run body in a child. Returns its exit status, or the signal that killed it as a negative. */
static inline int in_child(void (*body)(void))
{
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        body();
        _exit(0);
    }
    int status = 0;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

#if defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

/* A sanitizer reports a deadly signal by an exit status of its own. */
static inline bool died_of(int result, int sig)
{
    return result == -sig || (SANITIZED && result > 0 && result != EXIT_HANDLED);
}

#endif
