# SPDX-License-Identifier: Apache-2.0
"""The commands of `cenote` that act or measure, and how the tool ends, against real daemons."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenote.client import Cache, Manifest, Pool, connect
from cenote.client.cli import bench
from cenote.client.cli.main import COMMANDS, main, new_parser
from cenote.client.testing import MemoryHost, memory_pool

PROD = Manifest("llama", "kv", "bfloat16", 256)
LATER = {"doctor", "qualify"}


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


def tool_process(*argv: str, **options: Any) -> subprocess.Popen[str]:
    """Start the tool as a user does."""
    command = [sys.executable, "-P", "-m", "cenote.client.cli.main", *argv]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **options)


# ---- clear and destroy --------------------------------------------------------------------------


def test_clear_drops_what_nobody_holds(prod: Cache, tool: Callable[..., str]) -> None:
    """
    The pool is empty afterwards, and goes on.
    """
    assert json.loads(tool("clear", "--yes", "--json"))["dropped"] == 3
    assert prod.match([key_of(1)]) == 0
    store(prod, 1)
    assert "cleared" in tool("explain", key_of(2).hex())


def test_destroy_ends_the_daemon_of_one_pool(
    daemon: Any, prod: Cache, tool: Callable[..., str]
) -> None:
    """
    The socket goes, the daemon ends with 0, and the next command finds no pool.
    """
    held = prod.get(key_of(1))
    assert held is not None

    text = tool("destroy", daemon.pool, "--yes")

    assert "3 chunks dropped; 1 lease to be released" in text
    assert daemon.wait() == 0
    assert bytes(held.memory) == bytes(5000)
    assert "no socket" in tool("status", status=3)


def test_destroy_without_a_terminal_needs_yes(prod: Cache, tool: Callable[..., str]) -> None:
    """
    A script that forgot --yes destroys nothing.
    """
    assert "--yes" in tool("destroy", status=2)
    assert prod.match([key_of(1)]) == 1


def test_destroy_of_another_name_does_nothing(
    daemon: Any, prod: Cache, tool: Callable[..., str]
) -> None:
    """
    A name that is not the socket's pool's, or no name at all, is wrong usage.
    """
    assert repr(daemon.pool) in tool("destroy", "another", "--yes", status=2)
    assert prod.match([key_of(1)]) == 1


def test_destroy_does_not_go_on_to_another_pool(
    daemon: Any,
    prod: Cache,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    With $CENOTE_SOCKET naming a socket that is gone, nothing is destroyed in its place.
    """
    run_dir = tmp_path / "cenote"
    run_dir.mkdir(mode=0o700)
    (run_dir / "default.sock").symlink_to(daemon.socket)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("CENOTE_SOCKET", str(tmp_path / "gone.sock"))

    assert main(["destroy", "--yes"]) == 3
    assert "there is no socket" in capsys.readouterr().err
    assert prod.match([key_of(1)]) == 1


def test_a_name_does_not_lead_past_the_named_socket(
    daemon: Any, prod: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    $CENOTE_SOCKET says which pool is meant, whatever pools of that name there are elsewhere.
    """
    monkeypatch.setenv("CENOTE_SOCKET", str(daemon.socket))

    assert main(["destroy", "default", "--yes"]) == 2
    assert daemon.pool in capsys.readouterr().err
    assert prod.match([key_of(1)]) == 1
    assert main(["clear", daemon.pool, "--yes"]) == 0
    assert main(["destroy", daemon.pool, "--yes"]) == 0
    assert daemon.wait() == 0


def test_destroy_by_name_looks_where_daemons_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    A pool that is nowhere, and a name that cannot be one.
    """
    assert main(["destroy", "no-such-pool", "--yes"]) == 3
    assert "no-such-pool.sock" in capsys.readouterr().err
    assert main(["destroy", "Not/a/name", "--yes"]) == 2


@pytest.mark.parametrize(("answer", "ends"), [("n", 1), ("", 1), ("y", 0)])
def test_destroy_asks_on_a_terminal(daemon: Any, prod: Cache, answer: str, ends: int) -> None:
    """
    Only a yes destroys; the question says what there is to lose.
    """
    ours, theirs = pty.openpty()
    with tool_process(
        "destroy", "--socket", str(daemon.socket), stdin=theirs, stdout=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        _, errors = process.communicate(timeout=30)
    os.close(ours)

    assert process.returncode == ends
    assert f"Destroy pool {daemon.pool!r} (64MiB, 3 chunks" in errors
    assert (daemon.wait() == 0) if ends == 0 else prod.match([key_of(1)]) == 1


def test_destroy_needs_an_admin(
    cenoted: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Who may only read is refused, with the option that would allow it.
    """
    uid = os.geteuid()
    made = cenoted(
        config="[[pool]]\nname = '{pool}'\nsocket = '{socket}'\n"
        "[[pool.region]]\nmedium = 'memfd'\nsize = '64MiB'\n"
        f"[pool.access]\nreaders = [{uid}]\nwriters = []\nadmins = []\n"
    )
    if not made.ready:
        pytest.fail(made.log())

    assert main(["destroy", "--yes", "--socket", str(made.socket)]) == 1
    assert "admin" in capsys.readouterr().err


# ---- bench --------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter walk: what is measured is not the claim here."""
    monkeypatch.setattr(bench, "WALK_BYTES_MAX", 8 << 20)
    monkeypatch.setattr(bench, "ROUNDS", 2)


def test_bench_measures_the_pool_of_this_host_and_leaves_nothing(
    quick: None, prod: Cache, tool: Callable[..., str]
) -> None:
    """
    With room in the pool it is what is measured; its chunks are gone afterwards, nothing else is.
    """
    found = json.loads(tool("bench", "--json"))

    assert found["measured_on"]["what"] == "the pool of this host"
    assert found["measured_on"]["pool"] == prod.pool.name
    for name in ("hit_ns", "match_512_us", "put_to_copyto", "get_to_copyto"):
        assert found[name] > 0
    stats = prod.pool.stats()
    assert (stats.chunks, stats.evictions) == (3, 0)


def test_bench_takes_a_private_pool_rather_than_evict(
    quick: None, cenoted: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """
    A pool without room is left alone; the output says what was measured, and why.
    """
    small = cenoted(size="16MiB")

    assert main(["bench", "--socket", str(small.socket)]) == 0

    text = capsys.readouterr().out
    assert "on a private pool in memory" in text
    assert f"because pool {small.pool} has" in text
    with connect(small.socket, reconnect=False) as pool:
        assert pool.stats().commits == 0


def test_bench_without_a_daemon_measures_a_private_pool(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    --private needs no daemon.
    """
    assert main(["bench", "--private", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["measured_on"]["what"] == "a private pool in memory"


# ---- the tool itself ----------------------------------------------------------------------------


def test_the_help_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Every command and demo are listed; commands of later releases are not.
    """
    with pytest.raises(SystemExit) as ended:
        main(["--help"])

    words = set(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert {*COMMANDS, "demo"} <= words
    assert not words & LATER


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_describes_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """
    --help of a command says what it does, and that it has --json and --socket.
    """
    with pytest.raises(SystemExit) as ended:
        new_parser().parse_args([command, "--help"])

    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--json" in text
    assert "--socket" in text
    assert "SPDX" not in text


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["doctor"],
        ["ls", "--limit", "-1"],
        ["ls", "--sort", "colour"],
        ["explain"],
        ["status", "--timeout", "0"],
        ["status", "--timeout", "soon"],
        ["status", "extra"],
    ],
)
def test_wrong_usage_ends_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """
    argparse's own errors and ours have the same status, and go to stderr.
    """
    with pytest.raises(SystemExit) as ended:
        main(argv)

    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", ["status", "top", "ls", "clear", "destroy"])
def test_without_a_daemon_the_status_is_3(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    A socket that is not there, and one that nobody listens on.
    """
    import socket

    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(stale))

    assert main([command, "--socket", str(tmp_path / "none.sock")]) == 3
    assert "cenoted" in capsys.readouterr().err
    assert main([command, "--socket", str(stale)]) == 3
    assert "nobody listens" in capsys.readouterr().err


def test_a_stopped_daemon_is_no_daemon(daemon: Any, tool: Callable[..., str]) -> None:
    """
    A daemon that does not answer costs the deadline, not for ever.
    """
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        text = tool("status", "--timeout", "200ms", status=3)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)

    assert "did not answer" in text


def test_a_reader_of_the_output_may_leave(daemon: Any, prod: Cache) -> None:
    """
    `cenote ls | head -1` ends quietly.
    """
    store(prod, *range(10, 1500), nbytes=1)
    with tool_process(
        "ls", "--json", "--limit", "0", "--socket", str(daemon.socket), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()

    assert (process.returncode, errors) == (0, "")


def test_names_of_clients_cannot_steer_the_terminal(daemon: Any, tool: Callable[..., str]) -> None:
    """
    Escapes in a manifest are shown as question marks.
    """
    with connect(daemon.socket, reconnect=False) as pool:
        pool.namespace(Manifest("evil\x1b[2J", "kv", "[red]x[/red]", 256))
        text = tool("status")

    assert "\x1b" not in text
    assert "evil?[2J" in text
    assert "[red]x[/red]" in text


def test_looking_takes_no_writable_memory(daemon: Any, prod: Cache) -> None:
    """
    The tool attaches as a reader, so that it cannot write to the pool whatever goes wrong.
    """
    with MemoryHost() as host, host.connect("reader") as reader:
        assert reader.role == "reader"
    parser = new_parser()
    args = parser.parse_args(["status", "--socket", str(daemon.socket)])
    from cenote.client.cli import common

    with common.open_pool(args) as looking:
        assert looking.role == "reader"


def test_the_parts_work_on_a_pool_in_memory() -> None:
    """
    Measuring works without a daemon, on the pool that users have in their tests.
    """
    with memory_pool("64MiB") as private:
        found = bench.measure(private, 4 << 20)
        assert found["hit_ns"] > 0
        assert private.stats().chunks == 0
