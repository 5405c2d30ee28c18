"""What SECURITY.md calls reachable is reachable. With versions that mend it, this fails, and the line can go."""

import pytest
import requests

from ci.tests.serving.app import CHAT, COMPLETION, MODEL, URL, complete, replicas, running_replicas, wait_for

pytestmark = pytest.mark.section("Ask for a key")


def post(path: str, body: dict) -> requests.Response:
    return requests.post(f"{URL}{path}", json=body, timeout=15)


def test_one_request_stops_the_engines_intake_and_health_does_not_notice(served):
    huge = {"model": MODEL, "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": None, "min_tokens": 2**63}}
    with pytest.raises(requests.Timeout):
        post("/inference/v1/generate", huge)
    with pytest.raises(requests.Timeout):
        post("/v1/completions", COMPLETION)
    assert requests.get(f"{URL}/health", timeout=15).status_code == 200
    replicas()[0].kill()
    wait_for(lambda: running_replicas() == 1 and complete().status_code == 200, "replacement", 400)


def test_responses_take_a_chat_template_that_chat_refuses(served):
    own = {"chat_template_kwargs": {"chat_template": "{{ 'Hello' }}"}}
    question = {"model": MODEL, "input": "Hello, hello, hello, hello", "max_output_tokens": 1}
    tokens = [post("/v1/responses", question | change).json()["usage"]["input_tokens"] for change in ({}, own)]
    assert tokens[1] < tokens[0], "The template of the request wasn't used"
    refused = post("/v1/chat/completions", CHAT | own)
    assert refused.status_code == 400 and "Refused request with untrusted chat template" in refused.text
