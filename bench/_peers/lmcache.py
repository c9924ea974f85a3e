# SPDX-License-Identifier: Apache-2.0
"""
LMCache's node server (multiprocess mode) with its shared-memory pool.

It keys chunks by the token ids they cover, 256 tokens each, and hashes them itself.  A chunk of N
bytes here is 256 tokens of a model whose layers and width make N bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .base import KIB, MIB, POOL_BYTES, SIZES, Array, Environment, Peer, Unavailable

if TYPE_CHECKING:
    from .processes import Servers

CHUNK_TOKENS: Final = 256
ANSWER_S: Final = 30.0
SHAPES: Final = {64 * KIB: (1, 64), MIB: (1, 1024), 32 * MIB: (32, 1024)}  # layers, width
PACKAGE: Final = "lmcache.v1"


@dataclass(frozen=True)
class Prompt:
    """The tokens of one chunk, or of many that follow each other."""

    nbytes: int
    tokens: tuple[int, ...]


class Lmcache(Peer):
    """`lmcache server` on the loopback; every operation is two to four calls to it."""

    name = "lmcache"
    title = "LMCache server"
    how = "lookup, wait, prepare_ and commit_retrieve; + copy; prepare_store, copy, commit_store"
    environment = Environment(
        "lmcache", ("torch==2.13.0", "lmcache==0.5.6", "numpy==2.2.6"), 480, 1850
    )

    def worker_environment(self) -> dict[str, str]:
        """Quiet, without telemetry."""
        return {
            "LMCACHE_DISABLE_BANNER": "1",
            "LMCACHE_LOG_LEVEL": "ERROR",
            "LMCACHE_TRACK_USAGE": "false",
            "DO_NOT_TRACK": "1",
        }

    def start(self, servers: Servers) -> None:
        """Start the server; its pool is named after this run, and it is told not to be lazy."""
        port, http, metrics = self.ports(3)
        options = ["--host", "127.0.0.1", "--port", str(port)]
        options += ["--http-host", "127.0.0.1", "--http-port", str(http)]
        options += ["--prometheus-port", str(metrics), "--shm-name", self._pool()]
        options += ["--l1-size-gb", str(POOL_BYTES // (1024 * MIB)), "--no-l1-use-lazy"]
        options += ["--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
        options += ["--max-workers", "2"]
        program = str(self.folder / "venv" / "bin" / "lmcache")
        servers.start("lmcache", [program, "server", *options], self.worker_environment())
        servers.wait_for_port(http)
        servers.wait_for_port(port)

    def _pool(self) -> str:
        return f"{self.folder.name}-lmcache"

    def clean(self) -> None:
        """Remove the pool: the server leaves it when it is killed."""
        Path(f"/dev/shm/lmcache_l1_pool_{self._pool()}").unlink(missing_ok=True)

    def connect(self, role: str) -> None:
        """Connect, and register one model for each size of chunk."""
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(1)
        self._uint8 = torch.uint8
        zmq: Any = importlib.import_module("zmq")
        factory = importlib.import_module(f"{PACKAGE}.multiprocess.transport.factory")
        self._types: Any = importlib.import_module(f"{PACKAGE}.multiprocess.custom_types")
        url = f"tcp://127.0.0.1:{self.ports(3)[0]}"
        self._client = factory.RequestClientFactory.create(url, context=zmq.Context())
        self._instance = os.getpid()
        self._requests = 0
        self._transfers = {nbytes: self._register(torch, nbytes) for nbytes in SIZES}
        self._role = role

    def _register(self, torch: Any, nbytes: int) -> Any:
        layers, width = SHAPES[nbytes]
        answer = self._client.register_kv_cache_engine_driven_context(
            self._types.RegisterEngineDrivenContextPayload(
                instance_id=self._instance + nbytes,
                model_name=f"model-{nbytes}",
                world_size=1,
                block_size=16,
                num_layers=layers,
                hidden_dim_size=width,
                dtype_str="bfloat16",
                use_mla=False,
                num_physical_slots=CHUNK_TOKENS,
            )
        ).result(timeout=ANSWER_S)
        base = importlib.import_module(f"{PACKAGE}.multiprocess.transfer_context.base")
        api = importlib.import_module(f"{PACKAGE}.distributed.api")
        shape = torch.Size([2, layers, CHUNK_TOKENS, width])
        layout = api.MemoryLayoutDesc(shapes=[shape], dtypes=[torch.bfloat16])
        meta = base.EngineDrivenContextMetadata(layout_desc=layout, block_size=16, use_mla=False)
        transfer = base.create_engine_driven_context(
            meta, self._client, ANSWER_S, answer.shm_name, answer.pool_size
        )
        if type(transfer).__name__ != "EngineDrivenContextShm":
            raise Unavailable(f"it fell back to {type(transfer).__name__}, without shared memory")
        return transfer

    # ---- keys ----------------------------------------------------------------------------------

    def key(self, nbytes: int, index: int) -> Prompt:
        """A prompt of one chunk."""
        return Prompt(nbytes, tuple(range(index * 1000, index * 1000 + CHUNK_TOKENS)))

    def batch(self, keys: Sequence[Any]) -> Prompt:
        """The prompt that the chunks make one after another: there is no lookup of other sets."""
        return Prompt(keys[0].nbytes, tuple(token for key in keys for token in key.tokens))

    def _request(self, prompt: Prompt, worker: int | None) -> Any:
        """A key as it goes to the server; the last request's id makes one request of several."""
        return self._types.IPCCacheServerKey(
            model_name=f"model-{prompt.nbytes}",
            world_size=1,
            worker_id=worker,
            token_ids=prompt.tokens,
            start=0,
            end=len(prompt.tokens),
            request_id=f"{self._instance}-{self._requests}",
            num_kv_readers=1,
        )

    # ---- operations ----------------------------------------------------------------------------

    def put(self, key: Any, source: Array) -> None:
        """Two calls, and the copy between them."""
        self._store(key, [source])

    def _store(self, prompt: Prompt, sources: Sequence[Array]) -> None:
        self._requests += 1
        request = self._request(prompt, 0)
        transfer, instance = self._transfers[prompt.nbytes], self._instance + prompt.nbytes
        slots, _ = transfer.prepare_store(request, instance)
        if len(slots) != len(sources):
            raise ValueError(f"{len(slots)} of {len(sources)} slots were given: present, or full")
        for slot, source in zip(slots, sources, strict=True):
            np.copyto(self._bytes(slot), source)
        if not transfer.commit_store(request, instance, []):
            raise ValueError("commit_store was refused")
        self._client.end_session(request.request_id)

    def prepare_lookup(self) -> None:
        """Store the prompt of all chunks, which is another one than theirs."""
        nbytes, count = next(iter(SIZES.items()))
        source = np.ones(nbytes, np.uint8)
        whole = self.batch([self.key(nbytes, index) for index in range(count)])
        self.delete([])  # its first chunk is there already, and would be left out
        self._store(whole, [source] * count)

    def _bytes(self, slot: Any) -> Array:
        found: Array = slot.flatten().view(self._uint8).numpy()
        return found

    def _found(self, prompt: Prompt) -> int:
        """Look up and lock; returns how many chunks."""
        self._requests += 1
        request = self._request(prompt, None)
        self._client.lookup(request, 1).result(timeout=ANSWER_S)
        waiting = self._client.wait_prefetch_status(request.request_id, ANSWER_S)
        return int(waiting.result(timeout=ANSWER_S) or 0)

    @contextlib.contextmanager
    def _retrieved(self, prompt: Prompt) -> Iterator[Array]:
        """A view, from the lookup to the end of the locks."""
        if self._found(prompt) != 1:
            raise KeyError(prompt.tokens[0])
        request = self._request(prompt, 0)
        transfer, instance = self._transfers[prompt.nbytes], self._instance + prompt.nbytes
        slots = transfer.prepare_retrieve(request, instance)
        yield self._bytes(slots[0])
        transfer.commit_retrieve(request, instance)
        self._client.end_session(request.request_id)

    def view(self, key: Any) -> int:
        """Four calls."""
        with self._retrieved(key) as view:
            return len(view)

    def copy(self, key: Any, target: Array) -> None:
        """Four calls, and the copy between them."""
        with self._retrieved(key) as view:
            np.copyto(target, view)

    def lookup(self, batch: Any) -> int:
        """Look up, and free the locks that a lookup takes."""
        found = self._found(batch)
        request = self._request(batch, None)
        if found:
            self._client.free_lookup_locks(request, 1).result(timeout=ANSWER_S)
        self._client.end_session(request.request_id)
        return found

    def delete(self, keys: Sequence[Any]) -> None:
        """Clear everything: single chunks cannot be deleted."""
        del keys
        self._client.clear(True).result(timeout=ANSWER_S)

    def close(self) -> None:
        """Disconnect."""
        for transfer in self._transfers.values():
            transfer.close()
        self._client.close()
