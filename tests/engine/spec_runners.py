# SPDX-License-Identifier: Apache-2.0
"""
In which order vLLM's two model runners call a connector's worker.

Where there is Triton, so on GPUs, the second is the default; on a CPU it does not start. What runs
here are the classes by which both call connectors. test_connector.py runs this file under the vLLM
environment's Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import vllm
from tests.engine.connector_bed import CHUNK_TOKENS, Engine, answer_to

Whole = Callable[..., Engine]
NEWER: Final = not vllm.__version__.startswith("0.32")
PROMPT: Final = [3 + i % 700 for i in range(2 * CHUNK_TOKENS + 40)]

CALLS: Final = (
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "finish_forward",
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
    "clear_connector_metadata",
)
REPORT: Final = [
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
]
FIRST: Final = ["bind_connector_metadata", "compute", "start_load_kv"]
SECOND: Final = [
    "handle_preemptions",
    "bind_connector_metadata",
    "compute",
    "finish_forward",
    "start_load_kv",
]
AT_ONCE: Final = ["wait_for_save", *REPORT, "clear_connector_metadata"]
LATER: Final = [*REPORT, "wait_for_save", "clear_connector_metadata"]

orders = pytest.mark.parametrize(
    ("second", "drafting", "order"),
    [
        (False, False, FIRST + AT_ONCE),
        (False, True, FIRST + LATER),
        (True, False, SECOND + AT_ONCE),
        (True, True, SECOND + (LATER if NEWER else AT_ONCE)),
    ],
    ids=["first", "first, draft head", "second", "second, draft head"],
)


def recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the calls of the worker written down, and when the model computes."""
    calls: list[str] = []

    def record(where: Any, name: str) -> None:
        call = getattr(where, name)

        def recording(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return call(*args, **kwargs)

        monkeypatch.setattr(where, name, recording)

    for name in CALLS:
        record(engine.worker, name)
    record(engine.runner, "compute")
    return calls


@orders
def test_the_order_of_a_step(
    whole: Whole,
    monkeypatch: pytest.MonkeyPatch,
    second: bool,
    drafting: bool,
    order: list[str],
) -> None:
    """
    A step that computes: should a release change it, what hangs on it is to be looked at again.
    """
    engine = whole(second=second, drafting=drafting)
    calls = recorded(engine, monkeypatch)

    engine.add("a", PROMPT)
    engine.until(lambda: "clear_connector_metadata" in calls)

    assert calls == order
    engine.run()


@orders
def test_in_each_order_chunks_are_stored_and_loaded(
    whole: Whole, second: bool, drafting: bool, order: list[str]
) -> None:
    """
    A save that begins when its step was reported is reported with a later one; nothing is held.
    """
    del order
    one, other = (whole(second=second, drafting=drafting) for _ in range(2))
    assert one.ask("a", PROMPT, 40) == answer_to(PROMPT, 40)
    one.wait_for(PROMPT)

    assert other.ask("a", PROMPT, 40) == answer_to(PROMPT, 40)

    assert other.counts["loads"] == 1
    for engine in (one, other):
        engine.check_nothing_is_left()
