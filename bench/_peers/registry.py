# SPDX-License-Identifier: Apache-2.0
"""The peers by name. Their modules need nothing of theirs to be imported."""

from __future__ import annotations

import importlib
from typing import Final

from .base import Peer

CLASSES: Final = {
    "cenote": ("cenote", "Cenote"),
    "lmdb": ("lmdb", "Lmdb"),
    "files": ("files", "Files"),
    "redis": ("redis", "Redis"),
    "memcached": ("redis", "Memcached"),
    "mooncake-real": ("mooncake", "MooncakeReal"),
    "mooncake-dummy": ("mooncake", "MooncakeDummy"),
    "mooncake-hot": ("mooncake", "MooncakeHot"),
    "vineyard": ("vineyard", "Vineyard"),
    "ray": ("ray", "Ray"),
    "lmcache": ("lmcache", "Lmcache"),
}


def load(name: str) -> type[Peer]:
    """Return the class of the peer *name*."""
    module, kind = CLASSES[name]
    found: type[Peer] = getattr(importlib.import_module(f"bench._peers.{module}"), kind)
    return found
