# SPDX-License-Identifier: Apache-2.0
"""What `cenote verify` found, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from cenote.shm import units
from cenote.shm.verify import KINDS, Finding, Found, Report

from . import common
from .common import counted, number, size

if TYPE_CHECKING:
    from rich.console import Group

SHOWN_MAX: Final = 3  # examples of a kind; --json has more


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as it goes out for programs."""
    return {
        "pool": report.pool,
        "pool_id": report.pool_id.hex(),
        "serving": report.serving,
        "wrong": report.wrong,
        "walked": report.walked,
        "states": report.states,
        "findings": [_found(report, found) for found in _in_order(report)],
        "left": report.left or None,
        "repaired": report.repaired,
        "notes": report.notes,
    }


def _found(report: Report, found: Found) -> dict[str, Any]:
    kind = KINDS[found.kind]
    return {
        "kind": kind.name,
        "what": kind.what,
        "count": found.count,
        "heals": report.heals(kind.name),
        "examples": [_example(finding) for finding in found.examples],
    }


def _example(finding: Finding) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(finding).items() if name != "kind"}
    return {**fields, "key": finding.key.hex() if finding.key is not None else None}


def _in_order(report: Report) -> list[Found]:
    return [report.found[name] for name in KINDS if name in report.found]


# ---- for people ---------------------------------------------------------------------------------


def show(report: Report) -> Group:
    """Return the report as it goes to a terminal."""
    from rich.console import Group

    state = "serving" if report.serving else f"no daemon, left {report.left.get('state', '')}"
    rows = [
        ("pool", f"{report.pool}  {report.pool_id.hex()}  {state}"),
        ("catalog", str(report.left.get("catalog", ""))),
        ("tables", _tables(report)),
        ("states", ", ".join(f"{number(n)} {name}" for name, n in report.states.items() if n)),
        ("bytes", _bytes(report)),
        ("leases", number(report.walked["leases"] or 0) if "leases" in report.walked else ""),
        ("takeover", _takeover(report)),
        ("repair", _repair(report)),
        ("verdict", _verdict(report)),
    ]
    parts: list[Any] = [common.pairs(rows)]
    if report.found:
        parts += ["", _findings(report), *_examples(report)]
    parts += [f"note: {note}" for note in report.notes]
    return Group(*parts)


def _tables(report: Report) -> str:
    walked = report.walked
    parts = (
        f"{counted(int(walked['chunks'] or 0), 'chunk')} of {number(walked['descriptors'] or 0)}",
        counted(int(walked["entries"] or 0), "index entry").replace("entrys", "entries"),
        counted(int(walked["slabs"] or 0), "slab"),
        counted(int(walked["namespaces"] or 0), "namespace"),
        counted(int(walked["sessions"] or 0), "session"),
    )
    return f"{', '.join(parts)}  in {units.format_duration(float(walked['tables_s'] or 0))}"


def _bytes(report: Report) -> str:
    walked = report.walked
    if "checked" not in walked:
        return "not checked"
    speed = f"{walked['gb_per_s'] or 0:.1f} GB/s"
    took = units.format_duration(float(walked["bytes_s"] or 0))
    text = counted(int(walked["checked"] or 0), "chunk")
    text += f", {size(int(walked['checked_bytes'] or 0))}  in {took}, {speed}"
    rest = {
        "without a checksum": "unrecorded",
        "left meanwhile": "left",
        "could not be reached": "unread",
    }
    for said, name in rest.items():
        if walked[name]:
            text += f"; {number(walked[name] or 0)} {said}"
    return text


def _takeover(report: Report) -> str:
    left = report.left
    if not left:
        return ""
    if not left["this_boot"]:
        return "none: this host was started again since, so the next daemon makes a new pool"
    if not left["takes_over"]:
        return "none: the next daemon makes a new pool, and leaves this one alone"
    does = {
        "links": "links {} to the index",
        "twins": "drops {} that were being moved",
        "dying": "lets {} go that were leaving",
    }
    parts = [text.format(counted(left[name], "chunk")) for name, text in does.items() if left[name]]
    if left["unindexes"]:
        entries = "entry" if left["unindexes"] == 1 else "entries"
        parts.append(f"clears {number(left['unindexes'])} index {entries}")
    return "the next daemon goes on with it" + (f"; it {', '.join(parts)}" if parts else "")


def _repair(report: Report) -> str:
    if report.repaired is None:
        return ""
    return f"{counted(report.repaired, 'chunk')} dropped, as lost"


def _verdict(report: Report) -> str:
    if report.wrong:
        return counted(report.wrong, "thing") + (" is" if report.wrong == 1 else " are") + " wrong"
    return "all right"


def _findings(report: Report) -> Any:
    made = common.table("kind", "count", "what", "", right=("count",))
    for found in _in_order(report):
        kind = KINDS[found.kind]
        remark = "left by a crash; the next daemon puts it right" if report.heals(kind.name) else ""
        made.add_row(kind.name, number(found.count), kind.what, remark)
    return made


def _examples(report: Report) -> list[str]:
    lines = [""]
    for found in _in_order(report):
        shown = found.examples[:SHOWN_MAX]
        lines += [f"{found.kind}: {_line(finding)}" for finding in shown]
        if found.count > len(shown):
            lines.append(f"{found.kind}: and {number(found.count - len(shown))} more")
    return lines


def _line(finding: Finding) -> str:
    parts = []
    if finding.descriptor is not None:
        parts.append(f"descriptor {finding.descriptor} generation {finding.generation}")
    if finding.key is not None:
        parts.append(f"key {finding.key.hex()[: common.KEY_SHOWN_CHARS]}…")
    if finding.namespace_slot is not None and finding.key is not None:
        parts.append(f"namespace slot {finding.namespace_slot}")
    if finding.data_off is not None:
        parts.append(f"region {finding.region} at {finding.data_off:#x}")
    return ", ".join(parts) + (": " if parts else "") + finding.text
