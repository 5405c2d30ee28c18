"""What the tests share: the repository, its notebook, and what runs on the machine."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
sys.path.append(str(ROOT / "ci"))  # Last: ci/anyscale must not hide the package.


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: ten minutes of load, with `make soak`")


@pytest.fixture(scope="session")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebook.ipynb", as_version=4)


@pytest.fixture(scope="session")
def cell(notebook):
    """The source of the cell with a given id."""
    sources = {cell.id: cell.source for cell in notebook.cells}
    return sources.__getitem__


@pytest.fixture(scope="session")
def quoted(cell):
    """Check that what the troubleshooting section quotes was really said. `...` in a quotation stands for anything."""

    def quoted(quotation: str, said: str) -> None:
        assert f'"{quotation}"' in cell("troubleshooting"), f"The text doesn't quote: {quotation}"
        pattern = ".*".join(map(re.escape, quotation.split("...")))
        assert re.search(pattern, " ".join(said.split())), f"{quotation}\nis quoted, but this was said:\n{said}"

    return quoted


def run(*command: str, timeout_s: float = 300, **env: str) -> subprocess.CompletedProcess:
    """Run `command` in the repository, with stdout and stderr together as text; `env` is added to the environment."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        timeout=timeout_s,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )


OURS = re.compile(
    r"bin/(ray|serve|vllm) |/ray/(core|dashboard|autoscaler|_private)/|ray::|VLLM::|bin/haproxy|ipykernel"
)


def what_the_tutorial_runs() -> set[str]:
    """Each process of the kinds that the tutorial starts, with the TCP ports that it listens on, as readable text."""
    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if OURS.search(command):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                ports = sorted(c.laddr.port for c in listening)
                found.add(f"{process.info['pid']} {command[:200]}, ports {ports}")
    return found


def assert_nothing_left(before: set[str]) -> None:
    """Fail when a process that wasn't there `before` is still there after fifteen seconds."""
    deadline = time.monotonic() + 15
    while (left := what_the_tutorial_runs() - before) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left, "\n".join(sorted(left))


@pytest.fixture
def nothing_left_behind():
    """Fails the test when a process that it started outlives it."""
    before = what_the_tutorial_runs()
    yield
    assert_nothing_left(before)
