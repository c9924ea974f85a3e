# SPDX-License-Identifier: Apache-2.0
"""
Sizes and durations as people write them: "4GiB", "4GB", "30s".

Bare numbers are bytes, or seconds. Everything else has a unit, and a unit that could be read two
ways ("4G") is refused rather than guessed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

SIZE_MAX_BYTES: Final = 2**63 - 1
DURATION_MAX_S: Final = 10 * 365 * 86_400
TEXT_MAX_CHARS: Final = 64

_BINARY: Final = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL: Final = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS: Final = {"B": 1, **_BINARY, **_DECIMAL}
_SIZE_BY_FOLDED: Final = {name.casefold(): bytes_ for name, bytes_ in _SIZE_UNITS.items()}
_DURATION_UNITS: Final = {
    "us": Fraction(1, 1_000_000),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86_400),
}
# [0-9], not \d: \d also takes digits of other scripts.
_NUMBER_UNIT: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", re.ASCII)

SIZE_ALLOWED: Final = (
    "a whole number of bytes, or a number with B, KiB, MiB, GiB, TiB (powers of 1024) "
    'or kB, MB, GB, TB (powers of 1000), for example "4GiB"'
)
DURATION_ALLOWED: Final = (
    'a number of seconds, or a number with us, ms, s, m, h or d, for example "30s"'
)


class UnitError(ValueError):
    """A size or a duration that cannot be read; the text names the value and what is allowed."""


def parse_size(value: object) -> int:
    """
    Return the bytes that *value* ("4GiB", "4GB", 4096) stands for.

    Raises:
        UnitError: No size, an ambiguous unit, no whole number of bytes, or above 2**63 - 1.
    """
    if isinstance(value, str):
        bytes_ = _size_from_text(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        bytes_ = value
    else:
        raise UnitError(f"{value!r} is no size: write {SIZE_ALLOWED}")
    if 0 <= bytes_ <= SIZE_MAX_BYTES:
        return bytes_
    raise UnitError(f"{value!r} is out of range: a size lies between 0 and {SIZE_MAX_BYTES} bytes")


def _size_from_text(text: str) -> int:
    number, unit = _split(text, "size", SIZE_ALLOWED)
    if unit and unit.casefold() not in _SIZE_BY_FOLDED:
        raise UnitError(f"{text!r} has the unknown unit {unit!r}{_size_hint(unit, number)}")
    bytes_ = Fraction(number) * _SIZE_BY_FOLDED[(unit or "B").casefold()]
    if bytes_.denominator == 1:
        return bytes_.numerator
    raise UnitError(f"{text!r} is {float(bytes_)} bytes: write a whole number of bytes")


def _size_hint(unit: str, number: str) -> str:
    letter = unit[0].upper()
    if letter in "KMGT" and unit.casefold() in {letter.lower(), f"{letter.lower()}i"}:
        decimal = "kB" if letter == "K" else f"{letter}B"
        return f': write "{number}{letter}iB" (binary) or "{number}{decimal}" (decimal)'
    return f": write {SIZE_ALLOWED}"


def _split(text: str, what: str, allowed: str) -> tuple[str, str]:
    found = _NUMBER_UNIT.fullmatch(text.strip()) if len(text) <= TEXT_MAX_CHARS else None
    if found is None:
        raise UnitError(f"{text[:TEXT_MAX_CHARS]!r} is no {what}: write {allowed}")
    return found[1], found[2]


def format_size(bytes_: int) -> str:
    """Return *bytes_* in the largest binary unit that divides it; parse_size() reads it."""
    for unit, factor in reversed(_BINARY.items()):
        if bytes_ and bytes_ % factor == 0:
            return f"{bytes_ // factor}{unit}"
    return f"{bytes_}B"


def format_size_rounded(bytes_: float) -> str:
    """Return *bytes_* for a person, with at most one decimal: "1.4GiB"."""
    for unit, factor in reversed(_BINARY.items()):
        if abs(bytes_) >= factor:
            return f"{bytes_ / factor:.1f}".removesuffix(".0") + unit
    return f"{bytes_:.0f}B"


def parse_duration(value: object) -> float:
    """
    Return the seconds that *value* ("30s", "5m", 1.5) stands for.

    Raises:
        UnitError: No duration, an unknown unit, negative, or above ten years.
    """
    if isinstance(value, str):
        number, unit = _split(value, "duration", DURATION_ALLOWED)
        if (unit or "s") not in _DURATION_UNITS:
            raise UnitError(f"{value!r} has the unknown unit {unit!r}: write {DURATION_ALLOWED}")
        seconds = float(Fraction(number) * _DURATION_UNITS[unit or "s"])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise UnitError(f"{value!r} is no duration: write {DURATION_ALLOWED}")
    if 0 <= seconds <= DURATION_MAX_S:  # false for NaN, too
        return seconds
    raise UnitError(f"{value!r} is out of range: a duration lies between 0 and {DURATION_MAX_S} s")


def format_duration(seconds: float) -> str:
    """Return *seconds* for a person: "250ms", "1.5s", "5m", "2h10m"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    parts = []
    for unit, factor in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, whole = divmod(whole, factor)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2])
