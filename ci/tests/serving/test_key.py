"""An update of the only replica, which brings the demand for a key, and what the app then says to whom."""

import base64
import http.client
import json
import os
import socket
import sys
import time

import pytest
import requests
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

from ci.common import run
from ci.tests.serving.app import API_KEY, CHAT, KEY, URL, complete, deploy, load, report, server_status, wait_for

pytestmark = pytest.mark.section("Ask for a key")
APP = "ci.tests.api_key_app"
ALLOWED, FOREIGN = "https://chat.example.com", "https://elsewhere.example.com"  # The app allows the first.


@pytest.fixture(scope="module")
def asking(served, tmp_path_factory):
    """The app that asks for the key, in place of the one before. Its value is what happened to requests meanwhile."""
    began_s = time.monotonic()
    with load() as outcomes:
        deploy(f"{APP}:app", tmp_path_factory.mktemp("key"))
        # Before there is any state, the old one still runs.
        wait_for(lambda: "RUNNING" not in (server_status()["replica_states"] or "RUNNING"), "end of the old replica")
        wait_for(lambda: requests.get(f"{URL}/v1/models", timeout=30).status_code == 401, "demand for a key", 400)
    return outcomes, began_s


def test_update_without_surge_interrupts_and_brings_a_key(asking, quoted):
    report("Update of the only replica", *asking)
    # Serve's own health check answers before the app does.
    paths = [*requests.get(f"{URL}/openapi.json", headers=KEY, timeout=30).json()["paths"], "/openapi.json", "/metrics"]
    assert {"/v1/chat/completions", "/invocations", "/tokenize"} < set(paths)
    for path in paths:
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": API_KEY}):
            for method in ("GET", "POST", "OPTIONS"):
                answer = requests.request(method, f"{URL}{path}", json=CHAT, headers=wrong, timeout=30)
                assert answer.status_code == 401, f"{method} {path} with {wrong}: {answer.status_code}"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
    quoted("Wrong or missing API key", answer.text)
    assert not "/invocations".startswith(GUARDED_PREFIX), "vLLM's own api_key covers it now: say so in the text"
    assert complete().status_code == 200


def test_scheme_in_any_case(asking):
    for scheme in ("bearer", "BEARER"):
        headers = {"Authorization": f"{scheme} {API_KEY}"}
        assert requests.get(f"{URL}/v1/models", headers=headers, timeout=30).status_code == 200


@pytest.mark.parametrize("keys", [(API_KEY, API_KEY), ("wrong", API_KEY), (API_KEY, "wrong")])
def test_header_that_comes_twice_is_refused(asking, keys):
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
    connection.putrequest("GET", "/v1/models")
    for key in keys:
        connection.putheader("Authorization", f"Bearer {key}")
    connection.endheaders()
    assert connection.getresponse().status == 401


def preflight(origin: str) -> requests.Response:
    """Ask as a browser does before it lets a page of `origin` send a chat with a key."""
    headers = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return requests.options(f"{URL}/v1/chat/completions", headers=headers | {"Origin": origin}, timeout=30)


def test_browser_may_send_the_key_from_an_allowed_origin(asking):
    allowed = preflight(ALLOWED)
    assert (allowed.status_code, allowed.headers["Access-Control-Allow-Origin"]) == (200, ALLOWED)
    assert "authorization" in allowed.headers["Access-Control-Allow-Headers"]
    answer = requests.post(f"{URL}/v1/chat/completions", json=CHAT, headers=KEY | {"Origin": ALLOWED}, timeout=60)
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, ALLOWED)


def test_browser_may_not_from_another_origin(asking):
    for origin in (FOREIGN, "null"):
        refused = preflight(origin)
        assert (refused.status_code, refused.text) == (400, "Disallowed CORS origin")
        assert "Access-Control-Allow-Origin" not in refused.headers
        # What needs no preflight reaches the app, but not the model, and the page can't read the answer.
        headers = KEY | {"Origin": origin, "Content-Type": "text/plain"}
        answer = requests.post(f"{URL}/v1/chat/completions", data=json.dumps(CHAT), headers=headers, timeout=30)
        assert answer.status_code == 400 and "Only 'application/json' is allowed" in answer.text
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_websocket_without_the_key_does_not_open(asking):
    """vLLM has no websocket for a text model, so that here 403 comes with the key, too: see ci/checks."""
    nonce = base64.b64encode(os.urandom(16)).decode()
    request = "GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    with socket.create_connection(("127.0.0.1", 8000), timeout=30) as connection:
        connection.sendall(f"{request}Sec-WebSocket-Key: {nonce}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "0"}, "RuntimeError: Nothing would check the key without"),
        ({"API_KEY": ""}, "ValueError: API_KEY is empty. Export it on each node before Ray starts."),
    ],
)
def test_app_is_not_built_where_the_key_would_not_be_checked(environment, said):
    switched_on = {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1", "API_KEY": API_KEY}
    result = run(sys.executable, "-c", f"import {APP}", **switched_on | environment)
    assert result.returncode == 1 and said in result.stdout, result.stdout
