# SPDX-License-Identifier: Apache-2.0
"""Request traces: what the reader refuses, and what the generator promises."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("bench/ is only in the checkout", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench.trace import (  # noqa: E402  # bench/ is no installed package
    BLOCK_TOKENS,
    Request,
    TraceError,
    generate,
    main,
    read_trace,
    statistics,
    write_trace,
)

GOOD: dict[str, Any] = {
    "timestamp": 5,
    "input_length": 600,
    "output_length": 7,
    "hash_ids": [0, 1],
}


@pytest.fixture(scope="module")
def generated() -> list[Request]:
    """One whole generated trace."""
    return generate(7)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reader_gives_what_the_writer_wrote(tmp_path: Path) -> None:
    """A trace survives being written and read."""
    requests = generate(3, duration_s=60, requests=100, warmup_s=60)

    write_trace(tmp_path / "trace.jsonl", requests)

    assert read_trace(tmp_path / "trace.jsonl") == requests


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    """A trailing or separating empty line is no error."""
    path = write_lines(tmp_path / "t", "", json.dumps(GOOD), "  ", "")

    assert read_trace(path) == [Request(5, 600, 7, (0, 1))]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"timestamp": 4}, "before 5"),
        ({"timestamp": -1}, "integers from 0"),
        ({"timestamp": True}, "integers from 0"),
        ({"input_length": 1.5}, "integers from 0"),
        ({"input_length": 512}, "2 hash_ids for 512 tokens, expected 1"),
        ({"input_length": 1025}, "expected 3"),
        ({"hash_ids": [0, 0]}, "twice"),
        ({"hash_ids": [0, "1"]}, "list of integers"),
        ({"hash_ids": [0, 1 << 63]}, "list of integers"),
        ({"hash_ids": None}, "list of integers"),
        ({"hash_ids": [2, 1]}, "block 1 follows 2 here and 0 above"),
        ({"output_length": None}, "integers from 0"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], wrong: str) -> None:
    """The error names the file, the line and what is wrong with it."""
    path = write_lines(tmp_path / "t", json.dumps(GOOD), json.dumps(GOOD | change))

    with pytest.raises(TraceError, match="line 2: ") as caught:
        read_trace(path)

    assert str(path) in str(caught.value)
    assert wrong in str(caught.value)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "not JSON"),
        ("[1]", "not list"),
        ("{}", "timestamp is missing"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}', "hash_ids is missing"),
        ("\x00\x01", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (" " * (1 << 20) + "{}", "longer than"),
    ],
)
def test_no_request_at_all(tmp_path: Path, line: str, wrong: str) -> None:
    """What is not even a request is refused with its reason."""
    with pytest.raises(TraceError, match=wrong):
        read_trace(write_lines(tmp_path / "t", line))


def test_same_seed_same_trace() -> None:
    """The seed alone decides what is generated."""
    small = {"duration_s": 120, "requests": 300, "warmup_s": 60}

    assert generate(1, **small) == generate(1, **small)
    assert generate(1, **small) != generate(2, **small)


def test_unknown_parameter_is_refused() -> None:
    """A misspelt parameter does not silently do nothing."""
    with pytest.raises(TypeError, match="gap_median"):
        generate(1, gap_median=5)


def test_generated_trace_is_a_valid_one(generated: list[Request], tmp_path: Path) -> None:
    """The generator keeps the rules that the reader checks: order, counts, one prefix a block."""
    write_trace(tmp_path / "t", generated)

    assert len(read_trace(tmp_path / "t")) == len(generated)
    assert all(len(r.hash_ids) == -(-r.input_length // BLOCK_TOKENS) for r in generated)


@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [
        ("requests", 12_031, 250),
        ("blocks", 288_500, 20_000),
        ("distinct blocks, %", 63.4, 3),
        ("begin with the common block, %", 100, 0),
        ("continuations, %", 38.7, 4),
        ("input, tokens, 25 %", 2306, 500),
        ("input, tokens, 50 %", 6909, 600),
        ("input, tokens, 90 %", 27_367, 3500),
        ("output, tokens, 50 %", 350, 40),
        ("continuation gap, s, 25 %", 66, 9),
        ("continuation gap, s, 50 %", 123, 15),
        ("continuation gap, s, 90 %", 483, 90),
        ("block reuse gap, s, 50 %", 135, 20),
    ],
)
def test_statistics_of_the_published_trace(
    generated: list[Request], name: str, published: float, tolerance: float
) -> None:
    """The default parameters give the published trace's figures."""
    assert statistics(generated)[name] == pytest.approx(published, abs=tolerance)


def test_bad_file_ends_the_tool_with_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trace that cannot be used is a usage error with one line on stderr."""
    assert main(["--compare", str(write_lines(tmp_path / "t", "nonsense"))]) == 2
    assert main(["--compare", str(tmp_path / "absent")]) == 2
    assert "line 1: not JSON" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) to build the policies")
def test_policies_on_the_generated_trace(generated: list[Request]) -> None:
    """
    LRU's curve is the published trace's within a few points, the default is nowhere worse than the
    better of LRU and S3-FIFO, and letting chains leave from their tails only costs nothing.
    """
    from bench._policy_lib import PolicySim
    from bench.policy_sim import simulate

    published = {1_000: 4.5, 5_000: 11.2, 10_000: 21.2, 20_000: 28.8, 50_000: 35.5}
    rows = {(r.mode, r.policy, r.capacity): r for r in simulate(PolicySim(generated), published)}

    for capacity, rate in published.items():
        lru = rows["exact", "lru", capacity].whole
        best = max(lru, rows["exact", "s3-fifo", capacity].whole)
        assert lru == pytest.approx(rate, abs=3)
        assert rows["exact", "use-count", capacity].whole >= best - 0.3
        assert rows["batch", "use-count", capacity].whole >= best - 0.5
        exact = rows["exact", "use-count", capacity].whole
        assert rows["leaves", "use-count", capacity].whole >= exact - 0.05
