# SPDX-License-Identifier: Apache-2.0
"""Runs tests in the environment that has vLLM, with the pytest of this one."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.engine.processes import HERE, PYTHON, ROOT, engine_environment

PYTEST: Final = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")


def run_inside(
    folder: Path, files: Sequence[str], beds: Sequence[str], *, newer: bool = False
) -> None:
    """
    Run files of this folder, and fail with what pytest says if one of their tests does.

    Args:
        folder: An empty one.
        files: Names of files with tests.
        beds: Names of modules with their fixtures.
        newer: With the newer release of vLLM.
    """
    for name in PYTEST:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            at = Path(found.origin)
            at = at.parent if at.name == "__init__.py" else at
            (folder / at.name).symlink_to(at)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    environment = engine_environment(newer=newer)
    environment["PYTHONPATH"] += f":{folder}:{ROOT}"
    options = ["--noconftest", "-p", "no:cacheprovider"]
    for bed in beds:
        options += ["-p", f"tests.engine.{bed}"]

    done = subprocess.run(
        [str(PYTHON), "-m", "pytest", "-q", "-c", str(folder / "pytest.ini"), *options]
        + [str(HERE / name) for name in files],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
