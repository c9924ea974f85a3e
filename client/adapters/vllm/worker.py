# SPDX-License-Identifier: Apache-2.0
"""
The worker's half: copies between pool and pages off the forward path, and reports what ended.

Loads and saves have a thread each, so that a load never waits behind a save. A load's pages belong
to its request until it is reported; a save's pages are kept from reuse by the scheduler's half
until that is reported. Nothing here raises into the engine: a load that fails is computed instead,
a save that fails is a miss later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from .attach import Attachment
from .groups import Shape
from .loader import Loader
from .memory import Memory
from .messages import Era, Fields, Load, Save, StepDone, StepWork
from .saver import Saver
from .settings import LOGGER, Settings
from .stats import Stats

log = logging.getLogger(LOGGER)

IDLE_WAIT_S: Final = 0.005  # of a step that computes nothing, for a copy to end


@dataclass
class Finished:
    """
    What the copying threads have done since somebody asked.

    Attributes:
        loaded: Requests whose load is over.
        failed: Of them, those that must be computed.
        bad_blocks: The engine's blocks that hold nothing.
        step: What the scheduler's half wants to know.
    """

    loaded: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)
    step: StepDone = field(default_factory=StepDone)


class Worker:
    """
    The connector in one worker.

    Args:
        settings: The operator's.
        shape: How tokens become chunks.
        common: Fields of the manifest that all workers share.
        attachment: The way to the pool.
    """

    def __init__(
        self, settings: Settings, shape: Shape, common: Fields, attachment: Attachment
    ) -> None:
        self._settings: Final = settings
        self._shape: Final = shape
        self._common: Final = common
        self._attachment: Final = attachment
        self._memory: Memory | None = None
        self._loading: Final = ThreadPoolExecutor(1, "cenote load")
        self._saving: Final = ThreadPoolExecutor(1, "cenote save")
        self._pending = 0
        self._finished = Finished()
        self._changed: Final = threading.Condition()
        self._layers: tuple[str, ...] = ()
        self._layer_loads: dict[str, int] = {}  # of this step, not over yet, by layer
        self._in_step = 0  # loads of this step whose end is not noted yet
        self.stats: Final = Stats()

    # ---- the engine's memory ---------------------------------------------------------------------

    def register(
        self, config: Any, kv_caches: Mapping[str, Any], layers: Mapping[str, Any]
    ) -> None:
        """
        Learn where the engine's pages are; see Memory for arguments and errors.

        What was known before is forgotten first: a pool can be registered with a GPU only once.
        """
        self.unregister()
        self._memory = Memory(
            config,
            kv_caches,
            layers,
            shape=self._shape,
            common=self._common,
            attachment=self._attachment,
        )
        self._loader = Loader(self._memory, self._settings.verify, self.stats)
        self._saver = Saver(self._memory, self.stats)
        if self._settings.transfer == "layers":
            if next(iter(kv_caches.values())).device.type != "cpu":
                raise ValueError(
                    "transfer is 'layers', which is for CPUs: on a GPU the engine may zero blocks "
                    "behind such a load. Leave transfer out"
                )
            if any(layout.by_layer is None for layout in self._memory.layouts):
                raise ValueError(
                    "transfer is 'layers', and this engine keeps the layers of a block together "
                    f"({config.kv_cache_layout}): leave transfer out"
                )
            self._layers = tuple(name for group in self._shape.groups for name in group.layers)
        self._layers = tuple(sorted(self._layers, key=list(kv_caches).index))

    def unregister(self) -> None:
        """Forget the engine's pages, once nothing is copied any more. It may be called again."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending == 0)
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.copier.close()

    @property
    def registered(self) -> bool:
        """Is it known where the engine's pages are?"""
        return self._memory is not None

    @property
    def facts(self) -> tuple[Fields, ...]:
        """Each group's part of the identity."""
        return self._memory.fields if self._memory is not None else ()

    def pool_attached(self, pool: Any) -> None:
        """Be told of a newly attached pool."""
        memory = self._memory  # another thread may forget it
        if memory is not None:
            memory.copier.attached(pool)

    # ---- a step ----------------------------------------------------------------------------------

    def begin(self, work: StepWork) -> None:
        """Be told of a step before it computes: layer by layer, room for what it stores is made."""
        if self._layers and work.saves and self._memory is not None:
            self._submit(self._saving, self._saver.begin, work.era, work.saves)

    def start_loads(self, work: StepWork) -> None:
        """Begin what is to be loaded. Asleep, nothing can be: it is to be computed."""
        for load in work.loads:
            if self._memory is None:
                self.stats.add(failed_loads=1)
                self._loaded(load, load.blocks())
                continue
            with self._changed:
                self._in_step += load.in_step
            if load.in_step:
                for layer in self._layers:
                    self._layer_loads[layer] = self._layer_loads.get(layer, 0) + 1
            self._submit(self._loading, self._load, work.era, load)

    def wait_for_layer(self, layer: str) -> None:
        """Return when a layer's pages of this step's loads are in place."""
        if self._layer_loads.get(layer):
            with self._changed:
                self._changed.wait_for(lambda: not self._layer_loads.get(layer))

    def save_layer(self, layer: str, work: StepWork) -> None:
        """Store a layer's pages: they have just been computed."""
        if self._layers and work.saves and self._memory is not None:
            ready = self._memory.copier.computed()
            self._submit(self._saving, self._saver.layer, layer, ready)

    def start_saves(self, work: StepWork) -> None:
        """
        Begin, or end, what is to be stored of what this step has computed.

        Asleep, it is reported as not stored: until then the scheduler's half keeps its blocks.
        """
        if not work.saves:
            return
        if self._memory is None:
            self.stats.add(failed_saves=len(work.saves))
            for save in work.saves:
                self._report(save, stored=False)
            return
        if self._layers:
            self._submit(self._saving, self._end_layers)
            return
        ready = self._memory.copier.computed()
        for save in work.saves:
            self._submit(self._saving, self._save, work.era, save, ready)

    def finished(self, *, idle: bool) -> Finished:
        """
        Return what has ended since the last call.

        Args:
            idle: The engine has nothing to compute: rather wait a moment for a copy than have it
                ask again at once.
        """
        with self._changed:
            if self._layers:  # what this step needed ends with it
                self._changed.wait_for(lambda: self._in_step == 0)
            if idle and self._pending and not self._has_news():
                self._changed.wait_for(self._has_news, IDLE_WAIT_S)
            news, self._finished = self._finished, Finished()
        return news

    def saves_that_ended(self) -> StepDone:
        """Wait until nothing is copied any more; return what came of saves since finished()."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending == 0)
            step = self._finished.step
            taken = StepDone(step.saved, step.unsaved)
            step.saved, step.unsaved = {}, {}
        return taken

    def _has_news(self) -> bool:
        return bool(self._finished.loaded or self._finished.step)

    def close(self) -> None:
        """Let the copies under way end, then detach."""
        self._loading.shutdown(wait=True, cancel_futures=True)
        self._saving.shutdown(wait=True, cancel_futures=True)
        if self._memory is not None:
            self._memory.copier.close()
        self._attachment.close()

    # ---- in the copying threads ------------------------------------------------------------------

    def _submit(self, threads: ThreadPoolExecutor, call: Callable[..., Any], *args: Any) -> None:
        with self._changed:
            self._pending += 1
        threads.submit(self._run, call, *args)

    def _run(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except Exception:
            log.exception("cenote: a copying thread met what it does not know; please report it")
        finally:
            with self._changed:
                self._pending -= 1
                self._changed.notify_all()

    def _load(self, era: Era, load: Load) -> None:
        bad = load.blocks()
        try:
            if load.in_step:
                bad = self._loader.load_layers(era, load, self._layers, self._layer_loaded)
            else:
                bad = self._loader.load(era, load)
        finally:
            with self._changed:
                self._loaded(load, bad)
                self._in_step -= load.in_step

    def _loaded(self, load: Load, bad: set[int]) -> None:
        """Note that a load is over; blocks in *bad* hold nothing."""
        with self._changed:
            ended = self._finished.step.in_step if load.in_step else self._finished.loaded
            ended.add(load.request)
            self._changed.notify_all()
            if bad:
                self._finished.failed.add(load.request)
                self._finished.step.failed.add(load.request)
                self._finished.bad_blocks |= bad

    def _layer_loaded(self, layer: str) -> None:
        with self._changed:
            self._layer_loads[layer] -= 1
            self._changed.notify_all()

    def _save(self, era: Era, save: Save, ready: Any) -> None:
        stored = False
        try:
            stored = self._saver.save(era, save, ready)
        finally:
            self._report(save, stored=stored)

    def _end_layers(self) -> None:
        for save, stored in self._saver.end():
            self._report(save, stored=stored)

    def _report(self, save: Save, *, stored: bool) -> None:
        with self._changed:
            counts = self._finished.step.saved if stored else self._finished.step.unsaved
            counts[save.number] = counts.get(save.number, 0) + 1
