# SPDX-License-Identifier: Apache-2.0
"""
Two processes with a real model share their KV cache through a daemon of their own.

A computes a prompt; B, another process, takes the common prefix from the pool and computes the
rest. B's logits and tokens are compared with a run without sharing. Then B is killed while it
reads, and its leases are gone. Nothing is downloaded, and nothing is left behind.

Exit status: 0 every check held, 1 one did not, 2 usage or torch is missing, 3 no daemon.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Final

from cenote.client.pool import Pool, connect
from cenote.shm.units import format_size_rounded

from . import common
from .demo_stage import DaemonProcess, DemoFailed, EngineProcess, Stage
from .demo_worker import CHUNK_TOKENS, GREEDY_TOKENS, SIZES, TAIL_TOKENS, Size

INTERRUPTED: Final = 130
TOKENS: Final = 2048
TOKENS_MAX: Final = 32 * 1024
LOGITS_TOLERANCE: Final = 1e-4
DEATH_WAIT_S: Final = 10.0
POLL_S: Final = 0.001
STEPS: Final = 9

Say = Callable[[str], None]


@dataclass
class Check:
    """A claim, whether it held, and the numbers that show it."""

    claim: str
    held: bool
    numbers: str


@dataclass
class Report:
    """What the demo found; --json writes it."""

    model: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    killed: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Did every check hold?"""
        return bool(self.checks) and all(check.held for check in self.checks)

    def check(self, claim: str, held: bool, numbers: str) -> None:
        """Note a check."""
        self.checks.append(Check(claim, held, numbers))


class Demo:
    """
    The acts of the demo, in order.

    Args:
        stage: Where its processes live.
        size: The model.
        tokens: Tokens that the prompts have in common.
        seed: Of weights and prompts.
        say: Called with what is being done.
    """

    def __init__(self, stage: Stage, size: str, tokens: int, seed: int, say: Say) -> None:
        self.stage = stage
        self.size_name, self.size = size, SIZES[size]
        self.tokens, self.seed, self.say = tokens, seed, say
        self.chunks = tokens // CHUNK_TOKENS
        self.report = Report()
        self.computed = ""  # SHA-256 of the shared KV as A computed it

    def play(self) -> Report:
        """Run everything; the report has the checks."""
        began_s = time.monotonic()
        self.say("starting a daemon with a pool of its own")
        daemon = self.stage.daemon(pool_bytes(self.size, self.tokens))
        pool = connect(daemon.socket, role="reader", label="demo", reconnect=False)
        try:
            a, b = self._engines(daemon)
            self._share(a, b)
            self._kill(pool, b)
            self._survivor(a)
        finally:
            pool.close()
        self.say("stopping the daemon")
        left = self.stage.close()
        self.report.check(
            "nothing is left: no process, no shared memory, no file",
            not left,
            "; ".join(left) or "daemon ended with status 0",
        )
        self.report.seconds["demo"] = time.monotonic() - began_s
        return self.report

    def _engines(self, daemon: DaemonProcess) -> tuple[EngineProcess, EngineProcess]:
        self.say("A and B load torch and make the same model from the same seed")
        a, b = (
            self.stage.engine(
                label, daemon, size=self.size_name, seed=self.seed, shared=self.tokens
            )
            for label in ("A", "B")
        )
        first, second = a.answer(), b.answer()
        self.report.model = {
            "architecture": "LlamaForCausalLM",
            "parameters": first["parameters"],
            "layers": self.size.layers,
            "kv_heads": self.size.kv_heads,
            "dtype": "float32",
            "threads": 1,
            "seed": self.seed,
            "medium": daemon.medium,
            "pool_bytes": daemon.pool_bytes,
        }
        self.report.check(
            "both processes found the same namespace",
            first["namespace"] == second["namespace"],
            f"{first['namespace'][:16]}… and {second['namespace'][:16]}…",
        )
        return a, b

    def _share(self, a: EngineProcess, b: EngineProcess) -> None:
        prompt = self.tokens + TAIL_TOKENS
        self.say(f"A computes a prompt of {prompt:,} tokens and stores its KV")
        cold = a.ask("prefill", "a")
        self.computed = cold["digest"]
        self.say(f"B computes another prompt: the same first {self.tokens:,} tokens, another end")
        warm = b.ask("prefill", "b")
        self.say("B computes its prompt once more without sharing, and goes on from both")
        alone = b.ask("compare", "b")
        self._note(cold, warm, alone)
        expected = self.chunks * CHUNK_TOKENS
        check = self.report.check
        check(
            "A found nothing in the pool and stored every full chunk",
            cold["loaded"] == 0 and cold["saved"] == expected,
            f"{cold['saved']:,} of {cold['prompt']:,} tokens stored",
        )
        check(
            "B computed only what was not shared",
            warm["loaded"] == expected,
            f"{warm['prompt'] - warm['loaded']:,} of {warm['prompt']:,} tokens computed",
        )
        check(
            "the KV that B got is the KV that A computed, byte for byte",
            warm["digest"] == self.computed,
            f"SHA-256 {warm['digest'][:16]}…",
        )
        check(
            f"B's logits are those of a run without sharing, within {LOGITS_TOLERANCE:g}",
            alone["loaded"] == expected and alone["difference"] <= LOGITS_TOLERANCE,
            f"largest difference {alone['difference']:.2e} over {alone['logits']} positions",
        )
        check(
            "the greedy tokens are the same",
            len(alone["alone"]) == GREEDY_TOKENS and alone["alone"] == alone["together"],
            f"{GREEDY_TOKENS} tokens: {' '.join(map(str, alone['together'][:6]))} …",
        )

    def _note(self, cold: dict[str, Any], warm: dict[str, Any], alone: dict[str, Any]) -> None:
        self.report.shared = {
            "prompt_tokens": warm["prompt"],
            "tokens": warm["loaded"],
            "chunks": warm["loaded"] // CHUNK_TOKENS,
            "bytes": warm["loaded"] * self.size.token_bytes,
            "computed_tokens": warm["prompt"] - warm["loaded"],
        }
        self.report.seconds |= {
            "a_prefill": cold["seconds"],
            "b_prefill_shared": warm["seconds"],
            "b_prefill_alone": alone["seconds"],
            "ratio": alone["seconds"] / warm["seconds"],
        }

    def _kill(self, pool: Pool, b: EngineProcess) -> None:
        self.say("B leases every chunk and reads them in a loop")
        reading = b.ask("read", "b")
        before = pool.stats()
        self.say("B is killed in the middle of it (SIGKILL)")
        b.process.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        b.process.wait()
        exited_s = time.monotonic()
        after = pool.stats()
        while (after.leases or after.sessions >= before.sessions) and (
            time.monotonic() < exited_s + DEATH_WAIT_S
        ):
            time.sleep(POLL_S)
            after = pool.stats()
        gone_s = time.monotonic()
        self.report.killed = {
            "leases_before": before.leases,
            "leases_after": after.leases,
            "sessions_before": before.sessions,
            "sessions_after": after.sessions,
            "bytes_leased": reading["bytes"],
            "exit_to_gone_s": gone_s - exited_s,
            "kill_to_gone_s": gone_s - killed_s,
        }
        self.report.check(
            "a reader killed in mid-read leaves no lease and no session",
            before.leases == reading["leases"] == self.chunks
            and after.leases == 0
            and after.sessions == before.sessions - 1,
            f"leases {before.leases} → {after.leases}, sessions {before.sessions} → "
            f"{after.sessions}, {1e3 * (gone_s - exited_s):.0f} ms after its exit",
        )

    def _survivor(self, a: EngineProcess) -> None:
        self.say("A looks at the chunks again")
        seen = a.ask("check", "a")
        self.report.seconds["load"] = seen["seconds"]
        self.report.check(
            "the chunks are still there for A, unchanged",
            seen["loaded"] == self.chunks * CHUNK_TOKENS and seen["digest"] == self.computed,
            f"{seen['loaded']:,} tokens, SHA-256 {seen['digest'][:16]}…",
        )


def pool_bytes(size: Size, tokens: int) -> int:
    """Return a size for the pool: the prompts fit, and eviction does not begin."""
    mib = 1 << 20
    wanted = 2 * (tokens + 2 * CHUNK_TOKENS) * size.token_bytes + 64 * mib
    return -(-wanted // (32 * mib)) * 32 * mib


# ---- what a person sees -------------------------------------------------------------------------


def show(report: Report) -> None:
    """Write the report for a person."""
    console = common.console()
    console.print()
    console.print(common.pairs(_figures(report)))
    console.print()
    for check in report.checks:
        mark, style = ("ok  ", "green") if check.held else ("FAIL", "bold red")
        console.print(mark, style=style, end=" ")
        console.print(check.claim)
        console.print(f"     {check.numbers}", style="dim", soft_wrap=True)
    console.print()
    wrong = sum(not check.held for check in report.checks)
    console.print(
        f"{wrong} of {len(report.checks)} checks failed" if wrong else "every check held",
        style="bold red" if wrong else "bold green",
    )


def _figures(report: Report) -> list[tuple[str, str]]:
    model, shared, seconds = report.model, report.shared, report.seconds
    size = format_size_rounded(shared["bytes"])
    pool = format_size_rounded(model["pool_bytes"])
    together_s = seconds["b_prefill_shared"]
    weights = f"{model['parameters'] / 1e6:.0f} M weights from seed {model['seed']}"
    return [
        ("model", f"{model['architecture']}, {weights}, float32, one thread a process"),
        ("pool", f"{pool} of {model['medium']} on this host"),
        ("computed by A", f"{shared['prompt_tokens']:,} tokens in {seconds['a_prefill']:.2f} s"),
        ("shared with B", f"{shared['tokens']:,} tokens, {shared['chunks']} chunks, {size}"),
        ("computed by B", f"{shared['computed_tokens']:,} tokens; with loading {together_s:.2f} s"),
        (
            "without sharing",
            f"prefill {seconds['b_prefill_alone']:.2f} s, {seconds['ratio']:.1f} times as long",
        ),
        ("loading alone", f"{size} in {seconds['load']:.2f} s, as A did at the end"),
        ("whole demo", f"{seconds['demo']:.0f} s"),
    ]


def _play(args: argparse.Namespace, stage: Stage) -> Report:
    """Run the demo with a progress display, or with a line a step where there is no terminal."""
    if args.json or not sys.stdout.isatty():
        out = sys.stderr if args.json else sys.stdout
        began_s = time.monotonic()

        def line(text: str) -> None:
            print(f"[{time.monotonic() - began_s:5.1f} s] {text}", file=out, flush=True)

        return Demo(stage, args.size, args.tokens, args.seed, line).play()
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=STEPS)

        def step(text: str) -> None:
            done = progress.tasks[task].completed + 1
            progress.update(task, description=text, completed=min(done, STEPS) - 0.5)

        report = Demo(stage, args.size, args.tokens, args.seed, step).play()
        progress.update(task, description="done", completed=STEPS)
    return report


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line, or exit with status 2."""
    parser = argparse.ArgumentParser(
        prog="cenote demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="write the report as JSON to stdout")
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"tokens that the prompts share, {CHUNK_TOKENS} to {TOKENS_MAX}; default {TOKENS}",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights and prompts; default 0"
    )
    parser.add_argument(
        "--size", choices=sorted(SIZES), default="small", help="of the model; default small"
    )
    args = parser.parse_args(argv)
    if not CHUNK_TOKENS <= args.tokens <= TOKENS_MAX:
        parser.error(f"--tokens {args.tokens}: give {CHUNK_TOKENS} to {TOKENS_MAX}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: give 0 to {2**32 - 1}")
    return args


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """Run the demo and return its exit status."""
    args = parse(argv)
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        print(
            f"cenote demo: {' and '.join(missing)} not installed: run `make demo` in the checkout, "
            "or pip install 'cenote[transformers]' (torch is 0.2 GB as a CPU build, up to 3 GB "
            "with CUDA)",
            file=sys.stderr,
        )
        return common.EXIT_USAGE
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _interrupt)
    stage = Stage()
    try:
        report = _play(args, stage)
    except DemoFailed as failure:
        print(f"cenote demo: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        print("cenote demo: interrupted; cleaning up", file=sys.stderr)
        return INTERRUPTED
    finally:
        left = stage.close()
        if left:
            print(f"cenote demo: left behind: {'; '.join(left)}", file=sys.stderr)
    if args.json:
        print(json.dumps({**asdict(report), "held": report.held}, indent=2))
    else:
        show(report)
    return common.EXIT_DONE if report.held else common.EXIT_WRONG
