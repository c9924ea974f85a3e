# SPDX-License-Identifier: Apache-2.0
"""
Mischief against real daemons, and the books that must balance afterwards.

    daemon = cenoted(...)                   the factory of tests/multiprocess
    books = open_books(daemon)              what the daemon has open and lent, before
    child = zygote("steps.py").spawn("half_filled", daemon.socket)
    books.settle()                          waits until nothing of it is left, and audits

Processes come out of a zygote that has imported everything and attached to nothing: a fork costs
a few milliseconds where a new interpreter costs some hundred, so a thousand of them are a test.
None of them outlives pytest, a frozen one neither: when it is killed, the kernel kills them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

HERE: Final = Path(__file__).parent
PATIENCE_S: Final = 60.0  # a limit for a hang, not a claim about speed

_spec = importlib.util.spec_from_file_location(
    "cenote_daemons", HERE.parent / "multiprocess" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_daemons = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_daemons)
cenoted = _daemons.cenoted
dying_with_us = _daemons.dying_with_us


def wait_until(true: Callable[[], Any], what: Callable[[], object] = lambda: "") -> Any:
    """Look again and again for a state that another process brings about; return it."""
    deadline_s = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not (found := true()):
        assert time.monotonic() < deadline_s, f"it did not come about: {what()}"
        pause.wait(0.01)
    return found


def open_files(pid: int) -> int:
    """How many descriptors a process has."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def freeze(pid: int) -> None:
    """SIGSTOP, and wait until every thread of the process stands still."""

    def states() -> set[str]:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks}

    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: states() == {"T"}, states)


class Child:
    """A process out of a zygote; what it prints comes through `line()`."""

    def __init__(self, zygote: Zygote, pid: int, ours: socket.socket) -> None:
        self.pid = pid
        self._zygote = zygote
        self._socket = ours
        self._lines = ours.makefile("r")

    def line(self) -> str:
        """Return the next line that it printed; "" when it has ended."""
        with contextlib.suppress(ConnectionResetError):
            return self._lines.readline().strip()
        return ""

    def tell(self, text: str = "") -> None:
        """Send it a line."""
        self._socket.sendall(text.encode() + b"\n")

    def signal(self, number: int) -> None:
        """Send it a signal; it is not reaped yet, so the pid is its own."""
        os.kill(self.pid, number)

    def freeze(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        freeze(self.pid)

    def wait(self) -> int:
        """Return its exit status, negative for a signal; once."""
        return self._zygote.wait(self.pid)

    def kill(self) -> int:
        """SIGKILL; return how it ended, which may have been before."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def close(self) -> None:
        """Close our end of its input and output."""
        self._lines.close()
        self._socket.close()


class Zygote:
    """The parent of all children, for the functions of one script; see zygote.py."""

    def __init__(self, script: str, folder: Path) -> None:
        self._log = folder / f"{script}.log"
        self._children: dict[int, Child] = {}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._log.open("wb") as log, theirs:
            command = [sys.executable, str(HERE / "zygote.py"), str(HERE / script)]
            number = theirs.fileno()
            self._process = subprocess.Popen(
                dying_with_us([*command, str(number)]),
                pass_fds=[number],
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self._socket.settimeout(PATIENCE_S)

    def _ask(self, *words: object, fds: tuple[int, ...] = ()) -> int:
        socket.send_fds(self._socket, [json.dumps(words).encode()], fds)
        answer = self._socket.recv(64)
        assert answer, f"the zygote has died: {self.log()}"
        return int(answer)

    def spawn(self, name: str, *args: object) -> Child:
        """Fork a process that runs the function *name* of the script."""
        plain = [str(arg) if isinstance(arg, Path) else arg for arg in args]
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE_S)
        with theirs:
            pid = self._ask("spawn", name, plain, fds=(theirs.fileno(),))
        self._children[pid] = Child(self, pid, ours)
        return self._children[pid]

    def wait(self, pid: int) -> int:
        """Reap the child *pid* and return its exit status."""
        status = self._ask("wait", pid)
        self._children.pop(pid).close()
        return status

    def log(self) -> str:
        """What the processes wrote to stderr: nothing, when all is well."""
        return self._log.read_text()

    def close(self) -> None:
        """Kill what still lives."""
        for child in list(self._children.values()):
            child.kill()
        self._socket.close()
        self._process.wait(PATIENCE_S)
        print(self.log())  # pytest shows it with a failure


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Callable[[str], Zygote]]:
    """Return a function that starts the zygote of a script; nothing it forked outlives the test."""
    with contextlib.ExitStack() as undo:

        def start(script: str) -> Zygote:
            made = Zygote(script, tmp_path)
            undo.callback(made.close)
            return made

        yield start


class Books:
    """What a daemon has open and lent. It looks through an admin session of its own."""

    def __init__(self, daemon: Any) -> None:
        self.daemon = daemon
        self.channel, self.welcome, self.fds = daemon.hello("admin", label="books")
        self.channel.request("audit")
        self._open_before = self.open_files()

    def counters(self) -> dict[str, int]:
        """struct cn_counters, with the sessions' own folded in."""
        found: dict[str, int] = self.channel.request("stats", timeout_s=PATIENCE_S).body["counters"]
        return found

    def sessions(self) -> dict[int, dict[str, Any]]:
        """The sessions of everybody else, by number."""
        reply = self.channel.request("sessions", timeout_s=PATIENCE_S).body["sessions"]
        return {s["session"]: s for s in reply if s["session"] != self.welcome.session}

    def session_of(self, pid: int) -> dict[str, Any]:
        """The session of a process; it waits until there is one."""

        def find() -> dict[str, Any] | None:
            return next((s for s in self.sessions().values() if s["pid"] == pid), None)

        found: dict[str, Any] = wait_until(find, self.state)
        return found

    def audit(self) -> int:
        """How many contradictions the keeper finds in its tables."""
        return int(self.channel.request("audit", timeout_s=PATIENCE_S).body["wrong"])

    def open_files(self) -> int:
        """How many descriptors the daemon has."""
        return open_files(self.daemon.pid)

    def resident_bytes(self) -> int:
        """The daemon's anonymous memory: what it needs for itself."""
        for line in Path(f"/proc/{self.daemon.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon")

    def state(self) -> dict[str, Any]:
        """Everything that must be nothing once all clients have gone."""
        gc.collect()  # leases of this very process
        counters, sessions = self.counters(), self.sessions()
        return {
            "sessions": len(sessions),
            "leases": sum(s["leases"] for s in sessions.values()),
            "granted": counters["granted_bytes"],
            "limbo": counters["limbo_chunks"],
            "files": self.open_files() - self._open_before,
        }

    def settle(self) -> dict[str, int]:
        """
        Wait until every other session has gone with all it held, then audit; return the counters.
        """
        wait_until(lambda: not any(self.state().values()), lambda: (self.state(), self.sessions()))
        assert self.audit() == 0
        return self.counters()


@pytest.fixture
def open_books() -> Callable[[Any], Books]:
    """Return Books, to be opened on a daemon before anything happens to it."""
    return Books


@pytest.fixture
def wait() -> Callable[..., Any]:
    """Return wait_until(predicate, what): it polls, with a deadline that only a hang reaches."""
    return wait_until


@pytest.fixture(name="freeze")
def freeze_fixture() -> Callable[[int], None]:
    """Return freeze(pid): SIGSTOP, and the certainty that it stands still."""
    return freeze
