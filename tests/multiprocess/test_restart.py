# SPDX-License-Identifier: Apache-2.0
"""
A pool outlives its daemon: kill -9, stop, and whatever died meanwhile.

Real daemons and real clients. What happens at each step of a change is in tests/c/crash_points.c.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.multiprocess.restart_bed import (
    MEDIA,
    bytes_of,
    holds,
    key_of,
    put,
    session_of,
    wait_until,
)

from cenote.client import PoolFull, PoolGone
from cenote.shm.inspect import Catalog

# ---- the pool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("medium", MEDIA)
def test_a_killed_daemon_loses_nothing(start: Any, attach: Any, medium: str) -> None:
    """
    kill -9: views stay good, lookups go on without a daemon, the next one has every chunk, and the
    clients' sessions are the same as before.
    """
    first = start(medium=medium)
    pool, cache = attach(first)
    put(cache, *range(20))
    held = cache.get(key_of(3))
    before = session_of(pool)

    first.kill()

    assert cache.match(b"".join(map(key_of, range(20)))) == 20
    assert holds(cache, 7)
    second = start(after=first)
    wait_until(lambda: pool.connected)
    assert session_of(pool) == before
    assert held is not None
    assert bytes(held.memory) == bytes_of(3)
    assert holds(cache, *range(20))
    put(cache, 20)
    _, other = attach(second)
    assert holds(other, *range(21))
    assert pool.stats(timeout_s=30.0).chunks == 21
    assert second.events("pool_taken_over")[0]["chunks"] == 20


@pytest.mark.parametrize("medium", MEDIA)
def test_a_stopped_daemon_keeps_its_pool(start: Any, attach: Any, medium: str) -> None:
    """SIGTERM: one line says what is kept; the next daemon finds it clean, nothing in doubt."""
    first = start(medium=medium)
    _, cache = attach(first)
    put(cache, *range(5))

    assert first.stop() == 0

    (kept,) = first.events("pool_kept")
    assert kept["chunks"] == 5
    assert "cenoted --drop" in kept["remark"]
    second = start(after=first)
    _, other = attach(second)
    assert holds(other, *range(5))
    (taken,) = second.events("pool_taken_over")
    assert (taken["clean"], taken["unverified"], taken["repaired"]) == (True, 0, 0)


def test_a_reservation_survives(start: Any, attach: Any) -> None:
    """What was reserved before the daemon's death is filled and committed after its return."""
    first = start()
    pool, cache = attach(first)
    writing = cache.put(key_of(1), 70_000)
    first.kill()
    wait_until(lambda: not pool.connected)
    with pytest.raises(PoolGone):
        cache.put(key_of(2), 5000)
    start(after=first)
    wait_until(lambda: pool.connected)
    with writing as w:
        w.memory[:] = bytes_of(1)
    cache.flush(timeout_s=30.0)
    assert holds(cache, 1)


def test_destroyed_is_destroyed(start: Any, attach: Any) -> None:
    """What an administrator destroyed comes back with no daemon."""
    first = start(medium="shm")
    pool, cache = attach(first, role="admin")
    put(cache, 1)
    pool._control("destroy", {}, 30.0)
    assert first.wait() == 0
    assert first.names() == []
    second = start(after=first)
    assert second.events("pool_taken_over") == []


def test_drop_frees_what_is_left(start: Any, attach: Any) -> None:
    """`cenoted --drop`, with no daemon there: no name, no holder; the next pool is empty."""
    first = start(medium="shm")
    pool, cache = attach(first)
    put(cache, 1)
    first.stop()
    assert first.names() != []
    command = [sys.executable, "-m", "cenote.daemon.main", *first.argv, "--drop"]
    subprocess.run(command, check=True)
    assert first.names() == []
    assert not first.socket.with_name(f"{first.pool}.custody").exists()
    start(after=first)
    wait_until(lambda: pool.connected)
    assert cache.get(key_of(1)) is None


# ---- what another release or configuration left --------------------------------------------------


def test_another_size_is_refused(start: Any, attach: Any) -> None:
    """Another size: status 2, nothing touched, and --reformat begins anew."""
    first = start(medium="shm")
    _, cache = attach(first)
    put(cache, 1)
    first.stop()

    second = start(after=first, size="32MiB")

    assert second.wait() == 2
    assert "region 0, bytes" in second.events("cannot_start")[-1]["error"]
    third = start(after=first)
    _, other = attach(third)
    assert holds(other, 1)
    third.stop()
    fourth = start("--reformat", after=first, size="32MiB")
    _, empty = attach(fourth)
    assert empty.get(key_of(1)) is None


def test_another_layout_is_refused(start: Any, attach: Any) -> None:
    """A catalog of another layout version: status 2, no byte of it changed."""
    first = start(medium="shm")
    _, cache = attach(first)
    put(cache, 1)
    first.stop()
    (name,) = [name for name in first.names() if name.endswith(".catalog")]
    catalog = Path("/dev/shm", name)
    with catalog.open("r+b") as file:
        file.seek(8)
        file.write((99).to_bytes(4, "little"))
    before = catalog.read_bytes()

    second = start(after=first)

    assert second.wait() == 2
    assert "has memory layout 99" in second.events("cannot_start")[-1]["error"]
    assert "--reformat" in second.events("cannot_start")[-1]["error"]
    assert catalog.read_bytes() == before


def test_a_catalog_that_contradicts_itself_is_left_alone(start: Any, attach: Any) -> None:
    """A descriptor beyond its region: a new pool is made, the old one stays for `verify`."""
    first = start(medium="shm")
    _, cache = attach(first)
    put(cache, 1)
    first.kill()
    (name,) = [name for name in first.names() if name.endswith(".catalog")]
    catalog = Path("/dev/shm", name)
    with catalog.open("r+b") as file:
        file.seek(Catalog.open(catalog).superblock.offsets["chunks"] + 40)
        file.write((2**62).to_bytes(8, "little"))

    second = start(after=first)

    assert second.ready.startswith("ready ")
    assert len(second.events("pool_not_kept")) == 1
    assert name in second.names()
    _, other = attach(second)
    assert other.get(key_of(1)) is None


# ---- who died meanwhile --------------------------------------------------------------------------

CLIENT = """
import sys, threading
from cenote.client import Manifest, connect
from cenote.client.connection import Backoff
pool = connect(sys.argv[1], timeout_s=30.0, reconnect=Backoff(first_s=0.01, last_s=0.02))
cache = pool.namespace(Manifest("m", "l", "uint8", 16), timeout_s=30.0)
held = [cache.get(int(n).to_bytes(8, "little") * 4) for n in sys.argv[2:]]
writing = cache.put(b"w" * 32, 70_000)
print("holds", *(bytes(chunk.memory[:4]).hex() for chunk in held), flush=True)
for line in sys.stdin:
    print(*(bytes(chunk.memory[:4]).hex() for chunk in held), flush=True)
"""


@pytest.fixture
def client() -> Iterator[Callable[..., Any]]:
    """Return a function that starts a process which holds some chunks and a reservation."""
    started = []

    def client(daemon: Any, *numbers: int) -> Any:
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(daemon.socket), *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("holds")
        return process

    yield client
    for process in started:
        process.kill()
        process.communicate()


def test_who_died_while_no_daemon_was_there_holds_nothing(
    start: Any, attach: Any, client: Any
) -> None:
    """Leases and reservations of a client that died in between are gone with it (I6)."""
    first = start()
    pool, cache = attach(first)
    put(cache, 1, 2)
    process = client(first, 1, 2)
    first.kill()
    process.kill()
    process.wait()
    start(after=first)
    wait_until(lambda: pool.connected)
    wait_until(lambda: pool.stats(timeout_s=30.0).sessions == 1)
    assert pool.stats(timeout_s=30.0).leases == 0
    assert cache.delete(key_of(1), timeout_s=30.0) == 1
    assert pool.stats(timeout_s=30.0).limbo == 0


def test_a_stopped_client_holds_nobody_up(start: Any, attach: Any, client: Any) -> None:
    """
    A client under SIGSTOP that never notices the restart: its leases count, all else is evicted
    around them, and it reads the same bytes when it goes on (I7).
    """
    first = start(size="16MiB")
    pool, cache = attach(first)
    put(cache, 1, 2)
    process = client(first, 1, 2)
    process.send_signal(signal.SIGSTOP)
    first.kill()
    start(after=first)
    wait_until(lambda: pool.connected)
    for n in range(100, 900):  # three times the pool
        try:
            cache.put_many(key_of(n), [bytes_of(n)])
        except PoolFull:
            cache.flush(timeout_s=30.0)
    cache.flush(timeout_s=30.0)
    assert pool.stats(timeout_s=30.0).evictions > 300
    process.send_signal(signal.SIGCONT)
    process.stdin.write("\n")
    process.stdin.flush()
    said = process.stdout.readline().split()
    assert said == [bytes_of(n)[:4].hex() for n in (1, 2)]


def test_without_its_holder_a_session_cannot_be_kept(start: Any, attach: Any) -> None:
    """
    Daemon and holder both killed: nobody knows who reads what, so a new pool is made (I7), and who
    reads the old one goes on.
    """
    first = start(medium="shm")
    pool, cache = attach(first)
    put(cache, 1)
    held = cache.get(key_of(1))
    first.kill()
    kill_holder(first)
    before = session_of(pool)
    second = start(after=first)
    wait_until(lambda: pool.connected)
    assert len(second.events("pool_not_kept")) == 1
    assert session_of(pool)[0] != before[0]
    assert held is not None
    assert bytes(held.memory) == bytes_of(1)
    assert cache.get(key_of(1)) is None


def kill_holder(daemon: Any) -> None:
    """Kill the process that keeps the descriptors of a daemon's pool."""
    path = str(daemon.socket.with_name(f"{daemon.pool}.custody"))
    (holder,) = [p for p in psutil.process_iter(["cmdline"]) if path in (p.info["cmdline"] or ())]
    holder.kill()
    holder.wait()


def test_a_killed_holder_is_replaced_at_a_stop(start: Any, attach: Any) -> None:
    """What `pool_kept` says is so, although the holder died without anybody asking it since."""
    first = start(medium="memfd")
    _, cache = attach(first)
    put(cache, 1)
    kill_holder(first)
    first.stop()
    assert len(first.events("pool_kept")) == 1
    _, other = attach(start(after=first))
    assert holds(other, 1)


# ---- one daemon at a time ------------------------------------------------------------------------


def test_a_stopped_daemon_is_killed_first(start: Any, attach: Any) -> None:
    """A daemon under SIGSTOP: the second kills it, and goes on with its pool."""
    first = start()
    pool, cache = attach(first)
    put(cache, 1)
    first.process.send_signal(signal.SIGSTOP)
    second = start(after=first)
    assert first.wait() == -signal.SIGKILL
    wait_until(lambda: pool.connected)
    assert holds(cache, 1)
    assert second.events("predecessor_killed")[0]["pid"] == first.pid


def test_a_running_daemon_is_killed_on_demand_only(start: Any, attach: Any) -> None:
    """A daemon that runs: the second refuses, and takes over with --take-over."""
    first = start()
    pool, cache = attach(first)
    put(cache, 1)
    second = start(after=first)
    assert second.wait() == 1
    assert "--take-over" in second.events("cannot_start")[-1]["error"]
    third = start("--take-over", after=first)
    assert first.wait() == -signal.SIGKILL
    wait_until(lambda: pool.connected)
    assert third.hello()[1].server_pid == third.pid
    assert holds(cache, 1)


def test_three_dirty_starts_within_a_minute_and_it_begins_anew(start: Any, attach: Any) -> None:
    """A pool that kills its daemons is left alone, not tried for ever."""
    daemon = start(medium="shm")
    _, cache = attach(daemon)
    put(cache, 1)
    names = daemon.names()
    for _ in range(3):
        daemon.kill()
        daemon = start(after=daemon)
    assert len(daemon.events("pool_taken_over")) == 3
    daemon.kill()
    last = start(after=daemon)
    assert "died 4 times" in last.events("pool_not_kept")[-1]["error"]
    assert set(names) < set(last.names())


# ---- doubt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["get", "get_many", "lease_many"])
def test_a_chunk_is_checked_before_its_first_use(start: Any, attach: Any, verb: str) -> None:
    """
    After a dirty start bytes that are not those of their checksum are a miss, whoever asks (I9).
    """
    first = start("--checksum", "commit", medium="shm")
    _, cache = attach(first)
    put(cache, 1, 2, 3)
    first.kill()
    damage(first, bytes_of(2))
    config = ["--checksum", "commit"]
    second = start(*config, after=first)
    _, other = attach(second)
    keys = [key_of(n) for n in (1, 2, 3)]
    if verb == "get":
        assert [other.get(key) is not None for key in keys] == [True, False, True]
    else:
        assert len(getattr(other, verb)(keys)) == 1


def test_the_scrubber_drops_what_is_damaged(start: Any, attach: Any) -> None:
    """Without anybody asking, it is found and counted as lost; the others are in doubt no more."""
    first = start("--checksum", "commit", medium="shm")
    _, cache = attach(first)
    put(cache, 1, 2, 3)
    first.kill()
    damage(first, bytes_of(2))
    second = start("--checksum", "commit", after=first)
    pool, _ = attach(second)
    wait_until(lambda: pool.stats(timeout_s=30.0).lost == 1)
    wait_until(lambda: pool.stats(timeout_s=30.0).raw["verified"] == 2)
    assert pool.stats(timeout_s=30.0).chunks == 2


def damage(daemon: Any, content: bytes) -> None:
    """Change a byte of the chunk with this content, in the memory of a dead daemon's pool."""
    (name,) = [name for name in daemon.names() if name.endswith(".r0")]
    path = Path("/dev/shm", name)
    at = path.read_bytes().index(content)
    with path.open("r+b") as file:
        file.seek(at + 5)
        file.write(b"!")
