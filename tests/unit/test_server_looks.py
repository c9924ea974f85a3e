# SPDX-License-Identifier: Apache-2.0
"""When a server looks for sessions whose end nobody tells it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from cenote.daemon.server import FORGET_S, PoolServer


class Look:
    """A timer that a test fires."""

    def __init__(self, delay_s: float, call: Callable[[], None]) -> None:
        self.delay_s = delay_s
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        """Not any more."""
        self.cancelled = True


def test_each_end_is_looked_for_from_the_beginning() -> None:
    """
    A second connection ends when only the last look for the first is left: that one could come
    before its session has ended, and nobody would ever look again.
    """
    looks: list[Look] = []
    count = 0

    def call_later(delay_s: float, call: Callable[[], None]) -> Look:
        looks.append(Look(delay_s, call))
        return looks[-1]

    def forget_dead() -> None:
        nonlocal count
        count += 1

    server = PoolServer.__new__(PoolServer)
    server.__dict__.update(
        _looks=[],
        loop=SimpleNamespace(call_later=call_later),
        service=SimpleNamespace(forget_dead=forget_dead),
    )
    server.look_for_ends()
    first = sorted(looks, key=lambda look: look.delay_s)
    for look in first[:-1]:
        look.call()

    server.look_for_ends()

    assert first[-1].cancelled
    second = looks[len(first) :]
    assert sorted(look.delay_s for look in second) == sorted(FORGET_S)
    for look in sorted(second, key=lambda look: look.delay_s):
        look.call()
    assert count == 2 * len(FORGET_S) - 1
