# SPDX-License-Identifier: Apache-2.0
"""
What the benches share: private daemons, worker processes, interleaved timing, rows of results.

Every bench prints one JSON object: {"bench": name, "rows": [...], ...}. A row that has a reference
was measured beside it in the same rounds, so that ratios, not times, can be compared between
machines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from cenote.client import Manifest, connect

if TYPE_CHECKING:
    from cenote.client import Pool

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
GRANULE_BYTES: Final = 2 * MIB
KEY_BYTES: Final = 32
HERE: Final = Path(__file__).resolve().parent
STOP_S: Final = 60
MANIFEST: Final = Manifest("bench", "bytes", "uint8", 256)


class Skipped(Exception):
    """This machine cannot run a measurement; says why."""


# ---- results ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """
    One measured figure.

    Attributes:
        measure: What it is.
        value: The median of several rounds.
        unit: Of value and reference.
        reference: What was measured beside it, and reference_is what that is.
        ratio: Value to reference, the median of the rounds' own ratios where there are rounds.
        bar: Limit of the ratio where there is a reference, else of the value; None: no bar.
        at_most: The bar is an upper one.
        note: What else must be said.
    """

    measure: str
    value: float
    unit: str
    reference: float | None = None
    reference_is: str = ""
    ratio: float | None = None
    bar: float | None = None
    at_most: bool = True
    bar_on: str = "ratio"
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Is the bar met? None where there is none."""
        judged = self.value if self.bar_on == "value" or self.ratio is None else self.ratio
        if self.bar is None:
            return None
        return judged <= self.bar if self.at_most else judged >= self.bar

    def as_json(self) -> dict[str, Any]:
        """The row with its verdict."""
        return {**dataclasses.asdict(self), "met": self.met}


def beside(
    measure: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    reference_is: str,
    **more: Any,
) -> Row:
    """A row of values that were taken turn by turn with a reference's."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Row(
        measure,
        statistics.median(ours),
        unit,
        statistics.median(theirs),
        reference_is,
        ratio,
        **more,
    )


def report(bench: str, rows: Sequence[Row], **details: Any) -> None:
    """Print the results of a bench as JSON."""
    found = {
        "bench": bench,
        "rows": [row.as_json() for row in rows],
        "runqueue_wait_s": runqueue_wait_s(),
        **details,
    }
    print(json.dumps(found, indent=1))


def runqueue_wait_s() -> float | None:
    """How long this process was ready to run and had no CPU; None where the kernel does not say."""
    try:
        return int(Path("/proc/self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


# ---- timing -------------------------------------------------------------------------------------


def seconds(run: Callable[[], object]) -> float:
    """How long *run* took."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def interleaved(
    contestants: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """
    Let contestants take turns; return what each said in each round.

    A round that warms up is not counted, and the order is turned around every other round.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(-1, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            value = contestants[name]()
            if turn >= 0:
                found[name].append(value)
    return found


def cpu_seconds(run: Callable[[], object]) -> float:
    """
    How long *run* took of this thread's CPU time: for what never waits, its duration on a CPU of
    its own, whatever else runs on this machine.
    """
    begun = time.thread_time()
    run()
    return time.thread_time() - begun


def per_call_ns(run: Callable[[], object], calls: int) -> Callable[[], float]:
    """A contestant: *run* makes so many calls that do not wait; it says nanoseconds a call."""
    return lambda: cpu_seconds(run) / calls * 1e9


def throughput(run: Callable[[], object], moved_bytes: int) -> Callable[[], float]:
    """A contestant: *run* moves so many bytes and does not wait; it says GB/s."""
    return lambda: moved_bytes / cpu_seconds(run) / 1e9


# Read before anything is pinned: a pinned process would count one CPU, and put everybody on it.
_ALLOWED: Final = tuple(sorted(os.sched_getaffinity(0)))


def cpus() -> tuple[int, ...]:
    """The CPUs that this process could use when it started."""
    return _ALLOWED


def pin(cpu_index: int | None) -> None:
    """Keep this process on one of its CPUs, or let it run on all (None)."""
    chosen = _ALLOWED if cpu_index is None else {_ALLOWED[cpu_index % len(_ALLOWED)]}
    os.sched_setaffinity(0, chosen)


@contextlib.contextmanager
def pinned(cpu_index: int | None) -> Iterator[None]:
    """While it is open, children are born on that CPU, or free to run on all (None)."""
    before = os.sched_getaffinity(0)
    pin(cpu_index)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---- daemons ------------------------------------------------------------------------------------


class PrivateDaemon:
    """
    A cenoted of our own, in a folder of its own; leaving the `with` block stops it.

    Args:
        size_bytes: Memory of its pool, a multiple of 2 MiB.
        flags: More flags of cenoted.
        medium: As for cenoted.
        program: What to run instead of cenoted, with its first arguments.
        cpu_index: Keep it on this CPU; None: anywhere.

    Raises:
        Skipped: It did not start; with its last words.
    """

    def __init__(
        self,
        size_bytes: int,
        *flags: str,
        medium: str = "shm",
        program: Sequence[str] = ("-m", "cenote.daemon.main"),
        folder: Path | None = None,
        cpu_index: int | None = None,
    ) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="cenote-bench-"))
        self._own_folder = folder is None
        self.name = f"bench{os.getpid()}-{time.monotonic_ns() & 0xFFFFFF:x}"
        self.socket = self.folder / "pool.sock"
        (self.folder / "cenoted.toml").touch()  # so that this host's own is not read
        self._log = self.folder / "cenoted.log"
        argv = [
            *(sys.executable, *program, "--config", str(self.folder / "cenoted.toml")),
            *("--run-dir", str(self.folder), "--socket", str(self.socket), "--name", self.name),
            *("--size", str(size_bytes), "--medium", medium, "--log-format", "text"),
            *("--ephemeral", *flags),  # its memory would stay for the next daemon of its name
        ]
        with self._log.open("ab") as log, pinned(cpu_index):
            self.process = subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                text=True,
                env=_clean_environment(),
            )
        assert self.process.stdout is not None
        if not self.process.stdout.readline().startswith("ready"):
            said = self._log.read_text()[-2000:]
            self.close()
            raise Skipped(f"cenoted did not start: {said}")

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    def connect(self, role: str = "writer", label: str = "bench") -> Pool:
        """Attach to its pool."""
        return connect(self.socket, role=role, label=label, timeout_s=30.0, reconnect=False)

    def close(self) -> None:
        """Stop it and remove its folder."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            if self._own_folder:
                shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _clean_environment() -> dict[str, str]:
    """Ours, without what would configure a daemon, and deaf to folders named like our packages."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CENOTE_", "CENOTED_"))}
    return {**kept, "PYTHONSAFEPATH": "1"}


# ---- workers ------------------------------------------------------------------------------------


class Worker:
    """
    A process that runs a Python script, spoken to in lines of JSON.

    Args:
        argv: Script and arguments.
        cpu_index: Keep it on this CPU; None: anywhere.
    """

    def __init__(self, *argv: str, cpu_index: int | None = None) -> None:
        self._argv = argv
        with pinned(cpu_index):
            self.process = subprocess.Popen(
                [sys.executable, *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=_clean_environment(),
            )

    def say(self, text: str = "go") -> None:
        """Send a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """Its next line. RuntimeError when it ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            ended = f"ended with status {self.process.wait()}"
            raise RuntimeError(f"{' '.join(map(str, self._argv))} {ended}")
        return line.strip()

    def close(self) -> None:
        """End it: by the end of its input, or by force."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def workers(*made: Worker) -> Iterator[tuple[Worker, ...]]:
    """End them all, whatever happens."""
    try:
        yield made
    finally:
        for worker in made:
            worker.close()


# ---- chunks -------------------------------------------------------------------------------------


def random_keys(count: int) -> list[bytes]:
    """Keys nobody has seen."""
    packed = os.urandom(count * KEY_BYTES)
    return [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]


def pool_bytes(*wanted_bytes: int) -> int:
    """The size of a pool that holds chunks of so many bytes in all without evicting."""
    need = sum(wanted_bytes) * 10 // 9 + 64 * MIB
    return -(-need // GRANULE_BYTES) * GRANULE_BYTES
