# SPDX-License-Identifier: Apache-2.0
"""Custody without processes: names, limits, and what systemd says in the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from cenote.daemon.custody import Custody, CustodyError, NoCustody, open_custody
from cenote.daemon.custody_base import check_keep
from cenote.daemon.custody_systemd import Environment
from cenote.daemon.holder import BATCH_MAX, KEPT_MAX, MESSAGE_MAX_BYTES
from cenote.shm.errors import CenoteError
from cenote.shm.paths import PathError

PID: Final = str(os.getpid())


def listen(fds: str = "2", names: str = "p.a:q.b", pid: str = PID) -> dict[str, str]:
    """Return what systemd says of descriptors."""
    return {"LISTEN_PID": pid, "LISTEN_FDS": fds, "LISTEN_FDNAMES": names}


def test_no_custody_keeps_nothing() -> None:
    """It can be used like any other, and keeps nothing."""
    custody: Custody = NoCustody()
    custody.keep({"a": 0})
    custody.drop(["a"])

    assert custody.left() == {}
    assert custody.where == "nowhere"
    custody.dissolve()
    custody.close()


@pytest.mark.parametrize("name", ["a", "s.17", "r-0", "x" * 64])
def test_names_that_custody_takes(name: str) -> None:
    """Lower case, digits, '.' and '-', up to 64."""
    check_keep("p", [], {name: 0})


@pytest.mark.parametrize("name", ["", "A", "a_b", "a:b", "a\n", "a/b", "é", "x" * 65])
def test_names_that_custody_refuses(name: str) -> None:
    """Among them what would be two fields of a notification, or two names of a list."""
    with pytest.raises(CustodyError, match="is no name for custody: use 1 to 64 of a-z"):
        check_keep("p", [], {name: 0})


def test_a_pool_may_keep_so_many() -> None:
    """A name that is kept already counts once (I10)."""
    kept = [str(number) for number in range(KEPT_MAX)]
    check_keep("p", kept, {"0": 0})
    with pytest.raises(CustodyError, match="4097 descriptors would be in custody"):
        check_keep("p", kept, {"x": 0})


def test_a_batch_fits_into_a_message() -> None:
    """Both limits belong together."""
    assert len("\n".join(["left", "9999", *["x" * 64] * BATCH_MAX])) <= MESSAGE_MAX_BYTES


def test_errors_of_custody_are_cenotes() -> None:
    """The daemon's start handles them like all others."""
    assert issubclass(CustodyError, CenoteError)


def test_only_pools_have_custody(tmp_path: Path) -> None:
    """A name with a dot would be another pool's names in systemd's store."""
    with pytest.raises(PathError, match="is no pool name"):
        open_custody(tmp_path, "a.b", {})


def test_names_are_for_this_process() -> None:
    """They are read where pid and count fit."""
    assert Environment.read(listen()).names() == ["p.a", "q.b"]
    assert Environment.read(listen(pid="1")).names() == []
    assert Environment.read(listen("0", "")).names() == []
    assert Environment.read({}).names() == []


@pytest.mark.parametrize(
    ("fds", "names"),
    [
        ("3", "p.a:q.b"),
        ("1", "p.a:q.b"),
        ("-2", "p.a:q.b"),
        ("two", "p.a:q.b"),
        ("²", "p.a:q.b"),
        ("2 ", "p.a:q.b"),
        ("2", ""),
        ("9" * 30, "p.a:q.b"),
        ("70000", ":".join(["p.a"] * 70_000)),
    ],
)
def test_nonsense_about_descriptors_is_logged(
    fds: str, names: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is taken for ours that may be something else."""
    assert Environment.read(listen(fds, names)).names() == []
    assert "listen_fds_unusable" in [record.message for record in caplog.records]


@pytest.mark.parametrize(
    ("environ", "stores"),
    [
        ({}, False),
        ({"NOTIFY_SOCKET": "/run/n"}, False),
        ({"NOTIFY_SOCKET": "/run/n", "FDSTORE": "0"}, False),
        ({"NOTIFY_SOCKET": "/run/n", "FDSTORE": "many"}, False),
        ({"NOTIFY_SOCKET": "/run/n", "FDSTORE": "8192"}, True),
        ({"NOTIFY_SOCKET": "@n", "FDSTORE": "1"}, True),
        ({"NOTIFY_SOCKET": "vsock:1:2", "FDSTORE": "8192"}, False),
        ({"FDSTORE": "8192"}, False),
        ({"NOTIFY_SOCKET": "/run/n", "CENOTED_FDSTORE_MAX": "8192"}, True),  # before systemd 254
        ({"NOTIFY_SOCKET": "/run/n", "CENOTED_FDSTORE_MAX": "8192", "FDSTORE": "0"}, False),
        ({"CENOTED_FDSTORE_MAX": "8192"}, False),
        ({"NOTIFY_SOCKET": "/run/n", **listen()}, True),
        ({"NOTIFY_SOCKET": "/run/n", **listen(pid="1")}, False),
        ({"NOTIFY_SOCKET": "/run/n", **listen("1", "p2.a")}, False),
    ],
)
def test_when_systemd_keeps_descriptors(environ: dict[str, str], stores: bool) -> None:
    """It says how many, or has given us some of this pool's already; and it listens."""
    assert Environment.read(environ).stores("p") is stores
