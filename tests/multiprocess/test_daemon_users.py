# SPDX-License-Identifier: Apache-2.0
"""Clients of another uid than the daemon's: what the kernel lets them do with what they got."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from cenote.client import Manifest, connect

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

OTHER_UID: Final = 65_534
KEY: Final = bytes(range(32))
NBYTES: Final = 10_000
MANIFEST: Final = Manifest("m", "l", "uint8", 16)
ACCESS: Final = """
[[pool]]
name = "{pool}"
socket = "{socket}"
[[pool.region]]
medium = "memfd"
size = "16MiB"
[pool.access]
admins = [0]
"""
# Everything is imported before the change of user: the packages may be root's alone.
ATTACH: Final = f"""
import os, socket, sys
from cenote._native import _core
from cenote.shm.session import new_hello, parse_welcome, attach
from cenote.shm.wire import Channel
os.setgroups([])
os.setresgid({OTHER_UID}, {OTHER_UID}, {OTHER_UID})
os.setresuid({OTHER_UID}, {OTHER_UID}, {OTHER_UID})
sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1])
channel = Channel(sock)
welcome, fds = parse_welcome(channel.request("hello", new_hello("other", None, "other").fields()))
for name in ("catalog", "r0.ro"):
    try:
        os.open(f"/proc/self/fd/{{fds[name]}}", os.O_RDWR)
        sys.exit(f"{{name}} could be opened for writing")
    except PermissionError:
        pass
mapping = attach(welcome, fds)
"""
PUT: Final = f"""
ffi, lib = _core.ffi, _core.lib
client = ffi.cast("struct cn_client *", mapping.ptr)
fields = {{"manifest": bytes.fromhex(sys.argv[2]), "name": None}}
slot = channel.request("namespace", fields).body["slot"]
grant, put = ffi.new("struct cn_grant *"), ffi.new("struct cn_put *")
assert lib.cn_reserve(client, {NBYTES}, 0, 1000, grant) == lib.CN_OK
ffi.memmove(grant.data, b"x" * {NBYTES}, {NBYTES})
key = ffi.new("uint8_t[]", {KEY!r})
put.ref, put.key, put.data_bytes, put.ns_slot = grant.ref, key, {NBYTES}, slot
put.position = lib.CN_POSITION_UNKNOWN
assert lib.cn_commit(client, put, 1000) == lib.CN_OK
assert lib.cn_flush(client, 5000) == lib.CN_OK
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may enter; pytest's are 0700, and each run of it makes them so again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def run_as_other(open_folder: Path, cenoted: Callable[..., Any]) -> Callable[..., tuple[Any, str]]:
    """Return a function that runs a script as another user of a daemon, and gives both back."""

    def run(role: str, script: str) -> tuple[Any, str]:
        config = ACCESS + f"{role}s = [{OTHER_UID}]\n"
        daemon = cenoted(config=config, path=open_folder / "pool.sock")
        done = subprocess.run(
            [sys.executable, "-c", script, str(daemon.socket), MANIFEST.canonical.hex()],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return daemon, done.stdout.strip()

    return run


def test_a_reader_of_another_user_reads_only(
    run_as_other: Callable[..., tuple[Any, str]],
) -> None:
    """Another uid in `readers` attaches, and cannot open anything again for writing."""
    _daemon, said = run_as_other("reader", ATTACH + "print(welcome.role)")

    assert said == "reader"


def test_a_writer_of_another_user_stores_for_all(
    run_as_other: Callable[..., tuple[Any, str]],
) -> None:
    """
    Another uid in `writers` stores a chunk on a memfd that is not its own, which the daemon's user
    reads; what it was given for reading it cannot open again for writing.
    """
    daemon, said = run_as_other("writer", ATTACH + PUT + "print(welcome.role, os.getuid())")

    assert said == f"writer {OTHER_UID}"
    with connect(daemon.socket, role="reader") as pool:
        chunk = pool.namespace(MANIFEST).get(KEY)
        assert chunk is not None
        assert bytes(chunk.memory) == b"x" * NBYTES
