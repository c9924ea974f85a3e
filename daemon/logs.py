# SPDX-License-Identifier: Apache-2.0
"""
Structured logs on stdlib logging: an event name, then fields.

    log = get_log(__name__)
    log.warning("session_closed", session=session.id, pid=session.pid, leases_dropped=12)

Text on a terminal, JSON lines elsewhere, to stderr. Of each kind of event there is at most one
line a minute; the next line of that kind says how many were suppressed, and flush() says it when
there is no next one. A kind is the event's name with its pool and, where there is one, its error,
so that another error is never hidden behind a frequent one.

DEBUG is for us; INFO and above are for the operator.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TextIO

WINDOW_NS: Final = 60 * 1_000_000_000
KINDS_MAX: Final = 1024
FIELD_MAX_CHARS: Final = 4096
FIELDS_MAX: Final = 64
ROOT: Final = "cenote"
_KIND_FIELDS: Final = ("pool", "error")
_OWN_KEYS: Final = ("time", "level", "event", "logger", "suppressed", "traceback")

Clock = Callable[[], int]


class EventLog:
    """The log of one module. Fields are keyword arguments; nothing here raises."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, /, **fields: object) -> None:
        """For developers of cenote."""
        self.event(logging.DEBUG, event, None, fields)

    def info(self, event: str, /, **fields: object) -> None:
        """For operators: what was decided."""
        self.event(logging.INFO, event, None, fields)

    def warning(self, event: str, /, exc: BaseException | None = None, **fields: object) -> None:
        """For operators: it goes on, but somebody should look."""
        self.event(logging.WARNING, event, exc, fields)

    def error(self, event: str, /, exc: BaseException | None = None, **fields: object) -> None:
        """For operators: something was not done. *exc* adds `error` and the traceback."""
        self.event(logging.ERROR, event, exc, fields)

    def event(
        self, level: int, event: str, exc: BaseException | None, fields: Mapping[str, object]
    ) -> None:
        """Log *event* at *level*."""
        if not self._logger.isEnabledFor(level):
            return
        known = dict(fields)
        if exc is not None:
            known.setdefault("error", f"{type(exc).__name__}: {exc}")
        trace = (type(exc), exc, exc.__traceback__) if exc is not None else None
        # "%" is safe: without args logging does not format the message.
        self._logger.log(level, event, exc_info=trace, extra={"event_fields": known})


def get_log(name: str) -> EventLog:
    """Return the log of the module *name* (its __name__)."""
    return EventLog(logging.getLogger(name))


# -- one line per kind and minute ---------------------------------------------------------------


@dataclass
class _Kind:
    until_ns: int
    suppressed: int = 0
    last: logging.LogRecord | None = None


class RateLimiter:
    """
    Answers: may this record be written now? Pure: time is an argument, in ns on any clock.

    At most KINDS_MAX kinds are remembered; the oldest is forgotten first, with its count written.
    """

    def __init__(self, window_ns: int = WINDOW_NS, kinds_max: int = KINDS_MAX) -> None:
        self._window_ns = window_ns
        self._kinds_max = kinds_max
        self._kinds: dict[tuple[object, ...], _Kind] = {}  # in the order of until_ns

    def admit(self, record: logging.LogRecord, now_ns: int) -> list[logging.LogRecord]:
        """Return what to write: counts that are due, then *record* itself unless it is too soon."""
        kind = _kind_of(record)
        known = self._kinds.get(kind)
        if known is not None and now_ns < known.until_ns:
            known.suppressed += 1
            known.last = record
            return self.due(now_ns)
        self._kinds.pop(kind, None)
        due = self.due(now_ns)
        if len(self._kinds) >= self._kinds_max:
            due += self._forget(next(iter(self._kinds)))
        self._kinds[kind] = _Kind(now_ns + self._window_ns)
        if known is not None and known.suppressed:
            record.suppressed = known.suppressed
        return [*due, record]

    def due(self, now_ns: int) -> list[logging.LogRecord]:
        """Return the last record of each kind whose minute is over and had some suppressed."""
        records = []
        while self._kinds:
            kind, oldest = next(iter(self._kinds.items()))
            if now_ns < oldest.until_ns:
                break
            records += self._forget(kind)
            if oldest.suppressed:  # that line counts as this minute's
                self._kinds[kind] = _Kind(now_ns + self._window_ns)
        return records

    def drain(self) -> list[logging.LogRecord]:
        """Return the last record of each kind that had some suppressed, and forget all."""
        records = []
        for kind in list(self._kinds):
            records += self._forget(kind)
        return records

    def _forget(self, kind: tuple[object, ...]) -> list[logging.LogRecord]:
        known = self._kinds.pop(kind)
        if known.last is None:
            return []
        known.last.suppressed = known.suppressed - 1  # it is written itself
        return [known.last]


def _kind_of(record: logging.LogRecord) -> tuple[object, ...]:
    fields = getattr(record, "event_fields", {})
    parts = [_plain(fields[name]) for name in _KIND_FIELDS if name in fields]
    return (record.name, record.levelno, str(record.msg), *parts)


# -- formats ------------------------------------------------------------------------------------


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, logger, the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line: dict[str, object] = {
            "time": _utc(record.created),
            "level": record.levelname,
            "event": _event_name(record),
            "logger": record.name,
        }
        line.update(_fields(record))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-4 * FIELD_MAX_CHARS :]
        return json.dumps(line, ensure_ascii=False, allow_nan=False)


class TextFormatter(logging.Formatter):
    """For people: "10:15:02 WARNING session_closed pid=4711 leases_dropped=12"."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback follows on lines of its own."""
        clock = dt.datetime.fromtimestamp(record.created, dt.UTC).astimezone().strftime("%H:%M:%S")
        parts = [clock, f"{record.levelname:<7}", _one_word(_event_name(record), spaces=True)]
        parts += [f"{name}={_one_word(value)}" for name, value in _fields(record).items()]
        text = " ".join(parts)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _event_name(record: logging.LogRecord) -> str:
    """Return the event; for records of other libraries their message, formatted."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  # a foreign message must not cost the line
        return f"{record.msg!r} % {record.args!r}"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = dict(list(getattr(record, "event_fields", {}).items())[:FIELDS_MAX])
    plain = {_free_name(name): _plain(value) for name, value in fields.items()}
    suppressed = getattr(record, "suppressed", 0)
    return {**plain, "suppressed": suppressed} if suppressed else plain


def _free_name(name: str) -> str:
    return f"{name}_" if name in _OWN_KEYS else name


def _plain(value: object) -> object:
    """Return *value* as JSON has it: bool, int, finite float, None, or bounded text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return value[: FIELD_MAX_CHARS // 2].hex()
    try:
        text = str(value)
    except Exception as error:  # noqa: BLE001  # a broken __str__ must not cost the line
        text = f"<{type(value).__name__}: {type(error).__name__} in __str__>"
    text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates of file names
    return text if len(text) <= FIELD_MAX_CHARS else text[: FIELD_MAX_CHARS - 1] + "…"


def _one_word(value: object, *, spaces: bool = False) -> str:
    """Return *value* so that no content can look like another field or line."""
    text = "true" if value is True else "false" if value is False else str(value)
    harmless = text.isprintable() and not ('"' in text or "=" in text or not text)
    if harmless and (spaces or " " not in text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _utc(seconds: float) -> str:
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# -- set-up -------------------------------------------------------------------------------------


class EventHandler(logging.StreamHandler[TextIO]):
    """Writes to a stream what the limiter admits."""

    def __init__(self, stream: TextIO, clock: Clock, limiter: RateLimiter) -> None:
        super().__init__(stream)
        self._clock = clock
        self._limiter = limiter

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record* and what is due; called with the handler's lock held."""
        for admitted in self._limiter.admit(record, self._clock()):
            super().emit(admitted)

    def write_due(self, *, everything: bool = False) -> None:
        """Write the counts of suppressed records whose minute is over, or all of them."""
        self.acquire()
        try:
            limiter = self._limiter
            for record in limiter.drain() if everything else limiter.due(self._clock()):
                super().emit(record)
            self.flush()
        finally:
            self.release()


def configure(
    level: str = "INFO",
    log_format: str = "auto",
    *,
    stream: TextIO | None = None,
    clock: Clock = time.monotonic_ns,
    window_ns: int = WINDOW_NS,
) -> EventHandler:
    """
    Send all logs of this process to *stream* (stderr), and return the handler.

    May be called again, as a reload does: the old handler's counts are written first. log_format
    is "auto", "text" or "json"; level a name from DEBUG to ERROR.
    """
    target = sys.stderr if stream is None else stream
    handler = EventHandler(target, clock, RateLimiter(window_ns))
    text = log_format == "text" or (log_format == "auto" and target.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, EventHandler)]:
        old.write_due(everything=True)
        root.removeHandler(old)
    root.addHandler(handler)
    # Other libraries have nothing to tell the operator below WARNING.
    root.setLevel(max(logging.getLevelName(level), logging.WARNING))
    logging.getLogger(ROOT).setLevel(level)
    logging.captureWarnings(True)
    return handler


def flush(*, everything: bool = False) -> None:
    """
    Write the counts of suppressed records whose minute is over; with *everything* all counts.

    The daemon calls it from its watchdog, and with *everything* as its last act.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, EventHandler):
            handler.write_due(everything=everything)


def log_uncaught() -> None:
    """Log what nobody caught, in any thread or destructor, instead of printing it."""
    log = get_log(f"{ROOT}.uncaught")

    def main(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return
        log.error("uncaught_exception", exc=error)

    def thread(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "?"
        log.error("uncaught_exception", exc=args.exc_value or args.exc_type(), thread=name)

    def unraisable(args: Any) -> None:  # sys.UnraisableHookArgs exists for type checkers only
        log.error("unraisable_exception", exc=args.exc_value, where=args.err_msg or "destructor")

    sys.excepthook = main
    threading.excepthook = thread
    sys.unraisablehook = unraisable


def log_loop_exception(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what an event loop caught; for loop.set_exception_handler()."""
    log = get_log(f"{ROOT}.uncaught")
    log.error("loop_exception", exc=context.get("exception"), what=context.get("message", ""))
