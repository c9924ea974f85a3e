# SPDX-License-Identifier: Apache-2.0
"""The configuration of cenoted: cenote.daemon.config and its loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from cenote.daemon import config_docs
from cenote.daemon.config import GIB, MIB, ConfigError, DaemonConfig, Role
from cenote.daemon.config_host import Host
from cenote.daemon.config_reload import diff
from cenote.daemon.config_sources import FLAGS, load, to_toml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.toml"))
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


# -- defaults and sources --------------------------------------------------------------------------


def test_defaults(host: Host) -> None:
    """
    Without anything: pool "default", shm, a quarter of the memory, for the own user as admin.
    """
    startup = load([], host)
    (pool,) = startup.config.pools
    (region,) = pool.regions

    assert (pool.name, region.medium, region.size_bytes) == ("default", "shm", 2 * GIB)
    assert startup.config.socket_of(pool) == Path("/run/user/1000/cenote/default.sock")
    assert pool.access.role_of(OWN_UID, []) is Role.ADMIN
    assert pool.access.role_of(0, [0, 2001]) is None
    assert (pool.policy, pool.checksum, pool.lease_slots) == ("use-count", "lazy", 8192)
    assert (pool.low_water, pool.reader_lease_share) == (0.98, 0.25)
    assert startup.config_file is None
    assert not startup.reformat


@pytest.mark.parametrize(
    ("memory_bytes", "expected_bytes"),
    [(8 * GIB, 2 * GIB), (1024 * GIB, 4 * GIB), (50 * MIB, 12 * MIB), (MIB, 2 * MIB)],
)
def test_default_size(host: Host, memory_bytes: int, expected_bytes: int) -> None:
    """
    min(4 GiB, a quarter of the memory limit), in whole granules, at least one.
    """
    config = load([], replace(host, memory_bytes=lambda: memory_bytes)).config

    assert config.pools[0].size_bytes == expected_bytes


def test_default_sizes_of_several_pools_share_the_quarter(load_text: Load) -> None:
    """
    Pools without a region take a quarter of the memory together, not each.
    """
    config = load_text('[[pool]]\nname = "a"\n[[pool]]\nname = "b"\n')

    assert [pool.size_bytes for pool in config.pools] == [GIB, GIB]


def test_flag_wins_over_environment_over_file_over_default(load_text: Load) -> None:
    """
    Each source wins over those after it, key by key.
    """
    text = '[daemon]\nlog_level = "ERROR"\n[[pool]]\npolicy = "lru"\nchecksum = "off"\n'
    config = load_text(text, "--policy", "lfu", CENOTED_POLICY="s3-fifo", CENOTED_LOG_LEVEL="debug")

    assert config.pools[0].policy == "lfu"
    assert config.log_level == "DEBUG"
    assert config.pools[0].checksum == "off"
    assert config.pools[0].low_water == 0.98


def test_every_flag_and_its_variable_reach_the_configuration(host: Host) -> None:
    """
    All flags but the refused one set what they name, and so do their variables.
    """
    values = {
        "socket": "/s.sock",
        "size": "64MiB",
        "medium": "memfd",
        "name": "x",
        "page-size": "thp",
        "policy": "lru",
        "high-water": "0.5",
        "low-water": "0.25",
        "max-chunks": "1000",
        "checksum": "commit",
        "run-dir": "/r",
        "log-level": "ERROR",
        "log-format": "json",
        "ephemeral": "true",
        "no-populate": "false",
    }
    assert {*values, "numa"} == {flag.name for flag in FLAGS}
    by_flag = [w for f in FLAGS if f.constant for w in [f"--{f.name}"]]
    by_flag += [
        w
        for f in FLAGS
        if not f.constant and f.name in values
        for w in (f"--{f.name}", values[f.name])
    ]
    environ = {f.variable: values[f.name] for f in FLAGS if f.name in values}

    config = load(by_flag, host).config

    assert load([], replace(host, environ=environ)).config == config
    pool, region = config.pools[0], config.pools[0].regions[0]
    assert (pool.name, pool.socket, pool.policy, pool.checksum) == ("x", "/s.sock", "lru", "commit")
    assert (pool.high_water, pool.low_water, pool.chunk_slots) == (0.5, 0.25, 1000)
    assert (region.medium, region.page_size, region.size_bytes) == ("memfd", "thp", 64 * MIB)
    assert (pool.ephemeral, region.populate) == (True, False)
    assert (config.run_dir, config.log_level, config.log_format) == ("/r", "ERROR", "json")


def test_medium_file_with_a_relative_path(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    --medium file:PATH may be relative to the working folder; --medium replaces the file's region.
    """
    monkeypatch.chdir(tmp_path)

    config = load(["--medium", "file:pool.bin", "--size", "64MiB"], host).config

    assert config.pools[0].regions[0].path == str(tmp_path / "pool.bin")


def test_medium_flag_drops_what_belongs_to_the_old_medium(load_text: Load) -> None:
    """
    A file's path and page size go with its medium when a flag names another one.
    """
    text = '[[pool]]\n[[pool.region]]\nmedium = "file"\npath = "/x"\nsize = "64MiB"\n'

    region = load_text(text, "--medium", "hugepages").pools[0].regions[0]

    assert (region.medium, region.path, region.page_size) == ("hugepages", None, "2MiB")


def test_file_is_found(host: Host, tmp_path: Path) -> None:
    """
    --config, else $CENOTE_CONFIG, else the file in /etc, if it is there.
    """
    for name in ("flag", "env", "etc"):
        (tmp_path / f"{name}.toml").write_text(f'[[pool]]\nname = "{name}"\n')
    with_env = replace(host, environ={"CENOTE_CONFIG": str(tmp_path / "env.toml")})

    assert load([], host).config.pools[0].name == "etc"
    assert load([], with_env).config.pools[0].name == "env"
    startup = load(["--config", str(tmp_path / "flag.toml"), "--reformat", "--check"], with_env)
    assert startup.config.pools[0].name == "flag"
    assert startup.reformat
    assert startup.check


def test_configuration_is_frozen(host: Host) -> None:
    """
    Nobody changes a configuration in place.
    """
    config = load([], host).config

    with pytest.raises(FrozenInstanceError):
        config.log_level = "DEBUG"  # type: ignore[misc]  # that is the point


def test_derived_marks_and_chunks(load_text: Load) -> None:
    """
    The low-water mark is a share of the high one; descriptors are one per 16 KiB within limits.
    """
    pool = load_text(MEMFD.replace("[[pool]]", "[[pool]]\nhigh_water = 0.5\nlow_water = 0.5", 1))

    assert pool.pools[0].high_water_bytes == 32 * MIB
    assert pool.pools[0].low_water_bytes == 16 * MIB
    sizes = {"2MiB": 4096, "64MiB": 4096, "4GiB": 2**18, "16TiB": 2**26}
    for size, slots in sizes.items():
        assert load_text(MEMFD.replace("64MiB", size)).pools[0].chunk_slots == slots


# -- access and tenants ----------------------------------------------------------------------------


def test_roles(load_text: Load) -> None:
    """
    Names, uids, groups and gids are resolved; the highest role wins; others are refused.
    """
    access = (
        load_text(
            MEMFD + '[pool.access]\nreaders = ["@kv", "anna"]\nwriters = ["anna", 1002]\n'
            'admins = ["@2005"]\n'
        )
        .pools[0]
        .access
    )

    assert access.role_of(1001, []) is Role.WRITER
    assert access.role_of(1002, [2001]) is Role.WRITER
    assert access.role_of(7, [2001]) is Role.READER
    assert access.role_of(7, [1, 2005, 2001]) is Role.ADMIN
    assert access.role_of(7, [7]) is None
    assert access.role_of(2005, []) is None
    assert Role.READER < Role.WRITER < Role.ADMIN


@pytest.mark.parametrize("medium", ["'shm'", "'file'\npath = '/x'"])
def test_named_memory_serves_a_single_writer(
    problems_of: Problems, load_text: Load, medium: str
) -> None:
    """
    On shm and file another uid, or any group, may not write; the remedy is memfd. Readers may come.
    """
    base = f"[[pool]]\n[[pool.region]]\nmedium = {medium}\nsize = '64MiB'\n[pool.access]\n"

    for writers in ("['anna']", "['@kv']", "['me', 1002]"):
        (problem,) = problems_of(f"{base}writers = {writers}\n")
        assert 'medium = "memfd"' in problem
        assert "pool.access.writers" in problem
    assert problems_of(f"{base}admins = ['anna']\n")
    config = load_text(f"{base}readers = ['anna', '@kv']\nwriters = ['me']\nadmins = ['root']\n")
    assert config.pools[0].access.role_of(1001, []) is Role.READER


@pytest.mark.parametrize("entry", ["''", "'@'", "'@nogroup-x'", "-1", "4294967295", "1.5", "[]"])
def test_principal_that_is_none(problems_of: Problems, entry: str) -> None:
    """
    What names no user and no group of this host is refused.
    """
    (problem,) = problems_of(f"{MEMFD}[pool.access]\nreaders = [{entry}]\n")

    assert problem.startswith("FILE:6: pool.access.readers: ")


def test_tenants(load_text: Load, problems_of: Problems) -> None:
    """
    A client belongs to the tenant of its user before that of its group; quotas follow the tenant.
    """
    text = (
        MEMFD.replace("[[pool]]", '[[pool]]\ndefault_quota = "8MiB"', 1)
        + '[[pool.tenant]]\nusers = ["@kv"]\nquota = "16MiB"\n'
        + '[[pool.tenant]]\nusers = ["anna"]\nsalt_file = "/etc/salt"\n'
        + '[[pool.tenant]]\nusers = ["bert"]\nquota = 0\n'
    )
    pool = load_text(text).pools[0]
    group, anna, bert = pool.tenants

    assert pool.tenant_of(1001, [2001]) is anna
    assert pool.tenant_of(1, [2001]) is group
    assert pool.tenant_of(1, []) is None
    quotas = [pool.quota_of(tenant) for tenant in (group, anna, bert, None)]
    assert quotas == [16 * MIB, 8 * MIB, 0, 8 * MIB]
    assert "already in tenant 2" in problems_of(text + "[[pool.tenant]]\nusers = [1001]\n")[0]
    assert "more than the pool" in problems_of(text.replace("16MiB", "1GiB"))[0]


# -- reload ----------------------------------------------------------------------------------------


def test_reload_tells_live_from_restart(load_text: Load) -> None:
    """
    Live options are in the result, the others keep their old value; both are listed with values.
    """
    text = MEMFD + '[pool.access]\nreaders = ["anna"]\n'
    old = load_text(text, "--policy", "lru")
    new = load_text(
        text.replace("anna", "bert") + '[[pool.tenant]]\nusers = ["anna"]\nquota = "4MiB"\n',
        *("--policy", "lfu", "--log-level", "DEBUG", "--size", "128MiB", "--max-chunks", "100"),
    )

    reload = diff(old, new)

    assert [str(change) for change in reload.live] == [
        "log_level: INFO -> DEBUG",
        "pool 'default': policy: lru -> lfu",
        "pool 'default': access.readers: [anna] -> [bert]",
        "pool 'default': tenants: - -> users=[anna] quota=4MiB",
    ]
    assert [str(change) for change in reload.restart] == [
        "pool 'default': max_chunks: 0 -> 100",
        "pool 'default': region[0].size: 64MiB -> 128MiB",
    ]
    pool = reload.config.pools[0]
    assert (pool.policy, pool.size_bytes, pool.max_chunks) == ("lfu", 64 * MIB, 0)
    assert pool.access == new.pools[0].access
    assert pool.tenants == new.pools[0].tenants
    assert diff(new, new).live == diff(new, new).restart == ()
    assert diff(reload.config, new).live == ()


def test_reload_with_other_pools_or_regions(load_text: Load) -> None:
    """
    A new pool, one that is gone, and another number of regions wait for a restart.
    """
    old = load_text(MEMFD)
    region = MEMFD.removeprefix("[[pool]]\n")

    renamed = diff(old, load_text(MEMFD, "--name", "other"))
    grown = diff(old, load_text(MEMFD + region))

    assert [str(c) for c in renamed.restart] == [
        "pool 'default': pool: served -> -",
        "pool 'other': pool: - -> to be served",
    ]
    assert renamed.config == old
    assert [str(c) for c in grown.restart] == ["pool 'default': regions: 1 -> 2"]


# -- documents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid(host: Host, example: Path, tmp_path: Path) -> None:
    """
    Each example loads, and its printed form (--check) is a file that means the same.
    """
    config = load(["--config", str(example)], host).config
    printed = tmp_path / "printed.toml"
    printed.write_text(to_toml(config))

    assert load(["--config", str(printed)], host).config == config


def test_examples_cover_the_media() -> None:
    """
    There is one example a medium, and one for production.
    """
    expected = {"shm", "memfd", "hugepages", "thp", "file", "production"}

    assert expected <= {path.stem for path in EXAMPLES}


def test_documentation_is_up_to_date() -> None:
    """
    docs/configuration.md is what `python -m cenote.daemon.config_docs` prints.
    """
    assert (ROOT / "docs" / "configuration.md").read_text() == config_docs.render()
