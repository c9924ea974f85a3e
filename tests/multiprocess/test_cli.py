# SPDX-License-Identifier: Apache-2.0
"""The tool `cenote`, against real daemons: what it tells."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenote.client import Cache, Manifest, Pool, connect
from cenote.client.cli import status
from cenote.client.cli.main import main

PROD = Manifest("llama", "kv", "bfloat16", 256)
OTHER = Manifest("llama", "kv", "float16", 256)
LATER = {"verify", "doctor", "qualify"}

HOLDER = """
import sys
from cenote.client import Manifest, connect
pool = connect(sys.argv[1], label="engine-7")
cache = pool.namespace(Manifest("llama", "kv", "bfloat16", 256), name="prod")
held = cache.get_many((1).to_bytes(32, "big") + (2).to_bytes(32, "big"))
cache.get(bytes(32))
print(len(held), flush=True)
sys.stdin.read()
"""


def key_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def store(cache: Cache, *numbers: int, nbytes: int = 1000, **options: Any) -> None:
    for i in numbers:
        with cache.put(key_of(i), nbytes, **options) as w:
            w.copy_from(bytes(nbytes))
    cache.flush()


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No daemon of this host is looked at."""
    monkeypatch.delenv("CENOTE_SOCKET", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def daemon(cenoted: Callable[..., Any]) -> Any:
    return cenoted()


@pytest.fixture
def pool(daemon: Any) -> Iterator[Pool]:
    with connect(daemon.socket, label="engine", reconnect=False) as made:
        yield made


@pytest.fixture
def prod(pool: Pool) -> Cache:
    made = pool.namespace(PROD, name="prod")
    store(made, 1, 2, 3, nbytes=5000)
    return made


@pytest.fixture
def tool(daemon: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command on the daemon's pool and returns what it printed."""

    def run(command: str, *argv: str, status: int = 0) -> str:
        assert main([command, "--socket", str(daemon.socket), *argv]) == status
        printed = capsys.readouterr()
        assert status == 0 or printed.err.startswith("cenote: ")
        return printed.out or printed.err

    return run


@pytest.fixture
def holder(daemon: Any, prod: Cache) -> Iterator[subprocess.Popen[str]]:
    """A process that holds two chunks, and missed once."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    argv = [sys.executable, "-P", "-c", HOLDER, str(daemon.socket)]
    with subprocess.Popen(argv, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "2"
        yield process
        process.kill()


# ---- status -------------------------------------------------------------------------------------


def test_status_tells_pool_namespaces_and_sessions(
    daemon: Any, prod: Cache, holder: subprocess.Popen[str], tool: Callable[..., str]
) -> None:
    """
    The JSON has the daemon, the memory, each namespace's share, each session; not the tool's own.
    """
    store(prod.pool.namespace(OTHER), 9, nbytes=8192)

    facts = json.loads(tool("status", "--json"))

    assert facts["pool"] == daemon.pool
    assert facts["state"] == "serving"
    assert facts["daemon"]["pid"] == daemon.pid
    assert facts["memory"]["capacity_bytes"] == 64 * 2**20
    assert facts["memory"]["used_bytes"] == 4 * 8192
    assert facts["checksum"]["chunks"] == 4
    assert [(n["name"], n["live_chunks"], n["share"]) for n in facts["namespaces"]] == [
        ("prod", 3, 0.75),
        (None, 1, 0.25),
    ]
    assert facts["namespaces"][0]["manifest"] == dict(PROD)
    sessions = {s["label"]: s for s in facts["sessions"] if not s["of_daemon"]}
    assert set(sessions) == {"engine", "engine-7"}
    seven = sessions["engine-7"]
    assert (seven["pid"], seven["uid"], seven["role"]) == (holder.pid, os.geteuid(), "writer")
    assert (seven["leases"], seven["leased_bytes"]) == (2, 10_000)
    assert seven["hit_rate"] == pytest.approx(2 / 3, abs=1e-6)
    assert facts["hit_rate"] == pytest.approx(2 / 3, abs=1e-6)


def test_status_for_people_has_units_and_names(
    daemon: Any, holder: subprocess.Popen[str], tool: Callable[..., str]
) -> None:
    """
    The table names pool, medium, namespaces and processes, with readable units.
    """
    text = tool("status")

    for part in (daemon.pool, "memfd 64MiB", "prod", "engine-7", str(holder.pid), "24KiB", "66.7%"):
        assert part in text


def test_a_stopped_process_is_named_with_what_it_holds(
    holder: subprocess.Popen[str], tool: Callable[..., str]
) -> None:
    """
    After SIGSTOP status says which process is stopped, what it keeps, and how to continue it.
    """
    holder.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)

    facts, text = json.loads(tool("status", "--json")), tool("status")

    states = {s["label"]: s["process_state"] for s in facts["sessions"]}
    assert states["engine-7"] == "stopped"
    assert f"process {holder.pid} (engine-7) is stopped and keeps 2 leases" in text
    assert f"kill -CONT {holder.pid}" in text


def test_limbo_is_charged_to_who_holds_it(
    prod: Cache, holder: subprocess.Popen[str], tool: Callable[..., str]
) -> None:
    """
    A chunk that was deleted under a reader is that reader's limbo.
    """
    prod.delete(key_of(1))

    facts = json.loads(tool("status", "--json"))

    assert facts["counters"]["limbo_chunks"] == 1
    assert {s["label"]: s["limbo_chunks"] for s in facts["sessions"]}["engine-7"] == 1
    assert f"process {holder.pid} (engine-7) keeps 1 chunk from" in tool("status")


def test_a_reused_pid_is_not_taken_for_the_client() -> None:
    """
    The state of a process that began after the session did is not the client's.
    """
    assert status.process_state(os.getpid(), 1) == "unknown"
    assert status.process_state(os.getpid(), 0) == "running"
    assert status.process_state(0, 0) == "unknown"


def test_every_json_field_is_documented(
    prod: Cache, holder: subprocess.Popen[str], tool: Callable[..., str], project_root: Path
) -> None:
    """
    docs/tool.md lists what `status`, `top` and `ls` write with --json, to the last field.
    """
    listed = (project_root / "docs" / "tool.md").read_text().partition("## JSON fields")[2]
    known = set(re.findall(r"`(\w+)`", listed))

    def names(value: Any) -> Iterator[str]:
        if isinstance(value, list):
            for each in value:
                yield from names(each)
        elif isinstance(value, dict):
            yield from value
            for name, each in value.items():
                if name != "manifest":  # the client's own
                    yield from names(each)

    looks = tool("top", "--json", "--count", "2", "--interval", "1ms").splitlines()
    found = [json.loads(tool(command, "--json")) for command in ("status", "ls")]
    assert set(names(found + [json.loads(look) for look in looks])) - known == set()


def test_an_option_before_the_command_is_told_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    """
    `cenote --json status` is wrong usage, and says where the option goes.
    """
    assert main(["--json", "status"]) == 2
    assert "'--json' stands before the command" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0


def test_top_writes_rates_between_two_looks(prod: Cache, tool: Callable[..., str]) -> None:
    """
    With --json a line a look; the second has what happened a second.
    """
    first, second = tool("top", "--json", "--count", "2", "--interval", "1ms").splitlines()

    assert json.loads(first)["rates"] == {}
    assert json.loads(second)["rates"]["commits"] == 0
    assert "a second" in tool("top", "--count", "1")


# ---- ls -----------------------------------------------------------------------------------------


def test_ls_filters_sorts_and_limits(prod: Cache, tool: Callable[..., str]) -> None:
    """
    Pinned ones, those of a namespace by name or slot, the largest, the first few.
    """
    other = prod.pool.namespace(OTHER)
    store(other, 9, nbytes=20_000, ttl_s=100)
    prod.pin(key_of(2))

    def keys(*argv: str) -> list[int]:
        return [int(row["key"], 16) for row in json.loads(tool("ls", "--json", *argv))["shown"]]

    assert keys() == [9, 3, 2, 1]
    assert keys("--reverse") == [1, 2, 3, 9]
    assert keys("--sort", "key", "--limit", "2") == [1, 2]
    assert keys("--sort", "size", "--limit", "1") == [9]
    assert keys("--sort", "expires", "--limit", "1") == [9]
    assert keys("--pinned") == [2]
    assert keys("--namespace", "prod", "--sort", "key") == [1, 2, 3]
    assert keys("--namespace", "2") == [9]
    assert keys("--namespace", "2", "--pinned") == []
    assert json.loads(tool("ls", "--json", "--limit", "1"))["chunks"] == 4


def test_ls_for_people_shows_keys_and_totals(prod: Cache, tool: Callable[..., str]) -> None:
    """
    Whole keys where there is room, what is special, and how much was left out.
    """
    prod.pin(key_of(2))

    text = tool("ls", "--limit", "2")

    assert key_of(3).hex() in text
    assert "pinned for ever" in text
    assert "3 chunks, 14.6KiB; 2 shown" in text


def test_ls_of_an_unknown_namespace_names_the_known(prod: Cache, tool: Callable[..., str]) -> None:
    """
    A namespace that is not there is wrong usage; the message lists those that are.
    """
    text = tool("ls", "--namespace", "nope", status=2)

    assert "'nope'" in text
    assert "prod (slot 1)" in text


# ---- explain ------------------------------------------------------------------------------------


def test_explain_takes_a_key_in_every_form(prod: Cache, tool: Callable[..., str]) -> None:
    """
    Hexadecimal, 0x, base64, URL-safe base64 and the first digits name the same key.
    """
    key = bytes.fromhex("fbf0") + b"\xff" * 30
    with prod.put(key, 100) as w:
        w.copy_from(bytes(100))
    prod.flush()
    texts = [
        key.hex(),
        "0x" + key.hex().upper(),
        base64.b64encode(key).decode(),
        base64.urlsafe_b64encode(key).decode().rstrip("="),
        key.hex()[:16],
        key.hex()[:16] + "…",
    ]

    for text in texts:
        assert json.loads(tool("explain", "--json", "--", text))["key"] == key.hex()


@pytest.mark.parametrize("text", ["", "abc", "zz" * 32, "ab" * 33, "a" * 44, "abcdefg=", "ab" * 20])
def test_explain_refuses_what_is_no_key(text: str, tool: Callable[..., str]) -> None:
    """
    Wrong lengths and alphabets, and first digits that nothing begins with, are wrong usage.
    """
    text = tool("explain", text, status=2)

    assert "give" in text


def test_explain_of_digits_that_fit_several_keys_lists_them(
    prod: Cache, tool: Callable[..., str]
) -> None:
    """
    An ambiguous beginning is not guessed.
    """
    text = tool("explain", "00000000", status=2)

    assert "3 keys begin with 00000000" in text
    assert key_of(2).hex() in text


def test_explain_tells_the_whole_story(prod: Cache, tool: Callable[..., str]) -> None:
    """
    Present, elsewhere, deleted and unknown: verdict, place, parent, difference, reach of the feed.
    """
    store(prod, 4, parent=key_of(3))
    prod.pool.namespace(OTHER)
    prod.delete(key_of(1))

    present = tool("explain", key_of(4).hex())
    elsewhere = tool("explain", key_of(4).hex(), "--namespace", "2")
    deleted = tool("explain", key_of(1).hex())
    unknown = tool("explain", key_of(77).hex())

    assert "present in namespace prod (slot 1)" in present
    assert f"follows {key_of(3).hex()}" in present
    assert "not in the namespace asked for, but in namespace prod (slot 1)" in elsewhere
    assert "dtype: 'float16' was asked for, 'bfloat16' there" in elsewhere
    assert "deleted" in deleted
    assert "a client asked for it" in deleted
    assert "never stored in this pool" in unknown
    assert "5 events" in unknown


def test_explain_in_json_has_the_same(prod: Cache, tool: Callable[..., str]) -> None:
    """
    Programs get the verdict, the reason, the place and the history.
    """
    prod.delete(key_of(1))

    found = json.loads(tool("explain", "--json", key_of(1).hex()))
    there = json.loads(tool("explain", "--json", key_of(2).hex()))

    assert (found["verdict"], found["by"], found["here"]) == ("deleted", "client", [])
    assert [event["kind"] for event in found["history"]] == ["stored", "deleted"]
    assert found["feed"]["complete"]
    assert there["verdict"] == "present"
    assert there["here"][0]["namespace"] == "prod"
    assert there["here"][0]["bytes"] == 5000
