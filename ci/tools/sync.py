"""Write the files that the notebooks show in their %%writefile cells, or check that they agree.

Usage: python ci/tools/sync.py [--check]
"""

import argparse
import difflib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = ("notebook.ipynb", "beyond_chat.ipynb", "next_steps.ipynb")
MAGIC = "%%writefile "


def files_in_notebook(name: str) -> dict[str, str]:
    """Name and text of each file that a notebook writes."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.source.startswith(MAGIC)]
    parts = [source.removeprefix(MAGIC).partition("\n") for source in sources]
    return {name.strip(): text + "\n" for name, _, text in parts}


def differences() -> str:
    """A unified diff from the files to the notebooks' cells; empty when they agree."""
    lines = []
    for notebook in NOTEBOOKS:
        for name, text in files_in_notebook(notebook).items():
            file = ROOT / name
            old = file.read_text().splitlines() if file.exists() else []
            lines += difflib.unified_diff(old, text.splitlines(), name, f"{notebook}, cell {name}", lineterm="")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file differs")
    if parser.parse_args().check:
        raise SystemExit(differences() or 0)
    for notebook in NOTEBOOKS:
        for name, text in files_in_notebook(notebook).items():
            (ROOT / name).write_text(text)
