# SPDX-License-Identifier: Apache-2.0
"""Custody by a holder process: what it keeps through which deaths."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.multiprocess.custody_bed import (
    ENVIRON,
    POOL,
    STOP_S,
    Bed,
    await_end,
    has_hung_up,
    pid_of,
    seqpacket,
    take,
)

from cenote.daemon import holder
from cenote.daemon.custody import CustodyError, open_custody
from cenote.daemon.custody_holder import HolderCustody
from cenote.shm.media.memfd import create_session_memfd, is_dead, liveness_fd


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    """A directory of a daemon's."""
    with Bed(tmp_path) as made:
        yield made


# ---- what it is for ------------------------------------------------------------------------------


def test_what_was_kept_outlives_a_killed_daemon(bed: Bed) -> None:
    """
    The same objects come back under their names, to one successor after the other.
    """
    first = bed.daemon()
    kept = first.ask("keep", "catalog", "r0", "s.17")
    first.kill()

    second = bed.daemon()
    found = second.ask("left")
    assert {name: [ino, text] for name, (_, ino, text) in found.items()} == {
        name: [ino, name] for name, (_, ino) in kept.items()
    }
    second.kill()

    third = bed.custody()
    assert take(third) == {name: ino for name, (_, ino) in kept.items()}
    assert third.where.startswith("holder process ")


def test_a_client_is_seen_alive_and_dead_through_custody(bed: Bed) -> None:
    """
    The proof of death works on what comes back: held while the client holds it, then free (I6).
    """
    first = bed.daemon()
    fd, _ = first.ask("keep", "s.1")["s.1"]
    ours = os.open(f"/proc/{first.process.pid}/fd/{fd}", os.O_RDWR)
    client = liveness_fd(ours)
    os.close(ours)
    first.kill()

    session = bed.custody().left()["s.1"]

    assert not is_dead(session)
    os.close(client)
    assert is_dead(session)
    os.close(session)


def test_a_pool_that_keeps_nothing_needs_no_process(bed: Bed) -> None:
    """
    The first keep() starts the holder; until then nothing is there, and nothing is left behind.
    """
    custody = bed.custody()

    assert custody.left() == {}
    custody.drop(["s.1"])
    custody.dissolve()
    assert custody.where == "a holder process, not yet started"
    assert list(bed.run_dir.iterdir()) == []


def test_a_dropped_name_is_forgotten(bed: Bed) -> None:
    """
    The last copy is closed; other names stay, and unknown ones are no error.
    """
    custody = bed.custody()
    (read, write), (_, other) = bed.pipe(), bed.pipe()
    custody.keep({"a": write, "b": other})
    os.close(write)

    custody.drop(["a", "never-kept", "No Name"])

    assert has_hung_up(read)
    assert set(take(custody)) == {"b"}
    os.close(other)


def test_a_name_stands_for_the_newest(bed: Bed) -> None:
    """
    What is kept under a name that is taken replaces what was there.
    """
    custody = bed.custody()
    (read, old), (_, new) = bed.pipe(), bed.pipe()
    custody.keep({"a": old})
    custody.keep({"a": new})
    os.close(old)

    assert has_hung_up(read)
    assert take(custody) == {"a": os.fstat(new).st_ino}
    os.close(new)


# ---- the end of a holder -------------------------------------------------------------------------


def test_a_dissolved_holder_is_gone(bed: Bed) -> None:
    """
    Process, files and descriptors; the pool may be kept again afterwards.
    """
    custody = bed.custody()
    read, write = bed.pipe()
    custody.keep({"a": write})
    pid = pid_of(custody)
    os.close(write)

    custody.dissolve()

    assert list(bed.run_dir.iterdir()) == []
    await_end(pid)
    assert has_hung_up(read)
    _, again = bed.pipe()
    custody.keep({"a": again})
    assert pid_of(custody) != pid
    os.close(again)


def test_a_holder_of_nothing_ends_with_its_daemon(bed: Bed) -> None:
    """
    Nobody has to end it once everything was dropped.
    """
    custody = bed.custody()
    _, write = bed.pipe()
    custody.keep({"a": write})
    os.close(write)
    pid = pid_of(custody)
    custody.drop(["a"])

    custody.close()

    await_end(pid)
    assert list(bed.run_dir.iterdir()) == []


@pytest.mark.parametrize("constant", ["UNCLAIMED_S", "ALONE_S"])
def test_a_holder_that_nobody_can_want_ends(bed: Bed, constant: str) -> None:
    """
    One that nobody spoke to, and one whose folder was removed with the socket's name in it.
    """
    script = f"import sys; from cenote.daemon import holder; holder.{constant} = 0.05\n"
    script += "sys.exit(holder.main(sys.argv[1:]))"
    path = bed.path
    argv = [sys.executable, "-P", "-c", script, str(path)]
    subprocess.run(argv, check=True, timeout=STOP_S)
    if constant == "ALONE_S":
        read, write = bed.pipe()
        with seqpacket(path) as sock:
            holder.send(sock, ["keep", "a"], [write])
            assert holder.receive(sock) == (["ok"], [])
            os.close(write)
            for name in (path, path.with_name(path.name + holder.LOCK_SUFFIX)):
                name.unlink()
        assert has_hung_up(read)

    for pid in bed.holders():
        await_end(pid)


def test_signals_for_the_daemon_do_not_end_the_holder(bed: Bed) -> None:
    """
    Those to its group, and a terminal's. A person's `kill` ends it, and it clears away its files.
    """
    first = bed.daemon()
    kept = first.ask("keep", "a")
    pid = int(first.ask("where").split()[-1])
    first.end(signal.SIGTERM)
    for number in (signal.SIGHUP, signal.SIGINT):
        os.kill(pid, number)

    custody = bed.custody()
    assert take(custody) == {"a": kept["a"][1]}
    assert pid_of(custody) == pid
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    assert list(bed.run_dir.iterdir()) == []


def test_a_killed_holder_is_replaced_and_gets_everything(
    bed: Bed, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The next keep() notices, says so, and brings a new holder all that is still wanted.
    """
    custody = bed.custody()
    fds = {name: create_session_memfd(4096) for name in ("a", "b", "c")}
    inodes = {name: os.fstat(fd).st_ino for name, fd in fds.items()}
    custody.keep({name: fds[name] for name in ("a", "b")})
    pid = pid_of(custody)
    os.kill(pid, signal.SIGKILL)
    await_end(pid)

    custody.drop(["a"])
    custody.keep({"c": fds["c"]})

    assert pid_of(custody) != pid
    custody.close()
    assert take(bed.custody()) == {name: inodes[name] for name in ("b", "c")}
    assert "holder_replaced" in [record.message for record in caplog.records]
    holder.close_all(fds.values())


def test_keeping_nothing_finds_out_about_a_dead_holder(
    bed: Bed, caplog: pytest.LogCaptureFixture
) -> None:
    """
    For a daemon without new sessions; a pool without anything starts no process by it.
    """
    custody = bed.custody()
    custody.keep({})
    assert bed.holders() == []
    fd = bed.memory()
    custody.keep({"a": fd})
    pid = pid_of(custody)
    custody.keep({})
    assert pid_of(custody) == pid
    os.kill(pid, signal.SIGKILL)
    await_end(pid)

    custody.keep({})

    assert bed.holders() == [pid_of(custody)]
    assert "holder_replaced" in [record.message for record in caplog.records]
    assert take(custody) == {"a": os.fstat(fd).st_ino}


def test_a_holder_that_hangs_is_told_and_goes_on(bed: Bed) -> None:
    """
    The daemon waits for a limited time; what it asked for meanwhile is done later.
    """
    custody = bed.custody()
    a, b = bed.memory(), bed.memory()
    custody.keep({"a": a})
    pid = pid_of(custody)
    os.kill(pid, signal.SIGSTOP)
    assert isinstance(custody, HolderCustody)
    assert custody._sock is not None
    custody._sock.settimeout(0.05)
    with pytest.raises(CustodyError, match=rf"{pid} .*no answer within 5 s.*`kill {pid}`"):
        custody.keep({"b": b})
    custody.drop(["a"])
    os.kill(pid, signal.SIGCONT)

    custody.keep({"b": b})

    assert pid_of(custody) == pid
    assert take(custody) == {"b": os.fstat(b).st_ino}


def test_what_was_left_gets_into_a_new_holder_too(bed: Bed) -> None:
    """
    A predecessor's objects are as much in our care as our own; their files are replaced.
    """
    first = bed.daemon()
    kept = first.ask("keep", "old")
    first.kill()
    custody = bed.custody()
    assert set(take(custody)) == {"old"}
    os.kill(pid_of(custody), signal.SIGKILL)
    await_end(pid_of(custody))

    new = create_session_memfd(4096)
    custody.keep({"new": new})
    custody.close()

    assert take(bed.custody()) == {"old": kept["old"][1], "new": os.fstat(new).st_ino}
    os.close(new)


# ---- two at once ---------------------------------------------------------------------------------


def test_holders_started_at_once_end_as_one(bed: Bed) -> None:
    """
    One of them serves; the others say that it does. What it makes is its user's alone.
    """
    argv = [sys.executable, "-P", "-m", holder.__name__, str(bed.path)]
    started = [subprocess.Popen(argv) for _ in range(6)]
    codes = sorted(process.wait(STOP_S) for process in started)

    assert codes == [holder.EXIT_SERVING] + [holder.EXIT_TAKEN] * 5
    assert len(bed.holders()) == 1
    assert {oct(file.stat().st_mode & 0o777) for file in bed.run_dir.iterdir()} == {"0o600"}
    with seqpacket(bed.path) as sock:
        holder.send(sock, ["hello"])
        assert holder.receive(sock)[0][:2] == ["ok", str(bed.holders()[0])]


def test_a_second_daemon_is_told_of_the_first(bed: Bed) -> None:
    """
    One daemon at a time; as soon as it is dead the next one is served.
    """
    first = bed.daemon()
    first.ask("keep", "a")
    with pytest.raises(CustodyError, match=f"process {first.process.pid} is connected"):
        bed.custody()
    first.kill()

    assert set(take(bed.custody())) == {"a"}


# ---- where it cannot be --------------------------------------------------------------------------


def test_what_cannot_be_started_is_told(bed: Bed, tmp_path: Path) -> None:
    """
    The error says which folder or file is in the way.
    """
    custody = open_custody(tmp_path / "nowhere", POOL, ENVIRON)
    with pytest.raises(CustodyError, match=r"could be started at .*nowhere.*No such file"):
        custody.keep({"a": 0})
    (bed.run_dir / "q.custody").mkdir()
    with pytest.raises(CustodyError, match=r"q\.custody is no socket: remove it"):
        open_custody(bed.run_dir, "q", ENVIRON).keep({"a": 0})
    with pytest.raises(CustodyError, match="choose a shorter run directory"):
        open_custody(Path("/" + "x" * 100), POOL, ENVIRON)


def test_a_descriptor_that_is_none_is_told(bed: Bed) -> None:
    """
    It is found before anything is started or kept.
    """
    custody = bed.custody()
    fd = create_session_memfd(4096)
    os.close(fd)

    with pytest.raises(CustodyError, match=rf"descriptor {fd} \(a\) cannot be copied"):
        custody.keep({"a": fd})

    assert custody.where == "a holder process, not yet started"
    with pytest.raises(OSError, match="Bad file descriptor"):
        fcntl.fcntl(fd, fcntl.F_GETFD)
