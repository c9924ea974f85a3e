# SPDX-License-Identifier: Apache-2.0
"""The connector's counters, as vLLM logs them and gives them to Prometheus."""

from __future__ import annotations

from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from .stats import COUNTERS

PREFIX: Final = "vllm:cenote_"


class ConnectorStats(KVConnectorStats):
    """Counters by name, summed over workers and intervals; see cenote…vllm.stats.COUNTERS."""

    data: dict[str, float]

    def reset(self) -> None:
        """Forget what was counted."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """Add another one's."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what a line of the log says."""
        shown = {name: self.data[name] for name in COUNTERS if self.data.get(name)}
        rates = {}
        for what, counted in (("load", "loaded_bytes"), ("save", "saved_bytes")):
            spent_s, nbytes = shown.get(f"{what}_seconds"), shown.get(counted)
            if spent_s and nbytes:
                rates[f"{what}_GB_per_s"] = round(nbytes / spent_s / 1e9, 2)
        return {**{name: round(value, 6) for name, value in shown.items()}, **rates}

    def is_empty(self) -> bool:
        """Was nothing counted?"""
        return not any(self.data.values())


class PromMetrics(KVConnectorPromMetrics):
    """One Prometheus counter for each of ours, with the engine's labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=PREFIX + name, documentation=f"{text}.", labelnames=labelnames
            )
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what one interval counted."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, amount in transfer_stats_data.items():
            if name in self._counters and amount > 0:
                self._counters[name].labels(*labels).inc(amount)
