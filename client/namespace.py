# SPDX-License-Identifier: Apache-2.0
"""
A namespace of a pool, as an engine uses it: look up, lease, store.

The methods of the hit path are replaced on each instance by C callables with the namespace's slot
bound, so that a hit costs no Python frame. After a reconnect they are bound to the new pool; who
holds an older one goes on reading the old pool, correctly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from cenote.shm import handle as _handle
from cenote.shm import transfer as _transfer

from .chunk import Chunk
from .errors import InvalidArgument, NotWritable, PoolGone
from .put import CHECKSUM_OFF, Put

if TYPE_CHECKING:
    from .manifest import Manifest
    from .pool import Attachment, Pool

Key = bytes | bytearray | memoryview
Keys = Key | Sequence[Key]

KEY_BYTES: Final = _handle.KEY_BYTES
PUT_WAIT_MS: Final = 1000
CALL_TIMEOUT_S: Final = 2.0
PINNED_FOR_EVER_NS: Final = (1 << 63) - 1
_U32_MAX: Final = (1 << 32) - 1


class Binding:
    """A namespace in one attachment. Immutable: a reconnect makes another one."""

    __slots__ = ("attachment", "calls", "id", "slot")

    def __init__(self, attachment: Attachment, slot: int, namespace_id: bytes) -> None:
        self.attachment = attachment
        self.calls = attachment.handle.calls
        self.slot = slot
        self.id = namespace_id


class Cache:
    """
    One namespace of a pool. Made by `Pool.namespace`; any number of threads may share it.

    Keys are 32 opaque bytes. `keys` is a sequence of them, or one bytes object of 32*n, at most
    65,536 a call; a wrong key raises ValueError with its index and length.

    Attributes:
        pool: The pool it belongs to.
        manifest: What the namespace is for.
        name: The name it was opened by, or None.
    """

    def __init__(self, pool: Pool, manifest: Manifest, name: str | None, binding: Binding) -> None:
        self.pool: Final = pool
        self.manifest: Final = manifest
        self.name: Final = name
        self._bind(binding)

    def _bind(self, binding: Binding) -> None:
        """Point every method at *binding*; each of them changes by one store."""
        self._binding = binding
        calls, slot = binding.calls, binding.slot
        self.__dict__.update(
            get=partial(calls.get, slot),
            match=partial(calls.match, slot),
            get_many=partial(calls.get_many, slot),
            lease_many=partial(calls.lease_many, slot),
        )

    @property
    def id(self) -> bytes:
        """The namespace's 32-byte id: the root of `keys.chain` (I8)."""
        return self._binding.id

    # ---- the hit path: the C callables bound by _bind() stand before these ----------------------

    def match(self, keys: Keys) -> int:
        """Return the length of the longest prefix of *keys* that is present. Touches no recency."""
        binding = self._binding
        return binding.calls.match(binding.slot, keys)

    def get(self, key: Key) -> Chunk | None:
        """
        Lease the chunk under *key*; None when the pool does not hold it.

        A full lease table, or a reader that holds its share of the pool, is answered as a miss and
        counted (`stats().lease_refused`).

        Raises:
            ValueError: The key has not 32 bytes.
            ForkedChild: This is a forked child of the process that connected.
            PoolGone: The pool was closed.
        """
        binding = self._binding
        return binding.calls.get(binding.slot, key)

    def get_many(self, keys: Keys) -> list[Chunk]:
        """Lease the longest present prefix of *keys*: the first absent key ends the list."""
        binding = self._binding
        return binding.calls.get_many(binding.slot, keys)

    def lease_many(self, keys: Keys) -> _handle.Batch:
        """
        The same as one object: arrays of addresses, lengths and references, for adapters.

        The leases end when it is released or dies. It does not know who uses the addresses: keep
        it until the last of them is done.
        """
        binding = self._binding
        return binding.calls.lease_many(binding.slot, keys)

    # ---- storing -------------------------------------------------------------------------------

    def put(
        self,
        key: Key,
        nbytes: int,
        parent: Key | Chunk | Put | None = None,
        *,
        priority: int = 0,
        ttl_s: int | None = None,
        meta: Key = b"",
        position: int | None = None,
        wait_ms: int = PUT_WAIT_MS,
    ) -> Put:
        """
        Reserve *nbytes* under *key*, to be filled and committed: `with cache.put(key, n) as w:`.

        Args:
            key: 32 bytes.
            nbytes: Length of the chunk, 1 byte to 1 GiB.
            parent: What it follows in its chain (key, chunk or put): it is evicted before that.
            priority: -128 to 127; lower goes first.
            ttl_s: Seconds after which it is gone; None for never.
            meta: Up to 4 KiB of your own, returned as `chunk.meta`.
            position: Place in the chain; by default one behind the parent's, 0 without a parent.
            wait_ms: How long to wait for memory, and later for room in the ring.

        Raises:
            ValueError: A wrong key, priority, ttl_s, meta or position.
            ChunkTooLarge: It can never fit.
            PoolFull: No memory became free within *wait_ms*.
            NotWritable: This session is a reader's.
            PoolGone: No daemon is there to link it.
        """
        binding = self._binding
        put = binding.calls.put(
            binding.slot, key, nbytes, parent, position, ttl_s, priority, meta, wait_ms
        )
        if put is None:
            self._writable()  # says why
            self._refuse()
        return put

    def put_many(
        self,
        keys: Keys,
        buffers: Sequence[Any] | Any,
        start: int = 0,
        parent: Key | Chunk | Put | None = None,
        *,
        priority: int = 0,
        ttl_s: int | None = None,
        wait_ms: int = PUT_WAIT_MS,
    ) -> int:
        """
        Store the chunks of a whole prompt: one call into C, without the GIL.

        Each chunk is the parent of the next.

        Args:
            keys: Their keys, in the order of the chain.
            buffers: Their bytes: a sequence of buffers, arrays or CPU tensors, or one array whose
                first axis counts the chunks.
            start: Chain position of the first.
            parent: What the first follows.
            priority: As for `put`, for all.
            ttl_s: As for `put`, for all.
            wait_ms: How long to wait for memory, in all.

        Returns:
            How many were committed. Fewer than given: the pool was full.

        Raises:
            ValueError: As many buffers as keys are needed; or as for `put`.
            ChunkTooLarge, NotWritable, PoolGone: As for `put`; `error.committed` says how many
                went before.
        """
        binding = self._writable()
        packed = _handle.packed_keys(keys)
        prompt = _transfer.Prompt(buffers)
        if prompt.count != len(packed) // KEY_BYTES:
            raise ValueError(
                f"{len(packed) // KEY_BYTES} keys and {prompt.count} buffers: give one for each"
            )
        if not packed:
            return 0
        return _transfer.put_many(
            binding.attachment.handle,
            prompt,
            _record(
                binding.slot,
                packed,
                _parent_key(parent),
                position=start,
                ttl_s=ttl_s,
                priority=priority,
            ),
            crc=binding.attachment.checksum != CHECKSUM_OFF,
            wait_ms=max(wait_ms, 0),
        )

    def flush(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """
        Return when all that this process committed is linked, and durable where the medium is.

        Raises:
            Timeout: Not within *timeout_s*.
            PoolGone: No daemon is there.
        """
        attachment = self._connected().attachment
        attachment.handle.flush(_milliseconds(timeout_s))

    # ---- changing what is there ----------------------------------------------------------------

    def pin(self, keys: Keys, ttl_s: int | None = None, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """
        Keep chunks from eviction for *ttl_s* seconds, or until unpin(). Returns how many.
        """
        if ttl_s is None:
            until_ns = PINNED_FOR_EVER_NS
        elif ttl_s > 0:
            until_ns = min(time.time_ns() + int(ttl_s * 1e9), PINNED_FOR_EVER_NS)
        else:
            raise ValueError(f"ttl_s is {ttl_s}: give seconds above 0, or None for ever")
        return self._keys_op(_handle.OP_PIN, keys, until_ns, timeout_s)

    def unpin(self, keys: Keys, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """Undo pin(). Returns how many were found."""
        return self._keys_op(_handle.OP_UNPIN, keys, 0, timeout_s)

    def delete(self, keys: Keys, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """
        Make chunks absent. Views of them stay good; memory returns with the last. Returns how many.
        """
        return self._keys_op(_handle.OP_DELETE, keys, 0, timeout_s)

    def _keys_op(self, op: int, keys: Keys, arg: int, timeout_s: float) -> int:
        binding = self._writable()
        packed = _handle.packed_keys(keys)
        if not packed:
            return 0
        handle = binding.attachment.handle
        return handle.keys_op(op, binding.slot, packed, arg, _milliseconds(timeout_s))

    # ---- which attachment ------------------------------------------------------------------------

    def _connected(self) -> Binding:
        binding = self._binding
        if not binding.attachment.connected:
            self._refuse()
        return binding

    def _writable(self) -> Binding:
        binding = self._binding
        attachment = binding.attachment
        if not attachment.connected or attachment.handle.forked:
            self._refuse()
        if attachment.role == "reader":
            raise NotWritable(
                f"this session may only read pool {attachment.pool!r}: connect with "
                "role='writer', and list this user under writers in [pool.access]"
            )
        return binding

    def _refuse(self) -> NoReturn:
        self.pool.refuse()  # closed, forked or gone: it knows which
        raise PoolGone(
            f"namespace {self.name or self.id.hex()[:16]!r} is not open in the pool that the "
            "daemon serves now: see the log for the reason, or open it again"
        )

    def __repr__(self) -> str:
        label = self.name or self.id.hex()[:16]
        return f"<Cache {label!r} of pool {self.pool.name!r}>"


def _one_key(key: Key, what: str) -> bytes:
    if type(key) is bytes and len(key) == KEY_BYTES:
        return key
    if not isinstance(key, bytes | bytearray | memoryview):
        raise TypeError(f"the {what} is a {type(key).__name__}: give {KEY_BYTES} bytes")
    raw = bytes(key)
    if len(raw) == KEY_BYTES:
        return raw
    raise ValueError(f"the {what} has {len(raw)} bytes: a key has {KEY_BYTES}")


def _parent_key(parent: Key | Chunk | Put | None) -> bytes | None:
    if parent is None:
        return None
    if isinstance(parent, Chunk | Put):
        return parent.key
    return _one_key(parent, "parent")


def _record(
    slot: int,
    key: bytes,
    parent: bytes | None,
    *,
    position: int,
    ttl_s: int | None,
    priority: int,
) -> _transfer.Record:
    if not 0 <= position <= _U32_MAX:
        raise ValueError(f"position {position}: give 0 .. 2^32-1")
    if not -128 <= priority <= 127:
        raise ValueError(f"priority {priority}: give -128 .. 127")
    if ttl_s is not None and not 1 <= ttl_s <= _U32_MAX:
        raise ValueError(f"ttl_s is {ttl_s}: give 1 .. 2^32-1 seconds, or None for ever")
    return _transfer.Record(slot, key, parent, position, ttl_s or 0, priority)


def _milliseconds(timeout_s: float) -> int:
    if timeout_s < 0:
        raise InvalidArgument(f"timeout_s is {timeout_s}: give 0 or more seconds")
    return min(int(timeout_s * 1000), _U32_MAX)
