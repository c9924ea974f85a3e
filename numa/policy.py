# SPDX-License-Identifier: Apache-2.0
"""On which node a page lies, and which CPUs are near to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from cenote._native._core import ffi, lib

from .topology import Topology


@dataclass(frozen=True)
class PageNode:
    """The node of a page. known is False, and id 0, where the kernel does not tell."""

    id: int
    known: bool


def node_of(address: int) -> PageNode:
    """
    Return the NUMA node that holds the page at *address* of this process.

    A page that has no memory yet gets it by this call.

    Raises:
        OSError: Nothing is mapped there (EFAULT).
    """
    node, known = ffi.new("int32_t *"), ffi.new("int32_t *")
    syserr: Any = ffi.new("struct cn_syserr *")
    status = lib.cn_numa_node_of(ffi.cast("void *", address), node, known, syserr)
    if status != lib.CN_OK:
        reason = os.strerror(syserr.err)
        raise OSError(syserr.err, f"no NUMA node for address {address:#x}: {reason}")
    return PageNode(int(node[0]), bool(known[0]))


def cpus_near(topology: Topology, node_id: int | None, allowed: frozenset[int]) -> frozenset[int]:
    """
    Return the CPUs of *allowed* that should write to memory of node *node_id* first.

    All of *allowed* when no node is asked for, when the node has no CPUs (CXL as system RAM), or
    when none of its CPUs is allowed.
    """
    if node_id is None:
        return allowed
    return (topology.node(node_id).cpus & allowed) or allowed
