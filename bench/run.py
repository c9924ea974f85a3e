# SPDX-License-Identifier: Apache-2.0
"""
Runs every bench, prints one table with bars and verdicts, and keeps it all with the facts of this
machine in build/bench/results.json.

    python bench/run.py [--quick] [--only copy,idle] [--out FILE]

Each bench is a process of its own, one after the other. The exit status is 0 when all of them ran,
whatever they found: machines differ, and bars are judged on a quiet one. --strict makes it 1 when a
bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench.common import HERE, Row  # noqa: E402  # needs the path above

RESULTS: Final = ROOT / "build" / "bench" / "results.json"
LIMIT_S: Final = 1800
ONE_MILLION: Final = 1_000_000
WASTE_BAR_PERCENT: Final = 0.5
HOT_BAR_NS: Final = 15.0


@dataclass(frozen=True)
class Bench:
    """A bench: its name, its command, what --quick adds, and how its output becomes rows."""

    name: str
    command: tuple[str, ...]
    quick: tuple[str, ...]
    rows: Callable[[str], list[dict[str, Any]]]


def _reported(text: str) -> list[dict[str, Any]]:
    """Rows of a Python bench; one that was skipped says why."""
    found = json.loads(text)
    rows: list[dict[str, Any]] = found["rows"]
    if "skipped" in found:
        rows.append(Row(f"{found['bench']}: skipped", 0, "", note=found["skipped"]).as_json())
    return rows


def _hit_rows(text: str) -> list[dict[str, Any]]:
    return [row.as_json() for line in text.splitlines() for row in _hits_at(json.loads(line))]


def _hits_at(found: dict[str, Any]) -> Iterator[Row]:
    """One line of bench_hit: a catalog of one size."""
    chunks, load = found["chunks"], found["dependent_load_ns"]
    judged = chunks >= ONE_MILLION
    theirs, at = "random dependent load", f", {chunks:,} chunks"

    def against_load(name: str, key: str, bar: float | None) -> Row:
        value, ratio = found[f"{key}_ns"], found[f"{key}_ratio"]
        return Row(name + at, value, "ns", load, theirs, ratio, bar if judged else None)

    yield against_load("find + lease + release in C", "hit", 0.7)
    yield against_load("… each key from the last result", "hit_dependent", 2.5)
    # 15 ns, or a fifth of the load
    hot_bar = max(HOT_BAR_NS, load / 5) if judged else None
    hot = found["hit_hot_ns"]
    yield Row("… hot keys" + at, hot, "ns", load, theirs, hot / load, hot_bar, bar_on="value")
    yield against_load("lease_many of 512, a key", "lease_many_512", None)
    yield against_load("match of 512, a key", "match_512", None)


def _waste_rows(text: str) -> list[dict[str, Any]]:
    return [
        Row(
            f"waste of a slab, {row['model']}",
            100 * row["slab_waste"],
            "%",
            bar=WASTE_BAR_PERCENT,
            note=f"{row['chunk_bytes']:,} bytes a chunk",
        ).as_json()
        for row in json.loads(text)["rows"]
    ]


def _arena_rows(text: str) -> list[dict[str, Any]]:
    verbs = ("fill", "churn", "full", "drain", "mixed")
    return [
        Row(f"allocator, {verb}, extents of {row['extent_bytes']}", row[key], "ns").as_json()
        for row in json.loads(text)["rows"]
        for verb in verbs
        if (key := f"{verb}_ns") in row
    ]


def _kernel_rows(text: str) -> list[dict[str, Any]]:
    found = json.loads(text)
    best, rows = found["best"], []
    for row in found["results"]:
        name = f"{row['verb']}, {best}, {row['chunk_bytes'] >> 10} KiB, caller {row['caller']}"
        ours, ratio = row[f"{best}_gbps"], row[f"{best}_ratio"]
        rows.append(Row(name, ours, "GB/s", row["memcpy_gbps"], "memcpy", ratio).as_json())
    return rows


def _pieces_rows(text: str) -> list[dict[str, Any]]:
    found = json.loads(text)
    rows = []
    for row in found["results"]:
        chunk, page = found["chunk_bytes"] >> 20, row["page_bytes"] >> 10
        name = f"{row['verb']}, {chunk} MiB in pages of {page} KiB"
        reference = "memcpy of the same pages"
        note = f"{row['contiguous_ratio']:.2f} of one contiguous copy"
        ours, theirs, ratio = row["gbps"], row["memcpy_gbps"], row["memcpy_ratio"]
        rows.append(Row(name, ours, "GB/s", theirs, reference, ratio, note=note).as_json())
    return rows


def _replay_rows(text: str) -> list[dict[str, Any]]:
    rows: list[Row] = []
    for run in json.loads(text)["runs"]:
        what = f"replay, {run['policy']}, {run['capacity']:,} blocks, {run['clients']} clients"
        wrong = run["tally"]["wrong_blocks"]
        rows += [
            Row(f"{what}: prefix hits, test half", run["hit_rate_test_half"], "%"),
            Row(f"{what}: blocks with a wrong byte", wrong, "", bar=0.0),
            Row(f"{what}: lookups", run["lookups_per_s"] / 1e6, "M/s"),
            Row(f"{what}: puts", run["put_gb_per_s"], "GB/s"),
        ]
    return [row.as_json() for row in rows]


def _python(name: str, *quick: str) -> Bench:
    return Bench(name, (sys.executable, str(HERE / f"bench_{name}.py")), quick, _reported)


def c_program(name: str) -> str:
    """The path of a program of bench/c, once tests/c/Makefile has built it."""
    return str(ROOT / "build" / "c" / "gcc_-O3" / name)


def benches() -> list[Bench]:
    """All of them, in the order in which they run."""
    replay = (sys.executable, str(HERE / "replay.py"), "--json", "--clients", "1,2,4")
    return [
        Bench("c_hit", (c_program("bench_hit"),), ("10000", "100000", "1000000"), _hit_rows),
        _python("python_hit", "--rounds", "5"),
        _python("copy", "--rounds", "3"),
        Bench("c_copy", (c_program("bench_copy"),), ("512", "3"), _kernel_rows),
        Bench("c_pieces", (c_program("bench_pieces"),), ("256", "3"), _pieces_rows),
        _python("visible", "--rounds", "100"),
        _python("scale", "--rounds", "5"),
        _python("idle", "--seconds", "5"),
        _python("verify", "--rounds", "3", "--chunks", "100000"),
        _python("attach", "--rounds", "5"),
        _python("restart", "--rounds", "1", "--chunks", "100000", "--kills", "20"),
        _python("cuda", "--rounds", "3"),
        Bench("c_waste", (c_program("bench_waste"),), (), _waste_rows),
        Bench("c_arena", (c_program("bench_arena"),), ("100000",), _arena_rows),
        Bench("replay", replay, ("--limit", "1000"), _replay_rows),
    ]


# ---- this machine -------------------------------------------------------------------------------


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def machine() -> dict[str, Any]:
    """What figures depend on."""
    model = [line for line in _text("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    memory = _text("/proc/meminfo").partition("\n")[0].split()
    caches = {
        index.name: _text(f"{index}/size")
        for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    }
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.machine(),
        "cpus": os.cpu_count(),
        "caches": caches,
        "memory_gib": round(int(memory[1]) / (1 << 20), 1) if len(memory) > 1 else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "thp": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_before": os.getloadavg(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# ---- running ------------------------------------------------------------------------------------


def _run(bench: Bench, *, quick: bool) -> dict[str, Any]:
    """Run one bench; a failure is a result, too."""
    print(f"{bench.name} ...", file=sys.stderr, flush=True)
    begun = time.monotonic()
    command = [*bench.command, *(bench.quick if quick else ())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
        rows, error = bench.rows(done.stdout), None
    except subprocess.CalledProcessError as failed:
        rows, error = [], f"exit status {failed.returncode}: {failed.stderr[-2000:]}"
    except (subprocess.TimeoutExpired, OSError, ValueError, KeyError) as failed:
        rows, error = [], f"{type(failed).__name__}: {failed}"
    took_s = round(time.monotonic() - begun, 1)
    return {"bench": bench.name, "took_s": took_s, "rows": rows, "error": error}


def _build_c() -> None:
    """The programs of bench/c, through the Makefile that builds the C tests."""
    names = sorted(path.stem for path in (HERE / "c").glob("bench_*.c"))
    command = ["make", "-C", str(ROOT / "tests" / "c"), "CC=gcc", "OPT=-O3", *names]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}".strip()


def _verdict(row: dict[str, Any]) -> str:
    return {None: "", True: "met", False: "MISSED"}[row["met"]]


def _bar(row: dict[str, Any]) -> str:
    if row["bar"] is None:
        return ""
    on_value = row["bar_on"] == "value" or row["ratio"] is None
    return ("<= " if row["at_most"] else ">= ") + _number(
        row["bar"], row["unit"] if on_value else ""
    )


def table(found: Sequence[dict[str, Any]]) -> str:
    """The results as text: measure, value, reference of the same run, ratio, bar, met or not."""
    heads = ("measure", "value", "reference", "which is", "ratio", "bar", "")
    lines = [heads]
    for bench in found:
        if bench["error"]:
            lines.append((f"{bench['bench']}: FAILED", "", "", bench["error"][:60], "", "", ""))
        for row in bench["rows"]:
            value = _number(row["value"], row["unit"])
            reference = _number(row["reference"], row["unit"])
            which = row["reference_is"] or row["note"]
            ratio = _number(row["ratio"])
            cells = (row["measure"], value, reference, which, ratio, _bar(row), _verdict(row))
            lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    right = {1, 2, 4, 5}
    shape = "  ".join(f"{{{i}:{'>' if i in right else '<'}{w}}}" for i, w in enumerate(widths))
    return "\n".join(shape.format(*line).rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """0: all ran; 1: one did not, or with --strict a bar was missed."""
    parser = argparse.ArgumentParser(description="Run every bench and judge the results.")
    parser.add_argument("--quick", action="store_true", help="few rounds: does everything run?")
    parser.add_argument("--strict", action="store_true", help="a missed bar is a failure")
    parser.add_argument("--only", help="names of benches, with commas between")
    parser.add_argument("--trace", type=Path, help="for the replay; else one is generated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    wanted = options.only.split(",") if options.only else [b.name for b in benches()]
    unknown = set(wanted) - {b.name for b in benches()}
    if unknown:
        parser.error(f"no bench {min(unknown)!r}: {', '.join(b.name for b in benches())}")
    facts = machine()
    _build_c()
    found = []
    for bench in benches():
        if bench.name not in wanted:
            continue
        command = bench.command
        if bench.name == "replay" and options.trace:
            command = (*command, "--trace", str(options.trace))
        found.append(_run(replace(bench, command=command), quick=options.quick))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": facts, "benches": found}, indent=1) + "\n")
    print(table(found))
    missed = [row["measure"] for bench in found for row in bench["rows"] if row["met"] is False]
    print(f"\n{len(missed)} bars missed; written to {options.out}")
    failed = any(bench["error"] for bench in found)
    return 1 if failed or (missed and options.strict) else 0


if __name__ == "__main__":
    sys.exit(main())
