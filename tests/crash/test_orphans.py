# SPDX-License-Identifier: Apache-2.0
"""What these tests start ends with them, also when nobody is left to end it."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).parent
PATIENCE_S: Final = 60.0  # a limit for a hang, not a claim about speed
CONFTEST: Final = """
import importlib.util
spec = importlib.util.spec_from_file_location("cenote_crash", {path!r})
crash = importlib.util.module_from_spec(spec)
spec.loader.exec_module(crash)
cenoted, zygote, freeze = crash.cenoted, crash.zygote, crash.freeze_fixture
"""
HANGS: Final = """
import os, signal

def test_that_hangs(cenoted, zygote, freeze):
    daemon, frozen = cenoted(), cenoted()
    freeze(frozen.pid)
    mother = zygote("mischief.py")
    parent = mother.spawn("parent_of_a_child", daemon.socket, 0)
    assert parent.line() == "0"
    grandchild = int(parent.line())
    stopped = mother.spawn("stopped_writer", daemon.socket)
    assert stopped.line() == "half"
    stopped.freeze()
    pids = [daemon.pid, frozen.pid, mother._process.pid, parent.pid, grandchild, stopped.pid]
    os.write(FD, " ".join(map(str, pids)).encode())
    signal.pause()
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_nothing_outlives_a_killed_pytest(tmp_path: Path) -> None:
    """
    kill -9 of pytest ends its daemons, its zygotes and all that these forked, frozen ones too.
    """
    ours, theirs = os.pipe()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST.format(path=str(HERE / "conftest.py")))
    (tmp_path / "test_hangs.py").write_text(HANGS.replace("FD", str(theirs)))
    inner = subprocess.Popen(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        pass_fds=[theirs],
        stdout=subprocess.DEVNULL,
    )
    os.close(theirs)
    try:
        pidfds = [os.pidfd_open(int(pid)) for pid in os.read(ours, 4096).split()]
    finally:
        inner.kill()
        inner.wait()
        os.close(ours)

    assert len(pidfds) == 6
    for pidfd in pidfds:
        ended, _, _ = select.select([pidfd], [], [], PATIENCE_S)
        os.close(pidfd)
        assert ended
