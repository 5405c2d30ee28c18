"""What checks and tests share: the repository, its notebook, and how to run a command in it."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat

from ci.tools.sync import NOTEBOOKS

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"^([\w.-]+)(?:\[[\w, ]+\])?==([\w.+]+)", flags=re.M)
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]


def pinned(group: str) -> dict[str, str]:
    """Package and version of each line of a group in pyproject.toml, or of a group in it, that names one."""
    pins = {}
    for line in GROUPS[group]:
        pins |= pinned(line["include-group"]) if isinstance(line, dict) else dict(PIN.findall(line))
    return pins


def read_notebook(name: str = NOTEBOOKS[0]) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / name, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def headings(notebook: nbformat.NotebookNode) -> list[str]:
    """The headings of the notebook's text, of every level, in order."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)


def all_headings() -> list[str]:
    return [heading for name in NOTEBOOKS for heading in headings(read_notebook(name))]


def troubleshooting() -> str:
    """What the page says when something fails, and TROUBLESHOOTING.md."""
    cells = {cell.id: cell.source for cell in read_notebook().cells}
    return cells["troubleshooting"] + (ROOT / "TROUBLESHOOTING.md").read_text()


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
