# SPDX-License-Identifier: Apache-2.0
"""
Where the pages of the engine's blocks lie in memory, and how a chunk is made of them.

A chunk of a group is [run][block][bytes]: a run is what one block occupies in one piece, a layer's
page where the engine keeps layers apart, all layers' pages where it keeps blocks together. With one
layer a run, a chunk can be loaded and stored layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .groups import SKIP

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Run(NamedTuple):
    """
    Bytes of every block that lie in one piece.

    Attributes:
        layers: Whose pages they are.
        address: Of block 0's.
        stride: From one block's to the next one's, in bytes.
        nbytes: Of one block.
    """

    layers: tuple[str, ...]
    address: int
    stride: int
    nbytes: int


class Page(NamedTuple):
    """A piece of one layer's page before it is joined with its neighbours; as Run."""

    layer: str
    address: int
    stride: int
    nbytes: int


def joined(pages: Sequence[Page]) -> tuple[Run, ...]:
    """Join pages that follow each other within a block."""
    runs: list[Run] = []
    for page in pages:
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.stride == page.stride
            and last.address + last.nbytes == page.address
            and last.nbytes + page.nbytes <= page.stride
        ):
            layers = last.layers if last.layers[-1] == page.layer else (*last.layers, page.layer)
            runs[-1] = Run(layers, last.address, last.stride, last.nbytes + page.nbytes)
        else:
            runs.append(Run((page.layer,), page.address, page.stride, page.nbytes))
    return tuple(runs)


class Pieces(NamedTuple):
    """
    What is copied between a chunk and pages.

    Attributes:
        addresses: Of the pages' pieces, in the order of the chunk; 0 for one that is not wanted.
        lengths: Theirs, in bytes.
        offset: Where in the chunk the first begins.
    """

    addresses: NDArray[np.uint64]
    lengths: NDArray[np.uint64]
    offset: int = 0

    def starts(self) -> NDArray[np.uint64]:
        """Return where in the chunk each begins."""
        ends = np.cumsum(self.lengths, dtype=np.uint64)
        return ends - self.lengths + np.uint64(self.offset)


@dataclass(frozen=True)
class ChunkLayout:
    """
    A group's chunks: which addresses their bytes come from, in order.

    Attributes:
        runs: In the order of the chunk.
        blocks: Blocks in a chunk.
    """

    runs: tuple[Run, ...]
    blocks: int

    @property
    def nbytes(self) -> int:
        """Bytes of a chunk."""
        return self.blocks * sum(run.nbytes for run in self.runs)

    @property
    def by_layer(self) -> dict[str, range] | None:
        """Which runs are which layer's; None where layers share a run, or one has none."""
        found: dict[str, range] = {}
        for i, run in enumerate(self.runs):
            if len(run.layers) > 1:
                return None
            at = found.get(run.layers[0], range(i, i))
            if at.stop != i:
                return None  # its runs do not follow each other
            found[run.layers[0]] = range(at.start, i + 1)
        return found

    def pieces(self, blocks: Sequence[int], runs: range | None = None) -> Pieces:
        """
        Return the pieces of a chunk for these blocks.

        Args:
            blocks: One for each of the chunk's; SKIP: its pages are not wanted.
            runs: Only of these runs; None: of all.
        """
        chosen = self.runs if runs is None else self.runs[runs.start : runs.stop]
        ids = np.asarray(blocks, np.int64)
        bases = np.array([run.address for run in chosen], np.int64)
        strides = np.array([run.stride for run in chosen], np.int64)
        places = bases[:, None] + strides[:, None] * ids[None, :]
        places[:, ids == SKIP] = 0
        sizes = np.array([run.nbytes for run in chosen], np.uint64)
        before = self.runs[: runs.start] if runs is not None else ()
        return Pieces(
            places.ravel().astype(np.uint64),
            np.repeat(sizes, self.blocks),
            self.blocks * sum(run.nbytes for run in before),
        )


def pages_of(
    config: Any, layers: Sequence[str], kv_caches: Mapping[str, Any], page_bytes: Mapping[str, int]
) -> list[Page]:
    """
    Find the pages of a group's layers by the engine's own description of its allocation.

    Args:
        config: vLLM's KVCacheConfig.
        layers: Of the group.
        kv_caches: The engine's tensor of each layer, as given to register_kv_caches().
        page_bytes: Of a block of each layer.

    Raises:
        ValueError: A layer has no tensor, or a page leaves the allocation.
    """
    found: dict[str, list[Page]] = {}
    for placement in config.kv_cache_tensors:
        for i, layer in enumerate(placement.layers):
            if layer in page_bytes and layer in kv_caches:
                found[layer] = _placed(placement, i, kv_caches[layer], page_bytes[layer], config)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ValueError(
            f"the engine did not say where layer {missing[0]!r} keeps its KV cache "
            f"({len(missing)} such layers): this release of vLLM is not supported, see "
            "docs/engines.md"
        )
    return [page for layer in layers for page in found[layer]]


def _placed(placement: Any, index: int, tensor: Any, nbytes: int, config: Any) -> list[Page]:
    """Return a layer's page: in one piece, or in one for each group of heads."""
    storage = tensor.untyped_storage()
    start = placement.offset + index * placement.layer_stride
    stride = placement.block_stride
    # Head groups outside of blocks (LHBNC): a page comes in pieces of one stride each.
    pieces = -(-nbytes // stride)
    span = config.num_blocks * stride
    end = start + (pieces - 1) * span + (config.num_blocks - 1) * stride + nbytes // pieces
    if end > storage.nbytes() or nbytes % pieces:
        raise ValueError(
            f"layer {placement.layers[index]!r}: its last page would end at byte {end} of "
            f"{storage.nbytes()}: this release of vLLM is not supported, see docs/engines.md"
        )
    base = storage.data_ptr() + start
    return [
        Page(placement.layers[index], base + i * span, stride, nbytes // pieces)
        for i in range(pieces)
    ]
