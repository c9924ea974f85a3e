# SPDX-License-Identifier: Apache-2.0
"""
List the chunks that can be looked up now, read from the catalog without asking the daemon.

Where the terminal is narrow a key is shortened; `cenote explain` takes its beginning as well.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, Final

import numpy as np

from cenote.shm import units
from cenote.shm.facts import ChunkFacts, ChunkTable
from cenote.shm.inspect import Catalog

from . import common
from .common import counted, number, size

LIMIT: Final = 100
SORTS: Final = ("age", "size", "position", "priority", "key", "expires")
_PINNED: Final = np.uint64(1)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--pinned", action="store_true", help="only chunks that are pinned")
    parser.add_argument("--namespace", metavar="NAME|SLOT", help="only chunks of this namespace")
    parser.add_argument(
        "--sort",
        choices=SORTS,
        default="age",
        help="age: newest first (default); size, position, priority: largest first; key, expires: "
        "smallest first",
    )
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument(
        "--limit",
        type=common.natural,
        default=LIMIT,
        metavar="N",
        help=f"show at most N chunks, 0 for all; default {LIMIT}",
    )


def run(args: argparse.Namespace) -> int:
    """Do it and return the exit status: 1 when a record of the catalog makes no sense."""
    with common.open_pool(args) as pool:
        catalog = common.catalog_of(pool)
        labels = {n.slot: n.label for n in catalog.namespaces()}
        chosen = choose(catalog, pinned=args.pinned, namespace=args.namespace)
        rows = ordered(chosen, args.sort, reverse=args.reverse)
        shown = rows.where(np.arange(min(args.limit or len(rows), len(rows))))
    if args.json:
        common.write_json(
            {
                "pool": catalog.superblock.pool,
                "chunks": len(chosen),
                "bytes": int(chosen.nbytes.sum()),
                "nonsense": chosen.nonsense,
                "shown": [common.chunk_fields(c, labels.get(c.namespace_slot, "?")) for c in shown],
            }
        )
    else:
        _print(shown, chosen, labels)
    if chosen.nonsense:
        raise common.Failure(
            f"{chosen.nonsense} records of pool {catalog.superblock.pool!r} point outside their "
            "region or name no namespace, and were left out: restart the daemon and report it"
        )
    return common.EXIT_DONE


def choose(catalog: Catalog, *, pinned: bool = False, namespace: str | None = None) -> ChunkTable:
    """Return the chunks of *catalog* that the filters leave."""
    slot = common.find_namespace(catalog, namespace).slot if namespace is not None else None
    table = catalog.chunks()
    keep = np.ones(len(table), dtype=bool)
    if pinned:
        keep &= (table.flags & _PINNED) != 0
    if slot is not None:
        keep &= table.namespaces == slot
    return table.where(keep)


def ordered(table: ChunkTable, by: str, *, reverse: bool = False) -> ChunkTable:
    """Return the rows in the order that --sort names."""
    order = np.argsort(_column(table, by), kind="stable")
    descending = by not in {"key", "expires"}
    return table.where(order[::-1] if descending != reverse else order)


def _column(table: ChunkTable, by: str) -> Any:
    cold = table.cold
    if by == "key":
        return np.ascontiguousarray(table.chunks["key"]).view("S32").ravel()
    if by == "size":
        return table.nbytes
    if by == "expires":
        never = np.uint64(2**64 - 1)
        return np.where(cold["expires_ns"] == 0, never, cold["expires_ns"])
    names = {"age": "sequence", "position": "position", "priority": "priority"}
    return cold[names[by]]


def _print(shown: ChunkTable, chosen: ChunkTable, labels: dict[int, str]) -> None:
    console = common.console()
    key = common.KeyStyle(whole=console.width >= common.WIDE_COLUMNS)
    made = common.table(
        "key", "namespace", "bytes", "age", "position", "priority", "",
        right=("bytes", "age", "position", "priority"),
    )  # fmt: skip
    now_ns = time.time_ns()
    for chunk in shown:
        made.add_row(
            key(chunk.key),
            labels.get(chunk.namespace_slot, "?"),
            size(chunk.nbytes),
            common.since(chunk.committed_ns, now_ns),
            "-" if chunk.position is None else str(chunk.position),
            str(chunk.priority),
            notes(chunk, now_ns),
        )
    if len(shown):
        console.print(made)
    total = f"{counted(len(chosen), 'chunk')}, {size(int(chosen.nbytes.sum()))}"
    if len(shown) < len(chosen):
        total += f"; {number(len(shown))} shown, --limit 0 shows all"
    console.print(total)


def notes(chunk: ChunkFacts, now_ns: int) -> str:
    """Return what is special about a chunk, in a few words."""
    said = []
    if chunk.pinned:
        said.append(f"pinned {common.until(chunk.pinned_ns)}" if chunk.pinned_ns else "pinned")
    if chunk.expires_ns:
        left_s = (chunk.expires_ns - now_ns) / 1e9
        said.append(f"expires in {units.format_duration(max(left_s, 0))}")
    said += [flag for flag in chunk.flags if flag in {"unverified", "copy"}]
    return ", ".join(said)
