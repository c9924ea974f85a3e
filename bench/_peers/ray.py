# SPDX-License-Identifier: Apache-2.0
"""Ray's object store. It has no keys of the user's: an actor maps them to references."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import NUMPY, POOL_BYTES, Array, Environment, Peer

if TYPE_CHECKING:
    from .processes import Servers


class Ray(Peer):
    """One node. Objects belong to the writer, and die with it."""

    name = "ray"
    title = "Ray object store"
    how = "actor call + ray.get; + copy; ray.put + actor call; one actor call for 512 keys"
    environment = Environment("ray", ("ray==2.60.0", NUMPY), 95, 360)
    all_interfaces = True

    def worker_environment(self) -> dict[str, str]:
        """Without telemetry and without warnings."""
        return {
            "RAY_DEDUP_LOGS": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONWARNINGS": "ignore",
        }

    def start(self, servers: Servers) -> None:
        """Start a head node, without its dashboard."""
        port = self.ports(1)[0]
        options = ["--head", "--block", "--port", str(port), "--node-ip-address", "127.0.0.1"]
        options += ["--include-dashboard", "false", "--num-cpus", "2", "--disable-usage-stats"]
        options += ["--object-store-memory", str(POOL_BYTES)]
        options += ["--temp-dir", str(self.folder / "ray")]
        program = str(self.folder / "venv" / "bin" / "ray")
        servers.start("ray", [program, "start", *options], self.worker_environment())
        servers.wait_for_port(port)
        servers.wait_for_text("ray", "--block")  # "This command will now block …": the node is up

    def connect(self, role: str) -> None:
        """Become a driver of that node, and find or make the actor."""
        del role
        self._ray: Any = importlib.import_module("ray")
        self._ray.init(
            address=f"127.0.0.1:{self.ports(1)[0]}",
            namespace="side-by-side",
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
        options = {"name": "directory", "lifetime": "detached", "get_if_exists": True}
        actor = self._ray.remote(num_cpus=0)(_directory())
        self._directory = actor.options(**options).remote()
        self._call(self._directory.lookup.remote([]))

    def _call(self, reference: Any) -> Any:
        return self._ray.get(reference, timeout=60)

    def put(self, key: Any, source: Array) -> None:
        """The reference travels in a list, or the actor would be given the value."""
        self._call(self._directory.put.remote(key, [self._ray.put(source)]))

    def _value(self, key: Any) -> Any:
        return self._call(self._call(self._directory.get.remote(key))[0])

    def view(self, key: Any) -> int:
        """A read-only array in place."""
        return len(self._value(key))

    def copy(self, key: Any, target: Array) -> None:
        """Copy out of the view."""
        np.copyto(target, self._value(key))

    def lookup(self, batch: Any) -> int:
        """One call."""
        return int(self._call(self._directory.lookup.remote(batch)))

    def delete(self, keys: Sequence[Any]) -> None:
        """Forget the references: Ray frees what nobody refers to."""
        self._call(self._directory.delete.remote(list(keys)))

    def close(self) -> None:
        """Leave the node."""
        self._ray.shutdown()


def _directory() -> type:
    """The actor's class; made here so that it travels by value, not as an import of this module."""

    class Directory:
        def __init__(self) -> None:
            self.references: dict[str, Any] = {}

        def put(self, key: str, reference: list[Any]) -> None:
            self.references[key] = reference

        def get(self, key: str) -> Any:
            return self.references[key]

        def lookup(self, keys: list[str]) -> int:
            for place, key in enumerate(keys):
                if key not in self.references:
                    return place
            return len(keys)

        def delete(self, keys: list[str]) -> None:
            for key in keys:
                self.references.pop(key, None)

    return Directory
