# SPDX-License-Identifier: Apache-2.0
"""
The CUDA runtime of this process: six of its functions, through ctypes.

Why not `torch.cuda.cudart()`: it lacks cudaGetLastError, and a failed call that is not followed by
it makes the engine's next, unrelated call report our error. The pending error belongs to one
thread and to one copy of the library, so all of ours goes through one copy, and through the one
that the process has loaded already: another would need a driver of its own version.

Nothing here needs torch, or CUDA, to be imported.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

SUCCESS: Final = 0
# Where no copy is loaded: what the linker may find, newest first.
SONAMES: Final = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
_MAPS: Final = Path("/proc/self/maps")
_INT: Final = ctypes.c_int  # what cudaError_t, an enum, is in the ABI


class Runtime(Protocol):
    """What registration asks of the CUDA runtime. Codes are cudaError_t, 0 for success."""

    def host_register(self, address: int, nbytes: int, flags: int) -> int:
        """Page-lock a range and make it known to the device."""

    def host_unregister(self, address: int) -> int:
        """Undo host_register() of the range that begins there."""

    def take_last_error(self) -> int:
        """Return this thread's pending error, and forget it."""

    def error_text(self, code: int) -> str:
        """What *code* means."""

    def current_device(self) -> tuple[int, int]:
        """Return (code, this thread's device)."""

    def device_attribute(self, attribute: int, device: int) -> tuple[int, int]:
        """Return (code, value of a cudaDeviceAttr)."""


class NoRuntime(Exception):
    """There is no CUDA runtime in this process; says where it was looked for."""


class Cudart:
    """
    The functions of one libcudart. They release the GIL: a registration takes seconds.

    Args:
        library: The library.

    Raises:
        NoRuntime: It lacks one of the functions.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        try:
            self._register = library.cudaHostRegister
            self._unregister = library.cudaHostUnregister
            self._last_error = library.cudaGetLastError
            self._text = library.cudaGetErrorString
            self._device = library.cudaGetDevice
            self._attribute = library.cudaDeviceGetAttribute
        except AttributeError as error:
            raise NoRuntime(f"{library._name} is no CUDA runtime: {error}") from error
        self.name = str(library._name)
        self._register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        self._unregister.argtypes = [ctypes.c_void_p]
        self._last_error.argtypes = []
        self._text.argtypes = [_INT]
        self._text.restype = ctypes.c_char_p
        self._device.argtypes = [ctypes.POINTER(_INT)]
        self._attribute.argtypes = [ctypes.POINTER(_INT), _INT, _INT]

    def host_register(self, address: int, nbytes: int, flags: int) -> int:
        """Call cudaHostRegister."""
        return int(self._register(address, nbytes, flags))

    def host_unregister(self, address: int) -> int:
        """Call cudaHostUnregister."""
        return int(self._unregister(address))

    def take_last_error(self) -> int:
        """Call cudaGetLastError."""
        return int(self._last_error())

    def error_text(self, code: int) -> str:
        """Call cudaGetErrorString."""
        text: bytes | None = self._text(code)
        return (text or b"unknown").decode("utf-8", "replace")

    def current_device(self) -> tuple[int, int]:
        """Call cudaGetDevice."""
        device = _INT(-1)
        return int(self._device(ctypes.byref(device))), device.value

    def device_attribute(self, attribute: int, device: int) -> tuple[int, int]:
        """Call cudaDeviceGetAttribute."""
        value = _INT(0)
        return int(self._attribute(ctypes.byref(value), attribute, device)), value.value

    def __repr__(self) -> str:
        return f"<Cudart {self.name}>"


def loaded_in(maps: str) -> Iterator[str]:
    """
    Yield the paths of the CUDA runtimes in the text of a /proc/PID/maps, each once.

    Wheels may rename the library (libcudart-0123abcd.so.12), an upgrade may have deleted its file.
    """
    seen = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        path = fields[5].removesuffix(" (deleted)") if len(fields) == 6 else ""
        name = os.path.basename(path)  # noqa: PTH119 - a text, of no file we look at
        if name.startswith("libcudart") and ".so" in name and path not in seen:
            seen.add(path)
            yield path


def find() -> Cudart:
    """
    Return the CUDA runtime that this process has loaded, else one that the linker finds.

    Raises:
        NoRuntime: There is neither.
    """
    tried = []
    for path in loaded_in(_MAPS.read_text(encoding="utf-8", errors="surrogateescape")):
        # NOLOAD: never a second copy, not even where the file was replaced. The linker knows a
        # library whose file is gone by its name.
        for name in (path, os.path.basename(path)):  # noqa: PTH119
            try:
                return Cudart(ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW))
            except (OSError, NoRuntime) as error:
                tried.append(f"{name}: {error}")
    for name in SONAMES:
        try:
            return Cudart(ctypes.CDLL(name))
        except (OSError, NoRuntime) as error:
            tried.append(f"{name}: {error}")
    raise NoRuntime(
        "this process has no CUDA runtime, and the linker finds none: import the engine's torch "
        f"first, or put libcudart on the library path (tried: {'; '.join(tried)})"
    )
