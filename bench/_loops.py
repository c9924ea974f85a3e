# SPDX-License-Identifier: Apache-2.0
"""
Builds c/loops.c and binds it to this process's cenote: C loops over a real client's session.

The shared object goes to build/bench/ under a name made from its sources.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cffi
import numpy as np
from bench.common import KEY_BYTES, Skipped

from cenote._native import _core
from cenote.shm.errors import check

if TYPE_CHECKING:
    from cenote.client import Cache

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD_DIR: Final = ROOT / "build" / "bench"
INCLUDE_DIR: Final = ROOT / "cffi_src" / "include"
CFLAGS: Final = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
LINE_BYTES: Final = 64
CDEF: Final = """
struct loop_core { void *lease, *release, *reserve, *commit; };
int loop_cycle(uint32_t *ret_cycle, uint64_t lines, uint64_t seed);
double loop_loads(const uint32_t *cycle, uint64_t lines, uint64_t from, double run_s);
double loop_hits(const struct loop_core *core, void *client, uint32_t ns_slot, const uint8_t *keys,
                 uint64_t key_count, uint64_t from, double run_s);
int loop_fill(const struct loop_core *core, void *client, uint32_t ns_slot, const uint8_t *keys,
              uint64_t key_count, uint64_t data_bytes);
double loop_touch(const uint8_t *data, uint64_t bytes, uint64_t page_bytes);
void loop_read(const uint64_t *words, uint64_t count);
"""


def build() -> Path:
    """
    Compile the loops, unless this version of them is there already.

    Raises:
        Skipped: There is no C compiler ($CC, else cc), or no source beside the package.
    """
    source = ROOT / "bench" / "c" / "loops.c"
    digest = hashlib.sha256(repr(CFLAGS).encode())
    for path in [source, *sorted(INCLUDE_DIR.glob("*.h"))]:
        digest.update(path.read_bytes())
    target = BUILD_DIR / f"loops-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    command = [os.environ.get("CC", "cc"), *CFLAGS, f"-I{INCLUDE_DIR}", "-o", str(partial)]
    try:
        subprocess.run([*command, str(source)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skipped(f"{source.name} could not be compiled: {error}") from error
    partial.replace(target)
    return target


@dataclass(frozen=True)
class Session:
    """A namespace of an attached pool, as C sees it."""

    client: Any
    slot: int

    @classmethod
    def of(cls, cache: Cache) -> Session:
        """The session and slot under *cache*, which must outlive it."""
        binding = cache._binding
        return cls(int(_core.ffi.cast("uintptr_t", binding.attachment.handle.client)), binding.slot)


class Loops:
    """The loops, over the functions of cenote._native._core."""

    def __init__(self) -> None:
        self._ffi = cffi.FFI()
        self._ffi.cdef(CDEF)
        self._lib: Any = self._ffi.dlopen(str(build()))
        self._core = self._ffi.new("struct loop_core *")
        for name in ("lease", "release", "reserve", "commit"):
            function = _core.ffi.addressof(_core.lib, f"cn_{name}")
            address = int(_core.ffi.cast("uintptr_t", function))
            setattr(self._core, name, self._ffi.cast("void *", address))

    def cycle(self, words: np.ndarray[Any, np.dtype[np.uint32]], seed: int = 1) -> None:
        """Make memory (16 words a line) a random cycle through its lines."""
        if self._lib.loop_cycle(self._at("uint32_t *", words), words.size // 16, seed) != 0:
            raise MemoryError(f"no memory for a cycle through {words.nbytes} bytes")

    def loads_per_s(
        self, words: np.ndarray[Any, np.dtype[np.uint32]], start: int, run_s: float
    ) -> float:
        """Dependent random loads a second."""
        at = self._at("uint32_t *", words)
        return float(self._lib.loop_loads(at, words.size // 16, start, run_s))

    def hits_per_s(self, session: Session, keys: bytes, start: int, run_s: float) -> float:
        """Leases and releases a second of *keys*, one behind the other, all present."""
        client = self._ffi.cast("void *", session.client)
        at, count = self._ffi.from_buffer("uint8_t[]", keys), len(keys) // KEY_BYTES
        found = self._lib.loop_hits(self._core, client, session.slot, at, count, start, run_s)
        if found < 0:
            raise RuntimeError("a chunk that was stored is not there: make the pool larger")
        return float(found)

    def read(self, address: int, nbytes: int) -> None:
        """Read all of that memory, by this thread."""
        self._lib.loop_read(self._ffi.cast("uint64_t *", address), nbytes // 8)

    def fill(self, session: Session, keys: bytes, data_bytes: int) -> None:
        """Commit a chunk under each key without touching its memory."""
        client = self._ffi.cast("void *", session.client)
        at, count = self._ffi.from_buffer("uint8_t[]", keys), len(keys) // KEY_BYTES
        status = self._lib.loop_fill(self._core, client, session.slot, at, count, data_bytes)
        check(status, f"store {count} chunks of {data_bytes} bytes")

    def touch_s(self, address: int, nbytes: int, page_bytes: int) -> float:
        """Seconds to read one byte of each page."""
        at = self._ffi.cast("uint8_t *", address)
        return float(self._lib.loop_touch(at, nbytes, page_bytes))

    def _at(self, kind: str, array: np.ndarray[Any, Any]) -> Any:
        return self._ffi.cast(kind, self._ffi.from_buffer(array))
