# SPDX-License-Identifier: Apache-2.0
"""The parts of the vLLM offloading spec that know nothing of vLLM."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator

import pytest

from cenote.client import Cache, Chunk, Manifest, Pool
from cenote.client.adapters.vllm import offload_plan, rendezvous
from cenote.client.adapters.vllm.checker import Checker, Found
from cenote.client.adapters.vllm.groups import SKIP
from cenote.client.adapters.vllm.rendezvous import Answer, Listener, Rendezvous, Unanswered, ask
from cenote.client.adapters.vllm.settings import NOT_OFFLOADING, OFFLOADING_KEYS, Settings
from cenote.client.testing import MemoryHost

NBYTES = 4096
POOL, OTHER = b"p" * 16, b"q" * 16


def wait_until(true: Callable[[], object]) -> None:
    """Look again and again, for what another thread brings about."""
    pause = threading.Event()
    while not true():
        pause.wait(0.002)


# ---- which blocks are which chunk's -------------------------------------------------------------


def test_a_load_goes_to_every_page_of_its_chunks() -> None:
    """
    Blocks that begin and end where chunks do are taken as they come.
    """
    assert offload_plan.loaded([5, 6, 7, 8], 4, 2, 2) == [(5, 6), (7, 8)]


def test_a_load_skips_what_the_engine_has_and_what_it_did_not_ask_for() -> None:
    """
    A first chunk that is partly there, a last one that is wanted in part, and the null block.
    """
    assert offload_plan.loaded([6, 7, 0, 9], 5, 2, 4) == [(SKIP, 6, 7, SKIP), (9, SKIP, SKIP, SKIP)]


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_load_of_another_number_of_chunks_is_refused(chunks: int) -> None:
    """
    Blocks and chunks that do not belong together are an error, never a guess.
    """
    with pytest.raises(ValueError, match="not supported"):
        offload_plan.loaded([5, 6, 7, 8], 0, chunks, 2)


def test_a_group_without_blocks_has_no_load() -> None:
    """
    A group whose window the engine holds is left out.
    """
    assert offload_plan.loaded([], 6, 0, 4) == []


def test_a_store_takes_whole_chunks() -> None:
    """
    All pages there: all chunks are stored.
    """
    assert offload_plan.stored([5, 6, 7, 8], 2, 2, 2) == [(5, 6), (7, 8)]


def test_a_store_leaves_out_a_first_chunk_whose_pages_have_gone() -> None:
    """
    Blocks that a window has let go make a chunk incomplete: it alone is not stored.
    """
    assert offload_plan.stored([6, 7, 8], 1, 2, 2) == [None, (7, 8)]


@pytest.mark.parametrize(("blocks", "first"), [([5, 6, 7], 0), ([7, 8], 1), ([5, 0, 7, 8], 0)])
def test_a_store_with_pages_missing_elsewhere_stores_nothing(blocks: list[int], first: int) -> None:
    """
    Where nobody can say which chunk misses a page, none is stored.
    """
    assert offload_plan.stored(blocks, first, 2, 2) == [None, None]


def test_groups_are_told_apart_by_their_sizes() -> None:
    """
    The blocks of all groups stand in one list.
    """
    assert list(offload_plan.split([1, 2, 3, 4], [3, 0, 1])) == [[1, 2, 3], [], [4]]


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["transfer", "min_load_tokens", "cpu_bytes_to_use", "sokcet"])
def test_a_key_that_means_nothing_here_is_an_error_that_names_the_right_ones(key: str) -> None:
    """
    Neither the other connector's settings nor another spec's are passed over in silence.
    """
    with pytest.raises(ValueError, match=f"'{key}'.*socket.*blocks_per_chunk"):
        Settings.parse({key: 1}, OFFLOADING_KEYS, without=NOT_OFFLOADING)


def test_the_stock_connectors_own_keys_are_let_by() -> None:
    """
    What vLLM reads itself is no error.
    """
    given = dict.fromkeys(OFFLOADING_KEYS, 1)
    assert Settings.parse(given, OFFLOADING_KEYS, without=NOT_OFFLOADING) == Settings()


# ---- who the workers are ------------------------------------------------------------------------


@pytest.fixture
def engine_id() -> str:
    return str(uuid.uuid4())


def answer(pool_id: bytes = POOL, chunk_tokens: int = 256) -> Answer:
    fields: rendezvous.Fields = {
        "model": "m",
        "layout": "l",
        "dtype": "d",
        "tp_rank": 0,
        "kv_scales": False,
    }
    return Answer(pool_id, ("sha256", "seed"), chunk_tokens, (fields,), (NBYTES,))


def asked(engine_id: str, rank: int = 0) -> Answer | None:
    try:
        return ask(engine_id, rank)
    except Unanswered:
        return None


def test_a_worker_says_what_it_was_asked(engine_id: str) -> None:
    """
    Every type of a manifest's fields arrives as it was: the namespace is the same.
    """
    listener = Listener(engine_id, 1, answer)
    wait_until(lambda: asked(engine_id, 1))

    found = ask(engine_id, 1)

    assert found == answer()
    assert [type(value) for value in found.groups[0].values()] == [str, str, str, int, bool]
    listener.close()


def test_who_is_not_there_does_not_answer(engine_id: str) -> None:
    """
    A worker that has not begun, or has ended, is no answer.
    """
    with pytest.raises(Unanswered, match="does not answer"):
        ask(engine_id, 0)
    listener = Listener(engine_id, 0, answer)
    wait_until(lambda: asked(engine_id))
    listener.close()
    wait_until(lambda: asked(engine_id) is None)


@pytest.mark.parametrize("said", [b"", b"{}", b"[1]", b'{"version": 9}', b"\xff"])
def test_nonsense_is_no_answer(said: bytes) -> None:
    """
    What cannot be read is refused, and says so.
    """
    with pytest.raises(Unanswered):
        Answer.parse(said)


def test_another_user_in_the_place_of_a_worker_is_not_believed(
    engine_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whoever took the address first: its answer is not asked for.
    """
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(rendezvous.address_of(engine_id, 0))
        squatter.listen()
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
        with pytest.raises(Unanswered, match="another user"):
            ask(engine_id, 0)


def test_a_second_worker_of_the_same_name_waits_until_the_first_has_gone(engine_id: str) -> None:
    """
    An engine that was started anew while its predecessor ends is asked once that has.
    """
    first = Listener(engine_id, 0, lambda: answer(OTHER))
    wait_until(lambda: asked(engine_id))
    second = Listener(engine_id, 0, answer)

    assert ask(engine_id, 0).pool_id == OTHER
    first.close()
    wait_until(lambda: (found := asked(engine_id)) is not None and found.pool_id == POOL)

    second.close()


def test_a_pool_is_agreed_once_every_worker_has_it(engine_id: str) -> None:
    """
    Before the last worker is attached to the scheduler's pool nothing is promised; what they are is
    learnt once.
    """
    pools = [POOL, b""]
    listeners = [
        Listener(engine_id, rank, lambda rank=rank: answer(pools[rank]))  # type: ignore[misc]
        for rank in range(2)
    ]
    learnt: list[int] = []
    meeting = Rendezvous(engine_id, 2, lambda: POOL, lambda answers: learnt.append(len(answers)))
    wait_until(lambda: learnt)
    assert meeting.pool_id == b""

    pools[1] = POOL
    wait_until(lambda: meeting.pool_id)

    assert (meeting.pool_id, learnt) == (POOL, [2])
    meeting.close()
    for listener in listeners:
        listener.close()


def test_another_pool_is_agreed_anew(engine_id: str) -> None:
    """
    After a reconnect of the scheduler the workers are asked again: until they have followed,
    nothing is promised.
    """
    own, theirs = [POOL], [POOL]
    listener = Listener(engine_id, 0, lambda: answer(theirs[0]))
    meeting = Rendezvous(engine_id, 1, lambda: own[0], lambda _: None)
    wait_until(lambda: meeting.pool_id)

    own[0] = OTHER
    assert meeting.pool_id == b""
    theirs[0] = OTHER
    wait_until(lambda: meeting.pool_id)

    own[0] = b""
    assert meeting.pool_id == b""
    meeting.close()
    listener.close()


# ---- checksums ----------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[Pool]:
    with MemoryHost("16MiB", checksum="commit") as host, host.connect() as pool:
        yield pool


@pytest.fixture
def cache(pool: Pool) -> Cache:
    return pool.namespace(Manifest("m", "l", "uint8", 16))


def stored(cache: Cache, i: int) -> ctypes.Array[ctypes.c_uint8]:
    """Store a chunk; returns its bytes, which may be spoiled."""
    with cache.put(bytes([i]) * 32, NBYTES) as put:
        put.copy_from(bytes([i]) * NBYTES)
        spoiler = (ctypes.c_uint8 * NBYTES).from_address(put.address)
    cache.flush()
    return spoiler


def looked(checker: Checker, cache: Cache, i: int, request: str = "r") -> Found:
    """Look once; a chunk whose answer is not pending is given back, as the manager does."""
    chunk = cache.get(bytes([i]) * 32)
    assert isinstance(chunk, Chunk)
    found = checker.look(cache, chunk, request)
    if found is not Found.PENDING:
        chunk.release()
    return found


def test_a_good_chunk_is_compared_once(cache: Cache, pool: Pool) -> None:
    """
    First pending, then good, for every request; and no lease is left behind.
    """
    stored(cache, 1)
    checker = Checker("first")

    assert looked(checker, cache, 1) is Found.PENDING
    wait_until(lambda: looked(checker, cache, 1) is Found.GOOD)

    assert looked(checker, cache, 1, "another") is Found.GOOD
    assert pool.leases == 0
    checker.close()


def test_always_is_once_for_each_request(cache: Cache, pool: Pool) -> None:
    """
    What was good for one request is compared again for the next.
    """
    stored(cache, 1)
    checker = Checker("always")
    wait_until(lambda: looked(checker, cache, 1, "a") is Found.GOOD)

    assert looked(checker, cache, 1, "b") is Found.PENDING
    checker.close()
    assert pool.leases == 0


def test_never_compares_nothing(cache: Cache) -> None:
    """
    With verify = "never" a chunk is good as it is.
    """
    stored(cache, 1)[7] ^= 1
    checker = Checker("never")
    assert looked(checker, cache, 1) is Found.GOOD
    checker.close()


def test_a_damaged_chunk_is_bad_and_leaves_the_pool(cache: Cache, pool: Pool) -> None:
    """
    It is never good, it is deleted so that it can be stored again, and what is stored then is good.
    """
    stored(cache, 1)[7] ^= 1
    checker = Checker("first")

    assert looked(checker, cache, 1) is Found.PENDING
    wait_until(lambda: cache.match(bytes([1]) * 32) == 0)

    stored(cache, 1)
    wait_until(lambda: looked(checker, cache, 1) is Found.GOOD)
    checker.close()
    assert pool.leases == 0


def test_a_damaged_chunk_that_cannot_be_deleted_stays_bad(cache: Cache) -> None:
    """
    A reader may not delete: it does not use the chunk either.
    """
    stored(cache, 1)[7] ^= 1
    object.__setattr__(cache, "delete", _refused)
    checker = Checker("first")

    assert looked(checker, cache, 1) is Found.PENDING
    wait_until(lambda: looked(checker, cache, 1) is not Found.PENDING)

    assert looked(checker, cache, 1) is Found.BAD
    checker.close()


def _refused(_key: bytes) -> int:
    from cenote.client import NotWritable

    raise NotWritable("a reader")


def test_a_chunk_without_a_checksum_is_taken_as_it_is() -> None:
    """
    There is nothing to compare.
    """
    with MemoryHost("16MiB", checksum="off") as host, host.connect() as pool:
        cache = pool.namespace(Manifest("m", "l", "uint8", 16))
        stored(cache, 1)
        checker = Checker("first")
        assert looked(checker, cache, 1) is Found.GOOD
        checker.close()
