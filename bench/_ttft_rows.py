# SPDX-License-Identifier: Apache-2.0
"""From the samples of bench/ttft.py to rows with bars. Pure: no engine, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.common import Row

# A whole prompt that the pool has, against what else could be done:
OF_COLD: Final = 1 / 20
OF_EXAMPLE: Final = 1 / 2
OF_OWN: Final = 1.0
# ... and what storing it may add to computing it.
SAVING: Final = 1.03
# What a lookup and its plans may add to a step of the scheduler.
SCHEDULER_MS: Final = 0.3


@dataclass(frozen=True)
class Sample:
    """One request for one token."""

    variant: str
    state: str
    tokens: int
    ttft_s: float
    cpu_s: float  # until the first token: engine and daemon
    settled_cpu_s: float  # with work that was put off until after it
    daemon_cpu_s: float
    cached: int
    token: int
    shared: int | None = None  # tokens that were there before, where that is what is varied


class Samples(list[Sample]):
    """All of them, in the order in which they were taken."""

    def of(self, variant: str, state: str, tokens: int) -> Samples:
        """Those of one variant, state and length."""
        return Samples(
            s for s in self if (s.variant, s.state, s.tokens) == (variant, state, tokens)
        )

    def cpu(self) -> float:
        """The median of CPU seconds until the first token."""
        return statistics.median(s.cpu_s for s in self)

    def ttft(self) -> float:
        """The median of seconds until the first token."""
        return statistics.median(s.ttft_s for s in self)


def rows(samples: Samples, lengths: Sequence[int]) -> list[Row]:
    """All rows that the samples allow."""
    return [row for tokens in lengths for row in _at(samples, tokens)]


def scheduler_rows(spent: Mapping[str, Sequence[float]], tokens: int) -> Iterator[Row]:
    """Time in the scheduler for a prompt, all of its steps together."""
    for state, name in (("new", "nothing is there, all is stored"), ("there", "all is there")):
        if spent[state]:
            value = statistics.median(spent[state]) * 1000
            what = f"added to the scheduler, {tokens:,} tokens, {name}"
            yield Row(what, value, "ms", bar=SCHEDULER_MS, bar_on="value")


def _at(samples: Samples, tokens: int) -> Iterator[Row]:
    """One length."""
    cold, own = samples.of("off", "cold", tokens), samples.of("off", "own", tokens)
    example = samples.of("example", "stored", tokens)
    for reference, name in ((cold, "cold"), (own, "own prefix cache"), (example, "example")):
        if reference:
            what = f"{name}, {tokens:,} tokens"
            yield Row(f"{what}: CPU", reference.cpu(), "s")
            yield Row(f"{what}: TTFT", reference.ttft(), "s")
    for state, name in (("stored", "in the pool"), ("first", "first request, in the pool")):
        ours = samples.of("cenote", state, tokens)
        if ours:
            yield from _against(f"{name}, {tokens:,} tokens", ours, cold, own, example)
    layers = samples.of("layers", "stored", tokens)
    if layers and (whole := samples.of("cenote", "stored", tokens)):
        what, name = f"in the pool, layer by layer, {tokens:,} tokens", "whole chunks"
        yield Row(f"{what}: CPU", layers.cpu(), "s", whole.cpu(), name, layers.cpu() / whole.cpu())
        yield Row(
            f"{what}: TTFT", layers.ttft(), "s", whole.ttft(), name, layers.ttft() / whole.ttft()
        )
    yield from _saving(samples, tokens, cold)


def _against(
    what: str, ours: Samples, cold: Samples, own: Samples, example: Samples
) -> Iterator[Row]:
    """What the pool has, against computing it, the engine's own cache and ExampleConnector."""
    note = f"{min(s.cached for s in ours):,} cached; {ours[0].daemon_cpu_s:.3f} s are the daemon's"
    for reference, name, bar in (
        (cold, "cold", OF_COLD),
        (own, "own prefix cache", OF_OWN),
        (example, "ExampleConnector", OF_EXAMPLE),
    ):
        if not reference:
            continue
        at, ratio = reference.cpu(), ours.cpu() / reference.cpu()
        yield Row(f"{what}: CPU", ours.cpu(), "s", at, name, ratio, bar, note=note)
        at, ratio = reference.ttft(), ours.ttft() / reference.ttft()
        yield Row(f"{what}: TTFT", ours.ttft(), "s", at, name, ratio)


def _saving(samples: Samples, tokens: int, off: Samples) -> Iterator[Row]:
    """Computing a prompt that is stored, too, against computing it alone."""
    saved, unsaved = (samples.of("cenote", state, tokens) for state in ("cold", "unsaved"))
    if not saved or not unsaved:
        return
    costs = [s.settled_cpu_s for s in saved]  # copies that were made after the first token, too
    plain = [s.settled_cpu_s for s in unsaved]
    value = statistics.median(costs)
    ratio = statistics.median(c / p for c, p in zip(costs, plain, strict=True))
    what = f"cold and stored, {tokens:,} tokens: CPU"
    beside = statistics.median(plain)
    yield Row(what, value, "s", beside, "the same engine, not stored", ratio, SAVING)
    ttft = statistics.median(a.ttft_s / b.ttft_s for a, b in zip(saved, unsaved, strict=True))
    yield Row(
        f"cold and stored, {tokens:,} tokens: TTFT",
        saved.ttft(),
        "s",
        unsaved.ttft(),
        "the same engine, not stored",
        ttft,
    )
    if off:
        alone = statistics.median(s.settled_cpu_s for s in off)
        name = "an engine without connector"
        yield Row(what, value, "s", alone, name, value / alone, SAVING)
