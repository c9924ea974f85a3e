# SPDX-License-Identifier: Apache-2.0
"""
The daemon of bench/replay.py: cenoted itself, whose keepers go by the trace's clock.

    python bench/replay_daemon.py FOLDER [flags of cenoted]

An hour of trace is replayed in a minute, and policies that measure ages in seconds would see the
hour squeezed. So this process is cenoted (its configuration, objects, socket and keeper) and maps
one page of FOLDER more, in which the clients advance the clock as they take requests. Everything
else, the death of sessions and every wait included, goes by the real clock.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench.replay_client import SharedWords  # noqa: E402  # needs the path above

from cenote._native import _core  # noqa: E402
from cenote.daemon import config_sources, logs  # noqa: E402
from cenote.daemon.main import Daemon  # noqa: E402
from cenote.shm.errors import check  # noqa: E402

if TYPE_CHECKING:
    from cenote.shm.host import PoolHost


def follow(host: PoolHost, words: SharedWords) -> None:
    """Have the keeper of *host* go by the clock in *words*, which must outlive it."""
    now_ns = _core.ffi.cast("uint64_t *", _core.ffi.from_buffer(words.page))
    with host._command() as keeper:
        status = _core.lib.cn_keeper_set_clock(keeper, now_ns)
    check(status, f"give pool {host.name!r} the trace's clock")


def main(argv: list[str] | None = None) -> int:
    """The exit status of cenoted."""
    folder, *flags = sys.argv[1:] if argv is None else argv
    startup = config_sources.load(flags)
    logs.configure(startup.config.log_level, startup.config.log_format)
    words = SharedWords(Path(folder))
    daemon = Daemon(flags, startup)
    try:
        daemon.make()
        for served in daemon._pools:
            follow(served.host, words)
        return asyncio.run(daemon.run())
    finally:
        daemon.drop()
        logs.flush(everything=True)


if __name__ == "__main__":
    sys.exit(main())
