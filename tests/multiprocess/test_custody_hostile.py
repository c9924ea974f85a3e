# SPDX-License-Identifier: Apache-2.0
"""Custody by a holder process: its limits, and what hostile peers send."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.multiprocess.custody_bed import STOP_S, Bed, has_hung_up, pid_of, seqpacket, take

from cenote.daemon import holder
from cenote.daemon.custody import CustodyError
from cenote.daemon.custody_holder import HolderCustody
from cenote.daemon.holder import BATCH_MAX, KEPT_MAX, MESSAGE_MAX_BYTES

OTHER_UID: Final = 65_534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
root_sees = pytest.mark.skipif(
    os.geteuid() != 0, reason="a holder hides /proc/pid/fd from its own user"
)


def descriptors_of(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    """A directory of a daemon's."""
    with Bed(tmp_path) as made:
        yield made


# ---- limits --------------------------------------------------------------------------------------


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Let this process, and the holder that it starts, have as many as a pool may keep."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 3 * KEPT_MAX:
        pytest.skip(f"needs {3 * KEPT_MAX} descriptors, and `ulimit -Hn` is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3 * KEPT_MAX), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pool_keeps_as_many_as_it_may(bed: Bed, many_descriptors: None) -> None:
    """
    Thousands go over in batches and come back; one more is refused and changes nothing (I10).
    """
    custody = bed.custody()
    read, write = bed.pipe()
    names = [f"s.{number}" for number in range(KEPT_MAX)]
    custody.keep(dict.fromkeys(names, write))

    with pytest.raises(CustodyError, match="4097 descriptors would be in custody, and 4096 may"):
        custody.keep({"one-more": write})
    os.close(write)
    found = custody.left()

    assert list(found) == names
    holder.close_all(found.values())
    custody.drop(names)
    assert has_hung_up(read)


def test_a_holder_with_few_descriptors_says_so(bed: Bed) -> None:
    """
    Where the hard limit is too low the error names it, and what is kept stays kept.
    """
    script = """
import os, resource, sys
from pathlib import Path
from cenote.daemon.custody import CustodyError, open_custody
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
custody, fd = open_custody(Path(sys.argv[1]), "p", {}), os.open("/dev/null", os.O_RDONLY)
custody.keep({"first": fd})
try:
    custody.keep({str(number): fd for number in range(220)})
except CustodyError as error:
    print(error)
custody.drop(str(number) for number in range(220))
print(len(custody.left()))
custody.dissolve()
"""
    argv = [sys.executable, "-P", "-c", script, str(bed.run_dir)]
    ran = subprocess.run(argv, check=True, timeout=STOP_S, capture_output=True, text=True)
    said, count = ran.stdout.splitlines()

    assert "it can keep 204 descriptors here: raise `ulimit -Hn`" in said
    assert count == "1"


# ---- hostile input -------------------------------------------------------------------------------


def sendmsg(sock: socket.socket, data: bytes, count: int) -> None:
    """Send bytes with *count* descriptors."""
    with tempfile.TemporaryFile() as file:
        fds = array.array("i", [file.fileno()] * count)
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else [])


HOSTILE: Final = {
    "not ASCII": (b"\xff\xfe", 0),
    "no request": (b"bye", 0),
    "empty with descriptors": (b"", 3),
    "giant": (b"drop\n" + b"a" * 2 * MESSAGE_MAX_BYTES, 0),
    "giant with descriptors": (b"keep\n" + b"a" * 2 * MESSAGE_MAX_BYTES, 2),
    "no descriptor": (b"keep\nx", 0),
    "no name": (b"keep", 1),
    "more descriptors than names": (b"keep\nx", 2),
    "more names than descriptors": (b"keep\nx\ny", 1),
    "too many descriptors": (b"keep\n" + b"\n".join(b"%d" % n for n in range(65)), BATCH_MAX + 1),
    "as many as the kernel takes": (b"keep\nx", 253),
    "one name twice": (b"keep\nx\nx", 2),
    "no good name": (b"keep\n../x", 1),
    "an empty name": (b"keep\n", 1),
    "a long name": (b"keep\n" + b"x" * 65, 1),
    "descriptors with drop": (b"drop\na", 1),
    "descriptors with left": (b"left\n0", 1),
    "no number": (b"left\nx", 0),
    "a negative number": (b"left\n-1", 0),
    "a long number": (b"left\n99999", 0),
    "no argument": (b"left", 0),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_input_ends_its_connection_only(bed: Bed, kind: str) -> None:
    """
    The holder goes on with all it kept, and has not one descriptor more.
    """
    custody = bed.custody()
    fd = bed.memory()
    custody.keep({"a": fd})
    pid = pid_of(custody)
    custody.close()
    data, count = HOSTILE[kind]
    with seqpacket(bed.path) as sock:
        holder.send(sock, ["hello"])
        holder.receive(sock)
        before = descriptors_of(pid) if os.geteuid() == 0 else 0
        sendmsg(sock, data, count)
        answer = sock.recv(MESSAGE_MAX_BYTES)
        assert sock.recv(MESSAGE_MAX_BYTES) == b""
    assert answer.startswith(b"no ")

    again = bed.custody()

    assert take(again) == {"a": os.fstat(fd).st_ino}
    assert pid_of(again) == pid
    if os.geteuid() == 0:
        assert descriptors_of(pid) == before


@root_sees
def test_nothing_leaks(bed: Bed) -> None:
    """
    However often things come and go, the holder has what is kept and its own five.
    """
    custody = bed.custody()
    fd = bed.memory()
    custody.keep({"stays": fd})
    pid = pid_of(custody)
    before = descriptors_of(pid)
    for _ in range(20):
        names = [f"s.{number}" for number in range(100)]
        custody.keep(dict.fromkeys(names, fd))
        custody.keep(dict.fromkeys(names, fd))
        take(custody)
        custody.drop(names)
        take(custody)  # drop() is answered before the last is closed
    custody.close()

    custody = bed.custody()
    assert set(take(custody)) == {"stays"}
    assert descriptors_of(pid) == before
    # /dev/null three times, the lock, the socket, the connection, and what is kept
    assert before == 7


@root_sees
def test_what_a_dead_daemon_dropped_is_closed(bed: Bed) -> None:
    """
    The answer reaches nobody, and the descriptors are given back all the same.
    """
    custody = bed.custody()
    custody.keep({name: bed.memory() for name in ("a", "b", "stays")})
    pid = pid_of(custody)
    before = descriptors_of(pid)
    os.kill(pid, signal.SIGSTOP)
    assert isinstance(custody, HolderCustody)
    assert custody._sock is not None
    holder.send(custody._sock, ["drop", "a", "b"])
    custody.close()
    os.kill(pid, signal.SIGCONT)

    assert set(take(bed.custody())) == {"stays"}
    assert descriptors_of(pid) == before - 2


def test_a_silent_connection_keeps_nobody_away(bed: Bed) -> None:
    """
    One that says nothing is dropped; until then a daemon is told who is in its way.
    """
    custody = bed.custody()
    fd = bed.memory()
    custody.keep({"a": fd})
    custody.close()
    with seqpacket(bed.path) as silent:
        with pytest.raises(CustodyError, match=f"process {os.getpid()} is connected"):
            bed.custody()
        assert silent.recv(1) == b""

    assert set(take(bed.custody())) == {"a"}


def test_a_peer_that_reads_no_answers_is_dropped(bed: Bed) -> None:
    """
    The holder waits for nobody.
    """
    custody = bed.custody()
    fd = bed.memory()
    custody.keep({"a": fd})
    custody.close()
    with seqpacket(bed.path) as deaf, contextlib.suppress(ConnectionError):
        while True:
            deaf.send(b"left\n0")

    assert set(take(bed.custody())) == {"a"}


@root_only
def test_another_user_is_not_served(bed: Bed) -> None:
    """
    Not even where the modes of folder and socket would let it in.
    """
    custody = bed.custody()
    fd = bed.memory()
    custody.keep({"a": fd})
    custody.close()
    script = f"""
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
os.chdir(sys.argv[1])
os.chmod("p.custody", 0o666)
os.setresuid({OTHER_UID}, {OTHER_UID}, {OTHER_UID})
sock.connect("p.custody")
try:
    sock.send(b"left\\n0")
    sys.exit(len(sock.recv(100)))
except (BrokenPipeError, ConnectionResetError):
    pass
"""
    bed.run_dir.chmod(0o755)
    with contextlib.ExitStack() as stack:
        for folder in bed.run_dir.parents[:-2]:
            mode = folder.stat().st_mode & 0o7777
            stack.callback(folder.chmod, mode)
            folder.chmod(mode | 0o711)
        subprocess.run([sys.executable, "-c", script, str(bed.run_dir)], check=True, timeout=STOP_S)

    assert set(take(bed.custody())) == {"a"}


@root_only
def test_descriptors_are_given_to_no_other_user(bed: Bed) -> None:
    """
    A process of somebody else's that listens in the holder's place gets nothing.
    """
    script = f"""
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.bind(sys.argv[1])
os.setresuid({OTHER_UID}, {OTHER_UID}, {OTHER_UID})
sock.listen()
print("listens", flush=True)
sys.exit(len(sock.accept()[0].recv(100)))
"""
    argv = [sys.executable, "-c", script, str(bed.path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as impostor:
        assert impostor.stdout is not None
        impostor.stdout.readline()
        with pytest.raises(CustodyError, match=f"belongs to uid {OTHER_UID}"):
            bed.custody()
        assert impostor.wait(STOP_S) == 0
