/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every copy kernel moves exactly the bytes it is told to, sums them, and is fenced before a flag.
 */
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "cn_atomic.h"
#include "cn_copy.h"
#include "cn_crc32c.h"

enum { ROOM_BYTES = 20 << 20, GUARD_BYTES = 128, GUARD = 0xa5, FILL = 0x3c };

/* ThreadSanitizer watches every byte: a sample of the alignments tells it as much. */
#ifdef __SANITIZE_THREAD__
enum { ALIGNMENT_STEP = 9 };
#else
enum { ALIGNMENT_STEP = 1 };
#endif

static unsigned char *source, *target; /* ROOM_BYTES each, page aligned */
static const struct cn_copy_ops *ops;  /* the ISA under test */

/* Plain, summed; into the pool, out of it. */
enum kernel { COPY_IN, COPY_IN_CRC, COPY_OUT, COPY_OUT_CRC, KERNELS };

static void rooms_make(void)
{
    uint64_t x = 0x2545f4914f6cdd1du;
    source = aligned_alloc(4096, ROOM_BYTES);
    target = aligned_alloc(4096, ROOM_BYTES);
    CHECK(source != NULL && target != NULL);
    for (size_t i = 0; i < ROOM_BYTES; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        source[i] = (unsigned char)(x >> 32);
    }
}

/* Returns the CRC that the kernel made, or want where it makes none. */
static uint32_t kernel_run(enum kernel kernel, void *dst, const void *src, size_t bytes,
                           uint32_t want)
{
    switch (kernel) {
    case COPY_IN_CRC:
        return ops->copy_crc32c(0, dst, src, bytes);
    case COPY_OUT_CRC:
        return ops->copy_out_crc32c(0, dst, src, bytes);
    case COPY_IN:
        ops->copy(dst, src, bytes);
        break;
    default:
        ops->copy_out(dst, src, bytes);
    }
    return want;
}

/* All bytes are equal if the first is right and each equals the one before it. */
static bool filled(const unsigned char *p, int byte, size_t bytes)
{
    return p[0] == byte && memcmp(p, p + 1, bytes - 1) == 0;
}

/* One copy between guards: all bytes, no byte more, and the right sum. */
static void copy_check(size_t dst_at, size_t src_at, size_t bytes)
{
    unsigned char *dst = target + GUARD_BYTES + dst_at;
    const unsigned char *src = source + src_at;
    const uint32_t want = cn_crc32c_table(0, src, bytes);
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        memset(dst - GUARD_BYTES, GUARD, GUARD_BYTES);
        memset(dst, FILL, bytes);
        memset(dst + bytes, GUARD, GUARD_BYTES);
        const uint32_t crc = kernel_run((enum kernel)kernel, dst, src, bytes, want);
        CHECK_MSG(memcmp(dst, src, bytes) == 0 && crc == want &&
                      filled(dst - GUARD_BYTES, GUARD, GUARD_BYTES) &&
                      filled(dst + bytes, GUARD, GUARD_BYTES),
                  "%s: kernel %d, dst at %zu, src at %zu, %zu bytes: crc 0x%08x, not 0x%08x",
                  ops->name, kernel, dst_at, src_at, bytes, crc, want);
    }
}

static void test_short_lengths_at_every_alignment(void)
{
    for (size_t bytes = 0; bytes <= 1024; bytes++)
        copy_check(bytes * 7 % 64, bytes * 5 % 64, bytes);
    for (size_t at = 0; at < 64 * 64; at += ALIGNMENT_STEP)
        copy_check(at % 64, at / 64, 64 + at % 131);
}

/* The streaming kernels align their destination first: every alignment, and around each edge. */
static void test_streamed_lengths_at_every_alignment(void)
{
    for (size_t at = 0; at < 64; at += ALIGNMENT_STEP) {
        copy_check(at, 0, CN_COPY_NT_BYTES);
        copy_check(at, 64 - at, CN_COPY_NT_BYTES + at);
        copy_check(at, at * 3 % 64, CN_COPY_NT_BYTES + 12288 + 3072 + 768 + 63 - at);
    }
    for (size_t off = 0; off < 6; off++)
        copy_check(off, 1, CN_COPY_NT_BYTES - 3 + off);
}

static void test_large_copies(void)
{
    static const size_t bytes[] = {1 << 20, (1 << 20) + 77, CN_COPY_OUT_NT_BYTES - 1,
                                   CN_COPY_OUT_NT_BYTES + 4097};
    for (size_t i = 0; i < sizeof(bytes) / sizeof(bytes[0]); i++) {
        copy_check(13, 1, bytes[i]);
    }
}

static void test_null_of_no_length_is_not_looked_at(void)
{
    for (int kernel = 0; kernel < KERNELS; kernel++)
        CHECK_EQ(kernel_run((enum kernel)kernel, NULL, NULL, 0, 0), 0);
}

static void test_crc_goes_on_from_the_one_before(void)
{
    const size_t cut = 100003, bytes = 300007;
    const uint32_t whole = cn_crc32c_table(0, source, bytes);
    uint32_t crc = ops->copy_crc32c(0, target, source, cut);
    CHECK_EQ(ops->copy_crc32c(crc, target + cut, source + cut, bytes - cut), whole);
    crc = ops->copy_out_crc32c(0, target, source, cut);
    CHECK_EQ(ops->copy_out_crc32c(crc, target + cut, source + cut, bytes - cut), whole);
}

/* A page that must not be touched follows both buffers: no kernel reads or writes past its end. */
static void test_nothing_past_the_end_is_touched(void)
{
    const size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE), room_bytes = 32 * page_bytes;
    unsigned char *map[2];
    for (int i = 0; i < 2; i++) {
        map[i] = mmap(NULL, room_bytes + page_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(map[i] != MAP_FAILED);
        CHECK_EQ(mprotect(map[i] + room_bytes, page_bytes, PROT_NONE), 0);
    }
    for (int kernel = 0; kernel < KERNELS; kernel++)
        for (size_t bytes = 1; bytes <= room_bytes; bytes = bytes * 2 + bytes / 3 + 1)
            kernel_run((enum kernel)kernel, map[0] + room_bytes - bytes,
                       map[1] + room_bytes - bytes, bytes, 0);
    CHECK_EQ(ops->crc32c(0, map[1], room_bytes), cn_crc32c_table(0, map[1], room_bytes));
    for (int i = 0; i < 2; i++)
        munmap(map[i], room_bytes + page_bytes);
}

enum { ROUNDS = 2000, ROUND_BYTES = 33 << 10, SPINS = 2000 };
static uint64_t published; /* rounds whose bytes are complete */
static uint64_t consumed;

/* Polls hard at first, as a reader must that wants to catch a flag ahead of its bytes. */
static void wait_for(const uint64_t *counter, uint64_t round)
{
    for (int spins = 0; cn_load_acquire(counter) < round; spins++)
        if (spins < SPINS)
            cn_cpu_relax();
        else
            sched_yield();
}

static void *reader_main(void *arg)
{
    (void)arg;
    for (uint64_t round = 1; round <= ROUNDS; round++) {
        wait_for(&published, round);
        for (size_t i = ROUND_BYTES; i > 0; i -= 64) /* the last store first: it is the latest */
            CHECK_EQ(target[i - 1], round & 255);
        CHECK(filled(target, (int)(round & 255), ROUND_BYTES));
        cn_store_release(&consumed, round);
    }
    return NULL;
}

/* (I2): the flag is a plain release store, which on x86 orders no non-temporal store before it. */
static void test_bytes_are_visible_before_the_flag(void)
{
    pthread_t reader;
    cn_store_relaxed(&published, 0);
    cn_store_relaxed(&consumed, 0);
    CHECK_EQ(pthread_create(&reader, NULL, reader_main, NULL), 0);
    unsigned char *bytes = malloc(ROUND_BYTES);
    CHECK(bytes != NULL);
    for (uint64_t round = 1; round <= ROUNDS; round++) {
        memset(bytes, (int)(round & 255), ROUND_BYTES);
        if (round % 2 == 0)
            ops->copy(target, bytes, ROUND_BYTES);
        else
            (void)ops->copy_crc32c(0, target, bytes, ROUND_BYTES);
        cn_store_release(&published, round);
        wait_for(&consumed, round);
    }
    CHECK_EQ(pthread_join(reader, NULL), 0);
    free(bytes);
}

static void test_public_functions_use_the_best_isa(void)
{
    enum { BYTES = 70001 };
    const uint32_t want = cn_crc32c_table(0, source, BYTES);
    ops = cn_copy_best();
    CHECK(ops != NULL && cn_copy_ops_of(CN_ISA_PLAIN) != NULL);
    cn_copy_in(target, source, BYTES);
    CHECK_MEM_EQ(target, source, BYTES);
    memset(target, 0, BYTES);
    CHECK_EQ(cn_copy_in_crc32c(target, source, BYTES), want);
    CHECK_MEM_EQ(target, source, BYTES);
    memset(target, 0, BYTES);
    cn_copy_out(target, source, BYTES);
    CHECK_MEM_EQ(target, source, BYTES);
    memset(target, 0, BYTES);
    CHECK_EQ(cn_copy_out_crc32c(target, source, BYTES), want);
    CHECK_MEM_EQ(target, source, BYTES);
}

int main(void)
{
    rooms_make();
    RUN(test_public_functions_use_the_best_isa);
    for (int isa = 0; isa < CN_ISA_COUNT; isa++) {
        ops = cn_copy_ops_of((enum cn_isa)isa);
        if (ops == NULL)
            continue;
        printf("%s:\n", ops->name);
        RUN(test_short_lengths_at_every_alignment);
        RUN(test_streamed_lengths_at_every_alignment);
        RUN(test_large_copies);
        RUN(test_null_of_no_length_is_not_looked_at);
        RUN(test_crc_goes_on_from_the_one_before);
        RUN(test_nothing_past_the_end_is_touched);
        RUN(test_bytes_are_visible_before_the_flag);
    }
    free(source);
    free(target);
    return TEST_PASS;
}
