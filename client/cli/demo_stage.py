# SPDX-License-Identifier: Apache-2.0
"""
The processes of `cenote demo`: a daemon and engines, in a directory of their own.

Whatever happens, Stage.close() ends them and removes what they made. They run in sessions of their
own, so that Ctrl-C reaches the demo alone, which then ends them in order.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

from . import common

DAEMON: Final = "cenote.daemon.main"  # started as a program: client and daemon share no code
WORKER: Final = "cenote.client.cli.demo_worker"
SHM_DIR: Final = Path("/dev/shm")
READY_S: Final = 30.0  # of a daemon
ANSWER_S: Final = 300.0  # of an engine, on a slow machine
STOP_S: Final = 10.0
INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ERROR_LINES: Final = 12
READ_BYTES: Final = 65536


class DemoFailed(Exception):
    """The demo cannot go on: the text for stderr, and the exit status."""

    def __init__(self, message: str, status: int = common.EXIT_WRONG) -> None:
        super().__init__(message)
        self.status = status


class Process:
    """
    A child process that is asked and answers in lines.

    Args:
        name: For messages.
        command: Module and arguments, run by this interpreter.
        folder: Where its stderr goes.
    """

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self._errors = folder / f"{name}.stderr"
        self._pending = b""
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(folder),
                start_new_session=True,
                bufsize=0,
            )

    def line(self, timeout_s: float) -> str:
        """
        Return the next line of its output.

        Raises:
            DemoFailed: It ended, or said nothing for so long.
        """
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left_s = deadline_s - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(left_s, 0))
            if not ready:
                raise DemoFailed(f"{self.name} did not answer within {timeout_s:g} s")
            some = os.read(self.process.stdout.fileno(), READ_BYTES)
            if not some:
                raise DemoFailed(self.last_words())
            self._pending += some
        text, _, self._pending = self._pending.partition(b"\n")
        return text.decode()

    def last_words(self) -> str:
        """Return how it ended, and the end of what it wrote to stderr."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        said = self._errors.read_text(errors="replace").splitlines()[-ERROR_LINES:]
        return "\n  ".join([f"{self.name} ended with status {self.process.poll()}:", *said])

    def stop(self, number: int) -> int:
        """Send a signal, and SIGKILL where that does not help; return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return self.process.returncode


class DaemonProcess(Process):
    """A daemon that serves one pool; its socket is there after ready()."""

    def __init__(self, folder: Path, pool: str, pool_bytes: int) -> None:
        self.socket = folder / "pool.sock"
        self.pool_bytes = pool_bytes
        self.medium = _medium(pool_bytes)
        options = {
            "--socket": str(self.socket),
            "--run-dir": str(folder),
            "--name": pool,
            "--size": str(pool_bytes),
            "--medium": self.medium,
            "--log-format": "text",
        }
        flat = [word for pair in options.items() for word in pair]
        super().__init__("cenoted", [DAEMON, *flat, "--ephemeral"], folder)

    def ready(self) -> None:
        """
        Wait until clients may attach.

        Raises:
            DemoFailed: It did not start; status 3.
        """
        try:
            text = self.line(READY_S)
        except DemoFailed as failure:
            raise DemoFailed(str(failure), common.EXIT_NO_POOL) from failure
        if not text.startswith("ready"):
            raise DemoFailed(f"cenoted said {text!r} instead of 'ready'", common.EXIT_NO_POOL)


class EngineProcess(Process):
    """An engine of demo_worker.py; its first answer comes when its model is made."""

    def __init__(self, label: str, folder: Path, options: dict[str, Any]) -> None:
        super().__init__(f"engine {label}", [WORKER, json.dumps(options)], folder)

    def ask(self, do: str, tail: str) -> dict[str, Any]:
        """Have it do something, and return its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, "tail": tail}).encode() + b"\n")
        except BrokenPipeError as error:
            raise DemoFailed(self.last_words()) from error
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return its next answer."""
        answer = json.loads(self.line(ANSWER_S))
        assert isinstance(answer, dict)
        return answer


class Stage:
    """Makes the processes and the directory of a demo, and clears all of it away."""

    def __init__(self) -> None:
        self.pool = f"demo-{secrets.token_hex(3)}"  # short: a socket is named after it
        self._folder: Path | None = None
        self._daemon: DaemonProcess | None = None
        self._engines: list[EngineProcess] = []

    @property
    def folder(self) -> Path:
        """A directory for socket and logs, made when it is first asked for; mode 0700."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="cenote-demo-"))
        return self._folder

    def daemon(self, pool_bytes: int) -> DaemonProcess:
        """Start a daemon with a pool of so many bytes, and wait until it is ready."""
        with _deferred():
            made = self._daemon = DaemonProcess(self.folder, self.pool, pool_bytes)
        try:
            made.ready()
        except DemoFailed:
            self._daemon = None  # what it said is told already
            made.stop(signal.SIGTERM)
            raise
        return made

    def engine(self, label: str, daemon: DaemonProcess, **options: Any) -> EngineProcess:
        """Start an engine on that daemon's pool."""
        with _deferred():
            made = EngineProcess(label, self.folder, {"socket": str(daemon.socket), **options})
            self._engines.append(made)
        return made

    def close(self) -> list[str]:
        """
        End every process, engines first, and remove every trace. Idempotent.

        Returns:
            What was not in order: a daemon that did not end as told, objects that stayed.
        """
        with _handled(signal.SIG_IGN):  # a second Ctrl-C must not leave a daemon behind
            engines, self._engines = self._engines, []
            for engine in engines:
                engine.stop(signal.SIGTERM)
            wrong = self._close_daemon()
            for path in sorted(SHM_DIR.glob(f"cenote.*.{self.pool}.*")):
                wrong.append(f"{path} stayed, and was removed")
                path.unlink(missing_ok=True)
            folder, self._folder = self._folder, None
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
                if folder.exists():
                    wrong.append(f"{folder} could not be removed")
        return wrong

    def _close_daemon(self) -> list[str]:
        daemon, self._daemon = self._daemon, None
        if daemon is None:
            return []
        wrong = []
        status = daemon.stop(signal.SIGTERM)
        if status == -signal.SIGKILL:
            wrong.append(f"cenoted did not end within {STOP_S:g} s of SIGTERM, and was killed")
        elif status:
            wrong.append(daemon.last_words())
        if daemon.socket.exists():
            wrong.append(f"{daemon.socket} stayed, and was removed")
        return wrong


@contextlib.contextmanager
def _deferred() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end, not between the start of a process and noting it."""
    pending: list[int] = []
    with _handled(lambda number, _frame: pending.append(number)):
        yield
    if pending:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Have what would interrupt handled so, for a while."""
    before = [signal.signal(number, handler) for number in INTERRUPTS]
    try:
        yield
    finally:
        for number, old in zip(INTERRUPTS, before, strict=True):
            signal.signal(number, old)


def _environment(folder: Path) -> dict[str, str]:
    """
    Return this environment without settings of cenote's.

    The model hub is not to be asked, and what torch keeps for later goes with *folder*.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CENOTE_", "CENOTED_"))}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**kept, **offline, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}


def _medium(pool_bytes: int) -> str:
    """Return "shm", or "memfd" where /dev/shm is missing or small, as in many containers."""
    try:
        free_bytes = shutil.disk_usage(SHM_DIR).free
    except OSError:
        return "memfd"
    return "shm" if free_bytes > pool_bytes + pool_bytes // 8 else "memfd"
