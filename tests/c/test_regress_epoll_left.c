/* SPDX-License-Identifier: Apache-2.0 */
/* Claim: a session that ended leaves nothing in the keeper's epoll set, even if its client still
 * has the doorbell; a client cannot fill it up (ENOSPC: nobody attaches any more). */
#include "pool_bed.h"

static uint32_t watched(int epoll_fd)
{
    char path[64], line[256];
    uint32_t n = 0;
    snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", epoll_fd);
    FILE *f = fopen(path, "r");
    while (fgets(line, sizeof(line), f) != NULL)
        n += strncmp(line, "tfd:", 4) == 0;
    fclose(f);
    return n;
}

int main(void)
{
    struct bed bed = bed_open(8 << 20, 64, 512, "lru");
    uint32_t before = watched(bed.keeper->epoll_fd);
    for (int i = 0; i < 10; i++) {
        struct bed_session s = bed_attach(&bed, CN_ROLE_READER);
        CHECK(dup(s.client->doorbell_fd) >= 0); /* a client that keeps it */
        bed_kill(&bed, &s);
    }
    printf("watched before %u, after ten sessions that ended %u\n", before,
           watched(bed.keeper->epoll_fd));
    CHECK_EQ(watched(bed.keeper->epoll_fd), before);
    bed_close(&bed);
    return 0;
}
