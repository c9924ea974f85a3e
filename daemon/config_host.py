# SPDX-License-Identifier: Apache-2.0
"""
What the configuration asks of the machine, behind one object that tests replace: who runs the
daemon, which users and groups exist, how much memory it may use.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
OWN_CGROUP: Final = Path("/proc/self/cgroup")
SALT_MIN_BYTES: Final = 16
SALT_MAX_BYTES: Final = 1024


class SaltError(ValueError):
    """A salt file that cannot be used; the text has the remedy."""


def _uid_of(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _gid_of(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def memory_limit_bytes(
    total_bytes: int | None = None,
    cgroup_root: Path = CGROUP_ROOT,
    own_cgroup: Path = OWN_CGROUP,
) -> int:
    """
    Return how much memory this process may use: the smallest limit of its control groups (version
    2 and 1) and of their parents, or the machine's memory when there is none.
    """
    total = psutil.virtual_memory().total if total_bytes is None else total_bytes
    return min([total, *_cgroup_limits(cgroup_root, own_cgroup)])


def _cgroup_limits(cgroup_root: Path, own_cgroup: Path) -> Iterator[int]:
    try:
        lines = own_cgroup.read_text().splitlines()
    except OSError:
        return  # no /proc, or no control groups: no limit
    for line in lines:
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            yield from _limits_upwards(cgroup_root, path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_upwards(cgroup_root / "memory", path, "memory.limit_in_bytes")


def _limits_upwards(mount: Path, path: str, name: str) -> Iterator[int]:
    """
    Yield each limit between *path* and *mount*. In a container the path is often the host's and
    does not exist below the mount; then the mount itself is our group.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        try:
            text = mount.joinpath(*parts[:depth], name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" is no limit
            yield int(text)


@dataclass(frozen=True)
class Host:
    """The machine as the configuration sees it. memory_bytes is called only when it is needed."""

    uid: int = field(default_factory=os.geteuid)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    uid_of: Callable[[str], int | None] = _uid_of
    gid_of: Callable[[str], int | None] = _gid_of
    memory_bytes: Callable[[], int] = memory_limit_bytes
    etc_file: Path = Path("/etc/cenote/cenoted.toml")


def read_salt(path: str, uid: int) -> bytes:
    """
    Return the salt in the file at *path*: 16 to 1,024 bytes, all of them, line ends included.

    Raises:
        SaltError: It cannot be read, has a wrong length, belongs to neither *uid* nor root, or
            others than the owner may read or write it.
    """
    try:
        with open(path, "rb", opener=_open_no_wait) as file:
            found = os.fstat(file.fileno())
            problem = _salt_problem(found, uid)
            salt = b"" if problem else file.read(SALT_MAX_BYTES + 1)
    except OSError as error:
        raise SaltError(
            f"salt file {path!r} cannot be read ({error.strerror}): create it with "
            f"`head -c 32 /dev/urandom` and mode 0600, equal on all nodes"
        ) from error
    if problem:
        raise SaltError(f"salt file {path!r} {problem}")
    if SALT_MIN_BYTES <= len(salt) <= SALT_MAX_BYTES:
        return salt
    raise SaltError(
        f"salt file {path!r} has {found.st_size} bytes: write {SALT_MIN_BYTES} to "
        f"{SALT_MAX_BYTES} random bytes"
    )


def _open_no_wait(path: str, flags: int) -> int:
    """Open without waiting: a named pipe in the place of the file must not stop the daemon."""
    return os.open(path, flags | os.O_NONBLOCK)


def _salt_problem(found: os.stat_result, uid: int) -> str:
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file: name a file of 16 to 1,024 random bytes"
    if found.st_uid not in (uid, 0):
        return f"belongs to uid {found.st_uid}: give it to uid {uid} or root (chown)"
    if found.st_mode & 0o037:
        return f"has mode {stat.S_IMODE(found.st_mode):04o}: others may see it: chmod 0600"
    return ""
