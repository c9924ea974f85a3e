# SPDX-License-Identifier: Apache-2.0
"""What a peer is: where it installs, how it starts, and the five operations that are timed."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from .processes import Servers

KIB: Final = 1 << 10
MIB: Final = 1 << 20
SIZES: Final = {64 * KIB: 512, MIB: 64, 32 * MIB: 8}  # bytes of a chunk -> how many of them
LOOKUP_BYTES: Final = 64 * KIB  # the 512 keys that are looked up are those of this size
POOL_BYTES: Final = 1024 * MIB
NUMPY: Final = "numpy==2.4.6"

Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


class Unavailable(Exception):
    """This peer cannot be measured here; the message is the reason, for the report."""


@dataclass(frozen=True)
class Environment:
    """
    A virtual environment of a peer's own, because their requirements exclude each other.

    Attributes:
        name: Its folder below build/peers/venv.
        requirements: Pinned; the versions that are known to work.
        download_mb: What pip fetches, about, on x86-64.
        disk_mb: What it takes when installed.
    """

    name: str
    requirements: tuple[str, ...]
    download_mb: int
    disk_mb: int


@dataclass(frozen=True)
class Need:
    """What Debian's *package* brings: a *program*, or a shared *library* such as "libx.so.1"."""

    package: str
    program: str | None = None
    library: str | None = None


class Peer:
    """
    One system. `start` runs in the measuring process, everything else in writer and reader.

    A peer is created in all three with the same folder. Methods that are timed do nothing that a
    careful user of that system would not do; what they need is prepared by the others.

    Attributes:
        name: On the command line and in the JSON.
        title: In the table.
        how: What the operations are, in that system's words.
        environment: None for the checkout's own.
        needs: What must be on the system besides the environment.
        in_place: Is a view the stored bytes themselves? Otherwise it is a private copy.
        all_interfaces: Does it listen on all interfaces, whatever it is told?
        alone: Is it started afresh for each size of chunk? Then `sizes` says which it is.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    how: ClassVar[str]
    environment: ClassVar[Environment | None] = None
    needs: ClassVar[tuple[Need, ...]] = ()
    in_place: ClassVar[bool] = True
    all_interfaces: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes = list(SIZES)  # that the measuring process is about to measure

    # ---- the measuring process -----------------------------------------------------------------

    def start(self, servers: Servers) -> None:
        """Start what it needs, and return when clients may connect. Embedded ones need nothing."""

    def clean(self) -> None:
        """Remove what outlives its processes. Called before and after."""

    def ports(self, count: int) -> list[int]:
        """*count* free ports of the loopback, the same in each process of this run."""
        path = self.folder / "ports.json"
        if not path.exists():
            path.write_text(json.dumps(free_ports(count)))
        return [int(port) for port in json.loads(path.read_text())]

    # ---- writer and reader ---------------------------------------------------------------------

    def worker_environment(self) -> dict[str, str]:
        """Environment variables of writer and reader."""
        return {}

    def connect(self, role: str) -> None:
        """Connect as "writer" or "reader"."""
        raise NotImplementedError

    def key(self, nbytes: int, index: int) -> Any:
        """A key in the form this system takes."""
        return f"chunk-{nbytes}-{index}"

    def batch(self, keys: Sequence[Any]) -> Any:
        """Keys in the form that `lookup` takes."""
        return list(keys)

    def sources(self, nbytes: int, count: int) -> list[Array]:
        """Buffers that a writer fills and this system takes fastest."""
        return [np.ones(nbytes, np.uint8) for _ in range(count)]

    def target(self, nbytes: int) -> Array:
        """A warm buffer that this system fills fastest."""
        return np.ones(nbytes, np.uint8)

    def put(self, key: Any, source: Array) -> None:
        """Store (timed)."""
        raise NotImplementedError

    def settle(self) -> None:
        """Return when everything put can be found by others (timed once for each pass)."""

    def view(self, key: Any) -> int:
        """Get the bytes as the system gives them, let go of them, return how many (timed)."""
        raise NotImplementedError

    def copy(self, key: Any, target: Array) -> None:
        """Get the bytes into *target* (timed)."""
        raise NotImplementedError

    def lookup(self, batch: Any) -> int:
        """How many keys at the start of *batch* are present? (timed)"""
        raise NotImplementedError

    def delete(self, keys: Sequence[Any]) -> None:
        """Make keys absent; those that are absent already are no error."""
        raise NotImplementedError

    def prepare_lookup(self) -> None:
        """Store what only `lookup` needs, in the writer. Most look up what is there already."""

    def close(self) -> None:
        """Disconnect."""


def free_ports(count: int) -> list[int]:
    """Return *count* different ports that nobody listens on, on the loopback."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def leading(found: Sequence[Any]) -> int:
    """Return how many items at the start are true."""
    for place, item in enumerate(found):
        if not item:
            return place
    return len(found)
