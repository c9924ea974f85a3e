# SPDX-License-Identifier: Apache-2.0
"""
What every test folder shares: where the project is, skips that say what is missing, and where a
skip is a failure.

Environment: CENOTE_NEVER_SKIP, a regular expression. A test whose reason to skip it matches fails:
what makes that test possible has been provided, so that it must have run.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEVER_SKIP: Final = os.environ.get("CENOTE_NEVER_SKIP", "")
NO_TORCH: Final = re.compile(r"could not import '(torch|transformers)'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `torch` where torch is not installed."""
    if importlib.util.find_spec("torch") is not None:
        return
    skip = pytest.mark.skip(reason="torch is not installed; `make demo` installs it")
    for item in items:
        if item.get_closest_marker("torch") is not None:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """
    Make failures of skips that would be green for ever.

    Without the marker `torch` a test that needs torch is selected only where torch is not.
    """
    report = yield
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return report
    reason = str(report.longrepr[2])
    if NO_TORCH.search(reason) and item.get_closest_marker("torch") is None:
        report.outcome, report.longrepr = "failed", f"mark it `torch`: {reason}"
    elif NEVER_SKIP and re.search(NEVER_SKIP, reason):
        report.outcome, report.longrepr = "failed", f"it must not be skipped here: {reason}"
    return report


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The root of the checkout; the tests that read sources ask for it."""
    if not (ROOT / "cffi_src").is_dir():
        pytest.skip("needs the checkout, and runs against an installed wheel without one")
    return ROOT
