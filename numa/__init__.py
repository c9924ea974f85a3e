# SPDX-License-Identifier: Apache-2.0
"""Where memory is: the NUMA nodes of this host, and the node that holds a mapping."""

from __future__ import annotations

from .policy import PageNode, cpus_near, node_of
from .topology import Node, Topology, cpus_allowed, parse_cpulist, read_topology

__all__ = [
    "Node",
    "PageNode",
    "Topology",
    "cpus_allowed",
    "cpus_near",
    "node_of",
    "parse_cpulist",
    "read_topology",
]
