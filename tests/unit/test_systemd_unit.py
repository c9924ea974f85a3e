# SPDX-License-Identifier: Apache-2.0
"""The systemd units of deploy/: every directive is explained, fits, and is understood."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cenote.daemon.custody_systemd import STORE_MAX_ENV
from cenote.daemon.holder import KEPT_MAX
from cenote.daemon.main import DESCRIPTORS_WANTED, EXIT_USAGE
from cenote.shm.takeover import DIRTY_STARTS_MAX, DIRTY_STARTS_S


@pytest.fixture
def unit(project_root: Path) -> Path:
    """The unit file."""
    return project_root / "deploy" / "systemd" / "cenoted.service"


def test_the_unit_fits_the_daemon(unit: Path) -> None:
    """
    It waits for READY=1, starts cenoted, reloads by SIGHUP, and does not try again with a
    configuration that cannot work.
    """
    parsed = configparser.ConfigParser(interpolation=None, strict=True)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(unit.read_text(encoding="utf-8"))
    service = parsed["Service"]

    assert service["Type"] == "notify"
    assert Path(service["ExecStart"]).name == "cenoted"
    assert service["ExecReload"].endswith("-HUP $MAINPID")
    assert service["RestartPreventExitStatus"] == str(EXIT_USAGE)
    assert service["LimitNOFILE"] == str(DESCRIPTORS_WANTED)
    assert service["RuntimeDirectory"] == "cenote"
    assert service["User"] != "root"


def test_the_unit_keeps_the_pools(unit: Path) -> None:
    """
    The store has room for two full pools, a systemd that does not tell is told by the unit, and the
    daemon gives a pool up before systemd gives the service up.
    """
    parsed = configparser.ConfigParser(interpolation=None, strict=True)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(unit.read_text(encoding="utf-8"))
    service = parsed["Service"]

    assert int(service["FileDescriptorStoreMax"]) == 2 * KEPT_MAX
    assert service["Environment"] == f"{STORE_MAX_ENV}={service['FileDescriptorStoreMax']}"
    assert service["FileDescriptorStorePreserve"] == "yes"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    minutes = re.fullmatch(r"(\d+)min", parsed["Unit"]["StartLimitIntervalSec"])
    assert minutes is not None
    assert 60 * int(minutes[1]) >= DIRTY_STARTS_S
    assert int(parsed["Unit"]["StartLimitBurst"]) > DIRTY_STARTS_MAX + 1


def test_each_directive_of_the_service_is_explained(unit: Path) -> None:
    """
    Above each block of directives of [Service] stands a comment, but for the list of what is
    denied, which has one for all.
    """
    service = unit.read_text(encoding="utf-8").partition("[Service]\n")[2].partition("[Install]")[0]
    explained, _, denied = service.partition("# Beneath:")
    assert denied
    previous = ""
    bare = []
    for line in explained.splitlines():
        if re.match(r"[A-Z]\w+=", line) and not previous.startswith("#"):
            bare.append(line)
        previous = line

    # the second of two directives that one comment explains
    assert bare == [
        "NotifyAccess=main",
        "Group=cenote",
        "RuntimeDirectoryMode=0755",
        "RestartSec=1s",
    ]


def test_systemd_understands_the_unit(unit: Path, tmp_path: Path) -> None:
    """
    systemd-analyze verify has nothing to say but, before 254, that it does not know what keeps the
    store over a stop.
    """
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    copy = tmp_path / unit.name
    text = unit.read_text(encoding="utf-8")
    copy.write_text(text.replace("/usr/local/bin/cenoted", sys.executable))
    ran = subprocess.run(
        [analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )

    said = [x for x in ran.stderr.splitlines() if unit.name in x]
    version = subprocess.run([analyze, "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.split()[1]) < 254:
        said = [x for x in said if "Unknown key 'FileDescriptorStorePreserve'" not in x]
    assert (ran.returncode, said) == (0, [])


def test_systemd_understands_the_drop_in_for_vllm(project_root: Path, tmp_path: Path) -> None:
    """
    deploy/vllm/cenote.conf beside a unit with the ExecStart of the README there: nothing to say,
    and what vLLM gets is JSON that names the connector.
    """
    folder = project_root / "deploy" / "vllm"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ExecStart=(.*)$", readme, re.MULTILINE)
    given = json.loads(shlex.split(line)[-1])
    assert given["kv_connector"] == "CenoteConnector"
    assert not set(line) & set("%$\\")  # systemd would replace these

    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    unit = tmp_path / "vllm.service"
    start = line.replace("/opt/vllm/bin/vllm", sys.executable)
    unit.write_text(f"[Service]\nExecStart={start}\n")
    drop_in = tmp_path / "vllm.service.d" / "cenote.conf"
    drop_in.parent.mkdir()
    shutil.copy(folder / drop_in.name, drop_in)
    ran = subprocess.run(
        [analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )

    said = [x for x in ran.stderr.splitlines() if unit.name in x]
    assert (ran.returncode, said) == (0, [])
