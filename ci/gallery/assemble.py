"""Assemble what goes into Anyscale's template gallery, in its layout: `make template`."""

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
NAME, FOLDER = "deployment-serve-llm", "templates/deployment-serve-llm/small-size-llm"
LEFT_OUT = ("ci/", "records/", ".", "Makefile", "README.md", "notebook.ipynb", "pyproject.toml")
LEFT_OUT += ("CONTRIBUTING.md", "LICENSE")
# Of the notebooks that only the clone links to
LEFT_OUT += ("next_steps.ipynb", "rayservice.yaml", "serve_with_", "beyond_chat.ipynb", "serve_in_fp8.py")
LEFT_OUT += ("patient_client.py", "quality.py", "tiny_llama/serve_", "tiny_llama/make_adapters.py")
# The console shows the notebook without its folder, so that only absolute addresses work.
BLOB = f"https://github.com/anyscale/templates/blob/main/{FOLDER}/"
ADDRESSES = {
    "images/": f"https://raw.githubusercontent.com/anyscale/templates/main/{FOLDER}/images/",
    "benchmarks/": f"{BLOB}benchmarks/",
    "SECURITY.md": f"{BLOB}SECURITY.md",
    "TROUBLESHOOTING.md": f"{BLOB}TROUBLESHOOTING.md",
}


def cells_of_template(notebook: nbformat.NotebookNode) -> list:
    """The notebook's cells, with what holds for a clone only replaced by what holds for a workspace."""
    cells = []
    for cell in notebook.cells:
        if "clone-only" not in cell.metadata.get("tags", []):
            for start, address in ADDRESSES.items():
                cell.source = cell.source.replace(f"]({start}", f"]({address}")
            cells.append(cell)
        elif cell.id in ("clone", "dependencies"):
            text = (HERE / f"{'intro' if cell.id == 'clone' else cell.id}.md").read_text().rstrip("\n")
            cells.append(nbformat.v4.new_markdown_cell(text, id=cell.id))
    return cells


def assemble(out: Path) -> None:
    """Write the gallery's folders into `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    template = out / FOLDER
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in [name for name in files if not name.startswith(LEFT_OUT)]:
        (template / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, template / name)
    # The image brings Ray and vLLM, in versions of its own.
    lines = (ROOT / "requirements.txt").read_text().splitlines(keepends=True)
    (template / "requirements.txt").write_text("".join(li for li in lines if not re.match("#|ray|vllm", li)))
    notebook = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
    notebook.cells = cells_of_template(notebook)
    nbformat.write(notebook, template / "README.ipynb")
    convert = ["jupyter", "nbconvert", "--log-level", "WARN", "--to", "markdown"]
    subprocess.run([*convert, template / "README.ipynb"], check=True)
    for source, target in (
        ("tests.sh", f"tests/{NAME}"),
        ("aws.yaml", f"configs/{NAME}"),
        ("gce.yaml", f"configs/{NAME}"),
    ):
        (out / target).mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / source, out / target)
    shutil.copy(HERE / "BUILD.yaml", out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    assemble(parser.parse_args().out)
