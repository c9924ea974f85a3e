/* SPDX-License-Identifier: Apache-2.0 */
/* Mappings, pre-touch and the node of a page, against the real kernel. */
#include <errno.h>
#include <fcntl.h>

#include "check_region.h"

static size_t page_bytes;

/* ---- mapping -------------------------------------------------------------- */

static void a_mapping_is_shared_aligned_and_outlives_its_descriptor(void)
{
    int fd = object_new(OBJECT_BYTES);
    char *one = object_map(fd, OBJECT_BYTES, CN_MAP_WRITABLE | CN_MAP_HUGE);
    char *two = object_map(fd, OBJECT_BYTES, 0);
    close(fd);

    CHECK_EQ((uintptr_t)one % (2 * MIB), 0);
    CHECK_EQ((uintptr_t)two % (2 * MIB), 0);
    one[OBJECT_BYTES - 1] = 7;
    CHECK_EQ(two[OBJECT_BYTES - 1], 7);
    object_unmap(one, OBJECT_BYTES);
    object_unmap(two, OBJECT_BYTES);
}

/* A length at which no kernel aligns by itself. */
static void an_odd_size_is_aligned_too(void)
{
    const uint64_t bytes = 2 * MIB + page_bytes;
    int fd = object_new(bytes);
    char *one = object_map(fd, bytes, CN_MAP_WRITABLE);
    char *two = object_map(fd, bytes, CN_MAP_WRITABLE);

    CHECK_EQ((uintptr_t)one % (2 * MIB), 0);
    CHECK_EQ((uintptr_t)two % (2 * MIB), 0);
    one[bytes - 1] = 5;
    CHECK_EQ(two[bytes - 1], 5);
    object_unmap(one, bytes);
    object_unmap(two, bytes);
    close(fd);
}

static void a_small_object_maps_as_it_is(void)
{
    int fd = object_new(page_bytes);
    char *addr = object_map(fd, page_bytes, CN_MAP_WRITABLE);
    addr[0] = 1;
    object_unmap(addr, page_bytes);
    close(fd);
}

static void a_read_only_descriptor_never_gives_a_writable_mapping(void)
{
    int fd = object_new(OBJECT_BYTES);
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    int reader = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(reader >= 0);
    void *addr = NULL;

    CHECK_EQ(cn_region_map(reader, OBJECT_BYTES, CN_MAP_WRITABLE, &addr, &sys), CN_ESYS);
    CHECK_EQ(sys.err, EACCES);
    CHECK_EQ(sys.where, CN_AT_MMAP);
    CHECK(addr == NULL);
    addr = object_map(reader, OBJECT_BYTES, 0);
    CHECK(mprotect(addr, OBJECT_BYTES, PROT_READ | PROT_WRITE) != 0 && errno == EACCES);
    object_unmap(addr, OBJECT_BYTES);
    close(reader);
    close(fd);
}

static void what_cannot_be_mapped_is_refused(void)
{
    void *addr = NULL;
    int ends[2];
    int fd = object_new(OBJECT_BYTES);
    CHECK_EQ(pipe(ends), 0);

    CHECK_EQ(cn_region_map(fd, OBJECT_BYTES + page_bytes, 0, &addr, &sys), CN_ECORRUPT);
    CHECK_EQ(cn_region_map(fd, 0, 0, &addr, &sys), CN_EINVAL);
    CHECK_EQ(cn_region_map(fd, page_bytes + 1, 0, &addr, &sys), CN_EINVAL);
    CHECK_EQ(cn_region_map(fd, UINT64_MAX - page_bytes + 1, 0, &addr, &sys), CN_EINVAL);
    CHECK_EQ(cn_region_map(ends[0], page_bytes, 0, &addr, &sys), CN_EINVAL);
    CHECK_EQ(cn_region_map(-1, page_bytes, 0, &addr, &sys), CN_ESYS);
    CHECK_EQ(sys.err, EBADF);
    CHECK_EQ(sys.where, CN_AT_FSTAT);
    CHECK(addr == NULL);
    CHECK(strcmp(cn_where_text(CN_AT_FSTAT), "fstat") == 0);
    CHECK(strcmp(cn_where_text(12345), "") == 0);
    close(ends[0]), close(ends[1]), close(fd);
}

static char *parents_mapping;

static void touch_parents_mapping(void)
{
    signal(SIGSEGV, SIG_DFL);
    char byte = *parents_mapping;
    __asm__("" ::"r"(byte)); /* the load is the test */
}

/* User-mode emulators take every advice and follow none: look what this machine does by itself. */
static bool machine_forgets_in_children(void)
{
    parents_mapping =
        mmap(NULL, page_bytes, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, /* fd= */ -1, 0);
    CHECK(parents_mapping != MAP_FAILED);
    bool forgets = madvise(parents_mapping, page_bytes, MADV_DONTFORK) == 0 &&
                   died_of(in_child(touch_parents_mapping), SIGSEGV);
    munmap(parents_mapping, page_bytes);
    return forgets;
}

static void a_forked_child_does_not_have_the_mapping(void)
{
    if (!machine_forgets_in_children())
        return;
    int fd = object_new(OBJECT_BYTES);
    parents_mapping = object_map(fd, OBJECT_BYTES, CN_MAP_WRITABLE);

    CHECK(died_of(in_child(touch_parents_mapping), SIGSEGV));
    object_unmap(parents_mapping, OBJECT_BYTES);
    close(fd);
}

/* ---- pre-touch ------------------------------------------------------------ */

static int madvise_of_an_old_kernel(void *addr, size_t bytes, int advice)
{
    (void)addr, (void)bytes, (void)advice;
    errno = EINVAL;
    return -1;
}

static int injected_errno;

static int madvise_that_fails(void *addr, size_t bytes, int advice)
{
    (void)addr, (void)bytes, (void)advice;
    errno = injected_errno;
    return -1;
}

static const struct cn_region_ops old_kernel = {.madvise = madvise_of_an_old_kernel};
static const struct cn_region_ops this_kernel = {.madvise = madvise};
static const struct cn_region_ops failing = {.madvise = madvise_that_fails};

static uint64_t resident_pages(void *addr, uint64_t bytes)
{
    static unsigned char pages[OBJECT_BYTES / 4096];
    uint64_t count = 0;
    CHECK_EQ(mincore(addr, bytes, pages), 0);
    for (uint64_t i = 0; i < bytes / page_bytes; i++)
        count += pages[i] & 1;
    return count;
}

static void populate_gives_every_page_and_changes_none(const struct cn_region_ops *ops)
{
    int fd = object_new(OBJECT_BYTES);
    char *addr = object_map(fd, OBJECT_BYTES, CN_MAP_WRITABLE);
    addr[page_bytes] = 99;

    CHECK_EQ(cn_region_populate_with(ops, addr, OBJECT_BYTES, &sys), CN_OK);

    CHECK_EQ(resident_pages(addr, OBJECT_BYTES), OBJECT_BYTES / page_bytes);
    CHECK_EQ(addr[page_bytes], 99);
    CHECK_EQ(addr[2 * page_bytes], 0);
    object_unmap(addr, OBJECT_BYTES);
    close(fd);
}

static void populate_beyond_the_end_is_an_error_not_a_signal(const struct cn_region_ops *ops)
{
    int fd = object_new(OBJECT_BYTES);
    char *addr = object_map(fd, OBJECT_BYTES, CN_MAP_WRITABLE);
    CHECK_EQ(ftruncate(fd, OBJECT_BYTES / 2), 0);

    CHECK_EQ(cn_region_populate_with(ops, addr, OBJECT_BYTES, &sys), CN_ESYS);

    CHECK_EQ(sys.err, EFAULT);
    CHECK_EQ(sys.where, CN_AT_POPULATE);
    object_unmap(addr, OBJECT_BYTES);
    close(fd);
}

static bool machine_can_populate(void)
{
    char *addr = mmap(NULL, OBJECT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                      /* fd= */ -1, 0);
    CHECK(addr != MAP_FAILED);
    bool can = madvise(addr, OBJECT_BYTES, 23) == 0 && resident_pages(addr, OBJECT_BYTES) > 0;
    munmap(addr, OBJECT_BYTES);
    return can;
}

static void populate_works(void)
{
    populate_gives_every_page_and_changes_none(&this_kernel);
    populate_beyond_the_end_is_an_error_not_a_signal(&this_kernel);
}

static void populate_works_without_the_kernels_help(void)
{
    populate_gives_every_page_and_changes_none(&old_kernel);
    populate_beyond_the_end_is_an_error_not_a_signal(&old_kernel);
}

static void populate_reports_what_the_kernel_said(void)
{
    char page[1] = {0};
    const int errors[] = {ENOMEM, EHWPOISON, EFAULT};
    char *aligned = page - (uintptr_t)page % page_bytes;

    for (size_t i = 0; i < sizeof(errors) / sizeof(errors[0]); i++) {
        injected_errno = errors[i];
        CHECK_EQ(cn_region_populate_with(&failing, aligned, page_bytes, &sys), CN_ESYS);
        CHECK_EQ(sys.err, errors[i]);
    }
    CHECK_EQ(cn_region_populate(aligned + 1, page_bytes, &sys), CN_EINVAL);
    CHECK_EQ(cn_region_populate(aligned, 0, &sys), CN_OK);
}

static void populate_refuses_a_read_only_mapping(void)
{
    if (!machine_can_populate())
        return;
    int fd = object_new(OBJECT_BYTES);
    char *addr = object_map(fd, OBJECT_BYTES, 0);

    CHECK_EQ(cn_region_populate(addr, OBJECT_BYTES, &sys), CN_ESYS);

    CHECK_EQ(sys.err, EINVAL);
    object_unmap(addr, OBJECT_BYTES);
    close(fd);
}

/* ---- the node of a page --------------------------------------------------- */

static long get_mempolicy_that_fails(int *mode, const void *addr, unsigned long flags)
{
    (void)mode, (void)addr, (void)flags;
    errno = injected_errno;
    return -1;
}

static long get_mempolicy_of_node_3(int *mode, const void *addr, unsigned long flags)
{
    (void)addr;
    CHECK_EQ(flags, 3);
    *mode = 3;
    return 0;
}

static void the_node_of_a_page_is_told_or_said_to_be_unknown(void)
{
    const struct cn_numa_ops broken = {.get_mempolicy = get_mempolicy_that_fails};
    const struct cn_numa_ops node_3 = {.get_mempolicy = get_mempolicy_of_node_3};
    char here = 0;
    int32_t node = -1, known = -1;

    CHECK_EQ(cn_numa_node_of(&here, &node, &known, &sys), CN_OK);
    CHECK(node >= 0 && (known == 0 || known == 1));
    CHECK_EQ(cn_numa_node_of_with(&node_3, &here, &node, &known, &sys), CN_OK);
    CHECK_EQ(node, 3);
    CHECK_EQ(known, 1);
    injected_errno = ENOSYS;
    CHECK_EQ(cn_numa_node_of_with(&broken, &here, &node, &known, &sys), CN_OK);
    CHECK_EQ(node, 0);
    CHECK_EQ(known, 0);
    injected_errno = EPERM;
    CHECK_EQ(cn_numa_node_of_with(&broken, &here, &node, &known, &sys), CN_OK);
    CHECK_EQ(known, 0);
    injected_errno = EFAULT;
    CHECK_EQ(cn_numa_node_of_with(&broken, &here, &node, &known, &sys), CN_ESYS);
    CHECK_EQ(sys.err, EFAULT);
    CHECK_EQ(sys.where, CN_AT_GET_MEMPOLICY);
}

int main(void)
{
    page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    RUN(a_mapping_is_shared_aligned_and_outlives_its_descriptor);
    RUN(an_odd_size_is_aligned_too);
    RUN(a_small_object_maps_as_it_is);
    RUN(a_read_only_descriptor_never_gives_a_writable_mapping);
    RUN(what_cannot_be_mapped_is_refused);
    RUN(a_forked_child_does_not_have_the_mapping);
    if (machine_can_populate())
        RUN(populate_works);
    RUN(populate_works_without_the_kernels_help);
    RUN(populate_reports_what_the_kernel_said);
    RUN(populate_refuses_a_read_only_mapping);
    RUN(the_node_of_a_page_is_told_or_said_to_be_unknown);
    return TEST_PASS;
}
