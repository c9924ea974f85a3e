# SPDX-License-Identifier: Apache-2.0
"""
Write docs/memory-layout.md: sizes and offsets from the compiled core, meanings from cn_layout.h.

Usage: python cffi_src/ffi/gen_layout_doc.py [--check]

What no compiler knows (who writes a structure, when it is valid, how it is read) stands in
layout_prose.md beside this file, a section a structure. A structure without one is an error.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
HEADER: Final = HERE.parent / "include" / "cn_layout.h"
PROSE: Final = HERE / "layout_prose.md"
TARGET: Final = HERE.parents[1] / "docs" / "memory-layout.md"

PAGE_BYTES: Final = 4096
GRANULE_BYTES: Final = 2 * 1024 * 1024
EXAMPLE_LEASE_SLOTS: Final = 8192
EXAMPLE_BYTES: Final = 4 * 1024**3
EXAMPLE_CHUNKS: Final = EXAMPLE_BYTES // (16 * 1024)
EXAMPLE_EVENTS: Final = 65_536

_MARKED: Final = re.compile(r"/\* cffi:begin \*/(.*?)/\* cffi:end \*/", re.DOTALL)
_STRUCT: Final = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.DOTALL | re.MULTILINE)
_ENUM: Final = re.compile(r"^enum (\w+) \{(.*?)\};", re.DOTALL | re.MULTILINE)
_FIELD: Final = re.compile(
    r"^ {4}\w+(?: \w+)* (\w+)(?:\[\w+(?: - \w+)?\])?;[ \t]*(/\*.*?\*/)?", re.DOTALL | re.MULTILINE
)
_ITEM: Final = re.compile(r"(CN_\w+) = \w+,?[ \t]*(/\*.*?\*/)?", re.DOTALL)
_DEFINE: Final = re.compile(r"^#define (CN_\w+) \S+[ \t]*(/\*.*?\*/)?", re.MULTILINE)
# a row of the table in the comment above struct cn_chunk: offset, size, field, writer, ordering
_ROW: Final = re.compile(r"^ \* +(\d+) +(\d+) +(\w+) {2,}(.+?) {2,}(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Layout:
    """The compiled core, and the header that it was compiled from."""

    ffi: Any
    lib: Any
    header: str

    @classmethod
    def load(cls) -> Layout:
        """Load the compiled core and read the header."""
        core = importlib.import_module("cenote._native._core")
        marked = _MARKED.search(HEADER.read_text(encoding="utf-8"))
        if marked is None:
            raise ValueError(f"{HEADER}: nothing between /* cffi:begin */ and /* cffi:end */")
        return cls(core.ffi, core.lib, marked.group(1))


def plain(comment: str | None) -> str:
    """Return a C comment as one line that a table can hold."""
    text = re.sub(r"^/\*|\*/$", "", comment or "")
    return re.sub(r"\s+", " ", text.replace("\n", " ")).strip().replace("|", "\\|")


def struct_table(layout: Layout, name: str, body: str) -> Iterator[str]:
    """Yield the rows of one structure."""
    notes = {found[0]: plain(found[1]) for found in _FIELD.findall(body)}
    if name == "cn_chunk":
        rows = _ROW.findall(layout.header)
        notes = {field: f"{writer}; {how}" for _, _, field, writer, how in rows}
    ctype = layout.ffi.typeof(f"struct {name}")
    yield "| offset | size | field | type | meaning |"
    yield "| ---: | ---: | --- | --- | --- |"
    for field, found in ctype.fields:
        if field not in notes:
            raise ValueError(f"struct {name}: {field} was not found in {HEADER.name}")
        size = layout.ffi.sizeof(found.type)
        kind = found.type.cname.removeprefix("struct ")
        yield f"| {found.offset} | {size} | `{field}` | {kind} | {notes[field]} |"


def enum_table(layout: Layout, body: str) -> Iterator[str]:
    """Yield the rows of one enumeration."""
    yield "| name | value | meaning |"
    yield "| --- | ---: | --- |"
    for name, comment in _ITEM.findall(body):
        yield f"| `{name}` | {getattr(layout.lib, name)} | {plain(comment)} |"


def constants(layout: Layout) -> Iterator[str]:
    """Yield the rows of all constants."""
    yield "| name | value | meaning |"
    yield "| --- | ---: | --- |"
    for name, comment in _DEFINE.findall(layout.header):
        value = getattr(layout.lib, name)
        text = hex(value) if value > 2**32 or name == "CN_ENDIAN" else f"{value:,}"
        yield f"| `{name}` | {text} | {plain(comment)} |"


def page_up(value: int) -> int:
    """Round up to whole pages."""
    return -(-value // PAGE_BYTES) * PAGE_BYTES


def size_of(layout: Layout, name: str) -> int:
    """Return the size of a structure."""
    return int(layout.ffi.sizeof(f"struct {name}"))


def areas(parts: list[tuple[str, int]], total: int) -> Iterator[str]:
    """Yield the rows of an object cut into *parts* (what, bytes), each on a page of its own."""
    yield "| offset | bytes | what |"
    yield "| ---: | ---: | --- |"
    at = 0
    for what, bytes_ in parts:
        yield f"| {at:,} | {bytes_:,} | {what} |"
        at = page_up(at + bytes_)
    if at != total:
        raise ValueError(f"the parts end at {at}, and the compiled core says {total}")


def session_areas(layout: Layout) -> Iterator[str]:
    """Yield where the parts of a session segment begin, for the default number of slots."""
    lib, slots = layout.lib, EXAMPLE_LEASE_SLOTS
    parts = [
        ("`cn_session_head`", size_of(layout, "cn_session_head")),
        ("stock: `cn_stock_row[8]`", lib.CN_STOCK_ROWS * size_of(layout, "cn_stock_row")),
        ("lease table: `uint64_t[lease_slots]`", slots * 8),
        ("submission ring: `cn_record[1024]`", lib.CN_RING_RECORDS * size_of(layout, "cn_record")),
        (
            "completion ring: `cn_completion[256]`",
            lib.CN_COMPLETIONS * size_of(layout, "cn_completion"),
        ),
        ("access log: `uint64_t[8192]`", lib.CN_ACCESS_SLOTS * 8),
    ]
    yield from areas(parts, lib.cn_session_segment_bytes(slots))


def catalog_areas(layout: Layout) -> Iterator[str]:
    """Yield where the areas of a catalog begin, for one region of 4 GiB with default settings."""
    ffi, lib, chunks = layout.ffi, layout.lib, EXAMPLE_CHUNKS
    form = ffi.new("struct cn_format *")
    name = ffi.new("char[]", b"example")
    form.chunk_count, form.event_count, form.region_count = chunks, EXAMPLE_EVENTS, 1
    form.lease_slots, form.pool_name = EXAMPLE_LEASE_SLOTS, name
    form.regions[0].bytes = EXAMPLE_BYTES
    buckets = 1
    while buckets < chunks * 2 // lib.CN_BUCKET_ENTRIES:
        buckets *= 2
    parts = [
        ("`cn_super`", size_of(layout, "cn_super")),
        ("descriptors: `cn_chunk[chunk_count]`", chunks * size_of(layout, "cn_chunk")),
        ("cold records: `cn_cold[chunk_count]`", chunks * size_of(layout, "cn_cold")),
        ("index: `cn_bucket[bucket_count]`", buckets * size_of(layout, "cn_bucket")),
        ("slab table: `uint64_t` a granule of 2 MiB", EXAMPLE_BYTES // GRANULE_BYTES * 8),
        ("`cn_namespace[4096]`", lib.CN_NAMESPACES_MAX * size_of(layout, "cn_namespace")),
        (
            "session registry: `cn_session_entry[1024]`",
            lib.CN_SESSIONS_MAX * size_of(layout, "cn_session_entry"),
        ),
        ("event feed: `cn_event[event_count]`", EXAMPLE_EVENTS * size_of(layout, "cn_event")),
    ]
    yield from areas(parts, lib.cn_catalog_bytes(form))


def inserted(layout: Layout) -> dict[str, str]:
    """Return every piece that the prose may ask for by a line `{{name}}`."""
    found = {
        "constants": constants(layout),
        "catalog_areas": catalog_areas(layout),
        "session_areas": session_areas(layout),
        "version": iter([str(layout.lib.CN_LAYOUT_VERSION)]),
        "fingerprint": iter([f"{layout.lib.cn_abi_fingerprint():#018x}"]),
    }
    for name, body in _STRUCT.findall(layout.header):
        found[name] = struct_table(layout, name, body)
        found[f"size:{name}"] = iter([f"{size_of(layout, name):,}"])
    for name, body in _ENUM.findall(layout.header):
        found[name] = enum_table(layout, body)
    return {name: "\n".join(lines) for name, lines in found.items()}


def document() -> str:
    """
    Return the whole page.

    Raises:
        ValueError: The prose asks for what is not there, or leaves out a structure.
    """
    pieces = inserted(Layout.load())
    prose = PROSE.read_text(encoding="utf-8")
    wanted = set(re.findall(r"\{\{([\w:]+)\}\}", prose))
    missing = {name for name in pieces if not name.startswith("size:")} - wanted
    if missing or wanted - set(pieces):
        raise ValueError(f"{PROSE.name}: lacks {missing or 'nothing'}, asks for {wanted}")
    return re.sub(r"\{\{([\w:]+)\}\}", lambda found: pieces[found.group(1)], prose)


def main() -> int:
    """Write the page, or say that it is not what the compiled core has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 on a difference"
    )
    check = parser.parse_args().check

    text = document()
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    if check:
        print(f"docs/{TARGET.name} is not what the compiled core has; run {Path(__file__).name}")
        return 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
