# SPDX-License-Identifier: Apache-2.0
"""Processes of engines: their environment, who belongs to whom, and how they end for certain."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import psutil

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent
PYTHON: Final = Path(os.environ.get("CENOTE_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
TRACKER: Final = b"multiprocessing.resource_tracker"  # in its command line
NEXT: Final = PYTHON.parent.parent / "next"  # a newer vLLM: see setup-vllm
END_S: Final = 60.0  # a limit for a hang, not a claim about speed


def host_command(*arguments: str) -> list[str]:
    """The command of an engine host, which ends with its channel."""
    return [str(PYTHON), str(HERE / "engine_host.py"), *arguments]


def nursery_command(path: Path) -> list[str]:
    """The command of a nursery, which the kernel kills when the thread that starts it ends."""
    argv = host_command("--nursery", str(path))
    setpriv = shutil.which("setpriv")  # util-linux; without it only a regular end is clean
    return [setpriv, "--pdeathsig", "KILL", *argv] if setpriv else argv


def engine_environment(*, newer: bool = False) -> dict[str, str]:
    """
    Ours, without what would configure cenote, and with what keeps vLLM offline and comparable.

    newer: of the release of vLLM in NEXT, which hides the installed one.

    One thread that no CPU is chosen for: several engines run side by side, and vLLM would put the
    workers of all of them on the same CPU. What vLLM finds out about an architecture, in a process
    that imports everything again, it keeps in build/.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CENOTE_", "CENOTED_"))}
    paths = [*([str(NEXT)] if newer else []), str(HERE), *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **kept,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(paths),  # for engine_probe
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(ROOT / "build" / ("vllm-cache-next" if newer else "vllm-cache")),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_COLOR": "0",
    }


def descendants(pids: Iterable[int]) -> list[int]:
    """Every process below these, as it is now."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found += [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return found


def kill_and_wait(pids: Iterable[int], wait_s: float = END_S) -> None:
    """
    SIGKILL to each, and wait until all of them are gone. RuntimeError when one is not.

    Resource trackers of Python's multiprocessing are spared: when everybody else is dead they
    remove the names in /dev/shm that were left there, and end by themselves.
    """
    with _pidfds(dict.fromkeys(pids)) as descriptors:
        for pid, descriptor in descriptors.items():
            with contextlib.suppress(ProcessLookupError):
                if not _is_tracker(pid):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        left = _wait(descriptors, wait_s)
    if left:
        raise RuntimeError(
            f"processes {left} live {wait_s:g} s after SIGKILL: are they in D state?"
        )


def _is_tracker(pid: int) -> bool:
    try:
        return TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_gone(pids: Iterable[int], wait_s: float = END_S) -> bool:
    """Wait for the end of all of these; False: some live on."""
    with _pidfds(pids) as descriptors:
        return not _wait(descriptors, wait_s)


@contextlib.contextmanager
def _pidfds(pids: Iterable[int]) -> Iterator[dict[int, int]]:
    """Descriptors of those that are there; one becomes readable when its process ends."""
    descriptors: dict[int, int] = {}
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                descriptors[pid] = os.pidfd_open(pid)
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _wait(descriptors: dict[int, int], wait_s: float) -> list[int]:
    """Wait until processes ended; return those that did not."""
    end_s, waiting = time.monotonic() + wait_s, {fd: pid for pid, fd in descriptors.items()}
    poll = select.poll()
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    while waiting:
        ended = poll.poll(max(0.0, end_s - time.monotonic()) * 1000)
        if not ended:
            break
        for descriptor, _ in ended:
            poll.unregister(descriptor)
            del waiting[descriptor]
    return sorted(waiting.values())
