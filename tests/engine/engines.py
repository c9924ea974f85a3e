# SPDX-License-Identifier: Apache-2.0
"""
Real vLLM engines for tests, benches and the demo, in an environment of their own.

    with Engine.start(model, connector=cenote_connector(daemon.socket)) as engine:
        answer = engine.ask(prompt, max_tokens=8)
        answer.tokens, answer.cached, answer.ttft_s
        engine.reset(); engine.stats(); engine.kill("worker")

An engine is three processes, as vLLM starts them: the one that takes requests, the scheduler's
(core) and the worker's. engine_host.py is the first of them; nursery.py starts many of them fast.
Needs nothing but the standard library and psutil here; vLLM is in the environment whose Python
CENOTE_VLLM_PYTHON names, by default .venv-vllm (`make setup-vllm`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from tests.engine.processes import (
    END_S,
    descendants,
    engine_environment,
    host_command,
    kill_and_wait,
    wait_gone,
)

# Limits for a hang, not claims about speed: an engine on a busy machine imports vLLM three times.
START_S: Final = 600.0
ANSWER_S: Final = 300.0
LOG_TAIL: Final = 6000
KV_BYTES: Final = 64 << 20
CONNECTOR_MODULE: Final = "cenote.client.adapters.vllm"

Connector = Mapping[str, Any]


class EngineFailed(Exception):
    """The engine did not start, ended, or refused a request; with the end of its log."""


class EngineHung(EngineFailed):
    """The engine did not answer in time."""


@dataclass(frozen=True)
class Answer:
    """What came of one prompt."""

    name: str
    tokens: tuple[int, ...]
    cached: int  # tokens of the prompt that were not computed
    finish: str
    wall_s: float
    ttft_s: float | None = None
    preemptions: int = 0
    kv_transfer_params: Any = None
    logprobs: list[dict[str, float]] | None = None


@dataclass(frozen=True)
class Batch:
    """What came of prompts that were handed over together, and what it cost."""

    answers: tuple[Answer, ...]
    wall_s: float
    cpu: Mapping[str, float]  # seconds by process: host, core, worker0, pid<N>
    settled: Mapping[str, float] = field(default_factory=dict)  # ... and work that was put off

    @property
    def cpu_s(self) -> float:
        """CPU time of all processes of the engine, and of those watched besides."""
        return sum(self.cpu.values())

    @property
    def settled_cpu_s(self) -> float:
        """The same, with work that was put off until after the last token."""
        return sum(self.settled.values())

    @property
    def one(self) -> Answer:
        """The answer where there was one prompt."""
        (answer,) = self.answers
        return answer


@dataclass(frozen=True)
class Group:
    """A group of the engine's KV cache: layers whose blocks are allocated together."""

    kind: str
    layers: tuple[str, ...]
    block_tokens: int
    page_bytes: int
    window: int | None


# ---- connectors ---------------------------------------------------------------------------------


def cenote_connector(socket_path: Path, **extra: Any) -> Connector:
    """kv_transfer_config of ours; *extra* goes into kv_connector_extra_config."""
    return {
        "kv_connector": "CenoteConnector",
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"socket": str(socket_path), **extra},
        "kv_load_failure_policy": "recompute",
    }


def example_connector(folder: Path) -> Connector:
    """kv_transfer_config of vLLM's own ExampleConnector: a folder a prefix, a file a layer."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


# ---- an engine ----------------------------------------------------------------------------------


@dataclass
class _Born:
    """A host process, however it was started."""

    channel: socket.socket
    folder: Path
    process: subprocess.Popen[bytes] | None = None  # None: a child of the nursery
    own_folder: bool = False


@dataclass
class Engine:
    """
    A running engine. start() makes one; a `with` block stops it at its end.

    Attributes:
        pids: "host", "core", "worker0", ...
        groups: Of its KV cache.
        blocks: Blocks of it, and block_tokens tokens in each.
    """

    folder: Path
    pids: dict[str, int] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    blocks: int = 0
    block_tokens: int = 0
    _born: _Born | None = None
    _buffer: bytearray = field(default_factory=bytearray)

    @classmethod
    def start(
        cls,
        model: Path,
        *,
        connector: Connector | None = None,
        environment: Mapping[str, str] | None = None,
        events: bool = False,
        folder: Path | None = None,
        **arguments: Any,
    ) -> Self:
        """
        Start an engine as vLLM starts it, and wait until it takes requests.

        Args:
            model: Its folder.
            connector: kv_transfer_config; None: no connector.
            environment: More of it.
            events: Publish KV events; see events().
            folder: For its log and sockets; else one that is removed with it.
            arguments: Of vllm.LLM, over those of engine_arguments().
        """
        at = folder or Path(tempfile.mkdtemp(prefix="cenote-engine-"))
        ours, theirs = socket.socketpair()
        try:
            with theirs, (at / "engine.log").open("ab") as log:
                process = subprocess.Popen(
                    host_command("--channel", str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno()],
                    env=engine_environment(),
                )
        except BaseException:
            ours.close()
            raise
        born = _Born(ours, at, process, own_folder=folder is None)
        made = engine_arguments(model, connector, **arguments)
        return cls(at, _born=born)._begin(made, dict(environment or {}), events=events)

    @classmethod
    def adopt(
        cls,
        channel: socket.socket,
        model: Path,
        *,
        folder: Path,
        connector: Connector | None = None,
        environment: Mapping[str, str] | None = None,
        events: bool = False,
        **arguments: Any,
    ) -> Self:
        """The same with a host process that somebody else started, at the end of *channel*."""
        made = engine_arguments(model, connector, **arguments)
        engine = cls(folder, _born=_Born(channel, folder))
        return engine._begin(made, dict(environment or {}), events=events)

    def _begin(
        self, arguments: Mapping[str, Any], environment: dict[str, str], *, events: bool
    ) -> Self:
        options = {
            "engine": arguments,
            "environment": environment,
            "log": str(self.folder / "engine.log"),
            "events": str(self.folder) if events else None,
        }
        try:
            self._send(options)
            said = self._hear("start", START_S)
        except BaseException:
            self.close()
            raise
        self.pids = said["pids"]
        self.groups = tuple(
            Group(**{**group, "layers": tuple(group["layers"])}) for group in said["groups"]
        )
        self.blocks, self.block_tokens = said["blocks"], said["block_tokens"]
        return self

    # ---- requests -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        each: Sequence[Mapping[str, Any]] | None = None,
        watch: Sequence[int] = (),
        settle: bool = False,
        wait_s: float = ANSWER_S,
        **params: Any,
    ) -> Batch:
        """
        Answer prompts, all handed over at once.

        Args:
            prompts: Token ids.
            each: Sampling parameters for each prompt, over *params*.
            watch: Processes whose CPU time is counted besides.
            settle: Wait until the engine is idle, and count work put off, too: `settled` has it.
            wait_s: How long; then EngineHung.
            params: Of vllm.SamplingParams, for all: max_tokens, seed, logprobs, ...;
                kv_transfer_params goes into extra_args.
        """
        said = self._request(
            "generate",
            wait_s,
            prompts=[list(prompt) for prompt in prompts],
            params=_sampling(len(prompts), each, params),
            watch=list(watch),
            settle=settle,
        )
        answers = tuple(map(_answer, said["answers"]))
        return Batch(answers, said["wall_s"], said["cpu"], said.get("settled", {}))

    def ask(self, prompt: Sequence[int], *, wait_s: float = ANSWER_S, **params: Any) -> Answer:
        """Answer one prompt."""
        return self.generate([prompt], wait_s=wait_s, **params).one

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        each: Sequence[Mapping[str, Any]] | None = None,
        **params: Any,
    ) -> list[str]:
        """Hand prompts over, and return their names at once; collect() waits for the answers."""
        said = self._request(
            "begin",
            prompts=[list(prompt) for prompt in prompts],
            params=_sampling(len(prompts), each, params),
        )
        return [str(name) for name in said["names"]]

    def collect(self, names: Sequence[str], wait_s: float = ANSWER_S) -> list[Answer]:
        """Wait for the answers to prompts that begin() handed over."""
        return [_answer(a) for a in self._request("collect", wait_s, names=list(names))["answers"]]

    def abort(self, names: Sequence[str]) -> None:
        """Abort requests that begin() handed over; collect() returns what they had."""
        self._request("abort", names=list(names))

    def reset(self, *, connector: bool = False, running: bool = False) -> bool:
        """Forget the engine's own prefix cache (and the connector's, and running requests')."""
        return bool(self._request("reset", connector=connector, running=running)["done"])

    def wait_until_idle(self) -> None:
        """Wait until it neither works nor spins, as it does for a second after each request."""
        self._request("idle")

    def stats(self) -> dict[str, float]:
        """vLLM's metrics by name, summed over labels; of histograms the sum."""
        return dict(self._request("stats")["stats"])

    def events(
        self, since: int = 0, at_least: int = 0, wait_s: float = END_S
    ) -> list[dict[str, Any]]:
        """KV events from sequence number *since* on; waits until there are so many."""
        said = self._request("events", wait_s * 2, since=since, at_least=at_least, wait_s=wait_s)
        return list(said["events"])

    def log(self) -> str:
        """Everything that its processes printed."""
        try:
            return (self.folder / "engine.log").read_text(errors="replace")
        except OSError:
            return ""

    # ---- ends -----------------------------------------------------------------------------------

    def kill(self, who: str = "all") -> None:
        """
        SIGKILL, and wait for the death.

        who: "all", or one of pids ("worker" is "worker0").
        """
        if who == "all":
            # found before the first of them is dead and its children have another parent
            doomed = [*self.pids.values(), *descendants(self.pids.values())]
        else:
            doomed = [self.pids["worker0" if who == "worker" else who]]
        kill_and_wait(doomed)

    def wait_dead(self, who: str, wait_s: float = END_S) -> bool:
        """Wait for the end of one of its processes; False: it lives on."""
        return wait_gone([self.pids["worker0" if who == "worker" else who]], wait_s)

    def stop(self) -> None:
        """Shut down as vLLM does, then close()."""
        try:
            self._request("stop", END_S)
        finally:
            self.close()

    def close(self) -> None:
        """Kill what is left of it and remove what it made."""
        born, self._born = self._born, None
        if born is None:
            return
        born.channel.close()
        known = [*self.pids.values(), *([born.process.pid] if born.process else ())]
        kill_and_wait([*known, *descendants(known)])
        if born.process is not None:
            born.process.wait()
        if born.own_folder:
            shutil.rmtree(born.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the channel ----------------------------------------------------------------------------

    def _request(self, do: str, limit_s: float = ANSWER_S, /, **fields: Any) -> dict[str, Any]:
        self._send({"do": do, **fields})
        return self._hear(do, limit_s)

    def _send(self, line: Mapping[str, Any]) -> None:
        if self._born is None:
            raise EngineFailed("this engine was stopped")
        try:
            self._born.channel.sendall(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise EngineFailed(f"the engine is gone ({error}).\n{self._tail()}") from error

    def _hear(self, asked: str, wait_s: float) -> dict[str, Any]:
        assert self._born is not None
        channel = self._born.channel
        channel.settimeout(wait_s)
        while b"\n" not in self._buffer:
            try:
                got = channel.recv(1 << 20)
            except TimeoutError:
                raise EngineHung(
                    f"{asked!r} was not answered within {wait_s:g} s.\n{self._tail()}"
                ) from None
            except OSError as error:
                got, why = b"", f" ({error})"
            else:
                why = ""
            if not got:
                raise EngineFailed(f"the engine ended during {asked!r}{why}.\n{self._tail()}")
            self._buffer += got
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        said: dict[str, Any] = json.loads(line)
        if not said["ok"]:
            raise EngineFailed(
                f"{asked!r} failed: {said['kind']}: {said['error']}\n{said['trace']}{self._tail()}"
            )
        return said

    def _tail(self) -> str:
        return f"The end of {self.folder / 'engine.log'}:\n{self.log()[-LOG_TAIL:]}"


def engine_arguments(model: Path, connector: Connector | None, **over: Any) -> dict[str, Any]:
    """The arguments of vllm.LLM: small, eager, the same tokens at every start."""
    made = {
        "model": str(model),
        "load_format": "auto" if (model / "model.safetensors").exists() else "dummy",
        "dtype": "float32",
        "seed": 0,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_num_seqs": 8,
        "block_size": 32,
        "kv_cache_memory_bytes": KV_BYTES,
        "disable_log_stats": False,
        "worker_extension_cls": "engine_probe.Probe",
        **over,
    }
    if connector is not None:
        made["kv_transfer_config"] = dict(connector)
    return made


def _sampling(
    count: int, each: Sequence[Mapping[str, Any]] | None, params: Mapping[str, Any]
) -> list[dict[str, Any]]:
    made = []
    for own in each or [{}] * count:
        one = {**params, **own}
        transfer = one.pop("kv_transfer_params", None)
        if transfer is not None:
            one["extra_args"] = {**(one.get("extra_args") or {}), "kv_transfer_params": transfer}
        made.append(one)
    return made


def _answer(said: Mapping[str, Any]) -> Answer:
    known = {f.name for f in dataclasses.fields(Answer)}
    fields = {name: value for name, value in said.items() if name in known}
    return Answer(**{**fields, "tokens": tuple(said["tokens"])})
