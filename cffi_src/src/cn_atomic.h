/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The only file that names a memory order.
 *
 * Atomics are applied to plain integers, so that the layout headers stay readable by cffi and C++.
 * With CN_MODEL_CHECK every function is a call into the explorer of tests/model, which decides who
 * runs next, who is killed, and when a store leaves its task's store buffer (x86-TSO).
 */
#ifndef CN_ATOMIC_H
#define CN_ATOMIC_H

#include <stdbool.h>
#include <stdint.h>

/* ThreadSanitizer: gcc says so by a macro, clang by a feature. */
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CN_TSAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define CN_TSAN 1
#endif

_Static_assert(__atomic_always_lock_free(8, 0),
               "8-byte atomics must be lock-free across processes");

#ifdef CN_MODEL_CHECK

uint64_t cn_model_load(const uint64_t *p);
void cn_model_store(uint64_t *p, uint64_t v);
bool cn_model_cas(uint64_t *p, uint64_t *expected, uint64_t v);
uint64_t cn_model_add(uint64_t *p, uint64_t v);
void cn_model_fence(void);
uint32_t cn_model_load32(const uint32_t *p);
void cn_model_store32(uint32_t *p, uint32_t v);

static inline uint64_t cn_load_acquire(const uint64_t *p) { return cn_model_load(p); }
static inline uint64_t cn_load_relaxed(const uint64_t *p) { return cn_model_load(p); }
static inline void cn_store_release(uint64_t *p, uint64_t v) { cn_model_store(p, v); }
static inline void cn_store_relaxed(uint64_t *p, uint64_t v) { cn_model_store(p, v); }
static inline bool cn_cas(uint64_t *p, uint64_t *expected, uint64_t v)
{
    return cn_model_cas(p, expected, v);
}
static inline uint64_t cn_add_relaxed(uint64_t *p, uint64_t v) { return cn_model_add(p, v); }
static inline void cn_fence(void) { cn_model_fence(); }
static inline void cn_fence_release(void) {}
static inline void cn_fence_acquire(void) {}
static inline uint32_t cn_load32_acquire(const uint32_t *p) { return cn_model_load32(p); }
static inline uint32_t cn_load32_relaxed(const uint32_t *p) { return cn_model_load32(p); }
static inline void cn_store32_release(uint32_t *p, uint32_t v) { cn_model_store32(p, v); }
static inline void cn_store32_relaxed(uint32_t *p, uint32_t v) { cn_model_store32(p, v); }

#else

static inline uint64_t cn_load_acquire(const uint64_t *p)
{
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline uint64_t cn_load_relaxed(const uint64_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
static inline void cn_store_release(uint64_t *p, uint64_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
static inline void cn_store_relaxed(uint64_t *p, uint64_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}
static inline bool cn_cas(uint64_t *p, uint64_t *expected, uint64_t v)
{
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline uint64_t cn_add_relaxed(uint64_t *p, uint64_t v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
static inline uint32_t cn_load32_acquire(const uint32_t *p)
{
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline uint32_t cn_load32_relaxed(const uint32_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
static inline void cn_store32_release(uint32_t *p, uint32_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
static inline void cn_store32_relaxed(uint32_t *p, uint32_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}

/*
 * Full fence: no later load passes an earlier store (store buffering, design.md "Memory").
 * By hand on x86, because some compilers emit mfence, five times dearer than a locked or.
 */
static inline void cn_fence(void)
{
#if defined(__x86_64__) && !defined(CN_TSAN)
    __asm__ volatile("lock; orq $0, (%%rsp)" ::: "memory", "cc");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
static inline void cn_fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
static inline void cn_fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }

#endif /* CN_MODEL_CHECK */

/*
 * The two fences of acquire x evict, named so that the explorer and the litmus run can delete
 * either and must then find the wrong byte (tests/model, tests/c/test_litmus.c).
 */
static inline void cn_fence_reader(void)
{
#ifndef CN_PLANT_NO_READER_FENCE
    cn_fence();
#endif
}
static inline void cn_fence_keeper(void)
{
#ifndef CN_PLANT_NO_KEEPER_FENCE
    cn_fence();
#endif
}

/* 0 -> v with the reader's fence behind it. On x86 the locked instruction is that fence. */
static inline bool cn_claim_fenced(uint64_t *p, uint64_t v)
{
#ifdef CN_PLANT_NO_READER_FENCE
    if (cn_load_relaxed(p) != 0)
        return false;
    cn_store_relaxed(p, v);
    return true;
#else
    uint64_t empty = 0;
    bool claimed = cn_cas(p, &empty, v);
#if !defined(__x86_64__) || defined(CN_TSAN)
    cn_fence();
#endif
    return claimed;
#endif
}

static inline void cn_cpu_relax(void)
{
#if defined(__x86_64__)
    __asm__ volatile("pause");
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
