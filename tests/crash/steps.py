# SPDX-License-Identifier: Apache-2.0
"""
Clients that stop at an exact step and say so; test_steps.py kills them there.

They take the steps of the C core one by one: what cn_commit() does in one call is written here
field by field, so that a death between two of its stores is a death between two lines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cenote._native import _core
from cenote.client import Cache, Manifest, connect

MANIFEST: Final = Manifest("steps", "l", "uint8", 16)
NBYTES: Final = 64 * 1024
KEY: Final = b"k" * 32  # what a step is about; absent before it
OLD: Final = b"o" * 32  # stored by the test before; its bytes are OLD_BYTES
DATA: Final = bytes(range(256)) * (NBYTES // 256)
OLD_BYTES: Final = b"old!" * (NBYTES // 4)

ffi: Final = _core.ffi
lib: Final = _core.lib


class Core:
    """One session, by its addresses."""

    def __init__(self, path: str, role: str = "writer") -> None:
        self.cache: Cache = connect(path, role=role, timeout_s=30.0).namespace(MANIFEST)
        binding: Any = self.cache._binding
        self.slot: int = binding.slot
        self.client: Any = binding.attachment.handle.client
        session = lib.cn_client_session(self.client)
        self.base: Any = ffi.cast("char *", session)
        self.head: Any = ffi.cast("struct cn_session_head *", session)
        self.catalog: Any = binding.attachment.handle.catalog
        rows = lib.CN_STOCK_ROWS * ffi.sizeof("struct cn_stock_row")
        self.leases: Any = ffi.cast(
            "uint64_t *", self.base + ffi.sizeof("struct cn_session_head") + rows
        )
        table = (self.head.lease_slots * 8 + 4095) // 4096 * 4096
        ring = ffi.cast("char *", self.leases) + table
        self.sub: Any = ffi.cast("struct cn_record *", ring)

    def reserve(self, data_bytes: int = NBYTES) -> Any:
        """Take an extent, as the first step of a put."""
        grant = ffi.new("struct cn_grant *")
        status = lib.cn_reserve(self.client, data_bytes, 0, 10_000, grant)
        assert status == lib.CN_OK, status
        return grant

    def fill(self, grant: Any, count: int = NBYTES) -> None:
        """Store the first *count* bytes of DATA."""
        ffi.memmove(grant.data, DATA[:count], count)

    def write_record(self, op: int, **fields: Any) -> None:
        """Write a record behind the tail, which does not show it yet."""
        record = self.sub[self.head.sub_tail % lib.CN_RING_RECORDS]
        ffi.memmove(ffi.addressof(record), bytes(ffi.sizeof(record)), ffi.sizeof(record))
        record.op, record.ns_slot = op, self.slot
        for name, value in fields.items():
            setattr(record, name, value)

    def write_commit(self, grant: Any) -> None:
        """Write the record of a commit."""
        key = ffi.cast("uint64_t *", ffi.from_buffer(KEY))
        self.write_record(lib.CN_OP_COMMIT, grant=grant.ref, key=list(key[0:4]), data_bytes=NBYTES)

    def show_record(self) -> None:
        """Publish the tail; no doorbell."""
        self.head.sub_tail += 1

    def old_ref(self) -> int:
        """Descriptor and generation of the chunk that the test stored."""
        chunk = self.cache.get(OLD)
        assert chunk is not None
        return int(chunk.ref)


def stop_here() -> None:
    """Say that the step is reached, and wait to be killed."""
    print("here", flush=True)
    sys.stdin.readline()


# ---- writers -------------------------------------------------------------------------------------


def attached(path: str) -> None:
    """Attached, and nothing else."""
    core = Core(path)
    stop_here()
    del core


def reserved(path: str) -> None:
    """An extent is ours, and untouched."""
    core = Core(path)
    core.reserve()
    stop_here()


def half_filled(path: str) -> None:
    """Half of the bytes are there."""
    core = Core(path)
    core.fill(core.reserve(), NBYTES // 2)
    stop_here()


def filled(path: str) -> None:
    """All bytes are there, and nobody knows."""
    core = Core(path)
    core.fill(core.reserve())
    stop_here()


def record_half_written(path: str) -> None:
    """The record has its operation and grant, and no key."""
    core = Core(path)
    grant = core.reserve()
    core.fill(grant)
    core.write_record(lib.CN_OP_COMMIT, grant=grant.ref)
    stop_here()


def record_written(path: str) -> None:
    """The record is whole; the tail does not show it."""
    core = Core(path)
    grant = core.reserve()
    core.fill(grant)
    core.write_commit(grant)
    stop_here()


def tail_published(path: str) -> None:
    """The tail shows the record; the keeper sleeps, and nobody rang."""
    core = Core(path)
    grant = core.reserve()
    core.fill(grant)
    core.write_commit(grant)
    while not core.catalog.sleeping:
        core.cache.match(KEY)
    core.show_record()
    stop_here()


def committed(path: str) -> None:
    """The doorbell was rung; nobody waited."""
    core = Core(path)
    with core.cache.put(KEY, NBYTES) as put:
        put.memory[:] = DATA
    stop_here()


def want_unanswered(path: str) -> None:
    """An extent of another size was asked for; nobody rang, and nobody waits for the answer."""
    core = Core(path)
    core.write_record(lib.CN_OP_WANT, arg=12 * 4096, data_bytes=1)
    core.show_record()
    stop_here()


def abort_unseen(path: str) -> None:
    """The extent is given back in a record that the tail does not show."""
    core = Core(path)
    grant = core.reserve()
    core.write_record(lib.CN_OP_ABORT, grant=grant.ref)
    stop_here()


def commit_twice(path: str) -> None:
    """The record of a commit lies in the ring twice."""
    core = Core(path)
    grant = core.reserve()
    core.fill(grant)
    for _ in range(2):
        core.write_commit(grant)
        core.show_record()
    stop_here()


def pinned_for_a_moment(path: str) -> None:
    """A pin was asked for, whose answer nobody will read."""
    core = Core(path)
    key = ffi.cast("uint64_t *", ffi.from_buffer(OLD))
    core.write_record(lib.CN_OP_PIN, key=list(key[0:4]), arg=1)
    core.show_record()
    core.write_record(lib.CN_OP_NOP, cookie=77)
    core.show_record()
    stop_here()


# ---- readers -------------------------------------------------------------------------------------


def lease_published(path: str) -> None:
    """The lease is in the table; it was never validated."""
    core = Core(path, "reader")
    ref = core.old_ref()
    core.leases[0] = ref
    stop_here()


def lease_beyond_the_mark(path: str) -> None:
    """The lease is in a slot that the published high-water mark does not cover yet."""
    core = Core(path, "reader")
    ref = core.old_ref()
    core.leases[core.head.lease_slots - 1] = ref
    stop_here()


def lease_held(path: str) -> None:
    """In the middle of reading."""
    core = Core(path, "reader")
    chunk = core.cache.get(OLD)
    assert chunk is not None
    assert bytes(chunk.memory[: NBYTES // 2]) == OLD_BYTES[: NBYTES // 2]
    stop_here()


def batch_held(path: str) -> None:
    """A batch of leases on the same chunk, as many as a reader may hold."""
    core = Core(path, "reader")
    leases = core.cache.lease_many(OLD * 500)
    assert len(leases) == core.catalog.capacity_bytes // 4 // NBYTES
    stop_here()


def lease_of_rubbish(path: str) -> None:
    """The table names chunks that are not, and generations that never were."""
    core = Core(path, "reader")
    for i in range(64):
        core.leases[i] = (i + 1) << 32 | (2**32 - 1 - i)
    core.leases[64] = core.old_ref() + (1 << 32)
    core.head.lease_high = 2**64 - 1
    stop_here()


LEASING: Final = ("lease_published", "lease_held", "batch_held")
STORED: Final = ("tail_published", "committed", "commit_twice")


def names() -> list[str]:
    """Every step of this file."""
    here = Path(__file__).name
    found: list[tuple[int, str]] = []
    for name, value in globals().items():
        code = getattr(value, "__code__", None)
        if code is not None and Path(code.co_filename).name == here:
            found.append((code.co_firstlineno, name))
    aside: tuple[Callable[..., Any], ...] = (names, stop_here)
    return [name for _, name in sorted(found) if globals()[name] not in aside]
