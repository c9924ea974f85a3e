# SPDX-License-Identifier: Apache-2.0
"""The two memories of a worker: the engine's pages and the pool's namespaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from .attach import Attachment
from .copier import Copier, copier_for
from .groups import Shape
from .identity import group_fields, manifest_of, page_bytes_of, rank_fields
from .messages import Era, Fields
from .pages import ChunkLayout, joined, pages_of

if TYPE_CHECKING:
    from cenote.client import Cache, Manifest


class Memory:
    """
    Where chunks of each group go to and come from in this worker.

    Args:
        config: vLLM's KVCacheConfig.
        kv_caches: The engine's tensor of each layer.
        layers: Its attention layers by name.
        shape: How tokens become chunks.
        common: Fields of the manifest that all workers share.
        attachment: The way to the pool.

    Raises:
        ValueError: The device or the placement is none that cenote knows.

    Attributes:
        chunk_tokens: Tokens of a chunk.
        copier: Copies between the two.
        layouts: Of each group's chunks.
        fields: Of each group's manifest, but for the era's.
        stores: For each group: is it this worker that stores? MLA is stored by the first rank.
    """

    def __init__(
        self,
        config: Any,
        kv_caches: Mapping[str, Any],
        layers: Mapping[str, Any],
        *,
        shape: Shape,
        common: Fields,
        attachment: Attachment,
    ) -> None:
        from vllm.distributed.parallel_state import get_tp_group

        self._attachment: Final = attachment
        self.chunk_tokens: Final = shape.chunk_tokens
        self._manifests: dict[tuple[Era, int], Manifest] = {}
        self.copier: Final[Copier] = copier_for(next(iter(kv_caches.values())).device)
        first = get_tp_group().rank_in_group == 0
        self.stores: Final = tuple(first or not group.replicated for group in shape.groups)
        layouts, fields = [], []
        for group in shape.groups:
            pages = pages_of(config, group.layers, kv_caches, page_bytes_of(config, group))
            layout = ChunkLayout(joined(pages), shape.chunk_tokens // group.block_tokens)
            own = group_fields(config, group, layout, kv_caches, layers)
            layouts.append(layout)
            fields.append({**common, **own, **rank_fields(group)})
        self.layouts: Final = tuple(layouts)
        self.fields: Final[tuple[Fields, ...]] = tuple(fields)
        if attachment.pool is not None:
            self.copier.attached(attachment.pool)

    def cache(self, era: Era, group: int) -> Cache | None:
        """Return a group's namespace; None while there is no pool."""
        return self._attachment.open(self.manifest(era, group))

    def manifest(self, era: Era, group: int) -> Manifest:
        """Return what a group's namespace is for."""
        manifest = self._manifests.get((era, group))
        if manifest is None:
            manifest = manifest_of(self.fields[group], era, self.chunk_tokens)
            self._manifests[era, group] = manifest
        return manifest
