# SPDX-License-Identifier: Apache-2.0
"""What the configuration asks of the machine: cenote.daemon.config_host."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cenote.daemon.config_host import SaltError, memory_limit_bytes, read_salt


def test_salt_file(tmp_path: Path) -> None:
    """
    A private file of 16 to 1,024 bytes is read whole; anything else is refused with a remedy.
    """
    file = tmp_path / "salt"

    def write(data: bytes, mode: int = 0o600) -> str:
        file.write_bytes(data)
        file.chmod(mode)
        return str(file)

    uid = os.geteuid()
    assert read_salt(write(b"0123456789abcde\n"), uid) == b"0123456789abcde\n"
    bad: tuple[tuple[Callable[[], str], str], ...] = (
        (lambda: write(b"short"), "5 bytes"),
        (lambda: write(b"x" * 1025), "1025 bytes"),
        (lambda: write(b"x" * 32, 0o644), "chmod 0600"),
        (lambda: str(tmp_path), "no regular file|cannot be read"),
        (lambda: str(tmp_path / "absent"), "cannot be read"),
    )
    for path, match in bad:
        with pytest.raises(SaltError, match=match):
            read_salt(path(), uid)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(SaltError, match="no regular file"):
        read_salt(str(tmp_path / "pipe"), uid)


def _write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_memory_limit_is_the_smallest_of_the_groups(tmp_path: Path) -> None:
    """
    Version 2: own group and parents count, "max" does not, and the machine's memory bounds all.
    """
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    _write(
        tmp_path, a__b__memory_DOT_max="max\n", a__memory_DOT_max="500\n", memory_DOT_max="900\n"
    )

    assert memory_limit_bytes(1000, tmp_path, own) == 500
    assert memory_limit_bytes(100, tmp_path, own) == 100
    own.write_text("0::/a/../../gone/x\n")
    assert memory_limit_bytes(1000, tmp_path, own) <= 900


def test_memory_limit_of_version_1(tmp_path: Path) -> None:
    """
    Version 1: the memory controller's group, or its mount when the path is the host's.
    """
    own = tmp_path / "own"
    own.write_text("5:cpu:/x\n4:memory,hugetlb:/docker/123\n")
    _write(tmp_path, memory__memory_DOT_limit_in_bytes="700\n")

    assert memory_limit_bytes(1000, tmp_path, own) == 700


def test_no_groups_no_limit(tmp_path: Path) -> None:
    """
    Without control groups the machine's memory is the limit.
    """
    assert memory_limit_bytes(1000, tmp_path, tmp_path / "absent") == 1000
    assert memory_limit_bytes() > 0
