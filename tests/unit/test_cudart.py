# SPDX-License-Identifier: Apache-2.0
"""How the CUDA runtime of a process is found and called; see test_cuda.py for what stands in."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cenote.client import cuda, cudart
from cenote.client.testing import memory_pool


def test_loaded_runtimes_are_read_from_the_maps() -> None:
    """Renamed, deleted and doubled libraries are found, and nothing else."""
    maps = """\
7f00-7f01 r-xp 00000000 00:1f 12 /usr/lib/libc.so.6
7f01-7f02 r-xp 00000000 00:1f 13 /a b/nvidia/lib/libcudart.so.12
7f02-7f03 rw-p 00001000 00:1f 13 /a b/nvidia/lib/libcudart.so.12
7f03-7f04 r-xp 00000000 00:1f 14 /torch/lib/libcudart-d0da41ae.so.11.0 (deleted)
7f04-7f05 rw-p 00000000 00:00 0
7f05-7f06 r--p 00000000 00:1f 15 /somewhere/libcudart_notes.txt
"""
    assert list(cudart.loaded_in(maps)) == [
        "/a b/nvidia/lib/libcudart.so.12",
        "/torch/lib/libcudart-d0da41ae.so.11.0",
    ]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_the_loaded_runtime_is_used(stand_in: Path, tmp_path: Path) -> None:
    """What an engine has loaded is found, also when its file is gone; never a second copy."""
    path = tmp_path / stand_in.name
    shutil.copy(stand_in, path)
    script = """if True:
        import ctypes, os, sys
        from cenote.client import cudart
        engine = ctypes.CDLL(sys.argv[1])
        found = [cudart.find()]
        os.rename(sys.argv[2], sys.argv[1])
        found.append(cudart.find())
        os.unlink(sys.argv[1])
        found.append(cudart.find())
        engine.stand_in_device(0, 0, 0)
        print([runtime.current_device()[0] for runtime in found])
    """
    again = tmp_path / "upgraded"
    shutil.copy(stand_in, again)

    ran = run(script, path, again)

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[100, 100, 100]\n", "")


def test_interpreter_that_ends_while_memory_is_registered(stand_in: Path) -> None:
    """An engine that ends without close() ends in peace: nothing is unmapped or unregistered."""
    script = """if True:
        import ctypes, sys
        from cenote.client import cuda
        from cenote.client.testing import memory_pool
        library = ctypes.CDLL(sys.argv[1])
        pool = memory_pool("4MiB")
        pinned = cuda.register(pool)
        assert pinned.failed is None, pinned.failed
    """
    ran = run(script, stand_in)

    assert (ran.returncode, ran.stderr) == (0, "")


def test_no_runtime(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Without a CUDA runtime everything goes on, unregistered; it says what was looked for."""
    maps = tmp_path / "maps"
    maps.touch()
    monkeypatch.setattr(cudart, "_MAPS", maps)
    monkeypatch.setattr(cudart, "SONAMES", ("libcudart.so.none",))

    with memory_pool("4MiB") as pool, cuda.register(pool) as pinned:
        assert pinned.failed is not None
        assert "import the engine's torch" in pinned.failed
        assert "libcudart.so.none" in pinned.failed
        assert (pinned.bytes, pinned.current) == (0, True)
        assert pinned.pieces(4096, 10) == [(4096, 10)]


def test_library_that_is_no_runtime() -> None:
    """A library without the functions is refused when it is looked at, not in the middle."""
    with pytest.raises(cudart.NoRuntime, match="cudaHostRegister"):
        cudart.Cudart(ctypes.CDLL(None))


def test_numbers_are_those_of_the_headers() -> None:
    """Flags and attributes, where the CUDA headers are installed to compare with."""
    folders = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")),
        *Path("/usr/local").glob("cuda-*"),
    ]
    headers = [f / "include" / "driver_types.h" for f in folders]
    texts = [" ".join(h.read_text(errors="replace").split()) for h in headers if h.is_file()]
    if not texts:
        pytest.skip("the CUDA headers are not installed")
    for text in texts:
        assert f"#define cudaHostRegisterPortable 0x{cuda.REGISTER_PORTABLE:02x}" in text
        assert f"#define cudaHostRegisterReadOnly 0x{cuda.REGISTER_READ_ONLY:02x}" in text
        read_only, tables = cuda.ATTRIBUTE_READ_ONLY, cuda.ATTRIBUTE_HOST_PAGE_TABLES
        assert f"cudaDevAttrHostRegisterReadOnlySupported = {read_only}," in text
        assert f"cudaDevAttrPageableMemoryAccessUsesHostPageTables = {tables}," in text
        assert f"cudaErrorHostMemoryNotRegistered = {cuda.ERROR_NOT_REGISTERED}," in text
