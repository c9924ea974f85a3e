# SPDX-License-Identifier: Apache-2.0
"""
Mooncake store over TCP on one host, both kinds of client.

A real client lives in the process that uses it: here the writer's owns the memory.  A dummy client
reaches, through shared memory, one real client that owns the memory of the host.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import (
    MIB,
    NUMPY,
    POOL_BYTES,
    Array,
    Environment,
    Need,
    Peer,
    Unavailable,
    free_ports,
    leading,
)

if TYPE_CHECKING:
    from .processes import Servers

RELEASE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
BUFFER_BYTES = 256 * MIB
SHARED_BYTES = 512 * MIB  # of a dummy client: its sources and its target


class MooncakeReal(Peer):
    """The master, and a client with a segment in the writer's process; the reader has none."""

    name = "mooncake-real"
    title = "Mooncake, real client"
    how = "get_buffer; get_into; put_from; batch_is_exist; buffers registered"
    environment = Environment("mooncake", (RELEASE, NUMPY), 90, 260)
    needs = (Need("libibverbs1", library="libibverbs.so.1"),)
    in_place = False
    all_interfaces = True

    def _program(self, name: str) -> str:
        return str(Path(self.folder / "venv" / "bin" / name))

    def worker_environment(self) -> dict[str, str]:
        """Quiet, and on the loopback where it listens to that."""
        return {
            "MC_LOG_LEVEL": "ERROR",
            "GLOG_minloglevel": "1",
            "MC_STORE_CLIENT_METRIC": "0",
            "MC_TCP_BIND_ADDRESS": "127.0.0.1",
        }

    def _metadata(self) -> str:
        return f"http://127.0.0.1:{self.ports(5)[1]}/metadata"

    def start(self, servers: Servers) -> None:
        """Start the master."""
        rpc, metadata, metrics = self.ports(5)[:3]
        options = {
            "rpc_address": "127.0.0.1",
            "rpc_port": rpc,
            "enable_http_metadata_server": "true",
            "http_metadata_server_host": "127.0.0.1",
            "http_metadata_server_port": metadata,
            "metrics_host": "127.0.0.1",
            "metrics_port": metrics,
        }
        command = [self._program("mooncake_master"), *_flags(options)]
        servers.start("master", command, self.worker_environment())
        servers.wait_for_port(rpc)
        servers.wait_for_port(metadata)

    def connect(self, role: str) -> None:
        """Set up a client in this process."""
        self._store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
        self._registered: dict[int, Array] = {}
        status = self._store.setup(
            f"127.0.0.1:{free_ports(1)[0]}",
            self._metadata(),
            POOL_BYTES if role == "writer" else 0,
            BUFFER_BYTES,
            "tcp",
            "",
            f"127.0.0.1:{self.ports(5)[0]}",
        )
        if status:
            raise Unavailable(f"MooncakeDistributedStore.setup gave {status}")

    def _buffer(self, nbytes: int) -> Array:
        """A warm buffer that the transfer engine may read and write."""
        buffer = np.ones(nbytes, np.uint8)
        status = self._store.register_buffer(buffer.ctypes.data, nbytes)
        if status:
            raise Unavailable(f"register_buffer of {nbytes} bytes gave {status}")
        self._registered[buffer.ctypes.data] = buffer
        return buffer

    def sources(self, nbytes: int, count: int) -> list[Array]:
        """One registered buffer in *count* parts."""
        whole = self._buffer(nbytes * count)
        return [whole[i * nbytes : (i + 1) * nbytes] for i in range(count)]

    def target(self, nbytes: int) -> Array:
        """A registered buffer."""
        return self._buffer(nbytes)

    def put(self, key: Any, source: Array) -> None:
        """Put from a registered buffer."""
        status = self._store.put_from(key, source.ctypes.data, len(source))
        if status:
            raise ValueError(f"put_from of {key} gave {status}")

    def view(self, key: Any) -> int:
        """A buffer of the client's own, filled."""
        buffer = self._store.get_buffer(key)
        _over(buffer.ptr(), buffer.size())
        return int(buffer.size())

    def copy(self, key: Any, target: Array) -> None:
        """Get into a registered buffer."""
        got = self._store.get_into(key, target.ctypes.data, len(target))
        if got != len(target):
            raise ValueError(f"get_into of {key} gave {got}, not {len(target)}")

    def lookup(self, batch: Any) -> int:
        """One call to the master."""
        return leading([found == 1 for found in self._store.batch_is_exist(batch)])

    def delete(self, keys: Sequence[Any]) -> None:
        """Remove, leased or not."""
        self._store.batch_remove(list(keys), True)

    def close(self) -> None:
        """Disconnect."""
        self._store.close()


class MooncakeDummy(MooncakeReal):
    """The master, one `mooncake_client` that owns the memory, dummy clients in both processes."""

    name = "mooncake-dummy"
    title = "Mooncake, dummy client"

    def owner_environment(self) -> dict[str, str]:
        """Environment variables of the client that owns the memory."""
        return self.worker_environment()

    def start(self, servers: Servers) -> None:
        """Start the master and the owner."""
        super().start(servers)
        rpc, _, _, port, transfer = self.ports(5)
        options = {
            "host": f"127.0.0.1:{transfer}",
            "port": port,
            "global_segment_size": f"{POOL_BYTES // MIB}MB",
            "local_buffer_size": f"{BUFFER_BYTES // MIB}MB",
            "master_server_address": f"127.0.0.1:{rpc}",
            "metadata_server": self._metadata(),
            "protocol": "tcp",
            "threads": 2,
        }
        command = [self._program("mooncake_client"), *_flags(options)]
        servers.start("owner", command, self.owner_environment())
        servers.wait_for_port(port)

    def connect(self, role: str) -> None:
        """Reach the owner."""
        del role
        self._store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
        self._registered = {}
        status = self._store.setup_dummy(SHARED_BYTES, 128 * MIB, f"127.0.0.1:{self.ports(5)[3]}")
        if status:
            raise Unavailable(f"MooncakeDistributedStore.setup_dummy gave {status}")

    def _buffer(self, nbytes: int) -> Array:
        """Memory that client and owner share."""
        address = self._store.alloc_from_mem_pool(nbytes)
        if not address:
            raise Unavailable(f"alloc_from_mem_pool gave no {nbytes} bytes")
        status = self._store.register_buffer(address, nbytes)
        if status:
            raise Unavailable(f"register_buffer of {nbytes} bytes gave {status}")
        buffer = _over(address, nbytes)
        buffer[:] = 1
        self._registered[address] = buffer
        return buffer


class MooncakeHot(MooncakeDummy):
    """The same with the hot cache, from which a view can be the stored bytes themselves."""

    name = "mooncake-hot"
    title = "Mooncake, dummy client, hot cache"
    in_place = True
    alone = True  # a block holds one chunk: blocks for the largest would hold few of the others

    def owner_environment(self) -> dict[str, str]:
        """Admit at the first hit; blocks as large as the chunks."""
        return self.worker_environment() | {
            "MC_STORE_LOCAL_HOT_CACHE_SIZE": str(POOL_BYTES),
            "MC_STORE_LOCAL_HOT_CACHE_USE_SHM": "1",
            "MC_STORE_LOCAL_HOT_BLOCK_SIZE": str(max(self.sizes)),
            "MC_STORE_LOCAL_HOT_ADMISSION_THRESHOLD": "1",
        }


def _flags(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _over(address: int, nbytes: int) -> Array:
    """An array over memory that somebody else keeps."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
