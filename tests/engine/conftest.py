# SPDX-License-Identifier: Apache-2.0
"""
Real vLLM engines over real daemons.

    engine = engines(model("llama"), connector=cenote_connector(daemon.socket), block_size=32)
    engine = engines(model("gemma3", window=128), dtype="bfloat16", events=True)
    daemon = cenoted(size="256MiB")             the factory of tests/multiprocess

Models are made once a session. Engines of a session come out of one nursery, and end with their
test. Without the environment of `make setup-vllm` every test here is skipped, and fails in
`make test-vllm`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from tests.engine.engines import Connector, Engine  # noqa: E402  # needs the path above
from tests.engine.model import Shape, make_model  # noqa: E402
from tests.engine.nursery import Nursery  # noqa: E402
from tests.engine.processes import PYTHON  # noqa: E402

_spec = importlib.util.spec_from_file_location(
    "cenote_daemons", HERE.parent / "multiprocess" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_daemons = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_daemons)
cenoted = _daemons.cenoted  # the fixture

TEST_LIMIT_S: Final = 900  # an engine is a minute's work on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is here needs an engine, and time."""
    here = [item for item in items if item.path.is_relative_to(HERE)]
    missing = not PYTHON.exists()
    for item in here:
        item.add_marker(pytest.mark.engine)
        item.add_marker(pytest.mark.timeout(TEST_LIMIT_S))
        if missing:
            why = f"no vLLM at {PYTHON}: run `make setup-vllm`, or set CENOTE_VLLM_PYTHON"
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a model, once for each kind, shape, window and seed."""
    made: dict[tuple[object, ...], Path] = {}
    folder = tmp_path_factory.mktemp("models")

    def get(
        kind: str = "llama",
        shape: Shape | None = None,
        *,
        dtype: str = "float32",
        window: int = 256,
        seed: int | None = 0,
    ) -> Path:
        """Return its folder; see model.make_model()."""
        key = (kind, shape, dtype, window, seed)
        if key not in made:
            at = folder / f"{kind}-{len(made)}"
            made[key] = make_model(at, kind, shape, dtype=dtype, window=window, seed=seed)
        return made[key]

    return get


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Where the engines of this session come from."""
    with Nursery(tmp_path_factory.mktemp("engines")) as made:
        yield made


@pytest.fixture
def engines(nursery: Nursery) -> Iterator[Callable[..., Engine]]:
    """Return a function that starts an engine, which ends with the test."""
    started: list[Engine] = []

    def start(model: Path, *, connector: Connector | None = None, **more: Any) -> Engine:
        """Start one; the arguments are those of Engine.start()."""
        engine = nursery.start(model, connector=connector, **more)
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()
