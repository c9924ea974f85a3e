/* SPDX-License-Identifier: Apache-2.0 */
/* The SIGBUS guard: our own copies report lost bytes, everybody else's faults stay what they
 * were. */
#include <pthread.h>

#include "check_region.h"
#include "cn_copy.h"

/* A mapping whose second half is gone. */
static char *half_lost_object(void)
{
    int fd = object_new(OBJECT_BYTES);
    char *addr = object_map(fd, OBJECT_BYTES, CN_MAP_WRITABLE);
    memset(addr, 'x', OBJECT_BYTES);
    CHECK_EQ(ftruncate(fd, OBJECT_BYTES / 2), 0);
    close(fd);
    return addr;
}

static void fault_in_a_raw_view(void)
{
    char *addr = half_lost_object();
    char byte = addr[OBJECT_BYTES - 1];
    __asm__("" ::"r"(byte));
}

static void raw_fault_under_the_guard(void)
{
    CHECK_EQ(cn_guard_install(&sys), CN_OK);
    fault_in_a_raw_view();
}

static void exit_from_siginfo_handler(int sig, siginfo_t *info, void *context)
{
    (void)context;
    _exit(sig == SIGBUS && info->si_addr != NULL ? EXIT_HANDLED : TEST_FAIL);
}

static void exit_from_plain_handler(int sig) { _exit(sig == SIGBUS ? EXIT_HANDLED : TEST_FAIL); }

static void raw_fault_with_a_siginfo_handler_before_us(void)
{
    struct sigaction before = {.sa_flags = SA_SIGINFO};
    before.sa_sigaction = exit_from_siginfo_handler;
    sigaction(SIGBUS, &before, NULL);
    raw_fault_under_the_guard();
}

static void raw_fault_with_a_plain_handler_before_us(void)
{
    signal(SIGBUS, exit_from_plain_handler);
    raw_fault_under_the_guard();
}

static void raw_fault_while_ignored(void)
{
    signal(SIGBUS, SIG_IGN);
    raw_fault_under_the_guard();
}

static void sent_while_ignored(void)
{
    signal(SIGBUS, SIG_IGN);
    CHECK_EQ(cn_guard_install(&sys), CN_OK);
    raise(SIGBUS);
    _exit(EXIT_HANDLED);
}

static void sent_by_default(void)
{
    signal(SIGBUS, SIG_DFL);
    CHECK_EQ(cn_guard_install(&sys), CN_OK);
    raise(SIGBUS);
}

static void fault_in_the_callers_buffer(void)
{
    static char source[64];
    CHECK_EQ(cn_guard_install(&sys), CN_OK);
    char *buffer = half_lost_object();
    (void)cn_guarded_copy_out(buffer + OBJECT_BYTES - 64, source, sizeof(source));
}

static void what_is_not_ours_keeps_its_action(void)
{
    CHECK(died_of(in_child(raw_fault_under_the_guard), SIGBUS));
    CHECK(died_of(in_child(raw_fault_while_ignored), SIGBUS));
    CHECK(died_of(in_child(fault_in_the_callers_buffer), SIGBUS));
    CHECK(died_of(in_child(sent_by_default), SIGBUS));
    CHECK_EQ(in_child(sent_while_ignored), EXIT_HANDLED);
    CHECK_EQ(in_child(raw_fault_with_a_siginfo_handler_before_us), EXIT_HANDLED);
    CHECK_EQ(in_child(raw_fault_with_a_plain_handler_before_us), EXIT_HANDLED);
}

static void guarded_calls_do_their_work(void)
{
    enum { BYTES = 3 * MIB + 17 };
    int fd = object_new(OBJECT_BYTES);
    char *pool = object_map(fd, OBJECT_BYTES, CN_MAP_WRITABLE);
    char *source = malloc(BYTES), *back = malloc(BYTES);
    CHECK(source != NULL && back != NULL);
    for (uint32_t i = 0; i < BYTES; i++)
        source[i] = (char)(i * 2654435761u >> 24);
    const uint32_t want = cn_crc32c(0, source, BYTES);
    uint32_t crc = 0;

    CHECK_EQ(cn_guarded_copy_in_crc32c(pool, source, BYTES, &crc), CN_OK);
    CHECK_EQ(crc, want);
    CHECK_EQ(cn_guarded_crc32c(0, pool, BYTES, &crc), CN_OK);
    CHECK_EQ(crc, want);
    CHECK_EQ(cn_guarded_copy_out(back, pool, BYTES), CN_OK);
    CHECK_MEM_EQ(back, source, BYTES);
    CHECK_EQ(cn_guarded_move(pool + 4 * MIB, pool, BYTES), CN_OK);
    crc = 0;
    CHECK_EQ(cn_guarded_copy_out_crc32c(back, pool + 4 * MIB, BYTES, &crc), CN_OK);
    CHECK_EQ(crc, want);
    CHECK_MEM_EQ(back, source, BYTES);
    CHECK_EQ(cn_guarded_copy_in(pool, back + 1, 100), CN_OK);
    CHECK_MEM_EQ(pool, source + 1, 100);
    CHECK_EQ(cn_guarded_copy_out(back, pool, 0), CN_OK);
    free(source), free(back);
    object_unmap(pool, OBJECT_BYTES);
    close(fd);
}

static void *lose_bytes_many_times(void *arg)
{
    char *pool = half_lost_object(), *buffer = calloc(1, OBJECT_BYTES);
    CHECK(buffer != NULL);
    (void)arg;
    for (int i = 0; i < 20; i++) {
        uint32_t crc = 1234;
        CHECK_EQ(cn_guarded_copy_out(buffer, pool + OBJECT_BYTES / 2 - MIB, 2 * MIB), CN_ELOST);
        CHECK_EQ(cn_guarded_copy_out_crc32c(buffer, pool, OBJECT_BYTES, &crc), CN_ELOST);
        CHECK_EQ(cn_guarded_crc32c(0, pool, OBJECT_BYTES, &crc), CN_ELOST);
        CHECK_EQ(cn_guarded_copy_in(pool + OBJECT_BYTES - 64, buffer, 64), CN_ELOST);
        CHECK_EQ(cn_guarded_copy_in_crc32c(pool + OBJECT_BYTES / 2, buffer, MIB, &crc), CN_ELOST);
        CHECK_EQ(cn_guarded_move(pool, pool + OBJECT_BYTES / 2, MIB), CN_ELOST);
        CHECK_EQ(cn_guarded_move(pool + OBJECT_BYTES / 2, pool, MIB), CN_ELOST);
        CHECK_EQ(crc, 1234);
        /* and what is still there is still right */
        CHECK_EQ(cn_guarded_crc32c(0, pool + MIB, MIB, &crc), CN_OK);
    }
    free(buffer);
    object_unmap(pool, OBJECT_BYTES);
    return NULL;
}

static void lost_bytes_are_reported_in_every_thread(void)
{
    pthread_t threads[4];
    sigset_t before, after;

    sigprocmask(SIG_SETMASK, NULL, &before);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, lose_bytes_many_times, NULL), 0);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
    lose_bytes_many_times(NULL);
    sigprocmask(SIG_SETMASK, NULL, &after);

    CHECK_EQ(sigismember(&before, SIGBUS), sigismember(&after, SIGBUS));
}

static void the_guard_works_on_an_alternate_stack(void)
{
    static char stack_memory[256 * 1024];
    stack_t stack = {.ss_sp = stack_memory, .ss_size = sizeof(stack_memory)};
    stack_t off = {.ss_flags = SS_DISABLE};
    CHECK_EQ(sigaltstack(&stack, NULL), 0);

    lose_bytes_many_times(NULL);

    CHECK_EQ(sigaltstack(&off, NULL), 0);
}

int main(void)
{
    RUN(what_is_not_ours_keeps_its_action); /* in children: before anything installs the guard */
    RUN(guarded_calls_do_their_work);       /* as plain copies */
    CHECK_EQ(cn_guard_install(&sys), CN_OK);
    CHECK_EQ(cn_guard_install(&sys), CN_OK);
    RUN(guarded_calls_do_their_work);
    RUN(lost_bytes_are_reported_in_every_thread);
    RUN(the_guard_works_on_an_alternate_stack);
    return TEST_PASS;
}
