# SPDX-License-Identifier: Apache-2.0
"""`cenote demo` as a person runs it, and the transformers adapter through a daemon's life."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from cenote.client.cli import demo

pytestmark = [pytest.mark.torch, pytest.mark.slow]

STOP_S: Final = 100  # a limit for a hang, not a claim about speed
SMALL: Final = ("--size", "tiny", "--tokens", "600")


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts the demo, with its files below tmp_path/tmp."""
    pytest.importorskip("transformers")
    (tmp_path / "t").mkdir()

    def start(*args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "cenote.client.cli.main", "demo", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path / "t")},
            text=True,
        )

    return start


def left_behind(tmp_path: Path) -> list[str]:
    """Return the files, shared memory and processes of a demo below tmp_path/tmp."""
    folder = tmp_path / "t"
    processes = [
        f"process {process.pid}"
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in process.info["cmdline"] or ())
    ]
    return [str(path) for path in folder.iterdir()] + processes


def shared_memory(pool: str) -> list[str]:
    """Return the names of a pool's shared memory."""
    return [path.name for path in Path("/dev/shm").glob(f"cenote.*.{pool}.*")]


def test_every_check_of_the_demo_holds(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """
    The demo exits with 0; two chunks were shared, a killed reader's leases are gone, nothing stays.
    """
    with started(*SMALL, "--json", "--seed", "7") as process:
        out, err = process.communicate(timeout=STOP_S)

    assert process.returncode == 0, err
    found = json.loads(out)
    assert found["held"]
    assert all(check["held"] for check in found["checks"])
    assert len(found["checks"]) == 9
    assert found["shared"]["chunks"] == 2
    assert found["shared"]["tokens"] == 512
    assert found["killed"]["leases_before"] == 2
    assert found["killed"]["leases_after"] == 0
    assert found["model"]["seed"] == 7
    assert left_behind(tmp_path) == []


def test_interrupted_demo_leaves_nothing_behind(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """
    Ctrl-C in the middle ends daemon and engines, and removes socket, folder and shared memory.
    """
    with started(*SMALL) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "load torch" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        daemon = next(c for c in children if "cenote.daemon.main" in c.cmdline())
        pool = daemon.cmdline()[daemon.cmdline().index("--name") + 1]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=STOP_S)

    assert process.returncode == demo.INTERRUPTED
    assert "Traceback" not in err
    assert pool.startswith("demo-")
    assert [child for child in children if child.is_running()] == []
    assert shared_memory(pool) == []
    assert left_behind(tmp_path) == []


def test_a_check_that_does_not_hold_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    With a tolerance that no difference meets, the check fails, is named, and the status is 1.
    """
    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "LOGITS_TOLERANCE", -1.0)

    status = demo.main(SMALL)

    out = capfd.readouterr().out
    assert status == 1
    assert "FAIL B's logits" in out
    assert "1 of 9 checks failed" in out


def test_a_daemon_that_cannot_start_is_status_3(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """
    Where the socket cannot be made, the demo says what the daemon said.
    """
    import tempfile

    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    assert demo.main(SMALL) == 3
    assert "107" in capfd.readouterr().err
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--tokens", "5"], ["--size", "huge"], ["--seed", "-1"]])
def test_wrong_usage_is_status_2(wrong: list[str]) -> None:
    """
    What cannot be done is refused before anything is started.
    """
    with pytest.raises(SystemExit) as caught:
        demo.main(wrong)

    assert caught.value.code == 2


def test_without_torch_the_demo_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Status 2, and the command that installs what is missing.
    """
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    assert demo.main([]) == 2
    assert "make demo" in capsys.readouterr().err


def test_the_adapter_through_a_daemons_life(
    cenoted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    No daemon, a daemon, kill -9, the next daemon: outputs are right all along, nothing raises.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from cenote.client.adapters import transformers as module

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **shape)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = [i * 7 % 64 for i in range(70)]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits
    monkeypatch.setenv("CENOTE_SOCKET", str(tmp_path / "nobody.sock"))
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    path = tmp_path / "late.sock"

    def compute() -> tuple[int, int]:
        done = cache.prefill(ids)
        assert float((expected[:, done.loaded :] - done.outputs.logits).abs().max()) < 1e-4
        return done.loaded, done.saved

    cache = module.PrefixCache.connect(model, path, 16)
    if cache.cache is not None:
        pytest.skip("a daemon of this machine answers at the default socket")
    assert compute() == (0, 0)
    daemon = cenoted(path=path)
    assert compute() == (0, 64)
    assert cache.cache is not None
    cache.cache.flush()
    assert compute() == (64, 0)
    daemon.kill()
    assert compute() == (64, 0)  # what is mapped stays readable
    pool = cache.cache.pool
    cenoted(path=path, pool=daemon.pool)
    reconnected = pool.reconnects
    for _ in range(2000):
        if pool.reconnects > reconnected or pool.connected:
            break
        compute()
    assert pool.connected
    assert compute()[0] in {0, 64}
    cache.cache.flush()
    assert compute() == (64, 0)
    pool.close()
