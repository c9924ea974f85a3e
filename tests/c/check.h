/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a C test needs: checks that name their place, and three exit codes.
 *
 * A test is one program: main() runs its functions and returns TEST_PASS, a failed check ends it
 * with TEST_FAIL, and what this machine cannot run returns TEST_SKIP after saying why.
 */
#ifndef CN_TEST_CHECK_H
#define CN_TEST_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEST_PASS = 0, TEST_FAIL = 1, TEST_SKIP = 77 };

/* The condition, or the end of the test; the rest is a printf format that says which case. */
#define CHECK_MSG(condition, ...)                                                                  \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s: CHECK(%s): ", __FILE__, __LINE__, __func__, #condition);   \
            fprintf(stderr, __VA_ARGS__);                                                          \
            fputc('\n', stderr);                                                                   \
            exit(TEST_FAIL);                                                                       \
        }                                                                                          \
    } while (0)

#define CHECK(condition) CHECK_MSG(condition, "does not hold")

/* Integers of any type; both are printed. */
#define CHECK_EQ(left, right)                                                                      \
    do {                                                                                           \
        const long long check_left = (long long)(left), check_right = (long long)(right);          \
        CHECK_MSG(check_left == check_right, "%s = %lld (0x%llx), %s = %lld (0x%llx)", #left,      \
                  check_left, (unsigned long long)check_left, #right, check_right,                 \
                  (unsigned long long)check_right);                                                \
    } while (0)

#define CHECK_MEM_EQ(left, right, bytes) CHECK(memcmp((left), (right), (bytes)) == 0)

/* A test function of main(): its name is printed first, so that a crash says where. */
#define RUN(function)                                                                              \
    do {                                                                                           \
        printf("  %s\n", #function);                                                               \
        fflush(stdout);                                                                            \
        function();                                                                                \
    } while (0)

#define SKIP(...)                                                                                  \
    do {                                                                                           \
        printf("skipped: ");                                                                       \
        printf(__VA_ARGS__);                                                                       \
        putchar('\n');                                                                             \
        exit(TEST_SKIP);                                                                           \
    } while (0)

#endif
