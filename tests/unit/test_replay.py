# SPDX-License-Identifier: Apache-2.0
"""The trace replay: blocks that tell themselves apart, a clock, real daemons and clients."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("bench/ is only in the checkout", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

# bench/ is no package
from bench.replay import Plan, Run, Sizes, main, prepare, replay  # noqa: E402
from bench.replay_client import (  # noqa: E402
    Blocks,
    Chains,
    Replayer,
    SharedWords,
    manifest,
)
from bench.trace import Request, generate, write_trace  # noqa: E402

from cenote.client import testing  # noqa: E402

BLOCK_BYTES = 4096
SMALL: dict[str, Any] = {"duration_s": 240, "requests": 250, "warmup_s": 240, "length_max": 20_000}


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """A short generated trace with conversations that go on."""
    return generate(5, **SMALL)


def made(blocks: Blocks, hash_id: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    out = np.empty(blocks.block_bytes // 8, dtype=np.uint64)
    blocks.fill(hash_id, out)
    return out


def run(requests: list[Request], folder: Path, policy: str, capacity: int, clients: int) -> Run:
    chains = prepare(requests)
    chains.save(folder)
    return replay(chains, folder, Plan(policy, capacity, clients, BLOCK_BYTES))


def test_a_block_is_told_from_everything_else() -> None:
    """One flipped bit, another block's bytes, a shift and a torn half are each seen."""
    blocks = Blocks(BLOCK_BYTES)
    right = made(blocks, 7)
    assert blocks.holds(7, right)

    for word in (0, len(right) // 2, len(right) - 1):
        flipped = right.copy()
        flipped[word] ^= np.uint64(1)
        assert not blocks.holds(7, flipped)
    torn = right.copy()
    torn[len(right) // 2 :] = made(blocks, 8)[len(right) // 2 :]
    assert not blocks.holds(7, torn)
    assert not blocks.holds(7, np.roll(right, 1))
    assert not blocks.holds(8, right)
    assert not blocks.holds(7, right[:-1])


def test_two_blocks_differ_in_every_word() -> None:
    """Neighbouring ids give unrelated bytes, the same id the same ones in every process."""
    blocks, others = Blocks(BLOCK_BYTES), Blocks(BLOCK_BYTES)

    assert not (made(blocks, 1) == made(blocks, 2)).any()
    assert np.array_equal(made(blocks, 3), made(others, 3))


@pytest.mark.parametrize("wrong", [0, 4, 4097, -8])
def test_a_block_of_no_whole_words_is_refused(wrong: int) -> None:
    """The length of a block is checked, and named."""
    with pytest.raises(ValueError, match=str(wrong)):
        Blocks(wrong)


def test_each_request_is_taken_once_and_time_never_goes_back(tmp_path: Path) -> None:
    """Four takers share the counter; every request comes once, and the clock follows it."""
    times_ms = np.arange(400, dtype=np.uint64)
    words = SharedWords(tmp_path)
    taken: list[list[int]] = [[] for _ in range(4)]

    def take(mine: list[int]) -> None:
        own = SharedWords(tmp_path)
        while (number := own.take(times_ms)) is not None:
            mine.append(number)
        own.close()

    words.begin(1_000)
    threads = [threading.Thread(target=take, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(number for mine in taken for number in mine) == list(range(400))
    assert memoryview(words.page).cast("Q")[0] == 1_000 + 399 * 1_000_000
    assert words.take(times_ms) is None
    words.close()


def test_wrong_bytes_are_counted(requests: list[Request]) -> None:
    """A pool that holds other bytes under a key is found out, block by block."""
    chains = prepare(requests[:1])
    first = chains.blocks[0]
    with testing.memory_pool("16MiB") as pool:
        cache = pool.namespace(manifest(BLOCK_BYTES))
        blocks = Blocks(BLOCK_BYTES)
        wrong = made(blocks, int(chains.ids[first]) + 1)
        cache.put_many(chains.keys[first].tobytes(), [wrong])
        cache.flush()

        replayer = Replayer(cache, chains, blocks)
        hits = replayer.request(0)

    assert hits == 1
    assert replayer.tally.wrong_blocks == 1
    assert replayer.tally.verified_bytes == BLOCK_BYTES
    assert replayer.tally.put_blocks == len(chains.blocks) - 1


def test_the_prepared_trace_survives_its_file(requests: list[Request], tmp_path: Path) -> None:
    """Clients replay what the parent read: chains, times from zero, one key a distinct block."""
    chains = prepare(requests)
    chains.save(tmp_path)
    loaded = Chains.load(tmp_path)

    for name in ("first", "blocks", "times_ms", "ids", "keys"):
        assert np.array_equal(getattr(loaded, name), getattr(chains, name))
    assert int(chains.times_ms[0]) == 0
    assert len({row.tobytes() for row in chains.keys}) == len(chains.ids)
    rebuilt = chains.ids[chains.blocks[int(chains.first[3]) : int(chains.first[4])]]
    assert tuple(rebuilt.tolist()) == requests[3].hash_ids


@pytest.mark.parametrize("capacity", [1, 31, 1000, 50_000])
@pytest.mark.parametrize("block_bytes", [8, 65_536, 100_000])
def test_the_mark_is_the_capacity_to_the_block(capacity: int, block_bytes: int) -> None:
    """The pool is whole granules, and its high-water mark neither a block more nor less."""
    sizes = Sizes.of(capacity, block_bytes, 4)
    extent = -(-block_bytes // 4096) * 4096

    assert sizes.pool_bytes % (2 << 20) == 0
    assert int(sizes.pool_bytes * float(f"{sizes.high_water:.15f}")) // extent == capacity
    assert 0 < sizes.high_water <= 0.951


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) to build the policies")
@pytest.mark.parametrize("policy", ["lru", "use-count"])
def test_daemon_and_simulation_agree(requests: list[Request], tmp_path: Path, policy: str) -> None:
    """
    One client's hits, through a daemon with real bytes, are those of the policy alone that evicts
    in the same batches; every byte is right and every table consistent.
    """
    from bench._policy_lib import PolicySim

    capacity = 600
    found = run(requests, tmp_path, policy, capacity, clients=1)

    expected = PolicySim(requests).run(policy, capacity, int(capacity * 0.98)).hits
    assert found.right
    assert found.evictions > capacity
    assert found.tally.left_before_lease == found.duplicates == found.refused == 0
    assert int(found.by_request.sum()) == pytest.approx(int(expected.sum()), rel=0.03)


def test_two_clients_share_one_pool(requests: list[Request], tmp_path: Path) -> None:
    """Both take part, find each other's blocks, and nothing is wrong or lost."""
    found = run(requests, tmp_path, "use-count", 50_000, clients=2)

    blocks = sum(len(r.hash_ids) for r in requests)
    assert found.right
    assert found.tally.requests == len(requests)
    assert found.tally.looked_up == blocks
    assert found.tally.hits + found.tally.put_blocks == blocks
    assert found.tally.verified_bytes == found.tally.hits * BLOCK_BYTES
    assert found.evictions == 0
    assert 0 < found.hit_rate < 100


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, JSON for programs; a bad trace or argument ends it with status 2."""
    write_trace(tmp_path / "t", generate(3, duration_s=30, requests=20, warmup_s=30))
    flags = ["--trace", str(tmp_path / "t"), "--capacity", "64", "--block-bytes", "512"]

    assert main([*flags, "--limit", "10", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["requests"] == 10
    assert found["runs"][0]["right"] is True
    assert "use-count" in out.err

    assert main(["--trace", str(tmp_path / "absent")]) == 2
    for wrong in (["--clients", "5"], ["--policy", "fifo"], ["--capacity", "0"]):
        with pytest.raises(SystemExit) as ended:
            main([*flags, *wrong])
        assert ended.value.code == 2
