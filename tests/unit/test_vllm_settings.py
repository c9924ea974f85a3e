# SPDX-License-Identifier: Apache-2.0
"""What an operator and a request may write, and what is made of what is wrong."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.client.adapters.vllm import settings
from cenote.client.adapters.vllm.settings import NO_WISHES, Settings, Wishes

GOOD = {
    "socket": "/run/cenote/other.sock",
    "chunk_tokens": 512,
    "verify": "always",
    "save": "reused",
    "min_load_tokens": 1,
    "transfer": "layers",
}
HOSTILE: list[object] = [None, "", "1", 1.0, -1.5, float("nan"), [], {}, object(), b"x", -(2**70)]

# ---- the operator's -----------------------------------------------------------------------------


def test_nothing_given_is_every_default() -> None:
    """
    An empty configuration is one that works.
    """
    assert Settings.parse({}) == Settings(None, None, "first", "all", None, "chunks")


def test_every_key_is_taken() -> None:
    """
    What is given under a setting's name is what the setting becomes, and GOOD has all of them.
    """
    assert {field.name for field in dataclasses.fields(Settings)} == set(GOOD)
    assert dataclasses.asdict(Settings.parse(GOOD)) == GOOD


@pytest.mark.parametrize("key", sorted(GOOD))
def test_each_key_alone_changes_nothing_else(key: str) -> None:
    """
    The others keep their defaults.
    """
    made = Settings.parse({key: GOOD[key]})
    assert made == dataclasses.replace(Settings(), **{key: GOOD[key]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "choices"),
    [("verify", settings.VERIFY), ("save", settings.SAVE), ("transfer", settings.TRANSFER)],
)
def test_every_choice_is_taken_and_no_other(key: str, choices: tuple[str, ...]) -> None:
    """
    A choice that is none is refused with the key, the value and all that could be given.
    """
    for choice in choices:
        assert getattr(Settings.parse({key: choice}), key) == choice
    for wrong in ("", choices[0].upper(), "yes", None, True, 1, [choices[0]]):
        with pytest.raises(ValueError, match=key) as caught:
            Settings.parse({key: wrong})
        assert repr(wrong) in str(caught.value)
        assert all(choice in str(caught.value) for choice in choices)


@pytest.mark.parametrize("key", ["chunk_tokens", "min_load_tokens"])
@pytest.mark.parametrize("wrong", [0, -1, 1.0, "256", True, False, [], b"1"])
def test_a_number_of_tokens_is_a_whole_number_from_1_on(key: str, wrong: object) -> None:
    """
    Nothing that merely looks like one, a bool included.
    """
    with pytest.raises(ValueError, match=f"{key} is .*: give a number of tokens, 1 or more"):
        Settings.parse({key: wrong})
    assert getattr(Settings.parse({key: 1}), key) == 1
    assert getattr(Settings.parse({key: None}), key) is None


@pytest.mark.parametrize("wrong", ["", 7, True, b"/run/x", ["/run/x"]])
def test_a_socket_is_a_path_in_words(wrong: object) -> None:
    """
    An empty one is a mistake, not a default.
    """
    with pytest.raises(ValueError, match="give the path of the daemon's socket"):
        Settings.parse({"socket": wrong})


# ---- keys that are none -------------------------------------------------------------------------


def test_unknown_keys_are_all_named_with_the_right_ones() -> None:
    """
    A misspelt key is an error at start, not a setting that silently does nothing.
    """
    with pytest.raises(ValueError, match="does not know") as caught:
        Settings.parse({"verfy": "always", "chunk_token": 1, "save": "all"})
    text = str(caught.value)
    assert "'chunk_token', 'verfy'" in text
    assert all(name in text for name in GOOD)
    assert "'save'" not in text


def test_keys_of_others_are_let_through_and_named_as_possible() -> None:
    """
    `also` are those that somebody else reads; their values are not looked at.
    """
    also = frozenset({"spec_name", "block_size"})
    assert Settings.parse({"spec_name": object(), "save": "none"}, also).save == "none"
    with pytest.raises(ValueError, match="spec_nam") as caught:
        Settings.parse({"spec_nam": 1}, also)
    assert "block_size, spec_name" in str(caught.value)


def test_settings_that_mean_nothing_here_are_refused_like_unknown_ones() -> None:
    """
    `without` takes them out of what is accepted, and out of what is named.
    """
    for name in settings.NOT_OFFLOADING:
        with pytest.raises(ValueError, match=f"'{name}'") as caught:
            Settings.parse({name: GOOD[name]}, without=settings.NOT_OFFLOADING)
        assert name not in str(caught.value).split("it takes", 1)[1]


@given(st.dictionaries(st.text(max_size=12), st.none() | st.integers() | st.text(max_size=8)))
def test_whatever_is_given_is_parsed_or_refused_with_a_value_error(given: dict[str, Any]) -> None:
    """
    No other exception leaves parse().
    """
    try:
        made = Settings.parse(given)
    except ValueError:
        return
    assert made == dataclasses.replace(Settings(), **given)


# ---- a request's --------------------------------------------------------------------------------

RIGHT: dict[str, list[int]] = {
    "max_load_tokens": [0, 1, 2**63 - 1],
    "priority": [-128, 0, 127],
    "ttl_s": [1, 3600, 2**32 - 1],
}
BEYOND: dict[str, list[int]] = {
    "max_load_tokens": [-1, 2**63],
    "priority": [-129, 128],
    "ttl_s": [0, -1, 2**32],
}


@pytest.mark.parametrize("key", sorted(RIGHT))
def test_wishes_are_taken_to_both_ends_of_their_range(key: str) -> None:
    """
    The first and the last number that is right are taken.
    """
    for value in RIGHT[key]:
        assert getattr(Wishes.parse({f"cenote.{key}": value}), key) == value


@pytest.mark.parametrize("key", sorted(RIGHT))
def test_wishes_beyond_their_range_are_left_out(key: str) -> None:
    """
    One beyond either end, a bool, and what is no number: the default stands.
    """
    for value in (*BEYOND[key], True, *HOSTILE):
        assert Wishes.parse({f"cenote.{key}": value}) == NO_WISHES


def test_skip_save_is_true_or_false() -> None:
    """
    1 is not true: who means it writes it.
    """
    assert Wishes.parse({"cenote.skip_save": True}).skip_save
    assert not Wishes.parse({"cenote.skip_save": False}).skip_save
    for value in (1, 0, "true", *HOSTILE):
        assert Wishes.parse({"cenote.skip_save": value}) == NO_WISHES


def test_a_wrong_wish_does_not_spoil_the_right_ones(caplog: pytest.LogCaptureFixture) -> None:
    """
    What is right is kept, and what is wrong is logged by its key with what would have been right.
    """
    given = {"cenote.priority": 200, "cenote.ttl_s": 60, "cenote.skip_sav": 1, "do_remote": True}
    with caplog.at_level(logging.WARNING, settings.LOGGER):
        assert Wishes.parse(given) == Wishes(ttl_s=60)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "cenote.priority=200" in said[0]
    assert "-128 to 127" in said[0]
    assert "cenote.skip_sav=1" in said[1]


def test_what_belongs_to_others_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    """
    Parameters without the prefix are for other connectors.
    """
    with caplog.at_level(logging.DEBUG, settings.LOGGER):
        assert Wishes.parse({"priority": 9, "skip_save": True, 3: 4}) is NO_WISHES
    assert not caplog.records


@pytest.mark.parametrize("params", [None, [], "cenote.priority", 7, object()])
def test_no_parameters_are_no_wishes(params: Any) -> None:
    """
    Whatever stands in their place.
    """
    assert Wishes.parse(params) is NO_WISHES


def test_a_long_value_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """
    A stranger's value is cut before it is logged.
    """
    Wishes.parse({"cenote.priority": "x" * 100_000, "cenote." + "y" * 100_000: 1})
    assert all(len(record.getMessage()) < 1000 for record in caplog.records)
    assert len(caplog.records) == 2


def test_a_stranger_cannot_write_lines_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """
    Neither by a key nor by a value.
    """
    Wishes.parse({"cenote.a\nERROR forged": 1, "cenote.priority": "b\nERROR forged"})
    assert len(caplog.records) == 2
    assert not any("\n" in record.getMessage() for record in caplog.records)


class Rude:
    """A value that cannot even be looked at."""

    def __str__(self) -> NoReturn:
        raise RuntimeError("no")

    __repr__ = __str__


@pytest.fixture
def deep() -> Iterator[list[Any]]:
    """A list that no repr() gets to the end of."""
    inner: list[Any] = []
    for _ in range(100_000):
        inner = [inner]
    yield inner
    while inner:
        inner = inner.pop()


def test_values_that_cannot_be_printed_are_left_out() -> None:
    """
    Not even one whose text raises ends the engine, and the rest of the request counts.
    """
    params = {"cenote.priority": Rude(), "cenote.ttl_s": 5}
    assert Wishes.parse(params) == Wishes(ttl_s=5)


def test_values_nested_without_end_are_left_out(deep: list[Any]) -> None:
    """
    JSON of a stranger may be as deep as its parser lets it.
    """
    assert Wishes.parse({"cenote.ttl_s": deep, "cenote.priority": 1}) == Wishes(priority=1)


def test_numbers_too_long_to_print_are_left_out() -> None:
    """
    Python refuses to print a number of more than 4,300 digits, by raising.
    """
    assert Wishes.parse({"cenote.ttl_s": 10**5000, "cenote.priority": 1}) == Wishes(priority=1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
NAMES = st.sampled_from(["skip_save", *RIGHT]) | st.text(max_size=6)


@given(st.dictionaries(st.builds("cenote.{}".format, NAMES), JSON, max_size=6))
def test_wishes_are_never_an_error(params: dict[str, Any]) -> None:
    """
    Of any JSON: each wish is the value given or the default, and always one that is right.
    """
    made = Wishes.parse(params)
    for name, default in dataclasses.asdict(NO_WISHES).items():
        value = getattr(made, name)
        assert value == default or value is params[f"cenote.{name}"]
    assert type(made.skip_save) is bool
    assert -128 <= made.priority <= 127
    assert made.ttl_s is None or 1 <= made.ttl_s < 2**32
    assert made.max_load_tokens is None or made.max_load_tokens >= 0
