/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stands in for libcudart where there is no GPU: the six functions that cenote calls, with the rules
 * that matter to it, as the CUDA headers state them. It pins nothing and copies nothing.
 *
 * - Registering needs mapped memory; read-only memory needs the flag, or a device that walks the
 *   host's page tables. Ranges must not overlap. The range of an unregistration must begin one.
 * - A failure leaves its code pending in its thread until somebody takes it.
 * - Unregistering memory that is not mapped any more is counted: nobody must see it.
 */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum { OK = 0, INVALID = 1, NO_DEVICE = 100, ALREADY = 712, NOT_REGISTERED = 713, REFUSED = 801 };
enum { READ_ONLY = 8, HOST_PAGE_TABLES = 100, READ_ONLY_SUPPORTED = 113, RANGES = 1024 };

struct range {
    char *at;
    size_t bytes;
    unsigned int flags;
};

static struct range ranges[RANGES];
static int range_count, calls, fail_at, fail_code, orphans, devices = 1;
static int read_only_supported = 1, host_page_tables;
static __thread int pending;

static int say(int code)
{
    if (code != OK)
        pending = code;
    return code;
}

/* Is all of it mapped, at least with this right ('r' or 'w')? */
static int is_mapped(const char *at, size_t bytes, char right)
{
    char line[512], rights[5];
    unsigned long long from, to, next = (unsigned long long)at, end = next + bytes;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (maps != NULL && next < end && fgets(line, sizeof(line), maps) != NULL)
        if (sscanf(line, "%llx-%llx %4s", &from, &to, rights) == 3 && from <= next && next < to &&
            strchr(rights, right) != NULL)
            next = to;
    if (maps != NULL)
        fclose(maps);
    return next >= end;
}

static int fails_now(void) { return ++calls == fail_at; }

int cudaHostRegister(void *ptr, size_t bytes, unsigned int flags)
{
    char *at = ptr;
    if (fails_now())
        return say(fail_code);
    if ((flags & READ_ONLY) != 0 && !read_only_supported)
        return say(REFUSED);
    if (!is_mapped(at, bytes, (flags & READ_ONLY) != 0 || host_page_tables ? 'r' : 'w'))
        return say(INVALID);
    for (int i = 0; i < range_count; i++)
        if (at < ranges[i].at + ranges[i].bytes && ranges[i].at < at + bytes)
            return say(ALREADY);
    if (range_count == RANGES)
        return say(INVALID);
    ranges[range_count++] = (struct range){at, bytes, flags};
    return OK;
}

int cudaHostUnregister(void *ptr)
{
    if (fails_now())
        return say(fail_code);
    for (int i = 0; i < range_count; i++)
        if (ranges[i].at == ptr) {
            orphans += !is_mapped(ranges[i].at, ranges[i].bytes, 'r');
            ranges[i] = ranges[--range_count];
            return OK;
        }
    return say(NOT_REGISTERED);
}

int cudaGetLastError(void)
{
    int code = pending;
    pending = OK;
    return code;
}

const char *cudaGetErrorString(int code)
{
    return code == REFUSED ? "operation not supported" : "stand-in error";
}

int cudaGetDevice(int *device)
{
    *device = 0;
    return say(devices > 0 ? OK : NO_DEVICE);
}

int cudaDeviceGetAttribute(int *value, int attribute, int device)
{
    if (device != 0)
        return say(INVALID);
    *value = attribute == READ_ONLY_SUPPORTED ? read_only_supported
             : attribute == HOST_PAGE_TABLES  ? host_page_tables
                                              : 0;
    return OK;
}

/* ---- for the test ------------------------------------------------------------ */

/* The nth call from now on of the first two functions fails; 0: none. */
void stand_in_fail(int nth, int code)
{
    calls = 0;
    fail_at = nth;
    fail_code = code;
}

void stand_in_device(int count, int read_only, int page_tables)
{
    devices = count;
    read_only_supported = read_only;
    host_page_tables = page_tables;
}

int stand_in_pending(void) { return pending; }
int stand_in_orphans(void) { return orphans; }
int stand_in_ranges(void) { return range_count; }
unsigned int stand_in_flags(const char *at)
{
    for (int i = 0; i < range_count; i++)
        if (at >= ranges[i].at && at < ranges[i].at + ranges[i].bytes)
            return ranges[i].flags;
    return ~0u;
}
