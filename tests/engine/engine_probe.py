# SPDX-License-Identifier: Apache-2.0
"""What tests ask a vLLM worker: its worker_extension_cls adds these methods to the worker."""

from __future__ import annotations

from typing import Any


class Probe:
    """Mixed into the worker by vLLM, which refuses names that the worker has already."""

    model_runner: Any

    def cenote_kv_groups(self) -> list[dict[str, Any]]:
        """The groups of the KV cache: kind, layers, tokens a block."""
        groups = self.model_runner.kv_cache_config.kv_cache_groups
        return [
            {
                "kind": type(group.kv_cache_spec).__name__,
                "layers": list(group.layer_names),
                "block_tokens": group.kv_cache_spec.block_size,
                "page_bytes": group.kv_cache_spec.page_size_bytes,
                "window": getattr(group.kv_cache_spec, "sliding_window", None),
            }
            for group in groups
        ]
