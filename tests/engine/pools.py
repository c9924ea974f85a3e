# SPDX-License-Identifier: Apache-2.0
"""What tests see of a pool beside the engines that use it."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.engine.engines import Engine
from tests.engine.processes import END_S

from cenote.client import Chunk, Event, Pool, connect
from cenote.client.chunk import Token

CHUNK: Final = 256  # tokens of a chunk, by default
POLL_S: Final = 0.02


@contextmanager
def watching(socket: Path) -> Iterator[Pool]:
    """A session of the test's own, which only looks."""
    with connect(socket, role="reader", label="test") as pool:
        yield pool


def wait_until(
    true: Callable[[], Any], what: Callable[[], object] = lambda: "", wait_s: float = END_S
) -> Any:
    """Wait for something that no descriptor tells of; a minute is a hang."""
    end_s = time.monotonic() + wait_s
    pause = threading.Event()
    while not (found := true()):
        assert time.monotonic() < end_s, f"it did not come to pass: {what()}"
        pause.wait(POLL_S)
    return found


def stored(pool: Pool) -> list[Event]:
    """The chunks that were stored since the pool was made, as far as its feed reaches back."""
    return [
        event
        for event in pool.events(since=1, follow=False)
        if isinstance(event, Event) and event.kind == "stored"
    ]


def chunk_of(pool: Pool, event: Event) -> Chunk | None:
    """Lease the chunk that an event tells of; None when it is gone."""
    return pool.open(Token(pool.pool_id, event.ref, event.key[:8]).pack())


def store(engine: Engine, pool: Pool, prompts: Sequence[Sequence[int]], chunks: int) -> None:
    """Have an engine compute prompts, and wait until the pool has so many chunks."""
    engine.generate(prompts, max_tokens=1)
    wait_for_chunks(pool, chunks)
    assert wait_until(engine.reset)  # it refuses while a save is not known to be over


def wait_for_chunks(pool: Pool, count: int) -> None:
    """Wait until the pool has so many chunks."""
    wait_until(lambda: pool.stats().chunks == count, lambda: f"{pool.stats().chunks} of {count}")


def chunks_of(prompts: Sequence[Sequence[int]], chunk_tokens: int = CHUNK) -> int:
    """How many different chunks prompts have, one group and one rank."""
    return len(
        {
            tuple(prompt[:end])
            for prompt in prompts
            for end in range(chunk_tokens, len(prompt) + 1, chunk_tokens)
        }
    )


def full(prompt: Sequence[int], chunk_tokens: int = CHUNK) -> int:
    """Tokens of a prompt that lie in full chunks."""
    return len(prompt) // chunk_tokens * chunk_tokens


def region_of(pid: int, least_bytes: int) -> Path:
    """Return the daemon's descriptor of a region of so many bytes, as a path that can be opened."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return next(link for link in links if link.exists() and link.stat().st_size >= least_bytes)


def damage(pool: Pool, event: Event, region: Path) -> None:
    """Change one byte of a chunk behind everybody's back, in the file that its region is."""
    chunk = chunk_of(pool, event)
    assert chunk is not None
    with chunk:
        at = random.Random(7).randrange(chunk.nbytes)
        begin = bytes(chunk.memory[:4096])
        before = chunk.memory[at]
    file = os.open(region, os.O_RDWR)
    try:
        size = os.fstat(file).st_size
        offset = next(
            start for start in range(0, size, 4096) if os.pread(file, 4096, start) == begin
        )
        assert os.pread(file, 1, offset + at) == bytes([before])
        os.pwrite(file, bytes([before ^ 0xFF]), offset + at)
    finally:
        os.close(file)
