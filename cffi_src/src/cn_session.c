/* SPDX-License-Identifier: Apache-2.0 */
/* The keeper's half of a session. Whatever the client wrote is hostile input (I4). */
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cn_crash.h"
#include "cn_keeper.h"

/* ---- records -------------------------------------------------------------- */

bool cn_session_may_write(const struct cn_keeper *k, const struct cn_session *s, uint32_t ns)
{
    return s->role >= CN_ROLE_WRITER && s->tenant != CN_TENANT_NONE && ns != 0 &&
           ns < CN_NAMESPACES_MAX && k->catalog.namespaces[ns].word != 0 &&
           k->catalog.namespaces[ns].tenant == s->tenant;
}

/* In the registry, so that it is known to the keeper's successor, too. */
void cn_session_set_tenant(struct cn_keeper *k, struct cn_session *s, uint64_t tenant)
{
    s->tenant = tenant;
    cn_store_relaxed(&k->catalog.registry[s->idx].tenant, tenant);
    CN_CRASH_POINT(session_tenant);
}

static uint32_t find_for(struct cn_keeper *k, const struct cn_session *s, const struct cn_record *r)
{
    if (!cn_session_may_write(k, s, r->ns_slot)) {
        k->count.refused++;
        return CN_NONE;
    }
    struct cn_key key;
    memcpy(&key, r->key, sizeof(key));
    struct cn_hash h = cn_hash_key(k->catalog.hash_seed, r->ns_slot, &key);
    uint32_t d;
    uint64_t word;
    return cn_index_find(&k->catalog, h, r->ns_slot, &key, &d, &word) ? d : CN_NONE;
}

static void do_keyed(struct cn_keeper *k, struct cn_session *s, const struct cn_record *r)
{
    uint32_t d = find_for(k, s, r);
    if (d == CN_NONE)
        return;
    bool took_effect = true;
    if (r->op == CN_OP_PIN) {
        took_effect = cn_set_pin(k, d, r->arg);
    } else if (r->op == CN_OP_UNPIN) {
        cn_clear_pin(k, d);
    } else {
        cn_unlink_one(k, d, CN_EVENT_DELETED, CN_BY_CLIENT);
        k->count.deletions++;
    }
    s->op_done += took_effect;
}

static void do_nop(struct cn_session *s, const struct cn_record *r)
{
    uint64_t used = s->comp_tail - cn_load_acquire(&s->head->comp_head);
    uint64_t value = s->op_done;
    s->op_done = 0;
    if (r->cookie == 0)
        return; /* it only ends the count of a call that gave up */
    if (used >= CN_COMPLETIONS)
        return; /* it does not drain: it gets nothing more, and nobody waits for it */
    s->comp[s->comp_tail % CN_COMPLETIONS] =
        (struct cn_completion){.cookie = r->cookie, .op = r->op, .value = value};
    cn_store_release(&s->head->comp_tail, ++s->comp_tail);
    CN_CRASH_POINT(completion);
}

static void do_report(struct cn_keeper *k, const struct cn_session *s, const struct cn_record *r)
{
    uint32_t d = cn_live_of(k, r->grant);
    if (s->internal == 0 || d == CN_NONE)
        return;
    if (r->op == CN_OP_CRC) {
        cn_set_crc(k, r->grant, r->crc32c);
        return;
    }
    cn_lose(k, d);
}

static void do_record(struct cn_keeper *k, struct cn_session *s, const struct cn_record *r)
{
    switch (r->op) {
    case CN_OP_COMMIT:
        cn_stock_used(k, s, r);
        cn_link(k, s, r);
        break;
    case CN_OP_ABORT:
        k->count.aborts += cn_grant_drop(k, s, r->grant);
        break;
    case CN_OP_WANT:
        cn_stock_want(k, s, r);
        break;
    case CN_OP_PIN:
    case CN_OP_UNPIN:
    case CN_OP_DELETE:
        do_keyed(k, s, r);
        break;
    case CN_OP_CRC:
    case CN_OP_LOST:
        do_report(k, s, r);
        break;
    case CN_OP_NOP:
        do_nop(s, r);
        break;
    default:
        k->count.bad_records++;
    }
}

bool cn_session_has_work(const struct cn_session *s)
{
    return !s->broken && cn_load_acquire(&s->head->sub_tail) != s->sub_head;
}

void cn_session_publish(struct cn_keeper *k, struct cn_session *s, bool wake)
{
    cn_store_release(&s->head->sub_head, s->sub_head);
    if (!wake)
        return;
    cn_fence(); /* pairs with the client's fence between waiters + 1 and its last look */
    if (cn_load_relaxed(&s->head->waiters) == 0)
        return;
    cn_store32_release(&s->head->wake_seq, cn_load32_relaxed(&s->head->wake_seq) + 1);
    k->ops.wake(&s->head->wake_seq);
}

uint32_t cn_session_drain(struct cn_keeper *k, struct cn_session *s, uint32_t records_max)
{
    if (s->broken)
        return 0;
    uint64_t pending = cn_load_acquire(&s->head->sub_tail) - s->sub_head;
    if (pending == 0)
        return 0;
    if (pending > CN_RING_RECORDS) {
        s->broken = true; /* a tail that cannot be: nothing of this ring is believed any more */
        k->count.bad_records++;
        return 0;
    }
    cn_session_read_access(k, s); /* a request's hits come before what it adds */
    uint32_t n = pending < records_max ? (uint32_t)pending : records_max;
    for (uint32_t i = 0; i < n; i++) {
        struct cn_record record; /* copied once, then validated, then used (I4) */
        memcpy(&record, &s->sub[s->sub_head % CN_RING_RECORDS], sizeof(record));
        do_record(k, s, &record);
        CN_CRASH_POINT(record_done);
        s->sub_head++;
        if (record.op != CN_OP_DELETE)
            continue; /* seen again by a successor, it does nothing more (I5) */
        /* At once: seen again it would delete what was stored under its key since. */
        cn_store_release(&s->head->sub_head, s->sub_head);
        CN_CRASH_POINT(record_head);
    }
    cn_unlink_flush(k);
    cn_stock_refill(k, s);
    cn_session_publish(k, s, true);
    return n;
}

/* ---- open and end --------------------------------------------------------- */

static void write_head(const struct cn_session *s, uint32_t lease_slots, uint64_t lease_limit_bytes)
{
    struct cn_session_head *head = s->head;
    head->layout_version = CN_LAYOUT_VERSION;
    head->session_idx = s->idx;
    head->nonce = s->nonce;
    head->lease_slots = lease_slots;
    head->role = s->role;
    head->lease_limit_bytes = lease_limit_bytes;
    head->magic = CN_SESSION_MAGIC;
}

static void write_entry(struct cn_keeper *k, const struct cn_session *s,
                        const struct cn_session_open *o)
{
    struct cn_session_entry *entry = &k->catalog.registry[s->idx];
    entry->nonce = s->nonce;
    entry->attached_ns = k->realtime_ns;
    entry->start_ns = o->start_ns;
    entry->pid = o->pid;
    entry->uid = o->uid;
    entry->gid = o->gid;
    entry->leases = entry->leased_bytes = entry->granted_bytes = 0;
    entry->lease_limit_bytes = o->lease_limit_bytes;
    entry->tenant = s->tenant;
    memset(entry->label, 0, sizeof(entry->label));
    if (o->label != NULL)
        strncpy(entry->label, o->label, sizeof(entry->label) - 1);
    CN_CRASH_POINT(session_fields);
    uint64_t state = o->opening != 0 ? CN_SESSION_OPENING : CN_SESSION_OPEN;
    cn_store_release(&entry->word, state | (uint64_t)s->role << 8); /* fields first */
    CN_CRASH_POINT(session_word);
}

static int watch_one(struct cn_keeper *k, int fd, uint64_t tag, uint32_t events)
{
    struct epoll_event event = {.events = events, .data = {.u64 = tag}};
    if (fd < 0 || k->epoll_fd < 0)
        return CN_OK;
    return epoll_ctl(k->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0 ? CN_OK : CN_ESYS;
}

/* Edge-triggered and never read: a client cannot make us block, nor steal a wake-up. */
static int watch(struct cn_keeper *k, const struct cn_session *s)
{
    int status = watch_one(k, s->doorbell_fd, (uint64_t)s->idx << 1, EPOLLIN | EPOLLET);
    if (status == CN_OK)
        status = watch_one(k, s->pidfd, (uint64_t)s->idx << 1 | 1, EPOLLIN | EPOLLONESHOT);
    return status;
}

static uint32_t free_session_idx(const struct cn_keeper *k)
{
    for (uint32_t i = 0; i < CN_SESSIONS_MAX; i++)
        if (k->sessions[i] == NULL)
            return i;
    return CN_NONE;
}

struct cn_session *cn_session_new(struct cn_keeper *k, const struct cn_session_open *o,
                                  uint32_t idx, uint64_t nonce)
{
    struct cn_session *s = calloc(1, sizeof(*s));
    uint32_t slots = k->catalog.lease_slots;
    uint8_t *base = o->segment;
    if (s == NULL)
        return NULL;
    s->head = (void *)base;
    s->stock = (void *)(base + cn_session_stock_off());
    s->leases = (void *)(base + cn_session_leases_off());
    s->sub = (void *)(base + cn_session_sub_off(slots));
    s->comp = (void *)(base + cn_session_comp_off(slots));
    s->access_log = (void *)(base + cn_session_access_off(slots));
    s->segment_bytes = o->segment_bytes;
    s->nonce = nonce;
    s->grant_head = CN_NONE;
    s->idx = idx;
    s->role = o->role;
    s->internal = o->internal;
    s->liveness_fd = o->liveness_fd;
    s->doorbell_fd = o->doorbell_fd;
    s->pidfd = o->pidfd;
    s->tenant = CN_TENANT_NONE;
    if (watch(k, s) != CN_OK) {
        free(s);
        return NULL;
    }
    return s;
}

/* In the scan set before its descriptor is sent (I3). */
void cn_session_enter(struct cn_keeper *k, struct cn_session *s)
{
    k->sessions[s->idx] = s;
    k->session_list[k->session_count++] = s->idx;
    k->count.sessions++;
}

int cn_do_session_open(struct cn_keeper *k, void *args)
{
    struct cn_session_open *o = args;
    if (o->segment == NULL || o->segment_bytes < cn_session_bytes(k->catalog.lease_slots) ||
        o->role < CN_ROLE_READER || o->role > CN_ROLE_ADMIN)
        return CN_EINVAL;
    uint32_t idx = free_session_idx(k);
    if (idx == CN_NONE)
        return CN_ELIMIT;
    struct cn_session *s = cn_session_new(k, o, idx, k->next_nonce);
    if (s == NULL)
        return CN_ENOMEM;
    k->next_nonce++;
    write_head(s, k->catalog.lease_slots, o->lease_limit_bytes);
    cn_session_enter(k, s);
    write_entry(k, s, o);
    k->count.sessions_opened++;
    o->ret_session = idx;
    o->ret_nonce = s->nonce;
    return CN_OK;
}

/* Not its successor in the same place. */
static struct cn_session *session_of(const struct cn_keeper *k, uint32_t session, uint64_t nonce)
{
    struct cn_session *s = session < CN_SESSIONS_MAX ? k->sessions[session] : NULL;
    return s != NULL && s->nonce == nonce ? s : NULL;
}

int cn_do_session_confirm(struct cn_keeper *k, void *args)
{
    const struct cn_hint_args *confirm = args;
    struct cn_session *s = session_of(k, confirm->session, confirm->nonce);
    if (s == NULL)
        return CN_EMISS;
    s->death_check_ns = 0; /* its client was just heard of */
    cn_store_release(&k->catalog.registry[s->idx].word, CN_SESSION_OPEN | (uint64_t)s->role << 8);
    CN_CRASH_POINT(session_open);
    return CN_OK;
}

int cn_do_session_demote(struct cn_keeper *k, void *args)
{
    const struct cn_demote_args *demote = args;
    struct cn_session *s = session_of(k, demote->session, demote->nonce);
    if (demote->role < CN_ROLE_READER || demote->role > CN_ROLE_ADMIN)
        return CN_EINVAL;
    if (s == NULL)
        return CN_EMISS;
    if (demote->role >= s->role)
        return CN_OK;
    s->role = demote->role;
    cn_store_release(&k->catalog.registry[s->idx].word, CN_SESSION_OPEN | (uint64_t)s->role << 8);
    if (s->role >= CN_ROLE_WRITER)
        return CN_OK;
    cn_session_revoke_stock(k, s);
    return CN_OK;
}

int cn_do_session_hint(struct cn_keeper *k, void *args)
{
    const struct cn_hint_args *hint = args;
    struct cn_session *s = session_of(k, hint->session, hint->nonce);
    if (s == NULL)
        return CN_EMISS;
    s->death_check_ns = k->monotonic_ns;
    s->death_period_ns = CN_DEATH_LOOK_NS;
    return CN_OK;
}

/* Did the process exit, or did it only close its pool? */
static bool process_gone(const struct cn_session *s)
{
    struct pollfd poll_fd = {.fd = s->pidfd, .events = POLLIN};
    return s->pidfd >= 0 && poll(&poll_fd, 1, 0) == 1;
}

/* A client may keep the doorbell open: closing ours alone would leave it in the epoll set. */
static void unwatch(struct cn_keeper *k, int fd)
{
    if (fd < 0)
        return;
    if (k->epoll_fd >= 0)
        epoll_ctl(k->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
    close(fd);
}

/* Out of this process; in the catalog, and for a successor, it goes on. */
void cn_session_forget(struct cn_keeper *k, struct cn_session *s)
{
    for (uint32_t i = 0; i < k->session_count; i++)
        if (k->session_list[i] == s->idx)
            k->session_list[i] = k->session_list[--k->session_count];
    k->sessions[s->idx] = NULL;
    if (s->liveness_fd >= 0) {
        munmap(s->head, s->segment_bytes);
        close(s->liveness_fd);
    }
    unwatch(k, s->doorbell_fd);
    unwatch(k, s->pidfd);
    free(s);
}

void cn_session_end(struct cn_keeper *k, struct cn_session *s)
{
    /* Whole records it left behind count; half a record is not in the ring yet. */
    for (uint32_t i = 0; i < CN_RING_RECORDS / CN_ROUND_RECORDS && cn_session_has_work(s); i++)
        cn_session_drain(k, s, CN_ROUND_RECORDS);
    while (s->grant_head != CN_NONE) {
        uint32_t d = s->grant_head;
        cn_grant_drop(k, s, cn_ref(d, cn_word_gen(cn_chunk_word(k, d))));
    }
    cn_session_fold(k, s);
    k->count.sessions_died += process_gone(s);
    CN_CRASH_POINT(session_emptied);
    cn_store_release(&k->catalog.registry[s->idx].word, CN_SESSION_FREE);
    CN_CRASH_POINT(session_free);
    cn_session_forget(k, s);
    k->count.sessions--;
    cn_limbo_look(k); /* its leases are gone */
}

static void fill_info(struct cn_keeper *k, struct cn_session *s, struct cn_session_info *ret)
{
    *ret = (struct cn_session_info){
        .nonce = s->nonce,
        .granted_bytes = s->granted_bytes,
        .hits = cn_session_hits(s),
        .misses = cn_load_relaxed(&s->head->misses),
        .lease_refused = cn_load_relaxed(&s->head->lease_refused),
        .state = s->broken ? CN_SESSION_DYING : CN_SESSION_OPEN,
        .role = s->role,
        .pid = k->catalog.registry[s->idx].pid,
        .uid = k->catalog.registry[s->idx].uid,
        .gid = k->catalog.registry[s->idx].gid,
        .session = s->idx,
    };
    for (uint32_t slot = 0; slot < k->catalog.lease_slots; slot++) {
        uint64_t ref = cn_load_acquire(&s->leases[slot]);
        uint32_t d = cn_ref_d(ref);
        if (ref == 0 || d >= k->catalog.chunk_count ||
            cn_word_gen(cn_chunk_word(k, d)) != cn_ref_gen(ref))
            continue;
        ret->leases++;
        ret->leased_bytes += (uint32_t)k->catalog.chunks[d].size_crc;
        ret->limbo_chunks += cn_word_state(cn_chunk_word(k, d)) == CN_DYING;
    }
    k->catalog.registry[s->idx].leases = ret->leases;
    k->catalog.registry[s->idx].leased_bytes = ret->leased_bytes;
    k->catalog.registry[s->idx].granted_bytes = ret->granted_bytes;
}

int cn_do_session_info(struct cn_keeper *k, void *args)
{
    const struct cn_info_args *info = args;
    uint32_t n = 0;
    for (uint32_t i = 0; i < k->session_count && n < info->max; i++)
        fill_info(k, k->sessions[k->session_list[i]], &info->infos[n++]);
    *info->count = n;
    return CN_OK;
}
