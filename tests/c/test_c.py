# SPDX-License-Identifier: Apache-2.0
"""
The C tests, one pytest test each.

``CC``, ``SAN``, ``RUN`` and the other variables of the Makefile are taken from the environment, so
``SAN=thread pytest tests/c`` is the ThreadSanitizer run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).resolve().parent
TESTS: Final = sorted(path.stem for path in HERE.glob("test_*.c"))
EXIT_SKIP: Final = 77
VARIABLES: Final = ("CC", "SAN", "ONLY", "DEFS", "OPT", "BUILD")


def _make(*targets: str) -> subprocess.CompletedProcess[str]:
    """Run make with what the environment says about compiler and sanitizers."""
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    command = ["make", "-s", "--no-print-directory", "-C", str(HERE), *given, *targets]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """Build what builds, once; a test whose program does not build says so itself."""
    compiler = shlex.split(os.environ.get("CC", "gcc"))[0]
    for tool in ("make", compiler):
        if shutil.which(tool) is None:
            pytest.skip(f"the C tests need {tool}, which is not installed")
    _make("-k", "all")
    listed = _make("list").stdout.splitlines()
    return {name: Path(path) for name, path in (line.split(" ", 1) for line in listed)}


@pytest.mark.parametrize("name", TESTS)
def test_c(name: str, programs: dict[str, Path]) -> None:
    """The C program builds without a warning and all its checks hold."""
    built = _make(name)
    assert built.returncode == 0, built.stdout + built.stderr

    command = [*shlex.split(os.environ.get("RUN", "")), str(programs[name])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    if ran.returncode == EXIT_SKIP:
        pytest.skip(ran.stdout.strip().splitlines()[-1])
    assert ran.returncode == 0, f"exit status {ran.returncode}\n{ran.stdout}{ran.stderr}"
