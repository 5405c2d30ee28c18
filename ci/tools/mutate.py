"""Make one harmful change at a time in a copy of the repository, and see that a check notices: `make mutations`.

Usage: python -m ci.tools.mutate [WORD...]   (only those whose name, or whose file of checks, has one of the words)

The list is ci/tools/mutations.yaml. A change of a notebook is followed by what `make readme` runs, as a maintainer
would, so that files and README.md follow. Prints a Markdown table. Fails when a change is noticed by no check, or is
noticed although the list says that it isn't.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
LIST = ROOT / "ci" / "tools" / "mutations.yaml"
NOTEBOOK = "notebook.ipynb"
# A module that is changed twice within a second would be taken from its bytecode.
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "GIT_CONFIG_GLOBAL": os.devnull}


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, shell=True, env=ENVIRONMENT, capture_output=True, text=True)


def copy_of_the_tracked_tree(folder: Path) -> None:
    """Copy what git tracks, as it is in the working tree, into a repository of its own: some checks ask git."""
    subprocess.run(f"git ls-files -z | xargs -0 cp --parents -t '{folder}'", cwd=ROOT, shell=True, check=True)
    author = "-c user.name=mutate -c user.email=mutate@localhost"
    made = run(f"git init -q && git add -A && git {author} commit -q -m copy", folder)
    assert made.returncode == 0, made.stderr


def changed(mutation: dict, folder: Path) -> tuple[Path, str]:
    """The file that a mutation changes, and its new text. Raises SystemExit unless `old` is there exactly once."""
    old, new, name = mutation["old"], mutation.get("new", ""), mutation["name"]
    file = folder / mutation.get("file", NOTEBOOK)
    if "cell" not in mutation:
        text = file.read_text()
    else:
        notebook = nbformat.read(file, as_version=4)
        [cell] = [cell for cell in notebook.cells if cell.id == mutation["cell"]] or [{"source": ""}]
        text = cell["source"]
    if text.count(old) != 1 or old == new:
        raise SystemExit(
            f"ci/tools/mutations.yaml, {name}: `old` is there {text.count(old)} times. Bring it up to date"
        )
    if "cell" not in mutation:
        return file, text.replace(old, new)
    cell["source"] = text.replace(old, new)
    return file, nbformat.writes(notebook) + "\n"


def noticed_by(mutation: dict, folder: Path) -> str:
    """The first check that fails with this change, of the file that should notice, or of all; empty when none does."""
    file, text = changed(mutation, folder)
    file.write_text(text)
    if file.suffix == ".ipynb":
        written = run("ci/tools/readme.sh", folder)
        if written.returncode:
            raise SystemExit(f"{mutation['name']}: `make readme` fails: {written.stderr}")
    return failure(f"ci/checks/{mutation['checks']}", folder) or failure("ci/checks", folder)


def failure(checks: str, folder: Path) -> str:
    """The first check that fails. Raises SystemExit when pytest can't run them: that is no check's merit."""
    result = run(f"python -m pytest {checks} -x -q -rfE -p no:cacheprovider", folder)
    failed = re.search(r"^(?:FAILED|ERROR) ci/checks/([\w.:]+)", result.stdout, flags=re.M)
    if not failed and result.returncode:
        raise SystemExit(f"pytest {checks}: {result.stdout[-1000:]}{result.stderr}")
    return failed[1] if failed else ""


def main(words: list[str]) -> None:
    listed = yaml.safe_load(LIST.read_text())
    mutations = [one | {"checks": checks} for checks, some in listed.items() for one in some]
    for mutation in mutations:
        assert (ROOT / "ci" / "checks" / mutation["checks"]).exists(), mutation["checks"]
        changed(mutation, ROOT)
    wrong = []
    print("| mutation | noticed by | seconds |\n| --- | --- | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        folder.mkdir()
        copy_of_the_tracked_tree(folder)
        if unfit := failure("ci/checks", folder):
            raise SystemExit(f"{unfit} fails without a mutation, too. Mend that first")
        for mutation in mutations:
            if words and not any(word in f"{mutation['checks']} {mutation['name']}" for word in words):
                continue
            began_s = time.monotonic()
            check, reason = noticed_by(mutation, folder), mutation.get("survives", "")
            run("git reset -q --hard && git clean -fdqx", folder)
            if bool(check) == bool(reason):
                wrong.append(f"{mutation['name']}: " + (f"is noticed by {check}" if check else "no check notices"))
            result = f"`{check}`" if check else f"none: {reason}" if reason else "**none**"
            print(f"| {mutation['name']} | {result} | {time.monotonic() - began_s:.0f} |", flush=True)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
