# SPDX-License-Identifier: Apache-2.0
"""
The control connection: how it is made, how it is used by several threads, how it comes back.

Nothing on the hit path passes here. A thread sleeps in poll(2) on the socket; when the daemon goes
it says so to the pool, and then tries to reach the next daemon at ever longer, random intervals.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from cenote.shm import identity, paths, session, wire
from cenote.shm.messages import Resume

from . import errors

log = logging.getLogger("cenote.client")

RECONNECT_FIRST_S: Final = 0.05
RECONNECT_LAST_S: Final = 5.0
DESCRIPTORS_LOOK_MS: Final = 60_000  # are they still ours, after an os.closerange() of the engine?
_NOBODY: Final = (FileNotFoundError, ConnectionError, BlockingIOError)


@dataclass(frozen=True)
class Backoff:
    """
    How long to wait before each attempt to reconnect: doubling, with jitter, at most last_s.

    Attributes:
        first_s: Upper bound of the first wait.
        last_s: Upper bound of all later ones.
        draw: Source of uniform numbers in [0, 1); spreads the clients of a restarted daemon.
    """

    first_s: float = RECONNECT_FIRST_S
    last_s: float = RECONNECT_LAST_S
    draw: Callable[[], float] = random.random

    def delay_s(self, attempt: int) -> float:
        """Return the wait before *attempt* (0, 1, 2 …): half to all of its upper bound."""
        bound_s = min(self.last_s, self.first_s * 2.0 ** min(attempt, 32))
        return bound_s * (0.5 + 0.5 * self.draw())


@dataclass(frozen=True)
class Target:
    """Whom to reach, as whom, and how long to try."""

    path: Path
    role: str | None
    label: str
    timeout_s: float
    resume: Resume | None = None


class Attached(Protocol):
    """The pool, as its link sees it."""

    def _lost(self) -> None:
        """The daemon is gone."""

    def _rings(self) -> bool:
        """Has its session a doorbell still?"""

    def _resumable(self) -> Resume | None:
        """The session that it would go on with, if the next daemon has it."""

    def _resume(self, channel: Any) -> None:
        """The daemon that is there now has this session still."""

    def _adopt(self, welcome: session.Welcome, mapping: session.Mapping, channel: Any) -> None:
        """A daemon is there again; use what it gave. May raise: then it is tried again."""


def candidate_or_raise(argument: str | os.PathLike[str] | None) -> Path:
    """
    Return the socket that was named, else the first default one that exists.

    Raises:
        PoolGone: There is none; the message names what was looked at, and nothing else.
        AccessDenied: This user may not enter the folder in which it would be.
    """
    path, candidates = paths.find_socket(argument)
    if path is not None:
        return path
    for candidate in candidates:
        if candidate.barred is not None:
            raise errors.AccessDenied(_barred(candidate, candidates))
    raise errors.PoolGone(f"no cenote daemon was found: {_unfound(candidates)}")


def _barred(barred: paths.Candidate, candidates: tuple[paths.Candidate, ...]) -> str:
    """Return what to do about a folder that is closed to us: a daemon may well be there."""
    if barred.origin == paths.OWN_DEFAULT:
        remedy = "It follows from $XDG_RUNTIME_DIR: unset that if it is another user's"
    else:
        remedy = (
            f"Whoever owns it opens it with `chmod 0755 {barred.barred}` (who may attach is for "
            "[pool.access] to say), or name another socket"
        )
    others = "; ".join(str(each) for each in candidates if each is not barred)
    looked = f" Looked at besides: {others}." if others else ""
    return (
        f"uid {os.geteuid()} may not enter {barred.barred}, so that the socket {barred.path} "
        f"({barred.origin}) cannot be reached. {remedy}.{looked}"
    )


def _unfound(candidates: tuple[paths.Candidate, ...]) -> str:
    """Return why no socket can be used, and what to do now."""
    if len(candidates) > 1:
        places = "; ".join(str(candidate) for candidate in candidates)
        return f"looked at {places}. Start one with `cenoted`, or set ${paths.SOCKET_ENV}"
    (named,) = candidates
    if named.problem:
        what = f"the socket {str(named.path)!r} ({named.origin}): {named.problem}"
    else:
        what = f"there is no socket {str(named.path)!r} ({named.origin})"
    return (
        f"{what}. Correct it, leave it out to have the default places looked at, or start a daemon "
        "there (`cenoted --socket PATH`)"
    )


def dial(target: Target) -> tuple[wire.Channel, session.Welcome, session.Mapping | None]:
    """
    Connect, say hello, map the pool; in *timeout_s* altogether. Without a mapping where the
    session of target.resume goes on.

    Raises:
        PoolGone: Nobody listens.
        Timeout: Somebody listens and does not answer.
        AccessDenied, VersionMismatch, LimitReached, ProtocolError, Corrupt, OSError.
    """
    deadline_s = time.monotonic() + target.timeout_s
    channel = wire.Channel(_connected_socket(target))
    try:
        welcome, descriptors = _hello(channel, target, deadline_s)
        if welcome.resumed:
            _check_resumed(welcome, target)
            return channel, welcome, None
        return channel, welcome, session.attach(welcome, descriptors)
    except BaseException:
        channel.close()
        raise


def _check_resumed(welcome: session.Welcome, target: Target) -> None:
    if welcome.as_resume != target.resume:
        raise errors.ProtocolError("the daemon went on with a session that was not asked for")


def _connected_socket(target: Target) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(max(target.timeout_s, 1e-3))
        sock.connect(str(target.path))
    except _NOBODY as error:
        sock.close()
        raise errors.PoolGone(
            f"nobody listens on {target.path} ({error.strerror}): its daemon was killed, or is not "
            f"ready yet. Start one there (`cenoted`), or name another socket, as an argument or in "
            f"${paths.SOCKET_ENV}"
        ) from error
    except PermissionError as error:
        sock.close()
        raise errors.AccessDenied(
            f"{target.path}: {error.strerror}: ask for readers or writers in [pool.access] and for "
            "access to the run directory"
        ) from error
    except TimeoutError as error:
        sock.close()
        raise errors.Timeout(_no_answer(target)) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _hello(
    channel: wire.Channel, target: Target, deadline_s: float
) -> tuple[session.Welcome, dict[str, int]]:
    hello = session.new_hello(_client_name(), target.role, target.label, target.resume)
    pidfd = identity.own_pidfd()
    try:
        reply = channel.request(
            "hello",
            hello.fields(),
            descriptors=[pidfd] if pidfd >= 0 else [],
            timeout_s=max(deadline_s - time.monotonic(), 1e-3),
        )
    except TimeoutError as error:
        raise errors.Timeout(_no_answer(target)) from error
    except wire.Refusal as refusal:
        raise error_of(refusal) from refusal
    except OSError as error:
        raise errors.PoolGone(f"the daemon on {target.path} hung up ({error})") from error
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    return session.parse_welcome(reply)


def _no_answer(target: Target) -> str:
    return (
        f"the daemon on {target.path} did not answer within {target.timeout_s:g} s: is it stopped, "
        "or starting up? Wait longer with timeout_s"
    )


def _client_name() -> str:
    import importlib.metadata  # as long to import as all the rest of the client

    try:
        return f"cenote/{importlib.metadata.version('cenote')}"
    except importlib.metadata.PackageNotFoundError:
        return "cenote/unknown"


def error_of(refusal: wire.Refusal) -> errors.CenoteError:
    """Return the exception for a daemon's no."""
    if refusal.code == "manifest_mismatch":
        fields = {name: (pair[0], pair[1]) for name, pair in refusal.fields.items()}
        return errors.ManifestMismatch(refusal.message, fields)
    if isinstance(refusal, wire.WireError):
        return errors.ProtocolError(refusal.message)
    kinds: dict[str, type[errors.CenoteError]] = {
        "access": errors.AccessDenied,
        "bad_request": errors.InvalidArgument,
        "limit": errors.LimitReached,
        "not_found": errors.ChunkMissing,
        "retired": errors.PoolGone,
        "version": errors.VersionMismatch,
    }
    return kinds.get(refusal.code, errors.CenoteError)(refusal.message)


class _Bell:
    """Wakes the thread of a link. Sockets, for they can be told from what took their numbers."""

    def __init__(self) -> None:
        self._heard, self._rope = (wire.OwnSocket(end) for end in socket.socketpair())
        for end in (self._heard, self._rope):
            end.sock.setblocking(False)

    def fileno(self) -> int:
        """What becomes readable; -1 when this process closed it."""
        return self._heard.sock.fileno() if self._heard.intact else -1

    def ring(self) -> None:
        """Make it readable."""
        if self._rope.intact:
            with contextlib.suppress(OSError):  # full is loud enough
                self._rope.sock.send(b"!", socket.MSG_NOSIGNAL)

    def silence(self) -> None:
        """Make it unreadable."""
        if self._heard.intact:
            with contextlib.suppress(OSError):
                self._heard.sock.recv(4096)

    def close(self) -> None:
        """Give both ends back. Idempotent."""
        self._heard.close()
        self._rope.close()


class Link:
    """
    The connection of one pool, through all its daemons.

    Args:
        target: Whom to reach.
        channel: The connection that is there.
        pool: Told when the daemon goes and when one comes; held weakly.
        backoff: When to try again; None for never.
    """

    def __init__(
        self, target: Target, channel: wire.Channel, pool: Attached, backoff: Backoff | None
    ) -> None:
        self._target = target
        self._channel: wire.Channel | None = channel
        self._pool = weakref.ref(pool)
        self._backoff = backoff
        self._lock = threading.Lock()  # one request at a time
        self._stop = threading.Event()
        self._bell = _Bell()
        self._thread = threading.Thread(target=self._watch, name="cenote-link", daemon=True)
        _links.add(self)
        self._thread.start()

    def request(
        self, op: str, fields: Mapping[str, Any] | None = None, timeout_s: float = 2.0
    ) -> dict[str, Any]:
        """
        Ask the daemon for something and return its answer.

        Raises:
            PoolGone: No daemon is connected, or it hung up.
            Timeout: No answer in time. The connection is given up: the answer may still come.
            CenoteError: The daemon's no.
        """
        deadline_s = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=timeout_s):
            raise errors.Timeout(f"{op}: other calls kept the connection for {timeout_s:g} s")
        try:
            left_s = max(deadline_s - time.monotonic(), 1e-3)
            return self._ask(self._channel, op, fields, left_s)
        finally:
            self._lock.release()

    def ask_on(
        self, channel: wire.Channel, op: str, fields: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """Ask over a connection that is not the pool's yet."""
        return self._ask(channel, op, fields, timeout_s)

    def _ask(
        self,
        channel: wire.Channel | None,
        op: str,
        fields: Mapping[str, Any] | None,
        timeout_s: float,
    ) -> dict[str, Any]:
        if channel is None:
            raise errors.PoolGone(self._gone())
        try:
            return channel.request(op, fields, timeout_s=timeout_s).body
        except wire.WireError as error:
            self._give_up(channel)
            raise error_of(error) from error
        except wire.Refusal as refusal:
            raise error_of(refusal) from refusal
        except TimeoutError as error:
            self._give_up(channel)
            raise errors.Timeout(
                f"{op}: the daemon on {self._target.path} did not answer within {timeout_s:.3g} s"
            ) from error
        except OSError as error:
            self._give_up(channel)
            raise errors.PoolGone(self._gone()) from error

    def _gone(self) -> str:
        then = "trying to reconnect" if self._backoff else "connect() again"
        return f"the daemon on {self._target.path} is gone: what is mapped stays readable; {then}"

    def _give_up(self, channel: wire.Channel) -> None:
        """The connection is of no more use: forget it, tell the pool, wake the thread."""
        channel.close()
        if self._channel is channel:
            self._channel = None
            self._tell_lost()
            self._bell.ring()

    def _tell_lost(self) -> None:
        pool = self._pool()
        if pool is not None:
            pool._lost()

    def close(self) -> None:
        """Say goodbye and close the socket. Idempotent; from any thread."""
        if self._stop.is_set():
            return
        self._stop.set()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        self._bell.ring()

    # ---- the thread ------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            while True:
                self._sleep_until_lost()
                if self._stop.is_set():
                    return
                self._channel = None
                self._tell_lost()
                log.warning("%s", self._gone())
                if self._backoff is None or not self._redial(self._backoff):
                    return
        finally:
            _links.discard(self)

    def _sleep_until_lost(self) -> None:
        if self._bell.fileno() < 0:  # an os.closerange() took it
            self._bell.close()
            self._bell = _Bell()
        if self._stop.is_set():
            return  # close() came while we reconnected, and that may have taken its wake-up
        channel = self._channel
        if channel is None:
            return
        # A number that another thread closed and the kernel gave out again is woken by the bell.
        while (
            (bell := self._bell.fileno()) >= 0
            and (wire_end := channel.fileno()) >= 0
            and self._session_rings()
        ):
            poll = select.poll()
            poll.register(bell, select.POLLIN)
            poll.register(wire_end, select.POLLRDHUP)
            if poll.poll(DESCRIPTORS_LOOK_MS):
                break
        # Not under a request that waits: a daemon that ends answers first, and then hangs up.
        with self._lock:
            if self._channel is not None and not self._stop.is_set():
                self._channel.close()

    def _session_rings(self) -> bool:
        """Can the pool's session wake its keeper?"""
        pool = self._pool()
        return pool is None or pool._rings()

    def _redial(self, backoff: Backoff) -> bool:
        """Try until a daemon is there (True) or the pool is closed or forgotten (False)."""
        attempt, said = 0, ""
        while not self._stop.wait(backoff.delay_s(attempt)):
            attempt += 1
            if self._pool() is None:
                return False
            try:
                return self._reattach()
            except (errors.CenoteError, OSError, MemoryError) as error:
                text = f"{type(error).__name__}: {error}"
                if text != said and not isinstance(error, errors.PoolGone):
                    log.warning("cannot reconnect to %s: %s", self._target.path, text)
                    said = text
        return False

    def _reattach(self) -> bool:
        pool = self._pool()
        target = replace(self._target, resume=pool._resumable() if pool is not None else None)
        del pool  # it may be forgotten while we wait
        channel, welcome, mapping = dial(target)
        pool = self._pool()
        if pool is None or self._stop.is_set():
            channel.close()
            return False
        self._bell.silence()
        try:
            if mapping is None:
                pool._resume(channel)
            else:
                pool._adopt(welcome, mapping, channel)
        except BaseException:
            channel.close()
            raise
        what = "its session goes on" if welcome.resumed else "with a new session"
        log.info("reconnected to pool %r on %s: %s", welcome.pool, self._target.path, what)
        return True

    def install(self, channel: wire.Channel) -> None:
        """Make *channel* the pool's connection; called while the pool changes over."""
        self._channel = channel
        if self._stop.is_set():
            channel.close()

    def after_fork_in_child(self) -> None:
        """Close the parent's descriptors: the daemon must see the parent's end, not the child's."""
        self._stop = threading.Event()  # the thread may have held the lock of the old one
        self._stop.set()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def __del__(self) -> None:
        self._bell.close()  # not before: close() may come at any time, and ring it


_links: Final[weakref.WeakSet[Link]] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for link in list(_links):
        link.after_fork_in_child()
    _links.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
