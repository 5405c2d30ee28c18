"""The script that tests the template in Anyscale's gallery, with stand-ins for what needs a cluster."""

import re

import nbformat
import pytest

from ci.common import ROOT, code_cells, run
from support.machine import UNGATED

pytestmark = pytest.mark.section("Deploy to production with Anyscale Services")
PAPERMILL = """\
cp "$1" executed.ipynb
echo "weights $MODEL_SOURCE"
printf 'Executing Cell 1\\n{end}'
exit {status}
"""


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Run tests.sh on the notebook. Returns exit status, output, and whether the app on the cluster was shut down."""
    folder, programs = tmp_path / "small-size-llm", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    (folder / "README.ipynb").write_text((ROOT / "notebook.ipynb").read_text())
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.delenv("MODEL_SOURCE", raising=False)

    def run_script(applications: str = "", end: str = "Ending Cell 1\\n", status: int = 0):
        scripts = {
            "ray": "exit 0",
            "uv": "exit 0",
            "serve": f'[ "$1" = status ] && echo "{applications}" || echo "$@" >> "{tmp_path}/served"',
            "papermill": PAPERMILL.format(end=end, status=status),
        }
        for name, script in scripts.items():
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)
        result = run("bash", "-c", f"cd '{tmp_path}' && bash '{ROOT}/ci/gallery/tests.sh'")
        ended = (tmp_path / "served").exists() and (tmp_path / "served").read_text() == "shutdown -y\n"
        return result.returncode, result.stdout, ended

    return run_script


def test_passes_on_ungated_weights_and_deploys_no_service(run_script, tmp_path):
    status, said, ended = run_script()
    assert status == 0 and ended, said
    assert f"weights {UNGATED}\n" in said
    executed = nbformat.read(tmp_path / "small-size-llm" / "executed.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in code_cells(executed))
    assert "check_machine()" in code and not re.search("^anyscale ", code, flags=re.M)


@pytest.mark.parametrize("how", [{"status": 1}, {"end": ""}], ids=["fails", "is cut off"])
def test_notebook_that_fails_fails_the_test_and_leaves_no_app(run_script, how):
    status, said, ended = run_script(**how)
    assert status == 1 and ended, said


def test_app_of_somebody_else_stays(run_script):
    status, said, ended = run_script(applications="status: RUNNING")
    assert status == 1 and "An application runs on this cluster already" in said and not ended, said
