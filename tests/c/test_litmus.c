/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Store buffering on this CPU: without either fence of acquire x evict a reader and the keeper miss
 * each other, with both they never do (I3).
 *
 * Two threads run the shape of cn_lease() and cn_unlink_flush() on real descriptors and a real
 * lease table, as many rounds as fit into a bounded time: reader: store lease, fence, load word;
 * keeper: store DYING, fence, load lease. A violation is a round in which the reader found the
 * chunk LIVE and the keeper found no lease. Each round has words of its own, cold in the other's
 * cache, so that stores wait in the buffer.
 *
 * CENOTE_CI: a deleted fence that is not shown fails, on x86-64 and two CPUs, with neither
 * sanitizer nor emulator; those may never show it.
 */
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include "check.h"
#include "cn_atomic.h"
#include "cn_layout.h"

enum { ROUNDS = 4096, FENCED_BATCHES = 1000, BATCHES_MAX = 20000 };
#define RUN_NS_MAX 3000000000ull   /* a side; reached under emulators and sanitizers only */
#define SHOW_NS_MAX 40000000000ull /* where it must be shown */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#else
#define SANITIZED 0
#endif

struct round { /* a lease word and its chunk, on lines of their own */
    uint64_t lease __attribute__((aligned(CN_CACHELINE)));
    uint64_t word __attribute__((aligned(CN_CACHELINE)));
};

static struct round rounds[ROUNDS];
static uint64_t reader_saw[ROUNDS];
static uint64_t keeper_saw[ROUNDS];

struct gate { /* both sides start each batch together */
    uint64_t batch __attribute__((aligned(CN_CACHELINE)));
    uint64_t done __attribute__((aligned(CN_CACHELINE)));
    uint64_t stop;
};
static struct gate gate;

static const uint64_t ref = 1ull << 32;

static void no_fence(void) { __asm__ volatile("" ::: "memory"); }

#define SIDE(name, mine, value, fence, other, saw)                                                 \
    static void name(void)                                                                         \
    {                                                                                              \
        for (uint32_t i = 0; i < ROUNDS; i++) {                                                    \
            cn_store_relaxed(&rounds[i].mine, value);                                              \
            fence();                                                                               \
            saw[i] = cn_load_acquire(&rounds[i].other);                                            \
        }                                                                                          \
    }

SIDE(reader_fenced, lease, ref, cn_fence_reader, word, reader_saw)
SIDE(reader_bare, lease, ref, no_fence, word, reader_saw)
SIDE(keeper_fenced, word, cn_word(1, CN_DYING, 0), cn_fence_keeper, lease, keeper_saw)
SIDE(keeper_bare, word, cn_word(1, CN_DYING, 0), no_fence, lease, keeper_saw)

/* The hot slots: claim, publish and fence in one locked instruction. */
static void reader_claims(void)
{
    for (uint32_t i = 0; i < ROUNDS; i++) {
        CHECK(cn_claim_fenced(&rounds[i].lease, ref));
        reader_saw[i] = cn_load_acquire(&rounds[i].word);
    }
}

static cpu_set_t cpus; /* what this process may use */

/*
 * A CPU for each thread: beside a busy process the scheduler puts both on one, where neither ever
 * runs while the other does. An emulator may refuse, and is no worse for it.
 */
static void take_cpu(unsigned which)
{
    for (unsigned cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &cpus) || which-- > 0)
            continue;
        cpu_set_t mine;
        CPU_ZERO(&mine);
        CPU_SET(cpu, &mine);
        (void)sched_setaffinity(0, sizeof(mine), &mine);
        return;
    }
}

static bool must_show(void)
{
#if defined(__x86_64__)
    return !SANITIZED && getenv("CENOTE_CI") != NULL && getenv("CN_TEST_EMULATED") == NULL;
#else
    return false;
#endif
}

static void *reader_main(void *arg)
{
    void (*side)(void) = *(void (**)(void))arg;
    take_cpu(1);
    for (uint64_t batch = 1;; batch++) {
        while (cn_load_acquire(&gate.batch) < batch)
            if (cn_load_acquire(&gate.stop) != 0)
                return NULL;
        side();
        cn_store_release(&gate.done, batch);
    }
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void reset(void)
{
    for (uint32_t i = 0; i < ROUNDS; i++) {
        cn_store_relaxed(&rounds[i].lease, 0);
        cn_store_relaxed(&rounds[i].word, cn_word(1, CN_LIVE, 0));
    }
}

static uint64_t violations_of_batch(void)
{
    uint64_t violations = 0;
    for (uint32_t i = 0; i < ROUNDS; i++)
        violations += cn_word_state(reader_saw[i]) == CN_LIVE && keeper_saw[i] == 0;
    return violations;
}

/* Batches until the first violation (until_found) or all of them; returns violations. */
static uint64_t run(void (*reader)(void), void (*keeper)(void), uint64_t batches, bool until_found,
                    uint64_t *ret_rounds)
{
    pthread_t thread;
    uint64_t violations = 0;
    uint64_t start = now_ns();
    uint64_t batch = 0;
    uint64_t ns_max = until_found && must_show() ? SHOW_NS_MAX : RUN_NS_MAX;
    gate = (struct gate){0};
    CHECK_EQ(pthread_create(&thread, NULL, reader_main, &reader), 0);
    while (batch < batches && !(until_found && violations > 0) && now_ns() - start < ns_max) {
        reset();
        cn_store_release(&gate.batch, ++batch);
        keeper();
        while (cn_load_acquire(&gate.done) < batch)
            cn_cpu_relax();
        violations += violations_of_batch();
    }
    cn_store_release(&gate.stop, 1);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    *ret_rounds = batch * ROUNDS;
    return violations;
}

static uint64_t fenced(void (*reader)(void), const char *name)
{
    uint64_t count;
    uint64_t violations = run(reader, keeper_fenced, FENCED_BATCHES, false, &count);
    printf("    %s: %llu violations in %llu rounds\n", name, (unsigned long long)violations,
           (unsigned long long)count);
    return violations;
}

/* True if this CPU shows that the fence is needed. */
static bool deleted(void (*reader)(void), void (*keeper)(void), const char *name)
{
    uint64_t count;
    uint64_t violations = run(reader, keeper, must_show() ? UINT64_MAX : BATCHES_MAX, true, &count);
    printf("    %s: %llu violations in %llu rounds\n", name, (unsigned long long)violations,
           (unsigned long long)count);
    return violations > 0;
}

int main(void)
{
    if (sched_getaffinity(0, sizeof(cpus), &cpus) != 0 || CPU_COUNT(&cpus) < 2)
        SKIP("one CPU: two threads never run at once");
    take_cpu(0);
    CHECK_EQ(fenced(reader_fenced, "both fences"), 0);
    CHECK_EQ(fenced(reader_claims, "both, slot claimed by a locked instruction"), 0);
    bool shown = deleted(reader_bare, keeper_fenced, "without the reader's fence");
    shown = deleted(reader_fenced, keeper_bare, "without the keeper's fence") && shown;
    CHECK_MSG(shown || !must_show(), "a deleted fence was not missed in the time given");
    if (!shown)
        SKIP("this machine did not reorder a store and a load in the time given");
    return TEST_PASS;
}
