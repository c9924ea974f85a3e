/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The world: all memory of a scenario, in one mapping at a fixed address.
 *
 * After setup() it is write-protected; the first write to a page saves the page, and every page
 * ever written is put back before the next schedule. So a schedule costs microseconds, whatever the
 * pool's size.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "machine.h"

#define WORLD_ADDR ((uint8_t *)0x200000000000)
#define WORLD_BYTES (64ull << 20)
#define WORLD_WORDS (WORLD_BYTES / 8)
#define PAGE 4096u
#define PAGES (WORLD_BYTES / PAGE)
#define LABELS_MAX 64u

struct world_head *const world = (struct world_head *)WORLD_ADDR;
bool world_open;

static uint8_t readers[WORLD_WORDS]; /* bit a task */
static uint8_t writers[WORLD_WORDS];
static bool shared[WORLD_WORDS];
static uint32_t shared_words;

static uint8_t *saved[PAGES];
static uint32_t dirty[PAGES];
static uint32_t dirty_count;

static struct {
    const uint8_t *p;
    size_t bytes;
    size_t stride;
    const char *name;
} labels[LABELS_MAX];
static uint32_t label_count;

/* ---- the world ------------------------------------------------------------ */

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *p, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
void __real_free(void *p);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *p, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
void __wrap_free(void *p);

bool in_world(const void *p)
{
    return (const uint8_t *)p >= WORLD_ADDR && (const uint8_t *)p < WORLD_ADDR + WORLD_BYTES;
}

/* The length stands before each block, for realloc. Nothing is used twice: free does nothing. */
static void *world_alloc(size_t bytes, size_t alignment)
{
    uint64_t off = (world->used + 8 + alignment - 1) / alignment * alignment;
    if (off + bytes > WORLD_BYTES)
        return NULL;
    world->used = off + bytes;
    memcpy(WORLD_ADDR + off - 8, &(uint64_t){bytes}, 8);
    return WORLD_ADDR + off;
}

void *__wrap_malloc(size_t bytes)
{
    return world_open ? world_alloc(bytes, 64) : __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes)
{
    if (!world_open)
        return __real_calloc(count, bytes);
    return world_alloc(count * bytes, 64); /* never used before, or put back: zero */
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes)
{
    return world_open ? world_alloc(bytes, alignment) : __real_aligned_alloc(alignment, bytes);
}

void *__wrap_realloc(void *p, size_t bytes)
{
    if (!world_open)
        return __real_realloc(p, bytes);
    void *fresh = world_alloc(bytes, 64);
    if (p != NULL && fresh != NULL) {
        uint64_t old;
        memcpy(&old, (uint8_t *)p - 8, 8);
        memcpy(fresh, p, old < bytes ? old : bytes);
    }
    return fresh;
}

void __wrap_free(void *p)
{
    if (!in_world(p))
        __real_free(p);
}

static void on_fault(int signal_number, siginfo_t *info, void *context)
{
    (void)signal_number;
    (void)context;
    size_t page =
        in_world(info->si_addr) ? (size_t)((uint8_t *)info->si_addr - WORLD_ADDR) / PAGE : 0;
    if (!in_world(info->si_addr) || saved[page] != NULL)
        model_violation("fault at %p", info->si_addr);
    saved[page] = __real_malloc(PAGE);
    if (saved[page] == NULL)
        abort();
    memcpy(saved[page], WORLD_ADDR + page * PAGE, PAGE);
    dirty[dirty_count++] = (uint32_t)page;
    mprotect(WORLD_ADDR + page * PAGE, PAGE, PROT_READ | PROT_WRITE);
}

void world_restore(void)
{
    for (uint32_t i = 0; i < dirty_count; i++)
        memcpy(WORLD_ADDR + (size_t)dirty[i] * PAGE, saved[dirty[i]], PAGE);
}

void share(const void *p)
{
    size_t word = (size_t)((const uint8_t *)p - WORLD_ADDR) / 8;
    if (!shared[word])
        shared_words++;
    shared[word] = true;
}

void world_new(void)
{
    static bool mapped;
    size_t words = mapped ? world->used / 8 : 0; /* of the scenario before */
    mapped = true;
    munmap(WORLD_ADDR, WORLD_BYTES);
    void *map = mmap(WORLD_ADDR, WORLD_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (map != (void *)WORLD_ADDR)
        abort();
    world->used = PAGE;
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    for (uint32_t i = 0; i < dirty_count; i++) {
        __real_free(saved[dirty[i]]);
        saved[dirty[i]] = NULL;
    }
    dirty_count = 0;
    memset(readers, 0, words);
    memset(writers, 0, words);
    memset(shared, 0, words);
    shared_words = 0;
    label_count = 0;
    for (uint32_t i = 0; i < TASKS_MAX; i++)
        share(&world->dead[i]);
    share(&world->bells);
}

uint32_t machine_shared_words(void) { return shared_words; }

void model_label(const void *p, size_t bytes, size_t stride, const char *name)
{
    if (label_count == LABELS_MAX)
        abort();
    labels[label_count].p = p;
    labels[label_count].bytes = bytes;
    labels[label_count].stride = stride;
    labels[label_count++].name = name;
}

/* The smallest labelled range that holds p. */
void machine_name(const void *p, char *text, size_t bytes)
{
    size_t best = SIZE_MAX;
    snprintf(text, bytes, "%p", p);
    for (uint32_t i = 0; i < label_count; i++) {
        size_t off = (size_t)((const uint8_t *)p - labels[i].p);
        if ((const uint8_t *)p < labels[i].p || off >= labels[i].bytes || labels[i].stride >= best)
            continue;
        best = labels[i].stride;
        size_t rest = off % labels[i].stride;
        if (labels[i].stride == labels[i].bytes)
            snprintf(text, bytes, "%s", labels[i].name);
        else
            snprintf(text, bytes, "%s[%zu]", labels[i].name, off / labels[i].stride);
        if (rest != 0)
            snprintf(text + strlen(text), bytes - strlen(text), "+%zu", rest);
    }
}

void world_protect(void) { mprotect(WORLD_ADDR, WORLD_BYTES, PROT_READ); }

/* Is the word touched by two tasks, one of which writes? Found out on the way, for all
 * schedules. */
bool is_shared(const void *p, bool writes)
{
    if (!in_world(p))
        return false;
    size_t word = (size_t)((const uint8_t *)p - WORLD_ADDR) / 8;
    uint8_t bit = (uint8_t)(1u << current);
    readers[word] |= bit;
    if (writes)
        writers[word] |= bit;
    if (shared[word])
        return true;
    if (writers[word] == 0 || (readers[word] & (readers[word] - 1)) == 0)
        return false;
    share(p);
    leave(RUN_GREW);
}
