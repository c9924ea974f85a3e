# SPDX-License-Identifier: Apache-2.0
"""
Show `cenote status` again and again, with what happened a second; ends with Ctrl-C.

With --json one object a line is written for each look.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any, Final

from cenote.client.pool import Pool

from . import common, status
from .common import number, size

INTERVAL_S: Final = 1.0
RATES: Final = ("hits", "misses", "hit_bytes", "commits", "evictions", "deletions", "grants")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--interval",
        type=common.seconds,
        default=INTERVAL_S,
        metavar="DURATION",
        help=f"how long between two looks, default {INTERVAL_S:g}s",
    )
    parser.add_argument(
        "--count", type=common.natural, default=0, metavar="N", help="end after N looks"
    )


def run(args: argparse.Namespace) -> int:
    """Do it and return the exit status."""
    with common.open_pool(args) as pool, contextlib.suppress(KeyboardInterrupt):
        _watch(pool, args)
    return common.EXIT_DONE


def _watch(pool: Pool, args: argparse.Namespace) -> None:
    from rich.live import Live

    before: dict[str, Any] = {}
    with Live(console=common.console(), auto_refresh=False, transient=False) as live:
        for look in range(args.count or sys.maxsize):
            if look:
                time.sleep(args.interval)
            facts = status.gather(pool, args.timeout)
            facts["time_ns"] = time.time_ns()
            facts["rates"] = rates(before, facts)
            before = facts
            if args.json:
                print(json.dumps(facts), flush=True)
            else:
                live.update(_show(facts), refresh=True)


def rates(before: dict[str, Any], now: dict[str, Any]) -> dict[str, float]:
    """Return what happened a second between two looks; nothing at the first."""
    if not before:
        return {}
    passed_s = (now["time_ns"] - before["time_ns"]) / 1e9
    if passed_s <= 0:
        return {}
    return {
        name: round((now["counters"].get(name, 0) - before["counters"].get(name, 0)) / passed_s, 3)
        for name in RATES
    }


def _show(facts: dict[str, Any]) -> Any:
    from rich.console import Group

    a_second = facts["rates"]
    text = "a second   -"
    if a_second:
        text = (
            f"a second   {number(a_second['hits'])} hits ({size(a_second['hit_bytes'])}), "
            f"{number(a_second['misses'])} misses, {number(a_second['commits'])} stored, "
            f"{number(a_second['evictions'])} evicted"
        )
    return Group(status.show(facts), "", text)
