# SPDX-License-Identifier: Apache-2.0
"""
How often does a pool save prefill on a real hour of requests, and is every byte it gives right?

    python bench/replay.py [--trace FILE] [--policy use-count,lru] [--capacity 5000,50000]
                           [--clients 1,2,4] [--block-bytes 65536] [--limit N] [--json]

Starts a daemon for every run (named shared memory, a private run directory) and 1 to 4 client
processes that replay the trace against it with real bytes; see replay_client.py for what a client
does, replay_daemon.py for how the daemon's clock is the trace's. Without --trace the generator of
bench/trace.py makes one.

Capacity is the pool's high-water mark in blocks; the low-water mark is the default. A hit is a
block inside the longest cached prefix of its request; "test half" is the second half of the
requests, the cache warm from the first. The exit status is 1 if a byte was wrong, a block was not
stored, or the daemon's tables disagree at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench.common import GRANULE_BYTES, HERE, PrivateDaemon, Skipped, Worker  # noqa: E402
from bench.replay_client import Blocks, Chains, SharedWords, Tally  # noqa: E402
from bench.trace import Request, TraceError, generate, read_trace  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]
POLICIES: Final = ("use-count", "lru", "lfu", "s3-fifo")
CAPACITY: Final = 10_000
CLIENTS_MAX: Final = 4
BLOCK_BYTES: Final = 64 * 1024
PAGE_BYTES: Final = 4096
HIGH_WATER: Final = 0.95  # at most: above it lie the extents granted to writers
GRANTED_A_CLIENT: Final = 64  # extents a session may have in its stock and in work
SPARE_DESCRIPTORS: Final = 4096


class Plan(NamedTuple):
    """What to replay; capacity is in blocks."""

    policy: str
    capacity: int
    clients: int
    block_bytes: int


@dataclass(frozen=True)
class Run:
    """
    What one replay gave. Rates of hits in percent, of a client's phases summed over clients.

    Attributes:
        lookups_per_s: Keys matched and leased a second.
        put_gb_per_s: While storing: reserve, copy with CRC, commit.
        verify_gb_per_s: While comparing hits with what belongs there.
    """

    policy: str
    capacity: int
    clients: int
    hit_rate: float
    hit_rate_test_half: float
    lookups_per_s: float
    put_gb_per_s: float
    verify_gb_per_s: float
    wall_s: float
    tally: Tally
    evictions: int
    duplicates: int
    refused: int
    contradictions: int
    by_request: Counts = dataclasses.field(repr=False)

    @property
    def right(self) -> bool:
        """Was every byte right, everything stored, and every table consistent?"""
        return not (self.tally.wrong_blocks or self.tally.not_stored or self.contradictions)

    def as_json(self) -> dict[str, Any]:
        """Everything but the hits of each request."""
        found = {**dataclasses.asdict(self), "right": self.right}
        del found["by_request"]
        return found


def prepare(requests: Sequence[Request]) -> Chains:
    """Keys and chains of a trace, for the clients. A key is the SHA-256 of the hash id."""
    dense: dict[int, int] = {}
    first, blocks = [0], []
    for request in requests:
        blocks += [dense.setdefault(block, len(dense)) for block in request.hash_ids]
        first.append(len(blocks))
    digests = b"".join(hashlib.sha256(i.to_bytes(8, "little")).digest() for i in dense)
    begun_ms = requests[0].timestamp_ms if requests else 0
    return Chains(
        first=np.array(first, dtype=np.uint64),
        blocks=np.array(blocks, dtype=np.uint32),
        times_ms=np.array([r.timestamp_ms - begun_ms for r in requests], dtype=np.uint64),
        ids=np.array(list(dense), dtype=np.uint64),
        keys=np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32),
    )


@dataclass(frozen=True)
class Sizes:
    """A pool whose high-water mark is a number of blocks, to the block."""

    pool_bytes: int
    high_water: float
    descriptors: int

    @classmethod
    def of(cls, capacity: int, block_bytes: int, clients: int) -> Sizes:
        """Round the pool up to whole granules, then choose the mark."""
        extent = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
        need = max(capacity / HIGH_WATER, capacity + GRANTED_A_CLIENT * (clients + 1)) * extent
        size = -int(-need // GRANULE_BYTES) * GRANULE_BYTES
        # Half a block more, so that no rounding loses one.
        return cls(size, (capacity + 0.5) * extent / size, size // extent + SPARE_DESCRIPTORS)


def _check_mark(stats: dict[str, Any], plan: Plan) -> None:
    extent = -(-plan.block_bytes // PAGE_BYTES) * PAGE_BYTES
    marked = int(stats["capacity_bytes"] * stats["high_water"]) // extent
    if marked != plan.capacity:
        raise RuntimeError(f"the daemon's high-water mark is {marked} blocks, not {plan.capacity}")


def replay(chains: Chains, folder: Path, plan: Plan) -> Run:
    """
    One run against a daemon of its own; *folder* has the saved chains.

    Raises:
        Skipped: The daemon did not start: no room, most likely.
        RuntimeError: A client failed.
    """
    words = SharedWords(folder)
    words.begin(time.time_ns())
    sizes = Sizes.of(plan.capacity, plan.block_bytes, plan.clients)
    flags = ("--policy", plan.policy, "--high-water", f"{sizes.high_water:.15f}")
    script = str(HERE / "replay_daemon.py")
    with contextlib.ExitStack() as stack:
        stack.callback(words.close)
        daemon = stack.enter_context(
            PrivateDaemon(
                sizes.pool_bytes,
                *flags,
                *("--max-chunks", str(sizes.descriptors), "--log-level", "WARNING"),
                program=(script, str(folder)),
                folder=folder,
            )
        )
        pool = stack.enter_context(daemon.connect("admin", "replay"))
        _check_mark(pool._control("stats", {}, 10.0), plan)
        crew = [
            stack.enter_context(_client(daemon, i, plan.block_bytes)) for i in range(plan.clients)
        ]
        for client in crew:
            client.hear()
        begun = time.perf_counter()
        for client in crew:
            client.say()
        tallies = [Tally(**json.loads(client.hear())) for client in crew]
        wall_s = time.perf_counter() - begun
        stats = pool.stats(10.0).raw
        wrong = int(pool._control("audit", {}, 60.0)["wrong"])
    found = np.max([np.load(folder / f"hits-{i}.npy") for i in range(plan.clients)], axis=0)
    if (found < 0).any():
        raise RuntimeError(f"{int((found < 0).sum())} requests were taken and not replayed")
    half = len(found) // 2
    return Run(
        policy=plan.policy,
        capacity=plan.capacity,
        hit_rate=_rate(chains, found, 0),
        hit_rate_test_half=_rate(chains, found, half),
        wall_s=wall_s,
        evictions=int(stats["evictions"]),
        duplicates=int(stats["duplicates"]),
        refused=int(stats["refused"]),
        contradictions=wrong,
        by_request=found,
        **_speeds(tallies, plan),
    )


def _client(daemon: PrivateDaemon, index: int, block_bytes: int) -> Worker:
    given = {
        "folder": str(daemon.folder),
        "socket": str(daemon.socket),
        "index": index,
        "block_bytes": block_bytes,
    }
    return Worker(str(HERE / "replay_client.py"), json.dumps(given))


def _rate(chains: Chains, found: Counts, since: int) -> float:
    """Prefix hits in percent of all blocks, from request *since* on."""
    asked = np.diff(chains.first)[since:].sum()
    return 100 * float(found[since:].sum()) / max(float(asked), 1.0)


def _speeds(tallies: Sequence[Tally], plan: Plan) -> dict[str, Any]:
    """The clients' tallies as one, and what follows from it."""
    names = [field.name for field in dataclasses.fields(Tally)]
    total = Tally(**{name: sum(getattr(t, name) for t in tallies) for name in names})
    count, tiny_s = len(tallies), 1e-9  # phases of the clients run beside each other
    put_bytes = total.put_blocks * plan.block_bytes
    return {
        "clients": count,
        "tally": total,
        "lookups_per_s": total.looked_up * count / max(total.lookup_s, tiny_s),
        "put_gb_per_s": put_bytes * count / max(total.put_s, tiny_s) / 1e9,
        "verify_gb_per_s": total.verified_bytes * count / max(total.verify_s, tiny_s) / 1e9,
    }


COLUMNS: Final = (
    ("policy", 10, "{0.policy}"),
    ("capacity", 9, "{0.capacity:,}"),
    ("clients", 8, "{0.clients}"),
    ("hits", 7, "{0.hit_rate:.1f}"),
    ("test half", 10, "{0.hit_rate_test_half:.1f}"),
    ("lookups/s", 11, "{0.lookups_per_s:,.0f}"),
    ("put GB/s", 9, "{0.put_gb_per_s:.2f}"),
    ("verified GB", 12, "{1:.2f}"),
    ("wrong", 6, "{0.tally.wrong_blocks}"),
    ("s", 7, "{0.wall_s:.1f}"),
)


def _line(run: Run) -> str:
    verified = run.tally.verified_bytes / 1e9
    return "".join(f"{text.format(run, verified):>{width}s}" for _, width, text in COLUMNS)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1 on, with commas between")
    return values


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(POLICIES)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Replay a request trace against a daemon.")
    parser.add_argument("--trace", type=Path, help="a trace file; else one is generated")
    parser.add_argument("--seed", type=int, default=1, help="of the generated trace")
    parser.add_argument("--policy", type=_policies, default=POLICIES[:1], help="one or several")
    parser.add_argument("--capacity", type=_numbers, default=(CAPACITY,), help="in blocks")
    parser.add_argument("--clients", type=_numbers, default=(1,), help="processes, 1 to 4")
    parser.add_argument("--block-bytes", type=int, default=BLOCK_BYTES, help="multiple of 8")
    parser.add_argument("--limit", type=int, help="replay only the first so many requests")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, the table on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: something was wrong; 2: the trace or an argument is."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        Blocks(options.block_bytes)
    except ValueError as error:
        parser.error(str(error))
    if max(options.clients) > CLIENTS_MAX:
        parser.error(f"--clients {max(options.clients)}: at most {CLIENTS_MAX}")
    try:
        requests = read_trace(options.trace) if options.trace else generate(options.seed)
    except (TraceError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    chains = prepare(requests[: options.limit])
    if not len(chains.blocks):
        parser.error("the trace has no blocks: nothing to replay")
    return _run_all(chains, options)


def _run_all(chains: Chains, options: argparse.Namespace) -> int:
    out = sys.stderr if options.json else sys.stdout
    print("".join(f"{name:>{width}s}" for name, width, _ in COLUMNS), file=out)
    runs = []
    asked = itertools.product(options.clients, options.policy, options.capacity)
    for clients, policy, capacity in asked:
        plan = Plan(policy, capacity, clients, options.block_bytes)
        with tempfile.TemporaryDirectory(prefix="cenote-replay-") as name:
            chains.save(Path(name))
            try:
                run = replay(chains, Path(name), plan)
            except (Skipped, RuntimeError) as error:
                print(f"{policy} at {capacity}: {error}", file=sys.stderr)
                return 1
        runs.append(run)
        print(_line(run), file=out, flush=True)
    if options.json:
        trace = options.trace.name if options.trace else f"generated, seed {options.seed}"
        found = {
            "trace": trace,
            "requests": len(chains.times_ms),
            "block_bytes": options.block_bytes,
            "cpus": os.cpu_count(),
            "runs": [run.as_json() for run in runs],
        }
        print(json.dumps(found, indent=1))
    return 0 if all(run.right for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
