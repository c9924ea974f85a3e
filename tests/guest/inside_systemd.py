# SPDX-License-Identifier: Apache-2.0
"""
What runs as root in the guest of test_systemd.py: the service under the systemd that is PID 1
there, and a client of it, this process. One line of JSON a case on stdout, {case, seconds, facts},
with an error in place of facts where one was raised. What is right is said by test_systemd.py.

A wait has no limit here: guestrun.sh has one for all.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from cenote.client import Cache, Manifest, Pool, connect
from cenote.client.connection import Backoff
from cenote.shm.errors import CenoteError
from cenote.shm.takeover import DIRTY_STARTS_S

HERE: Final = Path(__file__).resolve().parent
UNIT: Final = "cenoted.service"
CHUNKS: Final = 100
CHUNK_BYTES: Final = 70_000
SESSIONS: Final = 300
MANIFEST: Final = Manifest("m", "l", "uint8", 16)
SOON: Final = Backoff(first_s=0.05, last_s=0.1)
STORE_MATURE: Final = 254  # from here on it outlives a stop, and can be looked at and cleaned
SETTLE_S: Final = 0.05  # between two looks

CONFIG: Final = """\
[daemon]
run_dir = "/run/cenote"
log_format = "json"

[[pool]]
name = "default"

[[pool.region]]
medium = "memfd"
size = "32MiB"

[pool.access]
admins = ["root", "cenote"]
"""

# As pip would write it, but for the flag: nothing of the working directory is imported.
PROGRAM: Final = """\
#!/usr/bin/python3 -P
import sys
from cenote.daemon.main import main
sys.exit(main())
"""

OTHER_CLIENT: Final = """\
import sys
from cenote.client import Manifest, connect
pool = connect(timeout_s=300.0)
cache = pool.namespace(Manifest("m", "l", "uint8", 16), timeout_s=300.0)
keys = [n.to_bytes(8, "little") * 4 for n in range(1000, 1003)]
for key in keys:
    cache.put_many(key, [bytes(5000)])
cache.flush(timeout_s=300.0)
held = [cache.get(key) for key in keys]
print(sum(chunk is not None for chunk in held), flush=True)
sys.stdin.read()
"""


def run(*argv: str) -> str:
    """Run a program that must succeed; return what it said."""
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"{argv}: status {ran.returncode}: {ran.stderr}")
    return ran.stdout


def wait_until(true: Callable[[], Any]) -> None:
    """Return once it is so."""
    pause = threading.Event()
    while not true():
        pause.wait(SETTLE_S)


def show(name: str) -> str:
    """Return a property of the unit."""
    return run("systemctl", "show", "-P", name, UNIT).strip()


def stored() -> int:
    """Return how many descriptors systemd keeps for the unit."""
    return int(show("NFileDescriptorStore"))


def events(*names: str) -> list[dict[str, Any]]:
    """Return what the daemons logged so far, of some kinds."""
    lines = run("journalctl", "-u", UNIT, "-o", "cat", "--no-pager").splitlines()
    parsed = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in parsed if line["event"] in names]


def key_of(n: int) -> bytes:
    """Return the key of chunk *n*."""
    return n.to_bytes(8, "little") * 4


def bytes_of(n: int) -> bytes:
    """Return what it holds."""
    return (n * 2654435761 % 2**32).to_bytes(4, "little") * (CHUNK_BYTES // 4)


def stored_names() -> list[str]:
    """Return the names of what is stored, without the pool's id and the session's numbers."""
    told = run("systemd-analyze", "fdstore", "--json=short", UNIT)
    varying = re.compile(r"[0-9a-f]{16}|(?<=s)[0-9.]+[0-9]")
    return sorted(varying.sub("*", stored["fdname"]) for stored in json.loads(told))


class Client:
    """An attachment that lives through all of it, and two views that it holds."""

    def __init__(self) -> None:
        self.pool: Pool = connect(timeout_s=300.0, reconnect=SOON)
        self.cache: Cache = self.pool.namespace(MANIFEST, timeout_s=300.0)
        for n in range(CHUNKS):
            self.cache.put_many(key_of(n), [bytes_of(n)])
        self.cache.flush(timeout_s=300.0)
        self.held = [self.cache.get(key_of(n)) for n in (3, 77)]

    def session(self) -> tuple[str, int, int]:
        """Return which session of which pool it is."""
        welcome = self.pool._attachment.welcome
        return welcome.pool_id.hex(), welcome.session, welcome.nonce

    def views_good(self) -> bool:
        """Have the held views the bytes that were stored?"""
        pairs = zip(self.held, (3, 77), strict=True)
        return all(c is not None and bytes(c.memory) == bytes_of(n) for c, n in pairs)

    def good_chunks(self) -> int:
        """Return how many of the chunks are there with their bytes."""
        good = 0
        for n in range(CHUNKS):
            chunk = self.cache.get(key_of(n))
            if chunk is not None:
                with chunk:
                    good += bytes(chunk.memory) == bytes_of(n)
        return good

    @contextlib.contextmanager
    def through(self) -> Iterator[dict[str, Any]]:
        """Yield facts, to which is added what became of us when the daemon was replaced."""
        facts: dict[str, Any] = {}
        session, count, pid = self.session(), self.pool.reconnects, show("MainPID")
        taken, made = len(events("pool_taken_over")), len(events("ready"))
        yield facts
        wait_until(lambda: self.pool.reconnects > count and self.pool.connected)
        wait_until(lambda: len(events("ready")) > made)
        facts["views_good"] = self.views_good()
        facts["same_pool"] = self.session()[0] == session[0]
        facts["same_session"] = self.session() == session
        facts["other_process"] = show("MainPID") != pid
        facts["taken_over"] = events("pool_taken_over")[taken:]
        if not facts["same_pool"]:
            self.cache = self.pool.namespace(MANIFEST, timeout_s=300.0)
        facts["good_chunks"] = self.good_chunks()
        facts["stored"] = stored()
        facts["memory"] = int(show("MemoryCurrent"))


class Cases:
    """The cases, in the order in which they run; each returns its facts."""

    client: Client
    version: int

    def install(self) -> dict[str, Any]:
        """As docs/operations.md says."""
        argv = "--system --home-dir /nonexistent --shell /usr/sbin/nologin cenote"
        run("useradd", *argv.split())
        Path("/etc/cenote").mkdir()
        Path("/etc/cenote/cenoted.toml").write_text(CONFIG)
        program = Path("/usr/local/bin/cenoted")
        program.write_text(PROGRAM)
        program.chmod(0o755)
        run("cp", str(HERE / UNIT), f"/etc/systemd/system/{UNIT}")
        run(sys.executable, "-m", "compileall", "-q", str(HERE / "lib"))
        run("systemctl", "daemon-reload")
        self.version = int(run("systemctl", "--version").split()[1])
        return {"version": self.version, "store_max": int(show("FileDescriptorStoreMax"))}

    def start(self) -> dict[str, Any]:
        """Type=notify: it is ready when `systemctl start` returns."""
        run("systemctl", "enable", "--now", UNIT)
        self.client = Client()
        return {
            "state": show("ActiveState"),
            "stored": stored(),
            "names": stored_names() if self.version >= STORE_MATURE else [],
            "good_chunks": self.client.good_chunks(),
            "memory": int(show("MemoryCurrent")),
            "warnings": events("no_descriptor_store", "custody_elsewhere"),
        }

    def crash(self) -> dict[str, Any]:
        """kill -9."""
        with self.client.through() as facts:
            run("systemctl", "kill", "-s", "KILL", UNIT)
            facts["found_without_daemon"] = self.client.good_chunks()
        facts["restarts"] = int(show("NRestarts"))
        return facts

    def restart(self) -> dict[str, Any]:
        """systemctl restart."""
        with self.client.through() as facts:
            run("systemctl", "restart", UNIT)
        return facts

    def stop_start(self) -> dict[str, Any]:
        """systemctl stop, what the packages of an upgrade do to systemd meanwhile, start."""
        with self.client.through() as facts:
            run("systemctl", "stop", UNIT)
            facts["state"] = show("ActiveState")
            facts["stored_stopped"] = stored()
            facts["found_without_daemon"] = self.client.good_chunks()
            run("systemctl", "daemon-reload")
            run("systemctl", "daemon-reexec")
            run("systemctl", "start", UNIT)
        return facts

    def other_dies(self) -> dict[str, Any]:
        """Another client, killed while the daemon runs."""
        before = stored()
        other = self._other()
        facts = {"before": before, "with_other": stored()}
        other.send_signal(signal.SIGKILL)
        other.communicate()
        wait_until(lambda: stored() == before)
        return {**facts, "after": stored()}

    def other_dies_meanwhile(self) -> dict[str, Any]:
        """Another client, killed while no daemon is there; and one that lives."""
        doomed, living = self._other(), self._other()
        with self.client.through() as facts:
            run("systemctl", "kill", "-s", "KILL", UNIT)
            doomed.send_signal(signal.SIGKILL)
            doomed.communicate()
        wait_until(lambda: self.client.pool.stats(timeout_s=300.0).sessions == 2)
        wait_until(lambda: stored() == 2 + 3 * 2)
        facts["with_living"] = stored()
        living.communicate()
        wait_until(lambda: stored() == 2 + 3)
        return facts

    def many_sessions(self) -> dict[str, Any]:
        """Sessions come and go."""
        before = self._daemon_fds(), stored()
        for _ in range(SESSIONS):
            connect(timeout_s=300.0).close()
        wait_until(lambda: self.client.pool.stats(timeout_s=300.0).sessions == 1)
        wait_until(lambda: (self._daemon_fds(), stored()) == before)
        return {"before": before, "after": (self._daemon_fds(), stored())}

    def clean(self) -> dict[str, Any]:
        """systemctl clean --what=fdstore, from systemd 254 on."""
        with self.client.through() as facts:
            run("systemctl", "stop", UNIT)
            run("systemctl", "clean", "--what=fdstore", UNIT)
            facts["stored_stopped"] = stored()
            run("systemctl", "start", UNIT)
        return facts

    def small_store(self) -> dict[str, Any]:
        """A drop-in makes the store smaller than the unit's variable says."""
        drop_in = Path(f"/etc/systemd/system/{UNIT}.d/small.conf")
        drop_in.parent.mkdir()
        drop_in.write_text("[Service]\nFileDescriptorStoreMax=6\n")
        run("systemctl", "daemon-reload")
        with self.client.through() as facts:
            run("systemctl", "restart", UNIT)
        try:
            connect(timeout_s=300.0).close()
            facts["refused"] = ""
        except CenoteError as error:
            facts["refused"] = str(error)
        drop_in.unlink()
        run("systemctl", "daemon-reload")
        run("systemctl", "restart", UNIT)
        wait_until(lambda: self.client.pool.connected)
        return facts

    def dies_again_and_again(self) -> dict[str, Any]:
        """kill -9 until the old pool is given up, or more than a minute is over."""
        before = self.client.session()[0]
        started, kills = time.monotonic(), 0
        while not events("pool_not_kept") and time.monotonic() - started < DIRTY_STARTS_S:
            with self.client.through() as facts:
                run("systemctl", "kill", "-s", "KILL", UNIT)
            kills += 1
        facts["given_up"] = [event["error"] for event in events("pool_not_kept")]
        facts["same_pool"] = self.client.session()[0] == before
        return {**facts, "kills": kills, "state": show("ActiveState")}

    def disabled(self) -> dict[str, Any]:
        """Nothing wants the service any more: systemd forgets it when it stops. The last case."""
        run("systemctl", "disable", UNIT)
        run("systemctl", "stop", UNIT)
        return {"stored_stopped": stored(), "views_good": self.client.views_good()}

    def _other(self) -> subprocess.Popen[str]:
        argv = [sys.executable, "-P", "-c", OTHER_CLIENT]
        pipe = subprocess.PIPE
        other = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "3\n"
        return other

    def _daemon_fds(self) -> int:
        return len(list(Path(f"/proc/{show('MainPID')}/fd").iterdir()))


def main() -> None:
    """Run the cases that are named, in this order."""
    cases = Cases()
    for name in sys.argv[1:]:
        started = time.monotonic()
        line: dict[str, Any] = {"case": name}
        try:
            line["facts"] = getattr(cases, name)()
        except Exception:  # noqa: BLE001 - told, and the end
            line["error"] = traceback.format_exc()
        line["seconds"] = round(time.monotonic() - started, 1)
        print(json.dumps(line), flush=True)
        if "error" in line:
            break
    print(run("journalctl", "-u", UNIT, "--no-pager", "-o", "short-monotonic"), flush=True)


if __name__ == "__main__":
    main()
