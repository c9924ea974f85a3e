# SPDX-License-Identifier: Apache-2.0
"""
Give a mapped region its memory before anybody uses it.

Without it the first writer of each page pays for the page, a reader's cgroup may be charged for the
pool's memory, and a shortage shows as SIGBUS in an engine. With it a shortage is an exception here.
"""

from __future__ import annotations

import errno
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from cenote._native._core import ffi, lib
from cenote.shm.units import format_size_rounded

from .base import MediumError, NoRoom, sys_error

SLICE_BYTES: Final = 64 * 1024**2  # one call into the kernel: a stop waits for at most this much
THREADS_MAX: Final = 16  # beyond, the kernel's own locks are what one waits for

Progress = Callable[[int], None]


class PretouchStopped(MediumError):
    """The pre-touch was told to stop before it was done."""


def pretouch(
    address: int,
    bytes_: int,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    cpus: frozenset[int] | None = None,
    stop: threading.Event | None = None,
) -> float:
    """
    Write to every page of the writable mapping at *address* without changing it, in parallel.

    progress is called in this thread with the bytes touched so far. cpus, those of the region's
    node, are where the threads run. Setting *stop*, or an exception in this thread (Ctrl-C, or one
    that *progress* raises), ends it within one slice; the threads are gone when this returns.

    Returns:
        The seconds that it took.

    Raises:
        NoRoom: Memory, huge pages or the file system ran out.
        PretouchStopped: *stop* was set.
        OSError: Anything else the kernel said, EHWPOISON for instance.
    """
    begin_s = time.monotonic()
    slices = [(at, min(SLICE_BYTES, bytes_ - at)) for at in range(0, bytes_, SLICE_BYTES)]
    count = _thread_count(threads, cpus, len(slices))
    crew = _Crew(address, slices, cpus, stop or threading.Event())
    workers = [
        threading.Thread(target=crew.work, name=f"pretouch-{i}", daemon=True) for i in range(count)
    ]
    try:
        for worker in workers:
            worker.start()
        _watch(crew, count, progress)
    finally:
        crew.quit.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    return time.monotonic() - begin_s


def _thread_count(threads: int | None, cpus: frozenset[int] | None, slices: int) -> int:
    wanted = threads or len(cpus or os.sched_getaffinity(0))
    return max(0, min(wanted, THREADS_MAX, slices))


class Pretoucher:
    """Touches one mapping after another; progress gets the bytes of all of them so far."""

    def __init__(self, progress: Progress, stop: threading.Event | None = None) -> None:
        self._progress = progress
        self._stop = stop
        self._before_bytes = 0

    def __call__(self, address: int, bytes_: int) -> None:
        """Touch one more; raises what pretouch() raises."""
        before = self._before_bytes
        pretouch(
            address, bytes_, progress=lambda done: self._progress(before + done), stop=self._stop
        )
        self._before_bytes = before + bytes_


class _Crew:
    """What the threads share: slices yet to touch, and reports of those that are done."""

    def __init__(
        self,
        address: int,
        slices: Sequence[tuple[int, int]],
        cpus: frozenset[int] | None,
        stop: threading.Event,
    ) -> None:
        self.address = address
        self.todo: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        for item in slices:
            self.todo.put(item)
        self.cpus = cpus
        self.stop = stop
        self.quit = threading.Event()
        # Bytes of a finished slice, why a thread gave up, or None: a thread has ended.
        self.reports: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def work(self) -> None:
        """Touch slices until there are none or somebody says stop."""
        try:
            if self.cpus:
                os.sched_setaffinity(0, self.cpus)  # 0 is this thread alone
            while not (self.quit.is_set() or self.stop.is_set()):
                at, bytes_ = self.todo.get_nowait()
                populate(self.address + at, bytes_)
                self.reports.put(bytes_)
        except queue.Empty:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self.reports.put(error)
        finally:
            self.reports.put(None)


def _watch(crew: _Crew, running: int, progress: Progress | None) -> None:
    done_bytes = 0
    while running:
        report = crew.reports.get()
        if isinstance(report, BaseException):
            raise report
        if report is None:
            running -= 1
            continue
        done_bytes += report
        if progress is not None:
            progress(done_bytes)
    if crew.stop.is_set() and not crew.todo.empty():
        raise PretouchStopped(f"stopped after {format_size_rounded(done_bytes)}")


def populate(address: int, bytes_: int) -> None:
    """
    Give the pages of a writable mapping their memory, in this thread; the GIL is released.

    Raises:
        NoRoom, OSError: see pretouch().
    """
    syserr: Any = ffi.new("struct cn_syserr *")
    status = lib.cn_region_populate(ffi.cast("void *", address), bytes_, syserr)
    if status == lib.CN_OK:
        return
    if status == lib.CN_EINVAL:
        raise MediumError(f"address {address:#x} is no start of a page")
    if syserr.err in (errno.ENOMEM, errno.EFAULT, errno.ENOSPC):
        raise NoRoom(
            f"the memory of the region ran out while it was populated "
            f"({os.strerror(syserr.err)}): its file system, the huge pages or the memory limit are "
            "smaller than they were a moment ago. Free some, or ask for a smaller size"
        )
    raise sys_error(syserr, f"cannot populate {bytes_} bytes at {address:#x}")


@contextmanager
def terminal_progress(label: str, total_bytes: int) -> Iterator[Progress]:
    """
    Show a progress bar on stderr while the block runs, if stderr is a terminal; else nothing.

    Yields what pretouch() takes as progress.
    """
    if not sys.stderr.isatty():
        yield lambda _done_bytes: None
        return
    from rich import console, progress  # a client that only maps must not pay for the import

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(
        *columns, console=console.Console(stderr=True), transient=True
    ) as display:
        task = display.add_task(label, total=total_bytes)
        yield lambda done_bytes: display.update(task, completed=done_bytes)
