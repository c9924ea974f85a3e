# SPDX-License-Identifier: Apache-2.0
"""
From build/bench/ttft.json to charts and to the table of docs/performance.md.

    python bench/report.py [--in FILE] [--images docs/images]      prints the table

Needs matplotlib: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench._ttft_rows import Sample, Samples  # noqa: E402  # needs the path above

SOURCE: Final = ROOT / "build" / "bench" / "ttft.json"
IMAGES: Final = ROOT / "docs" / "images"
INCHES: Final = (7.2, 4.2)
DPI: Final = 144
TIMES: Final = "\N{MULTIPLICATION SIGN}"

# variant and state, what it is called, colour (told apart by every eye), marker
Line = tuple[str, str, str, str, str]
BY_LENGTH: Final[tuple[Line, ...]] = (
    ("off", "cold", "computed", "#555555", "o"),
    ("off", "own", "engine's own prefix cache", "#0072B2", "s"),
    ("example", "stored", "ExampleConnector", "#E69F00", "^"),
    ("cenote", "stored", "cenote", "#009E73", "D"),
)
BY_SHARE: Final[tuple[Line, ...]] = (
    ("off", "ratio", "engine's own prefix cache", "#0072B2", "s"),
    ("cenote", "ratio", "cenote", "#009E73", "D"),
)


def length_series(samples: Samples, line: Line) -> list[tuple[float, float]]:
    """(tokens, median TTFT) of a variant and state, by length."""
    variant, state, *_ = line
    lengths = sorted({s.tokens for s in samples if (s.variant, s.state) == (variant, state)})
    return [(tokens, samples.of(variant, state, tokens).ttft()) for tokens in lengths]


def share_series(samples: Samples, line: Line) -> list[tuple[float, float]]:
    """(per cent that was there, TTFT) of the longest prompt."""
    variant, state, *_ = line
    shares: dict[float, Samples] = {}
    for sample in samples:
        if (sample.variant, sample.state) == (variant, state) and sample.shared is not None:
            shares.setdefault(100 * sample.shared / sample.tokens, Samples()).append(sample)
    return [(share, found.ttft()) for share, found in sorted(shares.items())]


# ---- charts -------------------------------------------------------------------------------------


def draw(samples: Samples, images: Path) -> list[Path]:
    """Write both charts; return where they are."""
    import matplotlib as mpl

    mpl.use("agg")
    images.mkdir(parents=True, exist_ok=True)
    lengths = [(line, length_series(samples, line)) for line in BY_LENGTH]
    shares = [(line, share_series(samples, line)) for line in BY_SHARE]
    ticks = sorted({x for _, series in lengths for x, _ in series})
    longest = max(ticks, default=0.0)
    return [
        _chart(
            images / "vllm-ttft-length.png",
            lengths,
            "Time to first token of a prompt that is there as a whole",
            "tokens of the prompt",
            ticks,
            logarithmic=True,
        ),
        _chart(
            images / "vllm-ttft-share.png",
            shares,
            f"Time to first token of {longest:,.0f} tokens, by what is there already",
            "per cent of the prompt that is there",
            sorted({x for _, series in shares for x, _ in series}),
            logarithmic=False,
        ),
    ]


def _chart(
    path: Path,
    lines: Sequence[tuple[Line, list[tuple[float, float]]]],
    title: str,
    x_label: str,
    ticks: Sequence[float],
    *,
    logarithmic: bool,
) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=INCHES, dpi=DPI, layout="constrained")
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    for (_, _, name, colour, marker), series in lines:
        if series:
            axes.plot(*zip(*series, strict=True), color=colour, marker=marker, label=name)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(title=title, xlabel=x_label, ylabel="seconds")
    if not logarithmic:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    # without the version of matplotlib in it, the same figures give the same file
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path


# ---- table --------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, like the other tables of docs/performance.md."""
    lines = [
        "| measure | value | reference, same run | ratio | bar | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        reference = ""
        if row["reference"] is not None:
            reference = f"{_number(row['reference'])} {row['unit']}, {row['reference_is']}"
        ratio = "" if row["ratio"] is None else _number(row["ratio"])
        bar = (
            ""
            if row["bar"] is None
            else f"{'≤' if row['at_most'] else '≥'} {row['bar']:.3g} {TIMES}"
        )
        met = {None: "", True: "met", False: "**missed**"}[row["met"]]
        value = f"{_number(row['value'])} {row['unit']}"
        lines.append(f"| {row['measure']} | {value} | {reference} | {ratio} | {bar} | {met} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: there is nothing to draw, or nothing to draw with."""
    parser = argparse.ArgumentParser(description="Charts and a table of bench/ttft.py's results.")
    parser.add_argument("--in", dest="source", type=Path, default=SOURCE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args(argv)
    try:
        kept = json.loads(options.source.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"no results ({error}): run `make bench-vllm` first")
    samples = Samples(Sample(**sample) for sample in kept["samples"])
    try:
        drawn = draw(samples, options.images)
    except ImportError as error:
        parser.error(f"no charts ({error}): pip install -e '.[bench]'")
    print(table(kept["rows"]))
    for path in drawn:
        print(f"written: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
