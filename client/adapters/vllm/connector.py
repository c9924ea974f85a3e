# SPDX-License-Identifier: Apache-2.0
"""
CenoteConnector: what vLLM calls, in the scheduler's process and in each worker's.

This file only translates. The scheduler's half is scheduler.py, the workers' worker.py; what they
tell each other is in messages.py. It is written against the base classes of vLLM 0.32 and 0.33:
docs/engines.md.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from .attach import Attachment
from .events import Events
from .groups import Shape
from .identity import engine_fields, era_of, shared_groups
from .lookup import Lookup
from .messages import StepDone, StepWork, WorkerFacts
from .metrics import ConnectorStats, PromMetrics
from .scheduler import Scheduler
from .settings import LOGGER, Settings
from .worker import Finished, Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger(LOGGER)

# Workers of this process, by engine.
_workers: Final[weakref.WeakValueDictionary[str, Worker]] = weakref.WeakValueDictionary()


class CenoteConnector(KVConnectorBase_V1, SupportsHMA):
    """
    The pool of this host as a cache behind vLLM's own prefix cache.

    A load that fails is computed instead, whatever `kv_load_failure_policy` says: a cache is never
    a reason to fail a request.

    Raises:
        ValueError: `kv_connector_extra_config` is wrong, or the model's KV cache cannot be shared.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings: Final = Settings.parse(self._kv_transfer_config.kv_connector_extra_config)
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._events: Events | None = None
        shape = shape_of(vllm_config, kv_cache_config, self._settings)
        if role == KVConnectorRole.SCHEDULER:
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
            self._attachment = Attachment(self._settings.socket, "vllm scheduler", self._follow)
            self._scheduler = self._made_scheduler(vllm_config, shape)
        else:
            _look_at_outer_policy(self._kv_transfer_config)
            self._attachment = Attachment(
                self._settings.socket, "vllm worker", self._worker_attached
            )
            self._worker = Worker(
                self._settings, shape, engine_fields(vllm_config), self._attachment
            )
            _workers[self._kv_transfer_config.engine_id] = self._worker
        self._attachment.start()

    def _made_scheduler(self, vllm_config: VllmConfig, shape: Shape) -> Scheduler:
        lookup = Lookup(shape, self._attachment)
        scheduler = Scheduler(
            self._settings,
            shape,
            lookup,
            era_of(vllm_config),
            workers=vllm_config.parallel_config.world_size,
            drop_tokens=_dropped_tokens(vllm_config, shape),
            loads=self._kv_transfer_config.is_kv_consumer,
            saves=self._kv_transfer_config.is_kv_producer,
        )
        events = vllm_config.kv_events_config
        if events is not None and events.enable_kv_cache_events:
            self._events = Events(shape, lookup)
            scheduler.announce_by(self._events)
        return scheduler

    def _worker_attached(self, pool: Any) -> None:
        if self._worker is not None:
            self._worker.pool_attached(pool)

    def _follow(self, pool: Any) -> None:
        if self._events is not None:
            self._events.follow(pool)

    # ---- both roles ------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that does not happen is a miss later, nothing worse."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layer by layer, Python runs between the layers."""
        return extra_config.get("transfer") == "layers"

    def shutdown(self) -> None:
        """End copies, leases and the session."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
            self._attachment.close()

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """Return what this half counted since the last call."""
        half = self._worker or self._scheduler
        counts = half.stats.take() if half is not None else {}
        return ConnectorStats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        """Make counters of what was sent between processes."""
        return ConnectorStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        """Register the counters with Prometheus."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- worker ----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn where the engine's pages are."""
        assert self._worker is not None
        layers = self._vllm_config.compilation_config.static_forward_context
        self._worker.register(self._kv_cache_config, kv_caches, layers)
        self._registered = kv_caches

    def unregister_kv_caches(self) -> None:
        """Forget them: the engine goes to sleep (vLLM 0.33)."""
        if self._worker is not None:
            self._worker.unregister()

    def restore_kv_caches(self) -> None:
        """Learn anew where they are: the engine woke up (vLLM 0.33). It may be called again."""
        if self._worker is not None and not self._worker.registered:
            self.register_kv_caches(self._registered)

    def get_handshake_metadata(self) -> WorkerFacts | None:
        """Tell the scheduler what this worker's bytes depend on."""
        return WorkerFacts(self._worker.facts) if self._worker is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Nothing is to be done: blocks that are being stored are referenced until they are."""

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Be given a step's work, before it computes."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin(self._work())

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Begin the step's loads."""
        if self._worker is not None:
            self._worker.start_loads(self._work())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait until a layer's pages are in place, if it is this step that loads them."""
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Begin to store a layer's pages."""
        if self._worker is not None and self.has_connector_metadata():
            self._worker.save_layer(layer_name, self._work())

    def wait_for_save(self) -> None:
        """Begin the step's saves; they end beside the steps that follow."""
        if self._worker is not None:
            self._worker.start_saves(self._work())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Report loads that have ended, and those that failed."""
        assert self._worker is not None
        work = self._connector_metadata
        self._ended = self._worker.finished(idle=isinstance(work, StepWork) and work.idle)
        return KVConnectorTransferResults(
            finished_recving=self._ended.loaded,
            # Block ids of several groups overlap: such a request is computed as a whole.
            failed_recving=self._ended.failed if self._by_request else set(),
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Report the blocks that hold nothing; what was loaded before them stays good."""
        return set() if self._by_request else self._ended.bad_blocks

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Report saves that have ended."""
        step = self._ended.step
        return step or None

    @property
    def _by_request(self) -> bool:
        return len(self._kv_cache_config.kv_cache_groups) > 1

    _ended = Finished()

    def _work(self) -> StepWork:
        work = self._get_connector_metadata()
        assert isinstance(work, StepWork)
        return work

    # ---- scheduler -------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], WorkerFacts]
    ) -> None:
        """Be told what each worker's bytes depend on."""
        assert self._scheduler is not None
        if not all(isinstance(facts, WorkerFacts) for facts in metadata.values()):
            log.error(
                "cenote: nothing is cached: beside another connector that has a handshake, below a "
                "MultiConnector, vLLM gives both the same answers"
            )
            return
        self._scheduler.know_workers({rank: facts.groups for rank, facts in metadata.items()})

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Be given the engine's blocks."""
        if self._scheduler is not None:
            self._scheduler.know_blocks(gpu_block_pool)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Look the request up in the pool."""
        assert self._scheduler is not None
        tokens = self._scheduler.matched(request, num_computed_tokens)
        return tokens, tokens > 0 and self._settings.transfer == "chunks"

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plan the load into the request's blocks."""
        assert self._scheduler is not None
        self._scheduler.placed(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepWork:
        """Return the step's loads and saves."""
        assert self._scheduler is not None
        return self._scheduler.work(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Hear from the workers."""
        assert self._scheduler is not None
        step = connector_output.kv_connector_worker_meta
        assert step is None or isinstance(step, StepDone)
        self._scheduler.done(connector_output.finished_recving or (), step)
        if self._settings.transfer == "layers" and connector_output.invalid_block_ids:
            # vLLM keeps blocks in its prefix cache that it has set out to compute again.
            self._scheduler.forget_blocks(connector_output.invalid_block_ids)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Let go of what was held for a request. Its blocks may go: saves reference theirs."""
        assert self._scheduler is not None
        self._scheduler.finished(request)
        if not envs.VLLM_ENABLE_V1_MULTIPROCESSING and self._scheduler.only_saving:
            self._collect_saves()
        return False, None

    def _collect_saves(self) -> None:
        """
        Wait for the last saves of an engine that runs in its caller's process.

        Nobody looks at has_pending_push_work() there: no step follows the last answer, and blocks
        would stay referenced until the next request, so that no reset and no sleep succeeds.
        """
        assert self._scheduler is not None
        worker = _workers.get(self._kv_transfer_config.engine_id)
        if worker is not None:
            self._scheduler.done((), worker.saves_that_ended())

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Do the same for several groups."""
        return self.request_finished(request, [])

    def has_pending_push_work(self) -> bool:
        """Keep the engine stepping until the last save is known to be over."""
        return self._scheduler is not None and self._scheduler.saving

    def has_pending_block_frees(self) -> bool:
        """Rather wait for saves to let blocks go than preempt somebody."""
        return self._scheduler is not None and self._scheduler.holds_back_blocks()

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Return what became available in the pool, and what left it."""
        return self._events.take() if self._events is not None else ()

    def reset_cache(self) -> bool | None:
        """See nothing any more that was stored until now."""
        if self._scheduler is not None:
            self._scheduler.reset()
            if self._events is not None:
                self._events.begin_anew()
        return True


# A MultiConnector looks the class up by this name when it is sent its counters, wherever the class
# was loaded from.
with contextlib.suppress(ValueError):  # it is registered already
    KVConnectorFactory.register_connector(
        CenoteConnector.__name__, "cenote.client.adapters.vllm", CenoteConnector.__name__
    )


def _look_at_outer_policy(ours: Any) -> None:
    """
    Warn where a load that fails will fail its request.

    Below a MultiConnector vLLM follows the policy of that, which a child is not given. In a worker,
    and only there, the engine's own configuration can be had while the connector is made.
    """
    engine = get_current_vllm_config_or_none()
    outer = engine.kv_transfer_config if engine is not None else None
    if outer is None or outer.kv_connector == ours.kv_connector:
        return
    if outer.kv_load_failure_policy != "recompute":
        log.warning(
            "cenote: the kv_load_failure_policy of the %s is %r: a load that fails will fail its "
            "request. Set it to 'recompute' there",
            outer.kv_connector,
            outer.kv_load_failure_policy,
        )


def shape_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings) -> Shape:
    """
    Return how an engine's tokens become chunks.

    Raises:
        ValueError: Its KV cache cannot be shared, or chunk_tokens does not fit its blocks.
    """
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    groups = shared_groups(vllm_config, kv_cache_config, in_step=settings.transfer == "layers")
    hash_tokens = getattr(kv_cache_config, "hash_block_size", None)
    if hash_tokens is None:
        _, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    return Shape.of(groups, hash_tokens, settings.chunk_tokens)


def _dropped_tokens(vllm_config: VllmConfig, shape: Shape) -> int:
    """A draft head needs what the model computed of the last block: it is computed again."""
    spec = vllm_config.speculative_config
    if spec is None or not spec.use_eagle_block_drop():
        return 0
    return max(group.block_tokens for group in shape.groups)
