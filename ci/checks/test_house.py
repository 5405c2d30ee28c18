"""What a maintainer looks for first: the license, the guides, the hooks and the workflow are true, and run."""

import functools
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ci.common import ROOT, run

pytestmark = pytest.mark.section("The repository")
GUIDES = ["CONTRIBUTING.md", "ci/README.md", "SECURITY.md"]
HOOKS, WORKFLOW = ".pre-commit-config.yaml", ".github/workflows/ci.yml"
BIN = Path(sys.executable).parent
APACHE_2_0 = (
    "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # Of apache.org/licenses/LICENSE-2.0.txt
)


def hooks() -> list[dict]:
    return [hook for repo in yaml.safe_load((ROOT / HOOKS).read_text())["repos"] for hook in repo["hooks"]]


@functools.cache
def targets() -> set[str]:
    """The Makefile's phony targets."""
    return set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)[1].split())


def test_license_is_apaches():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0


def test_make_alone_prints_a_line_for_each_target():
    result = run("make")
    assert result.returncode == 0, result.stdout
    lines = dict(re.findall(r"^make ([\w-]+)  +(\S.*)$", result.stdout, flags=re.M))
    assert set(lines) == targets(), result.stdout


@pytest.mark.parametrize("file", [*GUIDES, HOOKS, WORKFLOW])
def test_targets_that_a_file_names_exist(file):
    """Where a file shows a command: in backticks, in a line of a block, or as a step."""
    named = set(
        re.findall(r"(?:`|^\s*(?:- run: )?)(?:\w+=\S+ )?make ([a-z][\w-]*)", (ROOT / file).read_text(), flags=re.M)
    )
    assert named or file == "SECURITY.md", f"{file} names no target"
    for target in named:
        result = run("make", "--dry-run", target)
        assert target in targets() and result.returncode == 0, f"{file}: make {target}\n{result.stdout}"


@pytest.mark.parametrize("file", GUIDES)
def test_files_that_a_guide_names_exist(file):
    """In backticks from the repository's root, in links from the guide. `build/` is made by the targets."""
    text = re.sub(r"```.*?```", "", (ROOT / file).read_text(), flags=re.S)
    quoted = re.findall(r"`(\.?[\w./-]+(?:/|\.(?:ipynb|md|py|toml|txt|yaml|yml))|Makefile|Dockerfile|\.ci/run)`", text)
    named = {name: ROOT / name for name in quoted if not name.startswith(("build/", "/"))}
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            named[link] = (ROOT / file).parent / link
    assert named
    missing = sorted(name for name, path in named.items() if not path.exists())
    assert not missing, f"{file} names what isn't there: {missing}"


def test_ci_guide_names_each_folder_of_ci():
    text = (ROOT / "ci" / "README.md").read_text()
    tracked = subprocess.check_output(["git", "ls-files", "ci"], cwd=ROOT, text=True).splitlines()
    folders = {name.split("/")[1] for name in tracked if name.count("/") > 1}
    assert folders and not [folder for folder in folders if f"`ci/{folder}/`" not in text], folders


def test_workflow_is_valid_and_calls_what_ci_calls():
    result = run(str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.github-workflows", WORKFLOW)
    assert result.returncode == 0, result.stdout
    jobs = yaml.safe_load((ROOT / WORKFLOW).read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert "make check" in commands and "bash .ci/run" in commands and (ROOT / ".ci" / "run").is_file()
    for action in [step["uses"] for step in steps if "uses" in step]:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+\.\d+\.\d+|[0-9a-f]{40})", action), f"{action}: pin it"
    assert all("timeout-minutes" in job for job in jobs.values())


def test_workflow_may_only_read_and_covers_each_python_of_the_text(cell):
    workflow = yaml.safe_load((ROOT / WORKFLOW).read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert not [name for name, job in workflow["jobs"].items() if "permissions" in job or "continue-on-error" in job]
    pythons = re.search(r"Python (\d\.\d+) or (\d\.\d+)", cell("about-config")).groups()
    assert tuple(workflow["jobs"]["check"]["strategy"]["matrix"]["python"]) == pythons


def test_hooks_are_valid_and_run_in_the_check_environment():
    result = run(str(BIN / "pre-commit"), "validate-config", HOOKS)
    assert result.returncode == 0, result.stdout
    for hook in hooks():
        assert hook["language"] == "system" and "build/check/bin" in hook["entry"], hook["id"]


@pytest.mark.parametrize("hook", [hook["id"] for hook in hooks()])
def test_hook_passes_over_the_whole_tree(hook, tmp_path):
    """As pre-commit runs it, in the environment that runs this: `make test` has another one than `make check`."""
    config = tmp_path / "hooks.yaml"
    config.write_text((ROOT / HOOKS).read_text().replace("build/check/bin", str(BIN)))
    command = ["run", hook, "--all-files", "--color", "never", "--config", str(config)]
    result = run(str(BIN / "pre-commit"), *command, PRE_COMMIT_HOME=str(tmp_path))
    assert result.returncode == 0 and "Passed" in result.stdout, result.stdout


def test_files_of_checks_and_tests_are_short():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for folder in ("checks", "tests")
        for file in (ROOT / "ci" / folder).rglob("*.py")
    }
    long = {name: lines for name, lines in lengths.items() if lines > 300}
    assert len(lengths) > 10 and not long, f"Split by subject: {long}"
