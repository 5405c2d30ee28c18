"""Assemble what goes into Anyscale's template gallery, in its layout: `make template`."""

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent.parent
NAME, FOLDER = "deployment-serve-llm", "templates/deployment-serve-llm/small-size-llm"
LEFT_OUT = ("ci/", ".", "benchmarks/", "Makefile", "README.md", "notebook.ipynb", "pyproject.toml", "CONTRIBUTING.md", "LICENSE")
# The console shows the notebook without its folder, so that only absolute addresses work.
ADDRESSES = {
    "images/": f"https://raw.githubusercontent.com/anyscale/templates/main/{FOLDER}/images/",
    "benchmarks/": f"https://github.com/anyscale/templates/blob/main/{FOLDER}/benchmarks/",
}


def assemble(out: Path) -> None:
    """Write the gallery's folders into `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    template = out / FOLDER
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in [name for name in files if not name.startswith(LEFT_OUT)]:
        (template / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, template / name)
    notebook = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
    for cell in notebook.cells:
        for start, address in ADDRESSES.items():
            cell.source = re.sub(rf"\]\({start}", f"]({address}", cell.source)
    nbformat.write(notebook, template / "README.ipynb")
    convert = ["jupyter", "nbconvert", "--log-level", "WARN", "--to", "markdown"]
    subprocess.run([*convert, template / "README.ipynb"], check=True)
    for source, target in (
        ("tests.sh", f"tests/{NAME}"),
        ("aws.yaml", f"configs/{NAME}"),
        ("gce.yaml", f"configs/{NAME}"),
    ):
        (out / target).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "ci" / "gallery" / source, out / target)
    shutil.copy(ROOT / "ci" / "gallery" / "BUILD.yaml", out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    assemble(parser.parse_args().out)
