# SPDX-License-Identifier: Apache-2.0
"""
vLLM's KV cache, shared by every engine on the host and outliving each of them.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "CenoteConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "cenote.client.adapters.vllm"}'

docs/engines.md has the settings, what was run with which release, and the caveats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connector import CenoteConnector

__all__ = ["CenoteConnector"]


def __getattr__(name: str) -> Any:
    """Import vLLM only when a class that needs it is asked for."""
    if name == "CenoteConnector":
        from .connector import CenoteConnector

        return CenoteConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
