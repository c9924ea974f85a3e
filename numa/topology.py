# SPDX-License-Identifier: Apache-2.0
"""
The NUMA nodes of this host, as the kernel shows them in sysfs.

A host without that tree (a container that hides it, a kernel without NUMA) is one node with all
CPUs, so that callers need no second path.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SYSFS_NODES: Final = Path("/sys/devices/system/node")
PROC_MEMINFO: Final = Path("/proc/meminfo")
NODES_MAX: Final = 1024  # MAX_NUMNODES of the largest kernel configuration
CPUS_MAX: Final = 65_536

_NODE_DIR: Final = re.compile(r"node([0-9]{1,4})", re.ASCII)
_CPU_RANGE: Final = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", re.ASCII)
_MEMINFO: Final = re.compile(r"^(?:Node +[0-9]+ +)?(\w+): +([0-9]+) kB$", re.ASCII | re.MULTILINE)


@dataclass(frozen=True)
class Node:
    """
    One NUMA node.

    A node without CPUs is memory that was added as system RAM, CXL for instance.
    """

    id: int
    cpus: frozenset[int]
    memory_total_bytes: int
    memory_free_bytes: int


@dataclass(frozen=True)
class Topology:
    """All nodes, by id. discovered is False where sysfs said nothing and one node is assumed."""

    nodes: tuple[Node, ...]
    discovered: bool

    def node(self, node_id: int) -> Node:
        """Return the node *node_id*; KeyError, with the ids that exist, when there is none."""
        for node in self.nodes:
            if node.id == node_id:
                return node
        known = ", ".join(str(node.id) for node in self.nodes)
        raise KeyError(f"this host has no NUMA node {node_id}; it has {known}")


def parse_cpulist(text: str) -> frozenset[int]:
    """
    Return the CPUs that *text*, in the kernel's list format ("0-3,8"), names.

    Raises:
        ValueError: Not that format, or a number beyond CPUS_MAX.
    """
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else []:
        found = _CPU_RANGE.fullmatch(part)
        if found is None:
            raise ValueError(f"{text[:80]!r} is no list of CPUs such as '0-3,8'")
        begin, end = int(found[1]), int(found[2] or found[1])
        if end >= CPUS_MAX or begin > end:
            raise ValueError(f"{part!r} is no range of CPUs below {CPUS_MAX}")
        cpus.update(range(begin, end + 1))
    return frozenset(cpus)


def parse_meminfo(text: str) -> dict[str, int]:
    """Return the sizes of *text*, the format of /proc/meminfo and of a node's meminfo, in bytes."""
    return {name: int(kib) * 1024 for name, kib in _MEMINFO.findall(text)}


def cpus_allowed() -> frozenset[int]:
    """Return the CPUs that this thread may run on."""
    return frozenset(os.sched_getaffinity(0))


def read_topology(sysfs_nodes: Path = SYSFS_NODES, meminfo: Path = PROC_MEMINFO) -> Topology:
    """Return the nodes below *sysfs_nodes*; one node with all CPUs where there are none."""
    ids = sorted(int(found[1]) for found in map(_NODE_DIR.fullmatch, _names(sysfs_nodes)) if found)
    nodes = [_read_node(sysfs_nodes / f"node{node_id}", node_id) for node_id in ids[:NODES_MAX]]
    known = tuple(node for node in nodes if node is not None)
    if known:
        return Topology(known, discovered=True)
    sizes = parse_meminfo(_text(meminfo))
    cpus = frozenset(range(os.cpu_count() or 1)) | cpus_allowed()
    return Topology(
        (Node(0, cpus, sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)),), discovered=False
    )


def _read_node(folder: Path, node_id: int) -> Node | None:
    try:
        cpus = parse_cpulist(_text(folder / "cpulist"))
    except ValueError:
        return None  # a node that we cannot read is no place to put anything
    sizes = parse_meminfo(_text(folder / "meminfo"))
    return Node(node_id, cpus, sizes.get("MemTotal", 0), sizes.get("MemFree", 0))


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
