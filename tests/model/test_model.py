# SPDX-License-Identifier: Apache-2.0
"""
The explorer under pytest: every schedule of the lock-free parts, and each planted defect is found.

``make test-model`` does the same without pytest; here it is marked slow.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).resolve().parent
PLANTS: Final = (
    "no-reader-fence",
    "no-keeper-fence",
    "no-clear-fence",
    "no-generation",
    "no-move-dying",
    "early-move-dying",
    "no-doorbell-fence",
    "no-sleep-fence",
    "no-waiter-fence",
    "forget-dying",
    "forget-granted",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("make") is None, reason="the explorer needs make"),
]


def _make(target: str) -> subprocess.CompletedProcess[str]:
    given = [f"{name}={os.environ[name]}" for name in ("CC", "BUILD") if name in os.environ]
    command = ["make", "-s", "--no-print-directory", "-C", str(HERE), *given, target]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_schedule_breaks_a_claim() -> None:
    """Every schedule of every two-task scenario, with at most one crash, holds its claim."""
    ran = _make("check-scenarios")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_defect_is_found(plant: str) -> None:
    """Without the fence or check there is a bad schedule; it is found, and replays."""
    ran = _make(plant)
    assert ran.returncode == 0, ran.stdout + ran.stderr
