# SPDX-License-Identifier: Apache-2.0
"""
Every step of every catalog change carries a crash point; a keeper dies at each of them.

The deaths are in tests/c/crash_points.c. Here: no point of the core is left out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROUNDS = 1


@pytest.mark.timeout(600)
def test_a_keeper_dies_at_every_crash_point_of_the_core(project_root: Path) -> None:
    """
    Each `CN_CRASH_POINT` in the source is one at which a keeper died and another took over, with
    every chunk there and no table wrong: a new point that the scenario does not reach fails here.
    """
    if shutil.which("make") is None or shutil.which("cc") is None:
        pytest.skip("no make or no C compiler")
    command = ["make", "-s", "-C", str(project_root / "tests" / "c"), "crash", f"ARGS={ROUNDS}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    died_at = set(re.findall(r"^covered (\w+)$", ran.stdout, re.MULTILINE))
    in_source = {
        point
        for file in (project_root / "cffi_src" / "src").glob("*.c")
        for point in re.findall(r"CN_CRASH_POINT\((\w+)\)", file.read_text(encoding="utf-8"))
    }
    assert len(in_source) > 40
    assert died_at == in_source
