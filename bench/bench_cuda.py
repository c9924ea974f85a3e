# SPDX-License-Identifier: Apache-2.0
"""
Are copies between a device and a registered pool as fast as with torch's own pinned memory?

    python bench/bench_cuda.py [--rounds N]

Needs torch and a CUDA device; says that it was skipped elsewhere. A second session of the same
pool, which is not registered, shows what registration is worth. Times are the device's own events,
around copies of at least 256 MiB in all, one behind the other; every byte is compared at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench.common import (  # noqa: E402  # needs the path above
    MANIFEST,
    MIB,
    PrivateDaemon,
    Row,
    Skipped,
    beside,
    interleaved,
    pool_bytes,
    random_keys,
    report,
    seconds,
)

from cenote.client import cuda  # noqa: E402

ROUNDS: Final = 7
SIZES: Final = (MIB, 32 * MIB, 256 * MIB)
MOVED_BYTES: Final = 256 * MIB  # at least, in each round
SLAB_CHUNKS: Final = 4  # of large chunks: a slab is the least that they take
BAR: Final = 0.95
FLUSH_S: Final = 60.0


def device_of() -> tuple[Any, str]:
    """
    torch, and the name of its device.

    Raises:
        Skipped: There is no torch, or no device.
    """
    try:
        import torch
    except ImportError as error:
        raise Skipped("torch is not installed") from error
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise Skipped("torch finds no CUDA device")
    torch.cuda.init()
    return torch, str(torch.cuda.get_device_name())


def _rate(torch: Any, target: Any, source: Any) -> Callable[[], float]:
    """A contestant: GB/s of copies from *source* to *target*, by the device's clock."""
    nbytes = int(source.nbytes)
    repeats = max(2, MOVED_BYTES // nbytes)

    def run() -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(repeats):
            target.copy_(source, non_blocking=True)
        ended.record()
        ended.synchronize()
        took_s = float(begun.elapsed_time(ended)) / 1e3
        return repeats * nbytes / took_s / 1e9

    return run


def _compared(way: str, nbytes: int, took: dict[str, list[float]]) -> list[Row]:
    size = f"{nbytes // MIB} MiB"
    return [
        beside(
            f"{way}, registered pool, {size}",
            "GB/s",
            took["pool"],
            took["torch"],
            "torch's pinned memory",
            bar=BAR,
            at_most=False,
        ),
        beside(
            f"{way}, pool that is not registered, {size}",
            "GB/s",
            took["plain"],
            took["torch"],
            "torch's pinned memory",
        ),
    ]


def _same(way: str, wanted: Any, found: Any) -> None:
    if not np.array_equal(np.asarray(wanted), np.asarray(found)):
        raise RuntimeError(f"{way}: the bytes that arrived are not those that were sent")


def _copies(torch: Any, nbytes: int, rounds: int) -> list[Row]:
    """Both ways, for chunks of one size."""
    with ExitStack() as stack:
        daemon = stack.enter_context(PrivateDaemon(pool_bytes(2 * SLAB_CHUNKS * nbytes)))
        ours, plain = (stack.enter_context(daemon.connect()) for _ in range(2))
        found: list[cuda.Registration] = []
        register_s = seconds(lambda: found.append(cuda.register(ours)))
        pinned = stack.enter_context(found[0])
        if pinned.failed is not None:
            raise Skipped(f"the pool could not be registered: {pinned.failed}")
        key = random_keys(1)[0]
        bytes_in = np.random.default_rng(5).integers(0, 256, nbytes, dtype=np.uint8)
        caches = {"pool": ours.namespace(MANIFEST), "plain": plain.namespace(MANIFEST)}
        with caches["pool"].put(key, nbytes) as w:
            w.copy_from(bytes_in)
        caches["pool"].flush(FLUSH_S)
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        host.numpy()[:] = bytes_in
        device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        rows = [_registration(register_s, pinned)] if nbytes == SIZES[-1] else []

        sources = {"torch": host}
        for name, cache in caches.items():
            chunk = cache.get(key)
            assert chunk is not None
            assert pinned.covers(chunk.address, nbytes) == (name == "pool")
            sources[name] = chunk.tensor("uint8")
        took = interleaved({n: _rate(torch, device, s) for n, s in sources.items()}, rounds)
        for name, source in sources.items():
            device.zero_()
            device.copy_(source)
            _same(f"host to device, {name}", bytes_in, device.cpu())
        rows += _compared("host to device", nbytes, took)
        sources.clear()

        puts = {name: cache.put(random_keys(1)[0], nbytes) for name, cache in caches.items()}
        targets = {"torch": host, **{name: put.tensor() for name, put in puts.items()}}
        took = interleaved({n: _rate(torch, t, device) for n, t in targets.items()}, rounds)
        torch.cuda.synchronize()
        for name, target in targets.items():
            _same(f"device to host, {name}", bytes_in, target)
        rows += _compared("device to host", nbytes, took)
        targets.clear()
        for put in puts.values():
            put.abort()
        return rows


def _registration(took_s: float, pinned: cuda.Registration) -> Row:
    gb = pinned.bytes / 1e9
    return Row(
        "register a writer's pool, a GB", took_s / gb, "s", note=f"{gb:.1f} GB, twice mapped"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Copies between a device and the pool.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    try:
        torch, name = device_of()
        rows = [row for nbytes in SIZES for row in _copies(torch, nbytes, options.rounds)]
    except Skipped as why:
        report("cuda", [], skipped=str(why))
        return 0
    report("cuda", rows, rounds=options.rounds, device=name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
