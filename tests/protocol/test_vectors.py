# SPDX-License-Identifier: Apache-2.0
"""The golden vectors of docs/control-protocol.md: any implementation must agree with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cenote.shm.messages import parse_hello, parse_lost, parse_namespace, parse_request
from cenote.shm.session import parse_welcome
from cenote.shm.wire import Decoder, Message, Refusal, WireError, checked_reply, encode

HERE = Path(__file__).parent
MESSAGES = json.loads((HERE / "messages.json").read_text())["vectors"]
REFUSED = json.loads((HERE / "refused.json").read_text())


def revived(value: Any) -> Any:
    """Return a body of the JSON files with its binary fields."""
    if isinstance(value, dict) and list(value) == ["bytes"]:
        return bytes.fromhex(value["bytes"])
    if isinstance(value, dict):
        return {key: revived(item) for key, item in value.items()}
    return [revived(item) for item in value] if isinstance(value, list) else value


def decoded(frame: bytes) -> Message:
    """Return the one message in *frame*."""
    decoder = Decoder()
    decoder.feed(frame)
    message = decoder.next()
    assert message is not None
    assert decoder.next() is None
    return message


def parsed(body: dict[str, Any]) -> None:
    """Look at every field of a request, as the daemon does."""
    op, _id = parse_request(body)
    if op == "hello":
        parse_hello(body)
    if op == "namespace":
        parse_namespace(body)
    if op == "lost":
        parse_lost(body)


@pytest.mark.parametrize("vector", MESSAGES, ids=lambda v: str(v["name"]))
def test_messages_are_these_bytes(vector: dict[str, Any]) -> None:
    """A body becomes exactly this frame, and the frame this body again."""
    body, frame = revived(vector["body"]), bytes.fromhex(vector["hex"])

    assert encode(body) == frame
    assert decoded(frame).body == body


@pytest.mark.parametrize("vector", MESSAGES, ids=lambda v: str(v["name"]))
def test_messages_have_valid_fields(vector: dict[str, Any]) -> None:
    """Requests pass the checks of the daemon, replies those of the client."""
    body = revived(vector["body"])
    if vector["kind"] == "request":
        parsed(body)
    elif vector["kind"] == "reply" and body["ok"]:
        assert checked_reply(Message(body)).body == body
    elif vector["kind"] == "reply":
        with pytest.raises(Refusal) as refused:
            checked_reply(Message(body))
        assert (refused.value.code, refused.value.fields) == (body["error"], body["fields"])


def test_welcomes_are_understood() -> None:
    """Each welcome parses when its descriptors came with it, and not with one more or less."""
    welcomes = [revived(v["body"]) for v in MESSAGES if v["name"].startswith("welcome")]
    for body in welcomes:
        numbers = tuple(range(-len(body["fds"]), 0))  # nothing is opened or closed here
        welcome, fds = parse_welcome(Message(body, numbers))
        assert (welcome.pool_id, list(fds)) == (body["pool_id"], body["fds"])
        assert welcome.role == body["role"]
        assert welcome.resumed == (not body["fds"])
        wrong = numbers[1:] if numbers else (-1,)
        with pytest.raises(Exception, match="were expected"):
            parse_welcome(Message(body, wrong))
    assert len(welcomes) == 3


@pytest.mark.parametrize("vector", REFUSED["frames"], ids=lambda v: str(v["name"]))
def test_malformed_frames_are_refused(vector: dict[str, Any]) -> None:
    """A frame that breaks the rules is refused with this code and these words."""
    with pytest.raises(WireError) as refused:
        decoded(bytes.fromhex(vector["hex"]))

    assert refused.value.code == vector["error"]
    assert vector["says"] in refused.value.message


@pytest.mark.parametrize("vector", REFUSED["requests"], ids=lambda v: str(v["name"]))
def test_wrong_fields_are_named(vector: dict[str, Any]) -> None:
    """A request with one wrong field is refused with this code, and the field is named."""
    body = decoded(bytes.fromhex(vector["hex"])).body

    with pytest.raises(WireError) as refused:
        parsed(body)

    assert refused.value.code == vector["error"]
    assert vector["says"] in refused.value.message


@pytest.mark.parametrize("vector", MESSAGES, ids=lambda v: str(v["name"]))
def test_a_prefix_is_not_a_message(vector: dict[str, Any]) -> None:
    """However a frame is cut, nothing comes out before its last byte, and then the whole."""
    frame = bytes.fromhex(vector["hex"])
    decoder = Decoder()
    for byte in frame[:-1]:
        decoder.feed(bytes([byte]))
        assert decoder.next() is None

    decoder.feed(frame[-1:])
    message = decoder.next()

    assert message is not None
    assert message.body == revived(vector["body"])
