"""The notebook, executed: deployed, queried, and shut down with nothing left behind. Minutes."""

import sys

import pytest
from conftest import run


def execute(notebook, out, **env):
    """Execute the notebook with papermill, as `make tutorial` does, with `env` added to its environment."""
    papermill = [sys.executable, "-m", "papermill", "notebook.ipynb", str(out), "--kernel", "python3", "--cwd", "."]
    return run(*papermill, "--log-output", "--no-progress-bar", timeout_s=1200, **env)


@pytest.mark.timeout(1500)
def test_notebook_passes_under_nbmake(nothing_left_behind):
    result = run(sys.executable, "-m", "pytest", "--nbmake", "notebook.ipynb", timeout_s=1400)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout


@pytest.mark.timeout(1500)
def test_failed_deployment_shows_the_replicas_own_error(tmp_path, nothing_left_behind):
    result = execute("notebook.ipynb", tmp_path / "out.ipynb", APP="ci.too_long_app:app")
    assert result.returncode != 0
    assert "RuntimeError: The deployment failed:" in result.stdout
    assert "max_model_len" in result.stdout.partition("RuntimeError: The deployment failed:")[2]
