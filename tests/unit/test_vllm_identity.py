# SPDX-License-Identifier: Apache-2.0
"""What keeps engines apart, and what an engine is refused for, as far as it needs no vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cenote.client.adapters.vllm.identity import Refused, check_engine, weights_digest


def safetensors(path: Path, tensors: dict[str, bytes]) -> Path:
    """Write a file of weights."""
    header, data = {}, b""
    for name, raw in tensors.items():
        header[name] = {
            "dtype": "U8",
            "shape": [len(raw)],
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_change_in_the_middle_of_a_file_is_seen(tmp_path: Path) -> None:
    """
    A merged adapter changes some tensors and none at the ends of the file.
    """
    plain = {f"t{i}": bytes(1 << 16) for i in range(64)}
    file = safetensors(tmp_path / "model.safetensors", plain)
    before = weights_digest(tmp_path, "auto")
    safetensors(file, {**plain, "t31": b"\1" * (1 << 16)})

    assert weights_digest(tmp_path, "auto") != before
    safetensors(file, plain)
    assert weights_digest(tmp_path, "auto") == before
    assert weights_digest(file, "auto") == before  # a model may be a file


def test_weights_of_an_unknown_format_are_shared_with_nobody(tmp_path: Path) -> None:
    """
    Two looks at a folder without a file of weights that is known differ; dummy ones are alike.
    """
    (tmp_path / "weights.xyz").write_bytes(b"1")

    assert weights_digest(tmp_path, "auto") != weights_digest(tmp_path, "auto")
    assert weights_digest(tmp_path, "dummy") == "dummy"
    assert weights_digest(tmp_path / "not-here", "auto") == ""


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff" * 8, (4).to_bytes(8, "little") + b"nope", b"\0" * 64]
)
def test_a_broken_header_is_a_file_like_others(tmp_path: Path, garbage: bytes) -> None:
    """
    What is no safetensors file under that name is sampled all the same.
    """
    (tmp_path / "model.safetensors").write_bytes(garbage)

    assert len(weights_digest(tmp_path, "auto")) == 32


def engine(**changes: Any) -> Any:
    """vLLM's configuration, the fields that are looked at."""
    parallel = {
        "prefill_context_parallel_size": 1,
        "distributed_executor_backend": "mp",
        "world_size": 1,
    }
    made = {"runner_type": "generate", "batches": 1, **parallel, **changes}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{name: made[name] for name in parallel}),
        model_config=SimpleNamespace(runner_type=made["runner_type"]),
        max_concurrent_batches=made["batches"],
    )


@pytest.mark.parametrize(
    ("changes", "in_step", "why"),
    [
        ({"prefill_context_parallel_size": 2}, False, "prefill context parallelism"),
        (
            {"distributed_executor_backend": "external_launcher", "world_size": 2},
            False,
            "external_launcher",
        ),
        ({"runner_type": "pooling"}, False, "pooling model"),
        ({"batches": 2}, True, "before it knows how the last one went"),
    ],
)
def test_what_would_give_wrong_tokens_is_refused(
    changes: dict[str, Any], in_step: bool, why: str
) -> None:
    """
    With the reason, and what to do.
    """
    with pytest.raises(Refused, match=why):
        check_engine(engine(**changes), in_step=in_step)


def test_others_are_not_refused() -> None:
    """
    Asynchronous scheduling is refused layer by layer only.
    """
    check_engine(engine(batches=2), in_step=False)
    check_engine(engine(), in_step=True)
