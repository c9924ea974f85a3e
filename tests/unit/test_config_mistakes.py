# SPDX-License-Identifier: Apache-2.0
"""Configurations that cenoted must refuse, each with file, line, key and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.daemon.config import GIB, MIB, ConfigError, DaemonConfig
from cenote.daemon.config_host import Host
from cenote.daemon.config_sources import load
from cenote.daemon.config_toml import key_lines, parse_toml

OWN_UID = 1000
USERS = {"root": 0, "me": OWN_UID, "anna": 1001, "bert": 1002, "cenote": OWN_UID}
USERS |= {"vllm-chat": 1003, "vllm-batch": 1004}
GROUPS = {"kv": 2001, "kv-writers": 2002, "kv-readers": 2003, "kv-observers": 2004}
GROUPS |= {"researchers": 2005}
Load = Callable[..., DaemonConfig]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with known users, 8 GiB of memory, an empty environment and no file in /etc."""
    return Host(
        uid=OWN_UID,
        environ={"XDG_RUNTIME_DIR": "/run/user/1000"},
        uid_of=USERS.get,
        gid_of=GROUPS.get,
        memory_bytes=lambda: 8 * GIB,
        etc_file=tmp_path / "etc.toml",
    )


@pytest.fixture
def load_text(host: Host, tmp_path: Path) -> Load:
    """Load a file with the given text, then flags; keyword arguments are environment variables."""

    def load_text(text: str, *flags: str, **environ: str) -> DaemonConfig:
        file = tmp_path / "c.toml"
        file.write_text(text)
        here = replace(host, environ={**host.environ, **environ})
        return load(["--config", str(file), *flags], here).config

    return load_text


@pytest.fixture
def problems_of(load_text: Load, tmp_path: Path) -> Callable[..., list[str]]:
    """Load a file that must be refused; return the problems, with "FILE" for its path."""

    def problems_of(text: str, *flags: str, **environ: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_text(text, *flags, **environ)
        return [p.replace(f"{tmp_path}/c.toml", "FILE") for p in caught.value.problems]

    return problems_of


Problems = Callable[..., list[str]]
MEMFD = '[[pool]]\n[[pool.region]]\nmedium = "memfd"\nsize = "64MiB"\n'


def test_all_mistakes_of_a_file_at_once_with_their_lines(problems_of: Problems) -> None:
    """
    Each mistake has file, line, key, what is wrong and the remedy; none hides another.
    """
    problems = problems_of(
        """[daemon]
log_lvl = "INFO"
[[pool]]
polcy = "lru"
high_water = 2
[[pool.region]]
medium = "devdax"
size = "4G"
numa = 0
[pool.access]
readers = [
  "nobody-here",
]
[peers]
"""
    )

    starts = [problem.split(": ")[0:2] for problem in problems]
    assert sorted(starts) == sorted(
        [
            ["FILE:2", "daemon.log_lvl"],
            ["FILE:4", "pool.polcy"],
            ["FILE:5", "pool.high_water"],
            ["FILE:7", "pool.region.medium"],
            ["FILE:8", "pool.region.size"],
            ["FILE:9", "pool.region.numa"],
            ["FILE:11", "pool.access.readers"],
            ["FILE:14", "peers"],
        ]
    )
    text = "\n".join(problems)
    assert "did you mean 'log_level'?" in text
    assert "did you mean 'policy'?" in text
    assert '"4GiB" (binary) or "4GB" (decimal)' in text
    assert text.count("later release") == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", r"FILE:1: x: unknown section 'x'"),
        ("policy = 'lru'", r"FILE:1: policy: this belongs to a pool.*\[\[pool\]\]"),
        ("[[region]]", r"FILE:1: region: .*\[\[pool\.region\]\]"),
        ("[pool]\nname = 'a'", r"FILE:1: pool: .*\[\[pool\]\]"),
        ("daemon = 1", r"FILE:1: daemon: 1 is no section: write \[daemon\]"),
        ("[[pool]]\naccess = 1", r"FILE:2: pool\.access: .*\[pool\.access\]"),
        ("[[pool]]\n[pool.region]\nsize = 1", r"FILE:2: pool\.region: .*\[\[pool\.region\]\]"),
        ("[[pool]]\n[[pool.region]]", r"FILE:2: pool\.region\.size: this is missing"),
        ("[[pool]]\n[[pool.tenant]]", r"FILE:2: pool\.tenant\.users: this is missing"),
        ("[[pool]]\nname = 'A'", r"FILE:2: pool\.name: 'A' is no pool name"),
        ("[[pool]]\nname = 1", r"FILE:2: pool\.name: 1 is no pool name"),
        ("[[pool]]\nlease_slots = 1", r"lease_slots: 1 is not allowed: .*64 to 65536"),
        ("[[pool]]\nlease_slots = '1k'", r"lease_slots: '1k' is no whole number"),
        ("[[pool]]\nlease_slots = true", r"lease_slots: True is no whole number"),
        ("[[pool]]\nevent_slots = 1025", r"event_slots: 1025 .*power of two"),
        ("[[pool]]\nlow_water = 0", r"low_water: 0 is not allowed"),
        ("[[pool]]\nlow_water = nan", r"low_water: nan is not allowed"),
        ("[[pool]]\nhigh_water = true", r"high_water: True is not allowed"),
        ("[[pool]]\nephemeral = 'yes'", r"ephemeral: 'yes' .*true or false"),
        ("[[pool]]\npolicy = 'LRU'", r"policy: 'LRU' is not allowed: choose one of"),
        ("[[pool]]\nsocket = 'x.sock'", r"socket: 'x\.sock' is a relative path"),
        (f"[[pool]]\nsocket = '/{'x' * 120}'", r"FILE:2: pool\.socket: .*allow 107"),
        (f"[daemon]\nrun_dir = '/{'x' * 120}'", r"allow 107.*--run-dir"),
        ("[[pool]]\ndefault_quota = '64GiB'", r"default_quota: 64GiB is more than the pool"),
        ("[daemon]\nlog_level = 'LOUD'", r"log_level: 'LOUD' is not allowed"),
        ("[[pool]]\n" * 33, r"33 of them, and at most 32"),
        ("a = [", r"FILE:1: no TOML"),
        ("\n\nx 1\n", r"FILE:3: no TOML"),
        ("[a]\n[a]\n", r"FILE:2: no TOML"),
        ("a = " + "[" * 5000, r"FILE.*(no TOML|nested)"),
    ],
)
def test_mistake_names_place_and_remedy(problems_of: Problems, text: str, expected: str) -> None:
    """
    One mistake: its line, its key, what is wrong, what to write.
    """
    assert re.search(expected, "\n".join(problems_of(text)))


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("medium = 'file'", r"FILE:3: pool\.region\.path: medium 'file' needs a path"),
        ("medium = 'shm'\npath = '/x'", r"FILE:5: pool\.region\.path: medium 'shm' takes no path"),
        ("medium = 'file:/x'", r"FILE:4: .*medium = \"file\" and path"),
        ("medium = 'shm'\npage_size = '2MiB'", r"FILE:5: .*'2MiB' is not possible on 'shm'.*memfd"),
        ("medium = 'hugepages'\npage_size = '4KiB'", r"FILE:5: .*not possible on 'hugepages'"),
        ("medium = 'hugepages'\npage_size = '1GiB'", r"no multiple of the page size.*write 1GiB"),
        ("numa = 0", r"FILE:4: pool\.region\.numa: .*later release"),
        ("sise = 1", r"FILE:4: pool\.region\.sise: .*did you mean 'size'\?"),
    ],
)
def test_region_that_cannot_be(problems_of: Problems, region: str, expected: str) -> None:
    """
    What does not go together in a region is refused.
    """
    text = f"# one\n[[pool]]\n[[pool.region]]\n{region}\nsize = '64MiB'\n"

    assert re.search(expected, "\n".join(problems_of(text)))


def test_size_is_whole_granules(load_text: Load) -> None:
    """
    "4GB" is rounded down to whole 2 MiB.
    """
    size_bytes = load_text(MEMFD.replace("64MiB", "4GB")).pools[0].size_bytes

    assert size_bytes % (2 * MIB) == 0
    assert 0 < 4 * 10**9 - size_bytes < 2 * MIB


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--size", "4G"], r"^--size: pool\.region\.size: '4G'"),
        (["--numa", "0"], r"^--numa: .*later release"),
        (["--medium", "devdax:/dev/dax0.0"], r"^--medium: .*later release"),
        (["--medium", "file"], r"^--medium: .*needs a path: name the file \(--medium file:PATH"),
        (["--medium", "file:"], r"^--medium: pool\.region\.path"),
        (["--high-water", "x"], r"^--high-water: .*'x' is not allowed"),
        (["--config", "/does/not/exist"], r"^/does/not/exist: cannot be read .*--config"),
    ],
)
def test_mistake_in_a_flag_names_the_flag(host: Host, flags: list[str], expected: str) -> None:
    """
    The origin of a mistake is the flag that made it.
    """
    with pytest.raises(ConfigError, match=expected):
        load(flags, host)


def test_mistake_in_the_environment_names_the_variable(problems_of: Problems) -> None:
    """
    So it is for variables, and one that is nearly ours is taken for a typing error.
    """
    problems = problems_of("", CENOTED_SIZE="x", CENOTED_LOG_LEVLE="INFO", CENOTE_OTHER="1")

    assert problems[0] == "$CENOTED_LOG_LEVLE: unknown variable: did you mean $CENOTED_LOG_LEVEL?"
    assert problems[1].startswith("$CENOTED_SIZE: pool.region.size: 'x'")
    assert len(problems) == 2


def test_flag_for_one_pool_is_refused_for_several(problems_of: Problems, load_text: Load) -> None:
    """
    --size does not guess which of two pools is meant; --ephemeral means all.
    """
    text = '[[pool]]\nname = "a"\n[[pool]]\nname = "b"\n'

    assert problems_of(text, "--size", "1GiB") == [
        "--size: the file has 2 regions, and this concerns one: remove it, and set size in the file"
    ]
    assert all(pool.ephemeral for pool in load_text(text, "--ephemeral").pools)


def test_unknown_flag_is_a_usage_error(host: Host) -> None:
    """
    An unknown or abbreviated flag ends with status 2.
    """
    for flag in ("--sizes", "--siz"):
        with pytest.raises(SystemExit) as caught:
            load([flag, "1GiB"], host)
        assert caught.value.code == 2


def test_overlapping_pools_are_refused(problems_of: Problems) -> None:
    """
    Two pools of one name, one socket, one file, or a file inside another's path.
    """

    def pool(name: str, extra: str = "", path: str = "") -> str:
        medium = f'"file"\npath = "{path}"' if path else '"memfd"'
        region = f'[[pool.region]]\nmedium = {medium}\nsize = "64MiB"\n'
        return f'[[pool]]\nname = "{name}"\n{extra}\n{region}'

    same_name = problems_of(pool("a") + pool("a"))
    socket = problems_of(pool("a", 'socket = "/s/x"') + pool("b", 'socket = "/s/../s/x"'))
    same_file = problems_of(pool("a", path="/d/f") + pool("b", path="/d//f"))
    inside = problems_of(pool("a", path="/d/f") + pool("b", path="/d/f/g"))
    default = problems_of(pool("a", 'socket = "/run/user/1000/cenote/b.sock"') + pool("b"))

    assert len(same_name) == 1
    assert re.match(r"FILE:8: pool\.name: a second pool .*FILE:2", same_name[0])
    assert re.match(r"FILE:9: pool\.socket: '/s/x' is the same as .*'a' \(FILE:3\)", socket[0])
    assert "FILE:13: pool.region.path: '/d/f' is the same as" in same_file[0]
    assert "lies inside '/d/f' of pool 'a'" in inside[0]
    assert "is the same as" in default[0]
    assert len(default) == 1


def test_link_to_the_same_file_is_the_same_file(problems_of: Problems, tmp_path: Path) -> None:
    """
    Two regions do not overlap by way of a symbolic link either.
    """
    (tmp_path / "link").symlink_to(tmp_path)
    region = '[[pool.region]]\nmedium = "file"\nsize = "64MiB"\npath = '
    text = f'[[pool]]\n{region}"{tmp_path}/f"\n{region}"{tmp_path}/link/f"\n'

    assert "is the same as" in problems_of(text)[0]


def test_lines_of_keys() -> None:
    """
    Dotted and quoted keys, inline tables, arrays and strings over several lines, nested lists.
    """
    text = '''a.b = 1
"c d".e = """
x = 1
[not.a.header]
"""
f = [ # ]
  "g = 1", ["]"],
]
[[p]]
h = 'i'
[p.q]
r = { s = 1 }
[[p]]
[[p.t]]
u = "\\"["
v = \'\'\'
w = 1\'\'\'
x = 1
'''
    lines = key_lines(text)

    assert lines[("a", "b")] == 1
    assert lines[("c d", "e")] == 2
    assert ("x",) not in lines
    assert lines[("f",)] == 6
    assert lines[("p", 0)] == 9
    assert lines[("p", 0, "h")] == 10
    assert lines[("p", 0, "q", "r")] == 12
    assert lines[("p", 1)] == 13
    assert lines[("p", 1, "t", 0, "u")] == 15
    assert lines[("p", 1, "t", 0, "x")] == 18
    assert not any("w" in path for path in lines)


@given(st.text(st.sampled_from("[]{}=\"'\\#.\n a1"), max_size=40))
def test_scanner_survives_any_text(text: str) -> None:
    """
    Whatever the text, the scanner ends, and what is no TOML is a ConfigError with a line.
    """
    key_lines(text)
    try:
        problems: tuple[str, ...] = ()
        parse_toml(text.encode(), "F")
    except ConfigError as error:
        problems = error.problems

    assert all(re.match(r"F:\d+: ", problem) for problem in problems)


def test_file_that_is_no_text(host: Host, tmp_path: Path) -> None:
    """
    Bytes that are not UTF-8, a file beyond 1 MiB and a folder are refused with their place.
    """
    (tmp_path / "binary").write_bytes(b"# \n\xff")
    (tmp_path / "huge").write_bytes(b"#" * (2**20 + 1))

    for name, match in (("binary", r"binary:2: .*UTF-8"), ("huge", "larger"), ("", "cannot be")):
        with pytest.raises(ConfigError, match=match):
            load(["--config", str(tmp_path / name)], host)
