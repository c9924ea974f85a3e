# SPDX-License-Identifier: Apache-2.0
"""Servers and workers of one peer: started, waited for, ended by their own ids."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from .base import Unavailable

START_S: Final = 60.0
ANSWER_S: Final = 240.0
END_S: Final = 5.0
PR_SET_CHILD_SUBREAPER: Final = 36
WORKER: Final = Path(__file__).with_name("worker.py")


def adopt_orphans() -> None:
    """Make every process that descends from this one its child when its own parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_descendants() -> int:
    """End all that descends from this process: politely, then not. Returns how many had to be."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=END_S)
    stubborn = {*alive, *psutil.Process().children(recursive=True)}
    for process in stubborn:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(list(stubborn), timeout=END_S)
    return len(stubborn)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)  # psutil checks that the id still names that process
    except psutil.NoSuchProcess:
        return


class Servers:
    """The processes that a peer needs besides its clients; their output goes to files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start *command* in a session of its own."""
        with self._log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def wait_for_socket(self, path: str) -> None:
        """Return when somebody listens on the Unix socket *path*."""
        self._wait(f"listens on {path}", lambda: _accepts(socket.AF_UNIX, path))

    def wait_for_port(self, port: int) -> None:
        """Return when somebody listens on *port* of the loopback."""
        address = ("127.0.0.1", port)
        self._wait(f"listens on port {port}", lambda: _accepts(socket.AF_INET, address))

    def wait_for_text(self, name: str, text: str) -> None:
        """Return when the server *name* has printed *text*."""
        log = self._log(name)
        self._wait(f"printed {text!r}", lambda: text in log.read_text(errors="replace"))

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _wait(self, what: str, is_true: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + START_S
        while not is_true():
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise Unavailable(
                        f"{name} ended with status {process.returncode}: {tail(self._log(name))}"
                    )
            if time.monotonic() > deadline_s:
                name = [*self._running][-1]
                raise Unavailable(
                    f"nobody {what} within {START_S:g} s; {name} says: {tail(self._log(name))}"
                )
            time.sleep(0.05)


def _accepts(family: socket.AddressFamily, address: Any) -> bool:
    with socket.socket(family) as probe:
        probe.settimeout(1)
        return probe.connect_ex(address) == 0


def tail(log: Path, characters: int = 300) -> str:
    """Return the last words of a log on one line."""
    if not log.exists():
        return "(nothing)"
    return " ".join(log.read_text(errors="replace").split())[-characters:] or "(nothing)"


class Worker:
    """
    A writer or a reader: a process of the peer's environment that does what it is told.

    Raises:
        Unavailable: It could not connect; the message says why.
    """

    def __init__(
        self, python: str, peer: str, role: str, folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.role = role
        self._log = folder / f"{role}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [python, "-P", str(WORKER), peer, role, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
                text=True,
            )
        self.ask("connect")

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Have it do *operation*, and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
        self._process.stdin.flush()
        readable, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        if not readable:
            raise Unavailable(f"the {self.role} did not finish {operation} in {ANSWER_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise Unavailable(
                f"the {self.role} died in {operation}, status {status}: {tail(self._log)}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(f"{operation} in the {self.role}: {answer['error']}")
        return answer["result"]

    def end(self) -> None:
        """Let it disconnect and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
