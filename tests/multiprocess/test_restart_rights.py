# SPDX-License-Identifier: Apache-2.0
"""Whose a kept pool is, and who may do what with it after a restart."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.multiprocess.restart_bed import holds, key_of, put, session_of

# ---- whose it is -----------------------------------------------------------------------------


def test_a_lock_on_what_a_client_was_given_says_nothing(start: Any, attach: Any) -> None:
    """A reader that waits for the lock on the catalog gets it with the daemon's death: so what."""
    first = start(medium="shm")
    _, cache = attach(first)
    put(cache, 1)
    first.kill()
    with contextlib.ExitStack() as held:
        for name in first.names():
            file = held.enter_context(Path("/dev/shm", name).open("rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = start(after=first)
        _, other = attach(second)
        assert holds(other, 1)


def test_pools_of_one_name_elsewhere_are_not_touched(
    start: Any, attach: Any, cenoted: Callable[..., Any], tmp_path: Path
) -> None:
    """What a daemon of another socket left is neither taken over nor dropped by this one."""
    first = start(medium="shm")
    _, cache = attach(first)
    put(cache, 1)
    first.stop()
    folder = tmp_path / "elsewhere"
    folder.mkdir(mode=0o700)
    for _ in range(2):  # ephemeral ones: they drop what is theirs at the beginning and at the end
        other = cenoted(medium="shm", pool=first.pool, path=folder / "x.sock")
        _, empty = attach(other)
        assert empty.get(key_of(1)) is None
        other.stop()
    _, again = attach(start(after=first))
    assert holds(again, 1)


def test_a_hello_takes_no_role_from_another_process(start: Any, attach: Any) -> None:
    """Whoever names a session and asks for less gets one of its own; the named one goes on."""
    daemon = start()
    pool, cache = attach(daemon)
    resume = pool._attachment.welcome.as_resume.fields()
    _channel, welcome, _fds = daemon.hello("reader", resume=resume)
    assert not welcome.resumed
    assert welcome.session != resume["session"]
    put(cache, 1)
    assert holds(cache, 1)


POOL = """
[[pool]]
name = "{pool}"
socket = "{socket}"
default_quota = "QUOTA"
[[pool.region]]
medium = "memfd"
size = "64MiB"
"""


def test_a_quota_of_the_new_configuration_holds(
    start: Any, attach: Any, cenoted: Callable[..., Any]
) -> None:
    """A namespace that is older than the daemon gets the quota that its tenant has now."""
    first = cenoted(config=POOL.replace("QUOTA", "0B"), keep=True)
    _, cache = attach(first)
    put(cache, *range(100))
    first.stop()
    config = POOL.replace("QUOTA", "2MiB")
    second = cenoted(config=config, path=first.socket, pool=first.pool, keep=True)
    pool, other = attach(second)
    put(other, *range(200, 220))
    assert pool.stats(timeout_s=30.0).bytes_used <= 2 * 2**20


def test_rights_are_those_of_the_new_configuration(
    start: Any, attach: Any, cenoted: Callable[..., Any]
) -> None:
    """A session whose user may only read from now on is a reader's, though it never says hello."""
    first = cenoted(config=POOL.replace("QUOTA", "0B"), keep=True)
    old, _ = attach(first, reconnect=False)
    first.stop()
    access = f'[pool.access]\nreaders = ["{os.geteuid()}"]\nadmins = ["65534"]\n'
    config = POOL.replace("QUOTA", "0B") + access
    second = cenoted(config=config, path=first.socket, pool=first.pool, keep=True)
    pool, _ = attach(second)
    listed = pool._control("sessions", {}, 30.0)["sessions"]
    (role,) = [each["role"] for each in listed if each["nonce"] == session_of(old)[2]]
    assert role == 1
    assert pool.role == "reader"
