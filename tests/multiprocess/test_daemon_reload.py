# SPDX-License-Identifier: Apache-2.0
"""SIGHUP: what a reload changes while clients are attached, and what one that fails leaves."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenote._native import _core
from cenote.shm.wire import Closed, Refusal

ffi, lib = _core.ffi, _core.lib
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
NOBODY_OF_US = f"\n[pool.access]\nadmins = [{os.geteuid() + 4242}]\n"


def once_allowed(daemon: Any) -> Any:
    """Attach as soon as a reload admits us; pytest's time limit ends it."""
    pause = threading.Event()
    while True:
        try:
            return daemon.raw("writer")
        except Refusal:
            pause.wait(0.01)


def test_reload_applies_what_can_change(cenoted: Callable[..., Any]) -> None:
    """SIGHUP: policy and water marks change at once; the size waits for a restart and is named."""
    daemon = cenoted(config=CONFIG)
    channel, _welcome, _fds = daemon.hello()
    daemon.rewrite(lambda text: text.replace('"lru"', '"s3-fifo"\nhigh_water = 0.5'))
    daemon.rewrite(lambda text: text.replace("16MiB", "32MiB"))

    daemon.hang_up()
    line = daemon.wait_for("reloaded")

    stats = channel.request("stats").body
    assert (stats["policy"], stats["high_water"]) == ("s3-fifo", 0.5)
    assert stats["capacity_bytes"] == 16 * 2**20
    assert line["needs_restart"] == 1
    assert "size" in daemon.events("needs_restart")[0]["key"]


def test_what_a_session_is_told_once_changes_for_those_that_come(
    cenoted: Callable[..., Any],
) -> None:
    """
    checksum and reader_lease_share are in the welcome: who is attached keeps what it was told, and
    the log line says for whom they changed.
    """
    daemon = cenoted(config=CONFIG)
    before = daemon.raw("reader")
    daemon.rewrite(lambda text: text.replace('"off"', '"commit"\nreader_lease_share = 0.5'))

    daemon.hang_up()
    line = daemon.wait_for("reloaded")
    after = daemon.raw("reader")

    assert line["changes"].count("for sessions attached from then on") == 2
    told = [(raw.welcome.checksum, raw.welcome.lease_limit_bytes) for raw in (before, after)]
    assert told == [("off", 4 * 2**20), ("commit", 8 * 2**20)]
    heads = [lib.cn_client_session(raw.client) for raw in (before, after)]
    limits = [ffi.cast("struct cn_session_head *", head).lease_limit_bytes for head in heads]
    assert limits == [4 * 2**20, 8 * 2**20]


def test_a_broken_reload_changes_nothing(cenoted: Callable[..., Any]) -> None:
    """A mistake in the file is logged, and the daemon goes on with what it had."""
    daemon = cenoted(config=CONFIG)
    channel, _welcome, _fds = daemon.hello()
    daemon.rewrite(lambda _text: "[[pool]]\nname = 7\n")

    daemon.hang_up()
    daemon.wait_for("reload_failed")

    assert channel.request("stats").body["policy"] == "lru"


def test_reload_takes_access_away(cenoted: Callable[..., Any]) -> None:
    """Who is no longer in the lists loses the connection, and is refused when it comes again."""
    daemon = cenoted(config=CONFIG)
    channel, _welcome, _fds = daemon.hello()
    daemon.rewrite(lambda text: text + NOBODY_OF_US)

    daemon.hang_up()
    daemon.wait_for("reloaded")

    with pytest.raises((Closed, ConnectionError)):
        channel.request("ping")
    assert channel.notices[0]["reason"] == "access"
    with pytest.raises(Refusal, match=f"uid {os.geteuid()} may not attach"):
        daemon.hello()


def test_a_reload_that_one_pool_cannot_follow_changes_none(
    cenoted: Callable[..., Any], tmp_path: Path
) -> None:
    """
    The second pool's salt file is missing: the first keeps what it had, as the log says, and a
    reload with the file there changes both.
    """
    other, salt = tmp_path / "other.sock", tmp_path / "salt"
    second = CONFIG.replace("{pool}", "{pool}-b").replace("{socket}", str(other))
    daemon = cenoted(config=CONFIG + second)
    channel, _welcome, _fds = daemon.hello()
    tenant = f'\n[[pool.tenant]]\nusers = [{os.geteuid()}]\nsalt_file = "{salt}"\n'
    daemon.rewrite(lambda text: text.replace('"lru"', '"lfu"') + tenant)

    daemon.hang_up()
    line = daemon.wait_for("reload_failed")

    assert str(salt) in line["error"]
    assert channel.request("stats").body["policy"] == "lru"
    salt.touch(0o600)
    salt.write_bytes(os.urandom(32))
    daemon.hang_up()
    daemon.wait_for("reloaded")
    assert channel.request("stats").body["policy"] == "lfu"


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("left", ["nobody", "reader"])
def test_reload_takes_the_ring_away(
    cenoted: Callable[..., Any], left: str, connected: bool
) -> None:
    """
    Whose role a reload takes stores and deletes no more through the ring that it has mapped, with
    or without a connection; what it tries is counted, what it reads it keeps, and nothing leaks.
    """
    daemon = cenoted(config=CONFIG)
    raw = daemon.raw("writer")
    stored, late = os.urandom(32), os.urandom(32)
    raw.commit(raw.reserve(4096), stored, 4096)
    grant = raw.reserve(4096)
    if not connected:
        raw.channel.close()
    readers = f"readers = [{os.geteuid()}]\n" if left == "reader" else ""
    daemon.rewrite(lambda text: text + NOBODY_OF_US + readers)

    daemon.hang_up()
    line = daemon.wait_for("sessions_demoted")
    daemon.wait_for("reloaded")
    raw.commit(grant, late, 4096)

    assert (line["sessions"], line["pids"]) == (1, f"[{os.getpid()}]")
    assert raw.find(late) is None
    assert raw.delete(stored) == 0
    assert raw.find(stored) is not None
    raw.wait_for(refused=2, granted_bytes=0, live_chunks=1)
    if left == "reader":
        roles = [s["role"] for s in daemon.hello("reader")[0].request("sessions").body["sessions"]]
        assert roles == [1, 1]


def test_a_right_that_comes_back_is_for_who_attaches_anew(cenoted: Callable[..., Any]) -> None:
    """A session stays what a reload made it; another one of the same user has the right again."""
    daemon = cenoted(config=CONFIG)
    before = daemon.raw("writer")
    first, second = os.urandom(32), os.urandom(32)
    grant = before.reserve(4096)
    daemon.rewrite(lambda text: text + NOBODY_OF_US)
    daemon.hang_up()
    daemon.wait_for("sessions_demoted")

    daemon.rewrite(lambda text: text.replace(NOBODY_OF_US, ""))
    daemon.hang_up()
    after = once_allowed(daemon)
    before.commit(grant, first, 4096)
    after.commit(after.reserve(4096), second, 4096)

    assert (after.find(first), after.find(second) is not None) == (None, True)


def test_a_reload_without_the_socket_file(
    cenoted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody removed the socket: the rules change all the same, and systemd hears READY=1."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        daemon = cenoted(config=CONFIG)
        channel, _welcome, _fds = daemon.hello()
        daemon.rewrite(lambda text: text + NOBODY_OF_US)
        daemon.socket.unlink()

        daemon.hang_up()
        daemon.wait_for("reloaded")

        said = [notices.recv(64).splitlines()[0] for _ in range(3)]
    assert said == [b"READY=1", b"RELOADING=1", b"READY=1"]
    assert daemon.events("socket_mode_not_set")
    with pytest.raises((Closed, ConnectionError)):
        channel.request("ping")
