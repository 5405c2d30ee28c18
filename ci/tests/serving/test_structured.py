"""A schema that the engine can't enforce is refused, also after one that it can."""

import json

import pytest
import requests
import xgrammar

from ci.common import ROOT
from ci.tests.serving.app import CHAT, URL, complete, engines

pytestmark = pytest.mark.section("Harden the app")
VALID = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}


def ask(**changes) -> requests.Response:
    return requests.post(f"{URL}/v1/chat/completions", json=CHAT | {"max_tokens": 40} | changes, timeout=120)


def schema(schema: dict) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def test_schema_is_enforced(served):
    """The stand-in has seen no JSON but that of calls, so a sum is the engine's doing. It may run out of tokens."""
    answer = ask(**schema(VALID))
    assert answer.status_code == 200, answer.text
    content = "".join(answer.json()["choices"][0]["message"]["content"].split())
    assert content.startswith("{") and '{"sum":'.startswith(content[:7]), content
    free = ask().json()["choices"][0]["message"]["content"]
    assert '"sum' not in free, free


@pytest.mark.parametrize(
    "request_of",
    [
        schema({"type": "object", "properties": {"sum": {"type": "integer", "multipleOf": 5}}}),
        schema({"type": "object", "patternProperties": {"^s": {"type": "integer"}}}),
        {"structured_outputs": {"grammar": "root ::= ("}},
    ],
    ids=["multipleOf", "patternProperties", "malformed grammar"],
)
def test_what_cannot_be_enforced_is_refused_after_a_valid_request(served, request_of):
    assert ask(**schema(VALID)).status_code == 200
    before = engines()
    answer = ask(**request_of)
    now = "If this vLLM enforces it, SECURITY.md needs another example, and so does this test"
    assert answer.status_code == 400, f"{now}: {answer.status_code} {answer.text[:300]}"
    assert engines() == before and complete().status_code == 200


@pytest.mark.parametrize(
    "ignored",
    [{"not": {"required": ["sum"]}}, {"if": {}, "then": False}, {"dependentRequired": {"sum": ["b"]}}],
    ids=str,
)
def test_what_is_accepted_and_ignored(served, ignored):
    """As SECURITY.md says. When this fails, that sentence has to go, or to name other keywords."""
    one, other = (str(xgrammar.Grammar.from_json_schema(json.dumps(one))) for one in (VALID, VALID | ignored))
    assert one == other and ask(**schema(VALID | ignored)).status_code == 200
    assert f"`{next(iter(ignored))}`" in (ROOT / "SECURITY.md").read_text()
