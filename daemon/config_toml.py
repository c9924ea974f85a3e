# SPDX-License-Identifier: Apache-2.0
"""
Reading the TOML file, with the line of each key.

tomllib says where a syntax error is but not where a value came from; key_lines() finds that with a
scanner over text that tomllib has already accepted, so it need not judge, only count.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Final

from .config import ConfigError
from .config_build import KeyPath, Tree

FILE_MAX_BYTES: Final = 1024 * 1024

_HEADER: Final = re.compile(r"\s*(\[\[?)(.*?)\]\]?\s*(?:#.*)?$")
_KEY_PART: Final = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*""")
_POSITION: Final = re.compile(r" \(at line (\d+), column (\d+)\)")


def read_toml(path: Path) -> Tree:
    """
    Return the values in the file at *path*, each with its line.

    Raises:
        ConfigError: The file cannot be read, is too large, no UTF-8 or no TOML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            [f"{path}: cannot be read ({error.strerror}): correct --config or $CENOTE_CONFIG"]
        ) from error
    if len(data) > FILE_MAX_BYTES:
        raise ConfigError([f"{path}: larger than {FILE_MAX_BYTES} bytes: this is no configuration"])
    return parse_toml(data, str(path))


def parse_toml(data: bytes, name: str) -> Tree:
    """Return the values in *data*, with origins "name:line"; see read_toml() for errors."""
    try:
        text = data.decode()
        values = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{name}:{line}: this is not UTF-8: save the file as UTF-8"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(str(error), text, name)]) from error
    except RecursionError as error:
        raise ConfigError([f"{name}: nested too deeply: this is no configuration"]) from error
    origins = {path: f"{name}:{line}" for path, line in key_lines(text).items()}
    origins.setdefault((), name)
    return Tree(values, origins)


def _syntax_problem(message: str, text: str, name: str) -> str:
    position = _POSITION.search(message)
    line = int(position[1]) if position else len(text.splitlines())
    what = _POSITION.sub("", message).removesuffix(" (at end of document)")
    return f"{name}:{max(line, 1)}: no TOML: {what}: correct this line or the one before it"


def key_lines(text: str) -> dict[KeyPath, int]:
    """
    Return the line, from 1, of each section and key in *text*, which must be valid TOML.

    Keys of an inline table have no line of their own; that of the table serves.
    """
    lines: dict[KeyPath, int] = {}
    entries: dict[KeyPath, int] = {}
    table: KeyPath = ()
    value = _Value()
    for number, line in enumerate(text.split("\n"), start=1):
        if value.open:
            value.feed(line)
            continue
        header = _HEADER.match(line)
        if header:
            table = _enter(_key_parts(header[2]), header[1] == "[[", entries)
            lines.setdefault(table, number)
            lines.setdefault(table[:-1] if header[1] == "[[" else table, number)
            continue
        keys = _key_parts(line)
        if keys:
            path = table
            for key in keys:
                path = (*path, key)
                lines.setdefault(path, number)
            value.feed(line.partition("=")[2])
    return lines


def _enter(names: list[str], is_list: bool, entries: dict[KeyPath, int]) -> KeyPath:
    """Return the path that a header means now: lists have the index of their latest entry."""
    path: KeyPath = ()
    for depth, name in enumerate(names):
        path = (*path, name)
        if is_list and depth == len(names) - 1:
            entries[path] = entries.get(path, -1) + 1
        if path in entries:
            path = (*path, entries[path])
    return path


def _key_parts(text: str) -> list[str]:
    """Return the dotted key that *text* begins with: 'a."b c" = 1' -> ["a", "b c"]."""
    parts: list[str] = []
    position = 0
    while found := _KEY_PART.match(text, position):
        parts.append(next(group for group in found.groups() if group is not None))
        position = found.end()
        if text[position : position + 1] != ".":
            break
        position += 1
    return parts


class _Value:
    """Whether a value goes on in the next line: inside brackets or a string of several lines."""

    def __init__(self) -> None:
        self.depth = 0
        self.quote = ""

    @property
    def open(self) -> bool:
        return self.depth > 0 or bool(self.quote)

    def feed(self, line: str) -> None:
        position = 0
        while position < len(line):
            position = self._string(line, position) if self.quote else self._plain(line, position)
        if len(self.quote) == 1:  # only '''…''' and \"\"\"…\"\"\" span lines
            self.quote = ""

    def _plain(self, line: str, position: int) -> int:
        char = line[position]
        if char == "#":
            return len(line)
        if char in "\"'":
            self.quote = char * 3 if line.startswith(char * 3, position) else char
            return position + len(self.quote)
        self.depth += (char in "[{") - (char in "]}")
        return position + 1

    def _string(self, line: str, position: int) -> int:
        if line[position] == "\\" and self.quote[0] == '"':
            return position + 2
        if not line.startswith(self.quote, position):
            return position + 1
        end = position + len(self.quote)
        # Up to two quotes may stand before the closing three.
        while len(self.quote) == 3 and line[end : end + 1] == self.quote[0]:
            end += 1
        self.quote = ""
        return end
