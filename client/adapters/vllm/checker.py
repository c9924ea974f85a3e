# SPDX-License-Identifier: Apache-2.0
"""
Checksums compared before anybody is promised a chunk, in a thread beside the scheduler.

The stock OffloadingConnector ends the engine when a load fails. So a chunk is looked at first; the
request waits in the scheduler meanwhile, and a damaged chunk is a miss.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from cenote.client.errors import CenoteError, ChunkLost

from .settings import LOGGER

if TYPE_CHECKING:
    from cenote.client import Cache, Chunk

log = logging.getLogger(LOGGER)

REMEMBERED_MAX: Final = 1 << 16  # chunks


class Found(enum.Enum):
    """What is known of a chunk's bytes."""

    GOOD = "good"
    PENDING = "pending"
    BAD = "bad"


class Checker:
    """
    Compares checksums, as `verify` says.

    Args:
        verify: "never", "first": once in this process, "always": once for each request.
    """

    def __init__(self, verify: str) -> None:
        self._verify: Final = verify
        self._found: Final[OrderedDict[bytes, Found]] = OrderedDict()
        self._lock: Final = threading.Lock()
        self._thread: Final = ThreadPoolExecutor(1, "cenote verify")

    def look(self, cache: Cache, chunk: Chunk, request: str) -> Found:
        """
        Return what is known of a chunk, and begin to find out what is not.

        Args:
            cache: Its namespace, from which a damaged one is deleted.
            chunk: The chunk. While its answer is PENDING it is the checker's, and released by it.
            request: For which request somebody asks.
        """
        if self._verify == "never" or chunk.crc32c is None:
            return Found.GOOD
        mark = chunk.token + (request.encode() if self._verify == "always" else b"")
        with self._lock:
            found = self._found.get(mark)
            if found is not None:
                if found is Found.PENDING:
                    chunk.release()
                return found
            self._found[mark] = Found.PENDING
        self._thread.submit(self._compare, cache, chunk, mark)
        return Found.PENDING

    def close(self) -> None:
        """Compare nothing more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _compare(self, cache: Cache, chunk: Chunk, mark: bytes) -> None:
        found = Found.BAD
        try:
            chunk.verify()
            found = Found.GOOD
        except ChunkLost as error:
            self._drop(cache, chunk, error)
        except Exception:
            log.exception("cenote: a chunk is not used, for its checksum cannot be compared")
        finally:
            chunk.release()
            with self._lock:
                self._found[mark] = found
                self._found.move_to_end(mark)
                oldest = next(iter(self._found))
                if len(self._found) > REMEMBERED_MAX and self._found[oldest] is not Found.PENDING:
                    del self._found[oldest]

    def _drop(self, cache: Cache, chunk: Chunk, error: ChunkLost) -> None:
        """Make a damaged chunk absent, so that it is stored again once it is computed."""
        log.warning("cenote: a damaged chunk is computed instead: %s", error)
        try:
            cache.delete(chunk.key)
        except CenoteError as why:
            log.warning("cenote: the damaged chunk stays in the pool, and unused: %s", why)
