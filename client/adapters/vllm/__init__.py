# SPDX-License-Identifier: Apache-2.0
"""
vLLM's KV cache, shared by every engine on the host and outliving each of them.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "CenoteConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "cenote.client.adapters.vllm"}'

CenoteOffloadingSpec is the same pool behind vLLM's stock OffloadingConnector (offloading.py).
docs/engines.md has the settings, what was run with which release, and the caveats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connector import CenoteConnector
    from .offloading import CenoteOffloadingSpec

__all__ = ["CenoteConnector", "CenoteOffloadingSpec"]


def __getattr__(name: str) -> Any:
    """Import vLLM only when a class that needs it is asked for."""
    if name == "CenoteConnector":
        from .connector import CenoteConnector

        return CenoteConnector
    if name == "CenoteOffloadingSpec":
        from .offloading import CenoteOffloadingSpec

        return CenoteOffloadingSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
