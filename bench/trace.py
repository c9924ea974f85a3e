# SPDX-License-Identifier: Apache-2.0
"""
Request traces: a reader for the published format, and a generator with the same statistics.

A trace is one JSON object a line: timestamp (ms), input_length and output_length (tokens), and
hash_ids, one per 512 tokens of the prompt; equal ids mean an equal prefix up to and including that
block.

    python bench/trace.py --seed 1 --out FILE        write a generated trace
    python bench/trace.py --compare FILE             statistics of FILE beside the generator's
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BLOCK_TOKENS: Final = 512
LINE_BYTES_MAX: Final = 1 << 20
FIELDS: Final = ("timestamp", "input_length", "output_length", "hash_ids")


class TraceError(ValueError):
    """A line of a trace is not what the format says; names the file, the line and the fault."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: timestamp in ms, lengths in tokens, one id per block of the prompt."""

    timestamp_ms: int
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def _fault(line: str, last_ms: int) -> str | Request:
    """The request on a line, or what is wrong with it."""
    if len(line) > LINE_BYTES_MAX:
        return f"longer than {LINE_BYTES_MAX} bytes"
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(record, dict):
        return f"a JSON object is expected, not {type(record).__name__}"
    for field in FIELDS:
        if field not in record:
            return f"{field} is missing"
    ids = record["hash_ids"]
    if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < 1 << 63 for i in ids):
        return "hash_ids must be a list of integers from 0 to 2^63 - 1"
    if any(type(record[f]) is not int or not 0 <= record[f] < 1 << 53 for f in FIELDS[:3]):
        return "timestamp, input_length and output_length must be integers from 0 to 2^53 - 1"
    if record["timestamp"] < last_ms:
        return f"timestamp {record['timestamp']} is before {last_ms} of the line above"
    blocks = -(-record["input_length"] // BLOCK_TOKENS)
    if len(ids) != blocks:
        return f"{len(ids)} hash_ids for {record['input_length']} tokens, expected {blocks}"
    if len(set(ids)) != len(ids):
        return "an id comes twice: a block cannot be its own prefix"
    return Request(record["timestamp"], record["input_length"], record["output_length"], tuple(ids))


def _chain_fault(ids: tuple[int, ...], parents: dict[int, int | None]) -> str | None:
    before: int | None = None
    for block in ids:
        if parents.setdefault(block, before) != before:
            return f"block {block} follows {before} here and {parents[block]} above"
        before = block
    return None


def read_trace(path: Path) -> list[Request]:
    """
    All requests of a trace file, checked; blank lines are passed over.

    Raises:
        TraceError: A line is malformed, out of order in time, has the wrong number of blocks, or
            puts a block behind another one than before.
        OSError: The file cannot be read.
    """
    requests: list[Request] = []
    parents: dict[int, int | None] = {}
    last_ms = 0
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            found = _fault(raw.decode("utf-8", "replace"), last_ms)
            fault = found if isinstance(found, str) else _chain_fault(found.hash_ids, parents)
            if fault is not None or isinstance(found, str):
                raise TraceError(f"{path}, line {number}: {fault}. Correct or remove that line.")
            requests.append(found)
            last_ms = found.timestamp_ms
    return requests


def write_trace(path: Path, requests: Iterable[Request]) -> None:
    """Write requests in the format that read_trace() reads."""
    with path.open("w", encoding="ascii") as out:
        for r in requests:
            values = (r.timestamp_ms, r.input_length, r.output_length, list(r.hash_ids))
            out.write(json.dumps(dict(zip(FIELDS, values, strict=True))) + "\n")


@dataclass(frozen=True)
class Params:
    """
    What the generator draws from.  The defaults reproduce an hour of a production chat service.

    Lengths are tokens, times seconds; *_median and *_sigma describe log-normal distributions.
    """

    duration_s: int = 3537
    tick_s: int = 3  # requests come in bursts, one a tick
    requests: int = 12_031
    ramp: float = 0.2  # the rate rises by this share from start to end
    warmup_s: int = 2400  # conversations begun this long before the trace may go on in it

    short_share: float = 0.125  # first turns with nothing but the system prompt and a line
    short_length: int = 905
    length_median: float = 5800.0  # other first turns
    length_sigma: float = 1.2
    length_min: int = 890
    length_max: int = 126_000
    output_short_share: float = 0.16
    output_short_max: int = 60
    output_median: float = 385.0
    output_sigma: float = 0.5
    output_max: int = 2000

    continue_by_turn: tuple[float, ...] = (0.34, 0.43, 0.56, 0.62, 0.66, 0.70)
    continue_long_length: int = 14_000  # first turns above go on less often, by continue_long
    continue_long: float = 0.5
    continue_short: float = 0.03  # probability for the short first turns
    gap_min_s: float = 20.0  # answer and reading
    gap_median_s: float = 115.0  # on top of that
    gap_sigma: float = 1.2
    message_median: float = 24.0  # the user's next message
    message_sigma: float = 0.7
    message_long_share: float = 0.45  # … or a document
    message_long_median: float = 3300.0
    message_long_sigma: float = 1.2

    branch_share: float = 0.08  # first turns that begin like another conversation's prompt
    branch_depth_median: float = 4.0  # blocks in common
    branch_depth_sigma: float = 1.2


@dataclass(slots=True)
class _Turn:
    """A request to come: its number in the conversation, tokens, the blocks it begins with."""

    turn: int
    length: int
    prefix: tuple[int, ...]
    short: bool = False


class _Generator:
    def __init__(self, seed: int, params: Params) -> None:
        self._random = random.Random(seed)
        self._params = params
        self._next_id = 1  # 0 is the block that all requests begin with
        self._due: list[tuple[float, int, _Turn]] = []
        self._recent: list[tuple[int, ...]] = []

    def _lognormal(self, median: float, sigma: float) -> float:
        return self._random.lognormvariate(math.log(median), sigma)

    def _first_turn(self) -> _Turn:
        p = self._params
        if self._random.random() < p.short_share:
            return _Turn(1, p.short_length + self._random.randrange(-15, 60), (0,), short=True)
        drawn = int(self._lognormal(p.length_median, p.length_sigma))
        length = min(max(drawn, p.length_min), p.length_max)
        if self._recent and self._random.random() < p.branch_share:
            other = self._random.choice(self._recent)
            depth = 1 + max(1, int(self._lognormal(p.branch_depth_median, p.branch_depth_sigma)))
            prefix = other[: min(depth, len(other))]
            return _Turn(1, max(length, len(prefix) * BLOCK_TOKENS + 1), prefix)
        return _Turn(1, length, (0,))

    def _output_length(self) -> int:
        p = self._params
        if self._random.random() < p.output_short_share:
            return self._random.randrange(1, p.output_short_max)
        return min(max(int(self._lognormal(p.output_median, p.output_sigma)), 1), p.output_max)

    def _goes_on(self, turn: _Turn) -> bool:
        p = self._params
        chance = p.continue_by_turn[min(turn.turn, len(p.continue_by_turn)) - 1]
        if turn.short:
            chance = p.continue_short
        elif turn.turn == 1 and turn.length > p.continue_long_length:
            chance *= p.continue_long
        return self._random.random() < chance

    def _message_length(self) -> int:
        p = self._params
        if self._random.random() < p.message_long_share:
            return int(self._lognormal(p.message_long_median, p.message_long_sigma))
        return int(self._lognormal(p.message_median, p.message_sigma))

    def _serve(self, turn: _Turn, now_s: float) -> Request:
        """The request, with new ids behind its prefix; its next turn, if any, becomes due."""
        blocks = -(-turn.length // BLOCK_TOKENS)
        new = blocks - len(turn.prefix)
        ids = turn.prefix + tuple(range(self._next_id, self._next_id + new))
        self._next_id += new
        output = self._output_length()
        full = ids[: turn.length // BLOCK_TOKENS]
        if len(full) > 1:
            self._recent.append(full)
            del self._recent[:-500]
        if self._goes_on(turn):
            length = turn.length + output + self._message_length()
            if length <= self._params.length_max:
                p = self._params
                gap_s = p.gap_min_s + self._lognormal(p.gap_median_s, p.gap_sigma)
                at = now_s + gap_s
                heapq.heappush(self._due, (at, self._next_id, _Turn(turn.turn + 1, length, full)))
        return Request(int(now_s * 1000), turn.length, output, ids)

    def _ticks(self) -> Iterator[tuple[int, int]]:
        """(second, requests in it): the rate rises linearly and is Poisson in each tick."""
        p = self._params
        count = p.duration_s // p.tick_s
        for tick in range(-(p.warmup_s // p.tick_s), count):
            share = 1.0 + p.ramp * (max(tick, 0) / count - 0.5)
            mean = p.requests / count * share
            arrivals = max(0, round(self._random.gauss(mean, math.sqrt(mean))))
            yield tick * p.tick_s, arrivals

    def run(self) -> list[Request]:
        requests: list[Request] = []
        for second, arrivals in self._ticks():
            for _ in range(arrivals):
                if self._due and self._due[0][0] <= second:
                    turn = heapq.heappop(self._due)[2]
                else:
                    turn = self._first_turn()
                request = self._serve(turn, second)
                if second >= 0:
                    requests.append(request)
        return requests[: self._params.requests]


def generate(seed: int, **params: Any) -> list[Request]:
    """
    A trace with the statistics of the published one; the same seed gives the same trace.

    *params* are fields of Params.

    Raises:
        TypeError: No such parameter.
    """
    return _Generator(seed, Params(**params)).run()


def _percentiles(values: Sequence[float], name: str) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    picks = (10, 25, 50, 75, 90, 99)
    return {f"{name}, {p} %": ordered[len(ordered) * p // 100] for p in picks}


def statistics(requests: Sequence[Request]) -> dict[str, float]:
    """What the generator is held to; a continuation shares more than one block with the past."""
    last_use: dict[int, int] = {}
    depth: list[float] = []
    gaps: list[float] = []
    block_gaps: list[float] = []
    blocks = reused = common = 0
    first = requests[0].hash_ids[0] if requests and requests[0].hash_ids else -1
    for r in requests:
        hits = next((i for i, b in enumerate(r.hash_ids) if b not in last_use), len(r.hash_ids))
        blocks += len(r.hash_ids)
        reused += hits
        common += r.hash_ids[:1] == (first,)
        if hits >= 2:
            depth.append(hits / len(r.hash_ids))
            gaps.append((r.timestamp_ms - last_use[r.hash_ids[hits - 1]]) / 1000)
        block_gaps += [(r.timestamp_ms - last_use[b]) / 1000 for b in r.hash_ids[1:hits]]
        last_use.update(dict.fromkeys(r.hash_ids, r.timestamp_ms))
    count = max(len(requests), 1)
    result: dict[str, float] = {
        "requests": len(requests),
        "duration, s": requests[-1].timestamp_ms / 1000 if requests else 0,
        "blocks": blocks,
        "distinct blocks, %": 100 * len(last_use) / max(blocks, 1),
        "reused within a prefix, %": 100 * reused / max(blocks, 1),
        "begin with the common block, %": 100 * common / count,
        "continuations, %": 100 * len(gaps) / count,
    }
    result |= _percentiles([r.input_length for r in requests], "input, tokens")
    result |= _percentiles([r.output_length for r in requests], "output, tokens")
    result |= _percentiles(gaps, "continuation gap, s")
    result |= _percentiles(block_gaps, "block reuse gap, s")
    result |= _percentiles([100 * d for d in depth], "prefix share of a continuation, %")
    return result


def _compare(path: Path, seed: int) -> None:
    published, ours = statistics(read_trace(path)), statistics(generate(seed))
    print(f"{'':38s} {path.name[:16]:>16s} {f'seed {seed}':>12s}")
    for name, value in published.items():
        print(f"{name:38s} {value:16.1f} {ours[name]:12.1f}")


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: the trace or an argument is wrong."""
    parser = argparse.ArgumentParser(description="Generate a request trace, or compare one.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the generated trace to this file")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="statistics of FILE and ours")
    options = parser.parse_args(argv)
    try:
        if options.compare is not None:
            _compare(options.compare, options.seed)
            return 0
        requests = generate(options.seed)
        if options.out is not None:
            write_trace(options.out, requests)
        print(json.dumps(statistics(requests), indent=2))
    except (TraceError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
