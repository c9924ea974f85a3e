# SPDX-License-Identifier: Apache-2.0
"""
Drop every chunk of a pool that nobody holds; the pool itself stays. An admin is needed.
"""

from __future__ import annotations

import argparse

from . import common, destroy
from .common import counted


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    destroy.add(parser)


def run(args: argparse.Namespace) -> int:
    """Do it and return the exit status."""
    with destroy.opened(args) as pool:
        destroy.confirm(args, f"Drop all chunks of {destroy.describe(pool, args.timeout)}?")
        dropped = pool.clear(args.timeout)
    if args.json:
        common.write_json({"pool": pool.name, "dropped": dropped})
    else:
        print(f"{counted(dropped, 'chunk')} of pool {pool.name} dropped")
    return common.EXIT_DONE
