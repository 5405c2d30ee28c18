"""What the tests share: the repository, its notebook, and what runs on the machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "ci")]


@pytest.fixture(scope="session")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebook.ipynb", as_version=4)


@pytest.fixture(scope="session")
def cell(notebook):
    """The source of the cell with a given id."""
    sources = {cell.id: cell.source for cell in notebook.cells}
    return sources.__getitem__


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


def processes_and_ports() -> set[str]:
    """Each process and each listening TCP port on this machine, as readable text."""
    found = set()
    for process in psutil.process_iter(["pid", "ppid", "name", "cmdline"]):
        if process.info["ppid"] != 2:  # Kernel threads come and go.
            found.add(f"process {process.info['pid']} {' '.join(process.info['cmdline'] or [process.info['name']])}")
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN:
            found.add(f"port {connection.laddr.ip}:{connection.laddr.port}")
    return found


@pytest.fixture
def nothing_left_behind():
    """Fails the test when a process or a listening port that it started is still there ten seconds after its end."""
    before = processes_and_ports()
    yield
    deadline = time.monotonic() + 10
    while (left := processes_and_ports() - before) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left, "\n".join(sorted(left))
