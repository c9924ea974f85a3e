# SPDX-License-Identifier: Apache-2.0
"""
Usage: unpack_kernel.py VMLINUZ OUT: write the ELF kernel that a bzImage has inside, or a copy of it
where its compression is not known. The layout is that of Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path


def payload_of(image: bytes) -> bytes:
    """Return the compressed kernel: behind the sectors of the setup code, at a given offset."""
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    return image[start : start + length]


def unpacked(packed: bytes) -> bytes:
    """Return what is in it; empty where we cannot tell."""
    if packed.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(packed)  # 4 bytes of length follow
    if packed.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(packed)
    if packed.startswith(b"\x28\xb5\x2f\xfd") and shutil.which("zstd"):
        argv = ["zstd", "-dc"]
        return subprocess.run(argv, input=packed[:-4], stdout=subprocess.PIPE, check=True).stdout
    return b""


def main() -> None:
    """Do it."""
    source, target = map(Path, sys.argv[1:])
    image = source.read_bytes()
    kernel = unpacked(payload_of(image))
    target.write_bytes(kernel if kernel.startswith(b"\x7fELF") else image)


if __name__ == "__main__":
    main()
