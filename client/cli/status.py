# SPDX-License-Identifier: Apache-2.0
"""
Show a pool: its daemon, its memory, its namespaces and who is attached.

A process that was stopped (SIGSTOP) keeps its leases; it is named, for it may hold memory that
others want.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from cenote.client.pool import Pool
from cenote.shm import units
from cenote.shm.facts import Namespace, printable
from cenote.shm.inspect import ROLE_NAMES, SESSION_STATES
from cenote.shm.messages import NO_LIMIT

from . import common
from .common import counted, number, share, size

if TYPE_CHECKING:
    from rich.console import Group

NAMESPACES_SHOWN: Final = 20
SESSIONS_SHOWN: Final = 40
STOPPED: Final = ("stopped", "tracing-stop")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command: none of its own."""


def run(args: argparse.Namespace) -> int:
    """Do it and return the exit status."""
    with common.open_pool(args) as pool:
        facts = gather(pool, args.timeout)
    if args.json:
        common.write_json(facts)
    else:
        common.console().print(show(facts))
    return common.EXIT_DONE


# ---- finding out --------------------------------------------------------------------------------


def gather(pool: Pool, timeout_s: float) -> dict[str, Any]:
    """Return everything that status shows, as it goes out for JSON."""
    stats = common.ask(pool, "stats", timeout_s)
    rows = common.ask(pool, "sessions", timeout_s).get("sessions", [])
    catalog = common.catalog_of(pool)
    counters = {str(name): int(value) for name, value in stats.get("counters", {}).items()}
    own = pool._attachment.welcome.session
    recorded, live = catalog.checksummed()
    superblock, now = catalog.superblock, catalog.now()
    return {
        "pool": pool.name,
        "pool_id": pool.pool_id.hex(),
        "state": "serving" if now.serving else "retired",
        "daemon": {
            "pid": stats.get("pid"),
            "version": stats.get("server"),
            "uptime_s": stats.get("uptime_s"),
            "process_state": process_state(int(stats.get("pid") or 0), 0),
        },
        "regions": [asdict(region) for region in superblock.regions],
        "memory": _memory(stats, counters),
        "limits": {
            "chunks": superblock.chunk_count,
            "lease_slots": superblock.lease_slots,
            "events": superblock.event_count,
        },
        "policy": {key: stats.get(key) for key in ("policy", "high_water", "low_water")},
        "checksum": {"mode": stats.get("checksum"), "recorded": recorded, "chunks": live},
        "counters": counters,
        "hit_rate": rate(counters.get("hits", 0), counters.get("misses", 0)),
        "namespaces": [_namespace(n, counters) for n in catalog.namespaces()],
        "sessions": [_session(row, stats.get("pid")) for row in rows if row.get("session") != own],
    }


def _memory(stats: dict[str, Any], counters: dict[str, int]) -> dict[str, int]:
    return {
        "capacity_bytes": int(stats.get("capacity_bytes", 0)),
        "used_bytes": counters.get("live_bytes", 0),
        "granted_bytes": counters.get("granted_bytes", 0),
        "free_bytes": counters.get("free_bytes", 0),
        "waste_bytes": counters.get("waste_bytes", 0),
        "catalog_bytes": int(stats.get("catalog_bytes", 0)),
    }


def _namespace(namespace: Namespace, counters: dict[str, int]) -> dict[str, Any]:
    return {
        "slot": namespace.slot,
        "id": namespace.id.hex(),
        "name": namespace.name or None,
        "manifest": namespace.manifest,
        "tenant": f"{namespace.tenant:016x}" if namespace.tenant else None,
        "quota_bytes": namespace.quota_bytes or None,
        "live_bytes": namespace.live_bytes,
        "live_chunks": namespace.live_chunks,
        "share": rate(namespace.live_bytes, counters.get("live_bytes", 0) - namespace.live_bytes),
        "evictions": namespace.evictions,
        "created_ns": namespace.created_ns,
    }


def _session(row: dict[str, Any], daemon_pid: int | None) -> dict[str, Any]:
    numbers = {key: int(value) for key, value in row.items() if isinstance(value, int)}
    pid, attached_ns = numbers.get("pid", 0), numbers.get("attached_ns", 0)
    limit = numbers.get("lease_limit_bytes", NO_LIMIT)
    return {
        "session": numbers.get("session"),
        "state": SESSION_STATES.get(numbers.get("state", 0), "?"),
        "role": ROLE_NAMES.get(numbers.get("role", 0), "?"),
        "label": printable(str(row.get("label", ""))),
        "pid": pid or None,
        "of_daemon": pid == daemon_pid,
        "uid": numbers.get("uid"),
        "gid": numbers.get("gid"),
        "process_state": process_state(pid, attached_ns),
        "attached_ns": attached_ns,
        "leases": numbers.get("leases", 0),
        "leased_bytes": numbers.get("leased_bytes", 0),
        "granted_bytes": numbers.get("granted_bytes", 0),
        "limbo_chunks": numbers.get("limbo_chunks", 0),
        "hits": numbers.get("hits", 0),
        "misses": numbers.get("misses", 0),
        "hit_rate": rate(numbers.get("hits", 0), numbers.get("misses", 0)),
        "lease_refused": numbers.get("lease_refused", 0),
        "lease_limit_bytes": limit if limit != NO_LIMIT else None,
        "over_limit": bool(row.get("over_limit", False)),
    }


def rate(hits: int, misses: int) -> float | None:
    """Return hits of all, None of nothing."""
    total = hits + misses
    return round(hits / total, 6) if hits >= 0 and total > 0 else None


def process_state(pid: int, attached_ns: int) -> str:
    """
    Return "running", "sleeping", "stopped", … as psutil calls it, or "gone".

    "unknown" for a process of another pid namespace, or a pid that another process has by now.
    """
    import psutil

    if pid <= 0:
        return "unknown"
    try:
        process = psutil.Process(pid)
        reused = attached_ns and process.create_time() > attached_ns / 1e9 + 1
        return "unknown" if reused else str(process.status())
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.Error:
        return "unknown"


# ---- showing ------------------------------------------------------------------------------------


def show(facts: dict[str, Any]) -> Group:
    """Return *facts* for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [common.pairs(_head(facts)), ""]
    parts += _namespace_part(facts) + _session_part(facts)
    parts += [Text(remark, style="bold yellow") for remark in remarks(facts)]
    return Group(*parts)


def _head(facts: dict[str, Any]) -> list[tuple[str, str]]:
    memory, counters, daemon = facts["memory"], facts["counters"], facts["daemon"]
    capacity = memory["capacity_bytes"]
    uptime = units.format_duration(daemon["uptime_s"] or 0)
    limbo = counters.get("limbo_chunks", 0)
    return [
        ("pool", f"{facts['pool']}  {facts['pool_id']}  {facts['state']}"),
        ("daemon", f"{daemon['version']}  pid {daemon['pid']}  up {uptime}"),
        ("medium", ", ".join(_region(region) for region in facts["regions"])),
        ("capacity", size(capacity)),
        ("  used", f"{size(memory['used_bytes'])}  {share(memory['used_bytes'], capacity)}"),
        ("  granted", f"{size(memory['granted_bytes'])} to writers"),
        ("  free", size(memory["free_bytes"])),
        ("  waste", f"{size(memory['waste_bytes'])}  {share(memory['waste_bytes'], capacity)}"),
        (
            "chunks",
            f"{number(counters.get('live_chunks', 0))} of {number(facts['limits']['chunks'])}",
        ),
        ("  pinned", number(counters.get("pinned_chunks", 0))),
        ("  limbo", f"{number(limbo)} gone and still leased" if limbo else ""),
        ("hits", f"{_percent(facts['hit_rate'])} of {number(_lookups(counters))} lookups"),
        ("stored", _stored(counters)),
        ("left", _left(counters)),
        ("eviction", _policy(facts["policy"])),
        ("checksums", _checksums(facts["checksum"], counters)),
    ]


def _region(region: dict[str, Any]) -> str:
    node = f", node {region['node']}" if region["node"] >= 0 else ""
    pages = units.format_size(region["page_bytes"])
    return f"{region['medium']} {size(region['bytes'])} ({pages} pages{node})"


def _lookups(counters: dict[str, int]) -> int:
    return counters.get("hits", 0) + counters.get("misses", 0)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _stored(counters: dict[str, int]) -> str:
    said = f"{number(counters.get('commits', 0))} chunks"
    for name, what in (("duplicates", "were there already"), ("refused", "refused")):
        if counters.get(name):
            said += f", {number(counters[name])} {what}"
    return said


def _left(counters: dict[str, int]) -> str:
    names = {
        "evictions": "evicted",
        "expirations": "expired",
        "deletions": "deleted",
        "lost": "lost",
    }
    parts = [f"{number(counters[n])} {what}" for n, what in names.items() if counters.get(n)]
    return ", ".join(parts) or "none"


def _policy(policy: dict[str, Any]) -> str:
    high, low = policy["high_water"], policy["low_water"]
    if not isinstance(high, float) or not isinstance(low, float):
        return str(policy["policy"])
    return f"{policy['policy']}, from {100 * high:.4g}% down to {100 * high * low:.4g}%"


def _checksums(checksum: dict[str, Any], counters: dict[str, int]) -> str:
    recorded, chunks = checksum["recorded"], checksum["chunks"]
    lost = counters.get("lost", 0)
    bad = f", {number(lost)} chunks lost" if lost else ""
    return f"{checksum['mode']}, recorded for {number(recorded)} of {number(chunks)} chunks{bad}"


def _namespace_part(facts: dict[str, Any]) -> list[Any]:
    rows = sorted(facts["namespaces"], key=lambda row: -row["live_bytes"])
    if not rows:
        return ["no namespaces", ""]
    made = common.table(
        "namespace", "slot", "chunks", "bytes", "share", "quota", "evicted", "manifest",
        right=("slot", "chunks", "bytes", "share", "quota", "evicted"),
    )  # fmt: skip
    for row in rows[:NAMESPACES_SHOWN]:
        made.add_row(
            row["name"] or row["id"][:16],
            str(row["slot"]),
            number(row["live_chunks"]),
            size(row["live_bytes"]),
            _percent(row["share"]),
            size(row["quota_bytes"]) if row["quota_bytes"] else "-",
            number(row["evictions"]),
            manifest_text(row["manifest"]),
        )
    return [made, *_more(len(rows) - NAMESPACES_SHOWN, "namespaces"), ""]


def manifest_text(manifest: dict[str, Any] | None) -> str:
    """Return a manifest in one line."""
    if manifest is None:
        return "(unreadable)"
    return printable(" ".join(f"{name}={value}" for name, value in manifest.items()))


def _session_part(facts: dict[str, Any]) -> list[Any]:
    rows = sorted(facts["sessions"], key=lambda row: -row["leased_bytes"])
    if not rows:
        return ["no sessions"]
    made = common.table(
        "pid", "uid", "role", "label", "attached", "leases", "leased", "granted", "hits", "limbo",
        "process",
        right=("pid", "uid", "attached", "leases", "leased", "granted", "hits", "limbo"),
    )  # fmt: skip
    now_ns = time.time_ns()
    for row in rows[:SESSIONS_SHOWN]:
        made.add_row(
            str(row["pid"] or "?"),
            str(row["uid"]),
            "daemon" if row["of_daemon"] else row["role"],
            row["label"],
            common.since(row["attached_ns"], now_ns),
            number(row["leases"]),
            size(row["leased_bytes"]),
            size(row["granted_bytes"]),
            _percent(row["hit_rate"]),
            number(row["limbo_chunks"]),
            row["process_state"],
            style="bold yellow" if row["process_state"] in STOPPED or row["over_limit"] else "",
        )
    return [made, *_more(len(rows) - SESSIONS_SHOWN, "sessions")]


def _more(count: int, what: str) -> list[str]:
    return [f"… and {number(count)} more {what}; --json has them all"] if count > 0 else []


def remarks(facts: dict[str, Any]) -> list[str]:
    """Return what a person should know, each with what to do about it."""
    said = []
    for row in facts["sessions"]:
        who = f"process {row['pid']} ({row['label']})"
        if row["process_state"] in STOPPED:
            said.append(
                f"{who} is stopped and keeps {counted(row['leases'], 'lease')} and "
                f"{size(row['leased_bytes'] + row['granted_bytes'])}: continue it with "
                f"`kill -CONT {row['pid']}`, or end it"
            )
        if row["over_limit"]:
            said.append(
                f"{who} leases {size(row['leased_bytes'])} and may lease "
                f"{size(row['lease_limit_bytes'])}: its client does not keep the limit; end it"
            )
        if row["limbo_chunks"]:
            said.append(
                f"{who} keeps {counted(row['limbo_chunks'], 'chunk')} from being freed: they have "
                "left the cache, and it should release them"
            )
        if row["lease_refused"]:
            said.append(
                f"{who} was refused {counted(row['lease_refused'], 'lease')}, as it holds so many: "
                "it should release chunks, or raise lease_slots"
            )
    if facts["state"] == "retired":
        said.append("the pool is retired: clients see misses and connect again")
    return said
