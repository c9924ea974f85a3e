# SPDX-License-Identifier: Apache-2.0
"""
The command line tool `cenote`: looks at the pool of this host, and measures it.

Exit status: 0 done, 1 found something wrong, 2 usage, 3 no daemon or pool.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Final

from cenote.client.errors import CenoteError
from cenote.shm.facts import printable

from . import common

INTERRUPTED: Final = 130

# name -> what the list of commands says; each is a module of this folder with add() and run()
COMMANDS: Final = {
    "status": "the pool, its namespaces and sessions",
    "top": "the same, live, with rates",
    "ls": "list chunks",
    "explain": "what became of a key",
    "verify": "check the tables and the bytes of a pool, with a daemon or without",
    "clear": "drop every chunk that nobody holds",
    "destroy": "end a pool and give its memory back",
    "bench": "measure hits, matches and copies here",
}
DEMO: Final = "demo"
OWN_OPTIONS: Final = ("-h", "--help", "--version")  # the only ones before a command


def new_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole tool."""
    parser = argparse.ArgumentParser(
        prog="cenote",
        description="Look at the KV-cache pool of this host.",
        epilog="Exit status: 0 done, 1 found something wrong, 2 usage, 3 no daemon or pool.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cenote {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shared = common.parent_parser()
    for name, what in COMMANDS.items():
        one = commands.add_parser(name, help=what, parents=[shared], allow_abbrev=False)
        module = importlib.import_module(f".{name}", __package__)
        one.description = (module.__doc__ or "").strip()
        one.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add(one)
        one.set_defaults(run=module.run)
    commands.add_parser(DEMO, help="two processes with a real model share their KV cache")
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("cenote")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == [DEMO]:  # it has a command line of its own, and needs torch
        from .demo import main as demo

        return int(demo(argv[1:]) or common.EXIT_DONE)
    _check_order(argv)
    args = new_parser().parse_args(argv)
    return int(args.run(args))


def _check_order(argv: list[str]) -> None:
    """Refuse an option before the command: argparse would call it unknown, which it is not."""
    first = argv[0] if argv else ""
    if first.startswith("-") and first not in OWN_OPTIONS:
        raise common.Failure(
            f"{printable(first)!r} stands before the command: options go behind it, as in "
            "`cenote status --json`. `cenote COMMAND --help` lists those of a command",
            common.EXIT_USAGE,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    try:
        return _finished(_dispatch(list(sys.argv[1:] if argv is None else argv)))
    except common.Failure as failure:
        return _say(str(failure), failure.status)
    except BrokenPipeError:
        # whoever read our output has enough; the interpreter must not complain at its end
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return common.EXIT_DONE
    except (CenoteError, OSError) as error:
        return _say(str(error), common.status_of(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def _finished(status: int) -> int:
    sys.stdout.flush()  # here, where a broken pipe is expected
    return status


def _say(text: str, status: int) -> int:
    print(f"cenote: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
