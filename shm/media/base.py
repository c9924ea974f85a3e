# SPDX-License-Identifier: Apache-2.0
"""
What every medium is to the rest of cenote: a specification that was parsed, an object that was
created from it, and mappings of that object.

The media themselves are in posix_shm.py, memfd.py and file.py; create() in the package chooses.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from cenote._native._core import ffi, lib
from cenote._native.errors import CenoteError
from cenote.shm.paths import check_pool_name
from cenote.shm.units import UnitError, format_size, parse_size

Kind = Literal["shm", "memfd", "hugepages", "file"]

BASE_PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")
HUGE_2M_BYTES: Final = 2 * 1024**2
HUGE_1G_BYTES: Final = 1024**3
HUGE_PAGE_SIZES: Final = (HUGE_2M_BYTES, HUGE_1G_BYTES)
OBJECT_BYTES_MAX: Final = 2**60
FILE_MODE: Final = 0o600  # the default of a memfd, 0777, lets everybody open it again for writing

MEDIA_ALLOWED: Final = "shm, memfd, hugepages or file:PATH"
PAGE_SIZES_ALLOWED: Final = '"4KiB", "thp" (transparent huge pages), "2MiB" or "1GiB"'

_PART: Final = re.compile(r"[a-z0-9]{1,16}", re.ASCII)
_SHM_NAME: Final = re.compile(
    r"cenote\.([0-9]{1,10})\.([a-z0-9-]{1,32})\.([0-9a-f]{16})\.([a-z0-9]{1,16})", re.ASCII
)


class MediumError(CenoteError):
    """A medium could not be used; the text has what, which, why and what to do now."""


class MediumRefused(MediumError, ValueError):
    """The medium, page size or path that was asked for is none that this build can use."""


class NoRoom(MediumError):
    """There is too little of something; the text says of what, how much, and how to get more."""


@dataclass(frozen=True)
class MediumSpec:
    """
    A medium as it was asked for, checked in itself but not against this host.

    page_bytes is the page that sizes are rounded to; thp asks for transparent huge pages on top of
    base pages; path is set for files only.
    """

    kind: Kind
    page_bytes: int
    thp: bool = False
    path: Path | None = None

    def __str__(self) -> str:
        if self.kind == "file":
            return f"file:{self.path}"
        if self.thp:
            return f"{self.kind} with transparent huge pages"
        if self.page_bytes in HUGE_PAGE_SIZES:
            return f"{self.kind} with {format_size(self.page_bytes)} pages"
        return self.kind

    @property
    def hugetlb(self) -> bool:
        """Whether its memory comes out of the kernel's reserve of huge pages."""
        return self.page_bytes in HUGE_PAGE_SIZES

    def round_up(self, bytes_: int) -> int:
        """Return *bytes_* as whole pages of this medium, at least one."""
        if not 0 <= bytes_ <= OBJECT_BYTES_MAX:
            raise MediumRefused(f"{bytes_} bytes are no size for {self}: use 1 to 2**60")
        return max(1, -(-bytes_ // self.page_bytes)) * self.page_bytes


@dataclass(frozen=True)
class ObjectName:
    """
    Whose object this is: uid, pool, the 16 hex digits of the pool id, and which part of the pool.

    Parts are "catalog", "r0", "r1" … A new pool id makes new names, so that the objects of a dead
    daemon are never formatted again under their living readers (I5).
    """

    pool: str
    pool_id: str
    part: str
    uid: int

    def __post_init__(self) -> None:
        check_pool_name(self.pool)
        if not (re.fullmatch(r"[0-9a-f]{16}", self.pool_id) and _PART.fullmatch(self.part)):
            raise MediumRefused(
                f"pool id {self.pool_id!r} and part {self.part!r} make no object name: "
                "16 hex digits, and 1 to 16 of a-z and 0-9"
            )

    def __str__(self) -> str:
        return f"cenote.{self.uid}.{self.pool}.{self.pool_id}.{self.part}"

    @property
    def shm_name(self) -> str:
        """The name for shm_open(3)."""
        return f"/{self}"

    @staticmethod
    def parse(text: str) -> ObjectName | None:
        """Return the name that *text*, without a leading slash, is; None for a foreign one."""
        found = _SHM_NAME.fullmatch(text)
        if found is None:
            return None
        return ObjectName(found[2], found[3], found[4], int(found[1]))


class MediumObject(ABC):
    """
    One created object: a descriptor that may read and write it, and how to get rid of it.

    fd belongs to the object and is CLOEXEC. bytes is what was asked for in whole pages. location
    is what a person would look for: a name, a path.
    """

    def __init__(
        self, spec: MediumSpec, name: ObjectName, fd: int, bytes_: int, location: str
    ) -> None:
        self.spec = spec
        self.name = name
        self.fd = fd
        self.bytes = bytes_
        self.location = location

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def page_bytes(self) -> int:
        """The page that this object consists of."""
        return self.spec.page_bytes

    @property
    def named(self) -> bool:
        """Whether another process can find it; otherwise it ends with its last descriptor."""
        return True

    def reopen(self, writable: bool) -> int:
        """Return a new open file description of this object; see reopen_fd()."""
        return reopen_fd(self.fd, writable)

    def map(self, writable: bool) -> int:
        """Map the whole object and return the address; see map_fd()."""
        return map_fd(self.fd, self.bytes, writable, thp=self.spec.thp)

    @abstractmethod
    def unlink(self) -> None:
        """Remove the name, if there is one that is still ours. Mappings live on. Idempotent."""

    def close(self) -> None:
        """Close the descriptor; name and mappings stay. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


def parse_medium(text: str, page_size: int | str | None = None) -> MediumSpec:
    """
    Return the medium that *text* ("shm", "memfd", "hugepages", "file:PATH") and *page_size* name.

    page_size is "thp", a size as text or in bytes, or None for the medium's own.

    Raises:
        MediumRefused: Unknown, not built yet, or a page size that the medium does not have.
    """
    kind, colon, path = text.partition(":")
    if kind == "devdax":
        raise MediumRefused(
            f"medium {text!r}: this version of cenote cannot use DAX devices yet. "
            "Use hugepages or memfd, or file:PATH on a file system that is mounted with -o dax"
        )
    if kind == "file":
        return _parse_file(text, path, page_size)
    if colon or kind not in ("shm", "memfd", "hugepages"):
        raise MediumRefused(f"{text!r} is no medium: use {MEDIA_ALLOWED}")
    thp, page_bytes = _parse_page_size(text, page_size)
    if kind == "shm":
        if page_bytes not in (None, BASE_PAGE_BYTES):
            raise _no_such_page(text, page_size, '"4KiB" or "thp"; memfd and hugepages have larger')
        return MediumSpec("shm", BASE_PAGE_BYTES, thp)
    if kind == "memfd":
        return MediumSpec("memfd", page_bytes or BASE_PAGE_BYTES, thp)
    if thp or page_bytes == BASE_PAGE_BYTES:
        raise _no_such_page(text, page_size, '"2MiB" or "1GiB"; memfd has the others')
    return MediumSpec("hugepages", page_bytes or HUGE_2M_BYTES)


def _parse_file(text: str, path: str, page_size: int | str | None) -> MediumSpec:
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise MediumRefused(
            f"medium {text!r}: write file: and the absolute path of a file that cenote may make"
        )
    thp, page_bytes = _parse_page_size(text, page_size)
    if thp or page_bytes not in (None, BASE_PAGE_BYTES):
        raise _no_such_page(text, page_size, "none: a file has the pages of its file system")
    return MediumSpec("file", BASE_PAGE_BYTES, path=Path(path))


def _parse_page_size(medium: str, page_size: int | str | None) -> tuple[bool, int | None]:
    if page_size is None or page_size == "thp":
        return page_size == "thp", None
    try:
        bytes_ = parse_size(page_size)
    except UnitError as error:
        raise MediumRefused(f"page_size: {error}. Page sizes are {PAGE_SIZES_ALLOWED}") from error
    if bytes_ in (BASE_PAGE_BYTES, *HUGE_PAGE_SIZES):
        return False, bytes_
    raise _no_such_page(medium, page_size, PAGE_SIZES_ALLOWED)


def _no_such_page(medium: str, page_size: int | str | None, allowed: str) -> MediumRefused:
    return MediumRefused(f"medium {medium!r} has no page_size {page_size!r}: use {allowed}")


def reopen_fd(fd: int, writable: bool) -> int:
    """
    Return a new, CLOEXEC descriptor on the object behind *fd* with rights of its own.

    A dup shares its rights and its file locks with the original; this one shares neither, so that
    a reader's cannot be mapped writable.
    """
    access = os.O_RDWR if writable else os.O_RDONLY
    try:
        return os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MediumError(
            "cannot open /proc/self/fd: cenote needs /proc to pass memory to its clients. Mount it"
        ) from error


def map_fd(fd: int, bytes_: int, writable: bool, *, thp: bool = False) -> int:
    """
    Map the first *bytes_* of the object behind *fd* and return the address.

    Shared, MADV_DONTFORK (I13), aligned to 2 MiB when it is at least that long. *fd* may be closed.

    Raises:
        MediumError: *bytes_* are no whole pages, the object is shorter, or it is none.
        OSError: The kernel refused; PermissionError when *fd* may not be mapped writable.
    """
    flags = (lib.CN_MAP_WRITABLE if writable else 0) | (lib.CN_MAP_HUGE if thp else 0)
    address, syserr = ffi.new("void **"), ffi.new("struct cn_syserr *")
    status = lib.cn_region_map(fd, bytes_, flags, address, syserr)
    if status == lib.CN_ECORRUPT:
        raise MediumError(
            f"the object behind descriptor {fd} is shorter than the {bytes_} bytes it should have: "
            "somebody truncated it. Restart the daemon of this pool"
        )
    if status == lib.CN_EINVAL:
        raise MediumError(f"descriptor {fd} cannot be mapped for {bytes_} bytes: no whole pages")
    if status != lib.CN_OK:
        raise sys_error(syserr, f"cannot map {bytes_} bytes of descriptor {fd}")
    return int(ffi.cast("uintptr_t", address[0]))


def unmap(address: int, bytes_: int) -> None:
    """Undo map_fd(). The caller knows that nobody uses the bytes any more."""
    syserr = ffi.new("struct cn_syserr *")
    if lib.cn_region_unmap(ffi.cast("void *", address), bytes_, syserr) != lib.CN_OK:
        raise sys_error(syserr, f"cannot unmap {bytes_} bytes at {address:#x}")


def sys_error(syserr: Any, what: str) -> OSError:
    """Return the OSError, of its errno's class, for a CN_ESYS with *syserr* beside it."""
    call = ffi.string(lib.cn_where_text(syserr.where))
    call = call.decode("ascii") if isinstance(call, bytes) else call
    return OSError(syserr.err, f"{what}: {call}: {os.strerror(syserr.err)}")
