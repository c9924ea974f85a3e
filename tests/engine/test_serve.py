# SPDX-License-Identifier: Apache-2.0
"""
`vllm serve` with CenoteConnector under load: a pool that holds a third of what is asked for.

CENOTE_SERVE_S is how long the clients ask, 60 s by default; 180 by hand.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.engine.engines import Engine, cenote_connector
from tests.engine.pools import wait_until, watching
from tests.engine.processes import PYTHON, descendants, engine_environment, kill_and_wait
from tests.engine.prompts import prompt_of

Engines = Callable[..., Engine]
Models = Callable[..., Path]
Daemons = Callable[..., Any]

SERVE_S: Final = float(os.environ.get("CENOTE_SERVE_S", "60"))
CLIENTS: Final = 8
DOCUMENTS: Final = 40  # of 768 tokens, 512 KiB a chunk: 60 MiB
QUESTIONS: Final = 3
TOKENS: Final = 8
HTTP_S: Final = 120.0


def question(document: int, number: int) -> list[int]:
    """A prompt: a document and a short question about it."""
    return [*prompt_of(768, seed=document), *prompt_of(20 + 7 * number, seed=1000 + number)]


@dataclass
class Served:
    """A running `vllm serve`."""

    port: int
    process: subprocess.Popen[bytes]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask, and return the answer; anything but 200 is an error."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HTTP_S)
        try:
            link.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = link.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, f"{answer.status}: {text}"
            return dict(json.loads(text))
        finally:
            link.close()

    def metrics(self) -> dict[str, float]:
        """The counters that /metrics shows, summed over labels."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HTTP_S)
        link.request("GET", "/metrics")
        found: dict[str, float] = {}
        for line in link.getresponse().read().decode().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        link.close()
        return found


@contextmanager
def serving(model: Path, connector: Any, folder: Path) -> Iterator[Served]:
    """Run `vllm serve`, wait until it is healthy, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    argv = [str(PYTHON.parent / "vllm"), "serve", str(model), "--port", str(port)]
    argv += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    argv += ["--kv-cache-memory-bytes", str(16 << 20), "--max-num-seqs", "8"]
    argv += ["--max-model-len", "2048", "--kv-transfer-config", json.dumps(connector)]
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=engine_environment())
    served = Served(port, process)
    try:
        wait_until(lambda: _healthy(served, log), log.read_text, wait_s=300)
        yield served
    finally:
        kill_and_wait([process.pid, *descendants([process.pid])])
        process.wait()


def _healthy(served: Served, log: Path) -> bool:
    assert served.process.poll() is None, log.read_text()[-4000:]
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=HTTP_S)
    try:
        link.request("GET", "/health")
        return link.getresponse().status == 200
    except OSError:
        return False
    finally:
        link.close()


@dataclass
class Tally:
    """What the clients saw."""

    asked: int = 0
    cached: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    said: dict[tuple[int, int], set[tuple[int, ...]]] = field(default_factory=dict)


def client(served: Served, model: Path, seed: int, until_s: float, tally: Tally) -> None:
    """Ask one question after the other."""
    rng = random.Random(seed)
    while time.monotonic() < until_s and not tally.errors:
        which = rng.randrange(DOCUMENTS), rng.randrange(QUESTIONS)
        body = {
            "model": str(model),
            "prompt": question(*which),
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        try:
            answer = served.post("/v1/completions", body)
        except (OSError, AssertionError) as error:
            tally.errors.append(repr(error))
            return
        choice, usage = answer["choices"][0], answer["usage"]
        tally.asked += 1
        tally.tokens += usage["prompt_tokens"]
        tally.said.setdefault(which, set()).add(tuple(choice["token_ids"]))


def test_eight_clients_and_a_pool_that_is_too_small(
    engines: Engines, model: Models, cenoted: Daemons, tmp_path: Path
) -> None:
    """
    No request fails, no token is wrong, no lease stays, and much of it comes from the pool.

    A token is wrong where two runs without cenote agree and it differs from theirs.
    """
    daemon = cenoted(size="20MiB")
    connector = cenote_connector(daemon.socket, verify="always")
    tally = Tally()
    with serving(model(), connector, tmp_path) as served, watching(daemon.socket) as pool:
        until_s = time.monotonic() + SERVE_S
        threads = [
            threading.Thread(target=client, args=(served, model(), seed, until_s, tally))
            for seed in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = served.metrics()
        wait_until(lambda: pool.stats().leases == 0, pool.stats)
        stats = pool.stats()

    excluded, wrong = _judge(engines(model()), tally)
    hits = metrics["vllm:external_prefix_cache_hits_total"]
    share = hits / metrics["vllm:external_prefix_cache_queries_total"]
    print(
        f"{tally.asked} requests in {SERVE_S:g} s, {excluded} of {len(tally.said)} excluded; "
        f"{share:.0%} of the tokens asked for came from the pool; {stats.evictions} evictions"
    )
    assert tally.errors == []
    assert wrong == []
    assert excluded * 100 < len(tally.said)
    assert tally.asked > CLIENTS
    assert hits > 0
    assert stats.evictions > 0
    assert metrics.get("vllm:cenote_damaged_chunks_total", 0) == 0


def _judge(oracle: Engine, tally: Tally) -> tuple[int, list[tuple[int, int]]]:
    """Return (prompts on which two runs without cenote disagree, those that came out wrong)."""
    asked = sorted(tally.said)
    prompts = [question(*which) for which in asked]
    runs = []
    for order in (1, -1):
        assert oracle.reset()
        answers = oracle.generate(prompts[::order], max_tokens=TOKENS).answers[::order]
        runs.append([answer.tokens for answer in answers])
    sure = [i for i in range(len(asked)) if runs[0][i] == runs[1][i]]
    wrong = [asked[i] for i in sure if tally.said[asked[i]] != {runs[0][i]}]
    return len(asked) - len(sure), wrong
