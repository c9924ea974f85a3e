# SPDX-License-Identifier: Apache-2.0
"""Refused calls, foreign pools, and daemons that cannot be found: an error, and nothing lost."""

from __future__ import annotations

import os
import runpy
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from cenote._native import _core
from cenote.client import Cache, ChunkTooLarge, NotWritable, PoolGone, connect
from cenote.shm import media
from cenote.shm.errors import Corrupt, VersionMismatch
from cenote.shm.session import attach
from cenote.shm.wire import Refusal

MISCHIEF: Final = runpy.run_path(str(Path(__file__).with_name("mischief.py")))
MANIFEST, NBYTES = MISCHIEF["MANIFEST"], MISCHIEF["NBYTES"]
key_of, bytes_of = MISCHIEF["key_of"], MISCHIEF["bytes_of"]
POOL_BYTES: Final = 16 * 2**20

ffi: Final = _core.ffi
lib: Final = _core.lib


@pytest.fixture
def daemon(cenoted: Callable[..., Any]) -> Any:
    """A small pool with names in /dev/shm, which the fixture looks for at the end."""
    return cenoted(medium="shm", size=str(POOL_BYTES))


@pytest.fixture
def books(daemon: Any, open_books: Callable[..., Any]) -> Iterator[Any]:
    """Books that must balance when the test is over."""
    made = open_books(daemon)
    yield made
    made.settle()


# ---- refused calls ----------------------------------------------------------------


def wrong_key(cache: Cache) -> None:
    """A key of 31 bytes."""
    cache.put(bytes(31), NBYTES)


def wrong_keys(cache: Cache) -> None:
    """Keys that are no multiple of 32 bytes."""
    cache.put_many(bytes(65), [b"x", b"y"])


def wrong_delete(cache: Cache) -> None:
    """One of several keys is too long."""
    cache.delete([bytes(32), bytes(33)])


def wrong_pin(cache: Cache) -> None:
    """An empty key."""
    cache.pin([b""])


def wrong_parent(cache: Cache) -> None:
    """A parent of the wrong length."""
    cache.put(key_of(1), NBYTES, parent=b"p")


def too_large(cache: Cache) -> None:
    """A chunk larger than the pool."""
    cache.put(key_of(1), POOL_BYTES + 1)


def too_large_for_anybody(cache: Cache) -> None:
    """A chunk larger than any may be."""
    cache.put(key_of(1), 2**40)


def too_much_meta(cache: Cache) -> None:
    """More metadata than is allowed."""
    cache.put(key_of(1), NBYTES, meta=bytes(4097))


def copy_too_long(cache: Cache) -> None:
    """More bytes than were reserved."""
    with cache.put(key_of(1), NBYTES) as put:
        put.copy_from(bytes(NBYTES + 1))


def commit_twice(cache: Cache) -> None:
    """A second commit of one put."""
    put = cache.put(key_of(2), NBYTES)
    put.commit()
    put.commit()


def commit_aborted(cache: Cache) -> None:
    """A commit after the abort."""
    put = cache.put(key_of(1), NBYTES)
    put.abort()
    put.commit()


def commit_closed(cache: Cache) -> None:
    """A commit after the pool was closed."""
    put = cache.put(key_of(1), NBYTES)
    cache.pool.close()
    put.commit()


def use_released(cache: Cache) -> None:
    """The memory of a chunk after two releases."""
    chunk = cache.get(key_of(0))
    assert chunk is not None
    chunk.release()
    chunk.release()
    assert cache.pool.leases == 0
    len(chunk.memory)


REFUSED: Final = [
    (wrong_key, ValueError, "31 bytes"),
    (wrong_keys, ValueError, "65 bytes"),
    (wrong_delete, ValueError, "key 1 has 33 bytes"),
    (wrong_pin, ValueError, "key 0 has 0 bytes"),
    (wrong_parent, ValueError, "parent has 1 bytes"),
    (too_large, ChunkTooLarge, "larger"),
    (too_large_for_anybody, ChunkTooLarge, "larger"),
    (too_much_meta, ValueError, "4097"),
    (copy_too_long, ValueError, "do not fit"),
    (commit_twice, ValueError, "committed"),
    (commit_aborted, ValueError, "aborted"),
    (commit_closed, PoolGone, "committed"),
    (use_released, ValueError, "released"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=[r[0].__name__ for r in REFUSED])
def test_a_refused_call_costs_nothing(
    daemon: Any,
    books: Any,
    call: Callable[[Cache], None],
    error: type[Exception],
    words: str,
) -> None:
    """What is refused raises, stores nothing, and leaves no extent and no lease behind."""
    refuse(daemon, call, error, words)
    assert books.settle()["live_chunks"] == 1 + (call is commit_twice)


def refuse(daemon: Any, call: Callable[[Cache], None], error: type[Exception], words: str) -> None:
    cache = connect(daemon.socket).namespace(MANIFEST)
    cache.put_many(key_of(0), [bytes_of(0)])
    cache.flush(timeout_s=30.0)
    with pytest.raises(error, match=words):
        call(cache)


def test_a_reader_is_refused_at_the_ring(daemon: Any, books: Any) -> None:
    """A reader that asks for an extent behind the library's back gets none."""
    reader_asks(daemon)
    assert books.settle()["grants"] == 0


def reader_asks(daemon: Any) -> None:
    cache = connect(daemon.socket, role="reader").namespace(MANIFEST)
    with pytest.raises(NotWritable):
        cache.put(key_of(1), NBYTES)
    handle: Any = cache._binding.attachment.handle
    session = ffi.cast("char *", lib.cn_client_session(handle.client))
    head = ffi.cast("struct cn_session_head *", session)
    record = MISCHIEF["ring_of"](session, head.lease_slots)[0]
    record.op, record.arg, record.data_bytes = lib.CN_OP_WANT, NBYTES, 1
    head.sub_tail += 1
    assert lib.cn_flush(handle.client, 30_000) == lib.CN_OK


def test_only_admins_audit(daemon: Any, books: Any) -> None:
    """`audit` stops the keeper for a while: it is for administrators."""
    channel, _, fds = daemon.hello("writer")
    with pytest.raises(Refusal, match="only an admin may audit") as refused:
        channel.request("audit")
    assert refused.value.code == "access"
    channel.close()
    for fd in fds.values():
        os.close(fd)
    fds.clear()


# ---- daemons that are not there ----------------------------------------------------------------


def test_the_socket_file_is_gone(daemon: Any, books: Any) -> None:
    """
    Who unlinks the socket of a living daemon takes it from newcomers only; it stops as ever.
    """
    before = own_files()
    cache = connect(daemon.socket).namespace(MANIFEST)
    attached = own_files()
    daemon.socket.unlink()
    with pytest.raises(PoolGone, match="no cenote daemon"):
        connect(daemon.socket)
    assert own_files() == attached
    cache.put_many(key_of(1), [bytes_of(1)])
    cache.flush(timeout_s=30.0)
    chunk = cache.get(key_of(1))
    assert chunk is not None
    assert bytes(chunk.memory) == bytes_of(1)
    assert cache.pool.stats(timeout_s=30.0).chunks == 1
    cache.pool.close()
    del cache, chunk
    books.settle()
    assert own_files() == before


def test_another_daemon_cannot_take_the_pool(
    daemon: Any, books: Any, cenoted: Callable[..., Any]
) -> None:
    """A second daemon on the same pool ends with status 1; the first goes on as before."""
    names = daemon.names()
    second = cenoted(path=daemon.socket, pool=daemon.pool, medium="shm", size=str(POOL_BYTES))
    assert second.wait() == 1
    assert daemon.names() == names != []
    assert daemon.socket.exists()
    books.settle()


def test_a_client_of_another_build(daemon: Any, books: Any) -> None:
    """A client with another fingerprint is refused with `version`, and opened no session."""
    opened = books.counters()["sessions_opened"]
    for change in ({"layout": 99}, {"fingerprint": 1}, {"protocol": [2, 9]}):
        with pytest.raises(Refusal) as refused:
            daemon.hello("writer", **change)
        assert refused.value.code == "version"
    assert books.counters()["sessions_opened"] == opened


# ---- catalogs of other builds ----------------------------------------------------------------


def formatted() -> Any:
    """Return a small catalog, as this build makes it."""
    form = ffi.new("struct cn_format *")
    name = ffi.new("char[]", b"foreign")
    form.pool_name, form.chunk_count, form.lease_slots, form.event_count = name, 64, 512, 64
    form.region_count = 1
    region = form.regions[0]
    region.bytes, region.page_bytes, region.medium = 4 * 2**20, 4096, lib.CN_MEDIUM_MEMFD
    region.node = -1
    catalog = ffi.new("char[]", lib.cn_catalog_bytes(form))
    status = lib.cn_catalog_format(catalog, len(catalog), form)
    assert status == lib.CN_OK
    return catalog


def resealed(catalog: Any) -> None:
    """Make the superblock's own checksum right again: another build would have."""
    header = ffi.cast("struct cn_super *", catalog)
    header.immutable_crc32c = lib.cn_crc32c(0, catalog, 2040)


@pytest.mark.parametrize("field", ["abi_fingerprint", "layout_version"])
def test_a_catalog_of_another_build_is_refused(field: str, daemon: Any, books: Any) -> None:
    """
    A catalog that says another fingerprint or layout is no catalog of ours, however sound it is:
    attaching raises VersionMismatch and leaves no descriptor and no mapping.
    """
    catalog = formatted()
    assert lib.cn_catalog_check(catalog, len(catalog)) == lib.CN_OK
    header = ffi.cast("struct cn_super *", catalog)
    setattr(header, field, getattr(header, field) ^ 1)
    resealed(catalog)
    assert lib.cn_catalog_check(catalog, len(catalog)) == lib.CN_EVERSION

    attach_to(daemon, bytes(ffi.buffer(catalog)), VersionMismatch)


@pytest.mark.parametrize("at", [0, 12, 40, 64, 100, 104, 150, 330, 2040])
def test_a_damaged_catalog_is_refused(at: int, daemon: Any, books: Any) -> None:
    """A flipped bit anywhere in the immutable part is found by its checksum."""
    catalog = formatted()
    ffi.buffer(catalog)[at] = bytes([ffi.buffer(catalog)[at][0] ^ 4])
    assert lib.cn_catalog_check(catalog, len(catalog)) == lib.CN_ECORRUPT

    attach_to(daemon, bytes(ffi.buffer(catalog)), Corrupt)


def attach_to(daemon: Any, catalog: bytes, error: type[Exception]) -> None:
    """Attach with the daemon's descriptors, but for the catalog."""
    channel, welcome, fds = daemon.hello("writer")
    before = (own_files(), mappings())
    own = media.create_session_memfd(max(len(catalog), welcome.catalog_bytes))
    os.pwrite(own, catalog, 0)
    os.close(fds["catalog"])
    fds["catalog"] = own
    count = len(fds)
    with pytest.raises(error):
        attach(welcome, fds)
    assert fds == {}
    assert (own_files(), mappings()) == (before[0] - count, before[1])
    channel.close()


def own_files() -> int:
    """How many descriptors this process has; the one to count them among them."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def mappings() -> int:
    """How many mappings of pools this process has."""
    text = Path("/proc/self/maps").read_text()
    return sum("cenote" in line for line in text.splitlines())


def test_a_listener_that_is_no_daemon(tmp_path: Path) -> None:
    """Somebody else's socket costs the deadline or an error, and no descriptor."""
    before = own_files()
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        other.setblocking(False)
        with pytest.raises(Exception, match="did not answer"):
            connect(path, timeout_s=0.05)
    with pytest.raises(PoolGone, match="nobody listens"):
        connect(path)
    assert own_files() == before
