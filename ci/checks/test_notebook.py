"""The notebook, the files it shows, and the README agree, and keep the rules of the house. Seconds, no server."""

import re
import subprocess
from pathlib import Path

import pytest

from ci.common import ROOT, code_cells, headings, run, troubleshooting
from ci.tools import sync

pytestmark = pytest.mark.section("The repository")
ACCOUNT_TAGS = {"skip-execution", "skip-in-ci"}  # nbmake and papermill read the first, Anyscale's runner the second.


def test_files_are_those_of_the_notebook():
    files = {name for notebook in sync.NOTEBOOKS for name in sync.files_in_notebook(notebook)}
    assert files >= {"serve_llama_3_1_8b.py", "client.py", "service.yaml", "Dockerfile", "rayservice.yaml"}
    assert not sync.differences(), "Edit the notebook, not the file, then run `make readme`:\n" + sync.differences()


def test_readme_is_that_of_the_notebook(tmp_path):
    convert = [
        "jupyter",
        "nbconvert",
        "--config",
        "ci/readme/nbconvert_config.py",
        "--log-level",
        "WARN",
        "notebook.ipynb",
    ]
    result = run(*convert, "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stdout
    difference = run("diff", "-u", "README.md", str(tmp_path / "README.md")).stdout
    assert not difference, "README.md is generated: edit the notebook, then run `make readme`.\n" + difference


def test_readme_shows_no_notebook_syntax():
    readme = (ROOT / "README.md").read_text()
    assert readme.startswith("<!--"), "GitHub shows front matter as a table"
    for trace in ("%%", "\x1b", "â€", "ðŸ"):  # Cell magics, ANSI colors, UTF-8 read as cp1252
        assert trace not in readme
    fences = re.findall(r"^```(.*)$", readme, flags=re.M)
    assert set(fences[::2]) <= {"bash", "python", "yaml", "dockerfile", "console", "text"} and set(fences[1::2]) == {""}


def test_notebook_holds_no_outputs(each_notebook):
    held = [cell.id for cell in code_cells(each_notebook) if cell.outputs or cell.execution_count]
    assert not held, f"Cells with outputs: {held}. Run `jupyter nbconvert --clear-output --inplace *.ipynb`."


def test_shell_cells_fail_when_a_line_fails(each_notebook):
    for cell in code_cells(each_notebook):
        assert not re.search(r"^\s*!", cell.source, flags=re.M), f"{cell.id}: `!command` never fails its cell"
        if cell.source.startswith("%%bash"):
            assert "-euo pipefail" in cell.source.split("\n")[0], f"{cell.id}: use %%bash -euo pipefail"
            for line in re.findall(r"^curl .*$", cell.source, flags=re.M):
                assert " --fail" in line, f"{cell.id}: without --fail-with-body, curl takes any answer for a success"


def test_only_cells_that_need_an_account_or_a_cluster_are_skipped(each_notebook):
    for cell in code_cells(each_notebook):
        needs_account = bool(re.search(r"^anyscale |\$SERVICE_|^kubectl |^helm ", cell.source, flags=re.M))
        tags = set(cell.metadata.get("tags", []))
        assert tags == (ACCOUNT_TAGS if needs_account else set()), f"{cell.id}: tags {tags}"


def test_cells_are_short(each_notebook):
    lengths = {cell.id: len(cell.source.splitlines()) for cell in code_cells(each_notebook)}
    assert lengths.pop("rayservice-yaml", 0) <= 90  # A manifest has no parts that could stand alone.
    assert len(lengths) <= 32
    assert sorted(lengths.values())[len(lengths) // 2] <= 6, lengths
    assert max(lengths.values()) <= 41, lengths


def test_headings_are_unique_and_links_to_them_resolve(each_notebook):
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(each_notebook)]
    assert len(anchors) == len(set(anchors)), f"Headings that occur twice: {sorted(anchors)}"
    text = "\n".join(cell.source for cell in each_notebook.cells if cell.cell_type == "markdown")
    broken = set(re.findall(r"\]\(#([^)]*)\)", text)) - set(anchors)
    assert not broken, f"Links to headings that don't exist: {broken}"


def test_dollars_are_no_math(each_notebook):
    """Jupyter takes what stands between two dollar signs for a formula, also escaped ones, unless a tag is between."""
    for cell in [cell for cell in each_notebook.cells if cell.cell_type == "markdown"]:
        prose = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
        assert not re.search(r"(?<!\\)\$", prose), f"{cell.id}: write \\$ for a dollar sign"
        for paragraph in re.sub(r"\*\*[^*]*\*\*", "", prose).split("\n\n"):
            assert paragraph.count("$") < 2, f"{cell.id}: set all dollars but one in bold: {paragraph}"


def test_links_to_sections_of_other_files_resolve():
    guides = [file for file in ROOT.rglob("*.md") if not file.is_relative_to(ROOT / "build")]
    found = 0
    for guide in guides:
        for path, anchor in re.findall(r"\]\(([\w/.-]*\.md)#([\w-]+)\)", guide.read_text()):
            titles = re.findall(r"^#+ (.*)$", (guide.parent / path).read_text(), flags=re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{guide.name}: {path} has no section {anchor}"
            found += 1
    assert found > 5


def test_each_quoted_message_is_provoked_or_says_what_it_takes():
    tests = "".join(file.read_text() for file in (ROOT / "ci").rglob("test_*.py"))
    rows = re.findall(r"^- \*\*(?:\d+, )?\"(.*?)\"\*\*(.*)$", troubleshooting(), flags=re.M)
    assert len(rows) > 12
    for quotation, explanation in rows:
        assert (f'quoted("{quotation}"' in tests) != ("(This takes " in explanation), quotation


def test_variables_of_ray_are_known_to_ray():
    """Ray ignores one that it doesn't know."""
    import ray.llm._internal.serve.constants as llm
    import ray.serve._private.constants as serve

    known = "".join(Path(module.__file__).read_text() for module in (llm, serve))
    files = [file for file in ROOT.rglob("*.md") if not file.is_relative_to(ROOT / "build")]
    for file in [*files, *ROOT.glob("*file"), *(ROOT / "support").glob("*.py"), ROOT / "benchmarks" / "variants.yaml"]:
        named = set(re.findall(r"RAY_SERVE_[A-Z_]+", file.read_text()))
        assert not (unknown := {name for name in named if f'"{name}"' not in known}), f"{file.name}: {unknown}"


def test_no_secret_or_local_path_is_committed():
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, files):
        found = re.search(rb"hf_[A-Za-z0-9]{30,}|/(?:root|home|work)/\w+", (ROOT / name).read_bytes())
        assert not found, f"{name}: {found[0]}"


def test_lint():
    for command in (["check"], ["format", "--check", "--diff"]):
        result = run("ruff", *command, ".")
        assert result.returncode == 0, result.stdout
