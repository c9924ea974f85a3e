# SPDX-License-Identifier: Apache-2.0
"""
Is there room? Asked before anything is created or mapped.

A shortage that shows later is a SIGBUS or the out-of-memory killer; here it is a sentence that says
what is short, how much there is, how much was wanted, and what to do now. Everything is read
through a Host, so that each shortage can be tested without having it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from cenote.numa.topology import parse_meminfo
from cenote.shm.units import format_size, format_size_rounded

from .base import HUGE_2M_BYTES, MediumSpec, NoRoom

CGROUP_DEPTH_MAX: Final = 64
UNLIMITED_BYTES: Final = 2**62  # cgroup v1 says "no limit" with a number near 2**63

Want = tuple[MediumSpec, int]


class StatVfs(Protocol):
    """The fields of os.statvfs_result that are read here."""

    @property
    def f_frsize(self) -> int:
        """Bytes of one block."""

    @property
    def f_blocks(self) -> int:
        """Blocks of the file system; 0 when it has no limit."""

    @property
    def f_bavail(self) -> int:
        """Blocks that this user may still take."""


@dataclass(frozen=True)
class Host:
    """Where the facts about this host come from."""

    proc: Path = Path("/proc")
    sysfs_mm: Path = Path("/sys/kernel/mm")
    cgroup: Path = Path("/sys/fs/cgroup")
    shm_dir: Path = Path("/dev/shm")
    statvfs: Callable[[Path], StatVfs] = field(default=os.statvfs)
    rlimit: Callable[[int], tuple[int, int]] = field(default=resource.getrlimit)


@dataclass(frozen=True)
class Shortage:
    """There are *have_bytes* of *what*, *want_bytes* are wanted; *remedy* is a sentence."""

    what: str
    have_bytes: int
    want_bytes: int
    remedy: str

    def __str__(self) -> str:
        have, want = format_size_rounded(self.have_bytes), format_size_rounded(self.want_bytes)
        if have == want:  # they differ by less than the rounding shows
            have, want = f"{self.have_bytes} bytes", f"{self.want_bytes} bytes"
        return f"{self.what} has room for {have}, and {want} are wanted. {self.remedy}"


def check_room(spec: MediumSpec, bytes_: int, host: Host | None = None) -> None:
    """Raise NoRoom when *bytes_* do not fit *spec* on this host now; see check_rooms()."""
    check_rooms([(spec, bytes_)], host)


def check_rooms(wants: Sequence[Want], host: Host | None = None) -> None:
    """
    Raise NoRoom when all *wants* (catalog and regions of all pools) together do not fit.

    Call it after the leftovers of a dead daemon were unlinked and before anything is created. It
    promises nothing: others take memory too, and populating finds that out for good.
    """
    found = shortages(wants, host)
    if found:
        raise NoRoom("\n".join(str(shortage) for shortage in found))


def shortages(wants: Sequence[Want], host: Host | None = None) -> list[Shortage]:
    """Return everything that is too small for *wants*, the tightest remedy of each."""
    host = host or Host()
    rounded = [(spec, spec.round_up(bytes_)) for spec, bytes_ in wants]
    checks = (_shm, _huge_pages, _file_systems, _memory, _cgroups, _process)
    return [shortage for check in checks for shortage in check(rounded, host)]


def notes(spec: MediumSpec, host: Host | None = None) -> list[str]:
    """Return what the operator should know about *spec* here although it works: one line each."""
    if not spec.thp:
        return []
    folder = (host or Host()).sysfs_mm / "transparent_hugepage"
    per_size = _chosen(folder / f"hugepages-{HUGE_2M_BYTES // 1024}kB" / "shmem_enabled")
    setting = _chosen(folder / "shmem_enabled") if per_size in ("", "inherit") else per_size
    if setting not in ("never", "deny", ""):
        return []
    text = (
        f"{spec}: {folder}/shmem_enabled is {setting or 'missing'!r}, so the pages will be small. "
        "As root, `echo advise` into it, or use medium hugepages"
    )
    return [text]


# ---- media ----------------------------------------------------------------------------------


def _sum(wants: Sequence[Want], *kinds: str) -> int:
    return sum(bytes_ for spec, bytes_ in wants if spec.kind in kinds and not spec.hugetlb)


def _shm(wants: Sequence[Want], host: Host) -> list[Shortage]:
    want_bytes = _sum(wants, "shm")
    have_bytes = _free_of(host, host.shm_dir) if want_bytes else None
    if have_bytes is None or want_bytes <= have_bytes:
        return []
    mounted_mib = -(-(_used_of(host, host.shm_dir) + want_bytes) // 2**20)
    return [
        Shortage(
            str(host.shm_dir),
            have_bytes,
            want_bytes,
            "Ask for less (--size), use medium memfd, or enlarge it "
            f"(`mount -o remount,size={mounted_mib}M {host.shm_dir}`; containers: "
            f"`docker run --shm-size={mounted_mib}m`).",
        )
    ]


def _huge_pages(wants: Sequence[Want], host: Host) -> list[Shortage]:
    found = []
    for page_bytes in sorted({spec.page_bytes for spec, _ in wants if spec.hugetlb}):
        want_bytes = sum(b for spec, b in wants if spec.hugetlb and spec.page_bytes == page_bytes)
        found += _huge_pages_of(page_bytes, want_bytes, host)
        found += _hugetlb_cgroup(page_bytes, want_bytes, host)
    return found


def _huge_pages_of(page_bytes: int, want_bytes: int, host: Host) -> list[Shortage]:
    folder = host.sysfs_mm / "hugepages" / f"hugepages-{page_bytes // 1024}kB"
    if not folder.is_dir():
        remedy = f"This kernel has no such pages ({folder} is missing): choose another page_size."
        return [Shortage(f"the reserve of {format_size(page_bytes)} pages", 0, want_bytes, remedy)]
    total, free, reserved, overcommit, surplus = (
        _number(folder / name) or 0
        for name in (
            "nr_hugepages",
            "free_hugepages",
            "resv_hugepages",
            "nr_overcommit_hugepages",
            "surplus_hugepages",
        )
    )
    have = max(0, free - reserved) + max(0, overcommit - surplus)
    want = want_bytes // page_bytes
    if want <= have:
        return []
    enough = max(0, total - surplus) + want - max(0, free - reserved)
    how = f"As root, `echo {enough} > {folder}/nr_hugepages`"
    if page_bytes == HUGE_2M_BYTES:
        how += f" (the same as `sysctl vm.nr_hugepages={enough}`)"
    else:
        how += f", best at boot: `hugepagesz={page_bytes >> 30}G hugepages={enough}`"
    return [
        Shortage(
            f"the reserve of {format_size(page_bytes)} pages ({have} free, {want} needed)",
            have * page_bytes,
            want_bytes,
            f"{how}. Or use medium memfd, or ask for less.",
        )
    ]


def _file_systems(wants: Sequence[Want], host: Host) -> list[Shortage]:
    found = []
    for folder in sorted({spec.path.parent for spec, _ in wants if spec.path is not None}):
        want_bytes = sum(b for spec, b in wants if spec.path and spec.path.parent == folder)
        have_bytes = _free_of(host, folder)
        if have_bytes is not None and want_bytes > have_bytes:
            what = f"the file system of {folder}"
            remedy = "Free some, name a path elsewhere, or ask for a smaller size."
            found.append(Shortage(what, have_bytes, want_bytes, remedy))
    return found


def _free_of(host: Host, folder: Path) -> int | None:
    """Return the free bytes of the file system of *folder*; None where there is no limit."""
    try:
        found = host.statvfs(folder)
    except OSError:
        return None  # whoever creates the object says why, with the path
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _used_of(host: Host, folder: Path) -> int:
    found = host.statvfs(folder)
    return (found.f_blocks - found.f_bavail) * found.f_frsize


# ---- memory ---------------------------------------------------------------------------------


def _memory_bytes(wants: Sequence[Want], host: Host) -> int:
    """Return what of *wants* takes ordinary memory: huge pages are set aside, files may be disk."""
    files = sum(b for spec, b in wants if spec.path is not None and _is_tmpfs(spec.path, host))
    return _sum(wants, "shm", "memfd") + files


def _is_tmpfs(path: Path, host: Host) -> bool:
    """Whether the file system of *path* keeps its files in memory."""
    best, best_type = -1, ""
    for line in _text(host.proc / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 6 or not after:
            continue
        point = Path(fields[4].encode("ascii", "replace").decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, best_type = len(point.parts), after.split(" ")[0]
    return best_type in ("tmpfs", "ramfs", "devtmpfs")


def _memory(wants: Sequence[Want], host: Host) -> list[Shortage]:
    want_bytes = _memory_bytes(wants, host)
    sizes = parse_meminfo(_text(host.proc / "meminfo"))
    if "MemAvailable" not in sizes:
        return []
    have_bytes = sizes["MemAvailable"] + sizes.get("SwapFree", 0)
    if want_bytes <= have_bytes:
        return []
    remedy = "Ask for a smaller size, or end what uses the memory."
    return [Shortage("the memory of this host", have_bytes, want_bytes, remedy)]


def _cgroups(wants: Sequence[Want], host: Host) -> list[Shortage]:
    want_bytes = _memory_bytes(wants, host)
    if not want_bytes:
        return []
    rooms = [*_rooms_v2(host), *_rooms_v1(host)]
    short = [(have_bytes, what) for have_bytes, what in rooms if have_bytes < want_bytes]
    if not short:
        return []
    have_bytes, what = min(short)
    remedy = (
        "Raise the limit (systemd: MemoryMax=; Docker: --memory; Kubernetes: resources.limits."
        "memory of this container), or ask for a smaller size."
    )
    return [Shortage(f"the memory limit in {what}", max(0, have_bytes), want_bytes, remedy)]


def _own_cgroup(controller: str, host: Host) -> str:
    """Return this process' path in the hierarchy of *controller* (v2: ""), "/" when unknown."""
    for line in _text(host.proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return path
    return "/"


def _ancestors(root: Path, path: str) -> list[Path]:
    """Return the folder of the cgroup *path* below *root* and those above it, *root* included."""
    parts = [part for part in path.split("/") if part not in ("", "..")][:CGROUP_DEPTH_MAX]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _rooms_v2(host: Host) -> list[tuple[int, str]]:
    unified = host.cgroup / "unified"
    root = unified if unified.is_dir() else host.cgroup
    found = []
    for folder in _ancestors(root, _own_cgroup("", host)):
        limit = _number(folder / "memory.max")
        if limit is None:
            continue
        used = _number(folder / "memory.current") or 0
        cache = _stat(folder / "memory.stat", "inactive_file", "active_file")
        found.append((limit - max(0, used - cache), str(folder / "memory.max")))
    return found


def _rooms_v1(host: Host) -> list[tuple[int, str]]:
    found = []
    for folder in _ancestors(host.cgroup / "memory", _own_cgroup("memory", host)):
        limit = _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= UNLIMITED_BYTES:
            continue
        used = _number(folder / "memory.usage_in_bytes") or 0
        cache = _stat(folder / "memory.stat", "total_inactive_file", "total_active_file")
        found.append((limit - max(0, used - cache), str(folder / "memory.limit_in_bytes")))
    return found


def _hugetlb_cgroup(page_bytes: int, want_bytes: int, host: Host) -> list[Shortage]:
    mib = page_bytes >> 20
    size = f"{mib}MB" if mib < 1024 else f"{mib >> 10}GB"
    v2, v1 = host.cgroup, host.cgroup / "hugetlb"
    places = [
        (folder / f"hugetlb.{size}.max", folder / f"hugetlb.{size}.current")
        for folder in _ancestors(v2, _own_cgroup("", host))
    ] + [
        (folder / f"hugetlb.{size}.limit_in_bytes", folder / f"hugetlb.{size}.usage_in_bytes")
        for folder in _ancestors(v1, _own_cgroup("hugetlb", host))
    ]
    rooms = []
    for limit_path, used_path in places:
        limit = _number(limit_path)
        if limit is not None and limit < UNLIMITED_BYTES:
            rooms.append((limit - (_number(used_path) or 0), str(limit_path)))
    short = [room for room in rooms if room[0] < want_bytes]
    if not short:
        return []
    have_bytes, what = min(short)
    remedy = f"Raise the container's limit of huge pages (Kubernetes: hugepages-{mib}Mi)."
    return [Shortage(f"the huge page limit in {what}", max(0, have_bytes), want_bytes, remedy)]


def _process(wants: Sequence[Want], host: Host) -> list[Shortage]:
    found = []
    largest = max((b for spec, b in wants if not spec.hugetlb), default=0)
    soft = host.rlimit(resource.RLIMIT_FSIZE)[0]
    if soft != resource.RLIM_INFINITY and largest > soft:
        remedy = "Raise it (`ulimit -f unlimited`; systemd: LimitFSIZE=infinity)."
        found.append(Shortage("the file size limit of this process", soft, largest, remedy))
    soft = host.rlimit(resource.RLIMIT_AS)[0]
    total = sum(bytes_ for _, bytes_ in wants)
    if soft != resource.RLIM_INFINITY:
        have_bytes = max(0, soft - _address_space_bytes(host))
        if total > have_bytes:
            remedy = "Raise it (`ulimit -v unlimited`; systemd: LimitAS=infinity)."
            what = "the address space limit of this process"
            found.append(Shortage(what, have_bytes, total, remedy))
    return found


def _address_space_bytes(host: Host) -> int:
    fields = _text(host.proc / "self" / "statm").split()
    return int(fields[0]) * resource.getpagesize() if fields and fields[0].isdecimal() else 0


# ---- small files ----------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """Return the number in *path*; None when it is missing or says "max"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _stat(path: Path, *names: str) -> int:
    fields = (line.split() for line in _text(path).splitlines())
    return sum(int(f[1]) for f in fields if len(f) == 2 and f[0] in names and f[1].isdecimal())


def _chosen(path: Path) -> str:
    """Return the word in brackets of a sysfs choice such as "always [never]"."""
    return _text(path).partition("[")[2].partition("]")[0]
