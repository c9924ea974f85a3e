# SPDX-License-Identifier: Apache-2.0
"""
Which share of the blocks of a trace does each eviction policy serve, by capacity?

    python bench/policy_sim.py [--trace FILE] [--seed N] [--capacities 1000,5000] [--out FILE]

Drives the C policies as the keeper does (a touch of the hits, then commits one by one), with three
ways to make room: exactly one block when one is needed; batches from the capacity down to 0.98 of
it; and exactly, but only blocks that no resident block follows.  Prefix hit rates in percent, for
the whole trace and for its second half, the cache warm from the first.  Without --trace the
generator of bench/trace.py makes one.  JSON goes to stdout, or to --out; the tables to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench._policy_lib import PolicySim  # noqa: E402  # needs the path above
from bench.trace import TraceError, generate, read_trace  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CAPACITIES: Final = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
LOW_WATER: Final = 0.98
MODES: Final = ("exact", "batch", "leaves")


@dataclass(frozen=True)
class Row:
    """One policy at one capacity; rates in percent, skips over the whole trace."""

    policy: str
    mode: str
    capacity: int
    whole: float
    second_half: float
    skips: int


def _row(sim: PolicySim, policy: str, mode: str, capacity: int) -> Row:
    low = min(int(capacity * LOW_WATER), capacity - 1) if mode == "batch" else capacity - 1
    outcome = sim.run(policy, capacity, low, leaves_only=mode == "leaves")
    half = len(outcome.hits) // 2
    whole = 100 * float(outcome.hits.sum()) / float(max(sim.request_blocks.sum(), 1))
    second = float(max(sim.request_blocks[half:].sum(), 1))
    second_half = 100 * float(outcome.hits[half:].sum()) / second
    return Row(policy, mode, capacity, round(whole, 2), round(second_half, 2), outcome.skips)


def simulate(sim: PolicySim, capacities: Iterable[int]) -> list[Row]:
    """A row for every policy, mode and capacity."""
    policies = sim.policies()
    return [_row(sim, p, m, c) for m in MODES for p in policies for c in capacities]


def _table(rows: Sequence[Row], capacities: Sequence[int], column: str) -> str:
    values = {(r.mode, r.policy, r.capacity): r for r in rows}
    lines = [f"{column.replace('_', ' '):22s}" + "".join(f"{c:>8d}" for c in capacities)]
    for mode, policy in dict.fromkeys((r.mode, r.policy) for r in rows):
        cells = (getattr(values[mode, policy, c], column) for c in capacities)
        lines.append(f"{mode:8s}{policy:14s}" + "".join(f"{cell:8.1f}" for cell in cells))
    return "\n".join(lines)


def _capacities(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if not values or any(not 1 <= value < 1 << 32 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text!r}: blocks from 1 to 2^32 - 1, with commas between"
        )
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: the trace or an argument is wrong."""
    parser = argparse.ArgumentParser(description="Prefix hit rates of the eviction policies.")
    parser.add_argument("--trace", type=Path, help="a trace file; else one is generated")
    parser.add_argument("--seed", type=int, default=1, help="of the generated trace")
    parser.add_argument("--capacities", type=_capacities, default=CAPACITIES, help="in blocks")
    parser.add_argument("--out", type=Path, help="file for the JSON, else stdout")
    options = parser.parse_args(argv)
    try:
        requests = read_trace(options.trace) if options.trace else generate(options.seed)
    except (TraceError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    sim = PolicySim(requests)
    rows = simulate(sim, options.capacities)
    result = {
        "trace": options.trace.name if options.trace else f"generated, seed {options.seed}",
        "requests": len(requests),
        "blocks": int(sim.request_blocks.sum()),
        "distinct": sim.distinct,
        "low_water": LOW_WATER,
        "rows": [asdict(row) for row in rows],
    }
    for column in ("whole", "second_half"):
        print(_table(rows, options.capacities, column), end="\n\n", file=sys.stderr)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="ascii")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
