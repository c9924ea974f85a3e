# SPDX-License-Identifier: Apache-2.0
"""
Forks processes that run the functions of a script, on request, and reaps them.

    zygote.py SCRIPT FD    requests are JSON, each a packet on the socket FD, answered by a number

It has imported the client and never attached, so that its children may (a child of an attached
process may not, I13). A request to fork carries a socket: the child's stdin and stdout. Children
are killed when the zygote ends, which is killed when pytest does.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from typing import Any, Final, NoReturn

import cenote.client
import cenote.client.testing  # noqa: F401 - so that no child has to

RAISED: Final = 70  # the exit status of a child that ended in an exception; its text is in stderr
REQUEST_BYTES_MAX: Final = 4096
PR_SET_PDEATHSIG: Final = 1
LIBC: Final = ctypes.CDLL(None)


def run(function: Any, stdio: int, args: list[Any], zygote: int) -> NoReturn:
    """Be the child."""
    status = RAISED
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote:
        os._exit(status)  # it ended before it could be told of
    try:
        for standard in (0, 1):
            os.dup2(stdio, standard)
        os.close(stdio)
        function(*args)
        status = 0
    except BaseException:  # noqa: BLE001 - whatever it was, it must be seen
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> None:
    """Answer requests until the socket ends."""
    importlib.metadata.version("cenote")  # warms its caches for the children's hello
    functions = runpy.run_path(sys.argv[1])
    requests = socket.socket(fileno=int(sys.argv[2]))
    own_pid = os.getpid()
    while True:
        line, fds, _, _ = socket.recv_fds(requests, REQUEST_BYTES_MAX, 1)
        if not line:
            return
        op, *rest = json.loads(line)
        if op == "spawn":
            name, args = rest
            answer = os.fork()
            if answer == 0:
                requests.close()
                run(functions[name], fds[0], args, own_pid)
            os.close(fds[0])
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1])
        requests.send(str(answer).encode())


if __name__ == "__main__":
    main()
