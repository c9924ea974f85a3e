# SPDX-License-Identifier: Apache-2.0
"""
cenote beside the systems that one could use in its place, in one run on this host.

    python bench/peers.py [--peer NAME ...] [--rounds N] [--out FILE] [--list]

Installs each peer at its first use, below build/peers, and says first what that downloads.  JSON
goes to build/bench/peers.json or to --out, the table to stdout, progress to stderr.  A peer that
cannot be installed or started is reported with its reason.  bench/_peers/README.md says what is
measured, and how.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench._peers import environments, registry, table  # noqa: E402  # needs the path above
from bench._peers.base import LOOKUP_BYTES, SIZES, Peer, Unavailable  # noqa: E402

MEASURE: Final = ROOT / "bench" / "_peers" / "measure.py"
OUT: Final = ROOT / "build" / "bench" / "peers.json"
ROUNDS: Final = 7
MEASURE_S: Final = 900
END_S: Final = 30
OWN_NETWORK: Final = ["sh", "-c", 'ip link set lo up && exec "$0" "$@"']


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def own_network() -> list[str] | None:
    """Return the command that gives another one a network of its own; None where none can."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return None
    flags = "-n" if os.geteuid() == 0 else "-rn"
    command = ["unshare", flags, "--", *OWN_NETWORK]
    tried = subprocess.run([*command, "true"], check=False, capture_output=True)
    return command if tried.returncode == 0 else None


def measure(peer: type[Peer], rounds: int) -> dict[str, Any]:
    """
    Measure one peer in a process of its own.

    Raises:
        Unavailable: It could not be measured.
    """
    network = own_network()
    if network is None and peer.all_interfaces:
        say(f"{peer.name}: listens on all interfaces until it is stopped: no `unshare -n` here")
    python = environments.python_of(peer.environment)
    command = [sys.executable, "-P", str(MEASURE), peer.name, python, str(rounds)]
    process = subprocess.Popen(
        [*(network or []), *command], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=MEASURE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        process.terminate()  # it ends what it started
        process.communicate(timeout=END_S)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Unavailable(f"not measured within {MEASURE_S} s") from error
    if process.returncode:
        raise Unavailable(f"its measuring process ended with status {process.returncode}")
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    if "reason" in answer:
        raise Unavailable(str(answer["reason"]))
    return answer


def one(name: str, rounds: int) -> dict[str, Any]:
    """Install and measure a peer, or say why not."""
    peer = registry.load(name)
    versions = list(peer.environment.requirements) if peer.environment else []
    result: dict[str, Any] = {"title": peer.title, "how": peer.how, "in_place": peer.in_place}
    result |= {"requirements": versions, "load_before": os.getloadavg()[0]}
    try:
        install_s = environments.provide(peer)
        if install_s > 1:
            result["install_s"] = round(install_s, 1)
        say(f"{name}: measuring" + (f", installed in {install_s:.0f} s" if install_s > 1 else ""))
        answer = measure(peer, rounds)
    except Unavailable as error:
        say(f"{name}: not measured: {error}")
        return {**result, "reason": str(error)}
    say(f"{name}: done in {answer['seconds']:.0f} s")
    return {**result, "figures": answer["figures"], "seconds": answer["seconds"]}


def report_on(names: list[str], rounds: int) -> dict[str, Any]:
    """Measure one peer after another."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}",
        "python": platform.python_version(),
        "rounds": rounds,
        "chunks": {str(nbytes): count for nbytes, count in SIZES.items()},
        "lookup_keys": SIZES[LOOKUP_BYTES],
        "peers": {name: one(name, rounds) for name in names},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", metavar="NAME", nargs="+", action="extend", help="only these")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds each ({ROUNDS})")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--list", action="store_true", help="name the peers, and end")
    options = parser.parse_args()
    if options.list:
        for name in registry.CLASSES:
            print(f"{name:16} {registry.load(name).title}")
        return 0
    unknown = [name for name in options.peer or [] if name not in registry.CLASSES]
    if unknown:
        parser.error(f"there is no peer {unknown[0]!r}: see --list")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: give at least 1")
    names = [name for name in registry.CLASSES if not options.peer or name in options.peer]
    fetched = environments.plan(registry.load(name) for name in names)
    if fetched:
        say("This will download, and keep until `make clean`:\n  " + "\n  ".join(fetched))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = report_on(names, options.rounds)
    except KeyboardInterrupt:
        say("stopped; what was started is ended")
        return 130
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table.markdown(report), end="")
    return 0 if any("figures" in result for result in report["peers"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
