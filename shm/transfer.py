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
