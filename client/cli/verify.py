# SPDX-License-Identifier: Apache-2.0
"""
Check a pool: do its tables agree with each other, and are its bytes those that were committed?

With a daemon it looks on as a reader, while the pool goes on; what changes meanwhile is no finding.
Without one it looks at what the last daemon left, in named shared memory, or where --catalog says,
and tells what the next daemon will make of it. It writes to nothing, but for --repair.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cenote.client.errors import AccessDenied, Corrupt, InvalidArgument, PoolGone, VersionMismatch
from cenote.client.pool import Pool
from cenote.shm import media, paths, units
from cenote.shm.messages import REFS_MAX
from cenote.shm.verify import (
    Abandoned,
    Checked,
    Finding,
    Report,
    Served,
    Verifier,
    abandoned,
    open_abandoned,
    regions_of,
)

from . import common, destroy, verify_show

AUDIT_S: Final = 60.0  # the keeper walks every descriptor


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("pool", metavar="POOL", nargs="?", help="name of the pool")
    parser.add_argument(
        "--repair", action="store_true", help="drop chunks whose bytes are wrong (admin)"
    )
    parser.add_argument("--no-crc", action="store_true", help="check the tables only")
    parser.add_argument(
        "--rate",
        type=rate,
        metavar="SIZE",
        help="read at most so much a second, for example 500MiB; default: as fast as it goes",
    )
    parser.add_argument(
        "--catalog", type=Path, metavar="PATH", help="the catalog of a pool that nobody serves"
    )
    parser.add_argument(
        "--region",
        type=Path,
        metavar="PATH",
        action="append",
        default=[],
        help="with --catalog: a region of it, once for each, where they are no named shared memory",
    )


def rate(text: str) -> int:
    """Return bytes a second on the command line."""
    try:
        found = units.parse_size(text.removesuffix("/s"))
    except units.UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if found <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give more than 0 bytes a second")
    return found


def run(args: argparse.Namespace) -> int:
    """Do it and return the exit status: 1 when something is wrong."""
    if args.region and args.catalog is None:
        raise common.Failure("--region goes with --catalog", common.EXIT_USAGE)
    report = _verified(args)
    if args.json:
        common.write_json(verify_show.as_json(report))
    else:
        common.console().print(verify_show.show(report))
    return common.EXIT_WRONG if report.wrong else common.EXIT_DONE


def _verified(args: argparse.Namespace) -> Report:
    if args.catalog is not None:
        return _without_daemon(args, args.catalog)
    try:
        pool = destroy.opened(args, "reader")
    except PoolGone as error:
        return _without_daemon(args, _catalog_of(args, str(error)))
    except common.Failure as failure:
        if failure.status != common.EXIT_NO_POOL:
            raise
        return _without_daemon(args, _catalog_of(args, str(failure)))
    with pool:
        return _with_daemon(args, pool)


# ---- with a daemon ------------------------------------------------------------------------------


def _with_daemon(args: argparse.Namespace, pool: Pool) -> Report:
    with _admin(args) as admin:
        verifier = Verifier(
            common.catalog_of(pool),
            regions_of(pool.mapping),
            settle=lambda: common.ask(pool, "stats", args.timeout),
            bytes_per_s=args.rate,
        )
        verifier.tables()
        report = verifier.report
        _ask_sessions(pool, report, args.timeout)
        _ask_audit(admin, report, args.timeout)
        done = _bytes(args, verifier)
        if args.repair and admin is not None:
            report.repaired = _repair(admin, done, args.timeout)
    older = [path for path in abandoned(pool.name) if pool.pool_id.hex()[:16] not in path.name]
    for path in older:
        report.notes.append(f"another pool of this name lies at {path}: --catalog looks at it")
    return report


@contextlib.contextmanager
def _admin(args: argparse.Namespace) -> Iterator[Pool | None]:
    """A second attachment, for what only an admin may ask; None where this user is none."""
    try:
        admin = destroy.opened(args, "admin")
    except AccessDenied:
        if args.repair:
            raise
        yield None
        return
    with admin:
        yield admin


def _ask_sessions(pool: Pool, report: Report, timeout_s: float) -> None:
    """The leases are in tables of the sessions' own, which the daemon alone sees."""
    rows = common.ask(pool, "sessions", timeout_s).get("sessions", [])
    report.walked["leases"] = sum(int(row.get("leases", 0)) for row in rows)
    for row in rows:
        if row.get("over_limit"):
            report.notes.append(f"process {row.get('pid')} leases more than it may: see `status`")


def _ask_audit(admin: Pool | None, report: Report, timeout_s: float) -> None:
    if admin is None:
        report.notes.append("the daemon's own audit was not asked for: this user is no admin")
        return
    wrong = int(common.ask(admin, "audit", max(timeout_s, AUDIT_S)).get("wrong", 0))
    report.walked["audited"] = wrong
    if wrong:
        text = "its lists and sums contradict its tables; its log has `audit_failed`"
        report.add(Finding("audit", text), wrong)


def _bytes(args: argparse.Namespace, verifier: Verifier) -> Checked | None:
    if args.no_crc:
        return None
    with media.terminal_progress("verifying", verifier.bytes_to_check) as progress:
        return verifier.bytes(progress)


def _repair(admin: Pool, done: Checked | None, timeout_s: float) -> int:
    """Drop the chunks whose bytes are wrong, of exactly the generation that was read."""
    refs: Sequence[int] = done.wrong.tolist() if done is not None else ()
    dropped = 0
    for first in range(0, len(refs), REFS_MAX):
        body = {"refs": list(refs[first : first + REFS_MAX])}
        dropped += int(admin._control("lost", body, timeout_s).get("dropped", 0))
    return dropped


# ---- without ------------------------------------------------------------------------------------


def _catalog_of(args: argparse.Namespace, why: str) -> Path:
    """Return the newest catalog that a daemon of the pool left in named shared memory."""
    socket = args.socket or os.environ.get(paths.SOCKET_ENV)
    name = args.pool or (Path(socket).stem if socket else paths.DEFAULT_POOL)
    found = abandoned(name)
    if found:
        return found[0]
    raise common.Failure(
        f"{why}. And nothing of a pool {name!r} is in named shared memory: name the pool, or its "
        "catalog with --catalog",
        common.EXIT_NO_POOL,
    )


def _without_daemon(args: argparse.Namespace, path: Path) -> Report:
    if args.repair:
        raise common.Failure(
            "--repair asks the daemon to drop chunks, and this pool has none: start it, which puts "
            "right what a crash leaves, and then verify again",
            common.EXIT_USAGE,
        )
    left = _opened(path, args.region)
    verifier = Verifier(left.catalog, left.regions, bytes_per_s=args.rate)
    verifier.tables(counted=left.clean)
    report = verifier.report
    if not args.no_crc:
        for finding in left.missing:
            report.add(finding)
    _bytes(args, verifier)
    left.tell(report)
    others = [other for other in abandoned(report.pool) if other != path]
    report.notes += [f"another pool of this name lies at {other}" for other in others]
    if left.changed():
        raise common.Failure(
            f"a daemon began with {path} meanwhile, so that what was found means nothing: verify "
            "it through that daemon",
            common.EXIT_NO_POOL,
        )
    return report


def _opened(path: Path, regions: Sequence[Path]) -> Abandoned:
    try:
        return open_abandoned(path, regions)
    except OSError as error:
        text = f"no pool: {path} cannot be read: {error.strerror}"
        raise common.Failure(text, common.EXIT_NO_POOL) from error
    except Served as error:
        raise common.Failure(str(error), common.EXIT_USAGE) from error
    except (Corrupt, VersionMismatch, InvalidArgument) as error:
        raise common.Failure(str(error), common.EXIT_WRONG) from error
