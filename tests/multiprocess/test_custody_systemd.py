# SPDX-License-Identifier: Apache-2.0
"""
Custody by systemd, against a stand-in that does with notifications what systemd does.

It keeps a service's descriptors in the order in which they came, more than one of a name if it is
told so, drops those above its limit without a word, and gives them to the next start from 3 on.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.multiprocess.custody_bed import (
    Daemon,
    await_end,
    has_hung_up,
    holders_below,
    pid_of,
)

from cenote.client import connect
from cenote.daemon import custody_systemd, holder
from cenote.daemon.custody import CustodyError, open_custody
from cenote.shm.errors import LimitReached
from cenote.shm.media.memfd import create_session_memfd, is_dead, liveness_fd

# Moves the descriptors to 3 and on, then becomes the service: LISTEN_PID is its pid.
EXEC: Final = """
import fcntl, os, sys
fds, names, argv = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 500) for fd in fds]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
os.execv(argv[0], argv)
"""


class Systemd:
    """The notification socket of one service, and its store."""

    def __init__(self, folder: Path, store_max: int = 64) -> None:
        self.run_dir = folder
        self.store_max = store_max
        self.says_max = True  # from systemd 254 on
        self.store: list[tuple[str, int]] = []
        self._path = folder / "notify"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self._path))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._daemons: list[Daemon] = []

    def _run(self) -> None:
        while True:
            data, rights, _, _ = self._sock.recvmsg(4096, socket.CMSG_SPACE(4 * 253))
            fds = array.array("i")
            for _, _, packed in rights:
                fds.frombytes(packed)
            if not data:
                return
            self._do(data.decode(), list(fds))

    def _do(self, state: str, fds: list[int]) -> None:
        fields = dict(line.split("=", 1) for line in state.split("\n"))
        if "BARRIER" in fields:
            assert (state, len(fds)) == ("BARRIER=1", 1), "systemd takes it alone, with one end"
        elif "FDSTOREREMOVE" in fields:
            holder.close_all(fd for name, fd in self.store if name == fields["FDNAME"])
            self.store = [kept for kept in self.store if kept[0] != fields["FDNAME"]]
        elif "FDSTORE" in fields:
            assert fields["FDPOLL"] == "0"
            while fds and len(self.store) < self.store_max:
                self.store.append((fields["FDNAME"], fds.pop(0)))
        holder.close_all(fds)

    @property
    def environ(self) -> dict[str, str]:
        """What a service of it finds."""
        found = {"NOTIFY_SOCKET": str(self._path)}
        return {**found, "FDSTORE": str(self.store_max)} if self.says_max else found

    def start(self, *pools: str) -> Daemon:
        """Start the service with all that it stored."""
        prefix, fds = [], [fd for _, fd in self.store]
        if fds:
            names = ":".join(name for name, _ in self.store)
            prefix = [sys.executable, "-c", EXEC, ",".join(map(str, fds)), names]
        made = Daemon(self.run_dir, *pools, environ=self.environ, prefix=prefix, pass_fds=fds)
        self._daemons.append(made)
        return made

    def inodes(self) -> dict[str, int]:
        """Return what is stored, once everything that was sent has been read."""
        read, write = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))
            sock.sendmsg([b"BARRIER=1"], [rights], 0, str(self._path))
        os.close(write)
        assert has_hung_up(read)
        os.close(read)
        assert len({name for name, _ in self.store}) == len(self.store)
        return {name: os.fstat(fd).st_ino for name, fd in self.store}

    def close(self) -> None:
        """End it and its services."""
        for daemon in self._daemons:
            daemon.kill()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", str(self._path))
        self._thread.join()
        self._sock.close()
        holder.close_all(fd for _, fd in self.store)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    """What stands in for systemd; no holder process may be left."""
    custody_systemd.store_of.cache_clear()
    with contextlib.closing(Systemd(tmp_path)) as made:
        yield made
    assert holders_below(tmp_path) == []


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[Callable[[], dict[str, str]]]:
    """Return a function that returns the environment of a systemd which reads nothing."""
    custody_systemd.store_of.cache_clear()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "mute"))
        yield lambda: {"NOTIFY_SOCKET": str(tmp_path / "mute"), "FDSTORE": "64"}


def kept_of(answer: dict[str, list[int]]) -> dict[str, int]:
    """Return name and inode of what a daemon kept or found."""
    return {name: row[1] for name, row in answer.items()}


def test_what_was_stored_outlives_a_killed_daemon(systemd: Systemd) -> None:
    """
    The next start finds the same objects; a third finds them again, for they stay stored.
    """
    first = systemd.start("p")
    assert first.ask("where") == "systemd's descriptor store"
    kept = kept_of(first.ask("keep", "catalog", "r0", "s.17"))
    first.kill()

    for _ in range(2):
        daemon = systemd.start("p")
        assert kept_of(daemon.ask("left")) == kept
        assert daemon.ask("left") == {}
        daemon.kill()


def test_a_client_is_seen_alive_and_dead_through_the_store(systemd: Systemd) -> None:
    """
    The proof of death works on what is stored: held while the client holds it, then free (I6).
    """
    first = systemd.start("p")
    fd, _ = first.ask("keep", "s.1")["s.1"]
    ours = os.open(f"/proc/{first.process.pid}/fd/{fd}", os.O_RDWR)
    client = liveness_fd(ours)
    os.close(ours)
    first.kill()

    second = systemd.start("p")
    fd = second.ask("left")["s.1"][0]
    ((_, session),) = systemd.store

    assert not is_dead(session)
    os.close(client)
    assert is_dead(session)


def test_pools_share_the_store_and_take_their_own(systemd: Systemd) -> None:
    """
    Names of one pool mean nothing in another; a pool that is served no more is told.
    """
    first = systemd.start("p", "p-2", "old")
    kept = {pool: kept_of(first.ask("keep", "a", "b", pool=pool)) for pool in ("p", "p-2", "old")}
    first.kill()

    second = systemd.start("p-2", "p")
    assert kept_of(second.ask("left", pool="p")) == kept["p"]
    assert kept_of(second.ask("left", pool="p-2")) == kept["p-2"]
    assert second.ask("unclaimed") == ["old.a", "old.b"]
    second.ask("dissolve", pool="p")

    assert set(systemd.inodes()) == {"old.a", "old.b", "p-2.a", "p-2.b"}


def test_dropped_and_replaced_names_are_not_stored_twice(systemd: Systemd) -> None:
    """
    systemd keeps a second descriptor beside the first of that name, unless told otherwise.
    """
    daemon = systemd.start("p")
    daemon.ask("keep", "a", "b", "c")
    daemon.ask("drop", "b", "never-kept", "Not_A_Name")
    again = kept_of(daemon.ask("keep", "a"))

    assert set(systemd.inodes()) == {"p.a", "p.c"}
    assert systemd.inodes()["p.a"] == again["a"]
    daemon.kill()
    # and what an earlier process stored is replaced as well
    daemon = systemd.start("p")
    again = kept_of(daemon.ask("keep", "c"))
    assert systemd.inodes()["p.c"] == again["c"]


def test_the_limit_of_the_store_is_for_all_pools(systemd: Systemd) -> None:
    """
    systemd would drop what is too much without a word; the error says which line to write (I10).
    """
    systemd.store_max = 3
    daemon = systemd.start("p", "q")
    daemon.ask("keep", "a", "b")

    said = daemon.ask("keep", "c", "d", pool="q")

    assert "systemd keeps 3 descriptors for this service, and 4 are to be kept" in said
    assert "FileDescriptorStoreMax=8" in said
    assert set(systemd.inodes()) == {"p.a", "p.b"}
    daemon.ask("drop", "a")
    assert set(daemon.ask("keep", "c", "d", pool="q")) == {"c", "d"}


def test_a_client_is_refused_when_the_store_is_full(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, cenoted: Callable[..., Any]
) -> None:
    """
    With room for one session the second is told that it is a limit, the operator by which line;
    once the first has ended, there is room again.
    """
    systemd.store_max = 6
    for name, value in systemd.environ.items():
        monkeypatch.setenv(name, value)
    daemon = cenoted(keep=True)
    first = connect(daemon.socket)

    with pytest.raises(LimitReached, match="can open no session now"):
        connect(daemon.socket)

    (refused,) = daemon.events("session_refused")
    assert "write FileDescriptorStoreMax=16 into the unit" in refused["error"]
    assert len(systemd.inodes()) == 5
    first.close()
    del first  # and its mapping, which is what ends a session
    pause = threading.Event()
    while len(systemd.inodes()) > 2:
        pause.wait(0.005)
    connect(daemon.socket).close()


def test_descriptors_of_nobody_and_of_two_are_left_alone(systemd: Systemd) -> None:
    """
    What has no name of ours is not taken, and of two under one name none: the wrong one could cost
    a wrong byte, where a missing one costs the cache (I7). The pool can be dissolved all the same.
    """
    for name in ("p.a", "p.b", "p.a", "stored", "p.Not_Ours", "p."):
        systemd.store.append((name, create_session_memfd(4096)))

    daemon = systemd.start("p")

    assert set(daemon.ask("left")) == {"b"}
    assert daemon.ask("unclaimed") == []
    daemon.ask("dissolve")
    assert set(systemd.inodes()) == {"stored", "p.Not_Ours", "p."}


def test_a_unit_tells_what_an_older_systemd_does_not(systemd: Systemd) -> None:
    """
    Before 254 the first start has nothing that was kept to know the store by; a newer systemd's own
    number counts more than the unit's.
    """
    told = {"CENOTED_FDSTORE_MAX": "2"}
    newer = custody_systemd.Environment.read({**systemd.environ, **told})
    systemd.says_max = False
    older = custody_systemd.Environment.read({**systemd.environ, **told})

    assert (newer.store_max, older.store_max) == (systemd.store_max, 2)
    custody = open_custody(systemd.run_dir, "p", {**systemd.environ, **told})
    assert custody.where == "systemd's descriptor store"
    with pytest.raises(CustodyError, match=r"keeps 2 descriptors .* and 3 are to be kept"):
        custody.keep({"a": 0, "b": 0, "c": 0})


def test_an_older_systemd_is_known_by_what_it_kept(systemd: Systemd) -> None:
    """
    Before 254 it does not say how much it keeps. What it gave us it will give us again.
    """
    systemd.says_max = False
    systemd.store.append(("p.a", create_session_memfd(4096)))

    daemon = systemd.start("p")

    assert daemon.ask("where") == "systemd's descriptor store"
    assert set(daemon.ask("left")) == {"a"}


def test_a_service_without_a_store_gets_a_holder_and_a_warning(
    systemd: Systemd, caplog: pytest.LogCaptureFixture
) -> None:
    """
    It goes on, and the operator reads which line the unit lacks.
    """
    custody = open_custody(systemd.run_dir, "p", {**systemd.environ, "FDSTORE": "0"})
    fd = create_session_memfd(4096)
    custody.keep({"a": fd})

    pid = pid_of(custody)
    assert "no_descriptor_store" in [record.message for record in caplog.records]
    os.close(fd)
    # the other way round: what a holder has is not what systemd has
    open_custody(systemd.run_dir, "p", systemd.environ)
    assert "custody_elsewhere" in [record.message for record in caplog.records]
    custody.dissolve()
    await_end(pid)


def test_a_systemd_that_reads_nothing_is_told(
    mute: Callable[[], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    keep() returns only when systemd has read it all, and a drop goes on without.
    """
    monkeypatch.setattr(custody_systemd, "BARRIER_S", 0.05)
    monkeypatch.setattr(custody_systemd, "SEND_S", 0.05)
    custody = open_custody(tmp_path, "p", mute())
    fd = create_session_memfd(4096)

    with pytest.raises(CustodyError, match=r"(did nothing|read no notification).*for 0\.05 s"):
        custody.keep({"a": fd})

    custody.drop(["a"])
    custody.dissolve()
    os.close(fd)


def test_a_systemd_that_is_gone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """
    The error names the socket; drop() and dissolve() write it into the log.
    """
    environ = {"NOTIFY_SOCKET": str(tmp_path / "nowhere"), "FDSTORE": "64"}
    custody = open_custody(tmp_path, "p", environ)
    fd = create_session_memfd(4096)

    with pytest.raises(CustodyError, match=r"nowhere', does not take 'FDSTORE=1 FDNAME=p\.a"):
        custody.keep({"a": fd})

    custody.drop(["a"])
    custody.dissolve()
    custody.close()
    assert {"custody_drop_failed", "custody_not_dissolved"} <= {r.message for r in caplog.records}
    os.close(fd)


def test_one_store_serves_many_sessions(systemd: Systemd) -> None:
    """
    More than the socket's queue and one batch hold at once.
    """
    systemd.store_max = 1000
    names = [f"s.{number}" for number in range(300)]
    daemon = systemd.start("p")
    kept = kept_of(daemon.ask("keep", *names))
    daemon.kill()

    assert kept_of(systemd.start("p").ask("left")) == kept
