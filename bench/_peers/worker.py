# SPDX-License-Identifier: Apache-2.0
"""
Writer and reader: what is timed happens here, in the environment of the peer.

    python -P bench/_peers/worker.py PEER writer|reader FOLDER

One JSON map a line on stdin says what to do, one a line on stdout what came of it. Only standard
library and numpy, besides the peer.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat, starmap
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT))

from bench._peers import registry  # noqa: E402  # needs the path above
from bench._peers.base import LOOKUP_BYTES, SIZES, Array, Peer  # noqa: E402

PASS_US: Final = 20_000  # a pass is repeated until it takes this long, so that a clock can tell
REPEATS_MAX: Final = 256


def payload(nbytes: int) -> Array:
    """Return the bytes that all chunks of a size have in common."""
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)


def stamp(chunk: Array, index: int) -> None:
    """Make the chunk different from its neighbours: at its begin, middle and end."""
    words = chunk.view(np.uint64)
    words[0] = words[len(words) // 2] = words[-1] = index


def run(calls: Iterable[Any]) -> None:
    """Make lazy calls, as fast as Python can."""
    deque(calls, maxlen=0)


def time_us(operate: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], times: int) -> float:
    """Microseconds of one call: *operate* with each of *arguments*, all of it *times* over."""
    gc.disable()
    started_ns = time.perf_counter_ns()
    for _ in repeat(None, times):
        run(starmap(operate, arguments))
    passed_ns = time.perf_counter_ns() - started_ns
    gc.enable()
    return passed_ns / 1000 / (times * len(arguments))


def repeats(operate: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> int:
    """How often must *arguments* be gone through for a pass of PASS_US?"""
    once_us = time_us(operate, arguments, 1) * len(arguments)
    return max(1, min(REPEATS_MAX, int(PASS_US / max(once_us, 1))))


class Worker:
    """One side of a peer, and the buffers of the reference, which is numpy.copyto."""

    def __init__(self, peer: Peer, role: str) -> None:
        self.peer = peer
        self.role = role
        self.walk: list[Array] = []

    def connect(self) -> None:
        """Connect."""
        self.peer.connect(self.role)

    def _keys(self, nbytes: int) -> list[Any]:
        return [self.peer.key(nbytes, index) for index in range(SIZES[nbytes])]

    def _make_walk(self, nbytes: int) -> None:
        """Warm shared memory of the same extent as the chunks, in 4 KiB pages as theirs."""
        self.walk = []
        total = nbytes * SIZES[nbytes]
        descriptor = os.memfd_create("side-by-side-walk")
        os.ftruncate(descriptor, total)
        whole = np.frombuffer(mmap.mmap(descriptor, total), np.uint8)
        os.close(descriptor)
        whole[:] = 1
        self.walk = [whole[i : i + nbytes] for i in range(0, total, nbytes)]

    def put(self, nbytes: int, rounds: int) -> dict[str, list[float]]:
        """Writer: store all chunks of a size, over and over, beside the reference."""
        peer, keys = self.peer, self._keys(nbytes)
        sources = peer.sources(nbytes, len(keys))
        common = payload(nbytes)
        for index, source in enumerate(sources):
            source[:] = common
            stamp(source, index)
        self._make_walk(nbytes)
        puts = list(zip(keys, sources, strict=True))
        copies = list(zip(self.walk, sources, strict=True))
        times: dict[str, list[float]] = {"memcpy": [], "put": []}
        for turn in range(rounds + 1):
            peer.delete(keys)
            if peer.lookup(peer.batch(keys)):
                raise ValueError(f"chunks of {nbytes} bytes are still there after their deletion")
            copy_us = time_us(np.copyto, copies, 1)
            put_us = time_us(peer.put, puts, 1) + time_us(peer.settle, [()], 1) / len(puts)
            if turn:  # the first touches the memory
                times["memcpy"].append(copy_us)
                times["put"].append(put_us)
        return times

    def get(self, nbytes: int, rounds: int) -> dict[str, list[float]]:
        """Reader: check every byte, then views and copies beside the reference."""
        peer, keys = self.peer, self._keys(nbytes)
        target, expected = peer.target(nbytes), payload(nbytes)
        for index, key in enumerate(keys):
            stamp(expected, index)
            target[:] = 0
            peer.copy(key, target)
            if not np.array_equal(target, expected):
                raise ValueError(f"chunk {index} of {nbytes} bytes has other bytes than were put")
            if peer.view(key) != nbytes:
                raise ValueError(f"the view of chunk {index} has not {nbytes} bytes")
        self._make_walk(nbytes)
        copies: list[tuple[Any, ...]] = [(target, source) for source in self.walk]
        gets: list[tuple[Any, ...]] = [(key, target) for key in keys]
        views: list[tuple[Any, ...]] = [(key,) for key in keys]
        passes: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]], int]] = {
            "memcpy": (np.copyto, copies, repeats(np.copyto, copies)),
            "copy": (peer.copy, gets, repeats(peer.copy, gets)),
            "view": (peer.view, views, repeats(peer.view, views)),
        }
        times: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(rounds):
            for name, (operate, arguments, often) in passes.items():
                times[name].append(time_us(operate, arguments, often))
        return times

    def prepare_lookup(self) -> None:
        """Writer: store what only `lookup` needs."""
        self.peer.prepare_lookup()

    def lookup(self, rounds: int) -> dict[str, list[float]]:
        """Reader: all keys of one size, all present; that absent ones are told is checked."""
        peer, keys = self.peer, self._keys(LOOKUP_BYTES)
        batch = peer.batch(keys)
        found = peer.lookup(batch)
        if found != len(keys):
            raise ValueError(f"{found} of {len(keys)} keys were found")
        half = len(keys) // 2
        broken = [*keys[:half], peer.key(LOOKUP_BYTES, len(keys)), *keys[half + 1 :]]
        found = peer.lookup(peer.batch(broken))
        if found != half:
            raise ValueError(
                f"{found} keys were found before one that was never stored, not {half}"
            )
        calls = [(batch,)]
        often = repeats(peer.lookup, calls)
        return {"lookup": [time_us(peer.lookup, calls, often) for _ in range(rounds)]}

    def delete(self, nbytes: int) -> None:
        """Writer: make room for the next size."""
        self.walk = []
        self.peer.delete(self._keys(nbytes))


def main() -> int:
    name, role, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print: not among our answers
    worker = Worker(registry.load(name)(Path(folder)), role)
    for line in sys.stdin:
        request = json.loads(line)
        operation = getattr(worker, request.pop("operation"))
        try:
            answer = {"result": operation(**request)}
        except Exception as error:  # noqa: BLE001  # whatever a peer raises is its reason
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
    worker.peer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
