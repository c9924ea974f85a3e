# SPDX-License-Identifier: Apache-2.0
"""cenote of this checkout: its daemon, its client, as installed beside this bench."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .base import POOL_BYTES, Array, Peer

if TYPE_CHECKING:
    from .processes import Servers


class Cenote(Peer):
    """`cenoted` with one pool in POSIX shared memory of 4 KiB pages, checksums as by default."""

    name = "cenote"
    title = "cenote"
    how = "get + .memory; get + copy_to; put with copy_from, flush; match"

    def _socket(self) -> str:
        return str(self.folder / "pool.sock")

    def start(self, servers: Servers) -> None:
        """Start cenoted."""
        command = [sys.executable, "-m", "cenote.daemon.main", "--ephemeral"]
        command += ["--socket", self._socket(), "--size", str(POOL_BYTES)]
        servers.start("cenoted", [*command, "--name", f"peers-{os.getpid()}"])
        servers.wait_for_socket(self._socket())

    def connect(self, role: str) -> None:
        """Attach, and open one namespace."""
        client = importlib.import_module("cenote.client")
        self._pool = client.connect(self._socket(), role=role)
        manifest = client.Manifest("side-by-side", "bytes", "uint8", 1)
        self._cache = self._pool.namespace(manifest)
        self._get = self._cache.get
        self._put = self._cache.put
        self._match = self._cache.match

    def key(self, nbytes: int, index: int) -> bytes:
        """32 bytes."""
        return hashlib.sha256(f"{nbytes}-{index}".encode()).digest()

    def batch(self, keys: Sequence[Any]) -> bytes:
        """One bytes object, as `match` takes it."""
        return b"".join(keys)

    def put(self, key: Any, source: Array) -> None:
        """Reserve, copy with the checksum in one pass, commit."""
        with self._put(key, len(source)) as put:
            put.copy_from(source)

    def settle(self) -> None:
        """Wait until the daemon has linked everything."""
        self._cache.flush()

    def view(self, key: Any) -> int:
        """Lease, memoryview, release: both go with this frame."""
        chunk = self._get(key)
        return len(chunk.memory)

    def copy(self, key: Any, target: Array) -> None:
        """Lease, copy, release."""
        self._get(key).copy_to(target)

    def lookup(self, batch: Any) -> int:
        """One call."""
        return int(self._match(batch))

    def delete(self, keys: Sequence[Any]) -> None:
        """Delete."""
        self._cache.delete(b"".join(keys))

    def close(self) -> None:
        """Detach."""
        self._pool.close()
