# SPDX-License-Identifier: Apache-2.0
"""What a daemon does with content: namespaces, tenants, checksums in the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from cenote._native import _core
from cenote.client.cli.main import main
from cenote.shm.manifest import canonical, namespace_id
from cenote.shm.session import attach
from cenote.shm.wire import Channel, Refusal

MANIFEST: dict[str, str | int | bool] = {
    "model": "m",
    "layout": "l",
    "dtype": "float16",
    "chunk_tokens": 256,
}
ACCESS = """
[[pool]]
name = "{pool}"
socket = "{socket}"
[[pool.region]]
medium = "memfd"
size = "16MiB"
[pool.access]
"""


def open_namespace(channel: Channel, name: str | None = None, **fields: Any) -> dict[str, Any]:
    """Open a namespace with a few fields changed."""
    manifest = canonical({**MANIFEST, **fields})
    return channel.request("namespace", {"manifest": manifest, "name": name}).body


def test_namespaces_are_opened_and_bound(cenoted: Callable[..., Any]) -> None:
    """Equal manifests share a slot; a name bound to another manifest tells the fields."""
    daemon = cenoted()
    channel, _welcome, _fds = daemon.hello()
    first = open_namespace(channel, "prod")
    again = open_namespace(daemon.hello("reader")[0], "prod")
    other = open_namespace(channel, None, dtype="float8")

    assert (again["slot"], again["namespace_id"]) == (first["slot"], first["namespace_id"])
    assert first["namespace_id"] == namespace_id(canonical(MANIFEST))
    assert other["slot"] != first["slot"]
    with pytest.raises(Refusal) as refused:
        open_namespace(channel, "prod", dtype="bfloat16")
    assert refused.value.code == "manifest_mismatch"
    assert refused.value.fields == {"dtype": ["float16", "bfloat16"]}


def test_manifests_must_be_canonical(cenoted: Callable[..., Any]) -> None:
    """Bytes that are no canonical manifest are refused, so that one identity has one form."""
    channel, _welcome, _fds = cenoted().hello()
    for packed in (b"\x80", b"x", msgpack.packb({"b": 1, "a": 1}), msgpack.packb({"a": 1.5})):
        with pytest.raises(Refusal, match="field 'manifest'"):
            channel.request("namespace", {"manifest": packed, "name": None})
    with pytest.raises(Refusal, match="field 'manifest'"):
        channel.request("namespace", {"manifest": "text", "name": None})


def test_a_tenant_has_its_salt(cenoted: Callable[..., Any], tmp_path: Path) -> None:
    """The salt comes from the configuration by uid; the id is made with it, never sent."""
    salt = tmp_path / "salt"
    salt.write_bytes(bytes(range(32)))
    salt.chmod(0o600)
    tenant = f'[[pool.tenant]]\nusers = [{os.geteuid()}]\nsalt_file = "{salt}"\n'
    daemon = cenoted(config=ACCESS + f"admins = [{os.geteuid()}]\n" + tenant)

    opened = open_namespace(daemon.hello()[0])

    assert opened["namespace_id"] == namespace_id(canonical(MANIFEST), bytes(range(32)))
    assert opened["namespace_id"] != namespace_id(canonical(MANIFEST))


# ---- lease limits ------------------------------------------------------------------------------


def test_a_reader_above_its_limit_is_named(
    cenoted: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """
    The limit is kept by the client library alone: a reader that writes its lease table itself is
    seen to lease more, in the sessions' rows, in `cenote status` and in one line of the log.
    """
    daemon = cenoted(size="16MiB")
    writer, reader = daemon.raw("writer", "maker"), daemon.raw("reader", "hog")
    key = os.urandom(32)
    writer.commit(writer.reserve(2**20), key, 2**20)

    def look() -> dict[str, tuple[int, bool]]:
        rows = writer.channel.request("sessions").body["sessions"]
        return {row["label"]: (row["leased_bytes"] >> 20, row["over_limit"]) for row in rows}

    for slot in range(4):
        reader.lease_words[slot] = writer.find(key)
    assert look() == {"maker": (0, False), "hog": (4, False)}
    reader.lease_words[4] = writer.find(key)
    assert look() == look() == {"maker": (0, False), "hog": (5, True)}

    assert main(["status", "--socket", str(daemon.socket)]) == 0
    remark = f"process {os.getpid()} (hog) leases 5MiB and may lease 4MiB"
    assert remark in " ".join(capsys.readouterr().out.split())
    (line,) = daemon.events("reader_over_limit")
    assert (line["pid"], line["leased_bytes"], line["limit_bytes"]) == (
        os.getpid(),
        5 << 20,
        4 << 20,
    )
    reader.lease_words[4] = 0
    assert look()["hog"] == (4, False)


# ---- checksums ---------------------------------------------------------------------------------


def test_checksums_come_in_the_background(cenoted: Callable[..., Any]) -> None:
    """checksum = "lazy": a chunk written in place gets its CRC-32C without anybody asking."""
    daemon = cenoted("--checksum", "lazy")
    channel, welcome, fds = daemon.hello("writer")
    slot = open_namespace(channel)["slot"]
    mapping = attach(welcome, fds)
    ffi, lib = _core.ffi, _core.lib
    client = ffi.cast("struct cn_client *", mapping.ptr)
    grant, put = ffi.new("struct cn_grant *"), ffi.new("struct cn_put *")
    assert lib.cn_reserve(client, 10_000, 0, 1000, grant) == lib.CN_OK
    data = os.urandom(10_000)
    ffi.memmove(grant.data, data, len(data))
    key = ffi.new("uint8_t[32]", os.urandom(32))
    put.ref, put.key, put.data_bytes, put.ns_slot = grant.ref, key, len(data), slot
    put.position = lib.CN_POSITION_UNKNOWN
    assert lib.cn_commit(client, put, 1000) == lib.CN_OK
    assert lib.cn_flush(client, 5000) == lib.CN_OK

    found = ffi.new("uint32_t *")
    chunk, cold = ffi.new("struct cn_chunk *"), ffi.new("struct cn_cold *")
    catalog = ffi.cast("void *", mapping.catalog)
    assert lib.cn_find(catalog, slot, key, found) == lib.CN_OK
    pause = threading.Event()
    while True:
        assert lib.cn_chunk_read(catalog, found[0], chunk, cold) == lib.CN_OK
        if chunk.word & lib.CN_CF_CRC:
            break
        pause.wait(0.01)

    assert chunk.size_crc >> 32 == lib.cn_crc32c(0, data, len(data))
    counters = channel.request("stats").body["counters"]
    assert (counters["verified"], counters["sessions"]) == (1, 1)  # its own session is not counted
    assert [s["label"] for s in channel.request("sessions").body["sessions"]] == ["test"]
