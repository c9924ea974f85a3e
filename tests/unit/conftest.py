# SPDX-License-Identifier: Apache-2.0
"""What stands in for the CUDA runtime, for the tests of cuda.py and cudart.py."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("cudart_stand_in.c")
NAME = "libcudart-0a1b2c3d.so.13"  # as wheels rename it


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library and return its path."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to build what stands in for the CUDA runtime")
    path = tmp_path_factory.mktemp("cudart") / NAME
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{NAME}"]
    subprocess.run(["cc", *flags, "-o", str(path), str(SOURCE)], check=True)
    return path
