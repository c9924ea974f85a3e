# SPDX-License-Identifier: Apache-2.0
"""Processes that use custody as daemons do, and what the tests of both kinds of it need besides."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cenote.daemon import holder
from cenote.daemon.custody import Custody, open_custody
from cenote.shm.media.memfd import create_session_memfd

POOL: Final = "p"
ENVIRON: Final[dict[str, str]] = {}  # without systemd, wherever the tests run
STOP_S: Final = 30  # a limit for a hang, not a claim about speed

# One request a line of input, one answer a line of output. Each pool has a custody of its own.
DAEMON: Final = """
import json, os, sys
from pathlib import Path
from cenote.daemon.custody import CustodyError, log_unclaimed, open_custody
from cenote.shm.media.memfd import create_session_memfd

def keep(custody, names):
    fds = {name: create_session_memfd(4096, name) for name in names}
    for name, fd in fds.items():
        os.pwrite(fd, name.encode(), 0)
    custody.keep(fds)
    return {name: [fd, os.fstat(fd).st_ino] for name, fd in fds.items()}

def left(custody, names):
    found = custody.left()
    assert not any(os.get_inheritable(fd) for fd in found.values())
    return {
        name: [fd, os.fstat(fd).st_ino, os.pread(fd, 64, 0).rstrip(bytes(1)).decode()]
        for name, fd in found.items()
    }

run_dir, *pools = sys.argv[1:]
custodies = {pool: open_custody(Path(run_dir), pool) for pool in pools}
VERBS = {
    "keep": keep,
    "left": left,
    "drop": lambda custody, names: custody.drop(names),
    "dissolve": lambda custody, names: custody.dissolve(),
    "where": lambda custody, names: custody.where,
    "unclaimed": lambda custody, names: log_unclaimed(pools),
}
print("open", flush=True)
for line in sys.stdin:
    verb, pool, *names = line.split()
    try:
        answer = VERBS[verb](custodies[pool], names)
    except CustodyError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""


class Daemon:
    """A process that opened the custody of some pools; a session and a group of its own."""

    def __init__(
        self,
        run_dir: Path,
        *pools: str,
        environ: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.pool = pools[0]
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-P", "-c", DAEMON, str(run_dir), *pools],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environ or {})},
            pass_fds=pass_fds,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "open\n"

    def ask(self, verb: str, *names: str, pool: str = "") -> Any:
        """Return what one request came to."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join([verb, pool or self.pool, *names]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        """Kill it in mid-air."""
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Signal its whole group, and wait for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        self.process.wait(STOP_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Bed:
    """A daemon's directory, and what uses the custody of its pool; at the end all of it is gone."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.run_dir.mkdir(mode=0o700)
        self.path = self.run_dir / f"{POOL}.custody"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        for pid in self.holders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def custody(self) -> Custody:
        """Open the pool's custody in this process."""
        made = open_custody(self.run_dir, POOL, ENVIRON)
        self._stack.callback(made.close)
        return made

    def daemon(self) -> Daemon:
        """Start a process that opens the pool's custody."""
        made = Daemon(self.run_dir, POOL, environ={"NOTIFY_SOCKET": ""})
        self._stack.callback(made.kill)
        return made

    def pipe(self) -> tuple[int, int]:
        """Return a pipe: nobody has the second end any more when the first hangs up."""
        read, write = os.pipe()
        self._stack.callback(os.close, read)
        return read, write

    def memory(self) -> int:
        """Return the descriptor of a session segment."""
        fd = create_session_memfd(4096)
        self._stack.callback(os.close, fd)
        return fd

    def holders(self) -> list[int]:
        """Return the pids of the holder processes of this directory."""
        return holders_below(self.run_dir)


def pid_of(custody: Custody) -> int:
    """Return the holder's pid, as a person would read it."""
    return int(custody.where.removeprefix("holder process "))


def take(custody: Custody) -> dict[str, int]:
    """Return what is left as inode numbers, and close it."""
    found = custody.left()
    inodes = {name: os.fstat(fd).st_ino for name, fd in found.items()}
    holder.close_all(found.values())
    return inodes


def has_hung_up(fd: int) -> bool:
    """Wait until the other ends of a pipe are closed, or a pidfd's process is dead."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(STOP_S * 1000))


def await_end(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert has_hung_up(fd)
    finally:
        os.close(fd)


def holders_below(folder: Path) -> list[int]:
    """Return the pids of the holder processes whose sockets are in *folder*."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if len(words) > 2 and Path(os.fsdecode(words[-2])).parent == folder:
                found.append(int(entry.name))
    return found


def seqpacket(path: Path) -> socket.socket:
    """Return a connection to the holder at *path*, which knows nothing of it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(STOP_S)
    sock.connect(str(path))
    return sock
