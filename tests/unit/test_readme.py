# SPDX-License-Identifier: Apache-2.0
"""The example in README.md works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

PATIENCE_S: Final = 60  # a limit for a hang, not a claim about speed


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A daemon as the README starts it, but at a path of its own; where clients find it."""
    found = {**os.environ, "CENOTE_SOCKET": str(tmp_path / "readme.sock")}
    command = [sys.executable, "-m", "cenote.daemon.main", "--size", "64MiB"]
    command += ["--name", f"readme{os.getpid()}", "--socket", found["CENOTE_SOCKET"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=found) as daemon:
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline().startswith("ready ")
            yield found
        finally:
            daemon.terminate()
            daemon.wait(PATIENCE_S)


def test_the_example_shares_chunks_between_two_processes(
    project_root: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    """
    writer.py and reader.py, run one after the other, print what the README says they print.
    """
    readme = (project_root / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", readme, re.DOTALL)
    printed = re.findall(r"```console\n(\$ cenoted.*?)```", readme, re.DOTALL)
    assert [name for name, _ in blocks] == ["writer.py", "reader.py"]

    said = ""
    for name, code in blocks:
        (tmp_path / name).write_text(code)
        ran = subprocess.run(
            [sys.executable, name],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        said += ran.stdout

    lines = [line for line in printed[0].splitlines() if not line.startswith(("$", "ready"))]
    assert said.splitlines() == lines


def test_links_lead_somewhere(project_root: Path) -> None:
    """
    Every relative link of README.md and of the pages in docs/ names a file and, after #, a heading.
    """
    pages = [project_root / "README.md", project_root / "CONTRIBUTING.md"]
    pages += sorted((project_root / "docs").rglob("*.md"))
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(project_root)}: {target}")

    assert not broken, "\n".join(broken)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of *page*, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_files_that_the_pages_name_exist(project_root: Path) -> None:
    """
    A path in backquotes, such as `tests/crash/test_x.py`, is a file of this repository; a name
    after it, `::test_y`, is a test in it.
    """
    named = re.compile(
        r"`((?:tests|docs|deploy|bench|cffi_src|shm|numa|client|daemon)/[\w./-]+\.\w+)(?:::(\w+))?`"
    )
    wrong = []
    for page in [project_root / "README.md", *sorted((project_root / "docs").rglob("*.md"))]:
        for path, test in named.findall(page.read_text(encoding="utf-8")):
            file = project_root / path
            if not file.exists() or (test and test not in file.read_text(encoding="utf-8")):
                wrong.append(f"{page.relative_to(project_root)}: {path} {test}".rstrip())

    assert not wrong, "\n".join(wrong)


def test_tests_and_functions_that_the_pages_name_exist(project_root: Path) -> None:
    """
    `test_x` in the documentation is a test, and `cn_x()` a function of the C core.
    """
    sources = [*(project_root / "tests").rglob("*.py"), *(project_root / "tests").rglob("*.c")]
    tests = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    core = "\n".join(
        path.read_text(encoding="utf-8") for path in (project_root / "cffi_src").rglob("*.[ch]")
    )
    wrong = []
    for page in sorted((project_root / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        wrong += [
            f"{page.name}: {name}"
            for name in set(re.findall(r"`(test_\w+)`", text))
            if not re.search(rf"\b{name}\(", tests)
        ]
        wrong += [
            f"{page.name}: {name}()"
            for name in set(re.findall(r"`(cn_\w+)\(\)`", text))
            if not re.search(rf"\b{name}\(", core)
        ]

    assert not wrong, "\n".join(wrong)
