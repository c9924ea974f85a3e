# SPDX-License-Identifier: Apache-2.0
"""
Where daemon and clients meet: the run directory, the sockets in it, and the names of pools.

The daemon decides with daemon_run_dir(), a client searches with find_socket(). Both look at the
same places, so that a client finds the daemon that its own user started without being told.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SERVICE_RUN_DIR: Final = Path("/run/cenote")
# Not $TMPDIR: daemon and client often differ in it (batch jobs), and would miss each other.
SHARED_TMP_DIR: Final = Path("/tmp")
DEFAULT_POOL: Final = "default"
SOCKET_ENV: Final = "CENOTE_SOCKET"
ARGUMENT: Final = "argument"
OWN_DEFAULT: Final = "own default"
SOCKET_SUFFIX: Final = ".sock"
SOCKET_PATH_MAX_BYTES: Final = 107  # sockaddr_un.sun_path is 108 with its final zero
POOL_NAME_MAX_CHARS: Final = 32

_POOL_NAME: Final = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


class PathError(ValueError):
    """A run directory, socket path or pool name that cannot be used; the text has the remedy."""


@dataclass(frozen=True)
class Candidate:
    """
    One place where connect() looks for a socket.

    origin says where the path comes from; path is None when that source is not set; problem is the
    reason why an existing path was passed over, or ""; barred is the folder above it that this
    user may not enter, so that nobody can say whether the socket exists.
    """

    origin: str
    path: Path | None
    exists: bool = False
    problem: str = ""
    barred: Path | None = None

    def __str__(self) -> str:
        if self.path is None:
            return f"{self.origin}: not set"
        state = self.problem or ("exists" if self.exists else "does not exist")
        return f"{self.origin}: {self.path} ({state})"


def check_pool_name(name: str) -> str:
    """Return *name*, or raise PathError when it is no pool name ([a-z0-9-]{1,32})."""
    if _POOL_NAME.fullmatch(name):
        return name
    raise PathError(
        f"{name[:64]!r} is no pool name: use 1 to {POOL_NAME_MAX_CHARS} of a-z, 0-9 and '-'"
    )


def check_socket_path(path: Path) -> Path:
    """Return *path*, or raise PathError when the kernel could not bind or connect to it."""
    length_bytes = len(os.fsencode(path))
    if length_bytes > SOCKET_PATH_MAX_BYTES:
        raise PathError(
            f"the socket path {str(path)!r} has {length_bytes} bytes, and Unix sockets allow "
            f"{SOCKET_PATH_MAX_BYTES}: choose a shorter run directory (--run-dir) or socket path"
        )
    if b"\0" in os.fsencode(path):
        raise PathError(f"the socket path {str(path)!r} contains a zero byte: choose another path")
    return path


def socket_path(run_dir: Path, pool: str = DEFAULT_POOL) -> Path:
    """Return the checked path of the socket of *pool*: <run_dir>/<pool>.sock."""
    return check_socket_path(run_dir / f"{check_pool_name(pool)}{SOCKET_SUFFIX}")


def user_run_dir(environ: Mapping[str, str], uid: int, tmp_dir: Path = SHARED_TMP_DIR) -> Path:
    """Return where a daemon that *uid* starts by hand has its sockets. Touches no file."""
    if uid == 0:
        return SERVICE_RUN_DIR
    runtime_dir = environ.get("XDG_RUNTIME_DIR", "")
    if runtime_dir.startswith("/"):  # the XDG specification: a relative path is to be ignored
        return Path(runtime_dir) / "cenote"
    return tmp_dir / f"cenote-{uid}"


def daemon_run_dir(
    explicit: str | os.PathLike[str] | None,
    environ: Mapping[str, str],
    uid: int,
    tmp_dir: Path = SHARED_TMP_DIR,
) -> Path:
    """
    Return the daemon's run directory: *explicit* (--run-dir), else that of the service, else the
    user's own. Touches no file; see prepare_run_dir().
    """
    if explicit:
        return Path(os.path.abspath(explicit))
    service = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]  # set by systemd, perhaps several
    if service.startswith("/"):
        return Path(service)
    return user_run_dir(environ, uid, tmp_dir)


def prepare_run_dir(path: Path, uid: int, *, shared: bool = False) -> Path:
    """
    Create the run directory *path* if it is missing, check it, and return it.

    A new directory gets mode 0700, or 0755 when *shared*, so that other users reach the sockets
    (who may attach is decided by their credentials, not by the directory). Missing parents are
    made 0755. An existing directory keeps its mode.

    Raises:
        PathError: It is a symbolic link or no directory, belongs to somebody else, or others may
            write to it.
        OSError: It cannot be created.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    mode = 0o755 if shared else 0o700
    try:
        path.mkdir(mode=mode)
        path.chmod(mode)  # the umask has narrowed it
    except FileExistsError:
        pass  # checked like any other
    problem = run_dir_problem(path, uid)
    if problem:
        raise PathError(
            f"the run directory {str(path)!r} {problem}: whoever controls it could stand in for "
            "the daemon. Remove it, or name another directory with --run-dir"
        )
    return path


def closed_to_others(folder: Path) -> str:
    """
    Return why users other than its owner do not reach the sockets in *folder*, or "".

    Such a folder is not refused: 0750 with a group of the engines' users is a fair choice.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & stat.S_IXOTH:
        return ""
    who = "its owner and its group" if mode & stat.S_IXGRP else "its owner"
    return f"only {who} may enter it (mode {mode:04o})"


def run_dir_problem(path: Path, uid: int) -> str:
    """Return why sockets in *path* must not be trusted by *uid*, or "" when they may."""
    try:
        found = os.lstat(path)
    except OSError as error:
        return f"cannot be examined ({error.strerror})"
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a directory"
    if found.st_uid not in (uid, 0):
        return f"belongs to uid {found.st_uid}, not to uid {uid}"
    if found.st_mode & _OTHERS_WRITE:
        return f"may be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def socket_candidates(
    argument: str | os.PathLike[str] | None,
    environ: Mapping[str, str],
    uid: int,
    *,
    tmp_dir: Path = SHARED_TMP_DIR,
    service_dir: Path = SERVICE_RUN_DIR,
) -> tuple[Candidate, ...]:
    """
    Return the places where connect() looks, in its order, as they are now.

    One that was named, by the argument or else by $CENOTE_SOCKET, is the only one: a mistyped path
    must not lead to another pool. Otherwise all four, of which the first two are not set.

    A socket in a run directory that somebody else controls is reported with a problem: anybody may
    create /tmp/cenote-<uid> first.
    """
    named = environ.get(SOCKET_ENV)
    if argument:
        return (_candidate(ARGUMENT, Path(argument)),)
    if named:
        return (_candidate(f"${SOCKET_ENV}", Path(named)),)
    own_dir = user_run_dir(environ, uid, tmp_dir)
    return (
        _candidate(ARGUMENT, None),
        _candidate(f"${SOCKET_ENV}", None),
        _candidate(OWN_DEFAULT, own_dir / f"{DEFAULT_POOL}{SOCKET_SUFFIX}", own_dir, uid),
        _candidate("service default", service_dir / f"{DEFAULT_POOL}{SOCKET_SUFFIX}"),
    )


def _candidate(
    origin: str, path: Path | None, private_dir: Path | None = None, uid: int = 0
) -> Candidate:
    if path is None:
        return Candidate(origin, None)
    try:
        check_socket_path(path)
    except PathError as error:
        return Candidate(origin, path, problem=str(error))
    try:
        path.stat()
    except FileNotFoundError:
        return Candidate(origin, path)
    except OSError as error:
        barred = _barred(path) if isinstance(error, PermissionError) else None
        if barred is not None and barred == private_dir and run_dir_problem(barred, uid):
            barred = None  # somebody else's, and not to be opened: planted, or taken by accident
        why = f"uid {os.geteuid()} may not enter {barred}" if barred else "cannot be examined"
        return Candidate(origin, path, problem=f"{why}: {error.strerror}", barred=barred)
    problem = run_dir_problem(private_dir, uid) if private_dir else ""
    return Candidate(origin, path, True, f"its directory {problem}" if problem else "")


def _barred(path: Path) -> Path | None:
    """Return the first folder above *path* that this user may not enter; None: none is known."""
    for folder in reversed(Path(os.path.abspath(path)).parents):
        if not os.access(folder, os.X_OK, effective_ids=True):
            return folder
    return None


def find_socket(
    argument: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    uid: int | None = None,
    *,
    tmp_dir: Path = SHARED_TMP_DIR,
    service_dir: Path = SERVICE_RUN_DIR,
) -> tuple[Path | None, tuple[Candidate, ...]]:
    """Return the first of socket_candidates() that can be used (or None), and all of them."""
    candidates = socket_candidates(
        argument,
        os.environ if environ is None else environ,
        os.geteuid() if uid is None else uid,
        tmp_dir=tmp_dir,
        service_dir=service_dir,
    )
    usable = (c.path for c in candidates if c.exists and not c.problem)
    return next(usable, None), candidates
