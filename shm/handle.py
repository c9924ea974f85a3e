# SPDX-License-Identifier: Apache-2.0
"""
What an attached process may do with a pool, over the C core.

A Handle stands on one Mapping. Short calls keep the GIL, calls that copy or wait release it. Who
still reads holds the mapping through `Lease.owner`, so a Handle may be dropped at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from cenote._native import _core, _lease, _short

from . import errors
from .session import CHECKSUMS

if TYPE_CHECKING:
    from _cffi_backend import CData

    from .session import Mapping

Lease = _lease.Lease
Batch = _lease.Batch
Put = _lease.Put
Span = _lease.Span
Client = _lease.Client
Buffer = bytes | bytearray | memoryview
ChunkT = TypeVar("ChunkT", bound=Lease)
PutT = TypeVar("PutT", bound=Put)

KEY_BYTES: Final = _core.lib.CN_KEY_BYTES
KEYS_PER_CALL_MAX: Final = _core.lib.CN_KEYS_PER_CALL_MAX
META_BYTES_MAX: Final = _core.lib.CN_META_BYTES_MAX
CHUNK_BYTES_MAX: Final = _core.lib.CN_CHUNK_BYTES_MAX
POSITION_UNKNOWN: Final = _core.lib.CN_POSITION_UNKNOWN
LAYOUT_VERSION: Final = _core.lib.CN_LAYOUT_VERSION
OP_PIN: Final = _core.lib.CN_OP_PIN
OP_UNPIN: Final = _core.lib.CN_OP_UNPIN
OP_DELETE: Final = _core.lib.CN_OP_DELETE
EVENTS_A_READ: Final = 256
KEEP_GIL_BELOW_BYTES: Final = _lease.KEEP_GIL_BELOW_BYTES

_POOL_ID_OFF: Final = _core.ffi.offsetof("struct cn_super", "pool_id")
_STATES_WITH_KEY: Final = (_core.lib.CN_LIVE, _core.lib.CN_DYING)
_CHUNK_BYTES: Final = _core.ffi.sizeof("struct cn_chunk")
_NAMESPACE_BYTES: Final = _core.ffi.sizeof("struct cn_namespace")


@dataclass(frozen=True, slots=True)
class RawEvent:
    """One event of the feed, as the catalog has it."""

    sequence: int
    time_ns: int
    key: bytes
    kind: int
    reason: int
    namespace_slot: int
    data_bytes: int
    ref: int


def fingerprint() -> int:
    """Return this build's ABI fingerprint; builds that agree in it may share a pool."""
    return _short.lib.cn_abi_fingerprint()


def key_count(keys: Buffer | Sequence[Buffer]) -> int:
    """Return how many keys *keys* holds; see packed_keys()."""
    return len(packed_keys(keys)) // KEY_BYTES


def packed_keys(keys: Buffer | Sequence[Buffer]) -> bytes:
    """
    Return keys as one bytes object of 32*n.

    Raises:
        ValueError: A key has not 32 bytes (its index and length are named), or there are more than
            65,536.
        TypeError: A key is not bytes-like.
    """
    if isinstance(keys, bytes | bytearray | memoryview):
        packed = bytes(keys)
        if len(packed) % KEY_BYTES:
            raise ValueError(
                f"{len(packed)} bytes of keys: key {len(packed) // KEY_BYTES} has "
                f"{len(packed) % KEY_BYTES} bytes, and a key has {KEY_BYTES}"
            )
    else:
        parts = [_checked_key(key, i) for i, key in enumerate(keys)]
        packed = b"".join(parts)
    if len(packed) // KEY_BYTES > KEYS_PER_CALL_MAX:
        raise ValueError(
            f"{len(packed) // KEY_BYTES} keys in one call; at most {KEYS_PER_CALL_MAX} are allowed:"
            " make several calls"
        )
    return packed


def _checked_key(key: Buffer, index: int) -> bytes:
    if not isinstance(key, bytes | bytearray | memoryview):
        raise TypeError(f"key {index} is a {type(key).__name__}: a key is {KEY_BYTES} bytes")
    raw = bytes(key)
    if len(raw) == KEY_BYTES:
        return raw
    raise ValueError(f"key {index} has {len(raw)} bytes: a key has {KEY_BYTES}")


def pool_id_of(mapping: Mapping) -> bytes:
    """Return the 16-byte id of the pool that *mapping* shows."""
    at = _core.ffi.cast("char *", mapping.catalog + _POOL_ID_OFF)
    return bytes(_core.ffi.buffer(at, 16))


def is_forked(mapping: Mapping) -> bool:
    """Is this process a forked child of the one that attached? (I13)"""
    return bool(_short.lib.cn_client_forked(_core.ffi.cast("struct cn_client *", mapping.ptr)))


def ring_is_roomy(mapping: Mapping) -> bool:
    """Can a commit be expected not to wait?"""
    client = _core.ffi.cast("struct cn_client *", mapping.ptr)
    session = _short.lib.cn_client_session(client)
    ring = _core.ffi.cast("struct cn_session_head *", session)
    used = (ring.sub_tail - ring.sub_head) & 0xFFFFFFFFFFFFFFFF
    return bool(used < _core.lib.CN_RING_RECORDS // 2)


def key_of(mapping: Mapping, ref: int) -> bytes | None:
    """
    Return the key of the chunk that *ref* names, or None when the descriptor moved on.

    Good without a lease: the chunk has its key only while its word is LIVE or DYING.
    """
    super_ = _core.ffi.cast("struct cn_super *", mapping.catalog)
    index, generation = ref & 0xFFFFFFFF, ref >> 32
    if index >= super_.chunk_count:
        return None
    at = mapping.catalog + super_.chunks_off + index * _CHUNK_BYTES
    chunk = _core.ffi.cast("struct cn_chunk *", at)
    if not _has_key(chunk.word, generation):
        return None
    key = bytes(_core.ffi.buffer(chunk.key))
    return key if _has_key(chunk.word, generation) else None


def _has_key(word: int, generation: int) -> bool:
    """Is this the word of a chunk of *generation* that was committed and is not free yet?"""
    return word >> 32 == generation and word >> 24 & 0xFF in _STATES_WITH_KEY


class Handle(Generic[ChunkT, PutT]):
    """
    One attachment: the hit path, and everything else that a session may ask for.

    Args:
        mapping: What `session.attach` returned.
        chunk_type: The subclass of Lease whose instances lookups return.
        put_type: The subclass of Put that reservations are.
        pool: The pool's name, for messages.
        checksum: "off", "lazy" or "commit".

    Attributes:
        calls: Hits and puts, as C callables.
    """

    __slots__ = ("calls", "catalog", "client", "mapping", "pool")

    def __init__(
        self,
        mapping: Mapping,
        chunk_type: type[ChunkT],
        put_type: type[PutT],
        pool: str,
        checksum: str,
    ) -> None:
        self.mapping = mapping
        self.pool = pool
        self.client: CData = _core.ffi.cast("struct cn_client *", mapping.ptr)
        self.catalog: CData = _core.ffi.cast("struct cn_super *", mapping.catalog)
        self.calls: Client[ChunkT, PutT] = Client(
            mapping.ptr, mapping, chunk_type, put_type, pool, CHECKSUMS.index(checksum)
        )

    @property
    def pool_id(self) -> bytes:
        """The 16-byte id of the pool; a reformatted pool has another one."""
        return pool_id_of(self.mapping)

    @property
    def leases(self) -> int:
        """How many leases this session holds."""
        return _short.lib.cn_client_leases(self.client)

    @property
    def forked(self) -> bool:
        """Is this process a forked child of the one that attached? (I13)"""
        return bool(_short.lib.cn_client_forked(self.client))

    @property
    def rings(self) -> bool:
        """Is the doorbell still ours? An os.closerange() of the engine takes it."""
        return bool(_short.lib.cn_client_rings(self.client))

    @property
    def retired(self) -> bool:
        """Has the daemon given this pool up?"""
        return bool(self.catalog.pool_state != _core.lib.CN_POOL_SERVING)

    def close(self) -> None:
        """Take no new leases or grants; what lives stays good."""
        _short.lib.cn_client_close(self.client)

    def flush(self, wait_ms: int) -> None:
        """Return when all that this session committed is linked; Timeout after *wait_ms*."""
        status = _core.lib.cn_flush(self.client, wait_ms)
        errors.check(status, f"flush this session's commits to pool {self.pool!r}")

    def keys_op(self, op: int, slot: int, keys: bytes, arg: int, wait_ms: int) -> int:
        """Ask the keeper for *op* on each key; return for how many it took effect."""
        done = _core.ffi.new("uint32_t *")
        count = len(keys) // KEY_BYTES
        status = _core.lib.cn_keys_op(self.client, op, slot, keys, count, arg, wait_ms, done)
        errors.check(status, f"pin, unpin or delete {count} keys in pool {self.pool!r}")
        return int(done[0])

    def namespace_id(self, slot: int) -> bytes:
        """Return the id of the namespace in *slot*; zeroes when there is none."""
        if not 0 < slot < self.catalog.namespace_count:
            return bytes(32)
        at = self.mapping.catalog + self.catalog.namespaces_off + slot * _NAMESPACE_BYTES
        return bytes(_core.ffi.buffer(_core.ffi.cast("struct cn_namespace *", at).id))

    @property
    def event_head(self) -> int:
        """The sequence number that the next event will have."""
        return max(int(self.catalog.event_head), 1)

    def read_events(self, sequence: int) -> tuple[list[RawEvent], int, int]:
        """
        Return (events from *sequence* on, the sequence to go on from, how many before were lost).
        """
        at = _core.ffi.new("uint64_t *", sequence)
        count, lost = _core.ffi.new("uint32_t *"), _core.ffi.new("uint64_t *")
        events = _core.ffi.new("struct cn_event[]", EVENTS_A_READ)
        status = _short.lib.cn_events_read(self.catalog, at, EVENTS_A_READ, events, count, lost)
        errors.check(status, f"read the events of pool {self.pool!r}")
        return list(_raw_events(events, count[0])), int(at[0]), int(lost[0])

    def wait_events(self, sequence: int, wait_ms: int) -> None:
        """Sleep until event *sequence* may be there, at most *wait_ms*."""
        status = _core.lib.cn_events_wait(self.client, sequence, wait_ms)
        if status != _core.lib.CN_ETIME:
            errors.check(status, f"wait for events of pool {self.pool!r}")


def _raw_events(events: CData, count: int) -> Iterator[RawEvent]:
    for i in range(count):
        event = events[i]
        what = event.what
        yield RawEvent(
            sequence=event.sequence,
            time_ns=event.time_ns,
            key=bytes(_core.ffi.buffer(event.key)),
            kind=what & 0xFF,
            reason=what >> 8 & 0xFF,
            namespace_slot=what >> 16 & 0xFFFF,
            data_bytes=what >> 32,
            ref=event.chunk,
        )
