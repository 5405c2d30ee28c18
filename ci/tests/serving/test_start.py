"""What the commands say before the app runs."""

import pytest

from ci.common import run
from ci.tests.serving.app import deploy, server_status, wait_for


@pytest.mark.section("Troubleshooting")
def test_commands_from_another_ray_and_without_its_token(cluster, quoted):
    # Only the number is another one, of no release.
    program = "import ray; ray.__version__ = '0.0.1'; ray.init(address='auto')"
    quoted("Version mismatch: The cluster was started with: ...", run("python", "-c", program).stdout)
    result = run("serve", "status", RAY_AUTH_MODE="disabled")
    assert result.returncode != 0
    quoted("Authentication required: Unauthorized: Missing authentication token", result.stdout)


@pytest.mark.section("Troubleshooting")
def test_app_that_asks_for_a_gpu_waits_and_says_so(cluster, quoted, tmp_path):
    deploy("serve_llama_3_1_8b:app", tmp_path)
    message = wait_for(lambda: server_status()["message"], "message of the deployment")
    quoted("... replicas that have taken more than ... to be scheduled.", message)
