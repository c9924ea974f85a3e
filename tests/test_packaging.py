# SPDX-License-Identifier: Apache-2.0
"""The package's own metadata against the folders on disk."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pytest

SPDX: Final = "SPDX-License-Identifier: Apache-2.0"
SOURCE_SUFFIXES: Final = {".py", ".pyi", ".c", ".h", ".sh", ".toml", ".mk"}
SOURCE_NAMES: Final = {
    *("Makefile", "run", "test-c", "test-guest", "test-python-asan", "test-wheel", "setup-vllm")
}
# what git ignores, and what others unpack into a checkout
NOT_OURS: Final = {
    *(".git", ".venv", ".venv-vllm", "build", "dist", "typings", "__pycache__", "node_modules")
}


def source_files(root: Path) -> Iterator[Path]:
    """Yield every source file of the checkout, each once."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        ours = not (NOT_OURS & set(parts)) and not any(p.endswith("_cache") for p in parts)
        named = path.suffix in SOURCE_SUFFIXES or path.name in SOURCE_NAMES
        if ours and named and path.is_file():
            yield path


@pytest.fixture(scope="module")
def pyproject(project_root: Path) -> dict[str, Any]:
    """The parsed pyproject.toml."""
    return tomllib.loads((project_root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def package_dir(pyproject: dict[str, Any]) -> dict[str, str]:
    """Top-level package -> folder."""
    mapped: dict[str, str] = pyproject["tool"]["setuptools"]["package-dir"]
    return mapped


def test_every_folder_with_code_is_a_listed_package(
    project_root: Path, pyproject: dict[str, Any], package_dir: dict[str, str]
) -> None:
    """
    The list of packages equals the folders that hold an __init__.py: an unlisted one would import
    in the checkout and be absent from the wheel.
    """
    on_disk = {
        ".".join([package, *init.parent.relative_to(project_root / folder).parts])
        for package, folder in package_dir.items()
        for init in (project_root / folder).rglob("__init__.py")
    }

    assert sorted(on_disk) == pyproject["tool"]["setuptools"]["packages"]


def test_no_module_lies_outside_a_package(project_root: Path, package_dir: dict[str, str]) -> None:
    """
    Each .py file of a mapped folder is in a package, but for the build scripts in cffi_src/ffi.
    """
    stray = [
        str(path.relative_to(project_root))
        for folder in package_dir.values()
        for path in (project_root / folder).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
        and path.parent != project_root / "cffi_src" / "ffi"
    ]

    assert not stray, "\n".join(stray)


def test_each_top_level_package_is_marked_as_typed(
    project_root: Path, package_dir: dict[str, str]
) -> None:
    """
    py.typed lies in each top-level package, and typings/cenote links to each of them.
    """
    for package, folder in package_dir.items():
        assert (project_root / folder / "py.typed").exists(), folder
        link = project_root / "typings" / "cenote" / package.removeprefix("cenote.")
        assert link.is_symlink(), link
        assert link.resolve() == (project_root / folder).resolve()


def test_installed_version_is_the_one_of_the_checkout(pyproject: dict[str, Any]) -> None:
    """
    The version stands in pyproject.toml alone, and the installed metadata and changelog agree.
    """
    assert metadata.version("cenote") == pyproject["project"]["version"]


def test_changelog_says_whether_a_pool_of_the_version_before_can_be_attached(
    project_root: Path, pyproject: dict[str, Any]
) -> None:
    """
    The newest version of the changelog is this one, and each version has its line on attaching.
    """
    text = (project_root / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    released = [s for s in sections if not s.startswith("Unreleased")]

    newest = released[0] if released else sections[0]
    assert newest.startswith(pyproject["project"]["version"])
    for section in released:
        assert re.search(r"^Attach compatibility: ", section, re.MULTILINE), section[:40]


def test_runtime_dependencies_are_the_ones_decided_on(pyproject: dict[str, Any]) -> None:
    """
    The core depends on six packages; docs/decisions/0001-dependencies.md says why these.
    """
    names = [re.split(r"[<>=~! ]", line)[0] for line in pyproject["project"]["dependencies"]]

    assert names == ["cffi", "msgpack", "numpy", "posix-ipc", "psutil", "rich"]


def test_core_imports_nothing_that_is_not_declared(
    project_root: Path, package_dir: dict[str, str]
) -> None:
    """
    What is imported when a module is imported comes from Python, from us, or from a dependency.
    """
    allowed = {"cffi", "msgpack", "numpy", "posix_ipc", "psutil", "rich", "cenote", "_cffi_backend"}
    wrong = []
    for folder in package_dir.values():
        for path in (project_root / folder).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import):
                    roots = {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    roots = {(node.module or "").split(".")[0]}
                else:
                    continue
                # the host of an adapter: which files may, stands in test_architecture.py
                host = {path.parent.name} if path.parent.parent.name == "adapters" else set()
                foreign = roots - allowed - host - sys.stdlib_module_names
                wrong += [f"{path.relative_to(project_root)}: {name}" for name in foreign]

    assert not wrong, "\n".join(wrong)


def test_each_source_file_names_its_licence(project_root: Path) -> None:
    """
    One of the first two lines (after #! or <!--) of every source file has the SPDX tag.
    """
    missing = [
        str(path.relative_to(project_root))
        for path in source_files(project_root)
        if path.stat().st_size > 0
        and SPDX not in "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:2])
    ]

    assert not missing, "\n".join(missing)


def test_licence_is_apache_2(project_root: Path) -> None:
    """
    LICENSE is the whole text of the Apache License, version 2.0.
    """
    text = (project_root / "LICENSE").read_text(encoding="utf-8")

    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_stubs_are_those_of_the_compiled_modules(project_root: Path) -> None:
    """
    _core.pyi and _short.pyi say what the compiled modules have.
    """
    ran = subprocess.run(
        [sys.executable, str(project_root / "cffi_src/ffi/gen_stub.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
