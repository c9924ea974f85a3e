# SPDX-License-Identifier: Apache-2.0
"""
A process that runs one vLLM engine and does what lines of JSON on a socket say. See engines.py.

    python engine_host.py --channel FD          vLLM starts its processes as it always does
    python engine_host.py --nursery PATH        imports vLLM once; an engine a connection, by fork

The first line holds the options, each following one is a request {"do": name, ...}; each is
answered by one line, {"ok": true, ...} or {"ok": false, "error": ..., "kind": ..., "trace": ...}.

Scheduler and worker are processes of their own in both, as in production. A nursery saves the time
in which three processes import vLLM one after the other (7 s each), which is nearly all of a start:
its engines are forked, and they fork theirs. vLLM's CPU platform asks for spawn, because a process
forked after OpenMP began to run threads hangs; with OMP_NUM_THREADS=1 there never are any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import json
import multiprocessing.connection
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

PR_SET_CHILD_SUBREAPER: Final = 36
CPUCLOCK_SCHED: Final = 2
TRACKER: Final = "multiprocessing.resource_tracker"  # in its command line
IDLE_LOOK_S: Final = 0.05  # between two looks at the CPU clocks of an engine that may be idle
IDLE_CPU_S: Final = 0.003  # of a window of this length: an idle engine wakes up now and then
EVENTS_LOOK_MS: Final = 100
END_OF_REPLAY: Final = (-1).to_bytes(8, "big", signed=True)

Answer = dict[str, Any]


def cpu_s(pid: int) -> float:
    """CPU time that a process has used in all its threads, to the nanosecond; 0.0: it is gone."""
    with contextlib.suppress(OSError):
        return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)
    return 0.0


def helpers_cpu_s(pid: int) -> float:
    """CPU time of the threads of a process that live, the main one left out; 0.0: it is gone."""
    found = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            if task.name != str(pid):
                found += int((task / "schedstat").read_text().split()[0])
    return found / 1e9


class Host:
    """
    The engine and the requests to it.

    Args:
        options: {"engine": arguments of vllm.LLM, "events": folder for KV events or None}.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        arguments = dict(options["engine"])
        self._events_at = options.get("events")
        if self._events_at:
            arguments["kv_events_config"] = {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"ipc://{self._events_at}/events",
                "replay_endpoint": f"ipc://{self._events_at}/replay",
                **(arguments.get("kv_events_config") or {}),
            }
        self.llm = LLM(**arguments)
        self.engine = self.llm.llm_engine
        self._pending: dict[str, Answer] = {}  # begun and not collected
        self._numbers = 0
        self._pids = self._find_pids()
        threading.Thread(target=self._watch_core, daemon=True).start()

    def _watch_core(self) -> None:
        """
        Fail the request that waits when the scheduler's process dies.

        vLLM notices that death, and fails what comes after it; a synchronous client that waits
        already would wait for ever.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        client = self.engine.engine_core
        (core,) = client.resources.engine_manager.processes
        multiprocessing.connection.wait([core.sentinel])
        client.outputs_queue.put_nowait(EngineDeadError())

    # ---- who is there ---------------------------------------------------------------------------

    def _find_pids(self) -> dict[str, int]:
        """The processes of this engine: this one, the scheduler's, the workers'."""
        import psutil

        (core,) = [p.pid for p in self.engine.engine_core.resources.engine_manager.processes]
        below = psutil.Process(core).children(recursive=True)
        workers = [p.pid for p in below if TRACKER not in " ".join(p.cmdline())]
        named = {f"worker{i}": pid for i, pid in enumerate(workers)}
        return {"host": os.getpid(), "core": core, **named}

    def describe(self) -> Answer:
        """What the ready line says."""
        cache = self.engine.vllm_config.cache_config
        return {
            "pids": self._pids,
            "blocks": cache.num_gpu_blocks,
            "block_tokens": cache.block_size,
            "groups": self.llm.collective_rpc("cenote_kv_groups")[0],
        }

    # ---- requests -------------------------------------------------------------------------------

    def begin(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> Answer:
        """Hand prompts to the engine, and return their names without waiting."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        names = []
        for prompt, wanted in zip(prompts, params, strict=True):
            self._numbers += 1
            salt = {"cache_salt": wanted.pop("cache_salt")} if "cache_salt" in wanted else {}
            sampling = SamplingParams(
                **{"temperature": 0.0, "ignore_eos": True, "detokenize": False, **wanted}
            )
            sampling.output_kind = RequestOutputKind.CUMULATIVE  # the first token is seen as such
            name, begun_s = f"r{self._numbers}", time.perf_counter()
            inside = self.engine.add_request(name, {"prompt_token_ids": prompt, **salt}, sampling)
            self._pending[name] = {"name": name, "inside": inside, "begun_s": begun_s}
            names.append(name)
        return {"names": names}

    def collect(self, names: list[str]) -> Answer:
        """Wait until these are finished; return what came out of them."""
        while any("finish" not in self._pending[name] for name in names):
            for output in self.engine.step():
                self._note(output)
        answers = [self._pending.pop(name) for name in names]
        for answer in answers:
            del answer["begun_s"], answer["inside"]
        return {"answers": answers}

    def _note(self, output: Any) -> None:
        """Keep what an output of the engine says about a request."""
        answer = self._pending[output.request_id]
        completion, since_s = output.outputs[0], time.perf_counter() - answer["begun_s"]
        if completion.token_ids:
            answer.setdefault("ttft_s", since_s)
        if not output.finished:
            return
        stats = output.metrics
        answer.update(
            tokens=list(completion.token_ids),
            finish=completion.finish_reason,
            cached=output.num_cached_tokens or 0,
            wall_s=since_s,
            preemptions=stats.num_preemptions if stats else 0,
            kv_transfer_params=output.kv_transfer_params,
        )
        if completion.logprobs:
            answer["logprobs"] = [
                {str(token): entry.logprob for token, entry in step.items()}
                for step in completion.logprobs
            ]

    def abort(self, names: list[str]) -> Answer:
        """Abort requests; collect() then returns what they had."""
        self.engine.abort_request([self._pending[name]["inside"] for name in names], internal=True)
        for name in names:
            aborted = {"tokens": [], "cached": 0, "wall_s": 0.0, "preemptions": 0}
            self._pending[name] = {**aborted, **self._pending[name], "finish": "abort"}
        return {}

    def generate(
        self,
        prompts: list[list[int]],
        params: list[dict[str, Any]],
        watch: list[int],
        settle: bool,
    ) -> Answer:
        """
        begin() and collect(), with the CPU time that it took.

        watch: other processes whose CPU time is counted (the daemon's).
        settle: wait until the engine is idle, and say what it had used by then, too. Of work that
            was put off, that is: the main threads, which spin for a second or two before they
            sleep, count until the last token only.
        """
        watched = {**self._pids, **{f"pid{pid}": pid for pid in watch}}
        before = {name: cpu_s(pid) for name, pid in watched.items()}
        begun_s = time.perf_counter()
        answers = self.collect(self.begin(prompts, params)["names"])["answers"]
        wall_s = time.perf_counter() - begun_s
        used = {name: cpu_s(pid) - before[name] for name, pid in watched.items()}
        answer = {"answers": answers, "wall_s": wall_s, "cpu": used}
        if settle:
            clock = {
                name: cpu_s if pid in watch else helpers_cpu_s for name, pid in watched.items()
            }
            since = {name: clock[name](pid) for name, pid in watched.items()}
            self._wait_until_idle([pid for name, pid in watched.items() if name != "host"])
            answer["settled"] = {
                name: used[name] + max(0.0, clock[name](pid) - since[name])
                for name, pid in watched.items()
            }
        return answer

    @staticmethod
    def _wait_until_idle(pids: list[int]) -> None:
        pause, last = threading.Event(), sum(map(cpu_s, pids))
        while True:
            pause.wait(IDLE_LOOK_S)
            last, before = sum(map(cpu_s, pids)), last
            if last - before < IDLE_CPU_S:
                return

    # ---- the rest -------------------------------------------------------------------------------

    def idle(self) -> Answer:
        """Wait until no process of the engine works or spins."""
        self._wait_until_idle([pid for name, pid in self._pids.items() if name != "host"])
        return {}

    def reset(self, connector: bool, running: bool) -> Answer:
        """Forget the prefix cache, and the connector's with connector=True."""
        return {"done": bool(self.llm.reset_prefix_cache(running, connector))}

    def stats(self) -> Answer:
        """
        vLLM's own metrics by name: counters, gauges and the sums of histograms, over all labels.

        As /metrics shows them: LLM.get_metrics() makes whole numbers of counters, and so seconds 0.
        """
        from prometheus_client import REGISTRY

        found: dict[str, float] = collections.defaultdict(float)
        for family in REGISTRY.collect():
            for sample in family.samples:
                if sample.name in {family.name, f"{family.name}_total", f"{family.name}_sum"}:
                    found[family.name] += sample.value
        return {"stats": dict(found)}

    def events(self, since: int, at_least: int, wait_s: float) -> Answer:
        """
        KV events that the engine published, oldest first, from sequence number *since* on.

        Asked of the replay socket until there are *at_least* so many or wait_s is over: a
        subscriber may miss the first ones.
        """
        import msgspec
        import zmq

        if not self._events_at:
            raise ValueError("this engine publishes no KV events: start it with events=True")
        end_s, found = time.monotonic() + wait_s, list[Answer]()
        with zmq.Context() as context:
            while True:
                with context.socket(zmq.DEALER) as replay:
                    replay.connect(f"ipc://{self._events_at}/replay")
                    replay.send_multipart([b"", since.to_bytes(8, "big")])
                    found = list(_replayed(replay, msgspec.msgpack.decode, end_s))
                if len(found) >= at_least or time.monotonic() > end_s:
                    return {"events": found}

    def stop(self) -> Answer:
        """Shut the engine down as vLLM does."""
        self.engine.engine_core.shutdown()
        return {}


def _replayed(replay: Any, decode: Callable[[bytes], Any], end_s: float) -> Iterator[Answer]:
    while True:
        if not replay.poll(EVENTS_LOOK_MS):
            if time.monotonic() > end_s:
                return
            continue
        _, topic, number, payload = replay.recv_multipart()
        if number == END_OF_REPLAY:
            return
        for event in decode(payload)[1]:
            yield {
                "number": int.from_bytes(number, "big"),
                "topic": topic.decode(),
                "event": _plain(event),
            }


def _plain(value: Any) -> Any:
    """Return what JSON can hold: bytes become hex."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# ---- the process --------------------------------------------------------------------------------


def serve(channel: socket.socket, *, forked: bool) -> None:
    """Read the options, start the engine, and answer requests until the channel ends."""
    lines, host = channel.makefile("r", encoding="utf-8"), None

    def say(answer: Answer) -> None:
        channel.sendall(json.dumps(answer).encode() + b"\n")

    for line in lines:
        request, name = json.loads(line), "start"
        try:
            if host is None:
                _prepare(channel, request, forked=forked)
                host = Host(request)
                answer = host.describe()
            else:
                name = request.pop("do")
                answer = getattr(host, name)(**request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test hears of it
            trace = traceback.format_exc()
            print(trace, file=sys.stderr, flush=True)
            say({"ok": False, "kind": type(error).__name__, "error": str(error), "trace": trace})
            if host is None:
                break
        else:
            say({"ok": True, **answer})
        if name == "stop":
            return
    _kill_below()


def _prepare(channel: socket.socket, options: dict[str, Any], *, forked: bool) -> None:
    """Send what is printed to the log; take the environment."""
    log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.update(options["environment"])
    channel.set_inheritable(False)
    threading.Thread(target=_end_with, args=[channel], daemon=True).start()
    if not forked:
        return
    # Engine processes must not keep the channel open: its end says that this process ended.
    os.register_at_fork(after_in_child=channel.close)
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config

    def and_fork(config: Any) -> None:
        check(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = staticmethod(and_fork)


def _end_with(channel: socket.socket) -> None:
    """
    End this engine, all of its processes, when whoever asked for it is gone.

    However that one ended, and whatever this one waits for. vLLM ends its processes when it ends in
    order, but when this process is killed its scheduler lives on.
    """
    poll = select.poll()
    poll.register(channel, select.POLLRDHUP)
    poll.poll()
    _kill_below()
    os._exit(1)


def _kill_below() -> None:
    """SIGKILL to what this process started."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if TRACKER not in " ".join(process.cmdline()):  # it removes what they leave in /dev/shm
                process.kill()


def nursery(path: Path) -> None:
    """Import vLLM, then fork an engine host for every connection."""
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401 - what an engine would import

    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(
            f"importing vLLM started {threads - 1} threads: a fork would not have them. "
            "Start engines without a nursery (CENOTE_VLLM_FORK=no)"
        )
    # whoever is orphaned when a host is killed is ours to reap
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(woken, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is woken:
                woken.recv(4096)
                _reap()
                continue
            channel, _ = listener.accept()
            if os.fork() == 0:
                _newborn(channel, listener, woken, wake, waiting)
            channel.close()


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _newborn(channel: socket.socket, *inherited: Any) -> None:
    """What a forked host does; it never returns."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for thing in inherited:
            thing.close()
        serve(channel, forked=True)
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    """Run one engine, or a nursery."""
    parser = argparse.ArgumentParser(description="Run a vLLM engine for tests and benches.")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--channel", type=int, help="descriptor of a socket: run one engine")
    how.add_argument("--nursery", type=Path, help="listen here: an engine a connection")
    options = parser.parse_args()
    if options.nursery:
        nursery(options.nursery)
    with socket.socket(fileno=options.channel) as channel:
        serve(channel, forked=False)


if __name__ == "__main__":
    main()
