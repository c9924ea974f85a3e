# SPDX-License-Identifier: Apache-2.0
"""
Engines in two seconds rather than thirty: a process that has imported vLLM forks them.

    with Nursery(folder) as nursery:
        with nursery.start(model, connector=...) as engine:
            ...

Why a fork is safe there, and what is the same as in production, stands in engine_host.py. With
CENOTE_VLLM_FORK=no the same calls start engines as vLLM does.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from tests.engine.engines import START_S, Connector, Engine, EngineFailed
from tests.engine.processes import engine_environment, kill_and_wait, nursery_command, wait_gone

FORK: Final = os.environ.get("CENOTE_VLLM_FORK", "yes") != "no"


class Nursery:
    """
    Where engines come from. Leaving the `with` block ends it, and what is left of its engines.

    Args:
        folder: For logs and sockets, one folder an engine.
        fork: False: start every engine as vLLM does.
        newer: Engines of the newer release of vLLM; they are forked in any case.
    """

    def __init__(self, folder: Path, *, fork: bool = FORK, newer: bool = False) -> None:
        self.folder, self.fork, self.newer = folder, fork or newer, newer
        folder.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count()
        self._engines: list[Engine] = []
        self._process: subprocess.Popen[str] | None = None

    def start(
        self,
        model: Path,
        *,
        connector: Connector | None = None,
        environment: Mapping[str, str] | None = None,
        events: bool = False,
        **arguments: Any,
    ) -> Engine:
        """Start an engine; the arguments are those of Engine.start()."""
        number = next(self._numbers)
        at = self.folder / f"engine{number}"
        at.mkdir(parents=True)
        more = {
            "connector": connector,
            "environment": environment,
            "events": events,
            "folder": at,
            **arguments,
        }
        if not self.fork:
            engine = Engine.start(model, **more)
        else:
            engine = Engine.adopt(self._connect(), model, **more)
        self._engines.append(engine)
        return engine

    def _connect(self) -> socket.socket:
        """A connection to the nursery, which is a new engine host; the first one starts it."""
        path, log_path = self.folder / "nursery.sock", self.folder / "nursery.log"
        if self._process is None:
            with log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    nursery_command(path),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=engine_environment(newer=self.newer),
                )
            assert self._process.stdout is not None
            while (line := self._process.stdout.readline()) and line.strip() != "ready":
                pass
            if not line:
                status = self._process.wait()
                said = log_path.read_text(errors="replace")[-4000:]
                raise EngineFailed(f"the nursery ended with status {status}:\n{said}")
        channel = socket.socket(socket.AF_UNIX)
        channel.settimeout(START_S)
        channel.connect(str(path))
        return channel

    def close(self) -> None:
        """End everything that it started."""
        for engine in self._engines:
            engine.close()
        process, self._process = self._process, None
        if process is not None:
            kill_and_wait([process.pid])
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
            wait_gone([pid for engine in self._engines for pid in engine.pids.values()])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
