# SPDX-License-Identifier: Apache-2.0
"""
What a configuration value may be: one Kind per sort of value, with its parser and its description.

A parser gets the value from TOML, or from a flag or the environment after Kind.from_text, and
returns it in the unit of the dataclass field. It raises ValueError with what is wrong and the
remedy; the caller adds file, line and key.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from cenote.shm.paths import check_pool_name
from cenote.shm.units import SIZE_ALLOWED, format_size, parse_size

from .config_host import Host

PATH_MAX_CHARS: Final = 4096
PRINCIPALS_MAX: Final = 256


@dataclass(frozen=True)
class Principal:
    """A user or a group of this host: kind is "user" or "group", number its uid or gid."""

    kind: str
    number: int
    written: str

    def matches(self, uid: int, gids: frozenset[int]) -> bool:
        """Return whether a process of *uid*, a member of *gids*, is meant."""
        return self.number == uid if self.kind == "user" else self.number in gids

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class Kind:
    """A sort of value: its description for people, its parser, and how text becomes its type."""

    allowed: str
    parse: Callable[[object, Host], object]
    from_text: Callable[[str], object] = str
    show: Callable[[object], str] = str


def _number(text: str) -> object:
    """Return the int or float in *text*, or *text* itself for the parser to refuse."""
    for type_ in (int, float):
        try:
            return type_(text)
        except ValueError:
            continue
    return text


def _truth(text: str) -> object:
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    return words.get(text.strip().lower(), text)


def _show_flag(value: object) -> str:
    return "true" if value else "false"


def size(low: int, high: int, *, zero: str = "", granule: int = 1) -> Kind:
    """A size in bytes between *low* and *high*; 0 as well when *zero* says what it means."""
    note = f"; 0 = {zero}" if zero else ""
    rounded = f"; rounded down to whole {format_size(granule)}" if granule > 1 else ""

    def parse(value: object, _host: Host) -> int:
        bytes_ = parse_size(value)
        if low <= bytes_ <= high or (zero and bytes_ == 0):
            return bytes_ - bytes_ % granule
        raise ValueError(
            f"{value!r} is out of range: choose {format_size(low)} to {format_size(high)}{note}"
        )

    def show(value: object) -> str:
        assert isinstance(value, int)
        return format_size(value) if value else "0"

    allowed = f"{SIZE_ALLOWED}; {format_size(low)} to {format_size(high)}{note}{rounded}"
    return Kind(allowed, parse, show=show)


def count(low: int, high: int, *, zero: str = "", power_of_two: bool = False) -> Kind:
    """A whole number between *low* and *high*; 0 as well when *zero* says what it means."""
    shape = "a power of two" if power_of_two else "a whole number"
    allowed = f"{shape}, {low} to {high}" + (f"; 0 = {zero}" if zero else "")

    def parse(value: object, _host: Host) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{value!r} is no whole number: write {allowed}")
        inside = low <= value <= high and not (power_of_two and value & (value - 1))
        if inside or (zero and value == 0):
            return value
        raise ValueError(f"{value!r} is not allowed: write {allowed}")

    return Kind(allowed, parse, _number)


def share() -> Kind:
    """A share above 0 and up to 1."""
    allowed = "a share, above 0 and at most 1, for example 0.95"

    def parse(value: object, _host: Host) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            return float(value)
        raise ValueError(f"{value!r} is not allowed: write {allowed}")

    return Kind(allowed, parse, _number)


def choice(*names: str, instead: dict[str, str] | None = None, fold: bool = False) -> Kind:
    """One of *names*; *instead* has a remedy for words that people will try; *fold*: any case."""
    allowed = "one of " + ", ".join(f'"{name}"' for name in names)
    folded = {name.casefold(): name for name in names}

    def parse(value: object, _host: Host) -> str:
        text = value.strip() if isinstance(value, str) else ""
        if text in names:
            return text
        if fold and text.casefold() in folded:
            return folded[text.casefold()]
        word = text.partition(":")[0]
        remedy = (instead or {}).get(word) or f"choose {allowed}"
        raise ValueError(f"{value!r} is not allowed: {remedy}")

    return Kind(allowed, parse)


def flag() -> Kind:
    """True or false."""

    def parse(value: object, _host: Host) -> bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{value!r} is not allowed: write true or false")

    return Kind("true or false", parse, _truth, _show_flag)


def path() -> Kind:
    """An absolute path. In a flag a relative one starts at the working folder."""

    def parse(value: object, _host: Host) -> str:
        if not isinstance(value, str) or not value or len(value) > PATH_MAX_CHARS or "\0" in value:
            raise ValueError(f"{value!r} is no path: write an absolute path, such as /var/lib/x")
        if value.startswith("/"):
            return os.path.normpath("/" + value.lstrip("/"))
        raise ValueError(f"{value!r} is a relative path: write an absolute one, beginning with /")

    def from_text(text: str) -> object:
        return os.path.abspath(text) if text else text

    return Kind("an absolute path", parse, from_text)


def pool_name() -> Kind:
    """The name of a pool."""

    def parse(value: object, _host: Host) -> str:
        if isinstance(value, str):
            return check_pool_name(value)
        raise ValueError(f'{value!r} is no pool name: write a string such as "default"')

    return Kind("1 to 32 of a-z, 0-9 and '-'", parse)


def principals(*, required: bool = False) -> Kind:
    """Users and groups of this host."""
    allowed = (
        'a list of user names or uids, and "@group" names or "@gid", '
        'for example ["inference", 1001, "@kv"]'
    )

    def parse(value: object, host: Host) -> tuple[Principal, ...]:
        if not isinstance(value, list) or len(value) > PRINCIPALS_MAX:
            raise ValueError(f"{value!r} is not allowed: write {allowed}")
        if required and not value:
            raise ValueError(f"the list is empty: write {allowed}")
        return tuple(_principal(entry, host) for entry in value)

    def show(value: object) -> str:
        assert isinstance(value, tuple)
        return "[" + ", ".join(str(entry) for entry in value) + "]"

    return Kind(allowed, parse, lambda text: text.split(","), show)


def _principal(entry: object, host: Host) -> Principal:
    if isinstance(entry, int) and not isinstance(entry, bool):
        return _numbered("user", entry, str(entry))
    if not isinstance(entry, str) or not entry.lstrip("@"):
        raise ValueError(f'{entry!r} is no user or group: write a user name, a uid or "@group"')
    kind, name = ("group", entry[1:]) if entry.startswith("@") else ("user", entry)
    if name.isascii() and name.isdigit():
        return _numbered(kind, int(name), entry)
    number = host.gid_of(name) if kind == "group" else host.uid_of(name)
    if number is not None:
        return Principal(kind, number, entry)
    remedy = "create it first, correct the spelling, or use a number"
    raise ValueError(f"{entry!r} names a {kind} that this host does not know: {remedy}")


def _numbered(kind: str, number: int, written: str) -> Principal:
    if 0 <= number < 2**32 - 1:  # -1 means "nobody in particular" to the kernel
        return Principal(kind, number, written)
    raise ValueError(f"{written!r} is no {kind} id: ids lie between 0 and {2**32 - 2}")


def unsupported(what: str, remedy: str) -> Kind:
    """A key that exists in a later release: whatever its value, it is refused with *remedy*."""

    def parse(_value: object, _host: Host) -> object:
        raise ValueError(f"{what} comes in a later release: {remedy}")

    return replace(Kind("not yet", parse), show=lambda _value: "-")
