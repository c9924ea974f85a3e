# SPDX-License-Identifier: Apache-2.0
"""
End a pool: its daemon stops serving it, and its memory returns to the system.

Who holds chunks keeps them until it lets go. It cannot be undone, and an admin is needed.
"""

from __future__ import annotations

import argparse
import os
import sys

from cenote.client.pool import Pool
from cenote.shm import paths

from . import common
from .common import counted, size


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("pool", metavar="POOL", nargs="?", help="name of the pool")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    """Do it and return the exit status."""
    with opened(args) as pool:
        catalog = common.catalog_of(pool)
        stats = pool.stats(args.timeout)
        confirm(args, f"Destroy {describe(pool, args.timeout)}?")
        common.ask(pool, "destroy", args.timeout)
        capacity = catalog.superblock.capacity_bytes
    if args.json:
        common.write_json(
            {
                "pool": pool.name,
                "destroyed": True,
                "capacity_bytes": capacity,
                "chunks": stats.chunks,
                "leases": stats.leases,
            }
        )
    else:
        kept = f"; {counted(stats.leases, 'lease')} to be released" if stats.leases else ""
        print(f"pool {pool.name} is destroyed: {counted(stats.chunks, 'chunk')} dropped{kept}")
    return common.EXIT_DONE


def opened(args: argparse.Namespace, role: str = "admin") -> Pool:
    """Attach to the pool that was named, and to no other."""
    if args.socket is None:
        # before the pool's name: another directory may have a pool of the same name
        args.socket = os.environ.get(paths.SOCKET_ENV) or None
    if args.socket is None and args.pool is not None:
        args.socket = common.socket_of_pool(args.pool)
    pool = common.open_pool(args, role)
    if args.pool in (None, pool.name):
        return pool
    pool.close()
    raise common.Failure(
        f"{args.socket} is the socket of pool {pool.name!r}, not of {args.pool!r}: nothing was "
        "done. Name the pool that you mean",
        common.EXIT_USAGE,
    )


def describe(pool: Pool, timeout_s: float) -> str:
    """Return what a person is about to lose."""
    stats = pool.stats(timeout_s)
    others = stats.sessions - 1
    return (
        f"pool {pool.name!r} ({size(stats.bytes_total)}, {counted(stats.chunks, 'chunk')}, "
        f"{size(stats.bytes_used)} used, {counted(max(others, 0), 'other session')})"
    )


def confirm(args: argparse.Namespace, question: str) -> None:
    """Ask on a terminal; without one, --yes is needed."""
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise common.Failure(
            f"{args.command} asks before it acts, and there is no terminal: give --yes",
            common.EXIT_USAGE,
        )
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise common.Failure("nothing was done", common.EXIT_WRONG)
