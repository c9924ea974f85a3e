# SPDX-License-Identifier: Apache-2.0
"""Where peers come from: PyPI, into environments of their own, and Debian's archive."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from .base import Environment, Need, Peer, Unavailable
from .processes import tail

ROOT: Final = Path(__file__).resolve().parent.parent.parent
VENVS: Final = ROOT / "build" / "peers" / "venv"
INSTALL_S: Final = 1800
PACKAGE_MB: Final = 5  # a server of Debian's with what it needs


def python_of(environment: Environment | None) -> str:
    """Return the interpreter of an environment; of this one for None."""
    if environment is None:
        return sys.executable
    return str(VENVS / environment.name / "bin" / "python")


def is_installed(environment: Environment) -> bool:
    """Did an earlier run install exactly these requirements?"""
    stamp = _stamp(environment)
    return stamp.exists() and stamp.read_text() == _wanted(environment)


def missing_packages(peer: type[Peer]) -> list[str]:
    """Return the Debian packages that this peer lacks."""
    return [need.package for need in peer.needs if not _is_met(need)]


def _is_met(need: Need) -> bool:
    if need.program:
        return shutil.which(need.program) is not None
    try:
        ctypes.CDLL(need.library)
    except OSError:
        return False
    return True


def plan(peers: Iterable[type[Peer]]) -> list[str]:
    """Return, a line each, what a run will fetch before it measures."""
    lines: dict[str, None] = {}
    for peer in peers:
        for package in missing_packages(peer) if os.geteuid() == 0 else []:
            lines[f"Debian package {package}: about {PACKAGE_MB} MB, for the whole system"] = None
        wanted = peer.environment
        if wanted and not is_installed(wanted):
            where = (VENVS / wanted.name).relative_to(ROOT)
            lines[
                f"PyPI, {', '.join(_requirements(wanted))}: about {wanted.download_mb} MB, "
                f"{wanted.disk_mb} MB of disk in {where}"
            ] = None
    return list(lines)


def provide(peer: type[Peer]) -> float:
    """
    Install what the peer needs, unless it is there. Returns the seconds that took.

    Raises:
        Unavailable: It could not be installed; the message says why and what to do.
    """
    started_s = time.monotonic()
    for package in missing_packages(peer):
        _install_package(package)
    if peer.environment and not is_installed(peer.environment):
        _install_environment(peer.environment)
    return time.monotonic() - started_s


def _install_package(package: str) -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable(
            f"{package} is not installed, and only root can: apt-get install {package}"
        )
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", package]
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    _call(command, VENVS.parent / f"{package}.log", environment)


def _install_environment(wanted: Environment) -> None:
    folder = VENVS / wanted.name
    VENVS.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(VENVS).free >> 20
    if free_mb < 2 * wanted.disk_mb:
        raise Unavailable(
            f"{wanted.name} wants {2 * wanted.disk_mb} MB of disk, {free_mb} are free"
        )
    log = VENVS.parent / f"{wanted.name}.log"
    _call([sys.executable, "-m", "venv", "--clear", str(folder)], log)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-input", "-q"]
    _call([*pip, *_requirements(wanted)], log)
    _stamp(wanted).write_text(_wanted(wanted))


def _call(command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        try:
            status = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                timeout=INSTALL_S,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"not installed within {INSTALL_S} s: {tail(log)}") from error
    if status:
        raise Unavailable(f"installing ended with status {status}: {tail(log)}")


def _requirements(environment: Environment) -> tuple[str, ...]:
    """Where torch is among them, $TORCH says which one, as in the Makefile."""
    torch = os.environ.get("TORCH")
    return tuple(
        torch if torch and r.startswith("torch==") else r for r in environment.requirements
    )


def _wanted(environment: Environment) -> str:
    return "\n".join([sys.version.split()[0], *_requirements(environment)]) + "\n"


def _stamp(environment: Environment) -> Path:
    return VENVS / environment.name / "installed.txt"
