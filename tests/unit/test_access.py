# SPDX-License-Identifier: Apache-2.0
"""From credentials to a role and a tenant: cenote.daemon.access, cenote.shm.identity."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cenote.daemon.access import AccessTable, SaltError
from cenote.daemon.config import AccessConfig, PoolConfig, TenantConfig
from cenote.daemon.config_kinds import Principal
from cenote.shm.identity import Peer, own_pidfd, peer_of, pid_of_pidfd, start_ns
from cenote.shm.wire import Refusal

ME = os.geteuid()


def user(number: int) -> Principal:
    return Principal("user", number, str(number))


def group(number: int) -> Principal:
    return Principal("group", number, f"@{number}")


def peer(uid: int, *gids: int) -> Peer:
    return Peer(pid=1, uid=uid, gid=gids[0] if gids else uid, gids=frozenset(gids or (uid,)))


def table(**lists: tuple[Principal, ...]) -> AccessTable:
    return AccessTable(PoolConfig(access=AccessConfig(**lists)))


def test_the_best_role_up_to_writer_is_the_default() -> None:
    """Who asks for nothing gets the most that is useful, and never becomes admin by accident."""
    rules = table(readers=(user(1),), writers=(group(20),), admins=(user(3),))

    assert rules.role_of(peer(1), None) == "reader"
    assert rules.role_of(peer(2, 20), None) == "writer"
    assert rules.role_of(peer(1, 5, 20), None) == "writer"
    assert rules.role_of(peer(3), None) == "writer"
    assert rules.role_of(peer(3), "admin") == "admin"


@pytest.mark.parametrize("asked", [None, "reader", "writer", "admin"])
def test_who_is_in_no_list_is_refused(asked: str | None) -> None:
    """Root is nobody special, and the answer names no list."""
    rules = table(readers=(user(1001),))

    with pytest.raises(Refusal) as refused:
        rules.role_of(peer(0), asked)

    assert refused.value.code == "access"
    assert "1001" not in refused.value.message


def test_nobody_gets_more_than_is_listed() -> None:
    """A wish above the list is refused with what is allowed; one below is granted."""
    rules = table(writers=(user(1),))

    with pytest.raises(Refusal) as refused:
        rules.role_of(peer(1), "admin")
    assert refused.value.fields == {"uid": 1, "allowed": "writer"}
    assert rules.role_of(peer(1), "reader") == "reader"
    assert rules.still_allows(peer(1), "writer")
    assert not rules.still_allows(peer(1), "admin")


def test_the_socket_is_open_to_others_only_when_others_are_listed() -> None:
    """A pool of one's own has a socket that no one else can even connect to."""
    assert not table(admins=(user(ME),)).others_may_connect()
    assert table(admins=(user(ME),), readers=(user(ME + 1),)).others_may_connect()
    assert table(writers=(group(os.getegid()),)).others_may_connect()


def test_tenants_have_salt_and_quota(tmp_path: Path) -> None:
    """The first tenant that names the user counts; others have no salt and the pool's quota."""
    salt = tmp_path / "salt"
    salt.write_bytes(b"0123456789abcdef\n")
    salt.chmod(0o600)
    tenants = (
        TenantConfig(users=(user(7),), salt_file=str(salt), quota=4096),
        TenantConfig(users=(group(70),)),
    )
    rules = AccessTable(PoolConfig(default_quota=8192, tenants=tenants))

    named, grouped, other = (rules.tenant_of(p) for p in (peer(7), peer(8, 70), peer(9)))
    assert (named.salt, named.quota_bytes) == (b"0123456789abcdef\n", 4096)
    assert (grouped.salt, grouped.quota_bytes) == (b"", 8192)
    assert (other.salt, other.quota_bytes) == (b"", 8192)


def test_a_salt_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """A secret that everybody knows separates nobody; the text names file and remedy."""
    salt = tmp_path / "salt"
    salt.write_bytes(bytes(32))
    salt.chmod(0o644)
    tenant = TenantConfig(users=(user(7),), salt_file=str(salt))

    with pytest.raises(SaltError, match="chmod 0600"):
        AccessTable(PoolConfig(tenants=(tenant,)))


def test_the_kernel_says_who_connected() -> None:
    """Credentials come from the socket, supplementary groups included."""
    left, right = socket.socketpair()
    with left, right:
        found = peer_of(left)

    assert (found.pid, found.uid, found.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert found.gids >= {os.getegid(), *os.getgroups()}


MANY_GROUPS = """
import os, socket
from cenote.shm.identity import peer_of
os.setgroups(range(10_000, 10_000 + {count}))
left, right = socket.socketpair()
found = peer_of(left).gids
print(found == {{os.getegid(), *os.getgroups()}}, len(os.getgroups()))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can choose its groups")
@pytest.mark.parametrize("count", [0, 64, 65, 256, 257, 3000])
def test_users_with_many_groups_are_known(count: int) -> None:
    """All groups of a peer are told, also more than socket.getsockopt has room for."""
    script = [sys.executable, "-c", MANY_GROUPS.format(count=count)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)

    assert done.stdout.strip() == f"True {count}", done.stderr


def test_pidfds_are_told_from_other_descriptors() -> None:
    """Only a pidfd has a pid; a pipe, a file and a closed descriptor have none."""
    pidfd, null = own_pidfd(), os.open("/dev/null", os.O_RDONLY)
    try:
        assert pid_of_pidfd(pidfd) == os.getpid()
        assert pid_of_pidfd(null) is None
    finally:
        os.close(pidfd)
        os.close(null)
    assert pid_of_pidfd(10**6) is None


def test_start_times_are_read_behind_any_name(tmp_path: Path) -> None:
    """A process may call itself ") 1 (" and still has a start time; one that is gone has 0."""
    folder = tmp_path / "42"
    folder.mkdir()
    fields = " ".join(["S", *["0"] * 18, "777", "0"])
    (folder / "stat").write_text(f"42 (a) 1 (b c) {fields}")

    tick_ns = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert start_ns(42, tmp_path) == 777 * tick_ns
    assert start_ns(43, tmp_path) == 0
    assert start_ns(os.getpid()) > 0
