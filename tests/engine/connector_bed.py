# SPDX-License-Identifier: Apache-2.0
"""
An engine without a model: vLLM's AsyncScheduler, its own calls of a connector's worker, a pool.

A fake runner writes into each token's place in the KV cache what the tokens before it hash to, and
before it computes it looks at every place that attention would read. A byte of another request, or
of another time, shows at once. As a model does it answers by what it has read.

A plugin of pytest, for the environment that has vLLM.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tests.engine.model import make_model
from tests.engine.spec_bed import BLOCK, BLOCKS, CHUNK, Layer, cache_config, host, wait_until
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    LoadConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.utils import allocate_kv_cache

from cenote.client.adapters.vllm import attach
from cenote.client.adapters.vllm.connector import CenoteConnector
from cenote.client.testing import MemoryHost

__all__ = ["host"]  # a fixture

CHUNK_TOKENS: Final = CHUNK * BLOCK
STEP_TOKENS: Final = 256  # most that a step computes
IN_FLIGHT: Final = 2  # steps: what asynchronous scheduling makes of it
VOCABULARY: Final = range(3, 1003)  # without special tokens


def engine_config(model: Path, connector: Mapping[str, Any]) -> Any:
    """vLLM's own configuration, with what it switches off on a CPU."""
    made = ModelConfig(model=str(model), dtype="float32", skip_tokenizer_init=True)
    config = VllmConfig(
        model_config=made,
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=STEP_TOKENS,
            max_model_len=made.max_model_len,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
        load_config=LoadConfig(load_format="dummy"),
        kv_transfer_config=KVTransferConfig(
            kv_connector="CenoteConnector",
            kv_connector_module_path="cenote.client.adapters.vllm",
            kv_role="kv_both",
            kv_connector_extra_config={"chunk_tokens": CHUNK_TOKENS, **connector},
        ),
    )
    config.cache_config.num_gpu_blocks = BLOCKS
    config.scheduler_config.async_scheduling = True
    return config


# ---- what stands for a model --------------------------------------------------------------------


def marks_of(tokens: Sequence[int], known: Sequence[int] = ()) -> list[int]:
    """What each token and all before it hash to, from the first that is not known on."""
    marks = list(known)
    for token in tokens[len(marks) :]:
        marks.append(zlib.crc32(token.to_bytes(4, "little"), marks[-1] if marks else 0))
    return marks


def next_token(mark: int) -> int:
    """What a model would say after tokens of this hash."""
    return VOCABULARY[mark % len(VOCABULARY)]


def answer_to(prompt: Sequence[int], count: int) -> list[int]:
    """What an engine must say."""
    tokens, marks = list(prompt), marks_of(prompt)
    for _ in range(count):
        tokens.append(next_token(marks[-1]))
        marks = marks_of(tokens, marks)
    return tokens[len(prompt) :]


class Sequenced:
    """A request as a model runner has it."""

    def __init__(self, tokens: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        self.tokens, self.marks = list(tokens), marks_of(tokens)
        self.tables = [list(table) for table in tables]

    def grow(self, tables: Sequence[Sequence[int]] | None) -> None:
        for table, more in zip(self.tables, tables or (), strict=False):
            table.extend(more)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.marks = marks_of(self.tokens, self.marks)


class Runner:
    """
    A model runner in vLLM's order of calls, of its first runner or of its second.

    Args:
        engine: Whose worker it is.
        second: Which of the two.
        drafting: A draft head computes behind the model, and saves wait for it. The second runner
            has that order since 0.33; before, it reports behind the draft head.
    """

    def __init__(self, engine: Engine, *, second: bool, drafting: bool) -> None:
        self._drafting = drafting
        self._engine, self._tensors = engine, engine.tensors
        self._groups = engine.cache_config.kv_cache_groups
        self._requests: dict[str, Sequenced] = {}
        self._second: ActiveKVConnector | None = None
        if second:
            kv_transfer_state._KV_CONNECTOR_AGENT = engine.worker
            self._second = ActiveKVConnector(engine.config, engine.tensors)

    def execute(self, step: Any) -> ModelRunnerOutput:
        """Do a step's work."""
        kv_transfer_state._KV_CONNECTOR_AGENT = self._engine.worker
        for name in step.finished_req_ids:
            self._requests.pop(name, None)
        if self._second is not None:
            return self._execute_second(self._second, step)
        config = self._engine.config
        if not step.total_num_scheduled_tokens:
            return KVConnectorModelRunnerMixin.kv_connector_no_forward(step, config)
        with (
            set_forward_context(None, config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(
                step, defer_finalize=self._drafting
            ) as said,
        ):
            made = self.compute(step)
        if self._drafting:
            KVConnectorModelRunnerMixin.finalize_kv_connector()
        made.kv_connector_output = said
        return made

    def _execute_second(self, connector: ActiveKVConnector, step: Any) -> ModelRunnerOutput:
        if not step.total_num_scheduled_tokens:
            return connector.no_forward(step)
        connector.pre_forward(step)
        made = self.compute(step)
        connector.finish_forward()
        later = {"defer_finalize": True} if self._drafting and _finalizes(connector) else {}
        made.kv_connector_output = connector.post_forward(step.finished_req_ids, **later)
        if later:
            connector.finalize_step()
        return made

    def compute(self, step: Any) -> ModelRunnerOutput:
        """Do what a forward pass does to the KV cache."""
        begins = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        for new in step.scheduled_new_reqs:
            tokens = new.prefill_token_ids or new.prompt_token_ids
            self._requests[new.req_id] = Sequenced(tokens, new.block_ids)
        cached = step.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            begins[name] = cached.num_computed_tokens[i]
            if name in cached.resumed_req_ids:
                tokens, tables = cached.all_token_ids[name], cached.new_block_ids[i]
                self._requests[name] = Sequenced(tokens, tables)
            else:
                self._requests[name].grow(cached.new_block_ids[i])
        said = [
            self._forward(self._requests[name], begins[name], begins[name] + count)
            for name, count in step.num_scheduled_tokens.items()
        ]
        names = list(step.num_scheduled_tokens)
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, said)

    def _forward(self, request: Sequenced, begin: int, end: int) -> list[int]:
        """Read what attention reads, write what it writes; say a token behind the last one."""
        for group, (at, table) in enumerate(zip(self._groups, request.tables, strict=True)):
            window = getattr(at.kv_cache_spec, "sliding_window", None) or begin
            first = max(0, begin - window + 1) if window < begin else 0
            for number, layer in enumerate(at.layer_names):
                tensor, salt = self._tensors[layer], 16 * group + number
                if begin > first:
                    seen, expected = _places(tensor, table, request.marks[:begin], first, salt)
                    if not torch.equal(tensor[seen], expected):
                        self._engine.wrong.append((layer, first, begin))
                places, computed = _places(tensor, table, request.marks[:end], begin, salt)
                tensor[places] = computed
        if end < len(request.tokens):
            return []
        request.append(next_token(request.marks[-1]))
        return request.tokens[-1:]


def _finalizes(connector: ActiveKVConnector) -> bool:
    return hasattr(connector, "finalize_step")


def _places(
    tensor: Any, table: Sequence[int], marks: Sequence[int], first: int, salt: int
) -> tuple[Any, Any]:
    """Where tokens from *first* to the last mark lie in a layer, and what belongs there."""
    at = torch.arange(first, len(marks))
    blocks = torch.tensor(table)[at // BLOCK]
    salted = torch.tensor(marks[first:]) ^ salt
    parts = torch.stack([(salted >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=1)
    heads, width = tensor.shape[1], tensor.shape[3]
    values = parts.repeat(1, width // 4).to(tensor.dtype)[:, None, :].expand(-1, heads, -1)
    return (blocks, slice(None), at % BLOCK), values


def flip(address: int) -> None:
    """Change a byte of a file that this process has mapped, where it may not write."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode, *_ = line.split()
        begin, end = (int(each, 16) for each in span.split("-"))
        if begin <= address < end:
            break
    links = (link for link in Path("/proc/self/fd").iterdir() if link.exists())
    file = os.open(next(each for each in links if each.stat().st_ino == int(inode)), os.O_RDWR)
    at = int(offset, 16) + address - begin
    os.pwrite(file, bytes([os.pread(file, 1, at)[0] ^ 0xFF]), at)
    os.close(file)


# ---- an engine ----------------------------------------------------------------------------------


class Engine:
    """
    One engine: step() does what its core does, a step ahead of its outputs.

    Args:
        model: Its folder.
        windows: Has it a second group, with a window?
        second: Is it vLLM's second model runner?
        drafting: As for Runner.
        extra: kv_connector_extra_config.

    Attributes:
        answers: Tokens that came out, by request.
        wrong: Where a request would have read what is not its own.
        overlaps: Steps that were planned before the outputs of the last were known.
        counts: What its worker counted.
    """

    def __init__(
        self,
        model: Path,
        *,
        windows: bool = False,
        second: bool = False,
        drafting: bool = False,
        **extra: Any,
    ) -> None:
        self.config = engine_config(model, extra)
        self.cache_config = cache_config(windows=windows)
        self.tensors = allocate_kv_cache(
            self.cache_config, torch.device("cpu"), KVCacheLayout.LBHNC
        )
        layers = {name: Layer(tensor) for name, tensor in self.tensors.items()}
        self.config.compilation_config.static_forward_context.update(layers)
        self.scheduler = AsyncScheduler(
            vllm_config=self.config,
            kv_cache_config=self.cache_config,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
            log_stats=True,
        )
        self.scheduler.use_v2_model_runner = second
        self.worker = CenoteConnector(self.config, KVConnectorRole.WORKER, self.cache_config)
        self.worker.register_kv_caches(self.tensors)
        self.half: Any = self.worker._worker
        connector: Any = self.scheduler.connector
        self.planner: Any = connector._scheduler
        connector.set_xfer_handshake_metadata_pp_aware(
            {(0, 0): self.worker.get_handshake_metadata()}
        )
        wait_until(lambda: self.planner._lookup.storing and self.worker._attachment.pool)
        self.answers: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.wrong: list[tuple[str, int, int]] = []
        self.overlaps = 0
        self.counts: Counter[str] = Counter()
        self._steps: deque[Any] = deque()
        self.runner = Runner(self, second=second, drafting=drafting)
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    # ---- requests ------------------------------------------------------------------------------

    def add(self, name: str, prompt: Sequence[int], max_tokens: int = 4) -> None:
        """Hand a request over."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.answers[name] = []
        self.scheduler.add_request(
            Request(name, list(prompt), params, None, block_hasher=self._hasher)
        )

    def abort(self, name: str) -> None:
        self.aborted.add(name)
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def ask(self, name: str, prompt: Sequence[int], max_tokens: int = 4) -> list[int]:
        """Answer one request, and settle."""
        self.add(name, prompt, max_tokens)
        self.run()
        return self.answers[name]

    def wait_for(self, prompt: Sequence[int]) -> None:
        """Wait until the whole chunks of a prompt can be found: the pool links them a bit later."""
        keys, lookup = self.keys(prompt), self.planner._lookup
        groups = self.planner._shape.groups
        wait_until(lambda: all(lookup.prefix(group, keys) == len(keys) for group in groups))

    def keys(self, prompt: Sequence[int]) -> list[bytes]:
        """The keys of a prompt's whole chunks."""
        request = Request("", list(prompt), SamplingParams(), None, block_hasher=self._hasher)
        chunks = len(prompt) // CHUNK_TOKENS
        return list(self.planner._lookup.keys.keys(request.block_hashes, 0, chunks))

    def spoil(self, prompt: Sequence[int], chunk: int) -> None:
        """Change a byte of a stored chunk, of the first group, as a broken device would."""
        (cache,) = self.planner._lookup.caches(0)
        found = cache.get(self.keys(prompt)[chunk])
        if found is not None:
            with found:
                flip(found.address + found.nbytes // 3)

    # ---- steps ---------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self.scheduler.has_requests() or bool(self._steps)

    def step(self) -> None:
        """As EngineCore.step_with_batch_queue(): plan if there is room, else hear of the oldest."""
        if self.scheduler.has_requests():
            planned = self.scheduler.schedule()
            self.overlaps += bool(self._steps)
            self._steps.append(planned)
            if len(self._steps) < IN_FLIGHT and (
                planned.total_num_scheduled_tokens or self.scheduler.has_requests()
            ):
                return
        if self._steps:
            step = self._steps.popleft()
            made = self.runner.execute(step)
            if made.kv_connector_output and made.kv_connector_output.kv_connector_stats:
                self.counts.update(made.kv_connector_output.kv_connector_stats.data)
            said = self.scheduler.update_from_output(step, made)
            for each in (out for outs in said.values() for out in outs.outputs):
                self.answers[each.request_id].extend(each.new_token_ids)

    def run(self) -> None:
        """Go on until nothing is left to do, saves included."""
        self.until(lambda: not self.busy)

    def until(self, true: Callable[[], object]) -> None:
        while not true():
            self.step()

    def answered(self, name: str, tokens: int) -> None:
        """Go on until so many tokens of an answer came."""
        self.until(lambda: len(self.answers[name]) >= tokens)

    @contextmanager
    def held(self, threads: str) -> Iterator[None]:
        """Have a copying thread, "_loading" or "_saving", wait within."""
        gate = threading.Event()
        getattr(self.half, threads).submit(gate.wait)
        try:
            yield
        finally:
            gate.set()

    # ---- what is left --------------------------------------------------------------------------

    @property
    def leases(self) -> int:
        pools = [self.scheduler.connector._attachment.pool, self.worker._attachment.pool]
        return sum(pool.leases for pool in pools)

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def check_nothing_is_left(self) -> None:
        """No lease, no reference, no request, and no byte was wrong."""
        blocks = self.scheduler.kv_cache_manager.block_pool.blocks
        assert self.wrong == []
        assert [block.block_id for block in blocks if block.ref_cnt and not block.is_null] == []
        assert self.free_blocks == BLOCKS - 1
        assert self.leases == 0
        assert not self.planner.saving
        assert not self.planner._tracked
        assert not self.planner._orphans

    def forget_prefixes(self) -> None:
        """Empty the engine's own prefix cache."""
        assert self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        kv_transfer_state._KV_CONNECTOR_AGENT = None
        self.worker.shutdown()
        self.scheduler.shutdown()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama", "llama", None, seed=None)


@pytest.fixture
def whole(
    host: MemoryHost, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engine]]:
    """Make engines that are attached to the host's pool."""
    from types import SimpleNamespace

    from vllm.distributed import parallel_state

    alone = SimpleNamespace(rank_in_group=0)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: alone)
    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: alone)
    monkeypatch.setattr(attach, "connect", lambda *_args, **_kwargs: host.connect())
    init_none_hash(sha256)
    made: list[Engine] = []

    def make(**extra: Any) -> Engine:
        made.append(Engine(model_folder, **extra))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
