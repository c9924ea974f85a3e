# SPDX-License-Identifier: Apache-2.0
"""
docs/configuration.md, made from the dataclasses: `python -m cenote.daemon.config_docs > FILE`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .config import (
    AccessConfig,
    DaemonConfig,
    PoolConfig,
    RegionConfig,
    TenantConfig,
    options,
)
from .config_sources import CONFIG_ENV, ENV_PREFIX, FLAGS

_INTRODUCTION = f"""\
<!-- Made by `python -m cenote.daemon.config_docs`; change the dataclasses instead. -->

# Configuration of cenoted

Without any configuration `cenoted` serves one pool called `default` in named shared memory, with
min(4 GiB, a quarter of the memory that it may use), to the user who started it.

A value comes from the first of these that has it:

1. a flag (`cenoted --help`),
2. the environment (`{ENV_PREFIX}<KEY>`, see the table at the end; an empty variable is not set),
3. the TOML file: `--config FILE`, else `${CONFIG_ENV}`, else `/etc/cenote/cenoted.toml` if that
   exists,
4. the default.

`cenoted --check` prints the outcome and exits; it exits with status 2 and a list of all mistakes,
each with file, line and remedy, when there is one. Unknown keys are mistakes.

Sizes are `"4GiB"` (powers of 1024) or `"4GB"` (powers of 1000); bare integers are bytes. Paths in
the file are absolute. SIGHUP reads everything again. What is marked *live* changes at once; *new
sessions* means that it holds for sessions attached from then on, as one is told when it attaches;
a log line says what has to wait for the next start. Examples, one a medium, are in
`deploy/examples`.
"""

_SECTIONS = (
    ("[daemon]", DaemonConfig),
    ("[[pool]]", PoolConfig),
    ("[[pool.region]]", RegionConfig),
    ("[pool.access]", AccessConfig),
    ("[[pool.tenant]]", TenantConfig),
)


def render() -> str:
    """Return the whole text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    parts += ["\n".join(_section(header, cls)) + "\n" for header, cls in _SECTIONS]
    parts.append("\n".join(_flags()) + "\n")
    return "\n".join(parts)


def _section(header: str, cls: type) -> Iterator[str]:
    yield f"## `{header}`"
    yield ""
    yield _paragraph(cls.__doc__ or "")
    yield ""
    yield "| key | default | change | meaning | allowed |"
    yield "|---|---|---|---|---|"
    for key, option in options(cls).items():
        mark = "live" if option.metadata["live"] else "restart"
        mark = "new sessions" if option.metadata["at_attach"] else mark
        kind = option.metadata["kind"]
        default = option.metadata["default_text"] or _default(option.default, kind.show)
        cells = (f"`{key}`", default, mark, option.metadata["doc"], kind.allowed)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: object, show: object) -> str:
    assert callable(show)
    if value is None or value == "":
        return "none"
    if isinstance(value, str):
        return f'`"{value}"`'
    shown = show(value)
    # What is no number or truth value is a string in TOML.
    return f"`{shown}`" if shown == str(value) or isinstance(value, bool) else f'`"{shown}"`'


def _paragraph(doc: str) -> str:
    return "\n".join(line.strip() for line in doc.strip().splitlines())


def _flags() -> Iterator[str]:
    yield "## Flags and environment"
    yield ""
    yield "A flag that concerns one pool, or one region, is refused when the file has several."
    yield ""
    yield "| flag | environment | sets | meaning |"
    yield "|---|---|---|---|"
    yield f"| `--config FILE` | `{CONFIG_ENV}` | | the TOML file |"
    for flag in FLAGS:
        sets = {"daemon": "[daemon]", "pool": "[[pool]]", "region": "[[pool.region]]"}[flag.section]
        written = f"--{flag.name} {flag.metavar}".strip()
        value = f"={flag.constant}" if flag.constant else ""
        yield f"| `{written}` | `{flag.variable}{value}` | `{sets}` `{flag.key}` | {flag.help} |"
    yield "| `--reformat` | | | begin with empty pools, whatever is there |"
    yield "| `--take-over` | | | kill a daemon that serves these pools, and go on in its place |"
    yield "| `--drop` | | | free what is left of these pools, then exit |"
    yield "| `--check` | | | validates and prints the configuration, then exits |"
    yield "| `--version` | | | prints the version |"


if __name__ == "__main__":
    sys.stdout.write(render())
