# SPDX-License-Identifier: Apache-2.0
"""
bench/storm.py, for a while: everybody is killed and stopped at random, the daemon as well, and
nothing that was stored is lost, nothing that was lent stays behind.

CENOTE_STORM_S (30) says for how long and CENOTE_CRASH_SEED (random) repeats a run: the choices
follow from it, the moments depend on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

SECONDS: Final = float(os.environ.get("CENOTE_STORM_S", "30"))
SEED: Final = os.environ.get("CENOTE_CRASH_SEED", "0")
PROGRAM: Final = Path(__file__).resolve().parents[2] / "bench" / "storm.py"

if not PROGRAM.exists():
    pytest.skip("bench/ is only in the checkout", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_is_lost_in_a_storm(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """No wrong byte, no chunk that went without an event, no lease or descriptor left behind."""
    report = tmp_path / "storm.json"
    command = [sys.executable, str(PROGRAM), "--seconds", str(SECONDS), "--seed", SEED]
    done = subprocess.run(
        [*command, "--json", str(report)], capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stderr
    found = json.loads(report.read_text())
    for name, value in found.items():
        record_property(name, value)
    print(f"CENOTE_CRASH_SEED={found['seed']} CENOTE_STORM_S={SECONDS}", done.stderr, sep="\n")
    assert found["violations"] == [], f"seed {found['seed']}"
    assert done.returncode == 0
    assert found["daemons_started"] > SECONDS / 10  # it was a storm
    assert found["flushed_keys_judged"] > 100 * SECONDS
