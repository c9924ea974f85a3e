# SPDX-License-Identifier: Apache-2.0
"""What dead daemons leave is unlinked, never truncated; what is not theirs is left alone."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from cenote.shm.media import (
    MediumError,
    MediumSpec,
    ObjectName,
    create,
    list_stale,
    map_fd,
    parse_medium,
    unlink_stale,
    unlink_stale_file,
    unmap,
)
from cenote.shm.media.posix_shm import SHM_DIR

OBJECT_BYTES = 4 * 1024**2
POOL = f"test-leftover-{os.getpid()}"
UID = os.geteuid()


def name_of(part: str = "r0") -> ObjectName:
    return ObjectName(POOL, "0123456789abcdef", part, UID)


def names() -> set[str]:
    return {path.name for path in SHM_DIR.glob(f"*{POOL}*")}


def peek(address: int, bytes_: int = 8) -> bytes:
    return ctypes.string_at(address, bytes_)


def create_and_die(spec: MediumSpec, name: ObjectName) -> None:
    create(spec, name, OBJECT_BYTES)
    os.kill(os.getpid(), signal.SIGKILL)


def left_by_a_dead_daemon(spec: MediumSpec, name: ObjectName) -> None:
    process = multiprocessing.get_context("fork").Process(target=create_and_die, args=(spec, name))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_names_of_a_dead_daemon_are_unlinked_and_readers_keep_theirs() -> None:
    """Its objects go by name, whole, while a living reader still maps one."""
    spec = parse_medium("shm")
    for part in ("catalog", "r0"):
        left_by_a_dead_daemon(spec, name_of(part))
    fd = os.open(SHM_DIR / str(name_of()), os.O_RDONLY)
    address = map_fd(fd, OBJECT_BYTES, writable=False)
    os.close(fd)

    assert [stale.name.part for stale in list_stale(POOL, UID)] == ["catalog", "r0"]
    removed = unlink_stale(POOL, UID)

    assert [stale.bytes for stale in removed] == [OBJECT_BYTES] * 2
    assert set() == names()
    assert unlink_stale(POOL, UID) == []
    assert bytes(8) == peek(address + OBJECT_BYTES - 8)
    unmap(address, OBJECT_BYTES)


def test_names_of_the_living_and_of_others_are_left_alone() -> None:
    """A living daemon of the same pool name, another pool, another uid: none is stale."""
    spec = parse_medium("shm")
    foreign = SHM_DIR / str(ObjectName(POOL, "0" * 16, "r0", UID + 1))
    foreign.touch()
    left_by_a_dead_daemon(spec, ObjectName(f"{POOL}-b", "0" * 16, "r0", UID))
    with create(spec, name_of(), OBJECT_BYTES) as living:
        assert unlink_stale(POOL, UID) == []
        assert unlink_stale(POOL, UID + 1) == []  # the name says so, the owner does not
        assert len(names()) == 3
        living.unlink()
    foreign.unlink()
    assert len(unlink_stale(f"{POOL}-b", UID)) == 1
    assert set() == names()


def test_the_file_of_a_dead_daemon_is_unlinked_never_truncated(tmp_path: Path) -> None:
    """A new daemon of the pool gets a new file; a reader of the old one keeps its bytes."""
    spec = parse_medium(f"file:{tmp_path}/region")
    left_by_a_dead_daemon(spec, name_of())
    fd = os.open(tmp_path / "region", os.O_RDONLY)
    address = map_fd(fd, OBJECT_BYTES, writable=False)
    os.close(fd)

    owner = unlink_stale_file(spec, POOL, UID)

    assert owner is not None
    assert name_of() == owner.name
    assert bytes(8) == peek(address + OBJECT_BYTES - 8)
    assert list(tmp_path.iterdir()) == []
    assert unlink_stale_file(spec, POOL, UID) is None
    unmap(address, OBJECT_BYTES)


@pytest.mark.parametrize("content", [b"", b"precious", b"x" * 8192, b"cenoteF1" * 1024])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    """What no daemon made is neither unlinked nor truncated nor used."""
    path = tmp_path / "region"
    path.write_bytes(content)
    spec = parse_medium(f"file:{path}")

    with pytest.raises(MediumError, match="no file that a cenote daemon"):
        unlink_stale_file(spec, POOL, UID)
    with pytest.raises(MediumError, match="exists already"):
        create(spec, name_of(), OBJECT_BYTES)

    assert content == path.read_bytes()


def test_folders_and_links_are_refused(tmp_path: Path) -> None:
    """A folder, or a link to somebody's file, is no file of ours."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")

    for entry in ("folder", "link"):
        spec = parse_medium(f"file:{tmp_path}/{entry}")
        with pytest.raises(MediumError, match="no file that a cenote daemon"):
            unlink_stale_file(spec, POOL, UID)
        with pytest.raises(MediumError, match="exists already"):
            create(spec, name_of(), OBJECT_BYTES)

    assert (tmp_path / "precious").read_bytes() == b"precious"
    with pytest.raises(MediumError, match="folder must exist"):
        create(parse_medium(f"file:{tmp_path}/absent/region"), name_of(), OBJECT_BYTES)


def test_the_file_of_another_pool_or_a_living_daemon_is_refused(tmp_path: Path) -> None:
    """Whose file it is, and that it is in use, is in the message."""
    spec = parse_medium(f"file:{tmp_path}/region")
    with create(spec, name_of(), OBJECT_BYTES) as made:
        with pytest.raises(MediumError, match="in use by a living daemon"):
            unlink_stale_file(spec, POOL, UID)
        with pytest.raises(MediumError, match=f"belongs to pool '{POOL}'"):
            unlink_stale_file(spec, "other", UID)
        assert made.spec.path == tmp_path / "region"
        made.unlink()


def test_a_file_that_took_the_place_of_ours_is_not_unlinked(tmp_path: Path) -> None:
    """Somebody moved ours away and put theirs there: unlink() leaves theirs."""
    path = tmp_path / "region"
    with create(parse_medium(f"file:{path}"), name_of(), OBJECT_BYTES) as made:
        path.rename(tmp_path / "moved")
        path.write_bytes(b"theirs")

        made.unlink()

    assert path.read_bytes() == b"theirs"


def test_files_are_made_where_files_without_a_name_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On overlay and network file systems: under a scratch name first, which does not stay."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # EISDIR, as those file systems say it
    spec = parse_medium(f"file:{tmp_path}/region")

    with create(spec, name_of(), OBJECT_BYTES) as made:
        assert [tmp_path / "region"] == list(tmp_path.iterdir())
        with pytest.raises(MediumError, match="exists already"):
            create(spec, name_of(), OBJECT_BYTES)
        assert [tmp_path / "region"] == list(tmp_path.iterdir())
        made.unlink()
    assert list(tmp_path.iterdir()) == []


def test_scratch_names_of_a_killed_daemon_are_removed_and_others_stay(tmp_path: Path) -> None:
    """Killed between making a file and naming it: the next daemon of the pool cleans up."""
    others = {".region.tmp", ".region.x.tmp", f".other.{name_of()}.tmp"}
    for text in (*others, f".region.{name_of()}.tmp"):
        (tmp_path / text).touch()

    assert unlink_stale_file(parse_medium(f"file:{tmp_path}/region"), POOL, UID) is None

    assert others == {path.name for path in tmp_path.iterdir()}
