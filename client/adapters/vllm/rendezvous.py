# SPDX-License-Identifier: Apache-2.0
"""
How the scheduler's half of an engine learns from its workers what their chunks are.

vLLM's stock OffloadingConnector gives a spec no way from a worker to the scheduler, and what a
namespace's identity depends on is known where the tensors are. So each worker listens on an
abstract socket that is named by the engine's id and its rank, and the scheduler asks them all: what
their bytes depend on, and which pool they are attached to. Whoever is not the same user is sent
away. Without an answer nothing is ever a hit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from cenote.client import Backoff
from cenote.client.manifest import Value

from .settings import LOGGER

log = logging.getLogger(LOGGER)

VERSION: Final = 1
ANSWER_MAX: Final = 1 << 20  # bytes
ASK_TIMEOUT_S: Final = 1.0
RETRY: Final = Backoff(first_s=0.05, last_s=2.0)
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid

Fields: TypeAlias = dict[str, Value]


class Unanswered(Exception):
    """A worker did not say what was asked for."""


@dataclass(frozen=True)
class Answer:
    """
    What a worker says.

    Attributes:
        pool_id: Of the pool that it is attached to, b"" while there is none.
        hashed: How the engine's tokens become keys: algorithm and digest of the seed.
        chunk_tokens: Tokens of a chunk.
        groups: For each KV cache group the fields of its manifest.
        nbytes: For each KV cache group the bytes of a chunk.
    """

    pool_id: bytes
    hashed: tuple[str, str]
    chunk_tokens: int
    groups: tuple[Fields, ...]
    nbytes: tuple[int, ...]

    def pack(self) -> bytes:
        """Return it as it travels."""
        said = {
            "version": VERSION,
            "pool": self.pool_id.hex(),
            "hashed": self.hashed,
            "chunk_tokens": self.chunk_tokens,
            "groups": self.groups,
            "nbytes": self.nbytes,
        }
        return json.dumps(said).encode()

    @classmethod
    def parse(cls, packed: bytes) -> Answer:
        """
        Return what was said.

        Raises:
            Unanswered: It is no answer of this version.
        """
        try:
            said = json.loads(packed)
            if said["version"] != VERSION:
                raise Unanswered(f"a worker speaks version {said['version']}, not {VERSION}")
            algorithm, seed = said["hashed"]
            groups = tuple(dict(fields) for fields in said["groups"])
            nbytes = tuple(int(each) for each in said["nbytes"])
            pool_id = bytes.fromhex(said["pool"])
            return cls(pool_id, (algorithm, seed), int(said["chunk_tokens"]), groups, nbytes)
        except (ValueError, KeyError, TypeError) as error:
            raise Unanswered(f"a worker's answer cannot be read: {error!r}") from error


def address_of(engine_id: str, rank: int) -> str:
    """Return the abstract address on which a worker listens: it vanishes with its process."""
    return "\0cenote/vllm/" + hashlib.sha256(f"{engine_id}\0{rank}".encode()).hexdigest()[:32]


def ask(engine_id: str, rank: int) -> Answer:
    """
    Ask a worker.

    Raises:
        Unanswered: It is not there, is another user's, or says nothing that can be read.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(ASK_TIMEOUT_S)
            link.connect(address_of(engine_id, rank))
            if not _is_ours(link):
                raise Unanswered(f"another user listens in the place of worker {rank}")
            said = b""
            while len(said) <= ANSWER_MAX and (more := link.recv(1 << 16)):
                said += more
    except OSError as error:
        raise Unanswered(f"worker {rank} does not answer: {error}") from error
    return Answer.parse(said)


class Listener:
    """
    A worker that answers, in a thread of its own.

    Args:
        engine_id: The engine's.
        rank: The worker's.
        answer: Asked for what to say, each time.
    """

    def __init__(self, engine_id: str, rank: int, answer: Callable[[], Answer]) -> None:
        self._address: Final = address_of(engine_id, rank)
        self._rank: Final = rank
        self._answer: Final = answer
        self._ended: Final = threading.Event()
        self._socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        threading.Thread(target=self._run, name="cenote answers", daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._ended.set()
        with contextlib.suppress(OSError):  # it never listened
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._socket.close()

    def _run(self) -> None:
        attempt = 0
        while not self._ended.is_set():
            try:
                self._socket.bind(self._address)
                self._socket.listen()
                break
            except OSError as error:
                if attempt == 0 and not self._ended.is_set():
                    log.warning(
                        "cenote: worker %d cannot be asked yet, nothing is shared until then: %s. "
                        "Does another engine on this host have the same engine_id?",
                        self._rank,
                        error,
                    )
                self._ended.wait(RETRY.delay_s(attempt))
                attempt += 1
        while not self._ended.is_set():
            try:
                link, _ = self._socket.accept()
            except OSError:
                return  # closed
            with link:
                self._say(link)

    def _say(self, link: socket.socket) -> None:
        try:
            link.settimeout(ASK_TIMEOUT_S)
            if _is_ours(link):
                link.sendall(self._answer().pack())
        except OSError:
            pass  # who asked has gone, and asks again
        except Exception:
            log.exception("cenote: worker %d cannot say what its chunks are", self._rank)


class Rendezvous:
    """
    The scheduler's side: asks all workers, until they agree about the pool.

    Args:
        engine_id: The engine's.
        workers: How many there are.
        pool_id: Returns the id of the pool that the scheduler is attached to, b"" without one.
        learnt: Called once, with what each worker said, when all have answered.
    """

    def __init__(
        self,
        engine_id: str,
        workers: int,
        pool_id: Callable[[], bytes],
        learnt: Callable[[Sequence[Answer]], Any],
    ) -> None:
        self._engine_id: Final = engine_id
        self._workers: Final = workers
        self._pool_id: Final = pool_id
        self._learnt: Final = learnt
        self._known = False
        self._agreed = b""
        self._told: set[str] = set()
        self._wake: Final = threading.Event()
        self._closed = False
        threading.Thread(target=self._run, name="cenote workers", daemon=True).start()

    @property
    def pool_id(self) -> bytes:
        """
        The pool to which this process and all workers are attached; b"" while there is none.

        When it is not the one that this process is attached to now, the workers are asked anew.
        """
        own = self._pool_id()
        if own and own == self._agreed:
            return own
        self._wake.set()
        return b""

    def close(self) -> None:
        """Ask nobody any more."""
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        attempt = 0
        while not self._closed:
            self._wake.clear()
            if self._ask_all():
                attempt = 0
                self._wake.wait()
            else:
                self._wake.wait(RETRY.delay_s(attempt))
                attempt += 1

    def _ask_all(self) -> bool:
        """Do all workers have the pool that this process has?"""
        try:
            answers = [ask(self._engine_id, rank) for rank in range(self._workers)]
        except Unanswered as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                log.info("cenote: nothing is a hit yet: %s", error)
            return False
        if not self._known:
            self._learnt(answers)
            self._known = True
        own = self._pool_id()
        if not own or any(answer.pool_id != own for answer in answers):
            return False
        self._agreed = own
        return True


def _is_ours(link: socket.socket) -> bool:
    """Is it a process of this user at the other end?"""
    raw = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return bool(uid == os.geteuid())
