# SPDX-License-Identifier: Apache-2.0
"""What every test folder shares: where the project is, and skips that say what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `torch` where torch is not installed."""
    if importlib.util.find_spec("torch") is not None:
        return
    skip = pytest.mark.skip(reason="torch is not installed; `make demo` installs it")
    for item in items:
        if item.get_closest_marker("torch") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The root of the checkout; the tests that read sources ask for it."""
    if not (ROOT / "cffi_src").is_dir():
        pytest.skip("needs the checkout, and runs against an installed wheel without one")
    return ROOT
