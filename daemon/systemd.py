# SPDX-License-Identifier: Apache-2.0
"""
Telling systemd how we are, by sd_notify(3)'s datagrams. Without $NOTIFY_SOCKET nothing happens.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Final

from .logs import get_log

USEC_PER_S: Final = 1_000_000

log = get_log(__name__)


def notify_address(environ: Mapping[str, str]) -> str:
    """Return where systemd listens, as bind(2) and connect(2) want it, or ""."""
    address = environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):  # the abstract name space
        return "\0" + address[1:]
    return address if address.startswith("/") else ""


def notify(state: str, environ: Mapping[str, str] | None = None) -> bool:
    """Send *state* ("READY=1", several separated by line ends); return whether it went."""
    address = notify_address(os.environ if environ is None else environ)
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            log.warning("notify_failed", exc=error)
            return False
    return True


def watchdog_period_s(pid: int, environ: Mapping[str, str] | None = None) -> float | None:
    """Return how often systemd wants WATCHDOG=1, halved as it recommends; None: never."""
    environ = os.environ if environ is None else environ
    usec, for_pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or int(usec) == 0 or (for_pid and for_pid != str(pid)):
        return None
    return int(usec) / USEC_PER_S / 2
