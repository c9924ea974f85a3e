# SPDX-License-Identifier: Apache-2.0
"""
Build the three extension modules over one static library of the C core.

What each is for stands in docs/decisions/0002-build-layout.md; metadata is in pyproject.toml.
Environment: CN_EXTRA_CFLAGS is appended to every compile and link (sanitizers, -Werror);
CN_SOURCES, a list of file names, restricts the core to these (while a new file does not compile);
CN_NATIVE=no leaves everything compiled out.
"""

from __future__ import annotations

import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.modified import newer_group

CORE = "cenote_core"
CFLAGS = ["-std=gnu11", "-D_GNU_SOURCE=", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
EXTRA_CFLAGS = shlex.split(os.environ.get("CN_EXTRA_CFLAGS", ""))
INCLUDE_DIRS = ["cffi_src/include", "cffi_src/src"]
LIMITED_API = "0x030b0000"


def core_sources() -> list[str]:
    """Name the C files of the core, or those of them that CN_SOURCES lists."""
    wanted = os.environ.get("CN_SOURCES", "").split()
    sources = sorted(Path("cffi_src/src").glob("*.c"))
    return [str(path) for path in sources if not wanted or path.name in wanted]


def headers() -> list[str]:
    """Name every header: when one is newer than an object, the core is compiled again."""
    return [str(path) for folder in INCLUDE_DIRS for path in sorted(Path(folder).glob("*.h"))]


class BuildCore(build_clib):
    """Compile the files of the core that changed, as many at once as there are CPUs."""

    def build_libraries(self, libraries: list[tuple[str, dict[str, Any]]]) -> None:
        """Build the one library that *libraries* has."""
        ((name, info),) = libraries
        header_files = headers()

        def compile_one(source: str) -> str:
            (target,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            if self.force or newer_group([source, *header_files], target):
                self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=info["include_dirs"],
                    extra_postargs=info["cflags"],
                )
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, info["sources"]))
        # a fresh archive: `ar` would keep the object of a source that is gone
        archive = self.compiler.library_filename(name, output_dir=self.build_clib)
        Path(archive).unlink(missing_ok=True)
        self.compiler.create_static_lib(objects, name, output_dir=self.build_clib)


def lease_modules() -> list[Extension]:
    """Describe `cenote._native._lease`, the one module that is written against Python's C API."""
    sources = sorted(str(path) for path in Path("cffi_src/lease").glob("*.c"))
    if not sources:
        return []
    return [
        Extension(
            "cenote._native._lease",
            sources=sources,
            depends=headers() + core_sources(),
            include_dirs=INCLUDE_DIRS,
            define_macros=[("Py_LIMITED_API", LIMITED_API)],
            extra_compile_args=CFLAGS + EXTRA_CFLAGS,
            extra_link_args=EXTRA_CFLAGS,
            py_limited_api=True,
        )
    ]


def native() -> dict[str, Any]:
    """Describe what is compiled; `make setup` leaves that to `make dev`, which keeps objects."""
    if os.environ.get("CN_NATIVE") == "no":
        return {}
    core = {
        "sources": core_sources(),
        "include_dirs": INCLUDE_DIRS,
        "cflags": CFLAGS + EXTRA_CFLAGS,
    }
    return {
        "cmdclass": {"build_clib": BuildCore},
        "libraries": [(CORE, core)],
        "ext_modules": lease_modules(),
        "cffi_modules": [
            "cffi_src/ffi/build_core.py:core",
            "cffi_src/ffi/build_core.py:short",
        ],
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}, "build_ext": {"parallel": 3}},
    }


setup(**native())
