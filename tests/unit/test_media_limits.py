# SPDX-License-Identifier: Apache-2.0
"""Parsing of media, and the checks for room before anything is created."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cenote.shm.media import (
    Host,
    MediumRefused,
    MediumSpec,
    NoRoom,
    ObjectName,
    check_room,
    check_rooms,
    notes,
    parse_medium,
    shortages,
)
from cenote.shm.paths import PathError

MIB = 1024**2
GIB = 1024**3


@dataclass(frozen=True)
class Blocks:
    f_frsize: int
    f_blocks: int
    f_bavail: int


def no_limit(_which: int) -> tuple[int, int]:
    return resource.RLIM_INFINITY, resource.RLIM_INFINITY


class FakeHost:
    """A host with plenty of everything, of which a test takes away what it is about."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rlimits: dict[int, int] = {}
        self.file_systems: Mapping[Path, Blocks] = {}
        self.write("proc/meminfo", "MemTotal: 99999999 kB\nMemAvailable: 67108864 kB\n")
        self.write("proc/self/cgroup", "0::/\n")
        self.write("proc/self/mountinfo", "")
        self.write("proc/self/statm", "1000 1 1 1 0 1 0\n")

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def huge_pages(self, size_kib: int = 2048, **counts: int) -> None:
        for name in ("nr", "free", "resv", "surplus", "nr_overcommit"):
            folder = f"sys/hugepages/hugepages-{size_kib}kB"
            self.write(f"{folder}/{name}_hugepages", f"{counts.get(name, 0)}\n")

    def statvfs(self, path: Path) -> Blocks:
        return self.file_systems.get(path, Blocks(4096, 2**30, 2**30))

    def rlimit(self, which: int) -> tuple[int, int]:
        soft = self.rlimits.get(which, resource.RLIM_INFINITY)
        return soft, resource.RLIM_INFINITY

    def host(self) -> Host:
        return Host(
            proc=self.root / "proc",
            sysfs_mm=self.root / "sys",
            cgroup=self.root / "cgroup",
            shm_dir=Path("/dev/shm"),
            statvfs=self.statvfs,
            rlimit=self.rlimit,
        )


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


# ---- parsing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "page_size", "spec"),
    [
        ("shm", None, MediumSpec("shm", 4096)),
        ("shm", "thp", MediumSpec("shm", 4096, thp=True)),
        ("memfd", 4096, MediumSpec("memfd", 4096)),
        ("memfd", "thp", MediumSpec("memfd", 4096, thp=True)),
        ("memfd", "2MiB", MediumSpec("memfd", 2 * MIB)),
        ("memfd", "1GiB", MediumSpec("memfd", GIB)),
        ("hugepages", None, MediumSpec("hugepages", 2 * MIB)),
        ("hugepages", GIB, MediumSpec("hugepages", GIB)),
        ("file:/mnt/pmem/pool", None, MediumSpec("file", 4096, path=Path("/mnt/pmem/pool"))),
    ],
)
def test_media_are_parsed(text: str, page_size: int | str | None, spec: MediumSpec) -> None:
    """Every documented spelling gives its medium."""
    assert spec == parse_medium(text, page_size)


@pytest.mark.parametrize(
    ("text", "page_size", "message"),
    [
        ("devdax:/dev/dax0.0", None, "cannot use DAX devices yet"),
        ("SHM", None, "use shm, memfd, hugepages or file:PATH"),
        ("shm:/x", None, "is no medium"),
        ("", None, "is no medium"),
        ("shm", "2MiB", "has no page_size"),
        ("memfd", "64KiB", "has no page_size"),
        ("memfd", "2M", "page_size"),
        ("hugepages", "4KiB", "has no page_size"),
        ("hugepages", "thp", "has no page_size"),
        ("file:/x", "2MiB", "pages of its file system"),
        ("file:", None, "absolute path"),
        ("file:pool", None, "absolute path"),
        ("file:/mnt/", None, "absolute path"),
        ("file:/a\0b", None, "absolute path"),
    ],
)
def test_other_media_are_refused(text: str, page_size: int | str | None, message: str) -> None:
    """What is unknown, not built yet or contradicts itself is refused with what to write."""
    with pytest.raises(MediumRefused, match=message):
        parse_medium(text, page_size)


def test_sizes_are_rounded_to_the_page_of_the_medium() -> None:
    """A size becomes whole pages, at least one, and no nonsense becomes a size."""
    assert MediumSpec("shm", 4096).round_up(0) == 4096
    assert MediumSpec("shm", 4096).round_up(4097) == 8192
    assert MediumSpec("memfd", 2 * MIB).round_up(1) == 2 * MIB
    for bytes_ in (-1, 2**61):
        with pytest.raises(MediumRefused):
            MediumSpec("shm", 4096).round_up(bytes_)


def test_object_names_are_read_back_and_foreign_ones_are_not() -> None:
    """A name says uid, pool, pool id and part; what merely looks alike is nobody's."""
    name = ObjectName("a-1", "00112233445566ff", "r0", 1000)

    assert name.shm_name == "/cenote.1000.a-1.00112233445566ff.r0"
    assert name == ObjectName.parse(str(name))
    for text in (
        "cenote",
        "cenote.1000.a.00112233445566FF.r0",
        f"{name}.x",
        f"x{name}",
        f"{name}\n",
    ):
        assert ObjectName.parse(text) is None


def test_object_names_hold_only_what_names_may() -> None:
    """No path, no dot and no capital gets into the name of an object."""
    with pytest.raises(PathError):
        ObjectName("../x", "0" * 16, "r0", 0)
    with pytest.raises(MediumRefused):
        ObjectName("x", "0" * 15, "r0", 0)
    with pytest.raises(MediumRefused):
        ObjectName("x", "0" * 16, "r/0", 0)


# ---- room -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["shm", "memfd", "file:/data/pool"])
def test_a_host_with_plenty_has_room(fake: FakeHost, text: str) -> None:
    """Nothing short, nothing said."""
    check_room(parse_medium(text), GIB, fake.host())


def test_a_small_dev_shm_is_told_with_its_remedies(fake: FakeHost) -> None:
    """Docker's 64 MiB /dev/shm: what, how much, how much wanted, and both ways to enlarge it."""
    fake.file_systems = {Path("/dev/shm"): Blocks(4096, 16384, 15000)}

    with pytest.raises(NoRoom) as caught:
        check_room(parse_medium("shm"), GIB, fake.host())

    text = str(caught.value)
    assert "/dev/shm has room for 58.6MiB, and 1GiB are wanted" in text
    assert "mount -o remount,size=1030M /dev/shm" in text
    assert "docker run --shm-size=1030m" in text


def test_a_dev_shm_without_a_size_has_room(fake: FakeHost) -> None:
    """A tmpfs mounted with size=0 reports no blocks at all: no limit, not no room."""
    fake.file_systems = {Path("/dev/shm"): Blocks(4096, 0, 0)}

    check_room(parse_medium("shm"), GIB, fake.host())


def test_catalog_and_regions_are_counted_together(fake: FakeHost) -> None:
    """Two objects that fit one by one and not together are refused."""
    fake.file_systems = {Path("/dev/shm"): Blocks(4096, 16384, 16384)}
    spec = parse_medium("shm")

    check_rooms([(spec, 64 * MIB)], fake.host())
    with pytest.raises(NoRoom, match=r"64MiB, and 64.004MiB|67108864 bytes, and 67112960 bytes"):
        check_rooms([(spec, 64 * MIB), (spec, 1)], fake.host())


def test_memfd_does_not_need_dev_shm(fake: FakeHost) -> None:
    """The size of /dev/shm says nothing about memfds."""
    fake.file_systems = {Path("/dev/shm"): Blocks(4096, 1, 1)}

    check_room(parse_medium("memfd"), GIB, fake.host())


def test_missing_huge_pages_are_told_with_the_number_to_set(fake: FakeHost) -> None:
    """10 pages of which 4 are free, 1 of those reserved; 512 needed: set 10 + 512 - 3."""
    fake.huge_pages(nr=10, free=4, resv=1)

    with pytest.raises(NoRoom) as caught:
        check_room(parse_medium("hugepages"), GIB, fake.host())

    text = str(caught.value)
    assert "2MiB pages (3 free, 512 needed) has room for 6MiB, and 1GiB are wanted" in text
    assert "sysctl vm.nr_hugepages=519" in text


def test_huge_pages_that_may_be_had_on_demand_count(fake: FakeHost) -> None:
    """Overcommit, less what of it is taken, is room."""
    fake.huge_pages(nr=2, free=0, surplus=2, nr_overcommit=10)

    check_room(parse_medium("hugepages"), 16 * MIB, fake.host())
    with pytest.raises(NoRoom, match="8 free, 9 needed"):
        check_room(parse_medium("hugepages"), 18 * MIB, fake.host())


def test_a_page_size_that_the_kernel_lacks_is_said(fake: FakeHost) -> None:
    """1 GiB pages on a machine without them name what is missing."""
    fake.huge_pages(nr=10, free=10)

    with pytest.raises(NoRoom, match=r"This kernel has no such pages .*hugepages-1048576kB"):
        check_room(parse_medium("memfd", "1GiB"), GIB, fake.host())


@pytest.mark.parametrize(
    ("limit", "used"),
    [
        ("hugetlb.2MB.max", "hugetlb.2MB.current"),
        ("hugetlb/hugetlb.2MB.limit_in_bytes", "hugetlb/hugetlb.2MB.usage_in_bytes"),
    ],
)
def test_the_huge_page_limit_of_the_cgroup_counts(fake: FakeHost, limit: str, used: str) -> None:
    """Enough pages on the host, not enough in the container, in both versions of cgroups."""
    fake.huge_pages(nr=100, free=100)
    fake.write(f"cgroup/{limit}", f"{32 * MIB}\n")
    fake.write(f"cgroup/{used}", f"{16 * MIB}\n")

    check_room(parse_medium("hugepages"), 16 * MIB, fake.host())
    with pytest.raises(NoRoom, match=r"huge page limit .* has room for 16MiB, and 18MiB"):
        check_room(parse_medium("hugepages"), 18 * MIB, fake.host())


def cgroup_v2(fake: FakeHost) -> None:
    fake.write("proc/self/cgroup", "0::/system.slice/cenote.service\n")
    fake.write("cgroup/system.slice/memory.max", f"{GIB}\n")
    fake.write("cgroup/system.slice/memory.current", f"{300 * MIB}\n")
    fake.write(
        "cgroup/system.slice/memory.stat",
        f"anon {200 * MIB}\ninactive_file {60 * MIB}\nactive_file {40 * MIB}\n",
    )
    fake.write("cgroup/system.slice/cenote.service/memory.max", "max\n")
    fake.write("cgroup/system.slice/cenote.service/memory.current", f"{100 * MIB}\n")


def cgroup_v2_in_a_container(fake: FakeHost) -> None:
    fake.write("proc/self/cgroup", "0::/\n")
    fake.write("cgroup/memory.max", f"{824 * MIB}\n")
    fake.write("cgroup/memory.current", "0\n")


def cgroup_v2_beside_v1(fake: FakeHost) -> None:
    fake.write("proc/self/cgroup", "4:memory:/\n0::/x\n")
    fake.write("cgroup/unified/x/memory.max", f"{824 * MIB}\n")
    fake.write("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")


def cgroup_v1(fake: FakeHost) -> None:
    fake.write("proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/docker/0b31\n0::/\n")
    fake.write("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    fake.write("cgroup/memory/docker/0b31/memory.limit_in_bytes", f"{GIB}\n")
    fake.write("cgroup/memory/docker/0b31/memory.usage_in_bytes", f"{300 * MIB}\n")
    fake.write(
        "cgroup/memory/docker/0b31/memory.stat",
        f"cache 7\ntotal_inactive_file {60 * MIB}\ntotal_active_file {40 * MIB}\n",
    )


def cgroup_v1_with_a_path_of_the_host(fake: FakeHost) -> None:
    fake.write("proc/self/cgroup", "4:memory:/docker/not/visible/here\n")
    fake.write("cgroup/memory/memory.limit_in_bytes", f"{824 * MIB}\n")
    fake.write("cgroup/memory/memory.usage_in_bytes", "0\n")


@pytest.mark.parametrize(
    "limit",
    [
        cgroup_v2,
        cgroup_v2_in_a_container,
        cgroup_v2_beside_v1,
        cgroup_v1,
        cgroup_v1_with_a_path_of_the_host,
    ],
)
@pytest.mark.parametrize("medium", ["shm", "memfd"])
def test_the_memory_limit_of_the_cgroup_counts(
    fake: FakeHost, limit: Callable[[FakeHost], None], medium: str
) -> None:
    """824 MiB are left below the tightest limit above us; what is only page cache is no use."""
    limit(fake)

    check_room(parse_medium(medium), 824 * MIB, fake.host())
    with pytest.raises(
        NoRoom, match=r"memory limit in .* has room for 824MiB, and 900MiB are wanted"
    ):
        check_room(parse_medium(medium), 900 * MIB, fake.host())


def test_huge_pages_and_disks_do_not_count_against_the_memory_limit(fake: FakeHost) -> None:
    """Neither is charged to the memory controller as memory that stays."""
    cgroup_v2(fake)
    fake.huge_pages(nr=1024, free=1024)
    fake.write("proc/self/mountinfo", "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n")

    check_room(parse_medium("hugepages"), 2 * GIB, fake.host())
    check_room(parse_medium("file:/data/pool"), 2 * GIB, fake.host())


def test_a_file_on_tmpfs_counts_against_the_memory_limit(fake: FakeHost) -> None:
    """The deepest mount above the path decides, spaces in its name and all."""
    cgroup_v2(fake)
    fake.write(
        "proc/self/mountinfo",
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:9 / /my\\040data rw,x shared:1 - tmpfs none rw\n",
    )

    check_room(parse_medium("file:/my/pool"), 2 * GIB, fake.host())
    with pytest.raises(NoRoom, match="memory limit"):
        check_room(parse_medium("file:/my data/pool"), 2 * GIB, fake.host())


def test_the_memory_of_the_host_counts(fake: FakeHost) -> None:
    """Available memory and free swap are what there is."""
    fake.write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 524288 kB\nSwapFree: 262144 kB\n")

    check_room(parse_medium("memfd"), 768 * MIB, fake.host())
    with pytest.raises(NoRoom, match="memory of this host has room for 768MiB, and 1GiB"):
        check_room(parse_medium("memfd"), GIB, fake.host())


def test_a_full_file_system_is_named(fake: FakeHost) -> None:
    """The folder of the file, and what is left there."""
    fake.file_systems = {Path("/data"): Blocks(4096, 1000, 256)}

    with pytest.raises(NoRoom, match="file system of /data has room for 1MiB, and 8MiB are wanted"):
        check_room(parse_medium("file:/data/pool"), 8 * MIB, fake.host())


@pytest.mark.parametrize(
    ("which", "message"),
    [(resource.RLIMIT_FSIZE, "ulimit -f unlimited"), (resource.RLIMIT_AS, "ulimit -v unlimited")],
)
def test_limits_of_the_process_count(fake: FakeHost, which: int, message: str) -> None:
    """A limit on file size or address space that would stop us later stops us now."""
    fake.rlimits = {which: 512 * MIB}

    check_room(parse_medium("memfd"), 256 * MIB, fake.host())
    with pytest.raises(NoRoom, match=message):
        check_room(parse_medium("memfd"), GIB, fake.host())


def test_all_shortages_are_told_at_once(fake: FakeHost) -> None:
    """Who must change two things learns of both in one run."""
    cgroup_v2(fake)
    fake.file_systems = {Path("/dev/shm"): Blocks(4096, 16384, 16384)}

    found = shortages([(parse_medium("shm"), GIB)], fake.host())

    assert [s.what.split(" /")[0] for s in found] == ["/dev/shm", "the memory limit in"]


def test_a_host_that_tells_nothing_refuses_nothing(tmp_path: Path) -> None:
    """Without /proc, /sys and cgroups there is no limit that we could know."""
    absent = tmp_path / "absent"
    host = Host(absent, absent, absent, absent, FakeHost(tmp_path).statvfs, no_limit)

    check_room(parse_medium("shm"), GIB, host)


def test_transparent_huge_pages_that_are_off_are_noted(fake: FakeHost) -> None:
    """The setting of the size wins over the general one unless it says inherit."""
    spec = parse_medium("memfd", "thp")
    fake.write("sys/transparent_hugepage/shmem_enabled", "always within_size advise [never] deny\n")
    assert "shmem_enabled is 'never'" in notes(spec, fake.host())[0]

    size = "sys/transparent_hugepage/hugepages-2048kB/shmem_enabled"
    fake.write(size, "always [inherit] within_size advise never\n")
    assert notes(spec, fake.host())
    fake.write(size, "always inherit within_size [advise] never\n")
    assert not notes(spec, fake.host())
    assert not notes(parse_medium("memfd"), fake.host())
