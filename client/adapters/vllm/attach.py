# SPDX-License-Identifier: Apache-2.0
"""
One process's way to the pool: attached in the background, tried again for ever, never waited for.

An engine starts and serves without a daemon; it attaches when one comes. What was attached once
reconnects by itself (cenote.client.connection).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from cenote.client import Backoff, Manifest, ManifestMismatch, connect
from cenote.client.errors import CenoteError

from .settings import LOGGER

if TYPE_CHECKING:
    from cenote.client import Cache, Pool

log = logging.getLogger(LOGGER)

CONNECT_TIMEOUT_S: Final = 2.0
OPEN_TIMEOUT_S: Final = 2.0
MODEL_MAX_BYTES: Final = 32
RETRY: Final = Backoff(first_s=0.5, last_s=5.0)


class Attachment:
    """
    A pool that may not be there yet, and the namespaces wanted of it.

    Args:
        socket: As for cenote.client.connect().
        label: What `cenote status` calls this process.
        attached: Called in the background thread with each newly attached pool.
    """

    def __init__(
        self, socket: str | None, label: str, attached: Callable[[Pool], None] | None = None
    ) -> None:
        self._socket = socket
        self._label = label
        self._attached = attached
        self._pool: Pool | None = None
        self._caches: dict[Manifest, Cache] = {}
        self._wanted: tuple[Manifest, ...] = ()
        self._told: set[str] = set()
        self._lock = threading.Lock()  # of what is opened: two threads may want the same
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="cenote attach", daemon=True)

    def start(self) -> None:
        """Begin to look for the daemon. Whoever is told of the pool must be ready by then."""
        self._thread.start()

    @property
    def pool(self) -> Pool | None:
        """The pool, once it was reached."""
        return self._pool

    @property
    def storing(self) -> bool:
        """Would a chunk be taken now? Not without a daemon, and not from a reader."""
        pool = self._pool
        return pool is not None and pool.connected and pool.role != "reader"

    def want(self, manifests: Sequence[Manifest]) -> None:
        """Have these namespaces opened as soon as there is a pool."""
        self._wanted = tuple(manifests)
        self._wake.set()

    def cache(self, manifest: Manifest) -> Cache | None:
        """Return a namespace that is open, without asking anybody."""
        return self._caches.get(manifest)

    def open(self, manifest: Manifest) -> Cache | None:
        """Return a namespace, opened now if need be: one question to the daemon, then none."""
        found = self._caches.get(manifest)
        pool = self._pool
        if found is not None or pool is None:
            return found
        with self._lock:
            if manifest not in self._caches:
                try:
                    self._caches[manifest] = self._opened(pool, manifest)
                except (CenoteError, OSError) as error:
                    self._tell(f"a namespace cannot be opened, nothing is cached in it: {error}")
        return self._caches.get(manifest)

    def close(self) -> None:
        """Detach. Leases that live stay good."""
        self._closed = True
        self._wake.set()
        pool = self._pool
        if pool is not None:
            pool.close()

    # ---- in the background -----------------------------------------------------------------------

    def _run(self) -> None:
        attempt = 0
        while not self._closed:
            self._wake.clear()
            if self._pool is None and self._reach():
                attempt = 0
            missing = [wanted for wanted in self._wanted if self.open(wanted) is None]
            if self._pool is not None and not missing:
                self._wake.wait()
                continue
            self._wake.wait(RETRY.delay_s(attempt))
            attempt += 1

    def _reach(self) -> bool:
        try:
            pool = connect(self._socket, label=self._label, timeout_s=CONNECT_TIMEOUT_S)
        except (CenoteError, OSError, ValueError) as error:
            self._tell(f"no pool yet, everything is computed until there is one: {error}")
            return False
        self._pool = pool
        if self._closed:  # meanwhile: close() has not seen this one
            pool.close()
            return False
        log.info("cenote: attached to pool %r as %s", pool.name, pool.role)
        if pool.role == "reader":
            log.warning(
                "cenote: this user may only read pool %r: hits are loaded, nothing is saved; "
                "list it under writers in [pool.access]",
                pool.name,
            )
        try:
            if self._attached is not None:
                self._attached(pool)
        except Exception:  # namespaces are still to be opened, by this thread alone
            log.exception("cenote: pool %r is used all the same; please report this", pool.name)
        return True

    def _opened(self, pool: Pool, manifest: Manifest) -> Cache:
        """
        Open a namespace, and say which field keeps it apart from the model's first.

        The first engine of a model binds its name. The name is for that log line alone: what is
        used is opened without it, for after a restart of the daemon another may come first.
        """
        name = namespace_name(manifest)
        try:
            pool.namespace(manifest, name=name, timeout_s=OPEN_TIMEOUT_S)
        except ManifestMismatch as error:
            fields = ", ".join(sorted(error.fields))
            self._tell(
                f"this engine shares nothing with the one that came first as {name!r}: they "
                f"differ in {fields}. It has a namespace of its own"
            )
        cache = pool.namespace(manifest, timeout_s=OPEN_TIMEOUT_S)
        log.info("cenote: namespace %s of pool %r is open", cache.id.hex()[:16], pool.name)
        return cache

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("cenote: %s", what)


def namespace_name(manifest: Manifest) -> str:
    """Return what the first engine of a model calls a namespace, at most 55 bytes."""
    model = str(manifest["model"])
    if len(model.encode()) > MODEL_MAX_BYTES:
        model = hashlib.sha256(model.encode()).hexdigest()[:MODEL_MAX_BYTES]
    return f"vllm/{model}/{manifest['pp_rank']}.{manifest['tp_rank']}.{manifest['group']}"
