# SPDX-License-Identifier: Apache-2.0
"""
Build `cenote._native._core` and `cenote._native._short` from the marked parts of the headers.

What Python may see stands between `cffi:begin` and `cffi:end` in the very headers that the
compiler reads, so there is no second copy that could drift.  Both modules have the same functions:
calls of `_core` release the GIL, calls of `_short` keep it (a released one costs milliseconds
beside a busy Python thread).  Types and constants are declared by `_core` alone and shared, so a
pointer made by one module may be given to the other.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import cffi

INCLUDE = Path("cffi_src/include")  # setuptools runs this file from the root of the project
HEADERS = (
    "cn_status.h",
    "cn_layout.h",
    "cn_region.h",
    "cn_api.h",
)  # a header needs those before it

KEEP_GIL = """
#undef Py_BEGIN_ALLOW_THREADS
#undef Py_END_ALLOW_THREADS
#define Py_BEGIN_ALLOW_THREADS {
#define Py_END_ALLOW_THREADS }
"""

_MARKED = re.compile(r"/\* cffi:begin \*/(.*?)/\* cffi:end \*/", re.DOTALL)
_COMMENT_OR_DIRECTIVE = re.compile(r"/\*.*?\*/|^[ \t]*#[^\n]*$", re.DOTALL | re.MULTILINE)


def cdef_of(header: Path) -> str:
    """Return the marked parts of *header*: what Python is allowed to see."""
    parts = _MARKED.findall(header.read_text(encoding="utf-8"))
    if not parts:
        raise ValueError(f"{header}: no text between /* cffi:begin */ and /* cffi:end */")
    return "".join(parts)


def prototypes_of(cdef: str) -> str:
    """Return the function prototypes of *cdef* without its types and constants."""
    statements, depth, start = [], 0, 0
    text = _COMMENT_OR_DIRECTIVE.sub("", cdef)
    for at, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if char == ";" and depth == 0:
            statements.append(text[start : at + 1].strip())
            start = at + 1
    return "\n".join(s for s in statements if s.endswith(");") and not s.startswith("typedef"))


def builder(name: str, preamble: str, includes: str) -> cffi.FFI:
    """Return an FFI whose source is *preamble* and the headers; the caller declares what it has."""
    flags = ["-std=gnu11", "-D_GNU_SOURCE=", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
    extra = shlex.split(os.environ.get("CN_EXTRA_CFLAGS", ""))
    ffi = cffi.FFI()
    ffi.set_source(
        f"cenote._native.{name}",
        preamble + includes,
        include_dirs=[str(INCLUDE)],
        # the static library is linked in, so its sources count as this module's
        depends=[str(path) for path in sorted(Path("cffi_src").glob("*/*.[ch]"))],
        # cffi's own wrappers, not ours: a missing-field or unused warning there is no news
        extra_compile_args=[*flags, *extra, "-Wno-unused-parameter", "-Wno-conversion"],
        extra_link_args=extra,
        py_limited_api=True,
    )
    return ffi


_present = [INCLUDE / name for name in HEADERS if (INCLUDE / name).exists()]
_cdef = "".join(cdef_of(header) for header in _present)
_includes = "".join(f'#include "{header.name}"\n' for header in _present)

core = builder("_core", "", _includes)
core.cdef(_cdef)

short = builder("_short", KEEP_GIL, _includes)
short.include(core)
short.cdef(prototypes_of(_cdef))
