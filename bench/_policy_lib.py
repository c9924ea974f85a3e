# SPDX-License-Identifier: Apache-2.0
"""
Builds the eviction policies, which are pure C, with the driver in c/ and loads them.

The daemon does not need this: it links the policies into its keeper.  The shared object goes to
build/bench/ under a name made from its sources, so that it is built once for each version of them.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import cffi
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .trace import Request

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCE_DIR: Final = ROOT / "cffi_src" / "src"
BUILD_DIR: Final = ROOT / "build" / "bench"
CFLAGS: Final = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
U64Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
NO_PARENT: Final = 0xFFFF_FFFF

CDEF: Final = """
struct trace_view {
    uint32_t blocks; const uint32_t *parent; const uint64_t *hash; uint32_t requests;
    const uint64_t *first; const uint32_t *chains; const uint32_t *now_s;
};
int policy_sim_run(const char *name, uint32_t capacity, uint32_t low, int leaves_only,
                   const struct trace_view *trace, uint32_t *ret_hits, uint64_t *ret_skips);
const char *cn_policy_name(uint32_t i);
"""


def build() -> Path:
    """
    Compile the policies and the driver, unless this version of them is there already.

    Raises:
        subprocess.CalledProcessError: The compiler ($CC, else cc) refused; its words are on stderr.
    """
    driver = ROOT / "bench" / "c" / "policy_driver.c"
    policies = sorted(SOURCE_DIR.glob("cn_policy*.c"))
    sources = [driver, *policies, SOURCE_DIR / "cn_ghost.c"]
    headers = [*SOURCE_DIR.glob("cn_policy*.h"), SOURCE_DIR / "cn_ghost.h"]
    digest = hashlib.sha256(repr(CFLAGS).encode())
    for path in [*sources, *sorted(headers)]:
        digest.update(path.read_bytes())
    target = BUILD_DIR / f"policy-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    command = [os.environ.get("CC", "cc"), *CFLAGS, f"-I{SOURCE_DIR}", "-o", str(partial)]
    subprocess.run([*command, *map(str, sources)], check=True)
    partial.replace(target)
    return target


@dataclass(frozen=True)
class Outcome:
    """What one policy made of a trace: hits[i] blocks of request i were in its longest prefix."""

    hits: np.ndarray[Any, np.dtype[np.uint32]]
    skips: int


def splitmix64(values: U64Array) -> U64Array:
    """A 64-bit hash of each value, as the key of a chunk would give (Steele et al., 2014)."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class PolicySim:
    """A trace, made ready to be run through policies."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._ffi = cffi.FFI()
        self._ffi.cdef(CDEF)
        self._lib: Any = self._ffi.dlopen(str(build()))
        dense: dict[int, int] = {}
        parent: list[int] = []
        chains: list[int] = []
        first = [0]
        for request in requests:
            before = NO_PARENT
            for block in request.hash_ids:
                index = dense.setdefault(block, len(dense))
                if index == len(parent):
                    parent.append(before)
                chains.append(index)
                before = index
            first.append(len(chains))
        self.request_blocks = np.diff(np.array(first, dtype=np.uint64))
        self.distinct = len(parent)
        self._arrays: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
            "parent": np.array(parent, dtype=np.uint32),
            "hash": splitmix64(np.array(list(dense), dtype=np.uint64)),
            "first": np.array(first, dtype=np.uint64),
            "chains": np.array(chains, dtype=np.uint32),
            "now_s": np.array([r.timestamp_ms // 1000 for r in requests], dtype=np.uint32),
        }
        self._view = self._ffi.new("struct trace_view *")
        self._view.blocks, self._view.requests = len(parent), len(requests)
        for name, array in self._arrays.items():
            kind = "uint64_t *" if array.dtype == np.uint64 else "uint32_t *"
            setattr(self._view, name, self._ffi.cast(kind, self._ffi.from_buffer(array)))

    def policies(self) -> list[str]:
        """Names of all policies, the default first."""
        names: list[str] = []
        while (name := self._lib.cn_policy_name(len(names))) != self._ffi.NULL:
            names.append(self._ffi.string(name).decode())
        return names

    def run(self, policy: str, capacity: int, low: int, *, leaves_only: bool = False) -> Outcome:
        """
        Run the whole trace through *policy* with room for *capacity* blocks.

        A full cache evicts down to *low* blocks; capacity - 1 evicts one at a time.  With
        leaves_only a block leaves only after all resident blocks that follow it.

        Raises:
            ValueError: No such policy, or low is not in 0 … capacity - 1.
            MemoryError: The arrays of the simulation did not fit.
        """
        if policy not in self.policies():
            raise ValueError(f"no policy {policy!r}; there are {', '.join(self.policies())}")
        if not 0 <= low < capacity:
            raise ValueError(f"low water {low} must be in 0 … {capacity - 1}")
        hits = np.zeros(len(self.request_blocks), dtype=np.uint32)
        skips = self._ffi.new("uint64_t *")
        target = self._ffi.cast("uint32_t *", self._ffi.from_buffer(hits))
        status = self._lib.policy_sim_run(
            policy.encode(), capacity, low, int(leaves_only), self._view, target, skips
        )
        if status != 0:
            raise MemoryError(f"no memory to simulate {policy!r} at {capacity} blocks")
        return Outcome(hits, int(skips[0]))
