# SPDX-License-Identifier: Apache-2.0
"""
What does a prompt cost a real vLLM engine until its first token, with and without the pool?

    make bench-vllm [ARGS="--quick"]
    python bench/ttft.py [--quick] [--variants off,example,cenote] [--rounds N] [--out FILE]

Variants: `off` has no connector; `example` is vLLM's own ExampleConnector over a folder in shared
memory; `cenote` is ours over a daemon of its own; `layers` is ours with transfer = "layers"; and
`scheduler` is what ours adds to the scheduler's steps, with a small model. One engine at a time,
started as vLLM starts it, with one thread for computing in all of them. States of a prompt:

    cold        never seen; with cenote it is also stored
    unsaved     the same in the same engine, turn by turn with cold, told not to store it
    own         again: in the engine's own prefix cache
    stored      again, after reset_prefix_cache: only the connector has it
    first       stored, as the first request of a fresh engine

CPU seconds are those of all three processes of the engine and of the daemon. They count the work on
any machine, however busy, where the time until the first token (TTFT) counts its waits, too. Work
that is put off until after the first token is in `settled`, and judged for what cold costs.

Prints rows like every bench, and keeps all samples in build/bench/ttft.json for bench/report.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench import _ttft_rows  # noqa: E402  # needs the path above
from bench._ttft_rows import Sample, Samples  # noqa: E402
from bench.common import GIB, MIB, PrivateDaemon, Row, report  # noqa: E402
from bench.run import machine  # noqa: E402
from tests.engine.engines import (  # noqa: E402
    Batch,
    Connector,
    Engine,
    cenote_connector,
    example_connector,
)
from tests.engine.model import Shape, make_model  # noqa: E402
from tests.engine.processes import PYTHON  # noqa: E402
from tests.engine.prompts import prompt_of  # noqa: E402

OUT: Final = ROOT / "build" / "bench" / "ttft.json"
VARIANTS: Final = ("off", "example", "cenote", "layers", "scheduler")
TERMINATED: Final = 128 + signal.SIGTERM
BLOCK_TOKENS: Final = 128  # what vLLM takes on CPUs when nobody says
OURS: Final = ("cenote", "layers")
STEPS: Final = 5  # prompts of the scheduler's row
TINY: Final = prompt_of(16, seed=-2)
SCHEDULER_S: Final = "vllm:cenote_scheduler_seconds"
SKIP_SAVE: Final = {"cenote.skip_save": True}
HITS: Final = 3  # of a stored prompt: they are cheap
# Downwards, so that what an engine evicts of the first prompt is not asked for any more.
RATIOS: Final = (100, 75, 50, 25, 0)
ELEMENT_BYTES: Final = 2
SHARED_MEMORY: Final = Path("/dev/shm")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    shape: Shape
    lengths: tuple[int, ...]  # of the bars
    series: tuple[int, ...]  # of the chart over the prompt's length
    rounds: int
    hits: int = HITS

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(*self.lengths, *self.series)

    @property
    def token_bytes(self) -> int:
        """KV of a token, all layers."""
        shape = self.shape
        return 2 * ELEMENT_BYTES * shape.layers * shape.kv_heads * shape.head_dim

    @property
    def kv_bytes(self) -> int:
        """The engine's own cache: two of the longest prompts, and some room."""
        return 3 * (self.longest + 2 * BLOCK_TOKENS) * self.token_bytes

    @property
    def pool_bytes(self) -> int:
        """Everything that is stored, below what eviction begins at."""
        tokens = (self.rounds + 2) * sum(self.lengths) + sum(self.series) + self.longest
        return -(-(tokens * self.token_bytes * 5 // 4 + 64 * MIB) // (32 * MIB)) * 32 * MIB


def plan_of(*, quick: bool, rounds: int | None) -> Plan:
    """What to do; quick: does everything run?"""
    if quick:
        shape = Shape(256, 4, 4, 2, 512, max_tokens=1024 + BLOCK_TOKENS)
        return Plan(shape, (512, 1024), (256, 512, 1024), rounds or 1, hits=1)
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    shape = Shape(1024, 16, 16, 8, 3072, max_tokens=max(lengths) + BLOCK_TOKENS)
    return Plan(shape, (2048, 8192), lengths, rounds or 3)


class Bench:
    """
    Measures one variant after the other.

    Args:
        plan: How much.
        folder: For models and logs.
        say: Called with what is being done.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.samples = Samples()
        self.spent: dict[str, list[float]] = {"new": [], "there": []}
        self.model = make_model(folder / "model", "llama", plan.shape, dtype="bfloat16", seed=None)
        self._watch: list[int] = []
        self._seeds = itertools.count(1)
        self._began_s = time.monotonic()

    # ---- engines --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def engine(
        self, variant: str, connector: Connector | None, model: Path | None = None
    ) -> Iterator[Engine]:
        """An engine of a variant."""
        begun_s = time.monotonic()
        engine = Engine.start(
            model or self.model,
            connector=connector,
            dtype="bfloat16",
            block_size=BLOCK_TOKENS,
            kv_cache_memory_bytes=self.plan.kv_bytes,
            max_model_len=self.plan.shape.max_tokens,
            max_num_batched_tokens=self.plan.shape.max_tokens,
            max_num_seqs=2,
        )
        with engine:
            self.say(f"{variant}: an engine started in {time.monotonic() - begun_s:.0f} s")
            engine.wait_until_idle()
            yield engine
            engine.stop()

    def say(self, text: str) -> None:
        """To stderr, with the time."""
        print(f"[{time.monotonic() - self._began_s:5.0f} s] {text}", file=sys.stderr, flush=True)

    def ask(
        self,
        engine: Engine,
        variant: str,
        state: str,
        prompt: Sequence[int],
        *,
        skip_save: bool = False,
        shared: int | None = None,
    ) -> Sample:
        """Ask for one token, wait until the engine is idle again, and note what it cost."""
        params: dict[str, Any] = {}
        if skip_save and variant in OURS:
            params["kv_transfer_params"] = SKIP_SAVE
        batch: Batch = engine.generate(
            [prompt], max_tokens=1, watch=self._watch, settle=True, **params
        )
        answer = batch.one
        sample = Sample(
            variant,
            state,
            len(prompt),
            ttft_s=answer.ttft_s or answer.wall_s,
            cpu_s=batch.cpu_s,
            settled_cpu_s=batch.settled_cpu_s,
            daemon_cpu_s=sum(v for name, v in batch.cpu.items() if name.startswith("pid")),
            cached=answer.cached,
            token=answer.tokens[0],
            shared=shared,
        )
        self.samples.append(sample)
        self.say(
            f"{variant} {state} {len(prompt):,}: {sample.ttft_s:.3f} s, {sample.cpu_s:.3f} CPU s, "
            f"{sample.cached:,} cached"
        )
        return sample

    def warm_up(self, engine: Engine, variant: str) -> None:
        """What only the first request of an engine pays."""
        self.ask(engine, variant, "warm-up", prompt_of(min(self.plan.series), seed=-1))
        _forget(engine)

    # ---- variants -------------------------------------------------------------------------------

    def off(self) -> None:
        """No connector: cold, and in the engine's own prefix cache."""
        with self.engine("off", None) as engine:
            self.warm_up(engine, "off")
            for tokens in self._all_prompts():
                prompt = prompt_of(tokens, seed=self._seed())
                self.ask(engine, "off", "cold", prompt)
                self.ask(engine, "off", "own", prompt)
                _forget(engine)
            self._ratios(engine, "off")

    def example(self) -> None:
        """ExampleConnector: what it saved, after reset_prefix_cache."""
        place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else self.folder
        store = Path(tempfile.mkdtemp(prefix="cenote-bench-", dir=place))
        try:
            with self.engine("example", example_connector(store)) as engine:
                self.warm_up(engine, "example")
                for tokens in self._all_prompts():
                    prompt = prompt_of(tokens, seed=self._seed())
                    self.ask(engine, "example", "cold", prompt)
                    self._stored(engine, "example", prompt)
                    for saved in store.iterdir():
                        shutil.rmtree(saved)
        finally:
            shutil.rmtree(store, ignore_errors=True)

    def cenote(self) -> None:
        """Ours: storing, loading, and the first request of fresh engines."""
        with PrivateDaemon(self.plan.pool_bytes, medium="memfd") as daemon:
            self._watch = [daemon.pid]
            connector = cenote_connector(daemon.socket)
            kept: dict[int, list[int]] = {}
            with self.engine("cenote", connector) as engine:
                self.warm_up(engine, "cenote")
                for tokens in self._all_prompts():
                    prompt = prompt_of(tokens, seed=self._seed())
                    other = prompt_of(tokens, seed=self._seed())
                    self.ask(engine, "cenote", "cold", prompt)
                    if tokens in self.plan.lengths:
                        self.ask(engine, "cenote", "unsaved", other, skip_save=True)
                        kept[tokens] = prompt
                    self._stored(engine, "cenote", prompt)
                self._ratios(engine, "cenote")
            for _ in range(self.plan.rounds):
                for prompt in kept.values():
                    with self.engine("cenote", connector) as engine:
                        self.ask(engine, "cenote", "first", prompt)
            self._watch = []

    def layers(self) -> None:
        """Ours layer by layer: storing and loading."""
        with PrivateDaemon(self.plan.pool_bytes, medium="memfd") as daemon:
            self._watch = [daemon.pid]
            connector = cenote_connector(daemon.socket, transfer="layers")
            with self.engine("layers", connector) as engine:
                self.warm_up(engine, "layers")
                for tokens in self.plan.lengths:
                    prompt = prompt_of(tokens, seed=self._seed())
                    self.ask(engine, "layers", "cold", prompt)
                    self._stored(engine, "layers", prompt)
            self._watch = []

    def scheduler(self) -> None:
        """Ours: time in the scheduler for the longest prompt, new and there."""
        tokens, shape = self.plan.longest, Shape(max_tokens=self.plan.shape.max_tokens)
        small = make_model(self.folder / "small", "llama", shape, dtype="bfloat16", seed=None)
        with PrivateDaemon(512 * MIB, medium="memfd") as daemon:
            connector = cenote_connector(daemon.socket)
            with self.engine("scheduler", connector, model=small) as engine:
                self.warm_up(engine, "cenote")
                for _ in range(STEPS):
                    prompt = prompt_of(tokens, seed=self._seed())
                    self.spent["new"].append(self._spent(engine, prompt))
                    _forget(engine)
                    self.spent["there"].append(self._spent(engine, prompt))
                    _forget(engine)

    def _spent(self, engine: Engine, prompt: Sequence[int]) -> float:
        """Seconds in the scheduler for one prompt; the counters come with a step after it."""
        counted = []
        for asked in ([], prompt):
            if asked:
                engine.ask(asked, max_tokens=1)
                engine.wait_until_idle()
            engine.ask(TINY, max_tokens=2)
            counted.append(engine.stats().get(SCHEDULER_S, 0.0))
        return counted[1] - counted[0]

    def _stored(self, engine: Engine, variant: str, prompt: Sequence[int]) -> None:
        for _ in range(self.plan.hits):
            _forget(engine)
            self.ask(engine, variant, "stored", prompt, skip_save=True)
        _forget(engine)

    def _ratios(self, engine: Engine, variant: str) -> None:
        """The longest prompt, of which so much per cent is there already."""
        longest = self.plan.longest
        base = prompt_of(longest, seed=self._seed())
        engine.ask(base, max_tokens=1)
        engine.wait_until_idle()
        for ratio in RATIOS:
            if variant == "cenote":
                _forget(engine)
            shared = longest * ratio // 100
            prompt = [*base[:shared], *prompt_of(longest - shared, seed=self._seed())]
            self.ask(engine, variant, "ratio", prompt, skip_save=True, shared=shared)
        _forget(engine)

    def _all_prompts(self) -> list[int]:
        """The length of each prompt: those of the bars several times, others once."""
        others = [tokens for tokens in self.plan.series if tokens not in self.plan.lengths]
        return [*others, *(t for _ in range(self.plan.rounds) for t in self.plan.lengths)]

    def _seed(self) -> int:
        """A prompt that nobody has seen."""
        return next(self._seeds)


def _forget(engine: Engine) -> None:
    """Empty the engine's own prefix cache; what is measured next must not come from there."""
    if not engine.reset():
        raise RuntimeError("vLLM did not reset its prefix cache: blocks are in use; see its log")


def _facts(plan: Plan) -> dict[str, Any]:
    return {
        "machine": machine(),
        "model": {**asdict(plan.shape), "dtype": "bfloat16", "block_tokens": BLOCK_TOKENS},
        "lengths": plan.lengths,
        "rounds": plan.rounds,
        "pool_gib": round(plan.pool_bytes / GIB, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """0: everything ran; 1: with --strict, a bar was missed; 2: there is no vLLM."""
    parser = argparse.ArgumentParser(description="Time to first token with and without the pool.")
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--strict", action="store_true", help="a missed bar is a failure")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rounds", type=int, help="of each length that has bars; default 3")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    wanted = options.variants.split(",")
    if unknown := set(wanted) - set(VARIANTS):
        parser.error(f"no variant {min(unknown)!r}: {', '.join(VARIANTS)}")
    if not PYTHON.exists():
        parser.error(f"no vLLM at {PYTHON}: run `make setup-vllm`, or set CENOTE_VLLM_PYTHON")
    plan = plan_of(quick=options.quick, rounds=options.rounds)
    facts = _facts(plan)
    # the daemon and what lies in /dev/shm must not outlive it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    folder = Path(tempfile.mkdtemp(prefix="cenote-ttft-"))
    bench = Bench(plan, folder)
    try:
        for variant in wanted:
            getattr(bench, variant)()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        found: list[Row] = _ttft_rows.rows(bench.samples, plan.lengths)
        found += _ttft_rows.scheduler_rows(bench.spent, plan.longest)
        kept = {
            "bench": "ttft",
            **facts,
            "rows": [row.as_json() for row in found],
            "samples": [asdict(sample) for sample in bench.samples],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
    report("ttft", found, **facts)
    return 1 if options.strict and any(row.met is False for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
