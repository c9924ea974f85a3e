# SPDX-License-Identifier: Apache-2.0
"""
How bytes get between a chunk and the engine's pages: by this CPU, or by a GPU's copy engines.

Both are called from the worker's copying threads and return when the bytes are there, so that who
called may commit, or say that a load is done.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from .pages import Pieces
from .settings import LOGGER

if TYPE_CHECKING:
    from cenote.client import Chunk, Pool, Put
    from cenote.client.cuda import Registration

log = logging.getLogger(LOGGER)


class Copier(Protocol):
    """Copies between pool and pages. Each method may be called from another thread."""

    def attached(self, pool: Pool) -> None:
        """Make a newly attached pool ready to be copied from and to."""

    def computed(self) -> Any:
        """Return what save() waits for: all that was computed until this call."""

    def load(self, chunk: Chunk, pieces: Pieces, *, verify: bool) -> bool:
        """
        Copy pieces of a chunk to pages.

        Args:
            chunk: The chunk.
            pieces: Where to; to verify all of them must be there.
            verify: Compare the chunk's checksum as well.

        Returns:
            Was a checksum compared? Not every chunk has one.

        Raises:
            ChunkLost: The bytes differ from the checksum, or the medium failed.
        """

    def save(self, put: Put, pieces: Pieces, ready: Any) -> None:
        """Fill pieces of a put, once *ready*, a result of computed(), has come to pass."""

    def close(self) -> None:
        """Undo what attached() did."""


class CpuCopier:
    """Pages in this process's memory: one pass, with the checksum, without the GIL."""

    def attached(self, pool: Pool) -> None:
        """Nothing is to be done."""

    def computed(self) -> None:
        """Return nothing: on a CPU what was called has been computed."""

    def load(self, chunk: Chunk, pieces: Pieces, *, verify: bool) -> bool:
        """See Copier."""
        return chunk.copy_pieces_to(pieces.addresses, pieces.lengths, pieces.offset, verify=verify)

    def save(self, put: Put, pieces: Pieces, ready: Any) -> None:
        """See Copier."""
        put.copy_pieces(pieces.addresses, pieces.lengths, pieces.offset)

    def close(self) -> None:
        """Nothing is to be done."""


class CudaCopier:
    """
    Pages in a GPU's memory: one submission a chunk, on streams of their own, of low priority.

    The pool is registered as pinned memory, so that the copy engines read and write it in place.
    Where that fails, the driver stages what it copies: slower, never wrong.

    Args:
        device: The engine's torch.device.
    """

    def __init__(self, device: Any) -> None:
        import torch

        self._torch: Final = torch
        self._device: Final = device
        lowest, _ = torch.cuda.Stream.priority_range()
        self._loads: Final = torch.cuda.Stream(device, priority=lowest)
        self._saves: Final = torch.cuda.Stream(device, priority=lowest)
        self._pool: Pool | None = None
        self._pinned: Registration | None = None
        self._lock: Final = threading.Lock()  # of the registration: two threads copy

    def attached(self, pool: Pool) -> None:
        """Register the pool, so that no request waits for it."""
        self._pool = pool
        self._registered()

    def computed(self) -> Any:
        """Return an event behind all that the engine has submitted."""
        event = self._torch.cuda.Event()
        event.record(self._torch.cuda.current_stream(self._device))
        return event

    def load(self, chunk: Chunk, pieces: Pieces, *, verify: bool) -> bool:
        """See Copier. The CPU compares the checksum first: the GPU gets no byte of a bad chunk."""
        compared = verify and chunk.verify()
        wanted = pieces.addresses != 0
        sources = (chunk.address + pieces.starts())[wanted]
        self._copy(self._loads, sources, pieces.addresses[wanted], pieces.lengths[wanted], sources)
        return compared

    def save(self, put: Put, pieces: Pieces, ready: Any) -> None:
        """See Copier. The daemon makes the checksum, as the pool's configuration says."""
        self._saves.wait_event(ready)
        targets = put.address + pieces.starts()
        self._copy(self._saves, pieces.addresses, targets, pieces.lengths, targets)

    def _copy(self, stream: Any, sources: Any, targets: Any, lengths: Any, hosts: Any) -> None:
        """Submit all, and wait. *hosts*: which of both lies in the pool."""
        from vllm import _custom_ops

        torch = self._torch
        sources, targets, lengths = _cut(self._registered(), sources, targets, lengths, hosts)
        tensors = [torch.from_numpy(each.astype(np.int64)) for each in (sources, targets, lengths)]
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            try:
                _custom_ops.swap_blocks_batch(*tensors)
            finally:  # what was submitted may run still, into memory that others get after this
                stream.synchronize()

    def _registered(self) -> Registration | None:
        """
        Return the registration of the memory that is mapped now.

        A reconnect maps another. The old one is given back once the device is idle: the other
        thread may be copying from it.
        """
        from cenote.client import cuda
        from cenote.client.errors import CenoteError

        with self._lock:
            if self._pool is None or (self._pinned is not None and self._pinned.current):
                return self._pinned
            old, self._pinned = self._pinned, None
            try:
                with self._torch.cuda.device(self._device):
                    self._pinned = cuda.register(self._pool)
                    if self._pinned.failed:
                        log.warning("cenote: pinned in part: %s", self._pinned.failed)
                    if old is not None:
                        self._torch.cuda.synchronize(self._device)
                        old.close()
            except CenoteError as error:
                log.warning("cenote: the pool is not pinned, copies are staged: %s", error)
            return self._pinned

    def close(self) -> None:
        """Give the registration back."""
        with self._lock:
            if self._pinned is not None:
                self._pinned.close()
            self._pool = self._pinned = None


def _cut(
    pinned: Registration | None, sources: Any, targets: Any, lengths: Any, hosts: Any
) -> tuple[Any, Any, Any]:
    """Cut copies where one registration ends and the next begins: CUDA refuses those across."""
    if pinned is None or len(pinned.segments) < 2:
        return sources, targets, lengths
    rows: list[tuple[int, int, int]] = []
    for source, target, nbytes, host in zip(sources, targets, lengths, hosts, strict=True):
        for at, part in pinned.pieces(int(host), int(nbytes)):
            shift = at - int(host)
            rows.append((int(source) + shift, int(target) + shift, part))
    made = np.array(rows, np.uint64).reshape(-1, 3)
    return made[:, 0], made[:, 1], made[:, 2]


def copier_for(device: Any) -> Copier:
    """
    Return the copier of an engine's device.

    Raises:
        ValueError: There is none.
    """
    if device.type == "cpu":
        return CpuCopier()
    if device.type == "cuda":
        return CudaCopier(device)
    raise ValueError(
        f"cenote copies from and to CPU and CUDA memory, and this engine's KV cache is on "
        f"{device}: serve without cenote"
    )
