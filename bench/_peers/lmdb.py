# SPDX-License-Identifier: Apache-2.0
"""LMDB in /dev/shm: no server, memory-mapped, one writer at a time."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import NUMPY, POOL_BYTES, Array, Environment, Peer


class Lmdb(Peer):
    """py-lmdb: writemap, nothing is synced, reads in place through one read transaction each."""

    name = "lmdb"
    title = "LMDB in /dev/shm"
    how = "begin(buffers=True) + get; the same + copy; one write transaction; 512 cursor.set_key"
    environment = Environment("lmdb", ("lmdb==3.0.0", NUMPY), 17, 90)

    def _path(self) -> str:
        return f"/dev/shm/{self.folder.name}-lmdb"

    def clean(self) -> None:
        """Remove the database."""
        shutil.rmtree(self._path(), ignore_errors=True)

    def connect(self, role: str) -> None:
        """Open the database, which makes it."""
        del role
        self._lmdb: Any = importlib.import_module("lmdb")
        self._db = self._lmdb.open(
            self._path(),
            map_size=POOL_BYTES,
            sync=False,
            metasync=False,
            writemap=True,
            map_async=True,
        )

    def key(self, nbytes: int, index: int) -> bytes:
        """Bytes."""
        return f"chunk-{nbytes}-{index}".encode()

    def put(self, key: Any, source: Array) -> None:
        """One transaction."""
        try:
            with self._db.begin(write=True) as transaction:
                transaction.put(key, source.data)
        except self._lmdb.MapFullError:
            # Pages that a transaction frees can be used by the second after it.
            with self._db.begin(write=True) as transaction:
                transaction.put(b"any", str(time.time_ns()).encode())
            with self._db.begin(write=True) as transaction:
                transaction.put(key, source.data)

    def view(self, key: Any) -> int:
        """A view lives as long as its transaction."""
        with self._db.begin(buffers=True) as transaction:
            return len(transaction.get(key))

    def copy(self, key: Any, target: Array) -> None:
        """Copy out of the view."""
        with self._db.begin(buffers=True) as transaction:
            np.copyto(target, np.frombuffer(transaction.get(key), np.uint8))

    def lookup(self, batch: Any) -> int:
        """One transaction, one cursor, no values."""
        with self._db.begin(buffers=True) as transaction, transaction.cursor() as cursor:
            for place, key in enumerate(batch):
                if not cursor.set_key(key):
                    return place
        return len(batch)

    def delete(self, keys: Sequence[Any]) -> None:
        """One transaction."""
        with self._db.begin(write=True) as transaction:
            for key in keys:
                transaction.delete(key)

    def close(self) -> None:
        """Close."""
        self._db.close()
