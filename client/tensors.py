# SPDX-License-Identifier: Apache-2.0
"""
Arrays and tensors over a chunk's memory, without a copy.

numpy and torch are imported when they are first needed. Whatever is made here holds the chunk's
lease until it dies itself. A tensor and a DLPack consumer do not know that the memory is mapped
read-only: an in-place operation on them faults (SIGSEGV) instead of changing somebody's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from cenote.shm.handle import Lease, Span
from cenote.shm.transfer import copy_out

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import DTypeLike, NDArray

DLPACK_CPU: Final = (1, 0)  # kDLCPU, device 0


def array_over(
    buffer: Any, nbytes: int, dtype: DTypeLike, shape: int | Sequence[int] | None
) -> NDArray[Any]:
    """Return an array over *nbytes* of a buffer; see `Chunk.numpy` and `Put.numpy`."""
    import numpy as np

    kind = _numpy_dtype(np, dtype)
    _check_shape(nbytes, kind.itemsize, shape, str(dtype))
    values: NDArray[Any] = np.frombuffer(buffer, dtype=kind)
    return values if shape is None else values.reshape(shape)


def _numpy_dtype(np: Any, dtype: DTypeLike) -> np.dtype[Any]:
    try:
        return np.dtype(dtype)  # type: ignore[no-any-return]  # np is Any: a lazy import
    except TypeError:
        if not isinstance(dtype, str):
            raise
    try:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, dtype))  # type: ignore[no-any-return]  # as above
    except (ImportError, AttributeError, TypeError):
        raise TypeError(
            f"numpy has no element type {dtype!r}: install ml_dtypes, use chunk.tensor(), or take "
            "'uint8' and cast"
        ) from None


def tensor_of(
    lease: Lease,
    dtype: torch.dtype | str,
    shape: int | Sequence[int] | None = None,
    *,
    copy: bool = False,
) -> torch.Tensor:
    """Return a tensor over the chunk, or over a private copy of it; see `Chunk.tensor`."""
    if not copy:
        # torch has no read-only tensors and would warn about a read-only buffer; the mapping
        # protects the bytes.
        return tensor_over(writable_face(lease), lease.nbytes, dtype, shape)
    import torch

    raw = torch.empty(lease.nbytes, dtype=torch.uint8)
    with lease.memory:
        copy_out(lease.address, lease.nbytes, raw)
    return _shaped(raw, lease.nbytes, dtype, shape)


def tensor_over(
    face: Span, nbytes: int, dtype: torch.dtype | str, shape: int | Sequence[int] | None
) -> torch.Tensor:
    """Return a tensor over *nbytes* of memory; torch keeps *face*, and lets its buffer go."""
    import torch

    raw = torch.frombuffer(face, dtype=torch.uint8)
    return _shaped(raw, nbytes, dtype, shape)


def _shaped(
    raw: torch.Tensor, nbytes: int, dtype: torch.dtype | str, shape: int | Sequence[int] | None
) -> torch.Tensor:
    """By way of bytes, because frombuffer does not know every type."""
    import torch

    kind = _torch_dtype(torch, dtype)
    _check_shape(nbytes, kind.itemsize, shape, str(dtype))
    values = raw.view(kind)
    return values if shape is None else values.reshape(shape)


def _torch_dtype(torch: Any, dtype: torch.dtype | str) -> torch.dtype:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"torch has no element type {dtype!r}")
    return kind


def writable_face(lease: Lease) -> Span:
    """
    Return a buffer over the chunk that claims to be writable and is not: the mapping is read-only.

    For consumers that refuse or warn about read-only buffers. It holds the lease.
    """
    # The owner is a view, not the chunk: a view outlives chunk.release(), and the lease with it.
    return Span(lease.address, lease.nbytes, lease.memory)


def dlpack_of(lease: Lease, *, max_version: tuple[int, int] | None, **options: Any) -> Any:
    """Return a DLPack capsule of the chunk's bytes (uint8, one dimension)."""
    import numpy as np

    if max_version is None or max_version < (1, 0) or not _numpy_signals_read_only(np):
        face: Any = writable_face(lease)
        return np.frombuffer(face, dtype=np.uint8).__dlpack__()
    return array_over(lease, lease.nbytes, "uint8", None).__dlpack__(
        max_version=max_version, **options
    )


def _numpy_signals_read_only(np: Any) -> bool:
    """DLPack 1.0 has a flag for read-only memory; numpy writes it since 2.1."""
    major, minor = np.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 1)


def _check_shape(
    nbytes: int, item_bytes: int, shape: int | Sequence[int] | None, dtype: str
) -> None:
    if shape is None:
        if nbytes % item_bytes:
            raise ValueError(f"{nbytes} bytes are no whole number of {dtype} ({item_bytes} bytes)")
        return
    extents = [shape] if isinstance(shape, int) else list(shape)
    if -1 in extents:
        return  # numpy and torch work it out, and complain for themselves
    wanted = math.prod(extents) * item_bytes
    if wanted != nbytes:
        raise ValueError(
            f"shape {tuple(extents)} of {dtype} takes {wanted} bytes, and the chunk has {nbytes}"
        )
