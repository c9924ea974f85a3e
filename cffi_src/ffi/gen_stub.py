# SPDX-License-Identifier: Apache-2.0
"""
Write `_core.pyi` and `_short.pyi` from the compiled modules; with --check only compare.

Usage: python cffi_src/ffi/gen_stub.py [--check]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent.parent
MODULES = ("_core", "_short")
HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Written by cffi_src/ffi/gen_stub.py from the compiled module; `make dev` writes it again.
from typing import Final

from _cffi_backend import FFI, CData

class _Lib:
"""
TAIL = """
ffi: Final[FFI]
lib: Final[_Lib]
"""


def python_type(ctype: object, *, argument: bool) -> str:
    """Return how Python sees a value of *ctype*, as an argument or as a result."""
    kind, name = getattr(ctype, "kind"), getattr(ctype, "cname")  # noqa: B009 - its type is private
    if kind == "void":
        return "None"
    if kind == "enum":
        return "int"
    if kind == "primitive":
        return {"_Bool": "bool", "float": "float", "double": "float", "char": "bytes"}.get(
            name, "int"
        )
    byte_like = {"void *", "char *", "unsigned char *", "uint8_t *", "int8_t *"}
    # cffi lends the memory of a bytes object for the length of the call
    return "CData | bytes" if argument and name in byte_like else "CData"


def member(module: ModuleType, name: str) -> str:
    """Return the stub line of one constant or function of `module.lib`."""
    value = getattr(module.lib, name)
    if isinstance(value, int):
        return f"    {name}: Final[int]"
    ctype = module.ffi.typeof(value)
    arguments = "".join(
        f", a{i}: {python_type(arg, argument=True)}" for i, arg in enumerate(ctype.args)
    )
    positional = ", /" if ctype.args else ""
    result = python_type(ctype.result, argument=False)
    return f"    def {name}(self{arguments}{positional}) -> {result}: ..."


def stub_of(module: ModuleType) -> str:
    """Return the whole stub of one compiled module."""
    names = [name for name in sorted(dir(module.lib)) if not name.startswith("__")]
    lines = [member(module, name) for name in names]
    return HEAD + "\n".join(lines or ["    pass"]) + "\n" + TAIL


def main() -> int:
    """Write the stubs, or say which of them is not what the compiled module has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 on a difference"
    )
    check = parser.parse_args().check

    stale = []
    for name in MODULES:
        path = PACKAGE / f"{name}.pyi"
        wanted = stub_of(importlib.import_module(f"cenote._native.{name}"))
        if path.exists() and path.read_text(encoding="utf-8") == wanted:
            continue
        stale.append(path.name)
        if not check:
            path.write_text(wanted, encoding="utf-8")
    if check and stale:
        print(f"cffi_src: {', '.join(stale)} differ from the compiled module; run `make dev`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
