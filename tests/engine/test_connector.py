# SPDX-License-Identifier: Apache-2.0
"""CenoteConnector and vLLM's scheduler in one process: what no engine on a CPU can show."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from tests.engine.inside import run_inside
from tests.engine.processes import NEXT

SPECS: Final = ("spec_async.py", "spec_runners.py", "spec_sleep.py")
RELEASES: Final = [
    pytest.param(False, id="0.32"),
    pytest.param(
        True,
        id="0.33",
        marks=pytest.mark.skipif(not NEXT.exists(), reason="no newer vLLM: run `make setup-vllm`"),
    ),
]


@pytest.mark.parametrize("newer", RELEASES)
def test_connector_without_an_engine(tmp_path: Path, newer: bool) -> None:
    """
    The tests of SPECS, in the environment that has vLLM, of either release.
    """
    run_inside(tmp_path, SPECS, ["connector_bed"], newer=newer)
