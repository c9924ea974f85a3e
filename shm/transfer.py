# SPDX-License-Identifier: Apache-2.0
"""
How bytes get into the pool and out of it: what can be copied from, copies, whole prompts.

A single put is C: see cffi_src/lease/put.c.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cenote._native import _core, _lease, _short

from . import errors
from .handle import KEEP_GIL_BELOW_BYTES, KEY_BYTES, Handle

if TYPE_CHECKING:
    from _cffi_backend import CData

_lib: Final = _core.lib
_ffi: Final = _core.ffi


class Record(NamedTuple):
    """What is recorded beside a chunk; see `cenote.client.namespace.Cache.put`."""

    slot: int
    key: bytes
    parent: bytes | None
    position: int
    ttl_s: int = 0
    priority: int = 0
    flags: int = 0


class Source:
    """
    Readable memory: where it is, how long, and what must live meanwhile.

    Args:
        obj: A contiguous object with the buffer protocol, an array, or a torch tensor on the CPU.

    Raises:
        TypeError: It has no memory that can be read.
        ValueError: It is not contiguous, or lies on a device.
    """

    __slots__ = ("_keep", "at", "nbytes")

    def __init__(self, obj: Any) -> None:
        self._keep = as_buffer(obj)
        self.at: CData = _ffi.from_buffer(self._keep)
        self.nbytes = len(self.at)


def as_buffer(obj: Any) -> Any:
    """Return something with the buffer protocol over the bytes of *obj*; see Source."""
    if type(obj) in {bytes, bytearray}:
        return obj
    if hasattr(obj, "data_ptr") and hasattr(obj, "untyped_storage"):
        return _tensor_bytes(obj)
    try:
        view = memoryview(obj)
    except (TypeError, ValueError, BufferError):
        return _array_bytes(obj)
    if view.c_contiguous:
        return view
    raise ValueError(
        f"the buffer is not contiguous (shape {view.shape}, strides {view.strides}): make it so, "
        "or write into .memory yourself"
    )


def _array_bytes(obj: Any) -> Any:
    """Element types that have no buffer format (ml_dtypes' bfloat16) are seen as bytes."""
    if not hasattr(obj, "__array_interface__"):
        raise TypeError(
            f"a {type(obj).__name__} has no memory to copy from: give an object with the buffer "
            "protocol, an array or a CPU tensor"
        )
    import numpy as np

    values = np.asarray(obj)
    if not values.flags.c_contiguous:
        raise ValueError(f"the array of shape {values.shape} is not contiguous: make it so")
    flat: Any = values.reshape(-1).view(np.uint8)
    return memoryview(flat)


def _tensor_bytes(tensor: Any) -> Any:
    import torch

    if tensor.device.type != "cpu":
        raise ValueError(
            f"the tensor lies on {tensor.device}: copy it into w.tensor(), and commit "
            "after the copy's event"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"the tensor of shape {tuple(tensor.shape)} is not contiguous")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def copy_out(address: int, nbytes: int, target: Any) -> None:
    """
    Copy *nbytes* from *address* to writable memory of exactly that length.

    Raises:
        ValueError: Another length, or not contiguous.
        BufferError, TypeError: Not writable.
        ChunkLost: The medium failed under it (where guard_copies() was called; else SIGBUS).
    """
    at = _ffi.from_buffer(as_buffer(target), require_writable=True)
    if len(at) != nbytes:
        raise ValueError(f"the target has {len(at)} bytes, and the chunk has {nbytes}")
    source = _ffi.cast("void *", address)
    _check_copy(_lib_for(nbytes).cn_guarded_copy_out(at, source, nbytes))


class Pieces:
    """
    Pieces of memory, as the C core wants them: an array of addresses and one of lengths.

    An address of 0 is a piece that nobody wants. What lies at the others is the caller's: it must
    be memory of that length for as long as it is copied to.

    Args:
        addresses: An array('Q'), a uint64 array, or another buffer of one dimension of unsigned
            numbers of 64 bits.
        lengths: The same, of as many.

    Raises:
        TypeError: One of them has no buffer.
        ValueError: Other numbers, not as many of both, or lengths that overflow together.
    """

    __slots__ = ("_at", "_keep", "count", "nbytes")

    def __init__(self, addresses: Any, lengths: Any) -> None:
        at, bytes_at = _numbers(addresses, "addresses"), _numbers(lengths, "lengths")
        self.count = len(at)
        if len(bytes_at) != self.count:
            raise ValueError(
                f"there are {self.count} addresses and {len(bytes_at)} lengths: give a length for "
                "each"
            )
        total = _ffi.new("uint64_t *")
        if _short.lib.cn_pieces_bytes(bytes_at, self.count, total) != _lib.CN_OK:
            raise ValueError(
                f"the {self.count} lengths are together larger than any memory: look at what they "
                "count"
            )
        self.nbytes = int(total[0])
        self._at = _ffi.new("struct cn_pieces *", (at, bytes_at, self.count, self.nbytes))
        self._keep = (at, bytes_at)

    def copy_from(self, address: int, crc: int | None) -> int | None:
        """Fill them with what lies at *address* of the pool; see scatter()."""
        summed = _ffi.NULL if crc is None else _ffi.new("uint32_t *", crc)
        source = _ffi.cast("void *", address)
        status = _lib_for(self.nbytes).cn_guarded_scatter(self._at, source, summed)
        if status == _lib.CN_EINVAL:
            raise ValueError(
                f"one of {self.count} pieces ends beyond all memory, or the arrays changed during "
                "the call: take nothing of them for copied"
            )
        _check_copy(status)
        return None if crc is None else int(summed[0])


def _numbers(obj: Any, name: str) -> CData:
    """Return the unsigned 64-bit numbers of *obj* as a C array that keeps them."""
    try:
        view = memoryview(obj)
    except TypeError:
        raise TypeError(
            f"{name} is a {type(obj).__name__}, which has no buffer: give an array('Q') or a "
            "uint64 array"
        ) from None
    unsigned = view.itemsize == 8 and view.format.lstrip("@=<") in {"Q", "L"}  # ctypes says <L
    if not unsigned or view.ndim != 1 or not view.c_contiguous:
        raise ValueError(
            f"{name} has {view.ndim} dimensions of format {view.format!r}, strides {view.strides}: "
            "give one contiguous dimension of unsigned numbers of 64 bits, as an array('Q') or a "
            "uint64 array"
        )
    at = _ffi.from_buffer("uint64_t[]", view)
    if len(at) and int(_ffi.cast("uintptr_t", at)) % 8:
        raise ValueError(f"{name} is not aligned to 8 bytes: copy it into an array('Q')")
    return at


def scatter(address: int, addresses: Any, lengths: Any, crc: int | None) -> int | None:
    """
    Copy what lies at *address* of the pool to pieces of memory, in one call into C.

    Args:
        address: Where the bytes of all pieces begin; the caller holds a lease on all of them.
        addresses: Where each piece goes, 0 for one that nobody wants; see Pieces.
        lengths: How long each is.
        crc: None, or the CRC-32C of what stands before these bytes, 0 at the beginning.

    Returns:
        The CRC-32C of both together, skipped pieces included: the *crc* of the next call. None
        where none was asked for.

    Raises:
        TypeError, ValueError: See Pieces.
        ChunkLost: The medium failed under it (where guard_copies() was called; else SIGBUS).
    """
    return Pieces(addresses, lengths).copy_from(address, crc)


def guard_copies() -> None:
    """
    Turn a failing medium under copy_from() and copy_to() into ChunkLost instead of SIGBUS.

    Installs a SIGBUS handler for the whole process, once; every fault elsewhere, one in a raw view
    above all, goes to the handler that was there before. More calls change nothing.
    """
    failed = _ffi.new("struct cn_syserr *")
    for lib in (_lib, _short.lib):  # each module links a guard of its own; installs chain
        errors.check(lib.cn_guard_install(failed), "install the SIGBUS handler", errno=failed.err)
    _lease.install_guard()


def _lib_for(nbytes: int) -> Any:
    """Return the functions that keep the GIL for a short copy, else those that release it."""
    return _short.lib if nbytes < KEEP_GIL_BELOW_BYTES else _lib


def _check_copy(status: int) -> None:
    errors.check(status, "copy to or from the pool")


class Prompt:
    """
    The buffers of one prompt, as the C core wants them: two arrays, addresses and lengths.

    Args:
        buffers: A sequence of what Source takes, or one array whose first axis counts the chunks.
    """

    __slots__ = ("_keep", "addresses", "count", "lengths")

    def __init__(self, buffers: Any) -> None:
        if hasattr(buffers, "__array_interface__") and buffers.ndim > 1:
            self._take_array(buffers)
        else:
            self._take_sequence(buffers)

    def _take_sequence(self, buffers: Sequence[Any]) -> None:
        sources = [Source(buffer) for buffer in buffers]
        self.count = len(sources)
        self.addresses = array("Q", [int(_ffi.cast("uintptr_t", s.at)) for s in sources])
        self.lengths = array("Q", [s.nbytes for s in sources])
        self._keep: Any = sources

    def _take_array(self, values: Any) -> None:
        row = values[:1]
        if not row.flags.c_contiguous:
            raise ValueError(f"a row of the array of shape {values.shape} is not contiguous")
        self.count = int(values.shape[0])
        interface = values.__array_interface__
        first, step = int(interface["data"][0]), int(values.strides[0])
        self.addresses = array("Q", [first + i * step for i in range(self.count)])
        self.lengths = array("Q", [int(row.nbytes)]) * self.count
        self._keep = values

    def total_bytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(self.lengths)


def put_many(
    handle: Handle[Any, Any],
    prompt: Prompt,
    first: Record,
    *,
    crc: bool,
    wait_ms: int,
) -> int:
    """
    Reserve, copy and commit a prompt's chunks in one call; return how many were committed.

    *first* has the keys of all, one behind the other, and what else is said of the first.
    A pool that is full ends it early. Every other failure raises, with `committed` as an attribute.
    """
    count = len(first.key) // KEY_BYTES
    key_at = _ffi.from_buffer("uint8_t[]", first.key)
    parent = first.parent
    parent_at = _ffi.NULL if parent is None else _ffi.from_buffer("uint8_t[]", parent)
    args = _ffi.new("struct cn_put_many *")
    args.ns_slot, args.key_count, args.keys = first.slot, count, key_at
    args.data = _ffi.cast("void **", _ffi.from_buffer(prompt.addresses))
    args.data_bytes = _ffi.cast("uint64_t *", _ffi.from_buffer(prompt.lengths))
    args.parent_key, args.position = parent_at, first.position
    args.ttl_s, args.priority, args.flags = first.ttl_s, first.priority, first.flags
    args.crc, args.wait_ms = crc, wait_ms
    done = _ffi.new("uint32_t *")
    status = _lib.cn_put_many(handle.client, args, done)
    committed = int(done[0])
    if status < 0 and status != _lib.CN_EFULL:
        what = f"put chunk {committed} of {count} into pool {handle.pool!r}"
        error = errors.error_of(status, what)
        error.add_note(f"the {committed} before it were committed")
        error.committed = committed  # type: ignore[attr-defined]  # documented on put_many
        raise error
    return committed
