# SPDX-License-Identifier: Apache-2.0
"""The daemon's life: start, stop, crash, restart, reload, and what each leaves behind."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenote.shm.session import attach
from cenote.shm.wire import Channel, Closed, encode

CONFIG = """
[[pool]]
name = "{pool}"
socket = "{socket}"
policy = "lru"
checksum = "off"

[[pool.region]]
medium = "memfd"
size = "16MiB"
"""


def switches(pid: int) -> int:
    """How often the threads of *pid* went to sleep or were sent there."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.split(":")[0].endswith("ctxt_switches"):
                total += int(line.split()[1])
    return total


def status_kb(pid: int, field: str) -> int:
    """A number of /proc/pid/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


@pytest.mark.parametrize("medium", ["memfd", "shm", "file"])
def test_ready_line_names_pool_socket_and_size(
    cenoted: Callable[..., Any], medium: str, tmp_path: Path
) -> None:
    """
    One line that begins with `ready` comes when clients may attach, on every medium, and a stop
    leaves neither a socket, nor a lock file, nor a name.
    """
    wanted = f"file:{tmp_path}/pool.mem" if medium == "file" else medium
    daemon = cenoted(medium=wanted)

    assert daemon.ready == f"ready pool={daemon.pool} socket={daemon.socket} size=64MiB"
    channel, welcome, fds = daemon.hello("writer")
    mapping = attach(welcome, fds)
    assert (welcome.pool, welcome.capacity_bytes) == (daemon.pool, 64 * 2**20)
    assert len(daemon.names()) == (2 if medium == "shm" else 0)
    del mapping
    channel.close()

    assert daemon.stop() == 0
    left = sorted(p.name for p in tmp_path.iterdir() if p.name != "daemon.log")
    assert (left, daemon.names()) == ([], [])
    assert daemon.events("pool_dropped")[0]["pool"] == daemon.pool


def test_stop_tells_clients_why(cenoted: Callable[..., Any]) -> None:
    """A client that is connected hears `closing` before its socket ends."""
    daemon = cenoted()
    channel, _welcome, _fds = daemon.hello()

    assert daemon.stop() == 0

    with pytest.raises((Closed, ConnectionError)):
        channel.request("ping")
    assert [n["event"] for n in channel.notices] == ["closing"]


def test_a_second_daemon_refuses_and_names_the_first(cenoted: Callable[..., Any]) -> None:
    """Two daemons on one socket: the second ends with status 1 and says which pid serves it."""
    first = cenoted()
    second = cenoted(path=first.socket, pool=first.pool)

    assert second.wait() == 1
    assert second.ready == ""
    (line,) = second.events("cannot_start")
    assert f"pid {first.pid}" in line["error"]
    assert first.hello()[1].server_pid == first.pid


@pytest.mark.parametrize("medium", ["shm", "memfd"])
def test_an_ephemeral_pool_ends_with_a_kill(cenoted: Callable[..., Any], medium: str) -> None:
    """
    kill -9 of an ephemeral pool's daemon, then a new one: another pool id, no name of the old one,
    and a client of the old pool still reads what it mapped.
    """
    first = cenoted(medium=medium)
    _channel, before, fds = first.hello("reader")
    mapping = attach(before, fds)
    first.kill()
    assert first.socket.exists()
    old_names = first.names()

    second = cenoted(medium=medium, path=first.socket, pool=first.pool)
    _channel, after, _fds = second.hello()

    assert after.pool_id != before.pool_id
    assert not set(old_names) & set(second.names())
    assert len(second.names()) == (2 if medium == "shm" else 0)
    assert len(second.events("leftovers_unlinked")) == (medium == "shm")
    assert ctypes.string_at(mapping.catalog, 8) == b"cnpoole1"


def test_a_stale_socket_file_is_replaced(cenoted: Callable[..., Any], tmp_path: Path) -> None:
    """A socket file that nobody listens on is no obstacle."""
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    daemon = cenoted(path=path)

    assert daemon.ready.startswith("ready ")
    assert daemon.hello()[1].pool == daemon.pool


def test_what_is_no_stale_socket_is_left_alone(cenoted: Callable[..., Any], tmp_path: Path) -> None:
    """A file in the socket's place, or a server that listens there, ends the start: status 1."""
    file = tmp_path / "precious.sock"
    file.write_text("mine")
    daemon = cenoted(path=file)
    assert daemon.wait() == 1
    assert file.read_text() == "mine"

    path = tmp_path / "foreign.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        daemon = cenoted(path=path)
        assert daemon.wait() == 1
        assert "another server listens" in daemon.log()
        assert path.exists()


def test_a_run_directory_closed_to_listed_users_is_warned_of(
    cenoted: Callable[..., Any], tmp_path: Path
) -> None:
    """
    An existing directory keeps its mode 0700, and users of the access lists would see no daemon:
    a line names path, mode and remedy, at the start or with the reload that lists them.
    """
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    listed = f"[pool.access]\nwriters = [{os.geteuid() + 1}]\n"
    for first in (True, False):
        daemon = cenoted(config=CONFIG + (listed if first else ""), path=run_dir / f"{first}.sock")
        if not first:
            assert not daemon.events("run_dir_closed")
            daemon.rewrite(lambda text: text + listed)
            daemon.hang_up()
        said = daemon.wait_for("run_dir_closed")
        assert said["path"] == str(run_dir)
        assert "mode 0700" in said["problem"]
        assert f"chmod 0755 {run_dir}" in said["remedy"]
        assert daemon.stop() == 0
        (tmp_path / "daemon.log").unlink()

    run_dir.chmod(0o755)
    daemon = cenoted(config=CONFIG + listed, path=run_dir / "open.sock")
    assert not daemon.events("run_dir_closed")


def test_the_clients_variable_is_no_setting_of_the_daemon(
    cenoted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    $CENOTE_SOCKET does not say where cenoted listens; a line says what does, unless both agree.
    """
    monkeypatch.setenv("CENOTE_SOCKET", str(tmp_path / "meant.sock"))
    said = cenoted(path=tmp_path / "real.sock").wait_for("client_variable")
    assert "$CENOTED_SOCKET" in said["remark"]
    (tmp_path / "daemon.log").unlink()

    agreeing = cenoted(path=tmp_path / "meant.sock")
    agreeing.wait_for("ready")
    assert not agreeing.events("client_variable")


def test_wrong_usage_ends_with_status_2(cenoted: Callable[..., Any]) -> None:
    """A configuration that cannot be used, or too little memory, is status 2 with the reason."""
    daemon = cenoted(size="4G")
    assert daemon.wait() == 2
    assert '"4GiB"' in daemon.log()

    daemon = cenoted(size="64TiB")
    assert daemon.wait() == 2
    assert "has room for" in daemon.log()


def test_several_pools_are_served_by_one_daemon(
    cenoted: Callable[..., Any], tmp_path: Path
) -> None:
    """Each pool has its socket, its id and its memory; destroying one leaves the other."""
    other = tmp_path / "other.sock"
    config = CONFIG + CONFIG.replace("{pool}", "{pool}-b").replace("{socket}", str(other))
    daemon = cenoted(config=config)
    assert daemon.ready.count("pool=") == 2
    admin, _welcome, _fds = daemon.hello("admin")

    admin.request("destroy")
    daemon.socket = other
    _channel, welcome, _fds = daemon.hello()

    assert welcome.pool == f"{daemon.pool}-b"
    assert daemon.process.poll() is None


def test_destroy_ends_the_pool_and_then_the_daemon(cenoted: Callable[..., Any]) -> None:
    """An admin's destroy retires the pool for its clients, unlinks it, and ends the daemon."""
    daemon = cenoted(medium="shm")
    _reader, welcome, fds = daemon.hello("reader")
    mapping = attach(welcome, fds)
    admin, _welcome, _fds = daemon.hello("admin")

    assert admin.request("destroy").body["ok"] is True

    assert daemon.wait() == 0
    assert daemon.names() == []
    assert not daemon.socket.exists()
    pool_state = ctypes.c_uint64.from_address(mapping.catalog + 2048).value
    assert pool_state == 2  # CN_POOL_RETIRED


def test_two_admins_destroy_at_once(cenoted: Callable[..., Any]) -> None:
    """The second destroy is answered like the first; the daemon ends once, without an error."""
    daemon = cenoted()
    admins = [daemon.hello("admin")[0] for _ in range(2)]
    os.kill(daemon.pid, signal.SIGSTOP)
    for admin in admins:  # both lie there when it wakes up
        admin._sock.send(encode({"op": "destroy", "id": 9}))
    os.kill(daemon.pid, signal.SIGCONT)

    assert daemon.wait() == 0
    assert not daemon.events("loop_exception"), daemon.log()
    assert "Traceback" not in daemon.log()


@pytest.mark.parametrize("checksum", ["off", "lazy"])
def test_an_idle_daemon_sleeps(cenoted: Callable[..., Any], checksum: str) -> None:
    """No thread of an idle daemon wakes up, though a client is there; little memory is its own."""
    daemon = cenoted("--checksum", checksum)
    channel, welcome, fds = daemon.hello()
    mapping = attach(welcome, fds)
    channel.request("stats")
    quiet = select.poll()
    quiet.register(channel.fileno(), select.POLLIN)
    assert quiet.poll(500) == []  # what the start set going has ended

    before = switches(daemon.pid)
    assert quiet.poll(1500) == []
    after = switches(daemon.pid)

    assert after - before <= 3  # a stray preemption is nobody's timer
    assert status_kb(daemon.pid, "RssAnon") < 60_000
    del mapping


def test_notify_tells_systemd(
    cenoted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY=1 when it serves, WATCHDOG=1 while it does, STOPPING=1 at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "20000")
        daemon = cenoted()

        assert notices.recv(64) == b"READY=1"
        assert {notices.recv(64), notices.recv(64)} == {b"WATCHDOG=1"}
        daemon.stop()
        rest = [notices.recv(64)]
        while rest[-1] == b"WATCHDOG=1":
            rest.append(notices.recv(64))

    assert rest[-1] == b"STOPPING=1"


def test_a_start_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM while the pages are touched: no name, no socket and no lock stay behind."""
    pool = f"early{os.getpid()}"
    path = tmp_path / "early.sock"
    argv = ["--socket", str(path), "--name", pool, "--size", "512MiB", "--medium", "shm"]
    shm = Path("/dev/shm")  # where named shared memory is
    with subprocess.Popen(
        [sys.executable, "-m", "cenote.daemon.main", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        pause = threading.Event()
        while not list(shm.glob(f"cenote.*.{pool}.*.r0")):
            assert process.poll() is None
            pause.wait(0.001)
        process.terminate()

    assert process.returncode == 0
    assert list(shm.glob(f"cenote.*.{pool}.*")) == []
    assert list(tmp_path.iterdir()) == []


def test_channel_is_what_clients_use(cenoted: Callable[..., Any]) -> None:
    """Many requests on one connection are answered in order, each with its own id."""
    daemon = cenoted()
    channel, _welcome, _fds = daemon.hello()
    assert isinstance(channel, Channel)

    replies = [channel.request("ping").body for _ in range(300)]

    assert [reply["id"] for reply in replies] == list(range(2, 302))
