# SPDX-License-Identifier: Apache-2.0
"""The table for docs/performance.md, made from the JSON of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from . import registry
from .base import SIZES

COPY_MARK: Final = " °"
RATIO: Final = "× memcpy"  # noqa: RUF001  # the sign of multiplication is meant
FIRST: Final = "cenote"


def markdown(report: Mapping[str, Any]) -> str:
    """One row for each peer, then what failed, then where cenote does not lead."""
    results = report["peers"]
    sizes = " / ".join(_size(nbytes) for nbytes in SIZES)
    lookup, own = f"{report['lookup_keys']} keys µs", "memcpy µs, reader; writer"
    lines = [
        f"| {sizes} | get µs | get + copy µs | {RATIO} | put µs | {RATIO} | {lookup} | {own} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measured = [name for name in results if "figures" in results[name]]
    lines += [_row(name, results[name]["figures"]) for name in measured]
    if any(not registry.load(name).in_place for name in measured):
        lines += ["", f"{COPY_MARK.strip()} a private copy: this system gives no view in place."]
    failed = [name for name in results if "figures" not in results[name]]
    if failed:
        lines += ["", "Not measured:"]
        lines += [f"- {registry.load(name).title}: {results[name]['reason']}" for name in failed]
    behind = trailing(results)
    if behind:
        lines += ["", "Where cenote does not lead:", *(f"- {line}" for line in behind)]
    return "\n".join(lines) + "\n"


def trailing(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each operation in which somebody is ahead of cenote."""
    if "figures" not in results.get(FIRST, {}):
        return []
    lines = []
    for operation, nbytes, field in _operations():
        own = _figure(results[FIRST]["figures"], operation, nbytes)[field]
        others = {
            name: _figure(result["figures"], operation, nbytes)[field]
            for name, result in results.items()
            if name != FIRST and "figures" in result
        }
        ahead = sorted((value, name) for name, value in others.items() if value < own)
        if ahead:
            unit = RATIO if field == "x_memcpy" else "µs"
            what = f"{operation} {_size(nbytes)}" if nbytes else operation
            who = ", ".join(f"{registry.load(name).title} {value:.3g}" for value, name in ahead)
            lines.append(f"{what}: cenote {own:.3g} {unit}; {who}")
    return lines


def _operations() -> list[tuple[str, int, str]]:
    """Copies are compared by their ratio, which takes the machine's noise out of them."""
    fields = {"view": "us", "copy": "x_memcpy", "put": "x_memcpy"}
    timed = [(name, nbytes, field) for name, field in fields.items() for nbytes in SIZES]
    return [*timed, ("lookup", 0, "us")]


def _figure(figures: Mapping[str, Any], operation: str, nbytes: int) -> Mapping[str, float]:
    found: Mapping[str, float] = figures[operation][str(nbytes)] if nbytes else figures[operation]
    return found


def _row(name: str, figures: Mapping[str, Any]) -> str:
    peer = registry.load(name)

    def cell(operation: str, field: str) -> str:
        values = [_figure(figures, operation, nbytes)[field] for nbytes in SIZES]
        return " / ".join(_ratio(v) if field == "x_memcpy" else _time(v) for v in values)

    return (
        f"| {peer.title} | {cell('view', 'us')}{'' if peer.in_place else COPY_MARK} "
        f"| {cell('copy', 'us')} | {cell('copy', 'x_memcpy')} "
        f"| {cell('put', 'us')} | {cell('put', 'x_memcpy')} "
        f"| {_time(figures['lookup']['us'])} "
        f"| {cell('copy', 'memcpy_us')} ; {cell('put', 'memcpy_us')} |"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >> 20 else f"{nbytes >> 10} KiB"


def _time(us: float) -> str:
    if us < 10:
        return f"{us:.2f}"
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
