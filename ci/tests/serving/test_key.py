"""An update of the only replica, which brings the demand for a key."""

import time

import pytest
import requests
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

from ci.tests.serving.app import API_KEY, CHAT, KEY, URL, complete, deploy, load, report, server_status, wait_for


@pytest.mark.section("Ask for a key")
def test_update_without_surge_interrupts_and_brings_a_key(served, quoted, tmp_path):
    began_s = time.monotonic()
    with load() as outcomes:
        deploy("ci.api_key_app:app", tmp_path)
        wait_for(lambda: set(server_status()["replica_states"]) == {"STARTING"}, "time without a running replica")
        wait_for(lambda: requests.get(f"{URL}/v1/models", timeout=30).status_code == 401, "demand for a key", 400)
    report("Update, one replica, no surge", outcomes, began_s)
    # Serve's own health check answers before the app does.
    paths = [*requests.get(f"{URL}/openapi.json", headers=KEY, timeout=30).json()["paths"], "/openapi.json", "/metrics"]
    assert {"/v1/chat/completions", "/invocations", "/tokenize"} < set(paths)
    for path in paths:
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": API_KEY}):
            for method in ("GET", "POST"):
                answer = requests.request(method, f"{URL}{path}", json=CHAT, headers=wrong, timeout=30)
                assert answer.status_code == 401, f"{method} {path} with {wrong}: {answer.status_code}"
    quoted("Wrong or missing API key", answer.text)
    assert not "/invocations".startswith(GUARDED_PREFIX), "vLLM's own api_key covers it now: say so in the text"
    assert complete().status_code == 200
