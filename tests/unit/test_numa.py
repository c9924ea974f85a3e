# SPDX-License-Identifier: Apache-2.0
"""The topology as sysfs shows it, and the node of a page."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from cenote._native._core import ffi
from cenote.numa import (
    Node,
    Topology,
    cpus_allowed,
    cpus_near,
    node_of,
    parse_cpulist,
    read_topology,
)

GIB = 1024**3


def write_node(root: Path, node_id: int, cpulist: str, total_kib: int, free_kib: int) -> None:
    folder = root / f"node{node_id}"
    folder.mkdir()
    (folder / "cpulist").write_text(f"{cpulist}\n")
    (folder / "meminfo").write_text(
        f"Node {node_id} MemTotal:       {total_kib} kB\n"
        f"Node {node_id} MemFree:        {free_kib} kB\n"
        f"Node {node_id} HugePages_Free:      0\n"
    )


def test_nodes_are_read_from_sysfs_in_order_of_their_ids(tmp_path: Path) -> None:
    """Two sockets and a CXL node without CPUs come out as they are, node 10 after node 2."""
    write_node(tmp_path, 10, "", 256 * 1024**2, 255 * 1024**2)
    write_node(tmp_path, 0, "0-3,8-11", 64 * 1024**2, 1024)
    write_node(tmp_path, 2, "4-7", 64 * 1024**2, 2048)
    (tmp_path / "possible").write_text("0-15\n")
    (tmp_path / "nodes").mkdir()

    topology = read_topology(tmp_path)

    assert topology.discovered
    assert [node.id for node in topology.nodes] == [0, 2, 10]
    assert Node(0, frozenset({0, 1, 2, 3, 8, 9, 10, 11}), 64 * GIB, 1024**2) == topology.node(0)
    assert frozenset() == topology.node(10).cpus
    assert topology.node(10).memory_total_bytes == 256 * GIB


def test_a_host_without_the_tree_is_one_node_with_all_cpus(tmp_path: Path) -> None:
    """A container that hides sysfs is one node 0 with this thread's CPUs and the host's memory."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2048 kB\nMemAvailable: 1024 kB\n")

    topology = read_topology(tmp_path / "absent", meminfo)

    assert not topology.discovered
    assert [node.id for node in topology.nodes] == [0]
    assert cpus_allowed() <= topology.node(0).cpus
    assert (
        topology.node(0).memory_total_bytes,
        topology.node(0).memory_free_bytes,
    ) == (2048 * 1024, 1024**2)


def test_a_node_whose_cpus_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """Nonsense in one node's cpulist hides that node and no other."""
    write_node(tmp_path, 0, "0-1", 1024, 512)
    write_node(tmp_path, 1, "3-1", 1024, 512)

    assert [node.id for node in read_topology(tmp_path).nodes] == [0]


def test_this_host_has_the_cpus_that_we_run_on() -> None:
    """The real topology has a node, and each CPU we may use is on one."""
    topology = read_topology()

    assert topology.nodes
    assert cpus_allowed() <= frozenset().union(*(node.cpus for node in topology.nodes))


@pytest.mark.parametrize(
    ("text", "cpus"), [("", set()), ("0", {0}), ("0-2,5\n", {0, 1, 2, 5}), ("7-7", {7})]
)
def test_cpu_lists_are_the_kernels(text: str, cpus: set[int]) -> None:
    """The kernel's list format is read as it writes it."""
    assert cpus == parse_cpulist(text)


@pytest.mark.parametrize(
    "text", ["a", "1-", "-1", "3-1", "1,,2", "0-65536", "0-99999999999999", "\u0661"]
)
def test_other_cpu_lists_are_refused(text: str) -> None:
    """What is no list of CPUs, or far too long a one, is a ValueError and no work."""
    with pytest.raises(ValueError, match="CPU"):
        parse_cpulist(text)


def test_an_unknown_node_is_named_with_those_that_exist() -> None:
    """Asking for a node that is not there says which are."""
    topology = Topology(
        (Node(0, frozenset({0}), 0, 0), Node(3, frozenset(), 0, 0)), discovered=True
    )

    with pytest.raises(KeyError, match="no NUMA node 7; it has 0, 3"):
        topology.node(7)


def test_pretouch_runs_near_the_memory_where_it_may() -> None:
    """The node's CPUs that are allowed; all that are allowed when there are none of those."""
    topology = Topology(
        (Node(0, frozenset({0, 1}), 0, 0), Node(1, frozenset(), 0, 0)), discovered=True
    )

    assert frozenset({1}) == cpus_near(topology, 0, frozenset({1, 2}))
    assert frozenset({2}) == cpus_near(topology, 0, frozenset({2}))
    assert frozenset({1, 2}) == cpus_near(topology, 1, frozenset({1, 2}))
    assert frozenset({1, 2}) == cpus_near(topology, None, frozenset({1, 2}))


def test_the_node_of_a_page_is_one_of_this_host() -> None:
    """A page of ours lies on a node that the topology knows, or the kernel does not tell."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        found = node_of(int(ffi.cast("uintptr_t", ffi.from_buffer(page))))

    assert found.id in [node.id for node in read_topology().nodes] or not found.known


def test_the_node_of_nothing_is_an_error() -> None:
    """An address where nothing is mapped is EFAULT, unless the kernel does not tell at all."""
    if not node_of(id(object())).known:
        pytest.skip("the kernel does not tell nodes here")

    with pytest.raises(OSError, match="no NUMA node") as caught:
        node_of(os.sysconf("SC_PAGESIZE"))

    assert caught.value.errno == errno.EFAULT
