"""What runs the checks and the tests: a failure reaches the end, and nothing is left out or deleted."""

import os
import re
import sys

import pytest

from ci.common import ROOT, run

pytestmark = pytest.mark.section("The repository")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a shell script of a name before the real program."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (tmp_path / "bin").mkdir()

    def program(name: str, script: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return program


def test_skipped_test_fails_in_ci(program, tmp_path):
    """`.ci/run` calls `make test`; here, that runs one test that would be skipped."""
    (tmp_path / "test_absent.py").write_text(
        "import pytest\n@pytest.mark.skipif(True, reason='the program is absent')\ndef test_program(): pass\n"
    )
    pytest_alone = f"{sys.executable} -m pytest -q -p no:cacheprovider -p ci.conftest -c /dev/null"
    command = f"cd '{ROOT}' && {pytest_alone} --rootdir '{tmp_path}' '{tmp_path}/test_absent.py'"
    assert run("bash", "-c", command, NOTHING_SKIPPED="").returncode == 0
    program("make", f'[ "$*" = test ] || exit 0\n{command}')
    for name in ("prometheus", "chromedriver"):
        program(name, "")
    result = run("bash", ".ci/run", KUBERAY_CRD=__file__)  # Any file that is there: nothing is to be fetched.
    assert result.returncode != 0 and "the program is absent" in result.stdout, result.stdout


def test_page_of_make_tutorial_holds_its_pictures(program, tmp_path):
    """With the notebook as it is in the place of an executed one."""
    for name in ("notebook.ipynb", "images"):
        (tmp_path / name).symlink_to(ROOT / name)
    program("papermill", "cp notebook.ipynb build/")
    result = run("bash", "-c", f"cd '{tmp_path}' && bash '{ROOT}/ci/tools/execute.sh'")
    assert result.returncode == 0, result.stdout
    sources = re.findall(r'<img [^>]*src="([^"]{12})', (tmp_path / "build" / "notebook.html").read_text())
    assert len(sources) == 5 and set(sources) == {"data:image/p"}, sources


@pytest.mark.parametrize(
    "target, arguments",
    [
        ("check", "ci/checks"),
        ("test", "ci -m not soak and not nodes"),
        ("nodes", "ci -m nodes"),
        ("soak", "ci -m soak"),
    ],
)
def test_failure_of_a_target_is_one_of_make(tmp_path, target, arguments):
    """`make test` runs everything in ci/ but the soak and the nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text('#!/bin/sh\necho "called with $*"\nexit 3\n')
    (folder / "python").chmod(0o755)
    # Below `make test`, make would also print its folder.
    dry = ["make", "--dry-run", "--no-print-directory", target]
    steps = run(*dry, f"CHECK_VENV={tmp_path}", f"TEST_VENV={tmp_path}").stdout
    setup, command = steps.strip().splitlines()
    environment = "check" if target == "check" else "test"
    assert setup == f'ci/tools/setup.sh {environment} "{tmp_path}"'
    result = run("bash", "-c", command)
    assert result.stdout == f"called with -m pytest {arguments}\n" and result.returncode == 3, result.stdout


def test_each_test_names_a_section_of_a_page():
    """`make check` collects no test that takes the engine, so that a wrong heading would show only in `make test`."""
    from ci.common import all_headings
    from ci.conftest import REPOSITORY

    files = list((ROOT / "ci").rglob("test_*.py"))
    for file in files:
        named = re.findall(r"mark\.section\(\"([^\"]*)\"\)", file.read_text())
        assert named and set(named) <= {REPOSITORY, *all_headings()}, f"{file.name}: {named}"
    assert len(files) > 20


def test_folder_that_the_setup_did_not_make_is_left_alone(tmp_path, program):
    program("python-of-mine", 'test "$1" = -c && echo python-of-mine')  # It can't make an environment.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = run("ci/tools/setup.sh", "check", str(tmp_path / "mine"), PYTHON="python-of-mine")
    assert (tmp_path / "mine" / "thesis.txt").exists(), result.stdout
    assert result.returncode == 1 and "wasn't made here. Name another folder" in result.stdout, result.stdout


def test_machine_without_an_engine_is_told_so_before_a_download(tmp_path, program):
    program("uname", 'echo "Darwin arm64"')
    result = run("ci/tools/setup.sh", "test", str(tmp_path / "venv"))
    assert result.returncode == 1 and "needs x86-64 Linux" in result.stdout, result.stdout
    assert os.listdir(tmp_path) == ["bin"]
