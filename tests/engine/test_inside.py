# SPDX-License-Identifier: Apache-2.0
"""An engine that runs in its caller's process, where nobody steps behind the last answer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engines import cenote_connector, engine_arguments
from tests.engine.processes import HERE, NEXT, PYTHON, engine_environment
from tests.engine.prompts import prompt_of

Models = Callable[..., Path]
Daemons = Callable[..., Any]
needs_next = pytest.mark.skipif(not NEXT.exists(), reason=f"no newer vLLM at {NEXT}")


@pytest.mark.parametrize("newer", [False, pytest.param(True, marks=needs_next)])
def test_saves_are_over_with_the_last_answer(model: Models, cenoted: Daemons, newer: bool) -> None:
    """
    The prefix cache can be reset at once, and the next request finds what was stored.
    """
    daemon = cenoted(size="64MiB")
    arguments = engine_arguments(model(), cenote_connector(daemon.socket))
    del arguments["worker_extension_cls"]
    prompt = prompt_of(1100)
    prompts = [(prompt, 4), (prompt, 4), (prompt_of(700, seed=1), 6)]
    asked = {"engine": arguments, "socket": str(daemon.socket), "prompts": prompts}
    done = subprocess.run(
        [str(PYTHON), str(HERE / "inside_engine.py"), json.dumps(asked)],
        env={**engine_environment(newer=newer), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, True], [1024, True], [0, True]]
