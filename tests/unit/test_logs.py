# SPDX-License-Identifier: Apache-2.0
"""Structured logs: cenote.daemon.logs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cenote.daemon import logs

MINUTE_NS = logs.WINDOW_NS
log = logs.get_log("cenote.daemon.test")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time as the test wants it."""

    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(clock: Clock) -> Iterator[io.StringIO]:
    target = io.StringIO()
    handler = logs.configure("INFO", "auto", stream=target, clock=clock)
    yield target
    logging.getLogger().removeHandler(handler)
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    """Return what was written, as JSON."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_away_from_a_terminal(stream: io.StringIO) -> None:
    """
    Elsewhere than on a terminal each event is one JSON object with its fields.
    """
    log.warning("session_closed", pid=4711, dropped=12, path=Path("/x"), raw=b"\xff", f=0.5, n=None)

    (line,) = lines(stream)
    assert line["event"] == "session_closed"
    assert line["level"] == "WARNING"
    assert line["logger"] == "cenote.daemon.test"
    assert str(line["time"]).endswith("Z")
    fields = {key: line[key] for key in ("pid", "dropped", "path", "raw", "f", "n")}
    assert fields == {"pid": 4711, "dropped": 12, "path": "/x", "raw": "ff", "f": 0.5, "n": None}


def test_text_on_a_terminal_cannot_be_forged(stream: io.StringIO) -> None:
    """
    On a terminal an event is one line; what a client wrote can look like no field and no line.
    """
    terminal = Terminal()
    handler = logs.configure(stream=terminal)
    log.info("attached", name="x admin=true\nERROR fake", pid=7, ok=True, empty="")
    logging.getLogger().removeHandler(handler)

    (line,) = terminal.getvalue().splitlines()
    assert r'attached name="x admin=true\nERROR fake" pid=7 ok=true empty=""' in line
    assert stream.getvalue() == ""


def test_one_line_a_kind_and_minute(stream: io.StringIO, clock: Clock) -> None:
    """
    A frequent event is written once a minute, and its next line counts what was suppressed.
    """
    for pid in range(100):
        log.info("attached", pid=pid)
    log.info("other")
    assert [line["event"] for line in lines(stream)] == ["attached", "other"]

    clock.now_ns = MINUTE_NS
    log.info("attached", pid=100)

    assert len(lines(stream)) == 3
    assert lines(stream)[-1]["pid"] == 100
    assert lines(stream)[-1]["suppressed"] == 99


def test_suppressed_events_are_reported_without_a_next_one(
    stream: io.StringIO, clock: Clock
) -> None:
    """
    flush() writes the last suppressed event when its minute is over, with the number of the others.
    """
    for pid in range(5):
        log.info("attached", pid=pid)
    logs.flush()
    assert len(lines(stream)) == 1

    clock.now_ns = MINUTE_NS
    logs.flush()
    logs.flush()

    assert len(lines(stream)) == 2
    assert lines(stream)[-1]["pid"] == 4
    assert lines(stream)[-1]["suppressed"] == 3


def test_last_act_writes_everything(stream: io.StringIO) -> None:
    """
    flush(everything=True) loses no count when the daemon ends within the minute.
    """
    log.info("a")
    log.info("a", n=2)
    logs.flush(everything=True)

    assert [line.get("n") for line in lines(stream)] == [None, 2]


def test_pools_and_errors_are_kinds_of_their_own(stream: io.StringIO) -> None:
    """
    Another pool, another error, and another level are never hidden behind a frequent event.
    """
    for _ in range(3):
        log.info("opened", pool="a")
        log.info("opened", pool="b")
        log.error("failed", exc=ValueError("x"))
        log.error("failed", exc=OSError(5, "y"))

    assert [line.get("pool") or line.get("error") for line in lines(stream)] == [
        "a",
        "b",
        "ValueError: x",
        "OSError: [Errno 5] y",
    ]


def test_memory_of_the_limiter_is_bounded() -> None:
    """
    Beyond its limit the limiter forgets the oldest kind, and writes its count first (I10).
    """
    limiter = logs.RateLimiter(kinds_max=2)

    def admit(name: str) -> list[str]:
        record = logging.LogRecord("x", logging.INFO, "", 0, name, None, None)
        return [str(r.msg) for r in limiter.admit(record, 0)]

    assert [admit("a"), admit("a"), admit("b")] == [["a"], [], ["b"]]
    assert admit("c") == ["a", "c"]
    assert [str(r.msg) for r in limiter.drain()] == []


def test_exception_has_its_traceback(stream: io.StringIO) -> None:
    """
    error(exc=...) writes type, text and traceback.
    """
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        log.error("scrub_failed", exc=error, pool="a")

    (line,) = lines(stream)
    assert line["error"] == "RuntimeError: boom"
    assert "test_logs.py" in str(line["traceback"])


def test_no_value_costs_the_line(stream: io.StringIO) -> None:
    """
    A broken __str__, a lone surrogate, NaN, a huge text and a field called "event" are written.
    """

    class Broken:
        def __str__(self) -> str:
            raise ValueError

    log.info("x", a=Broken(), b="\udcff", c=float("nan"), d="y" * 10_000, event="z")
    foreign_record = logging.LogRecord("foreign", 30, "", 0, "100 %d", ("no number",), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logs.EventHandler):
            handler.handle(foreign_record)

    first, foreign = lines(stream)
    assert first["event"] == "x"
    assert first["event_"] == "z"
    assert first["c"] == "nan"
    assert len(str(first["d"])) == logs.FIELD_MAX_CHARS
    assert "no number" in str(foreign["event"])


def test_level_is_kept_and_libraries_are_quiet(stream: io.StringIO) -> None:
    """
    Below the level nothing is written, and of other libraries nothing below WARNING.
    """
    log.debug("detail")
    logging.getLogger("asyncio").info("selector")
    logging.getLogger("asyncio").warning("slow")

    assert [line["event"] for line in lines(stream)] == ["slow"]


def test_configuring_again_replaces_the_handler(stream: io.StringIO) -> None:
    """
    A reload writes open counts to the old stream and sends later events to the new one only.
    """
    log.info("a")
    log.info("a", n=2)
    second = io.StringIO()
    handler = logs.configure("DEBUG", "json", stream=second)
    log.debug("b")
    logging.getLogger().removeHandler(handler)

    assert [line["event"] for line in lines(stream)] == ["a", "a"]
    assert [line["event"] for line in lines(second)] == ["b"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_uncaught_exceptions_are_logged(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What nobody caught, in the main thread, another one or an event loop, becomes an ERROR line.
    """
    for owner, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    logs.log_uncaught()

    def fail() -> None:
        raise RuntimeError("in a thread")

    thread = threading.Thread(target=fail, name="scrubber")
    thread.start()
    thread.join()
    error = ValueError("in main")
    sys.excepthook(ValueError, error, None)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(logs.log_loop_exception)
    loop.call_exception_handler({"message": "task failed", "exception": OSError("in a loop")})
    loop.close()

    written = [(line["level"], line["error"]) for line in lines(stream)]
    assert written == [
        ("ERROR", "RuntimeError: in a thread"),
        ("ERROR", "ValueError: in main"),
        ("ERROR", "OSError: in a loop"),
    ]
