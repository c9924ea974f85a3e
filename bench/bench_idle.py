# SPDX-License-Identifier: Apache-2.0
"""
What does a daemon cost that has nothing to do?

    python bench/bench_idle.py [--seconds N] [--chunks N]

A million chunks are stored, one client stays attached, nobody asks for anything. Counts the
context switches of all of the daemon's threads, its CPU time and its anonymous memory; the catalog
is shared memory and counts as pool.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench._loops import Loops, Session  # noqa: E402  # needs the path above
from bench.common import (  # noqa: E402
    KEY_BYTES,
    KIB,
    MANIFEST,
    MIB,
    PrivateDaemon,
    Row,
    report,
)

SECONDS: Final = 30.0
CHUNKS: Final = 1_000_000
CHUNK_BYTES: Final = 4 * KIB
SETTLE_S: Final = 3.0
ANON_BAR_MB: Final = 60.0


def _status(path: Path) -> dict[str, int]:
    """The numbers of a /proc status file; sizes in KiB."""
    fields = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        first = rest.split()
        if first and first[0].isdigit():
            fields[name] = int(first[0])
    return fields


def switches(pid: int) -> dict[str, int]:
    """Context switches of each thread so far, by its name and id."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = (task / "comm").read_text().strip()
        status = _status(task / "status")
        count = status["voluntary_ctxt_switches"] + status["nonvoluntary_ctxt_switches"]
        found[f"{name} {task.name}"] = count
    return found


def cpu_s(pid: int) -> float:
    """User and system time of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(run_s: float, chunks: int) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and the switches by thread."""
    size = (chunks * CHUNK_BYTES * 5 // 4 // (2 * MIB) + 32) * 2 * MIB
    # Chunks without bytes have no checksum: the background task would read all of them first.
    flags = ("--no-populate", "--max-chunks", str(chunks + 4096), "--checksum", "off")
    with PrivateDaemon(size, *flags, medium="memfd") as daemon:
        with daemon.connect() as pool:
            cache = pool.namespace(MANIFEST)
            Loops().fill(Session.of(cache), os.urandom(chunks * KEY_BYTES), CHUNK_BYTES)
            cache.flush(30.0)
            live = pool.stats().chunks
            time.sleep(SETTLE_S)
            before, cpu_before = switches(daemon.pid), cpu_s(daemon.pid)
            time.sleep(run_s)
            after, cpu_after = switches(daemon.pid), cpu_s(daemon.pid)
        anon_mb = _status(Path(f"/proc/{daemon.pid}/status"))["RssAnon"] * 1024 / 1e6
    by_thread = {name: after[name] - before.get(name, 0) for name in after}
    rows = [
        Row(
            f"context switches of an idle daemon in {run_s:g} s, all threads",
            sum(by_thread.values()),
            "",
            bar=0.0,
            note="no watchdog is configured here: 0 is what its own come to",
        ),
        Row("CPU time of an idle daemon", (cpu_after - cpu_before) * 1000, "ms"),
        Row(f"RssAnon with {live:,} chunks", anon_mb, "MB", bar=ANON_BAR_MB),
    ]
    return rows, {"switches_by_thread": by_thread, "live_chunks": live}


def main() -> int:
    parser = argparse.ArgumentParser(description="A daemon that has nothing to do.")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    options = parser.parse_args()
    rows, details = measure(options.seconds, options.chunks)
    report("idle", rows, **details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
