# SPDX-License-Identifier: Apache-2.0
"""What every medium does alike, tried on each that this machine has, and what each does alone."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cenote.shm.media import (
    MediumError,
    MediumObject,
    MediumRefused,
    MediumSpec,
    NoRoom,
    ObjectName,
    PretouchStopped,
    create,
    create_session_memfd,
    is_dead,
    liveness_fd,
    map_fd,
    parse_medium,
    pretouch,
    shortages,
    terminal_progress,
    unmap,
)
from cenote.shm.media.posix_shm import SHM_DIR

MIB = 1024**2
OBJECT_BYTES = 4 * MIB
POOL = f"test-media-{os.getpid()}"
UID = os.geteuid()

Made = MediumObject
KINDS = ("shm", "memfd", "memfd-thp", "hugepages", "file-tmpfs", "file-disk")
HUGETLB_SKIP = "no free 2 MiB pages: `sysctl vm.nr_hugepages=64` as root gives some"


def name_of(part: str = "r0", pool_id: str = "0123456789abcdef") -> ObjectName:
    return ObjectName(POOL, pool_id, part, UID)


def descriptors() -> dict[str, str]:
    """What every open descriptor of this process shows."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


def names() -> set[str]:
    return {path.name for path in SHM_DIR.glob(f"*{POOL}*")}


@pytest.fixture(params=KINDS)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MediumSpec]:
    """Each medium that this machine has, and no leak of names or descriptors by any."""
    kind: str = request.param
    scratch = SHM_DIR / f"{POOL}.dir"
    if kind == "file-tmpfs":
        scratch.mkdir()
        parsed = parse_medium(f"file:{scratch}/region")
    elif kind == "file-disk":
        parsed = parse_medium(f"file:{tmp_path}/region")
    else:
        medium, _, page_size = kind.partition("-")
        parsed = parse_medium(medium, page_size or None)
    if parsed.hugetlb and shortages([(parsed, 2 * OBJECT_BYTES)]):
        pytest.skip(HUGETLB_SKIP)
    before = descriptors()
    yield parsed
    if scratch.exists():
        scratch.rmdir()  # fails when something was left in it
    assert before == descriptors()
    assert set() == names()


@pytest.fixture
def made(spec: MediumSpec) -> Iterator[Made]:
    """One object of each medium."""
    with create(spec, name_of(), OBJECT_BYTES) as made:
        yield made
        made.unlink()


def peek(address: int, bytes_: int = 8) -> bytes:
    return ctypes.string_at(address, bytes_)


def poke(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


# ---- every medium -----------------------------------------------------------------------------


def test_an_object_is_as_large_as_asked_in_whole_pages_and_zero(spec: MediumSpec) -> None:
    """A size that is no whole number of pages is rounded up, and the object says to what."""
    with create(spec, name_of(), OBJECT_BYTES - 1) as made:
        address = made.map(writable=True)

        assert made.bytes == spec.round_up(OBJECT_BYTES - 1) == OBJECT_BYTES
        assert made.bytes % made.page_bytes == 0
        assert peek(address) == peek(address + made.bytes - 8) == bytes(8)

        unmap(address, made.bytes)
        made.unlink()


def test_only_its_owner_may_open_it_and_no_program_inherits_it(made: Made) -> None:
    """Mode 0600 whatever the umask, and CLOEXEC on each descriptor."""
    fd = made.reopen(writable=False)

    assert stat.S_IMODE(os.fstat(made.fd).st_mode) == 0o600
    assert not os.get_inheritable(made.fd)
    assert not os.get_inheritable(fd)

    os.close(fd)


def test_a_readers_descriptor_cannot_be_mapped_writable(made: Made) -> None:
    """The reader's own description has no write access, for us or for mmap itself."""
    fd = made.reopen(writable=False)
    try:
        with pytest.raises(PermissionError):
            map_fd(fd, made.bytes, writable=True)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, made.bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match=r"Invalid|Permission|Bad file"):
            os.ftruncate(fd, 0)
        unmap(map_fd(fd, made.bytes, writable=False), made.bytes)
    finally:
        os.close(fd)


def test_a_write_through_a_read_only_mapping_kills_the_writer_not_the_bytes(made: Made) -> None:
    """PROT_READ is the kernel's: the process that tries dies of SIGSEGV, the byte stays."""
    fd = made.reopen(writable=False)
    code = (
        "import ctypes, mmap, os, sys\n"
        "from cenote.shm.media import map_fd\n"
        "address = map_fd(int(sys.argv[1]), int(sys.argv[2]), writable=False)\n"
        "assert ctypes.string_at(address, 1) == b'\\0'\n"
        "ctypes.memset(address, 1, 1)\n"
    )
    command = [sys.executable, "-P", "-c", code, str(fd), str(made.bytes)]
    result = subprocess.run(command, pass_fds=[fd], check=False)
    os.close(fd)
    address = made.map(writable=False)

    assert result.returncode == -signal.SIGSEGV
    assert peek(address, 1) == b"\0"

    unmap(address, made.bytes)


def test_reader_and_writer_see_one_memory(made: Made) -> None:
    """What is written through one description is read through another, at 2 MiB boundaries."""
    reader_fd, writer_fd = made.reopen(writable=False), made.reopen(writable=True)
    reader = map_fd(reader_fd, made.bytes, writable=False)
    writer = map_fd(writer_fd, made.bytes, writable=True)
    os.close(reader_fd)
    os.close(writer_fd)

    poke(writer + made.bytes - 8, b"the end.")

    assert peek(reader + made.bytes - 8) == b"the end."
    assert 0 == reader % (2 * MIB) == writer % (2 * MIB)
    unmap(reader, made.bytes)
    unmap(writer, made.bytes)


def test_reopened_descriptors_share_no_lock(made: Made) -> None:
    """A new description is new: a lock on it keeps the others out, unlike a dup's."""
    one, two = made.reopen(writable=True), made.reopen(writable=True)
    if made.spec.kind in ("shm", "file"):  # the creator's own lock
        with pytest.raises(BlockingIOError):
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(one)
    os.close(two)


def test_mappings_outlive_name_and_descriptor(spec: MediumSpec) -> None:
    """After unlink and close a living reader keeps its bytes, and the name is free again."""
    first = create(spec, name_of(), OBJECT_BYTES)
    address = first.map(writable=True)
    poke(address, b"keep me!")
    first.unlink()
    first.unlink()
    first.close()
    first.close()

    with create(spec, name_of(), OBJECT_BYTES) as second:
        other = second.map(writable=False)
        assert bytes(8) == peek(other)
        unmap(other, OBJECT_BYTES)
        second.unlink()

    assert peek(address) == b"keep me!"
    unmap(address, OBJECT_BYTES)


def test_nothing_beyond_the_end_is_mapped(made: Made) -> None:
    """A claim to more than the object holds is refused before anything could fault."""
    longer = made.bytes + max(made.page_bytes, 16 * MIB)
    with pytest.raises(MediumError, match="shorter than"):
        map_fd(made.fd, longer, writable=False)
    with pytest.raises(MediumError, match="no whole pages"):
        map_fd(made.fd, made.bytes - 1, writable=False)


def test_pretouch_gives_all_memory_and_says_how_far_it_is(made: Made) -> None:
    """Every page is there afterwards, contents stay, progress ends at the size."""
    address = made.map(writable=True)
    poke(address + 4096, b"contents")
    seen: list[int] = []

    seconds = pretouch(address, made.bytes, threads=2, progress=seen.append)

    assert seconds >= 0
    assert made.bytes == seen[-1]
    assert sorted(seen) == seen
    assert peek(address + 4096) == b"contents"
    if not made.spec.hugetlb:
        assert os.fstat(made.fd).st_blocks * 512 >= made.bytes
    unmap(address, made.bytes)


def test_a_taken_name_is_refused_and_left_alone(spec: MediumSpec) -> None:
    """The second creator of one name gets an error, the first keeps its bytes; memfds have none."""
    with create(spec, name_of(), OBJECT_BYTES) as first:
        address = first.map(writable=True)
        poke(address, b"original")
        if spec.kind in ("shm", "file"):
            with pytest.raises(MediumError, match="exists already"):
                create(spec, name_of(), 4096)
        else:
            create(spec, name_of(), 4096).close()

        assert peek(address) == b"original"
        assert os.fstat(first.fd).st_size >= OBJECT_BYTES
        unmap(address, OBJECT_BYTES)
        first.unlink()


def test_what_cannot_be_is_refused_and_leaves_nothing(spec: MediumSpec) -> None:
    """Beyond a limit of the process is NoRoom; no name and no descriptor stays behind."""
    if spec.hugetlb:
        pytest.skip("the kernel does not apply RLIMIT_FSIZE to huge pages")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(NoRoom):
            create(spec, name_of(), OBJECT_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(MediumRefused):
        create(spec, name_of(), 2**61)


# ---- memfd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", ["4KiB", "thp", "2MiB"])
def test_memfds_are_sealed_but_for_future_writes(page_size: str) -> None:
    """Nobody resizes it, nobody adds a seal, and the next daemon can still map it writable."""
    spec = parse_medium("memfd", page_size)
    if spec.hugetlb and shortages([(spec, OBJECT_BYTES)]):
        pytest.skip(HUGETLB_SKIP)
    with create(spec, name_of(), OBJECT_BYTES) as made:
        seals = fcntl.fcntl(made.fd, fcntl.F_GET_SEALS)

        assert seals & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL) == (
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
        assert seals & (fcntl.F_SEAL_WRITE | 0x10) == 0  # 0x10: F_SEAL_FUTURE_WRITE
        for bytes_ in (0, OBJECT_BYTES - spec.page_bytes, OBJECT_BYTES + spec.page_bytes):
            with pytest.raises(PermissionError):
                os.ftruncate(made.fd, bytes_)
        with pytest.raises(PermissionError):
            fcntl.fcntl(made.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        successor = made.reopen(writable=True)
        unmap(map_fd(successor, made.bytes, writable=True), made.bytes)
        os.close(successor)


# ---- sessions: proof of death -----------------------------------------------------------------


def hold_session(fd: int, bytes_: int, ready: int) -> None:
    """A client: maps the segment, closes every descriptor, waits to be killed."""
    map_fd(fd, bytes_, writable=True)
    os.closerange(3, ready)
    os.write(ready, b"1")
    os.close(ready)
    signal.pause()


def test_a_session_is_dead_when_its_last_mapping_is_gone_and_not_before() -> None:
    """Closed descriptors and SIGSTOP prove nothing; SIGKILL does (I6)."""
    session = create_session_memfd(65536)
    assert is_dead(session)  # no client yet

    ours, theirs = os.pipe()
    locked = liveness_fd(session)
    assert not is_dead(session)
    client = multiprocessing.get_context("fork").Process(
        target=hold_session, args=(locked, 65536, theirs)
    )
    client.start()
    os.close(locked)
    os.close(theirs)
    assert os.read(ours, 1) == b"1"
    assert client.pid is not None

    assert not is_dead(session)
    os.kill(client.pid, signal.SIGSTOP)
    assert not is_dead(session)
    client.kill()
    client.join()
    assert is_dead(session)
    assert is_dead(session)  # asking changes nothing
    os.close(ours)
    os.close(session)


def test_a_session_that_was_never_sent_is_dead() -> None:
    """Closing the locked description without sending it gives the lock back."""
    session = create_session_memfd(1)
    locked = liveness_fd(session)
    with pytest.raises(MediumError, match="locked for a client already"):
        liveness_fd(session)
    os.close(locked)

    assert is_dead(session)
    assert os.fstat(session).st_size == mmap.PAGESIZE
    with pytest.raises(PermissionError):
        os.ftruncate(session, 0)
    os.close(session)


# ---- pre-touch --------------------------------------------------------------------------------


@pytest.fixture
def sparse() -> Iterator[tuple[MediumObject, int]]:
    """A memfd of four slices, mapped, without memory yet."""
    with create(parse_medium("memfd"), name_of(), 256 * MIB) as made:
        address = made.map(writable=True)
        yield made, address
        unmap(address, made.bytes)


def test_pretouch_can_be_stopped(sparse: tuple[MediumObject, int]) -> None:
    """An event that is set beforehand stops it before it touches anything."""
    made, address = sparse
    stop = threading.Event()
    stop.set()

    with pytest.raises(PretouchStopped):
        pretouch(address, made.bytes, stop=stop)

    assert os.fstat(made.fd).st_blocks == 0


def test_pretouch_ends_with_the_exception_of_its_caller(sparse: tuple[MediumObject, int]) -> None:
    """Ctrl-C ends it after the slices in flight, and its threads are gone."""
    made, address = sparse
    before = threading.active_count()

    def interrupt(_done_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretouch(address, made.bytes, threads=1, progress=interrupt)

    assert before == threading.active_count()
    assert os.fstat(made.fd).st_blocks * 512 < made.bytes


def test_pretouch_of_what_is_too_short_is_no_room() -> None:
    """An object that ends before its mapping is an exception, never SIGBUS."""
    with create(parse_medium("shm"), name_of(), OBJECT_BYTES) as made:
        made.unlink()
        address = made.map(writable=True)
        os.ftruncate(made.fd, OBJECT_BYTES // 2)

        with pytest.raises(NoRoom, match="ran out while it was populated"):
            pretouch(address, OBJECT_BYTES)

        unmap(address, OBJECT_BYTES)


def test_pretouch_runs_on_the_cpus_it_is_given_and_leaves_ours(
    sparse: tuple[MediumObject, int],
) -> None:
    """The threads' affinity is theirs alone; a CPU that does not exist is an error."""
    made, address = sparse
    before = os.sched_getaffinity(0)

    pretouch(address, 64 * MIB, cpus=frozenset({min(before)}))
    with pytest.raises(OSError, match="Invalid") as caught:
        pretouch(address, made.bytes, cpus=frozenset({1023}))

    assert caught.value.errno == errno.EINVAL
    assert before == os.sched_getaffinity(0)


def test_no_progress_bar_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """A daemon in a log file draws nothing."""
    with terminal_progress("pool 'x'", 100) as progress:
        progress(50)

    assert capfd.readouterr() == ("", "")
