# SPDX-License-Identifier: Apache-2.0
"""Run directories, sockets and pool names: cenote.shm.paths."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cenote.client.connection import _barred, _unfound, candidate_or_raise
from cenote.client.errors import AccessDenied, PoolGone
from cenote.shm.paths import (
    SOCKET_PATH_MAX_BYTES,
    PathError,
    check_pool_name,
    check_socket_path,
    closed_to_others,
    daemon_run_dir,
    find_socket,
    prepare_run_dir,
    run_dir_problem,
    socket_path,
    user_run_dir,
)

UID = os.geteuid()
SOMEBODY = 4242
TMP = Path("/tmp")


def test_pool_names() -> None:
    """
    A pool name is 1 to 32 of a-z, 0-9 and '-'; everything else is refused by name.
    """
    assert [check_pool_name(name) for name in ("default", "a", "9-" * 16)]
    for bad in ("", "A", "a_b", "a/b", "..", "a" * 33, "é", "a\n", "a\0"):
        with pytest.raises(PathError):
            check_pool_name(bad)


@pytest.mark.parametrize(
    ("explicit", "environ", "uid", "expected"),
    [
        ("/srv/x", {"RUNTIME_DIRECTORY": "/run/y"}, 0, "/srv/x"),
        (None, {"RUNTIME_DIRECTORY": "/run/y:/run/z"}, SOMEBODY, "/run/y"),
        (None, {"XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/run/cenote"),
        (None, {"XDG_RUNTIME_DIR": "/run/user/1"}, SOMEBODY, "/run/user/1/cenote"),
        (None, {"XDG_RUNTIME_DIR": "relative"}, SOMEBODY, "/tmp/cenote-4242"),
        (None, {}, SOMEBODY, "/tmp/cenote-4242"),
    ],
)
def test_run_dir_of_the_daemon(
    explicit: str | None, environ: dict[str, str], uid: int, expected: str
) -> None:
    """
    --run-dir, else the service's directory, else the user's own.
    """
    assert daemon_run_dir(explicit, environ, uid) == Path(expected)


def test_client_ignores_the_run_dir_of_its_own_service() -> None:
    """
    An engine that systemd runs has a $RUNTIME_DIRECTORY that is not cenote's.
    """
    environ = {"RUNTIME_DIRECTORY": "/run/vllm"}

    assert user_run_dir(environ, SOMEBODY) == Path("/tmp/cenote-4242")


def test_new_run_dir_is_private(tmp_path: Path) -> None:
    """
    A new run directory has mode 0700, or 0755 if shared, whatever the umask; twice is no error.
    """
    old = os.umask(0o077)
    try:
        own = prepare_run_dir(tmp_path / "a" / "own", UID)
        shared = prepare_run_dir(tmp_path / "shared", UID, shared=True)
        prepare_run_dir(own, UID)
    finally:
        os.umask(old)

    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755


def test_untrustworthy_run_dir_is_refused(tmp_path: Path) -> None:
    """
    A link, a file, a directory that others may write to or own: PathError with path and remedy.
    """
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name, mode in (("group", 0o770), ("world", 0o707)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)

    for name in ("link", "file", "group", "world"):
        with pytest.raises(PathError, match=rf"{name}'.*--run-dir"):
            prepare_run_dir(tmp_path / name, UID)
    if UID != 0:
        with pytest.raises(PathError, match="belongs to uid"):
            prepare_run_dir(tmp_path / "real", SOMEBODY)
    assert "cannot be examined" in run_dir_problem(tmp_path / "absent", UID)


def test_socket_path_is_as_long_as_the_kernel_allows(tmp_path: Path) -> None:
    """
    The longest path that check_socket_path() takes can be bound; one byte more is refused.
    """
    folder = Path("/tmp") / f"cenote-test-{os.getpid()}"
    folder.mkdir()
    longest = folder / ("x" * (SOCKET_PATH_MAX_BYTES - len(str(folder)) - 1))
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(check_socket_path(longest)))
    finally:
        longest.unlink(missing_ok=True)
        folder.rmdir()

    with pytest.raises(PathError, match=r"108 bytes.*allow 107.*--run-dir"):
        check_socket_path(Path(f"{longest}y"))
    with pytest.raises(PathError):
        socket_path(tmp_path / ("é" * 60))


def _touch(path: Path) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch()
    return path


def test_named_socket_is_the_only_one(tmp_path: Path) -> None:
    """
    The argument, else $CENOTE_SOCKET, is final, and alone reported; without them the user's own
    socket comes before the service's, and all four are.
    """
    paths = [tmp_path / "a.sock", tmp_path / "b.sock"]
    paths += [tmp_path / name / "default.sock" for name in (f"cenote-{SOMEBODY}", "service")]
    environ = {"CENOTE_SOCKET": str(paths[1])}

    def find(argument: Path | None, given: dict[str, str]) -> Path | None:
        found, candidates = find_socket(
            argument, given, SOMEBODY, tmp_dir=tmp_path, service_dir=tmp_path / "service"
        )
        named = argument or (given and paths[1])
        assert [c.path for c in candidates] == ([named] if named else [None, None, *paths[2:]])
        return found

    _touch(paths[3])
    assert find(paths[0], environ) is None
    assert find(None, environ) is None
    assert find(None, {}) == paths[3]
    _touch(paths[1])
    assert find(paths[0], environ) is None
    assert find(None, environ) == paths[1]
    _touch(paths[0])
    assert find(paths[0], environ) == paths[0]


def test_own_socket_is_found_before_the_service(tmp_path: Path) -> None:
    """
    The daemon that this user started is preferred to the host's.
    """
    own = _touch(tmp_path / "xdg" / "cenote" / "default.sock")
    _touch(tmp_path / "service" / "default.sock")
    own.parent.chmod(0o700)
    environ = {"XDG_RUNTIME_DIR": str(tmp_path / "xdg")}
    uid = UID or SOMEBODY  # for root the user's own directory is the service's

    found, _ = find_socket(environ=environ, uid=uid, service_dir=tmp_path / "service")

    assert found == own


def test_socket_planted_in_the_shared_tmp_is_passed_over(tmp_path: Path) -> None:
    """
    /tmp/cenote-<uid> made by somebody else, or open to others, is not trusted, and is reported.
    """
    planted = _touch(tmp_path / f"cenote-{SOMEBODY}" / "default.sock")
    planted.parent.chmod(0o777)

    found, candidates = find_socket(
        None, {}, SOMEBODY, tmp_dir=tmp_path, service_dir=tmp_path / "service"
    )

    assert found is None
    assert "own default" in str(candidates[2])
    assert "belongs to uid" in str(candidates[2]) or "written by others" in str(candidates[2])
    assert str(candidates[0]) == "argument: not set"
    assert "does not exist" in str(candidates[3])


def test_candidates_survive_nonsense(tmp_path: Path) -> None:
    """
    A candidate that is too long, or lies below a file, is reported with its problem.
    """
    (tmp_path / "file").touch()

    found, (long,) = find_socket("/" + "x" * 200, {}, SOMEBODY, tmp_dir=tmp_path)
    assert found is None
    assert "allow 107" in long.problem
    found, (below,) = find_socket(None, {"CENOTE_SOCKET": f"{tmp_path}/file/s"}, SOMEBODY)
    assert found is None
    assert "cannot be examined" in below.problem
    assert below.barred is None


@pytest.fixture
def closed() -> Iterator[Path]:
    """
    A folder that the caller may not enter, in one that it may. Root is somebody else meanwhile.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "closed"
        folder.mkdir()
        folder.parent.chmod(0o755)
        folder.chmod(0)
        if UID == 0:
            os.seteuid(SOMEBODY)
        try:
            yield folder
        finally:
            os.seteuid(UID)
            folder.chmod(0o700)


def test_a_folder_that_is_closed_is_what_the_message_is_about(closed: Path) -> None:
    """
    A socket below a folder that this user may not enter: the first such folder, who we are, and
    the remedy; not that there was no daemon, which nobody can know.
    """
    with pytest.raises(AccessDenied) as caught:
        candidate_or_raise(closed / "deeper" / "default.sock")

    text = str(caught.value)
    assert text.startswith(f"uid {os.geteuid()} may not enter {closed}, ")
    assert f"chmod 0755 {closed}`" in text
    assert "no cenote daemon" not in text


def test_a_closed_folder_is_named_beside_the_other_places(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    $XDG_RUNTIME_DIR of another user (su): not to be opened by a chmod, but to be unset.
    """
    monkeypatch.delenv("CENOTE_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(closed))

    found, candidates = find_socket(service_dir=closed.parent / "service")
    assert found is None
    assert candidates[2].barred == closed
    assert f"may not enter {closed}: Permission denied" in str(candidates[2])
    text = _barred(candidates[2], candidates)
    assert "unset" in text
    assert "chmod" not in text
    assert "service default" in text


def test_a_socket_that_was_named_is_all_that_the_message_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    By the argument or by $CENOTE_SOCKET: where it was named, what is wrong, what to do; no word of
    places that nobody looked at.
    """
    monkeypatch.setenv("CENOTE_SOCKET", str(tmp_path / "env.sock"))
    for argument, origin, name in (
        (tmp_path / "given.sock", "argument", "given.sock"),
        (None, "$CENOTE_SOCKET", "env.sock"),
    ):
        with pytest.raises(PoolGone) as caught:
            candidate_or_raise(argument)
        text = str(caught.value)
        assert f"there is no socket '{tmp_path}/{name}' ({origin}). Correct it" in text
        assert "cenoted --socket" in text
        assert "default.sock" not in text
        assert ("env.sock" in text) == (argument is None)


def test_without_a_name_all_four_places_are_named(tmp_path: Path) -> None:
    """
    Which sources are not set, which sockets do not exist, and what to do.
    """
    found, candidates = find_socket(None, {}, SOMEBODY, tmp_dir=tmp_path, service_dir=tmp_path)

    assert found is None
    text = _unfound(candidates)
    for place in ("argument: not set", "$CENOTE_SOCKET: not set", "own default", "service default"):
        assert place in text
    assert "Start one with `cenoted`" in text


def test_a_folder_closed_to_others_is_told(tmp_path: Path) -> None:
    """
    Without o+x the users that an access list names do not reach the socket; with it nothing is
    said.
    """
    for mode, said in (
        (0o755, ""),
        (0o711, ""),
        (0o750, "its owner and its group"),
        (0o700, "its"),
    ):
        tmp_path.chmod(mode)
        told = closed_to_others(tmp_path)
        assert told == "" if not said else (said in told and f"{mode:04o}" in told)
