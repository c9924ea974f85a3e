# SPDX-License-Identifier: Apache-2.0
"""
Where the configuration comes from: flag > environment > file > default.

load() does all of it, and a reload is another load() with the same arguments.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from cenote.shm.paths import daemon_run_dir

from .config import (
    GIB,
    GRANULE_BYTES,
    AccessConfig,
    ConfigError,
    DaemonConfig,
    PoolConfig,
    RegionConfig,
    TenantConfig,
    options,
)
from .config_build import KeyPath, Tree, build
from .config_host import Host
from .config_kinds import Kind, Principal
from .config_toml import read_toml

ENV_PREFIX: Final = "CENOTED_"
CONFIG_ENV: Final = "CENOTE_CONFIG"
DEFAULT_SIZE_MAX_BYTES: Final = 4 * GIB
NEAR_MISS: Final = 0.9  # how alike a variable must be to one of ours to be taken for a typing error
_SECTIONS: Final[dict[str, type]] = {
    "daemon": DaemonConfig,
    "pool": PoolConfig,
    "region": RegionConfig,
}


@dataclass(frozen=True)
class Flag:
    """
    A flag of cenoted and its variable in the environment.

    every: it concerns all pools. The others name one thing of one pool, so that with several pools
    (or regions) in the file they are refused.
    """

    name: str
    section: str
    key: str
    metavar: str
    help: str
    every: bool = False
    constant: str = ""

    @property
    def variable(self) -> str:
        """The variable in the environment with the same meaning."""
        return f"{ENV_PREFIX}{self.key.upper()}"

    @property
    def kind(self) -> Kind:
        """What its value may be."""
        kind = options(_SECTIONS[self.section])[self.key].metadata["kind"]
        assert isinstance(kind, Kind)
        return kind


# "medium" before "page-size": a new medium drops the page size that the file gives the old one.
FLAGS: Final = (
    Flag("socket", "pool", "socket", "PATH", "Unix socket of the pool"),
    Flag("size", "region", "size", "SIZE", 'memory of the pool, such as "4GiB"'),
    Flag("medium", "region", "medium", "MEDIUM", "shm, memfd, hugepages or file:PATH"),
    Flag("name", "pool", "name", "NAME", "name of the pool"),
    Flag("numa", "region", "numa", "NODE", "comes in a later release"),
    Flag("page-size", "region", "page_size", "SIZE", "4KiB, thp, 2MiB or 1GiB"),
    Flag("policy", "pool", "policy", "POLICY", "use-count, lru, lfu or s3-fifo"),
    Flag("high-water", "pool", "high_water", "SHARE", "share in use at which eviction begins"),
    Flag("low-water", "pool", "low_water", "SHARE", "share of that mark at which it ends"),
    Flag("max-chunks", "pool", "max_chunks", "N", "chunks that the catalog can name; 0 = derived"),
    Flag("checksum", "pool", "checksum", "WHEN", "off, lazy or commit"),
    Flag("run-dir", "daemon", "run_dir", "PATH", "folder of the sockets"),
    Flag("log-level", "daemon", "log_level", "LEVEL", "DEBUG, INFO, WARNING or ERROR"),
    Flag("log-format", "daemon", "log_format", "FORMAT", "auto, text or json"),
    Flag("ephemeral", "pool", "ephemeral", "", "drop the pools at the end", True, "true"),
    Flag("no-populate", "region", "populate", "", "do not touch all pages at start", True, "false"),
)


@dataclass(frozen=True)
class Startup:
    """What cenoted was asked to do. config_file is None when there is none."""

    config: DaemonConfig
    config_file: Path | None
    reformat: bool
    check: bool
    take_over: bool = False
    drop: bool = False


@dataclass(frozen=True)
class _Override:
    flag: Flag
    origin: str
    text: str


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of cenoted's command line."""
    parser = argparse.ArgumentParser(
        prog="cenoted",
        description="Serve pools of KV-cache memory to the inference processes of this host.",
        epilog=f"Most flags can be set as ${ENV_PREFIX}<FLAG>, too; a flag wins over the "
        "environment, the environment over the file.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file (docs/configuration.md)")
    for flag in FLAGS:
        if flag.constant:
            parser.add_argument(
                f"--{flag.name}", action="store_const", const=flag.constant, help=flag.help
            )
        else:
            parser.add_argument(f"--{flag.name}", metavar=flag.metavar, help=flag.help)
    parser.add_argument(
        "--reformat",
        action="store_true",
        help="begin with empty pools, whatever is there",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="kill a daemon that serves these pools, and go on in its place",
    )
    parser.add_argument(
        "--drop", action="store_true", help="free what is left of these pools, then exit"
    )
    parser.add_argument(
        "--check", action="store_true", help="validate and print the configuration, then exit"
    )
    parser.add_argument("--version", action="version", version=f"cenoted {_version()}")
    return parser


def _version() -> str:
    try:
        return metadata.version("cenote")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def load(argv: Sequence[str], host: Host | None = None) -> Startup:
    """
    Return the validated configuration for the command line *argv* (without the program's name).

    Raises:
        ConfigError: With all mistakes found.
        SystemExit: From argparse: an unknown flag (status 2), --help or --version (status 0).
    """
    host = host or Host()
    arguments = argument_parser().parse_args(argv)
    config_file = _config_file(arguments.config, host)
    tree = read_toml(config_file) if config_file else Tree(origins={(): "default"})
    problems = list(_misspelt_variables(host))
    pools = _default_pools(tree)
    for override in _overrides(arguments, host):
        problems += _apply(tree, override)
    _default_sizes(pools, host)
    try:
        config = build(tree, host, str(daemon_run_dir(None, host.environ, host.uid)))
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return Startup(
        config,
        config_file,
        arguments.reformat,
        arguments.check,
        arguments.take_over,
        arguments.drop,
    )


def _config_file(argument: str | None, host: Host) -> Path | None:
    named = argument or host.environ.get(CONFIG_ENV)
    if named:
        return Path(named)
    return host.etc_file if host.etc_file.exists() else None


def _misspelt_variables(host: Host) -> Iterator[str]:
    """Other CENOTE_ variables are not ours to judge, but a near miss is a mistake."""
    known = [CONFIG_ENV, *(flag.variable for flag in FLAGS)]
    for name in sorted(host.environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=NEAR_MISS)
            if close:
                yield f"${name}: unknown variable: did you mean ${close[0]}?"


# -- defaults -----------------------------------------------------------------------------------


def _default_pools(tree: Tree) -> list[dict[str, Any]]:
    """Add the default pool and default regions; return the regions whose size is still open."""
    pools = tree.values.setdefault("pool", [{}])
    if not isinstance(pools, list):
        return []
    made = []
    for i, pool in enumerate(pools):
        if isinstance(pool, dict) and "region" not in pool:
            region: dict[str, Any] = {"medium": "shm"}
            pool["region"] = [region]
            tree.origins.setdefault(("pool", i, "region", 0), "default")
            made.append(region)
    return made


def _default_sizes(regions: list[dict[str, Any]], host: Host) -> None:
    """No pool without a size takes more than 4 GiB, nor all of them a quarter of the memory."""
    open_ = [region for region in regions if "size" not in region]
    for region in open_:
        share_bytes = host.memory_bytes() // 4 // len(open_)
        page_bytes = GIB if region.get("page_size") == "1GiB" else GRANULE_BYTES
        size_bytes = min(DEFAULT_SIZE_MAX_BYTES, share_bytes)
        region["size"] = max(size_bytes - size_bytes % page_bytes, page_bytes)


# -- flags and environment ----------------------------------------------------------------------


def _overrides(arguments: argparse.Namespace, host: Host) -> Iterator[_Override]:
    for flag in FLAGS:
        text = getattr(arguments, flag.name.replace("-", "_"))
        if text is not None:
            yield _Override(flag, f"--{flag.name}", text)
        elif host.environ.get(flag.variable):
            yield _Override(flag, f"${flag.variable}", host.environ[flag.variable])


def _apply(tree: Tree, override: _Override) -> list[str]:
    """Write *override* into *tree*; return what is wrong with it, if anything."""
    targets = _targets(tree, override.flag)
    if len(targets) > 1 and not override.flag.every:
        what = {"pool": "pools", "region": "regions"}[override.flag.section]
        problem = (
            f"{override.origin}: the file has {len(targets)} {what}, and this concerns one: "
            f"remove it, and set {override.flag.key} in the file"
        )
        return [problem]
    for path, table in targets:
        _set(tree, path, table, override)
    return []


def _targets(tree: Tree, flag: Flag) -> list[tuple[KeyPath, dict[str, Any]]]:
    """Return the sections that *flag* concerns. Those of a wrong type are left to the builder."""
    if flag.section == "daemon":
        table = tree.values.setdefault("daemon", {})
        return [(("daemon",), table)] if isinstance(table, dict) else []
    pools = _tables(tree.values.get("pool"), ("pool",))
    if flag.section == "pool":
        return pools
    return [r for path, pool in pools for r in _tables(pool.get("region"), (*path, "region"))]


def _tables(value: object, path: KeyPath) -> list[tuple[KeyPath, dict[str, Any]]]:
    if not isinstance(value, list):
        return []
    return [((*path, i), entry) for i, entry in enumerate(value) if isinstance(entry, dict)]


def _set(tree: Tree, path: KeyPath, table: dict[str, Any], override: _Override) -> None:
    key, text = override.flag.key, override.text
    if key == "medium":
        table.pop("path", None)
        table.pop("page_size", None)
        medium, colon, file_path = text.partition(":")
        if medium == "file":
            text = medium
            tree.origins[(*path, "path")] = override.origin
            if colon:
                table["path"] = options(RegionConfig)["path"].metadata["kind"].from_text(file_path)
    table[key] = override.flag.kind.from_text(text)
    tree.origins[(*path, key)] = override.origin


# -- printing -----------------------------------------------------------------------------------


def to_toml(config: DaemonConfig) -> str:
    """Return *config* as a TOML file that gives the same configuration again (--check)."""
    lines = _section_lines("[daemon]", config)
    for pool in config.pools:
        lines += ["", *_section_lines("[[pool]]", pool)]
        for region in pool.regions:
            lines += ["", *_section_lines("[[pool.region]]", region)]
        lines += ["", *_section_lines("[pool.access]", pool.access)]
        for tenant in pool.tenants:
            lines += ["", *_section_lines("[[pool.tenant]]", tenant)]
    return "\n".join(lines) + "\n"


def _section_lines(
    header: str, section: DaemonConfig | PoolConfig | RegionConfig | AccessConfig | TenantConfig
) -> list[str]:
    lines = [header]
    for key, option in options(type(section)).items():
        value = getattr(section, option.name)
        if value is not None:
            lines.append(f"{key} = {_toml_value(value, option.metadata['kind'])}")
    return lines


def _toml_value(value: object, kind: Kind) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_principal(entry) for entry in value) + "]"
    shown = kind.show(value)
    if isinstance(value, bool | float) or (shown == str(value) and isinstance(value, int)):
        return shown
    # JSON's strings are TOML's, but for a DEL character.
    return json.dumps(shown, ensure_ascii=False).replace("\x7f", "\\u007f")


def _principal(entry: Principal) -> str:
    return entry.written if entry.written.isdigit() else json.dumps(entry.written)
