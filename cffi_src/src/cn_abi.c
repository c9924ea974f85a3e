/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ABI fingerprint: may two builds share a pool?
 *
 * Folded (FNV-1a over words) from the size of every shared structure, offset and size of each of
 * its fields, and the constants that shape a session. tests/unit/test_memory_layout.py checks that
 * no field is missing here.
 */
#include "cn_api.h"
#include "cn_arena.h"

#define SIZE(type) print = fold_in(print, sizeof(struct type))
#define FIELD(type, field)                                                                         \
    print = fold_in(print, offsetof(struct type, field) << 32 | sizeof(((struct type *)0)->field))

static uint64_t fold_in(uint64_t print, uint64_t value)
{
    return (print ^ value) * 0x100000001b3ULL;
}

static uint64_t fold_catalog(uint64_t print)
{
    SIZE(cn_chunk);
    FIELD(cn_chunk, word);
    FIELD(cn_chunk, key);
    FIELD(cn_chunk, data_off);
    FIELD(cn_chunk, size_crc);
    FIELD(cn_chunk, place);
    SIZE(cn_cold);
    FIELD(cn_cold, parent);
    FIELD(cn_cold, sequence);
    FIELD(cn_cold, committed_ns);
    FIELD(cn_cold, expires_ns);
    FIELD(cn_cold, pinned_ns);
    FIELD(cn_cold, position);
    FIELD(cn_cold, extent_pages);
    FIELD(cn_cold, meta_bytes);
    FIELD(cn_cold, priority);
    FIELD(cn_cold, uses);
    FIELD(cn_cold, last_use_s);
    FIELD(cn_cold, writer);
    SIZE(cn_bucket);
    FIELD(cn_bucket, entry);
    SIZE(cn_event);
    FIELD(cn_event, sequence);
    FIELD(cn_event, time_ns);
    FIELD(cn_event, key);
    FIELD(cn_event, what);
    FIELD(cn_event, chunk);
    SIZE(cn_namespace);
    FIELD(cn_namespace, word);
    FIELD(cn_namespace, id);
    FIELD(cn_namespace, tenant);
    FIELD(cn_namespace, quota_bytes);
    FIELD(cn_namespace, live_bytes);
    FIELD(cn_namespace, live_chunks);
    FIELD(cn_namespace, evictions);
    FIELD(cn_namespace, created_ns);
    FIELD(cn_namespace, manifest_bytes);
    FIELD(cn_namespace, name);
    FIELD(cn_namespace, manifest);
    SIZE(cn_session_entry);
    FIELD(cn_session_entry, word);
    FIELD(cn_session_entry, nonce);
    FIELD(cn_session_entry, attached_ns);
    FIELD(cn_session_entry, start_ns);
    FIELD(cn_session_entry, pid);
    FIELD(cn_session_entry, uid);
    FIELD(cn_session_entry, gid);
    FIELD(cn_session_entry, leases);
    FIELD(cn_session_entry, leased_bytes);
    FIELD(cn_session_entry, granted_bytes);
    FIELD(cn_session_entry, lease_limit_bytes);
    FIELD(cn_session_entry, label);
    FIELD(cn_session_entry, tenant);
    return print;
}

static uint64_t fold_counters(uint64_t print)
{
    SIZE(cn_counters);
    FIELD(cn_counters, commits);
    FIELD(cn_counters, duplicates);
    FIELD(cn_counters, evictions);
    FIELD(cn_counters, deletions);
    FIELD(cn_counters, expirations);
    FIELD(cn_counters, aborts);
    FIELD(cn_counters, refused);
    FIELD(cn_counters, bad_records);
    FIELD(cn_counters, grants);
    FIELD(cn_counters, grants_failed);
    FIELD(cn_counters, moves);
    FIELD(cn_counters, live_chunks);
    FIELD(cn_counters, live_bytes);
    FIELD(cn_counters, granted_bytes);
    FIELD(cn_counters, limbo_chunks);
    FIELD(cn_counters, pinned_chunks);
    FIELD(cn_counters, hits);
    FIELD(cn_counters, misses);
    FIELD(cn_counters, hit_bytes);
    FIELD(cn_counters, sessions);
    FIELD(cn_counters, sessions_opened);
    FIELD(cn_counters, sessions_died);
    FIELD(cn_counters, namespaces);
    FIELD(cn_counters, verified);
    FIELD(cn_counters, lost);
    FIELD(cn_counters, extent_bytes);
    FIELD(cn_counters, free_bytes);
    FIELD(cn_counters, waste_bytes);
    FIELD(cn_counters, access_lost);
    FIELD(cn_counters, wakeups);
    return print;
}

static uint64_t fold_super(uint64_t print)
{
    SIZE(cn_region_info);
    FIELD(cn_region_info, bytes);
    FIELD(cn_region_info, slabs_first);
    FIELD(cn_region_info, page_bytes);
    FIELD(cn_region_info, medium);
    FIELD(cn_region_info, node);
    FIELD(cn_region_info, visibility);
    FIELD(cn_region_info, persistence);
    FIELD(cn_region_info, owner);
    SIZE(cn_super);
    FIELD(cn_super, magic);
    FIELD(cn_super, layout_version);
    FIELD(cn_super, endian);
    FIELD(cn_super, abi_fingerprint);
    FIELD(cn_super, pool_id);
    FIELD(cn_super, created_ns);
    FIELD(cn_super, catalog_bytes);
    FIELD(cn_super, hash_seed);
    FIELD(cn_super, capacity_bytes);
    FIELD(cn_super, chunk_count);
    FIELD(cn_super, bucket_count);
    FIELD(cn_super, region_count);
    FIELD(cn_super, session_count);
    FIELD(cn_super, namespace_count);
    FIELD(cn_super, event_count);
    FIELD(cn_super, lease_slots);
    FIELD(cn_super, session_bytes);
    FIELD(cn_super, chunks_off);
    FIELD(cn_super, cold_off);
    FIELD(cn_super, index_off);
    FIELD(cn_super, slabs_off);
    FIELD(cn_super, namespaces_off);
    FIELD(cn_super, registry_off);
    FIELD(cn_super, events_off);
    FIELD(cn_super, pool_name);
    FIELD(cn_super, regions);
    FIELD(cn_super, immutable_crc32c);
    FIELD(cn_super, pool_state);
    FIELD(cn_super, boot_token);
    FIELD(cn_super, index_third);
    FIELD(cn_super, sleeping);
    FIELD(cn_super, keeper_pid);
    FIELD(cn_super, keeper_start_ns);
    FIELD(cn_super, boot_id);
    FIELD(cn_super, clean);
    FIELD(cn_super, sequence);
    FIELD(cn_super, dirty_starts_ns);
    FIELD(cn_super, region_verdict);
    FIELD(cn_super, event_head);
    FIELD(cn_super, counters);
    return print;
}

static uint64_t fold_session(uint64_t print)
{
    SIZE(cn_session_head);
    FIELD(cn_session_head, magic);
    FIELD(cn_session_head, layout_version);
    FIELD(cn_session_head, session_idx);
    FIELD(cn_session_head, nonce);
    FIELD(cn_session_head, lease_slots);
    FIELD(cn_session_head, role);
    FIELD(cn_session_head, lease_limit_bytes);
    FIELD(cn_session_head, lease_high);
    FIELD(cn_session_head, sub_tail);
    FIELD(cn_session_head, access_tail);
    FIELD(cn_session_head, comp_head);
    FIELD(cn_session_head, waiters);
    FIELD(cn_session_head, follows);
    FIELD(cn_session_head, sub_head);
    FIELD(cn_session_head, comp_tail);
    FIELD(cn_session_head, wake_seq);
    FIELD(cn_session_head, want_failed);
    FIELD(cn_session_head, batches);
    FIELD(cn_session_head, misses);
    FIELD(cn_session_head, lease_refused);
    SIZE(cn_stock_row);
    FIELD(cn_stock_row, extent_bytes);
    FIELD(cn_stock_row, slot);
    SIZE(cn_record);
    FIELD(cn_record, op);
    FIELD(cn_record, flags);
    FIELD(cn_record, priority);
    FIELD(cn_record, ns_slot);
    FIELD(cn_record, meta_bytes);
    FIELD(cn_record, grant);
    FIELD(cn_record, key);
    FIELD(cn_record, parent_key);
    FIELD(cn_record, data_bytes);
    FIELD(cn_record, crc32c);
    FIELD(cn_record, position);
    FIELD(cn_record, ttl_s);
    FIELD(cn_record, cookie);
    FIELD(cn_record, arg);
    SIZE(cn_completion);
    FIELD(cn_completion, cookie);
    FIELD(cn_completion, status);
    FIELD(cn_completion, op);
    FIELD(cn_completion, value);
    return print;
}

static uint64_t fold_constants(uint64_t print)
{
    const uint64_t constants[] = {
        CN_LAYOUT_VERSION, CN_RING_RECORDS, CN_COMPLETIONS, CN_ACCESS_SLOTS,
        CN_STOCK_ROWS,     CN_STOCK_SLOTS,  CN_SUPER_BYTES, CN_GRANULE_BYTES,
        CN_PAGE_BYTES,     CN_SESSIONS_MAX, CN_KEY_BYTES,   CN_NAMESPACES_MAX,
    };
    for (size_t i = 0; i < sizeof(constants) / sizeof(constants[0]); i++)
        print = fold_in(print, constants[i]);
    return print;
}

uint64_t cn_abi_fingerprint(void)
{
    uint64_t print = fold_constants(0xcbf29ce484222325ULL);
    return fold_session(fold_super(fold_counters(fold_catalog(print))));
}
