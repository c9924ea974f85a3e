/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads in one process over one mapping: readers, writers and the keeper, for ThreadSanitizer,
 * which knows memory by its address and sees nothing of a second mapping. Every byte of every lease
 * is read and is the one that was committed, while a small pool evicts all the time.
 */
#include <pthread.h>
#include <sys/eventfd.h>

#include "pool_bed.h"

#define MIB (1024u * 1024u)

enum { KEYS = 96, CHUNK_BYTES = 64 * 1024, WRITES = 400, BATCH_KEYS = 12 };

/* As cn_client_attach() leaves it, but over the keeper's own mappings. */
static struct cn_client *join_client(struct bed *bed, uint8_t *segment, int doorbell_fd)
{
    struct cn_client *c = aligned_alloc(CN_CACHELINE, sizeof(*c));
    uint64_t *mark = malloc(sizeof(*mark));
    struct cn_session_head *head = (void *)segment;
    CHECK(c != NULL && mark != NULL);
    memset(c, 0, sizeof(*c));
    *mark = 1;
    c->mark = mark;
    c->catalog = bed->keeper->catalog;
    c->head = head;
    c->lease_slots = head->lease_slots;
    c->session_idx = head->session_idx;
    c->role = head->role;
    c->lease_limit_bytes = head->lease_limit_bytes;
    c->limited = c->lease_limit_bytes < bed->format.regions[0].bytes;
    c->stock = (void *)(segment + cn_session_stock_off());
    c->leases = (void *)(segment + cn_session_leases_off());
    c->sub = (void *)(segment + cn_session_sub_off(c->lease_slots));
    c->comp = (void *)(segment + cn_session_comp_off(c->lease_slots));
    c->access_log = (void *)(segment + cn_session_access_off(c->lease_slots));
    c->region_count = 1;
    c->largest_bytes = bed->format.regions[0].bytes;
    c->ro[0] = c->rw[0] = (struct cn_mapping){bed->region, bed->format.regions[0].bytes};
    c->slot_next = calloc(c->lease_slots, sizeof(*c->slot_next));
    c->slot_bytes = calloc(c->lease_slots, sizeof(*c->slot_bytes));
    CHECK(c->slot_next != NULL && c->slot_bytes != NULL);
    CHECK_EQ(cn_doorbell_take(c, doorbell_fd), CN_OK);
    c->next_cookie = 1;
    pthread_mutex_init(&c->sub_lock, NULL);
    pthread_mutex_init(&c->op_lock, NULL);
    cn_slots_init(c);
    return c;
}

static struct bed_session join(struct bed *bed, uint64_t lease_limit_bytes)
{
    struct bed_session s;
    uint64_t bytes = cn_session_segment_bytes(bed->format.lease_slots);
    int fd = bed_object(bytes, &s.segment);
    int doorbell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct cn_session_open open = {.segment = s.segment,
                                   .segment_bytes = bytes,
                                   .liveness_fd = -1,
                                   .doorbell_fd = dup(doorbell_fd),
                                   .pidfd = -1,
                                   .role = CN_ROLE_WRITER,
                                   .lease_limit_bytes = lease_limit_bytes};
    close(fd);
    CHECK_EQ(cn_keeper_session_open(bed->keeper, &open), CN_OK);
    s.session = open.ret_session;
    s.nonce = open.ret_nonce;
    s.client = join_client(bed, s.segment, doorbell_fd);
    static const uint8_t manifest[] = {0x80};
    struct cn_namespace_open ns = {.id = {7},
                                   .name = "",
                                   .manifest = manifest,
                                   .manifest_bytes = 1,
                                   .session = s.session,
                                   .session_nonce = s.nonce};
    CHECK_EQ(cn_keeper_namespace_open(bed->keeper, &ns), CN_OK);
    bed->ns = ns.ret_slot;
    return s;
}

static void leave(struct bed *bed, struct bed_session *s)
{
    CHECK_EQ(cn_client_leases(s->client), 0);
    CHECK_EQ(cn_keeper_session_hint(bed->keeper, s->session, s->nonce), CN_OK);
    bed_settle(bed);
    close(s->client->doorbell_fd);
    free(s->client->slot_next);
    free(s->client->slot_bytes);
    free((void *)(uintptr_t)s->client->mark);
    free(s->client);
    munmap(s->segment, cn_session_segment_bytes(bed->format.lease_slots));
}

struct thread {
    pthread_t id;
    struct bed *bed;
    uint64_t *writing; /* threads that still write; the others go on until 0 */
    struct cn_client *client;
    uint64_t seed;
    uint64_t hits;
};

static uint64_t next_random(struct thread *t, uint64_t below)
{
    t->seed ^= t->seed << 13, t->seed ^= t->seed >> 7, t->seed ^= t->seed << 17;
    return (t->seed >> 11) % below;
}

/* Every 512th byte and the last: enough to see another chunk, cheap enough for TSan. */
static void check_some_bytes(const struct cn_view *view, uint64_t n)
{
    const uint8_t *data = view->data;
    CHECK_EQ(view->bytes, CHUNK_BYTES);
    for (uint64_t i = 0; i < view->bytes; i += 512)
        CHECK_EQ(data[i], bed_byte(n, i));
    CHECK_EQ(data[view->bytes - 1], bed_byte(n, view->bytes - 1));
}

static void *read_single(void *arg)
{
    struct thread *t = arg;
    while (cn_load_acquire(t->writing) > 0) {
        uint64_t n = next_random(t, KEYS);
        struct bed_key key = bed_key(n);
        struct cn_view view;
        int status = cn_lease(t->client, t->bed->ns, key.bytes, &view);
        CHECK(status == CN_OK || status == CN_EMISS || status == CN_ELEASES);
        if (status != CN_OK)
            continue;
        check_some_bytes(&view, n);
        cn_release(t->client, view.slot);
        t->hits++;
    }
    return NULL;
}

/* Batches of consecutive keys; half of each is released one by one, half at once. */
static void *read_batches(void *arg)
{
    struct thread *t = arg;
    while (cn_load_acquire(t->writing) > 0) {
        uint64_t from = next_random(t, KEYS);
        uint8_t keys[BATCH_KEYS * CN_KEY_BYTES];
        struct cn_view views[BATCH_KEYS];
        uint32_t count;
        for (uint32_t j = 0; j < BATCH_KEYS; j++)
            memcpy(keys + j * CN_KEY_BYTES, bed_key((from + j) % KEYS).bytes, CN_KEY_BYTES);
        CHECK_EQ(cn_match(t->client, t->bed->ns, keys, BATCH_KEYS, &count), CN_OK);
        CHECK_EQ(cn_lease_many(t->client, t->bed->ns, keys, BATCH_KEYS, views, &count), CN_OK);
        for (uint32_t j = 0; j < count; j++)
            check_some_bytes(&views[j], (from + j) % KEYS);
        for (uint32_t j = 0; j < count / 2; j++)
            cn_release(t->client, views[j].slot);
        cn_release_many(t->client, views + count / 2, count - count / 2);
        t->hits += count;
    }
    return NULL;
}

static void *write_chunks(void *arg)
{
    struct thread *t = arg;
    for (uint32_t i = 0; i < WRITES; i++) {
        uint64_t n = next_random(t, KEYS);
        struct bed_key key = bed_key(n);
        struct cn_grant grant;
        if (cn_reserve(t->client, CHUNK_BYTES, 0, 1000, &grant) != CN_OK)
            continue;
        for (uint64_t j = 0; j < CHUNK_BYTES; j++)
            ((uint8_t *)grant.data)[j] = bed_byte(n, j);
        struct cn_put put = {.ref = grant.ref,
                             .key = key.bytes,
                             .data_bytes = CHUNK_BYTES,
                             .ns_slot = t->bed->ns,
                             .position = CN_POSITION_UNKNOWN};
        CHECK_EQ(cn_commit(t->client, &put, 30000), CN_OK);
    }
    CHECK_EQ(cn_flush(t->client, 30000), CN_OK);
    cn_add_relaxed(t->writing, (uint64_t)-1);
    return NULL;
}

static void *follow_events(void *arg)
{
    struct thread *t = arg;
    uint64_t sequence = 0;
    while (cn_load_acquire(t->writing) > 0) {
        struct cn_event events[16];
        uint32_t count;
        uint64_t lost;
        CHECK_EQ(cn_events_read(t->bed->catalog, &sequence, 16, events, &count, &lost), CN_OK);
        for (uint32_t j = 0; j < count; j++)
            CHECK((events[j].what & 0xff) >= CN_EVENT_STORED &&
                  (events[j].what & 0xff) <= CN_EVENT_CLEARED);
        t->hits += count;
        cn_events_wait(t->client, sequence, 5);
    }
    return NULL;
}

static void run_threads(struct bed *bed, struct thread *threads, void *(*const *mains)(void *),
                        uint32_t count)
{
    uint64_t writing = 0;
    for (uint32_t i = 0; i < count; i++)
        writing += mains[i] == write_chunks;
    for (uint32_t i = 0; i < count; i++) {
        threads[i].bed = bed;
        threads[i].writing = &writing;
        threads[i].seed = 88172645463325252ull + i * 7919;
        CHECK_EQ(pthread_create(&threads[i].id, NULL, mains[i], &threads[i]), 0);
    }
    for (uint32_t i = 0; i < count; i++)
        CHECK_EQ(pthread_join(threads[i].id, NULL), 0);
    CHECK_EQ(cn_keeper_stop(bed->keeper), CN_OK);
    uint64_t hits = 0;
    for (uint32_t i = 0; i < count; i++)
        hits += threads[i].hits;
    printf("    %llu hits, %llu commits, %llu evictions\n", (unsigned long long)hits,
           (unsigned long long)bed->keeper->count.commits,
           (unsigned long long)bed->keeper->count.evictions);
    CHECK(hits > 0 && bed->keeper->count.evictions > 0);
}

/* Readers of one session in several threads, a writer of another one, a pool of half the keys. */
static void readers_writers_and_keeper(void)
{
    struct bed bed = bed_open(4 * MIB, 256, 512, "use-count");
    CHECK_EQ(cn_keeper_start(bed.keeper), CN_OK);
    struct bed_session readers = join(&bed, UINT64_MAX);
    struct bed_session writer = join(&bed, UINT64_MAX);
    struct bed_session follower = join(&bed, UINT64_MAX);
    struct thread threads[6] = {{.client = readers.client}, {.client = readers.client},
                                {.client = readers.client}, {.client = writer.client},
                                {.client = writer.client},  {.client = follower.client}};
    void *(*const mains[])(void *) = {read_single,  read_batches, read_batches,
                                      write_chunks, write_chunks, follow_events};
    run_threads(&bed, threads, mains, 6);
    bed_audit(&bed);
    leave(&bed, &readers);
    leave(&bed, &writer);
    leave(&bed, &follower);
    bed_audit(&bed);
    CHECK_EQ(bed.keeper->count.granted_bytes, 0);
    bed_close(&bed);
}

/* The limit on leased bytes is counted by several threads, and is a refusal, never a wrong byte. */
static void a_limited_session_in_threads(void)
{
    struct bed bed = bed_open(4 * MIB, 256, 512, "lru");
    CHECK_EQ(cn_keeper_start(bed.keeper), CN_OK);
    struct bed_session readers = join(&bed, 8 * CHUNK_BYTES);
    struct bed_session writer = join(&bed, UINT64_MAX);
    struct thread threads[4] = {{.client = readers.client},
                                {.client = readers.client},
                                {.client = readers.client},
                                {.client = writer.client}};
    void *(*const mains[])(void *) = {read_single, read_batches, read_batches, write_chunks};
    run_threads(&bed, threads, mains, 4);
    bed_audit(&bed);
    leave(&bed, &readers);
    leave(&bed, &writer);
    bed_close(&bed);
}

int main(void)
{
    RUN(readers_writers_and_keeper);
    RUN(a_limited_session_in_threads);
    return TEST_PASS;
}
