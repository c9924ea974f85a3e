# SPDX-License-Identifier: Apache-2.0
"""
cenoted: read the configuration, make the pools, serve them until told to stop.

Exit status: 0 stopped as told, 1 something went wrong, 2 wrong usage or configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from cenote.shm import media
from cenote.shm.errors import CenoteError
from cenote.shm.paths import SOCKET_ENV, PathError
from cenote.shm.takeover import OtherLayout

from . import config_reload, config_sources, logs, systemd
from .config import ConfigError, DaemonConfig
from .config_host import SaltError
from .custody import log_unclaimed
from .pools import PoolChange, ServedPool

PR_SET_DUMPABLE: Final = 4
DESCRIPTORS_WANTED: Final = 65_536
DESCRIPTORS_NEEDED: Final = 10_240  # a takeover has nine of each session for a moment
EXIT_OK: Final = 0
EXIT_WRONG: Final = 1
EXIT_USAGE: Final = 2

log = logs.get_log(f"{logs.ROOT}.daemon.main")  # also under python -m, where __name__ differs


class Stopped(BaseException):
    """A signal told us to stop before the event loop ran."""


class Daemon:
    """
    The process: its pools and its signals.

    Args:
        argv: The command line, read again by a reload.
        startup: What it said the first time.
    """

    def __init__(self, argv: Sequence[str], startup: config_sources.Startup) -> None:
        self._argv = argv
        self._startup = startup
        self._config = startup.config
        self._pools: list[ServedPool] = []
        self._done: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- start ----------------------------------------------------------------------------------

    def make(self) -> None:
        """
        Claim and make all pools.

        Raises:
            CenoteError, PathError, SaltError, OSError: Call drop().
        """
        for pool in self._config.pools:
            served = ServedPool(self._config, pool, by_force=self._startup.take_over)
            self._pools.append(served)
            served.claim()
        anew = [s for s in self._pools if not s.take_over(reformat=self._startup.reformat)]
        log_unclaimed(pool.name for pool in self._config.pools)
        self._check_rooms(anew)
        for served in anew:
            total = sum(bytes_ for _, bytes_ in served.spec.wants())
            with media.terminal_progress(f"pool {served.name}", total) as progress:
                served.make(progress)

    @staticmethod
    def _check_rooms(anew: list[ServedPool]) -> None:
        """A pool that could not be kept is given up before the daemon does not start for it."""
        wants = [want for pool in anew for want in pool.spec.wants()]
        try:
            media.check_rooms(wants)
        except media.NoRoom:
            given_up = [pool.give_up_spared() for pool in anew]  # all of them
            if True not in given_up:
                raise
            media.check_rooms(wants)

    def drop(self) -> None:
        """Let go of all pools: of a start that failed, or was stopped. Idempotent."""
        for served in self._pools:
            served.drop(keep=True)

    async def run(self) -> int:
        """Serve until a signal, or until the last pool was destroyed."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(logs.log_loop_exception)
        self._done = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, signal.Signals(number).name)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            for served in self._pools:
                served.serve(self._destroyed)
            self._say_ready()
            self._watch(loop)
            await self._done.wait()
        finally:
            systemd.notify("STOPPING=1")
            for served in list(self._pools):
                await served.close("stopping")
            if self._tasks:
                await asyncio.wait(self._tasks)
        return EXIT_OK

    def _say_ready(self) -> None:
        text = "; ".join(served.ready_text() for served in self._pools)
        print(f"ready {text}", flush=True)
        self._say_what_is_ignored()
        for served in self._pools:
            log.info("ready", pool=served.name, socket=served.socket_path, pid=os.getpid())
        systemd.notify("READY=1")

    def _say_what_is_ignored(self) -> None:
        """$CENOTE_SOCKET is for clients; who sets it for a daemon may have meant ours."""
        named = os.environ.get(SOCKET_ENV)
        if named and Path(named) not in [served.socket_path for served in self._pools]:
            log.warning(
                "client_variable",
                socket=named,
                remark=f"${SOCKET_ENV} tells clients where to look, not this daemon where to "
                "listen: that is $CENOTED_SOCKET or --socket. Clients with this environment will "
                "not find it",
            )

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer systemd's watchdog, if it asks: the only timer of an idle daemon."""
        period_s = systemd.watchdog_period_s(os.getpid())
        if period_s is None:
            return

        def tick() -> None:
            loop.call_later(period_s, tick)  # first: one failed look must not be the last
            try:
                for served in self._pools:
                    served.check()
                systemd.notify("WATCHDOG=1")
            except (CenoteError, OSError) as error:
                remark = "the watchdog gets no answer"
                log.error("check_failed", exc=error, remark=remark)  # noqa: TRY400 - our log
            logs.flush()

        tick()

    # ---- events ---------------------------------------------------------------------------------

    def _stop(self, why: str) -> None:
        assert self._done is not None
        log.info("stopping", signal=why)
        self._done.set()

    def _destroyed(self, served: ServedPool) -> None:
        if served not in self._pools:
            return  # a second administrator was as fast
        self._pools.remove(served)
        task = asyncio.get_running_loop().create_task(self._end(served))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, served: ServedPool) -> None:
        await served.close("destroyed")
        if not self._pools and self._done is not None:
            self._done.set()

    def _reload(self) -> None:
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={now_us}")
        remark = "the old configuration stays in force"
        try:
            found = config_reload.diff(self._config, config_sources.load(self._argv).config)
            changes = self._prepare(found)
            remark = "the new configuration is in force in part: restart the daemon"
            self._apply(found, changes)
        except (ConfigError, SaltError, CenoteError, OSError, SystemExit) as error:
            log.error("reload_failed", exc=error, remark=remark)  # noqa: TRY400 - our log
        finally:
            systemd.notify("READY=1")

    def _prepare(self, found: config_reload.Reload) -> list[tuple[ServedPool, PoolChange]]:
        """Do all that can fail, for every pool before the first of them is changed."""
        by_name = {pool.name: pool for pool in found.config.pools}
        changed = {change.pool for change in found.live}
        pools = [served for served in self._pools if served.name in changed]
        return [(served, served.prepare(by_name[served.name])) for served in pools]

    def _apply(
        self, found: config_reload.Reload, changes: list[tuple[ServedPool, PoolChange]]
    ) -> None:
        for served, prepared in changes:
            served.apply(prepared)
        self._config = found.config
        if any(not change.pool for change in found.live):
            logs.configure(found.config.log_level, found.config.log_format)
        for change in found.restart:
            log.warning("needs_restart", pool=change.pool, change=str(change), key=change.key)
        log.info(
            "reloaded",
            changes=[str(change) for change in found.live],
            needs_restart=len(found.restart),
        )


def _protect_process() -> None:
    """Nobody of our uid may attach a debugger to us, and a core dump would hold the pools."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("not_protected", error=os.strerror(ctypes.get_errno()))


def _raise_descriptor_limit() -> None:
    """Each session costs three descriptors and each connection one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < DESCRIPTORS_NEEDED:
        log.warning("few_descriptors", limit=wanted, remedy="raise `ulimit -Hn` or LimitNOFILE")


@contextlib.contextmanager
def _stop_signals_raise() -> Iterator[None]:
    """Until the event loop takes them over, a signal to stop is an exception here."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    # A reload before there is anything to reload would be the end of us.
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drop(startup: config_sources.Startup) -> int:
    """Free what daemons that are not there any more left of the configured pools."""
    for pool in startup.config.pools:
        served = ServedPool(startup.config, pool, by_force=startup.take_over)
        served.claim()
        try:
            served.forget_everything()
        finally:
            served.drop()
    return EXIT_OK


def _serve(argv: Sequence[str], startup: config_sources.Startup) -> int:
    if startup.drop:
        return _drop(startup)
    daemon = Daemon(argv, startup)
    with _stop_signals_raise():
        try:
            daemon.make()
            return asyncio.run(daemon.run())
        finally:
            daemon.drop()


def main(argv: Sequence[str] | None = None) -> int:
    """Run cenoted and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        startup = config_sources.load(argv)
    except ConfigError as error:
        for problem in error.problems:
            print(f"cenoted: {problem}", file=sys.stderr)
        return EXIT_USAGE
    if startup.check:
        print(config_sources.to_toml(startup.config), end="")
        return EXIT_OK
    return _run(argv, startup, startup.config)


def _run(argv: Sequence[str], startup: config_sources.Startup, config: DaemonConfig) -> int:
    logs.configure(config.log_level, config.log_format)
    logs.log_uncaught()
    _protect_process()
    _raise_descriptor_limit()
    try:
        return _serve(argv, startup)
    except Stopped as stopped:
        log.info("stopped", signal=str(stopped), remark="before the pools were ready")
        return EXIT_OK
    except (media.MediumError, PathError, SaltError, OtherLayout) as error:
        log.error("cannot_start", error=str(error))  # noqa: TRY400 - the text has the remedy
        return EXIT_USAGE
    except (CenoteError, OSError, MemoryError) as error:
        log.error("cannot_start", error=str(error) or type(error).__name__)  # noqa: TRY400
        return EXIT_WRONG
    finally:
        logs.flush(everything=True)


if __name__ == "__main__":
    sys.exit(main())
