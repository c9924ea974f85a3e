# SPDX-License-Identifier: Apache-2.0
"""
The socket of a pool: listen, read requests, send answers, and stay unharmed by whoever connects.

asyncio's streams cannot pass descriptors, so this works on non-blocking sockets and the loop's
readers. Each connection has one request in work; until its answer is sent, nothing more is read
from it. Timers exist only while somebody is late: an idle server never wakes up.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from cenote.shm.identity import peer_of
from cenote.shm.messages import parse_request
from cenote.shm.wire import (
    HELLO_BODY_MAX_BYTES,
    ID_MAX,
    REQUEST_BODY_MAX_BYTES,
    Decoder,
    Message,
    Refusal,
    WireError,
    close_all,
    encode,
    failure,
    receive,
    send_some,
)

from .logs import get_log
from .service import Answer, Caller, PoolService

BACKLOG: Final = 1024
ACCEPTS_A_ROUND: Final = 64
CONNECTIONS_MAX: Final = 2048
CONNECTIONS_PER_UID_MAX: Final = 1024
UNGREETED_PER_UID_MAX: Final = 512  # connections without a hello yet
STRANGERS_MAX: Final = 32  # connections of users that may not attach; they are told so
HELLO_S: Final = 2.0
STALL_S: Final = 10.0  # how long an answer may lie unread
ACCEPT_PAUSE_S: Final = 1.0  # after the process ran out of descriptors
RATE_PER_S: Final = 500.0  # requests of one connection, sustained
RATE_BURST: Final = 250.0
FORGET_S: Final = (0.2, 2.0, 20.0)  # after a connection ended: did its session end, too?
HEAVY_OPS: Final = frozenset({"audit", "clear"})  # in a thread: the others go on meanwhile

log = get_log(__name__)


class TokenBucket:
    """So many requests a second, and some at once. Pure: time is an argument, in seconds."""

    def __init__(self, rate_per_s: float, burst: float, now_s: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._tokens = burst
        self._at_s = now_s

    def take(self, now_s: float) -> float:
        """Take one token and return 0, or return the seconds until there is one."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate_per_s


class Connection:
    """One client's connection. It ends in close(), and nothing it does raises into the loop."""

    def __init__(self, server: PoolServer, sock: socket.socket, caller: Caller) -> None:
        self.caller = caller
        self._server = server
        self._sock = sock
        self._loop = server.loop
        self._decoder = Decoder(HELLO_BODY_MAX_BYTES, descriptors_max=1)
        self._bucket = TokenBucket(RATE_PER_S, RATE_BURST, self._loop.time())
        self._unsent = memoryview(b"")
        self._answer: Answer | None = None  # whose bytes are unsent
        self._busy = False
        self._held: Message | None = None  # waits until the client's rate allows it
        self._timer: asyncio.TimerHandle | None = None
        self._set_timer(HELLO_S, self._too_late)
        self._loop.add_reader(sock, self._readable)

    # ---- reading --------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            if not receive(self._sock, self._decoder):
                self.close()
                return
        except BlockingIOError:
            return
        except WireError as error:
            self._malformed(error)
            return
        except OSError:
            self.close()  # reset by the peer
            return
        self._work()

    def _work(self) -> None:
        """Answer requests that are here until one is not answered at once."""
        while not (self.closed or self._busy or self._answer):
            try:
                message = self._held or self._decoder.next()
            except WireError as error:
                self._malformed(error)
                return
            self._held = None
            if message is None:
                return
            wait_s = self._bucket.take(self._loop.time())
            if wait_s:
                self._held = message
                self._pause()
                self._set_timer(wait_s, self._resume)
                return
            self._request(message)

    def _pause(self) -> None:
        self._busy = True
        self._loop.remove_reader(self._sock)

    def _resume(self) -> None:
        self._busy = False
        if not self.closed:
            self._loop.add_reader(self._sock, self._readable)
            self._work()

    def _request(self, message: Message) -> None:
        try:
            op, request_id = parse_request(message.body)
        except WireError as error:
            close_all(message.descriptors)
            self._malformed(error, _id_of(message))
            return
        if op in HEAVY_OPS:
            self._pause()
            self._server.run(self._heavy(op, request_id, message))
            return
        answer = self._answered(op, request_id, message)
        self._greet(op)
        self._send(answer)

    def _answered(self, op: str, request_id: int, message: Message) -> Answer:
        """Return the service's answer; every exception becomes one."""
        service = self._server.service
        try:
            return service.answer(self.caller, op, request_id, message.body, message.descriptors)
        except WireError as error:
            self._log_malformed(error)
            return Answer(failure(request_id, error), last=True)
        except Refusal as refusal:
            refused = not self.caller.role
            if refused:
                uid = self.caller.peer.uid
                log.info("client_refused", pool=self._pool, code=refusal.code, uid=uid)
            return Answer(failure(request_id, refusal), last=refused)
        except Exception as error:  # noqa: BLE001 - one request must not end the daemon
            log.error("request_failed", pool=self._pool, op=op, exc=error)  # noqa: TRY400 - ours
            wrong = Refusal("internal", f"the daemon failed on {op}: see its log")
            return Answer(failure(request_id, wrong), last=not self.caller.role)

    async def _heavy(self, op: str, request_id: int, message: Message) -> None:
        answer = await asyncio.to_thread(self._answered, op, request_id, message)
        self._busy = False
        if not self.closed:
            self._loop.add_reader(self._sock, self._readable)
        self._send(answer)
        self._work()

    def _greet(self, op: str) -> None:
        if op == "hello" and self.caller.role:
            self._clear_timer()
            self._decoder.body_max_bytes = REQUEST_BODY_MAX_BYTES
            self._server.greeted(self)

    # ---- writing --------------------------------------------------------------------------------

    def _send(self, answer: Answer) -> None:
        if self.closed:
            answer.sent()
            return
        self._answer = answer
        self._unsent = memoryview(encode(answer.body))
        self._writable()
        if self._answer is not None:
            self._loop.remove_reader(self._sock)
            self._loop.add_writer(self._sock, self._drained)
            self._set_timer(STALL_S, self._stalled)

    def _writable(self) -> None:
        """Send what the socket takes; the descriptors go with the first byte."""
        answer = self._answer
        assert answer is not None
        descriptors = answer.descriptors
        try:
            while self._unsent:
                sent = send_some(self._sock, self._unsent, descriptors)
                self._unsent = self._unsent[sent:]
                answer.descriptors = descriptors = ()
        except BlockingIOError:
            return
        except OSError:
            self.close()  # it went away, or may be sent no more descriptors
            return
        self._answer = None
        answer.sent()
        if answer.last:
            self.close()

    def _drained(self) -> None:
        self._writable()
        if self.closed or self._answer is not None:
            return
        self._clear_timer()
        self._loop.remove_writer(self._sock)
        self._loop.add_reader(self._sock, self._readable)
        self._work()

    # ---- the end --------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._sock.fileno() < 0

    @property
    def _pool(self) -> str:
        return self._server.service.host.name

    def _malformed(self, error: WireError, request_id: int = 0) -> None:
        self._log_malformed(error)
        self.say(failure(request_id, error))
        self.close()

    def _log_malformed(self, error: WireError) -> None:
        # Not as `error`: the log has a line a minute for each text there, and this one is theirs.
        peer = self.caller.peer
        log.warning(
            "client_malformed", pool=self._pool, why=error.message, pid=peer.pid, uid=peer.uid
        )

    def _too_late(self) -> None:
        log.warning("client_silent", pool=self._pool, pid=self.caller.peer.pid, limit_s=HELLO_S)
        self.say(failure(0, Refusal("limit", f"no hello came within {HELLO_S:g} s")))
        self.close()

    def _stalled(self) -> None:
        log.warning("client_stalled", pool=self._pool, pid=self.caller.peer.pid, limit_s=STALL_S)
        self.close()

    def say(self, body: dict[str, Any]) -> None:
        """Send something if it goes at once and no answer is half sent."""
        if self._answer is None and not self.closed:
            with contextlib.suppress(OSError):
                self._sock.send(encode(body), socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """End the connection; the session lives as long as its mapping. Idempotent."""
        if self.closed:
            return
        self._clear_timer()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._decoder.close()
        if self._held is not None:
            close_all(self._held.descriptors)
        if self._answer is not None:
            self._answer.sent()
            self._answer = None
        self._server.ended(self)

    def _set_timer(self, delay_s: float, then: Callable[[], None]) -> None:
        self._clear_timer()
        self._timer = self._loop.call_later(delay_s, then)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class PoolServer:
    """
    The listening socket of one pool and the connections on it.

    Args:
        service: What answers.
        path: The socket; the caller holds the pool's lock and removed a stale one.
    """

    def __init__(self, service: PoolService, path: Path) -> None:
        self.service = service
        self.path = path
        self.loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._by_uid: collections.Counter[int] = collections.Counter()
        self._ungreeted: collections.Counter[int] = collections.Counter()
        self._strangers: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._looks: list[asyncio.TimerHandle] = []
        self._listener = _listen(path, self._mode())
        self._found = os.lstat(path)
        self.loop.add_reader(self._listener, self._acceptable)

    @property
    def connection_count(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def _mode(self) -> int:
        return 0o666 if self.service.access.others_may_connect() else 0o600

    # ---- accepting ------------------------------------------------------------------------------

    def _acceptable(self) -> None:
        for _ in range(ACCEPTS_A_ROUND):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    self._rest(error)
                    return
                continue
            self._admit(sock)

    def _rest(self, error: OSError) -> None:
        """No descriptors or no memory: whoever waits in the backlog waits a little longer."""
        log.error("accept_failed", pool=self.service.host.name, exc=error)
        self.loop.remove_reader(self._listener)
        self.loop.call_later(ACCEPT_PAUSE_S, self._listen_again)

    def _listen_again(self) -> None:
        if self._listener.fileno() >= 0:
            self.loop.add_reader(self._listener, self._acceptable)

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            peer = peer_of(sock)
        except OSError as error:
            log.warning("peer_unknown", pool=self.service.host.name, exc=error)
            self._turn_away(
                sock,
                Refusal("access", "the kernel did not tell the daemon who you are: see its log"),
            )
            return
        stranger = self.service.config.access.role_of(peer.uid, peer.gids) is None
        full = self._full(peer.uid, stranger)
        if full:
            log.warning("connection_refused", pool=self.service.host.name, uid=peer.uid, why=full)
            self._turn_away(sock, Refusal("limit", full))
            return
        self._by_uid[peer.uid] += 1
        self._ungreeted[peer.uid] += 1
        connection = Connection(self, sock, Caller(peer))
        self._connections.add(connection)
        if stranger:
            self._strangers.add(connection)

    def _turn_away(self, sock: socket.socket, refusal: Refusal) -> None:
        """Say why, if it goes at once, and hang up."""
        with contextlib.suppress(OSError):
            sock.send(encode(failure(0, refusal)), socket.MSG_NOSIGNAL)
        sock.close()

    def _full(self, uid: int, stranger: bool) -> str:
        """Return which limit forbids another connection of *uid*, or ""."""
        checks = (
            (len(self._connections), CONNECTIONS_MAX, "connections"),
            (self._by_uid[uid], CONNECTIONS_PER_UID_MAX, f"connections of uid {uid}"),
            (
                self._ungreeted[uid],
                UNGREETED_PER_UID_MAX,
                f"connections of uid {uid} without hello",
            ),
            (len(self._strangers) if stranger else 0, STRANGERS_MAX, "connections of strangers"),
        )
        for count, limit, what in checks:
            if count >= limit:
                return f"the daemon has {count} {what}, and {limit} are allowed: try again later"
        return ""

    def greeted(self, connection: Connection) -> None:
        """*connection* had its hello."""
        _count_down(self._ungreeted, connection.caller.peer.uid)

    def ended(self, connection: Connection) -> None:
        """*connection* is closed."""
        self._connections.discard(connection)
        self._strangers.discard(connection)
        uid = connection.caller.peer.uid
        _count_down(self._by_uid, uid)
        if not connection.caller.role:
            _count_down(self._ungreeted, uid)
        self.service.closed(connection.caller)
        self.look_for_ends()

    def look_for_ends(self) -> None:
        """A session whose connection ended has ended soon; no timer runs for one that lives."""
        for look in self._looks:  # what ended before is seen by the new ones
            look.cancel()
        self._looks = [self.loop.call_later(s, self.service.forget_dead) for s in FORGET_S]

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run *work* beside everything else; close() waits for it."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- changes and the end --------------------------------------------------------------------

    def access_changed(self) -> None:
        """Admit whom the new rules admit; who lost a role is sent away, and may come again."""
        try:
            self.path.chmod(self._mode())
        except OSError as error:  # somebody removed it; the rules hold all the same
            log.warning("socket_mode_not_set", pool=self.service.host.name, exc=error)
        for connection in list(self._connections):
            caller = connection.caller
            if caller.role and not self.service.access.still_allows(caller.peer, caller.role):
                connection.say({"event": "closing", "reason": "access"})
                connection.close()

    async def close(self, reason: str) -> None:
        """Tell everybody why, close all connections and remove the socket."""
        if self._listener.fileno() < 0:
            return
        for look in self._looks:
            look.cancel()
        self.loop.remove_reader(self._listener)
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self.path), self._found):
                self.path.unlink()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for connection in list(self._connections):
            connection.say({"event": "closing", "reason": reason})
            connection.close()


def _listen(path: Path, mode: int) -> socket.socket:
    """Return the listening socket; nobody can connect before its mode is right."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(mode)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _count_down(counter: collections.Counter[int], uid: int) -> None:
    counter[uid] -= 1
    if counter[uid] <= 0:
        del counter[uid]


def _id_of(message: Message) -> int:
    """Return the id of a request that is wrong otherwise, or 0."""
    found = message.body.get("id")
    valid = isinstance(found, int) and not isinstance(found, bool) and 1 <= found <= ID_MAX
    return int(found) if valid else 0  # type: ignore[arg-type]  # valid says that it is an int
