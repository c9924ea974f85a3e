# SPDX-License-Identifier: Apache-2.0
"""`cenote verify` against real daemons: served, killed, stopped, and damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenote.client import Cache, Manifest, Pool, connect
from cenote.client.cli.main import main
from cenote.shm.facts import ChunkFacts
from cenote.shm.inspect import Catalog

PROD = Manifest("llama", "kv", "bfloat16", 256)
CHUNKS = 40
SHM = Path("/dev/shm")  # where named shared memory is


def key_of(i: int) -> bytes:
    return (i << 240 | i).to_bytes(32, "big")


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No daemon of this host is looked at."""
    monkeypatch.delenv("CENOTE_SOCKET", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def started(cenoted: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that starts a daemon whose pool outlives it, until the test ends."""
    return lambda **options: cenoted(keep=True, **options)


@pytest.fixture
def daemon(started: Callable[..., Any]) -> Any:
    """A daemon of a pool in named shared memory."""
    return started(medium="shm")


@pytest.fixture
def pool(daemon: Any) -> Iterator[Pool]:
    with connect(daemon.socket, label="engine", reconnect=False) as made:
        yield made


@pytest.fixture
def prod(pool: Pool) -> Cache:
    made = pool.namespace(PROD, name="prod")
    for i in range(CHUNKS):
        nbytes = 3000 + 997 * i
        with made.put(key_of(i), nbytes) as w:
            w.copy_from(bytes([i]) * nbytes)
    made.flush()
    return made


def named(daemon: Any, part: str) -> Path:
    """Return the object of the daemon's pool."""
    names: list[str] = daemon.names()
    return SHM / next(name for name in names if name.endswith(f".{part}"))


def chunk(cache: Cache, i: int) -> ChunkFacts:
    found = Catalog.of(cache.pool.mapping).find(1, key_of(i))
    assert found is not None
    return found


def flip(daemon: Any, facts: ChunkFacts) -> None:
    """Change one bit in the middle of a chunk, behind everybody's back."""
    with named(daemon, "r0").open("r+b") as file:
        at = facts.data_off + facts.nbytes // 2
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 0x04]), at)


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs the command, and returns its JSON or its text."""

    def run(*argv: Any, status: int = 0) -> Any:
        assert main(["verify", *map(str, argv)]) == status
        printed = capsys.readouterr()
        if printed.err:
            assert printed.err.startswith("cenote: ")
            return printed.err
        return json.loads(printed.out) if "--json" in argv else printed.out

    return run


def opened_again(pid: int, part: str) -> int:
    """Return a descriptor of ours of the memfd that is a part of that daemon's pool."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if f".{part} (deleted)" in str(link.readlink()):
            return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    raise AssertionError(f"process {pid} has no {part}")


def explained(daemon: Any, key: bytes) -> str:
    """Return what became of a key, in words."""
    command = [sys.executable, "-P", "-m", "cenote.client.cli.main", "explain", key.hex()]
    done = subprocess.run(
        [*command, "--socket", str(daemon.socket)], check=True, capture_output=True, text=True
    )
    return done.stdout


# ---- with a daemon ------------------------------------------------------------------------------


def test_a_sound_pool_is_all_right(daemon: Any, prod: Cache, verify: Callable[..., Any]) -> None:
    """
    Every chunk is read, the daemon's own audit is asked, nothing is found.
    """
    found = verify("--socket", daemon.socket, "--json")

    assert (found["serving"], found["wrong"], found["findings"]) == (True, 0, [])
    walked = found["walked"]
    assert (walked["chunks"], walked["checked"], walked["audited"]) == (CHUNKS, CHUNKS, 0)
    assert walked["checked_bytes"] == sum(3000 + 997 * i for i in range(CHUNKS))
    assert found["states"]["live"] == CHUNKS
    assert "all right" in verify("--socket", daemon.socket)
    assert prod.pool.leases == 0


def test_a_spoiled_chunk_is_found_dropped_and_gone(
    daemon: Any, prod: Cache, verify: Callable[..., Any]
) -> None:
    """
    Exactly it, with key and place; --repair drops it, the feed says why, and all is right again.
    """
    spoiled = chunk(prod, 17)
    flip(daemon, spoiled)

    found = verify("--socket", daemon.socket, "--json", status=1)
    text = verify("--socket", daemon.socket, status=1)
    assert prod.match([key_of(17)]) == 1
    repaired = verify("--socket", daemon.socket, "--json", "--repair", status=1)

    (one,) = found["findings"]
    assert (one["kind"], one["count"], found["wrong"], found["repaired"]) == ("crc", 1, 1, None)
    (example,) = one["examples"]
    assert (example["descriptor"], example["generation"]) == (
        spoiled.descriptor,
        spoiled.generation,
    )
    assert (example["key"], example["namespace_slot"]) == (key_of(17).hex(), 1)
    assert (example["region"], example["data_off"]) == (0, spoiled.data_off)
    assert key_of(17).hex()[:16] in text
    assert repaired["repaired"] == 1
    assert prod.match([key_of(17)]) == 0
    assert prod.pool.stats().lost == 1
    assert "loss" in explained(daemon, key_of(17))
    assert verify("--socket", daemon.socket, "--json")["walked"]["checked"] == CHUNKS - 1


def test_without_crc_only_the_tables_are_looked_at(
    daemon: Any, prod: Cache, verify: Callable[..., Any]
) -> None:
    """
    Then nobody reads a byte, and a spoiled chunk is not noticed.
    """
    flip(daemon, chunk(prod, 3))

    found = verify("--socket", daemon.socket, "--no-crc", "--json")

    assert found["wrong"] == 0
    assert "checked" not in found["walked"]
    assert "not checked" in verify("--socket", daemon.socket, "--no-crc")


def test_repairing_needs_an_admin(started: Callable[..., Any], verify: Callable[..., Any]) -> None:
    """
    Who may only read verifies, without the daemon's audit, and repairs nothing.
    """
    me = os.geteuid()
    config = (
        '[[pool]]\nname = "{pool}"\nsocket = "{socket}"\n'
        '[[pool.region]]\nmedium = "memfd"\nsize = "16MiB"\n'
        f"[pool.access]\nreaders = [{me}]\nadmins = []\n"
    )
    daemon = started(config=config)

    found = verify("--socket", daemon.socket, "--json")
    said = verify("--socket", daemon.socket, "--repair", status=1)

    assert "audited" not in found["walked"]
    assert any("no admin" in note for note in found["notes"])
    assert "admin" in said


def test_the_request_lost_is_for_admins(daemon: Any, prod: Cache) -> None:
    """
    A writer is refused; an admin's references of other generations drop nothing.
    """
    facts = chunk(prod, 5)
    writer, _, _ = daemon.hello("writer")
    admin, _, _ = daemon.hello("admin")

    with pytest.raises(Exception, match="only an admin may drop chunks"):
        writer.request("lost", {"refs": [facts.ref]})
    assert admin.request("lost", {"refs": [facts.ref + (1 << 32)]}).body["dropped"] == 0
    assert prod.match([key_of(5)]) == 1
    assert admin.request("lost", {"refs": [facts.ref]}).body["dropped"] == 1
    assert prod.match([key_of(5)]) == 0


def test_wrong_usage_is_named(daemon: Any, verify: Callable[..., Any]) -> None:
    """
    Another pool's name, a region without a catalog, a rate that is none.
    """
    assert repr(daemon.pool) in verify("another", "--socket", daemon.socket, status=2)
    assert "--catalog" in verify("--region", "x", status=2)
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--rate", "0"])
    assert ended.value.code == 2


# ---- without ------------------------------------------------------------------------------------


def test_a_killed_daemons_pool_is_found_by_name(
    daemon: Any, prod: Cache, verify: Callable[..., Any]
) -> None:
    """
    It was left dirty, all of it is right, and the next daemon goes on with it.
    """
    daemon.kill()

    found = verify(daemon.pool, "--json")

    assert (found["serving"], found["wrong"]) == (False, 0)
    assert found["walked"]["checked"] == CHUNKS
    left = found["left"]
    assert left["catalog"] == str(named(daemon, "catalog"))
    assert (left["state"], left["keeper_pid"], left["takes_over"]) == ("dirty", daemon.pid, True)
    assert left["granted"] > 0
    assert "goes on with it" in verify(daemon.pool)


def test_a_stopped_daemons_pool_was_left_clean(
    daemon: Any, prod: Cache, verify: Callable[..., Any]
) -> None:
    """
    Its counters are good then, and are compared.
    """
    prod.pool.close()
    assert daemon.stop() == 0

    found = verify(daemon.pool, "--json")

    assert (found["left"]["state"], found["wrong"]) == ("clean", 0)


def test_a_spoiled_chunk_is_found_without_a_daemon(
    daemon: Any, prod: Cache, verify: Callable[..., Any]
) -> None:
    """
    Named like with one; --repair is refused, and says what to do.
    """
    spoiled = chunk(prod, 9)
    daemon.kill()
    flip(daemon, spoiled)

    found = verify(daemon.pool, "--json", status=1)

    assert [(f["kind"], f["count"]) for f in found["findings"]] == [("crc", 1)]
    assert found["findings"][0]["examples"][0]["key"] == key_of(9).hex()
    assert "start it" in verify(daemon.pool, "--repair", status=2)


def test_what_a_crash_leaves_is_told_and_not_wrong(
    daemon: Any, prod: Cache, tmp_path: Path, verify: Callable[..., Any]
) -> None:
    """
    A chunk that the index does not have yet: the next daemon links it, and the status is 0.
    """
    facts = chunk(prod, 12)
    daemon.kill()
    copy = tmp_path / "catalog"
    shutil.copyfile(named(daemon, "catalog"), copy)
    superblock = Catalog.open(copy).superblock
    first = superblock.offsets["index"]
    with copy.open("r+b") as file:
        for at in range(first, first + superblock.bucket_count * 64, 8):
            word = int.from_bytes(os.pread(file.fileno(), 8, at), "little")
            if word and word & 0xFFFFFFFF == facts.descriptor:
                os.pwrite(file.fileno(), bytes(8), at)

    found = verify("--catalog", copy, "--json")
    text = verify("--catalog", copy)

    assert found["wrong"] == 0
    (one,) = found["findings"]
    assert (one["kind"], one["heals"]) == ("unlinked", True)
    assert (one["examples"][0]["key"], found["left"]["links"]) == (key_of(12).hex(), 1)
    assert found["walked"]["checked"] == CHUNKS  # the region was found by the pool's id
    assert "links 1 chunk to the index" in text
    assert "the next daemon puts it right" in text


def test_what_no_daemon_takes_over_is_said(
    daemon: Any, prod: Cache, tmp_path: Path, verify: Callable[..., Any]
) -> None:
    """
    A place outside the region makes the next daemon begin anew.
    """
    facts = chunk(prod, 12)
    daemon.kill()
    copy = tmp_path / "catalog"
    shutil.copyfile(named(daemon, "catalog"), copy)
    at = Catalog.open(copy).superblock.offsets["chunks"] + 64 * facts.descriptor + 40
    with copy.open("r+b") as file:
        os.pwrite(file.fileno(), b"\xff" * 6, at)

    text = verify("--catalog", copy, status=1)

    assert "makes a new pool" in text
    assert f"place: descriptor {facts.descriptor} generation {facts.generation}" in text


def test_a_missing_region_is_named(
    daemon: Any, prod: Cache, tmp_path: Path, verify: Callable[..., Any]
) -> None:
    """
    It is wrong, unless only the tables were to be looked at; --region names another place.
    """
    daemon.kill()
    moved = tmp_path / "elsewhere"
    shutil.move(named(daemon, "r0"), moved)
    catalog = named(daemon, "catalog")

    assert "name its file with --region" in verify("--catalog", catalog, status=1)
    assert verify("--catalog", catalog, "--no-crc", "--json")["wrong"] == 0
    assert verify("--catalog", catalog, "--region", moved, "--json")["walked"]["checked"] == CHUNKS


def test_the_catalog_of_a_living_daemon_is_refused(
    daemon: Any, prod: Cache, verify: Callable[..., Any]
) -> None:
    """
    Its keeper changes it: it has to be verified through that.
    """
    said = verify("--catalog", named(daemon, "catalog"), status=2)

    assert f"process {daemon.pid} serves" in said


def test_no_pool_says_where_was_looked(tmp_path: Path, verify: Callable[..., Any]) -> None:
    """
    Neither a socket nor memory of that name, nor a file at that path.
    """
    assert "nothing of a pool 'no-such-pool'" in verify("no-such-pool", status=3)
    assert "cannot be read" in verify("--catalog", tmp_path / "none", status=3)
    (tmp_path / "text").write_text("no catalog")
    assert "no catalog" in verify("--catalog", tmp_path / "text", status=1)


def test_a_pool_in_memfds_is_reached_through_a_descriptor(
    started: Callable[..., Any], verify: Callable[..., Any]
) -> None:
    """
    What has no name has one below /proc, of whoever holds it.
    """
    daemon = started(medium="memfd", size="16MiB")
    with connect(daemon.socket, reconnect=False) as pool:
        cache = pool.namespace(PROD)
        with cache.put(key_of(1), 4096) as w:
            w.copy_from(bytes(4096))
        cache.flush()
        held = {part: opened_again(daemon.pid, part) for part in ("catalog", "r0")}
    daemon.kill()

    ours = {part: f"/proc/self/fd/{fd}" for part, fd in held.items()}
    found = verify("--catalog", ours["catalog"], "--region", ours["r0"], "--json")
    for fd in held.values():
        os.close(fd)

    assert (found["wrong"], found["walked"]["checked"]) == (0, 1)
