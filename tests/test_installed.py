# SPDX-License-Identifier: Apache-2.0
"""What `pip install` put in place.  Runs against the checkout and, in CI, against the wheel."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

PACKAGES = ("cenote._native", "cenote.numa", "cenote.shm", "cenote.client", "cenote.daemon")
NATIVE = ("_core", "_short", "_lease")


def modules_below(package: str, folder: str) -> Iterator[str]:
    """Name *package* and every module in it, without importing anything."""
    yield package
    for info in pkgutil.iter_modules([folder]):
        name = f"{package}.{info.name}"
        if info.ispkg:
            yield from modules_below(name, f"{folder}/{info.name}")
        else:
            yield name


def all_modules() -> list[str]:
    """Name every module of ours, adapters included: their engines are imported late."""
    found: list[str] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert spec.submodule_search_locations, package
        found += modules_below(package, next(iter(spec.submodule_search_locations)))
    return sorted(found)


@pytest.mark.parametrize("name", all_modules())
def test_every_module_imports(name: str) -> None:
    """Each module imports by itself, without torch and without an engine that does not load it."""
    if name.endswith("__main__"):
        pytest.skip("importing it runs it")
    try:
        assert importlib.import_module(name).__name__ == name
    except ModuleNotFoundError as error:
        # what vLLM loads derives from its classes; tests/test_architecture.py knows which that is
        if error.name != "vllm" or not name.startswith("cenote.client.adapters.vllm."):
            raise


@pytest.mark.parametrize("name", NATIVE)
def test_extension_exports_its_init_function_only(name: str) -> None:
    """A module of the C core is abi3 and exports nothing but PyInit, so nothing can clash."""
    module = importlib.import_module(f"cenote._native.{name}")
    path = str(module.__file__)
    assert path.endswith(".abi3.so")

    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert [s for s in symbols if s != f"PyInit_{name}" and not s.startswith("__")] == []


@pytest.mark.parametrize("command", ["cenote", "cenoted"])
def test_commands_are_installed(command: str) -> None:
    """Both console scripts exist and name a function that is there."""
    (entry,) = metadata.entry_points(group="console_scripts", name=command)

    assert callable(entry.load())


def test_wheel_holds_only_the_package() -> None:
    """An installed wheel brings cenote/ and its metadata: no C file, no test, no other folder."""
    distribution = metadata.distribution("cenote")
    files = distribution.files or []
    if any(path.name.startswith("__editable__") for path in files):
        pytest.skip("an editable install; `make test-wheel` runs this against the wheel")

    tops = {path.parts[0] for path in files} - {".."}
    assert tops == {"cenote", f"cenote-{distribution.version}.dist-info"}
    assert [str(p) for p in files if Path(p).suffix in {".c", ".h", ".o", ".a"}] == []
    assert [str(p) for p in files if "ffi" in p.parts] == []


def test_status_codes_and_exceptions_are_one_to_one() -> None:
    """Each status of the C core below CN_OK has an exception, and its text says what to do."""
    from cenote._native import _core, errors

    statuses = [
        value
        for name in dir(_core.lib)
        if name.startswith("CN_E") and -100 < (value := getattr(_core.lib, name)) < 0
    ]

    assert len(statuses) >= 16
    for status in statuses:
        error = errors.error_of(status, "doing this to that", errno=2)
        assert type(error) is not errors.CenoteError, status
        assert "doing this to that" in str(error)
        assert "unknown status" not in str(error)
