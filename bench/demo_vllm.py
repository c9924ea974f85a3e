# SPDX-License-Identifier: Apache-2.0
"""
Three vLLM engines and one pool: A computes a prompt, B takes it from the pool, both are killed with
SIGKILL, and C, a new engine, has it at its first request.

    make demo-vllm [ARGS="--tokens 4096"]
    python bench/demo_vllm.py [--tokens N] [--fast] [--json]

Daemon, model and engines are its own, nothing is downloaded, and nothing is left behind. The model
is a small Llama with weights from a seed, on one thread; an engine takes half a minute to start,
which is vLLM being imported three times (--fast: once for all of them).

Exit status: 0 every check held, 1 one did not, 2 usage or there is no vLLM.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench.common import MIB, PrivateDaemon  # noqa: E402  # needs the path above
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tests.engine.engines import (  # noqa: E402
    Connector,
    Engine,
    EngineFailed,
    cenote_connector,
    example_connector,
)
from tests.engine.model import Shape, make_model  # noqa: E402
from tests.engine.nursery import Nursery  # noqa: E402
from tests.engine.processes import PYTHON  # noqa: E402
from tests.engine.prompts import prompt_of  # noqa: E402

from cenote.client import Pool  # noqa: E402

TOKENS: Final = 2048
TOKENS_MAX: Final = 16 * 1024
TERMINATED: Final = 128 + signal.SIGTERM
BLOCK_TOKENS: Final = 128
ANSWER_TOKENS: Final = 16
ELEMENT_BYTES: Final = 4  # float32: that an answer is the same must not hang on rounding
DEATH_WAIT_S: Final = 30.0  # a limit for a hang: the keeper notices within milliseconds
LOOK_S: Final = 0.01

Say = Callable[[str], None]


@dataclass
class Asked:
    """What one engine did with the prompt."""

    engine: str
    what: str
    ttft_s: float
    cpu_s: float
    computed: int
    cached: int
    tokens: tuple[int, ...]


@dataclass
class Check:
    """A claim, whether it held, and the numbers that show it."""

    claim: str
    held: bool
    numbers: str


@dataclass
class Report:
    """What the demo found; --json writes it."""

    prompt_tokens: int
    asked: list[Asked] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Did every check hold?"""
        return bool(self.checks) and all(check.held for check in self.checks)

    def check(self, claim: str, held: bool, numbers: str) -> None:
        """Note a check."""
        self.checks.append(Check(claim, held, numbers))


class Demo:
    """
    The acts, in order.

    Args:
        folder: For everything.
        nursery: Where the engines come from.
        tokens: Of the prompt.
        connector: "cenote", or "example" for vLLM's own, which knows no pool.
        say: Called with what is being done.
    """

    def __init__(
        self, folder: Path, nursery: Nursery, tokens: int, connector: str, say: Say
    ) -> None:
        self.folder, self.nursery, self.tokens = folder, nursery, tokens
        self.connector, self.say = connector, say
        self.shape = Shape(512, 8, 8, 4, 1536, 2048, max_tokens=tokens + 2 * BLOCK_TOKENS)
        self.report = Report(tokens)
        self.prompt = prompt_of(tokens)

    def play(self) -> Report:
        """Run everything; the report has the checks."""
        began_s = time.monotonic()
        self.say("starting a daemon with a pool of its own")
        with PrivateDaemon(self._pool_bytes(), medium="memfd") as daemon:
            if self.connector == "cenote":
                connector = cenote_connector(daemon.socket)
            else:
                connector = example_connector(self.folder / "stored")
            with daemon.connect("reader", "demo") as pool:
                self._acts(connector, daemon.pid, pool)
        self.report.seconds = time.monotonic() - began_s
        return self.report

    def _acts(self, connector: Connector, daemon_pid: int, pool: Pool) -> None:
        model = make_model(self.folder / "model", "llama", self.shape)
        with self._engine("A", model, connector) as a, self._engine("B", model, connector) as b:
            cold = self._ask(a, "A", "computed it, and stored it", daemon_pid)
            warm = self._ask(b, "B", "another engine", daemon_pid)
            before = pool.stats()
            self.say("A and B are killed (SIGKILL), all of their processes")
            for engine in (a, b):
                engine.kill()
        self._compare("B", cold, warm)
        if self.connector == "cenote":
            self._buried(pool, before.sessions)
        with self._engine("C", model, connector) as c:
            first = self._ask(c, "C", "a new engine, its first request", daemon_pid)
            c.stop()
        self._compare("C", cold, first)

    def _engine(self, name: str, model: Path, connector: Connector) -> Engine:
        self.say(f"engine {name} starts")
        return self.nursery.start(
            model,
            connector=connector,
            block_size=BLOCK_TOKENS,
            kv_cache_memory_bytes=2 * self._kv_bytes(),
            max_model_len=self.shape.max_tokens,
            max_num_batched_tokens=self.shape.max_tokens,
        )

    def _ask(self, engine: Engine, name: str, what: str, daemon_pid: int) -> Asked:
        """The prompt and some tokens of answer; the cost is that of the first one."""
        first = engine.generate([self.prompt], max_tokens=1, watch=[daemon_pid], settle=True)
        answer = engine.ask(self.prompt, max_tokens=ANSWER_TOKENS)
        asked = Asked(
            name,
            what,
            first.one.ttft_s or first.wall_s,
            first.cpu_s,
            # vLLM computes the last token again, for what follows it
            max(1, self.tokens - first.one.cached),
            first.one.cached,
            answer.tokens,
        )
        self.say(f"{name} has its first token after {asked.ttft_s:.2f} s")
        self.report.asked.append(asked)
        return asked

    def _compare(self, name: str, cold: Asked, warm: Asked) -> None:
        """Is what the pool gave the whole prompt, and the right bytes?"""
        check = self.report.check
        if name == "B":
            check("A found nothing", cold.cached == 0, f"{cold.computed:,} tokens computed")
        check(
            f"{name} found the prompt, but for a block at most",
            warm.computed <= BLOCK_TOKENS,
            f"{warm.cached:,} of {self.tokens:,} tokens, {warm.computed:,} computed",
        )
        check(
            f"{name} answers as A did",
            warm.tokens == cold.tokens and len(cold.tokens) == ANSWER_TOKENS,
            f"{ANSWER_TOKENS} tokens: {' '.join(map(str, warm.tokens[:6]))} …",
        )

    def _buried(self, pool: Pool, before: int) -> None:
        """Killed engines leave neither session nor lease, and their chunks stay."""
        pause, limit_s = threading.Event(), time.monotonic() + DEATH_WAIT_S
        after = pool.stats()
        while (after.sessions > 1 or after.leases) and time.monotonic() < limit_s:
            pause.wait(LOOK_S)
            after = pool.stats()
        self.report.check(
            "the killed engines left no session and no lease, and the pool kept its chunks",
            after.sessions == 1 and not after.leases and after.chunks > 0,
            f"sessions {before} → {after.sessions} (this one), leases {after.leases}, "
            f"chunks {after.chunks}",
        )

    def _kv_bytes(self) -> int:
        shape = self.shape
        a_token = 2 * ELEMENT_BYTES * shape.layers * shape.kv_heads * shape.head_dim
        return a_token * shape.max_tokens

    def _pool_bytes(self) -> int:
        return -(-(3 * self._kv_bytes() + 64 * MIB) // (32 * MIB)) * 32 * MIB


# ---- what a person sees -------------------------------------------------------------------------


def show(report: Report) -> None:
    """Write the report for a person."""
    console = Console()
    table = Table(title=f"A prompt of {report.prompt_tokens:,} tokens")
    table.add_column("engine")
    for head in ("first token after", "CPU time", "computed", "from the pool"):
        table.add_column(head, justify="right")
    for asked in report.asked:
        table.add_row(
            f"{asked.engine}: {asked.what}",
            f"{asked.ttft_s:.3f} s",
            f"{asked.cpu_s:.3f} s",
            f"{asked.computed:,}",
            f"{asked.cached:,}",
        )
    console.print()
    console.print(table)
    console.print("CPU time is that of all three processes of the engine and of the daemon.\n")
    for check in report.checks:
        mark, style = ("ok  ", "green") if check.held else ("FAIL", "bold red")
        console.print(mark, style=style, end=" ")
        console.print(check.claim)
        console.print(f"     {check.numbers}", style="dim", soft_wrap=True)
    wrong = sum(not check.held for check in report.checks)
    console.print(
        f"\n{wrong} of {len(report.checks)} checks failed" if wrong else "\nevery check held",
        style="bold red" if wrong else "bold green",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, or an end with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="write the report as JSON to stdout")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"default {TOKENS}")
    parser.add_argument("--fast", action="store_true", help="engines forked, not started by vLLM")
    parser.add_argument(
        "--connector",
        choices=("cenote", "example"),
        default="cenote",
        help="example: vLLM's own, over a folder, for comparison",
    )
    options = parser.parse_args(argv)
    if not 2 * BLOCK_TOKENS <= options.tokens <= TOKENS_MAX:
        parser.error(f"--tokens {options.tokens}: give {2 * BLOCK_TOKENS} to {TOKENS_MAX}")
    if not PYTHON.exists():
        parser.error(f"no vLLM at {PYTHON}: run `make demo-vllm`, or set CENOTE_VLLM_PYTHON")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    options = parse(argv)
    # the daemon and what lies in /dev/shm must not outlive it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    folder, began_s = Path(tempfile.mkdtemp(prefix="cenote-demo-")), time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began_s:5.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        with Nursery(folder / "engines", fork=options.fast) as nursery:
            demo = Demo(folder, nursery, options.tokens, options.connector, say)
            report = demo.play()
    except EngineFailed as failure:
        print(f"demo-vllm: {failure}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        found: dict[str, Any] = {**asdict(report), "held": report.held}
        print(json.dumps(found, indent=2))
    else:
        show(report)
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
