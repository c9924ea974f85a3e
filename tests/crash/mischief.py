# SPDX-License-Identifier: Apache-2.0
"""Clients of the tests of bad luck: each runs in a process of its own, out of the zygote."""

from __future__ import annotations

import contextlib
import os
import random
import select
import sys
import threading
from pathlib import Path
from typing import Any, Final

from cenote._native import _core
from cenote.client import Cache, CenoteError, Chunk, Manifest, PoolFull, connect

MANIFEST: Final = Manifest("bad luck", "l", "uint8", 16)
NBYTES: Final = 64 * 1024

ffi: Final = _core.ffi
lib: Final = _core.lib


def key_of(i: int) -> bytes:
    """The i-th key."""
    return i.to_bytes(32, "big")


def bytes_of(i: int, nbytes: int = NBYTES) -> bytes:
    """What belongs under the i-th key."""
    return random.Random(i).randbytes(256) * (nbytes // 256)


def open_cache(path: str, role: str = "writer") -> Cache:
    """Attach and open the namespace."""
    return connect(path, role=role, timeout_s=30.0).namespace(MANIFEST, timeout_s=30.0)


def hold(cache: Cache, count: int) -> list[Chunk]:
    """Lease the first *count* chunks, and say how many there were."""
    held = cache.get_many(b"".join(key_of(i) for i in range(count)))
    print(len(held), flush=True)
    return held


def same(held: list[Any]) -> bool:
    """Are all bytes what they must be?"""
    return all(bytes(memory) == bytes_of(i) for i, memory in enumerate(held))


# ---- holders -------------------------------------------------------------------------------------


def holder(path: str, role: str, count: int) -> None:
    """Hold some chunks; at each line on stdin say whether they are what they were."""
    held = hold(open_cache(path, role), count)
    for _ in sys.stdin:
        print(same([chunk.memory for chunk in held]), flush=True)


def closer_of_everything(path: str, count: int, folder: str) -> None:
    """
    Close every descriptor but stdin, stdout and stderr, and go on reading (I6). The numbers are
    taken by files of its own then.
    """
    cache = open_cache(path, "writer")
    held = hold(cache, count)
    os.closerange(3, 4096)
    files = [os.open(Path(folder, str(i)), os.O_RDWR | os.O_CREAT) for i in range(64)]
    key = held[0].key
    for _ in range(3 * lib.CN_ACCESS_SLOTS):  # until the doorbell is rung
        cache.get(key)
    with contextlib.suppress(CenoteError):
        cache.put(key, NBYTES, wait_ms=0).commit()
    with contextlib.suppress(CenoteError):
        cache.pool.stats()
    print(sum(os.fstat(file).st_size for file in files), flush=True)
    if not sys.stdin.readline():
        return
    pause = threading.Event()
    while not cache.pool.connected:  # its link makes a new session, once
        pause.wait(0.01)
    with cache.put(key_of(10**6), NBYTES, wait_ms=10_000) as w:
        w.copy_from(bytes(NBYTES))
    cache.flush(30.0)
    print(cache.pool.reconnects, cache.match(key_of(10**6)), flush=True)
    for _ in sys.stdin:
        again = [cache.get(chunk.key) for chunk in held]
        print(same([chunk.memory for chunk in held]), sum(c is not None for c in again), flush=True)
        del again


def holder_after_close(path: str, count: int) -> None:
    """Close the pool while views live; let them go at the first line, end at the second."""
    cache = open_cache(path, "reader")
    views = [chunk.memory for chunk in hold(cache, count)]
    cache.pool.close()
    sys.stdin.readline()
    print(same(views), flush=True)
    del views[:], cache
    sys.stdin.readline()


def parent_of_a_child(path: str, count: int) -> None:
    """Fork with live views; the child lives on with what it inherited, and tells its pid."""
    held = hold(open_cache(path), count)
    views = [chunk.memory for chunk in held]
    pid = os.fork()
    if pid == 0:
        held.clear()  # releases nothing: it is the parent's (I13)
        until_hung_up = select.poll()
        until_hung_up.register(0, 0)  # not its input: stdin is the parent's
        until_hung_up.poll()  # by pytest, whose end may be early
        os._exit(0)
    print(pid, flush=True)
    sys.stdin.readline()
    print(same(views), flush=True)
    sys.stdin.readline()


def stopped_writer(path: str) -> None:
    """Reserve, fill half, wait to be stopped and continued, fill the rest and commit."""
    cache = open_cache(path)
    data = bytes_of(1)
    with cache.put(key_of(1), NBYTES) as put:
        put.memory[: NBYTES // 2] = data[: NBYTES // 2]
        print("half", flush=True)
        sys.stdin.readline()
        put.memory[NBYTES // 2 :] = data[NBYTES // 2 :]
    cache.flush(timeout_s=30.0)
    print("done", flush=True)
    sys.stdin.readline()


# ---- rivals --------------------------------------------------------------------------------------


def rival(path: str, version: int, keys: int) -> None:
    """Write, delete and read the same few keys as everybody else, for ever."""
    rng = random.Random(version)
    cache = open_cache(path)
    print("working", flush=True)
    while True:
        i = rng.randrange(keys)
        try:
            with cache.put(key_of(i), NBYTES, wait_ms=50) as put:
                put.memory[:] = version_of(i, version)
        except PoolFull:
            pass
        if rng.random() < 0.2:
            cache.delete(key_of(i), timeout_s=30.0)
        found = cache.get(key_of(rng.randrange(keys)))
        if found is not None:
            check_version(found)


def version_of(i: int, version: int) -> bytes:
    """What the writer *version* stores under the i-th key."""
    return (key_of(i) + version.to_bytes(32, "big")) * (NBYTES // 64)


def check_version(chunk: Chunk) -> int:
    """Return whose version a chunk is; raise unless it is exactly one of them."""
    data = bytes(chunk.memory)
    version = int.from_bytes(data[32:64], "big")
    expected = version_of(int.from_bytes(chunk.key, "big"), version)
    if data == expected and 1 <= version <= 16:
        return version
    raise AssertionError(f"key {chunk.key.hex()}: torn between two versions")


# ---- spoilers ------------------------------------------------------------------------------------


def segment_of(cache: Cache) -> Any:
    """The session of *cache* as bytes that can be written, as its client maps it."""
    binding: Any = cache._binding
    handle: Any = binding.attachment.handle
    slots = handle.catalog.lease_slots
    session = lib.cn_client_session(handle.client)
    # A const pointer as the API has it; the pages behind it are writable, and that is the point.
    return ffi.buffer(ffi.cast("char *", session), lib.cn_session_segment_bytes(slots))


def scribbler(path: str, seed: int) -> None:
    """Fill the whole session with noise, over and over, and let the keeper look at it."""
    rng = random.Random(seed)
    cache = open_cache(path)
    segment = segment_of(cache)
    print("working", flush=True)
    while True:
        noise = rng.randbytes(4096)
        kind = rng.randrange(3)
        for at in range(0, len(segment), 4096):
            page = rng.randbytes(4096) if kind == 0 else noise if kind == 1 else bytes(4096)
            segment[at : at + len(page)] = page
        cache.pool.stats(timeout_s=30.0)


def forger(path: str, seed: int) -> None:
    """
    Submit records that are well formed and wrong: grants and chunks of others, sizes beyond all
    bounds, namespaces that are not open, operations of the daemon's own session.
    """
    rng = random.Random(seed)
    cache = open_cache(path)
    binding: Any = cache._binding
    handle: Any = binding.attachment.handle
    session = ffi.cast("char *", lib.cn_client_session(handle.client))
    head = ffi.cast("struct cn_session_head *", session)
    ring = ring_of(session, head.lease_slots)
    print("working", flush=True)
    while True:
        while head.sub_tail - head.sub_head >= lib.CN_RING_RECORDS:
            cache.pool.stats(timeout_s=30.0)
        record = ring[head.sub_tail % lib.CN_RING_RECORDS]
        ffi.buffer(ffi.addressof(record))[:] = rng.randbytes(ffi.sizeof(record))
        forge(record, rng, handle.catalog.chunk_count, binding.slot)
        head.sub_tail += 1


def forge(record: Any, rng: random.Random, chunk_count: int, slot: int) -> None:
    """Make noise look like a record."""
    record.op = rng.randrange(12)
    record.grant = rng.randrange(chunk_count) | rng.randrange(1, 40) << 32
    record.ns_slot = rng.choice([slot, slot, 0, 2, 4095, 65535])
    record.data_bytes = rng.choice([0, 1, NBYTES, 2**31, 2**32 - 1])
    record.meta_bytes = rng.choice([0, 16, 4096, 65535])
    record.arg = rng.choice([4096, NBYTES, 3, 2**30, 2**63, 0])
    if rng.random() < 0.5:
        key = ffi.cast("uint64_t *", ffi.from_buffer(key_of(rng.randrange(10_000, 10_100))))
        record.key = list(key[0:4])


def ring_of(session: Any, lease_slots: int) -> Any:
    """The submission ring in a session."""
    stock = ffi.sizeof("struct cn_session_head")
    leases = stock + lib.CN_STOCK_ROWS * ffi.sizeof("struct cn_stock_row")
    table_bytes = (lease_slots * 8 + 4095) // 4096 * 4096
    return ffi.cast("struct cn_record *", session + leases + table_bytes)


def never_drains(path: str) -> None:
    """Ask for a thousand answers and read none; then store a chunk like anybody else."""
    cache = open_cache(path)
    binding: Any = cache._binding
    handle: Any = binding.attachment.handle
    session = ffi.cast("char *", lib.cn_client_session(handle.client))
    head = ffi.cast("struct cn_session_head *", session)
    ring = ring_of(session, head.lease_slots)
    for cookie in range(1, 1001):
        record = ring[head.sub_tail % lib.CN_RING_RECORDS]
        ffi.buffer(ffi.addressof(record))[:] = bytes(ffi.sizeof(record))
        record.op, record.cookie = lib.CN_OP_NOP, cookie
        head.sub_tail += 1
    cache.pool.stats(timeout_s=30.0)
    while head.sub_head != head.sub_tail:
        cache.pool.stats(timeout_s=30.0)
    print(head.comp_tail - head.comp_head, flush=True)
    sys.stdin.readline()
