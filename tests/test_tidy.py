# SPDX-License-Identifier: Apache-2.0
"""Properties of the code itself that no compiler and no linter checks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from cenote.client.cli import main as cli

LINE_LENGTH_MAX: Final = 100
FILE_LINES_MAX: Final = 500
FUNCTION_LINES_MAX: Final = 60
C_FOLDERS: Final = ("cffi_src", "tests/c", "tests/model", "tests/fuzz", "bench/c")
PYTHON_FOLDERS: Final = ("cffi_src", "numa", "shm", "client", "daemon", "tests", "bench")
TEXT_SUFFIXES: Final = {
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".md",
    ".toml",
    ".sh",
    ".service",
    ".yaml",
    ".yml",
}

# The order of memory accesses has one home; everything else calls it.
MEMORY_ORDER: Final = re.compile(
    r"\b(__atomic_\w+|__sync_\w+|atomic_\w+|_Atomic|stdatomic|volatile|memory_order\w*"
    r"|__ATOMIC_\w+)\b"
)
BANNED_IN_C: Final = {
    "alloca": "sizes its frame by data",
    "asprintf": "allocates",
    "gets": "has no bound",
    "popen": "starts a shell",
    "rand": "is global state",
    "setjmp": "restores no signal mask: sigsetjmp, and only in a guard",
    "sprintf": "has no bound: snprintf",
    "stpcpy": "has no bound",
    "strcat": "has no bound",
    "strcpy": "has no bound",
    "strtok": "is global state",
    "system": "starts a shell",
    "vsprintf": "has no bound",
}
# Only in the core, which lives inside other people's processes.
BANNED_IN_CORE: Final = {
    "abort": "an engine must never be killed by us (I4)",
    "atoi": "cannot report an error",
    "exit": "an engine must never be killed by us (I4)",
    "fprintf": "a library is silent; return a status",
    "perror": "a library is silent; return a status",
    "printf": "a library is silent; return a status",
    "puts": "a library is silent; return a status",
    "signal": "changes the whole process: sigaction, and put back what was there",
}
# Paths of one machine, and marks of unfinished work; split so that this file passes its own test.
NEVER_WRITTEN: Final = re.compile(
    r"/"
    r"work/|/"
    r"farm/|/"
    r"root/|/home/(?!you\b|user\b)\w+|/opt/(pypi|wheels)"
    r"|\b(TO"
    r"DO|FIX"
    r"ME|XX"
    r"X)\b"
)
# Sub-commands of the tool that texts may name before there are any, and why.
LATER_COMMANDS: Final = {
    ("docs/architecture.md", "qualify"): "in its list of what is planned",
    ("cffi_src/include/cn_layout.h", "qualify"): "the layout has room for its verdict already",
    ("docs/memory-layout.md", "qualify"): "generated from cn_layout.h",
}
C_COMMENT_OR_STRING: Final = re.compile(
    r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL
)


def files_in(root: Path, folders: tuple[str, ...], *suffixes: str) -> Iterator[Path]:
    """Yield the files below *folders* with one of *suffixes*."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            parts = path.relative_to(root).parts
            if path.suffix in suffixes and "__pycache__" not in parts and "build" not in parts:
                yield path


def code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, code) of a C file with comments and strings blanked out."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    text = C_COMMENT_OR_STRING.sub(blank, path.read_text(encoding="utf-8"))
    # an assembler statement that is volatile orders nothing; a volatile object is what is meant
    text = re.sub(r"\b(__asm__|asm)\s+(volatile|__volatile__)\b", r"\1", text)
    yield from enumerate(text.splitlines(), start=1)


def test_only_one_file_names_a_memory_order(project_root: Path) -> None:
    """
    Atomics, fences and volatile stand in cn_atomic.h alone, so that the explorer sees them all.
    """
    wrong = [
        f"{path.relative_to(project_root)}:{number}: {found.group()}"
        for path in files_in(project_root, ("cffi_src",), ".c", ".h")
        if path.name != "cn_atomic.h"
        for number, line in code_lines(path)
        if (found := MEMORY_ORDER.search(line))
    ]

    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("folders", "banned"),
    [(C_FOLDERS, BANNED_IN_C), (("cffi_src",), BANNED_IN_CORE)],
    ids=["everywhere", "core"],
)
def test_banned_functions_are_not_called(
    project_root: Path, folders: tuple[str, ...], banned: dict[str, str]
) -> None:
    """
    No call of a function that has no bound, hides state, starts a shell or ends the process.
    """
    call = re.compile(rf"(?<![\w.>])({'|'.join(banned)})\s*\(")
    wrong = [
        f"{path.relative_to(project_root)}:{number}: {found.group(1)}() {banned[found.group(1)]}"
        for path in files_in(project_root, folders, ".c", ".h")
        for number, line in code_lines(path)
        if (found := call.search(line))
    ]

    assert not wrong, "\n".join(wrong)


def test_lines_and_files_are_of_readable_size(project_root: Path) -> None:
    """
    No line over 100 columns, no file over 500 lines; a generated stub may be longer.
    """
    wrong = []
    c_files = files_in(project_root, C_FOLDERS, ".c", ".h")
    for path in [*c_files, *files_in(project_root, PYTHON_FOLDERS, ".py")]:
        where = path.relative_to(project_root)
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > FILE_LINES_MAX and not path.name.startswith("vectors_"):
            wrong.append(f"{where}: {len(lines)} lines, is it two things?")
        wrong += [
            f"{where}:{number}: {len(line)} columns"
            for number, line in enumerate(lines, start=1)
            if len(line) > LINE_LENGTH_MAX
        ]

    assert not wrong, "\n".join(wrong)


def test_python_functions_are_short(project_root: Path) -> None:
    """
    No function outside the tests is longer than 60 lines, its docstring not counted.
    """
    wrong = []
    for path in files_in(project_root, PYTHON_FOLDERS, ".py"):
        if "tests" in path.relative_to(project_root).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            lines = (node.end_lineno or node.lineno) - first.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                wrong.append(f"{path.relative_to(project_root)}:{node.lineno}: {lines} lines")

    assert not wrong, "\n".join(wrong)


def test_c_functions_are_short(project_root: Path) -> None:
    """
    No function of the C core is longer than 60 lines.
    """
    wrong = []
    for path in files_in(project_root, ("cffi_src",), ".c", ".h"):
        opened = 0
        for number, line in code_lines(path):
            if line.startswith("{"):
                opened = number
            elif line.startswith("}") and opened:
                lines = number - opened - 1
                if lines > FUNCTION_LINES_MAX:
                    wrong.append(f"{path.relative_to(project_root)}:{opened}: {lines} lines")
                opened = 0

    assert not wrong, "\n".join(wrong)


def test_no_tabs_and_no_trailing_blanks(project_root: Path) -> None:
    """
    Python and C are indented with spaces, and no line ends with one.
    """
    wrong = []
    c_files = files_in(project_root, C_FOLDERS, ".c", ".h")
    for path in [*c_files, *files_in(project_root, PYTHON_FOLDERS, ".py", ".pyi")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if "\t" in line or line != line.rstrip():
                wrong.append(f"{path.relative_to(project_root)}:{number}")

    assert not wrong, "\n".join(wrong)


def test_nothing_names_this_machine_or_unfinished_work(project_root: Path) -> None:
    """
    No absolute path of a developer's machine and no mark of unfinished work is in the tree.
    """
    folders = (*PYTHON_FOLDERS, "docs", "deploy", ".ci")
    names = ("Makefile", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py")
    tops = [project_root / name for name in names if (project_root / name).exists()]
    wrong = [
        f"{path.relative_to(project_root)}:{number}: {found.group()}"
        for path in [*tops, *files_in(project_root, folders, *TEXT_SUFFIXES, "")]
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if (found := NEVER_WRITTEN.search(line))
    ]

    assert not wrong, "\n".join(wrong)


def test_every_command_that_a_text_names_is_there(project_root: Path) -> None:
    """
    `cenote X`, in a message, a comment or the documentation, is a command that the tool has.
    """
    commands = {*cli.COMMANDS, cli.DEMO}
    folders = (*(f for f in PYTHON_FOLDERS if f != "tests"), "docs", "deploy")
    tops = [project_root / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    wrong = []
    for path in [*tops, *files_in(project_root, folders, *TEXT_SUFFIXES)]:
        where = str(path.relative_to(project_root))
        # a long message is several strings, one after the other
        text = re.sub(r"\"\s*\n\s*f?\"", "", path.read_text(encoding="utf-8"))
        named = set(re.findall(r"`(?:\w+=\S+ )?cenote\s+([a-z]\w*)", text)) - commands
        wrong += [f"{where}: `cenote {x}`" for x in named if (where, x) not in LATER_COMMANDS]

    assert not wrong, "\n".join(wrong)


def test_every_marker_pair_of_a_header_is_closed(project_root: Path) -> None:
    """
    cffi:begin and cffi:end alternate in each public header, so that Python sees what we think.
    """
    for path in files_in(project_root, ("cffi_src/include",), ".h"):
        marks = re.findall(r"/\* cffi:(begin|end) \*/", path.read_text(encoding="utf-8"))
        assert marks, path.name
        assert marks == ["begin", "end"] * (len(marks) // 2), path.name


def test_names_in_headers_carry_the_prefix(project_root: Path) -> None:
    """
    What a header of the core defines is called cn_ or CN_: it meets names of others there.
    """
    named = re.compile(
        r"^#\s*define\s+(?P<macro>\w+)|^(?:typedef\s+)?(?:struct|union|enum)\s+(?P<tag>\w+)\s*\{"
    )
    wrong = []
    for path in files_in(project_root, ("cffi_src",), ".h"):
        for number, line in code_lines(path):
            found = named.match(line)
            macro, tag = found.groups() if found else (None, None)
            if (macro and not macro.startswith("CN_")) or (tag and not tag.startswith("cn_")):
                wrong.append(f"{path.relative_to(project_root)}:{number}: {macro or tag}")

    assert not wrong, "\n".join(wrong)
