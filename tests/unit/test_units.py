# SPDX-License-Identifier: Apache-2.0
"""Sizes and durations: cenote.shm.units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.shm.units import (
    SIZE_MAX_BYTES,
    UnitError,
    format_duration,
    format_size,
    format_size_rounded,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("written", "expected_bytes"),
    [
        ("4GiB", 4 * 2**30),
        ("4GB", 4 * 10**9),
        ("4 GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("0.5kB", 500),
        ("7B", 7),
        ("4096", 4096),
        (4096, 4096),
        (0, 0),
        (SIZE_MAX_BYTES, SIZE_MAX_BYTES),
    ],
)
def test_size_is_read(written: object, expected_bytes: int) -> None:
    """
    Binary and decimal units, fractions that are whole bytes, and bare bytes are read.
    """
    assert parse_size(written) == expected_bytes


@pytest.mark.parametrize(
    "written",
    [
        *("", "GiB", "-1", "4Gibs", "4G", "1.5", "0.3B", "1e9", "inf", "٤GiB", "9" * 70, "4 Gi B"),
        *(True, None, 1.0, -1, SIZE_MAX_BYTES + 1, "8388608TiB", [], b"4GiB"),
    ],
)
def test_what_is_no_size_is_refused_by_name(written: object) -> None:
    """
    Anything else raises UnitError, and the text names the value.
    """
    with pytest.raises(UnitError) as caught:
        parse_size(written)

    assert repr(written)[:40] in str(caught.value)


@pytest.mark.parametrize(("unit", "remedies"), [("G", "GiB GB"), ("k", "KiB kB"), ("Mi", "MiB MB")])
def test_ambiguous_unit_offers_both_readings(unit: str, remedies: str) -> None:
    """
    "4G" is refused with both ways to write it.
    """
    with pytest.raises(UnitError) as caught:
        parse_size(f"4{unit}")

    assert all(f'"4{remedy}"' in str(caught.value) for remedy in remedies.split())


@given(st.integers(0, SIZE_MAX_BYTES))
def test_printed_size_reads_back(bytes_: int) -> None:
    """
    parse_size() is the inverse of format_size().
    """
    assert parse_size(format_size(bytes_)) == bytes_


def test_rounded_sizes_for_people() -> None:
    """
    format_size_rounded() gives at most one decimal and no ".0".
    """
    assert [format_size_rounded(n) for n in (0, 1023, 1536, 2**30, 1.44 * 2**30)] == [
        "0B",
        "1023B",
        "1.5KiB",
        "1GiB",
        "1.4GiB",
    ]


@pytest.mark.parametrize(
    ("written", "expected_s"),
    [
        *(("30s", 30), ("5m", 300), ("250ms", 0.25), ("10us", 1e-5), ("2h", 7200), ("1d", 86_400)),
        *(("1.5s", 1.5), ("7", 7), (7, 7), (0.5, 0.5)),
    ],
)
def test_duration_is_read(written: object, expected_s: float) -> None:
    """
    Units from us to d, and bare seconds, are read.
    """
    assert parse_duration(written) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    "written", ["", "s", "5M", "5 min", "-1s", "1h30m", True, None, -1, float("nan"), float("inf")]
)
def test_what_is_no_duration_is_refused_by_name(written: object) -> None:
    """
    Anything else raises UnitError, and the text names the value.
    """
    with pytest.raises(UnitError) as caught:
        parse_duration(written)

    assert repr(written) in str(caught.value)


def test_durations_for_people() -> None:
    """
    format_duration() gives the two largest units.
    """
    shown = [format_duration(s) for s in (0.25, 1, 1.5, 300, 3661, 90_000)]

    assert shown == ["250ms", "1s", "1.5s", "5m", "1h1m", "1d1h"]
