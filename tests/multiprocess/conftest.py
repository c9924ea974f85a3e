# SPDX-License-Identifier: Apache-2.0
"""
Real daemons for tests: the fixture `cenoted` is a factory. `host`, `pool` and `cache` need none.

    daemon = cenoted(size="64MiB", medium="memfd")
    daemon.socket, daemon.pid, daemon.pool, daemon.log()
    channel, welcome, fds = daemon.hello("writer")
    daemon.stop(); daemon.kill()

What a test starts is stopped at its end, and must have left no name behind. When pytest itself is
killed, or ends in a timeout, the kernel kills the daemons.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from cenote._native import _core
from cenote.client import Cache, Manifest, Pool, connect
from cenote.client.connection import Backoff
from cenote.client.testing import MemoryHost
from cenote.shm import session
from cenote.shm.identity import own_pidfd
from cenote.shm.manifest import canonical
from cenote.shm.session import Welcome, new_hello, parse_welcome
from cenote.shm.wire import Channel, close_all

STOP_S: Final = 30  # a limit for a hang, not a claim about speed
ffi, lib = _core.ffi, _core.lib
_numbers = itertools.count()


def dying_with_us(argv: list[str]) -> list[str]:
    """
    Return a command that is killed when the thread that starts it ends, however it ends.

    By a program that sets this and executes *argv*: preexec_fn is not safe beside threads.
    """
    setpriv = shutil.which("setpriv")  # util-linux; without it only a regular end is clean
    return [setpriv, "--pdeathsig", "KILL", *argv] if setpriv else argv


_SOON: Final = Backoff(first_s=0.01, last_s=0.02)


class Raw:
    """A session as hostile code has it: the calls into the core, and nothing of our client."""

    def __init__(self, channel: Channel, welcome: Welcome, fds: dict[str, int]) -> None:
        self.channel = channel
        self.welcome = welcome
        self.mapping = session.attach(welcome, fds)
        self.client = ffi.cast("struct cn_client *", self.mapping.ptr)
        manifest = canonical({"model": "raw", "layout": "l", "dtype": "uint8", "chunk_tokens": 1})
        reply = channel.request("namespace", {"manifest": manifest, "name": None})
        self.slot = int(reply.body["slot"])

    def reserve(self, nbytes: int) -> Any:
        """Return a grant."""
        grant = ffi.new("struct cn_grant *")
        assert lib.cn_reserve(self.client, nbytes, 0, 1000, grant) == lib.CN_OK
        return grant

    def commit(self, grant: Any, key: bytes, nbytes: int) -> None:
        """Store what lies in *grant*, and wait until the keeper has read it."""
        put, where = ffi.new("struct cn_put *"), ffi.new("uint8_t[]", key)
        put.ref, put.key, put.data_bytes, put.ns_slot = grant.ref, where, nbytes, self.slot
        put.position = lib.CN_POSITION_UNKNOWN
        assert lib.cn_commit(self.client, put, 1000) == lib.CN_OK
        assert lib.cn_flush(self.client, 5000) == lib.CN_OK

    def delete(self, key: bytes) -> int:
        """Delete a key; return for how many it took effect."""
        done, where = ffi.new("uint32_t *"), ffi.new("uint8_t[]", key)
        op = (lib.CN_OP_DELETE, self.slot, where, 1, 0, 5000, done)
        assert lib.cn_keys_op(self.client, *op) == lib.CN_OK
        return int(done[0])

    @property
    def lease_words(self) -> Any:
        """Its lease table, as uint64_t[]: each word that names a chunk holds it."""
        head = ffi.cast("char *", lib.cn_client_session(self.client))
        stock_bytes = lib.CN_STOCK_ROWS * ffi.sizeof("struct cn_stock_row")
        return ffi.cast("uint64_t *", head + ffi.sizeof("struct cn_session_head") + stock_bytes)

    def find(self, key: bytes) -> int | None:
        """Return the reference of the chunk under *key*, read from the catalog."""
        d, chunk = ffi.new("uint32_t *"), ffi.new("struct cn_chunk *")
        cold, catalog = ffi.new("struct cn_cold *"), ffi.cast("void *", self.mapping.catalog)
        if lib.cn_find(catalog, self.slot, key, d) != lib.CN_OK:
            return None
        assert lib.cn_chunk_read(catalog, d[0], chunk, cold) == lib.CN_OK
        return int(chunk.word >> 32 << 32 | d[0])

    def wait_for(self, **counted: int) -> None:
        """Wait until the pool's counters are these; the keeper writes them once a round."""
        pause = threading.Event()
        counters = ffi.cast("struct cn_super *", self.mapping.catalog).counters
        while {name: int(getattr(counters, name)) for name in counted} != counted:
            pause.wait(0.01)


class Cenoted:
    """One running daemon with one pool (or those of `config`)."""

    def __init__(self, folder: Path, argv: list[str], pool: str, path: Path) -> None:
        self.pool = pool
        self.socket = path
        self.argv = argv
        self._log = folder / "daemon.log"
        self._resources = contextlib.ExitStack()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                dying_with_us([sys.executable, "-m", "cenote.daemon.main", *argv]),
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        self.ready = self._ready_line()

    def _ready_line(self) -> str:
        """Wait for the line, or for the end of a daemon that will not come up; then it is ""."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self.process.pid

    def log(self) -> str:
        """Everything that it logged so far."""
        return self._log.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log's lines of one kind."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def wait_for(self, name: str) -> dict[str, Any]:
        """Wait until the log has a line of a kind, and return it; pytest's time limit ends it."""
        pause = threading.Event()
        while not (found := self.events(name)):
            assert self.process.poll() is None, self.log()
            pause.wait(0.01)
        return found[0]

    def rewrite(self, change: Callable[[str], str]) -> None:
        """Change the text of the configuration that it was started with; see hang_up()."""
        file = Path(self.argv[self.argv.index("--config") + 1])
        file.write_text(change(file.read_text()))

    def connect(self) -> socket.socket:
        """Return a connected socket; it is closed at the end of the test."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._resources.callback(sock.close)
        sock.settimeout(STOP_S)
        sock.connect(str(self.socket))
        return sock

    def channel(self) -> Channel:
        """Return a connection without a hello."""
        return Channel(self.connect())

    def hello(
        self, role: str | None = None, label: str = "test", **changes: Any
    ) -> tuple[Channel, Welcome, dict[str, int]]:
        """Connect and say hello, with some of its fields changed; return what came back."""
        channel = self.channel()
        fields = {**new_hello("test", role, label).fields(), **changes}
        pidfd = own_pidfd()
        sent = [pidfd] if pidfd >= 0 else []
        try:
            reply = channel.request("hello", fields, descriptors=sent, timeout_s=STOP_S)
        finally:
            close_all(sent)
        welcome, fds = parse_welcome(reply)
        self._resources.callback(lambda: close_all(fds.values()))
        return channel, welcome, fds

    def raw(self, role: str = "writer", label: str = "raw") -> Raw:
        """Attach a session that is used without our client; it opened a namespace."""
        return Raw(*self.hello(role, label))

    def hang_up(self) -> None:
        """Send SIGHUP: read the configuration again."""
        self.process.send_signal(signal.SIGHUP)

    def wait(self) -> int:
        """Return its exit status once it has ended."""
        return self.process.wait(STOP_S)

    def stop(self) -> int:
        """Stop it as an administrator does; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill it in mid-air."""
        self.process.kill()
        self.wait()

    def names(self) -> list[str]:
        """What is in /dev/shm under the pool's name."""
        prefix = f"cenote.{os.geteuid()}.{self.pool}."
        folder = Path("/dev/shm")  # where named shared memory is
        return sorted(p.name for p in folder.iterdir() if p.name.startswith(prefix))

    def close(self) -> None:
        """Stop it and give everything back; used by the fixture."""
        self._resources.close()
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            if self.process.returncode == -signal.SIGKILL:
                for name in self.names():  # nobody could clear these away
                    Path("/dev/shm", name).unlink(missing_ok=True)


@pytest.fixture
def cenoted(tmp_path: Path) -> Iterator[Callable[..., Cenoted]]:
    """Return a function that starts a daemon and waits until it is ready (or has ended)."""
    started: list[Cenoted] = []
    kept: dict[str, list[str]] = {}

    def start(
        *extra: str,
        size: str = "64MiB",
        medium: str = "memfd",
        pool: str = "",
        path: Path | None = None,
        config: str = "",
        keep: bool = False,
    ) -> Cenoted:
        """
        Start a daemon; *extra* are more arguments.

        keep: its pool outlives it, until the test ends. Others are ephemeral.

        config: the text of a TOML file that is used instead of size and medium. {socket} and
        {pool} in it are filled in; it is written to tmp_path/cenoted.toml.
        """
        number = next(_numbers)
        pool = pool or f"t{os.getpid()}-{number}"
        path = path or tmp_path / f"{number}.sock"
        if config:
            file = tmp_path / "cenoted.toml"
            file.write_text(config.replace("{socket}", str(path)).replace("{pool}", pool))
            argv = ["--config", str(file)]
        else:
            argv = ["--socket", str(path), "--name", pool, "--size", size, "--medium", medium]
        argv += ["--log-format", "json", *extra]
        daemon = Cenoted(tmp_path, argv if keep else [*argv, "--ephemeral"], pool, path)
        started.append(daemon)
        if keep:
            kept[str(path)] = argv
        return daemon

    yield start
    for daemon in reversed(started):
        daemon.close()
    for argv in kept.values():
        command = [sys.executable, "-m", "cenote.daemon.main", *argv, "--drop"]
        subprocess.run(command, check=True, timeout=STOP_S)
    assert [name for daemon in started for name in daemon.names()] == []


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    """A pool in memory; nothing of it may be left when the test is over."""
    with MemoryHost("64MiB", chunk_count=1024, event_count=1024) as made:
        yield made
        gc.collect()
        assert made.audit() == 0


@pytest.fixture
def pool(host: MemoryHost) -> Iterator[Pool]:
    """An attachment to it."""
    with host.connect() as made:
        yield made


@pytest.fixture
def cache(pool: Pool) -> Cache:
    """A namespace of it."""
    return pool.namespace(Manifest("m", "l", "uint8", 16))


@pytest.fixture
def start(cenoted: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that starts a daemon whose pool is kept, or its successor."""

    def start(*extra: str, after: Any = None, **options: Any) -> Any:
        if after is not None:
            options = {**after.options, **options, "path": after.socket, "pool": after.pool}
        elif options.get("medium") == "file":
            options["medium"] = f"file:{tmp_path}/region"
        daemon = cenoted(*extra, keep=True, **options)
        daemon.options = options
        return daemon

    return start


@pytest.fixture
def attach() -> Iterator[Callable[..., tuple[Pool, Cache]]]:
    """Return a function that attaches to a daemon and opens a namespace."""
    pools: list[Pool] = []

    def attach(daemon: Any, **options: Any) -> tuple[Pool, Cache]:
        pool = connect(daemon.socket, timeout_s=30.0, **{"reconnect": _SOON, **options})
        pools.append(pool)
        return pool, pool.namespace(Manifest("m", "l", "uint8", 16), timeout_s=30.0)

    yield attach
    for pool in pools:
        pool.close()
