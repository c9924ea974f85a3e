# SPDX-License-Identifier: Apache-2.0
"""Vineyard: immutable objects in a server's shared memory, metadata kept locally."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import NUMPY, POOL_BYTES, Array, Environment, Peer

if TYPE_CHECKING:
    from .processes import Servers


class Vineyard(Peer):
    """`vineyardd` without RPC. Blobs cannot be named: a small object with one member is."""

    name = "vineyard"
    title = "Vineyard"
    how = "get_name + get_meta + member; + copy; blob, seal, persist, put_name; 512 get_name"
    environment = Environment("vineyard", ("vineyard==0.24.2", NUMPY), 190, 460)

    def _socket(self) -> str:
        return str(self.folder / "vineyard.sock")

    def start(self, servers: Servers) -> None:
        """Start vineyardd on a Unix socket."""
        found = (self.folder / "venv").glob("lib/python3*/site-packages/vineyard/bdist/vineyardd")
        program = next(found)
        program.chmod(0o755)
        options = ["--socket", self._socket(), "--size", str(POOL_BYTES), "--meta", "local"]
        options += ["--deployment", "local", "--rpc=false"]
        logs = {"GLOG_log_dir": str(self.folder)}
        servers.start("vineyardd", [str(program), *options], logs)
        servers.wait_for_socket(self._socket())

    def connect(self, role: str) -> None:
        """Connect."""
        del role
        self._vineyard: Any = importlib.import_module("vineyard")
        self._client = self._vineyard.connect(self._socket())
        self._absent: type[Exception] = self._vineyard.ObjectNotExistsException

    def put(self, key: Any, source: Array) -> None:
        """A blob, an object around it, a name for that."""
        client = self._client
        blob = client.create_blob(len(source))
        np.copyto(np.frombuffer(memoryview(blob), np.uint8), source)
        meta = self._vineyard.ObjectMeta()
        meta["typename"] = "sidebyside::Chunk"
        meta["nbytes"] = len(source)
        meta.add_member("buffer", blob.seal(client))
        made = client.create_metadata(meta)
        client.persist(made.id)
        client.put_name(made.id, key)

    def _blob(self, key: Any) -> Any:
        return self._client.get_meta(self._client.get_name(key)).get_member("buffer")

    def view(self, key: Any) -> int:
        """A view lives as long as its blob."""
        return len(memoryview(self._blob(key)))

    def copy(self, key: Any, target: Array) -> None:
        """Copy out of the view."""
        blob = self._blob(key)
        np.copyto(target, np.frombuffer(memoryview(blob), np.uint8))

    def lookup(self, batch: Any) -> int:
        """One call each: names cannot be asked for together."""
        for place, key in enumerate(batch):
            try:
                self._client.get_name(key)
            except self._absent:
                return place
        return len(batch)

    def delete(self, keys: Sequence[Any]) -> None:
        """Names first, then what they named."""
        ids = []
        for key in keys:
            with contextlib.suppress(self._absent):
                ids.append(self._client.get_name(key))
                self._client.drop_name(key)
        if ids:
            self._client.delete(ids, force=True, deep=True)

    def close(self) -> None:
        """Disconnect."""
        self._client.close()
