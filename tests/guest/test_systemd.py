# SPDX-License-Identifier: Apache-2.0
"""
The unit of deploy/ under a real systemd: what survives kill -9, restart, stop and the rest (I7).

Each release of Debian below is booted once, in QEMU and without KVM if need be, and goes through
all cases of inside_systemd.py; the tests look at what each came to. `make test-guest` makes the
guests.

Environment: CENOTE_GUEST_DIR, where they are: build/guest unless it says otherwise.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from cenote.shm.takeover import DIRTY_STARTS_MAX

SUITES: Final = {"trixie": 257, "bookworm": 252}  # and their systemd
PRESERVES: Final = 254  # from here on the store outlives a stop
FORGETS: Final = 257  # until here a stopped unit that is not enabled is forgotten with its store
LIMIT_S: Final = 1200  # for a hang; a quiet machine needs one or two minutes
CASES: Final = (
    *("install", "start", "crash", "restart", "stop_start", "other_dies", "other_dies_meanwhile"),
    *("many_sessions", "small_store", "clean", "dies_again_and_again", "disabled"),
)
NOT_BEFORE_254: Final = ("clean", "small_store")
OF_THE_POOL: Final = 2  # descriptors: catalog, region
OF_A_SESSION: Final = 3  # segment, doorbell, process

pytestmark = [pytest.mark.guest, pytest.mark.timeout(LIMIT_S + 60)]


class Guest:
    """What the cases came to in one guest."""

    def __init__(self, systemd: int, said: str) -> None:
        self.systemd = systemd
        self.said = said
        lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"case"')]
        self._cases = {line["case"]: line for line in lines}

    def __getitem__(self, case: str) -> dict[str, Any]:
        """Return the facts of a case."""
        if self.systemd < PRESERVES and case in NOT_BEFORE_254:
            pytest.skip(f"systemd {self.systemd} has no such thing: only from {PRESERVES} on")
        line = self._cases.get(case) or pytest.fail(f"it did not come to {case!r}: {self.said}")
        if "error" in line:
            pytest.fail(f"{line['error']}\n{self.said}")
        facts: dict[str, Any] = line["facts"]
        return facts

    def timings(self) -> str:
        """Return how long each case took, for people."""
        return ", ".join(f"{name} {line['seconds']} s" for name, line in self._cases.items())


def missing() -> str:
    """Say what this machine lacks for a guest; "" when it is all there."""
    if platform.machine() != "x86_64":
        return "guests are made for x86_64 only"
    return ", ".join(
        f"{package} is not installed"
        for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("cpio", "cpio"))
        if shutil.which(program) is None
    )


def fill(payload: Path, root: Path) -> None:
    """Gather what the guest gets: cenote as it is imported here, the unit, the cases."""
    ignore = shutil.ignore_patterns("__pycache__", "*.c", "*.h")
    for name in ("_native", "client", "daemon", "numa", "shm"):
        init = importlib.import_module(f"cenote.{name}").__file__
        assert init is not None
        target = payload / "lib" / "cenote" / name
        shutil.copytree(Path(init).parent, target, ignore=ignore)
    shutil.copy(root / "deploy" / "systemd" / "cenoted.service", payload)
    shutil.copy(root / "tests" / "guest" / "inside_systemd.py", payload)


@pytest.fixture(scope="module", params=SUITES)
def guest(
    request: pytest.FixtureRequest, project_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """A guest that went through all cases."""
    suite = request.param
    folder = Path(os.environ.get("CENOTE_GUEST_DIR", project_root / "build" / "guest")) / suite
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    if not (folder / "root.img").exists():
        pytest.skip(f"there is no guest with {suite}; `make test-guest` makes it")
    payload = tmp_path_factory.mktemp("guest") / "payload"
    fill(payload, project_root)
    cases = [c for c in CASES if SUITES[suite] >= PRESERVES or c not in NOT_BEFORE_254]
    argv = [project_root / "tests" / "guest" / "guestrun.sh", folder, payload, str(LIMIT_S)]
    ran = subprocess.run(
        [*argv, "python3", "-P", "inside_systemd.py", *cases],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    made = Guest(SUITES[suite], ran.stdout + ran.stderr)
    yield made
    print(f"\n{suite}, systemd {made.systemd}: {made.timings()}")


def assert_same(facts: dict[str, Any]) -> None:
    """The pool, its 100 chunks, the client's session and its views are what they were."""
    assert facts["other_process"]
    assert facts["views_good"]
    assert facts["same_pool"]
    assert facts["same_session"]
    assert facts["good_chunks"] == facts.get("chunks", 100)


def test_the_unit_runs(guest: Guest) -> None:
    """
    It starts as docs/operations.md says, systemd's store has what a pool and a session are made of,
    and nothing is warned of.
    """
    installed, facts = guest["install"], guest["start"]

    assert installed == {"version": guest.systemd, "store_max": 8192}
    assert facts["state"] == "active"
    assert facts["good_chunks"] == 100
    assert facts["stored"] == OF_THE_POOL + OF_A_SESSION
    assert facts["warnings"] == []
    if guest.systemd >= PRESERVES:
        parts = ("catalog", "r0", "s*", "s*.bell", "s*.pid")
        assert facts["names"] == [f"default.*.{part}" for part in parts]


def test_a_crash_costs_nothing(guest: Guest) -> None:
    """
    kill -9: lookups go on without a daemon, systemd starts the next one, which has every chunk.
    """
    facts = guest["crash"]

    assert_same(facts)
    assert facts["restarts"] == 1
    assert facts["found_without_daemon"] == 100
    (taken,) = facts["taken_over"]
    assert (taken["clean"], taken["chunks"], taken["sessions"]) == (False, 100, 1)
    assert facts["stored"] == OF_THE_POOL + OF_A_SESSION


def test_a_restart_costs_nothing(guest: Guest) -> None:
    """`systemctl restart`: the same, and clean."""
    facts = guest["restart"]

    assert_same(facts)
    (taken,) = facts["taken_over"]
    assert (taken["clean"], taken["chunks"], taken["unverified"]) == (True, 100, 0)
    assert facts["stored"] == OF_THE_POOL + OF_A_SESSION


def test_a_stop_and_a_start(guest: Guest) -> None:
    """
    From systemd 254 on it is a restart that takes long, even over daemon-reload and daemon-reexec.
    Before, the pool ends with the stop; who reads it goes on, and uses the next one.
    """
    facts = guest["stop_start"]

    assert facts["state"] == "inactive"
    assert facts["found_without_daemon"] == 100
    assert facts["stored"] == OF_THE_POOL + OF_A_SESSION
    if guest.systemd >= PRESERVES:
        assert_same(facts)
        assert facts["stored_stopped"] == OF_THE_POOL + OF_A_SESSION
        assert facts["taken_over"][0]["clean"]
    else:
        assert facts["views_good"]
        assert not facts["same_pool"]
        assert (facts["stored_stopped"], facts["good_chunks"]) == (0, 0)


def test_a_dead_client_leaves_the_store(guest: Guest) -> None:
    """While the daemon runs, and while it does not; a client that lives stays in it (I6)."""
    facts, meanwhile = guest["other_dies"], guest["other_dies_meanwhile"]

    assert facts["with_other"] == facts["before"] + OF_A_SESSION
    assert facts["after"] == facts["before"]
    assert meanwhile["taken_over"][0]["sessions"] == 3
    assert meanwhile["same_session"]
    assert meanwhile["with_living"] == OF_THE_POOL + 2 * OF_A_SESSION


def test_sessions_that_come_and_go_leave_nothing(guest: Guest) -> None:
    """300 of them: the daemon has as many descriptors as before, and systemd as well."""
    facts = guest["many_sessions"]

    assert facts["after"] == facts["before"]


def test_a_store_that_is_too_small_refuses_sessions(guest: Guest) -> None:
    """
    systemd's own number counts more than the unit's variable: the client is told of a limit.
    """
    facts = guest["small_store"]

    assert facts["same_session"]
    assert "can open no session now" in facts["refused"]


def test_a_cleaned_store_means_an_empty_pool(guest: Guest) -> None:
    """`systemctl clean --what=fdstore`: a new pool; the client keeps its views, and uses it."""
    facts = guest["clean"]

    assert facts["stored_stopped"] == 0
    assert not facts["same_pool"]
    assert facts["good_chunks"] == 0
    assert facts["views_good"]
    assert facts["stored"] == OF_THE_POOL + OF_A_SESSION


def test_a_pool_that_kills_its_daemons_is_given_up_before_the_service(guest: Guest) -> None:
    """
    The daemon's rule comes before systemd's start limit: an empty pool, and an active service. The
    old pool stays in the store, for `cenote verify`.
    """
    facts = guest["dies_again_and_again"]

    assert facts["state"] == "active"
    assert facts["views_good"]
    if not facts["given_up"]:
        pytest.skip(f"this machine is too slow: {facts['kills']} starts took more than a minute")
    assert f"died {DIRTY_STARTS_MAX + 1} times" in facts["given_up"][0]
    assert not facts["same_pool"]
    assert facts["stored"] == 2 * (OF_THE_POOL + OF_A_SESSION)


def test_a_service_that_is_not_enabled_is_forgotten(guest: Guest) -> None:
    """
    Stopped, and nothing wants it: systemd unloads the unit and empties its store, whatever it is
    told to preserve. Later releases keep it, and then this test has nothing to say.
    """
    facts = guest["disabled"]

    assert facts["views_good"]
    assert facts["stored_stopped"] == 0 or guest.systemd > FORGETS
