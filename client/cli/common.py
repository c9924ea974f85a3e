# SPDX-License-Identifier: Apache-2.0
"""What the commands share: how they reach a pool, how they fail, how they write."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cenote.client.errors import CenoteError, PoolGone, Timeout
from cenote.client.pool import Pool, connect
from cenote.shm import paths, units
from cenote.shm.facts import ChunkFacts, Namespace, printable
from cenote.shm.inspect import Catalog

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXIT_DONE: Final = 0
EXIT_WRONG: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_POOL: Final = 3
TIMEOUT_S: Final = 5.0
PIPE_COLUMNS: Final = 200  # what is not a terminal gets whole lines
KEY_SHOWN_CHARS: Final = 16
WIDE_COLUMNS: Final = 140


class Failure(Exception):
    """The command cannot go on: the text for stderr, and the exit status."""

    def __init__(self, message: str, status: int = EXIT_WRONG) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: CenoteError | OSError) -> int:
    """Return the exit status that *error* stands for."""
    return EXIT_NO_POOL if isinstance(error, PoolGone | Timeout) else EXIT_WRONG


# ---- reaching a pool ----------------------------------------------------------------------------


def parent_parser() -> argparse.ArgumentParser:
    """Return the options that every command has."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help=f"socket of the pool; ${paths.SOCKET_ENV} if that is set, else your own default "
        f"pool, then {paths.SERVICE_RUN_DIR}/{paths.DEFAULT_POOL}{paths.SOCKET_SUFFIX}",
    )
    parser.add_argument("--json", action="store_true", help="write JSON for programs")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=TIMEOUT_S,
        metavar="DURATION",
        help=f"how long to wait for the daemon, default {TIMEOUT_S:g}s",
    )
    return parser


def seconds(text: str) -> float:
    """Return the seconds of a duration on the command line."""
    try:
        found = units.parse_duration(text)
    except units.UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if found <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give more than 0 seconds")
    return found


def natural(text: str) -> int:
    """Return a number of things on the command line, 0 or more."""
    if text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of things: give 0, 1, 2 …")


def open_pool(args: argparse.Namespace, role: str = "reader") -> Pool:
    """Attach to the pool that the command line names, else to the one that a client would find."""
    label = f"cenote {args.command}"
    return connect(args.socket, role=role, label=label, timeout_s=args.timeout, reconnect=False)


def socket_of_pool(name: str) -> str:
    """Return the path of the socket of the pool called *name*, in the usual run directories."""
    try:
        paths.check_pool_name(name)
    except paths.PathError as error:
        raise Failure(str(error), EXIT_USAGE) from None
    own = paths.user_run_dir(os.environ, os.geteuid())
    looked = [own / f"{name}{paths.SOCKET_SUFFIX}"]
    if own != paths.SERVICE_RUN_DIR:
        looked.append(paths.SERVICE_RUN_DIR / f"{name}{paths.SOCKET_SUFFIX}")
    found = [path for path in looked if _usable(path, own)]
    if found:
        return str(found[0])
    places = ", ".join(str(path) for path in looked)
    raise Failure(
        f"no pool {name!r}: looked for {places}. Name its socket with --socket", EXIT_NO_POOL
    )


def _usable(path: Path, own: Path) -> bool:
    trusted = path.parent != own or not paths.run_dir_problem(own, os.geteuid())
    return path.exists() and trusted


def catalog_of(pool: Pool) -> Catalog:
    """Return the catalog that *pool* has mapped."""
    return Catalog.of(pool._attachment.handle.mapping)


def ask(pool: Pool, op: str, timeout_s: float) -> dict[str, Any]:
    """Ask the daemon over the control socket; see docs/control-protocol.md."""
    return pool._control(op, {}, timeout_s)


def find_namespace(catalog: Catalog, wanted: str) -> Namespace:
    """Return the namespace called *wanted*, or in the slot of that number."""
    there = catalog.namespaces()
    named = [namespace for namespace in there if namespace.name == wanted]
    by_number = [n for n in there if wanted in {str(n.slot), n.id.hex()}]
    by_label = [n for n in there if n.label == wanted]  # as our own tables show it
    for namespace in (*named, *by_number, *by_label):  # a name may look like a number
        return namespace
    known = ", ".join(f"{n.label} (slot {n.slot})" for n in there[:10]) or "none"
    raise Failure(
        f"pool {catalog.superblock.pool!r} has no namespace {printable(wanted)!r}: it has {known}. "
        "Give a name or a slot; `cenote status` lists them",
        EXIT_USAGE,
    )


# ---- writing ------------------------------------------------------------------------------------


def console() -> Console:
    """Return where tables go."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(width=None if terminal else PIPE_COLUMNS, highlight=False, markup=False)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """
    Return an empty table; the columns in *right* hold numbers.

    Where the terminal is narrow, text wraps: a number that is cut would be another number.
    """
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", no_wrap=name in right)
    return made


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values without a head."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column()
    for name, value in rows:
        if value:
            made.add_row(name, value)
    return made


def write_json(value: Any) -> None:
    """Write one JSON value to stdout."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


size = units.format_size_rounded


def number(value: float) -> str:
    """Return a count with its thousands apart."""
    return f"{value:,.0f}"


def counted(count: int, what: str) -> str:
    """Return "1 lease", "2 leases"."""
    return f"{number(count)} {what}" + ("" if count == 1 else "s")


def share(part: float, whole: float) -> str:
    """Return *part* of *whole* in percent, "-" of nothing."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def since(time_ns: int, now_ns: int | None = None) -> str:
    """Return how long ago *time_ns* (CLOCK_REALTIME) was, "-" for 0."""
    if not time_ns:
        return "-"
    now_ns = time.time_ns() if now_ns is None else now_ns
    return units.format_duration(max(now_ns - time_ns, 0) / 1e9)


def moment(time_ns: int) -> str:
    """Return the UTC time of *time_ns* (CLOCK_REALTIME) to the second."""
    try:
        return f"{datetime.fromtimestamp(time_ns / 1e9, tz=UTC):%Y-%m-%d %H:%M:%S}Z"
    except (OverflowError, ValueError, OSError):
        return f"{time_ns} ns"  # shared memory may hold any number


def until(time_ns: int) -> str:
    """Return a deadline for people; the largest ones are none."""
    return "for ever" if time_ns >= (1 << 63) - 1 else f"until {moment(time_ns)}"


@dataclass(frozen=True)
class KeyStyle:
    """Keys whole where there is room, else their beginning, which `explain` takes as well."""

    whole: bool

    def __call__(self, key: bytes) -> str:
        """Return *key* as hexadecimal digits."""
        return key.hex() if self.whole else key.hex()[:KEY_SHOWN_CHARS] + "…"


def chunk_fields(chunk: ChunkFacts, namespace: str) -> dict[str, Any]:
    """Return a chunk for JSON. Times are nanoseconds of CLOCK_REALTIME, sizes bytes."""
    return {
        "key": chunk.key.hex(),
        "namespace": namespace,
        "namespace_slot": chunk.namespace_slot,
        "bytes": chunk.nbytes,
        "extent_bytes": chunk.extent_bytes,
        "meta_bytes": chunk.meta_bytes,
        "region": chunk.region,
        "data_off": chunk.data_off,
        "descriptor": chunk.descriptor,
        "generation": chunk.generation,
        "flags": list(chunk.flags),
        "crc32c": chunk.crc32c,
        "sequence": chunk.sequence,
        "committed_ns": chunk.committed_ns,
        "last_use_s": chunk.last_use_s or None,
        "expires_ns": chunk.expires_ns or None,
        "pinned_ns": chunk.pinned_ns or None,
        "position": chunk.position,
        "priority": chunk.priority,
        "uses": chunk.uses if chunk.last_use_s else None,
    }
