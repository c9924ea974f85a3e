# SPDX-License-Identifier: Apache-2.0
"""docs/memory-layout.md says what the compiled core has."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def generator(project_root: Path) -> ModuleType:
    """The script that writes the page."""
    name = "gen_layout_doc"
    path = project_root / "cffi_src" / "ffi" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_compiled_core_has(generator: ModuleType) -> None:
    """
    Sizes, offsets, constants and the fingerprint on the page are those of this build.
    """
    assert generator.TARGET.read_text(encoding="utf-8") == generator.document()


def test_every_structure_and_field_is_on_the_page(generator: ModuleType) -> None:
    """
    No structure, field, enumeration or constant of the header is left out.
    """
    layout = generator.Layout.load()
    page = generator.document()
    names = set(re.findall(r"\b(?:CN_[A-Z_0-9]+)\b", re.sub(r"/\*.*?\*/", "", layout.header)))
    for struct in re.findall(r"^struct (\w+) \{", layout.header, re.MULTILINE):
        assert f"### {struct}: " in page
        names |= {field for field, _ in layout.ffi.typeof(f"struct {struct}").fields}

    assert {name for name in names if f"`{name}`" not in page} == set()


def test_a_structure_without_prose_is_an_error(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Nobody adds a structure without saying who writes it and when it is valid.
    """
    prose = tmp_path / "prose.md"
    prose.write_text(generator.PROSE.read_text(encoding="utf-8").replace("{{cn_cold}}", ""))
    monkeypatch.setattr(generator, "PROSE", prose)

    with pytest.raises(ValueError, match="cn_cold"):
        generator.document()


def test_the_fingerprint_covers_every_field(generator: ModuleType, project_root: Path) -> None:
    """
    Two builds that differ in any shared field have different fingerprints.
    """
    folded = (project_root / "cffi_src/src/cn_abi.c").read_text(encoding="utf-8")
    ffi = generator.Layout.load().ffi
    shared = re.findall(r"SIZE\((\w+)\);", folded)
    missing = [
        f"{name}.{field}"
        for name in shared
        for field, _ in ffi.typeof(f"struct {name}").fields
        if not field.startswith("reserved") and f"FIELD({name}, {field})" not in folded
    ]

    assert shared
    assert missing == []
