# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the sources and from a fresh interpreter."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

# package -> folder, and what it may import of ours besides itself (design: "Where things live")
FOLDERS: Final = {
    "cenote._native": "cffi_src",
    "cenote.numa": "numa",
    "cenote.shm": "shm",
    "cenote.client": "client",
    "cenote.daemon": "daemon",
}
MAY_IMPORT: Final = {
    "cenote._native": set[str](),
    "cenote.numa": {"cenote._native"},
    "cenote.shm": {"cenote._native", "cenote.numa"},
    "cenote.client": {"cenote.shm"},
    "cenote.daemon": {"cenote.numa", "cenote.shm"},
}
ENGINES: Final = {"torch", "transformers", "vllm", "sglang", "lmcache", "nixl"}
# What an engine loads by name, and the parts of it that derive from the engine's classes.
LOADED_BY_ENGINE: Final = {
    f"client/adapters/vllm/{name}.py": "vllm"
    for name in (
        "connector",
        "events",
        "metrics",
        "offload_manager",
        "offload_specs",
        "offload_worker",
        "offloading",
    )
}
DESERIALISERS: Final = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}


def modules_of(root: Path, package: str) -> Iterator[tuple[Path, ast.Module]]:
    """Yield each Python file of *package* with its syntax tree."""
    folder = root / FOLDERS[package]
    for path in sorted(folder.rglob("*.py")):
        if "ffi" not in path.relative_to(folder).parts:
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Yield each absolute import as (statement, full name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((node, name) for name in names)


def package_of(name: str) -> str:
    """Return the first two parts of a dotted name."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_import_only_what_lies_below(project_root: Path, package: str) -> None:
    """
    A package imports of ours only what the layers allow; modules of one folder import relatively.
    """
    wrong = [
        f"{path.relative_to(project_root)}:{node.lineno}: {name}"
        for path, tree in modules_of(project_root, package)
        for node, name in imports_of(tree)
        if name.split(".")[0] == "cenote"
        and package_of(name) not in MAY_IMPORT[package]
        # a sub-package names what is above it in full: `..` is banned
        and not (package_of(name) == package and path.parent.name != FOLDERS[package])
    ]

    assert not wrong, "\n".join(wrong)


def test_what_an_engine_loads_is_all_there(project_root: Path) -> None:
    """
    The exceptions are files, each of which imports its engine.
    """
    for name, engine in LOADED_BY_ENGINE.items():
        assert f"from {engine}." in (project_root / name).read_text()


@pytest.mark.parametrize("package", FOLDERS)
def test_engines_are_imported_inside_functions(project_root: Path, package: str) -> None:
    """
    No module imports an engine or torch when it is imported itself, and the daemon never does. But
    for those that the engine itself loads: they derive from its classes.
    """
    wrong = []
    for path, tree in modules_of(project_root, package):
        lazy = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        } | {
            id(node)
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
            for node in ast.walk(branch)
        }
        loaded_by = LOADED_BY_ENGINE.get(str(path.relative_to(project_root)))
        for node, name in imports_of(tree):
            if name.split(".")[0] not in ENGINES or name.split(".")[0] == loaded_by:
                continue
            if package not in {"cenote.client", "cenote.shm"} or id(node) not in lazy:
                wrong.append(f"{path.relative_to(project_root)}:{node.lineno}: {name}")

    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", FOLDERS)
def test_nothing_is_deserialised_into_code(project_root: Path, package: str) -> None:
    """
    No pickle and its relatives, no eval, no exec (I11).
    """
    wrong = []
    for path, tree in modules_of(project_root, package):
        where = path.relative_to(project_root)
        wrong += [
            f"{where}:{node.lineno}: {name}"
            for node, name in imports_of(tree)
            if name.split(".")[0] in DESERIALISERS
        ]
        wrong += [
            f"{where}:{node.lineno}: {node.func.id}()"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"eval", "exec", "compile", "__import__"}
        ]

    assert not wrong, "\n".join(wrong)


def loaded_by(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after *statement*."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_importing_the_client_loads_no_engine_and_no_server() -> None:
    """
    `import cenote.client` loads no engine, no torch, no asyncio, no terminal library, no daemon.
    """
    loaded = loaded_by("import cenote.client")

    assert loaded & (ENGINES | {"asyncio", "rich", "psutil"}) == set()
    assert [name for name in loaded if name.startswith("cenote.daemon")] == []
    assert [name for name in loaded if name.startswith("cenote.client.adapters.")] == []


def test_importing_the_daemon_loads_no_client() -> None:
    """
    `import cenote.daemon` loads nothing of the client and no engine.
    """
    loaded = loaded_by("import cenote.daemon")

    assert loaded & ENGINES == set()
    assert [name for name in loaded if name.startswith("cenote.client")] == []
