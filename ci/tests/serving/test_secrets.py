"""No log, status or page of the dashboard shows a secret or a prompt."""

from pathlib import Path

import pytest
import requests

from ci.common import ROOT, run
from ci.tests.serving.app import API_KEY, LOGS, PROMPT, TOKEN_IN_FILE, TOKEN_IN_VARIABLE


@pytest.mark.section("Harden the app")
def test_secrets_and_prompts_are_in_no_log(served):
    """The exceptions are those that the text names."""
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    places = {str(file): file.read_text(errors="replace") for file in LOGS.rglob("*") if file.is_file()}
    places["ray.log"] = (ROOT / "build" / "ray.log").read_text()
    places["serve status"] = run("serve", "status").stdout + run("serve", "config").stdout
    for path in ("serve/applications/", "v0/actors", "v0/runtime_envs", "v0/tasks", "v0/workers", "v0/jobs", "jobs/"):
        url = f"http://127.0.0.1:8265/api/{path}?detail=1&limit=1000"
        answer = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
        assert answer.status_code == 200, f"{path}: {answer.status_code}"
        places[path] = answer.text
    assert len(places) > 20 and "my-llama-3.1-8b" in "".join(places.values())
    found = {
        secret: {name for name, text in places.items() if secret in text}
        for secret in (TOKEN_IN_FILE, API_KEY, PROMPT.split()[-1], TOKEN_IN_VARIABLE)
    }
    assert found.pop(TOKEN_IN_VARIABLE) == {str(LOGS / "runtime_env_agent.log"), "v0/runtime_envs", "v0/tasks"}
    assert not any(found.values()), found
