# SPDX-License-Identifier: Apache-2.0
"""One file for each chunk in /dev/shm: what many caches do, and what needs no library."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Sequence
from typing import Any

from .base import Array, Peer


class Files(Peer):
    """Written beside and renamed; read by open + mmap, or by open + preadv into the buffer."""

    name = "files"
    title = "a file in /dev/shm"
    how = "open + mmap; open + preadv; write + rename; 512 access()"

    def _path(self) -> str:
        return f"/dev/shm/{self.folder.name}-files"

    def clean(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._path(), ignore_errors=True)

    def connect(self, role: str) -> None:
        """Make the folder."""
        del role
        os.makedirs(self._path(), exist_ok=True)  # noqa: PTH103  # as the rest of this module

    def key(self, nbytes: int, index: int) -> str:
        """A path."""
        return f"{self._path()}/{nbytes}-{index}"

    def put(self, key: Any, source: Array) -> None:
        """Write and rename."""
        partial = key + ".part"
        descriptor = os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        left = source.data
        while left:
            left = left[os.write(descriptor, left) :]
        os.close(descriptor)
        os.rename(partial, key)  # noqa: PTH104  # pathlib costs microseconds

    def view(self, key: Any) -> int:
        """Map and unmap: no page of it is touched."""
        descriptor = os.open(key, os.O_RDONLY)
        with mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            os.close(descriptor)
            return len(mapping)

    def copy(self, key: Any, target: Array) -> None:
        """Read; faster than to copy out of a fresh mapping."""
        descriptor = os.open(key, os.O_RDONLY)
        got = os.preadv(descriptor, [target.data], 0)
        os.close(descriptor)
        if got != len(target):
            raise ValueError(f"{key} has {got} bytes, not {len(target)}")

    def lookup(self, batch: Any) -> int:
        """Is there a file?"""
        for place, key in enumerate(batch):
            if not os.access(key, os.F_OK):
                return place
        return len(batch)

    def delete(self, keys: Sequence[Any]) -> None:
        """Unlink."""
        for key in keys:
            if os.access(key, os.F_OK):
                os.unlink(key)  # noqa: PTH108  # as above
