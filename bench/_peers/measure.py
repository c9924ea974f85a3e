# SPDX-License-Identifier: Apache-2.0
"""
Measures one peer and cleans up behind it.

    python -P bench/_peers/measure.py PEER PYTHON ROUNDS

PYTHON is the interpreter of the peer's environment.  JSON goes to the last line of stdout.  This is
a process of its own so that it can be put into a network namespace, and so that whatever a peer
starts descends from it and is ended with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT))

from bench._peers import processes, registry  # noqa: E402  # needs the path above
from bench._peers.base import LOOKUP_BYTES, SIZES, Peer, Unavailable  # noqa: E402


def figures(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """Medians over the rounds; the ratio is taken in each round, and then its median."""
    summary = {
        "us": round(statistics.median(times[name]), 3),
        "us_min": round(min(times[name]), 3),
        "us_max": round(max(times[name]), 3),
    }
    if "memcpy" in times:
        pairs = zip(times[name], times["memcpy"], strict=True)
        summary["memcpy_us"] = round(statistics.median(times["memcpy"]), 3)
        summary["x_memcpy"] = round(statistics.median(own / ref for own, ref in pairs), 4)
    return summary


def run(writer: processes.Worker, reader: processes.Worker, sizes: list[int], rounds: int) -> Any:
    """Put, get and look up. Operation -> bytes of a chunk -> figures."""
    found: dict[str, Any] = {"view": {}, "copy": {}, "put": {}, "lookup": {}}
    for nbytes in sizes:
        times = writer.ask("put", nbytes=nbytes, rounds=rounds)
        found["put"][nbytes] = figures(times, "put")
        times = reader.ask("get", nbytes=nbytes, rounds=rounds)
        for name in ("view", "copy"):
            found[name][nbytes] = figures(times, name)
        if nbytes == LOOKUP_BYTES:
            writer.ask("prepare_lookup")
            times = reader.ask("lookup", rounds=rounds)
            found["lookup"] = figures(times, "lookup")
        writer.ask("delete", nbytes=nbytes)
    return found


def measure(peer: Peer, python: str, rounds: int) -> dict[str, Any]:
    """Measure all sizes together, or one after another where the peer wants them alone."""
    if not peer.alone:
        return measure_sizes(peer, python, rounds)
    found: dict[str, Any] = {}
    for nbytes in SIZES:
        peer.sizes = [nbytes]
        for operation, result in measure_sizes(peer, python, rounds).items():
            found.setdefault(operation, {}).update(result)
    return found


def measure_sizes(peer: Peer, python: str, rounds: int) -> dict[str, Any]:
    """Start the peer, measure it, and end it, whatever happens."""
    peer.clean()
    try:
        peer.start(processes.Servers(peer.folder))
        environment = peer.worker_environment()
        sides = [
            processes.Worker(python, peer.name, role, peer.folder, environment)
            for role in ("writer", "reader")
        ]
        found: dict[str, Any] = run(sides[0], sides[1], peer.sizes, rounds)
        for side in reversed(sides):
            side.end()
        return found
    finally:
        processes.end_descendants()
        peer.clean()


def main() -> int:
    name, python, rounds = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    processes.adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="cenote-peers-"))  # short: sockets lie in it
    answer: dict[str, Any] = {"peer": name}
    started_s = time.monotonic()
    try:
        with contextlib.suppress(ValueError):
            (folder / "venv").symlink_to(Path(python).parent.parent)
        answer["figures"] = measure(registry.load(name)(folder), python, int(rounds))
    except (Unavailable, OSError) as error:
        answer["reason"] = str(error)
    finally:
        keep = os.environ.get("CENOTE_PEERS_LOGS")
        if keep:
            logs = Path(keep) / name
            shutil.copytree(folder, logs, dirs_exist_ok=True, ignore=_only_logs)
        shutil.rmtree(folder, ignore_errors=True)
    answer["seconds"] = round(time.monotonic() - started_s, 1)
    print(json.dumps(answer), flush=True)
    return 0


def _only_logs(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".log") or Path(folder, name).is_dir()]


if __name__ == "__main__":
    sys.exit(main())
