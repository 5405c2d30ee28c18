"""api_key.py before an app with vLLM's CORS handling: who gets in, and what the others are told."""

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

from api_key import RequireKey, require_key

pytestmark = pytest.mark.section("Ask for a key")
RIGHT = ("Authorization", "Bearer key-canary")
PREFLIGHT = {"Origin": "https://chat.example.com", "Access-Control-Request-Method": "POST"}


@pytest.fixture
def reached():
    """What got past the check: one entry for each request, websocket and start of the app."""
    return []


@pytest.fixture
def ask(monkeypatch, reached):
    """Send one request past the check, and return status, headers and body. For a websocket, return the messages."""

    async def get_in(request):
        reached.append(request.method)
        return PlainTextResponse("in")

    async def accept(websocket):
        reached.append("websocket")
        await websocket.accept()

    def ask(*headers, method="GET", kind="http", api_key="key-canary"):
        monkeypatch.setenv("API_KEY", api_key)
        methods = ["GET", "POST", "OPTIONS"]
        app = Starlette(routes=[Route("/", get_in, methods=methods), WebSocketRoute("/ws", accept)])
        app.add_middleware(CORSMiddleware, allow_origins=["https://chat.example.com"], allow_methods=["*"])
        app.add_middleware(RequireKey)  # Last, and so outermost, as vLLM adds it.
        raw = [(name.lower().encode(), value.encode()) for name, value in headers]
        scope = {"type": kind, "path": {"http": "/", "websocket": "/ws"}[kind], "headers": raw, "query_string": b""}
        if kind == "http":
            scope["method"] = method
        sent = []

        async def receive():
            return {"type": "websocket.connect" if kind == "websocket" else "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        asyncio.run(app(scope, receive, send))
        if kind == "websocket":
            return sent
        answer = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], answer, b"".join(message.get("body", b"") for message in sent)

    return ask


def test_key_lets_in(ask):
    assert ask(RIGHT)[::2] == (200, b"in")
    assert ask(RIGHT, method="POST")[::2] == (200, b"in")


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
def test_scheme_in_any_case(ask, scheme):
    assert ask(("Authorization", f"{scheme} key-canary"))[0] == 200


WRONG = ("", "Bearer", "Bearer ", "key-canary", "Basic key-canary", "Bearer schlüssel", "Bearer key-canar")
WRONG += ("Bearer key-canary2", "Bearer KEY-CANARY", "Bearer key-canary, Bearer key-canary")


@pytest.mark.parametrize("header", WRONG)
def test_anything_else_is_refused_and_told_how_to_come_in(ask, reached, quoted, header):
    for headers in ([("Authorization", header)], []):
        status, answer, body = ask(*headers, method="POST")
        assert (status, answer["www-authenticate"], answer["content-type"]) == (401, "Bearer", "application/json")
        quoted("Wrong or missing API key", body.decode())
    assert not reached


@pytest.mark.parametrize("second", [RIGHT, ("Authorization", "Bearer wrong"), ("Authorization", "")])
def test_header_that_comes_twice_is_refused(ask, reached, second):
    assert ask(RIGHT, second)[0] == ask(second, RIGHT)[0] == 401
    assert not reached


def test_key_beyond_ascii(ask):
    assert ask(("Authorization", "Bearer schlüssel-🔑"), api_key="schlüssel-🔑")[0] == 200
    assert ask(("Authorization", "Bearer schlussel-🔑"), api_key="schlüssel-🔑")[0] == 401


def test_line_end_of_a_file_is_no_part_of_the_key(ask):
    assert ask(RIGHT, api_key="key-canary\n")[0] == 200


def test_key_is_compared_in_constant_time(ask, monkeypatch):
    compared = []
    monkeypatch.setattr("secrets.compare_digest", lambda *both: compared.append(both))
    assert ask(RIGHT)[0] == 401, "The comparison said no"
    assert compared == [(b"key-canary", b"key-canary")]


def test_preflight_passes_to_the_cors_handling_and_no_further(ask, reached):
    status, answer, _ = ask(*PREFLIGHT.items(), method="OPTIONS")
    assert (status, answer["access-control-allow-origin"]) == (200, PREFLIGHT["Origin"])
    status, answer, body = ask(*(PREFLIGHT | {"Origin": "https://evil.example"}).items(), method="OPTIONS")
    assert (status, body) == (400, b"Disallowed CORS origin") and "access-control-allow-origin" not in answer
    assert not reached


@pytest.mark.parametrize("missing", PREFLIGHT)
def test_other_options_need_the_key(ask, reached, missing):
    headers = [(name, value) for name, value in PREFLIGHT.items() if name != missing]
    assert ask(*headers, method="OPTIONS")[0] == 401 and not reached
    assert ask(*headers, RIGHT, method="OPTIONS")[0] == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "options"])
def test_headers_of_a_preflight_open_nothing_else(ask, reached, method):
    assert ask(*PREFLIGHT.items(), method=method)[0] == 401 and not reached


def test_websocket_without_the_key_is_closed_before_it_opens(ask, reached):
    for headers in ([], [("Authorization", "Bearer wrong")], PREFLIGHT.items()):
        assert ask(*headers, kind="websocket") == [{"type": "websocket.close", "code": 1008}]
    assert not reached
    assert ask(RIGHT, kind="websocket")[0]["type"] == "websocket.accept"


def test_start_and_end_of_the_app_need_no_key(monkeypatch):
    monkeypatch.setenv("API_KEY", "key-canary")
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(RequireKey(app)({"type": "lifespan", "asgi": {"version": "3.0"}}, None, None))
    assert seen == ["lifespan"]


@pytest.mark.parametrize("key", [None, "", " \n"])
def test_no_key_no_start(monkeypatch, quoted, key):
    monkeypatch.delenv("API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("API_KEY", key)
    monkeypatch.setenv("RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", "1")
    for start in (require_key, lambda: RequireKey(None)):
        with pytest.raises(ValueError) as refusal:
            start()
        quoted("API_KEY is empty.", str(refusal.value))


@pytest.mark.parametrize("switch", [None, "", "0", "true"])
def test_no_start_where_nothing_would_check_the_key(monkeypatch, quoted, switch):
    monkeypatch.setenv("API_KEY", "key-canary")
    monkeypatch.delenv("RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", raising=False)
    if switch is not None:
        monkeypatch.setenv("RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", switch)
    with pytest.raises(RuntimeError) as refusal:
        require_key()
    quoted("Nothing would check the key without RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1.", str(refusal.value))


def test_names_the_class_as_vllm_imports_it(monkeypatch):
    monkeypatch.setenv("API_KEY", "key-canary")
    monkeypatch.setenv("RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", "1")
    [path] = require_key()
    module, name = path.rsplit(".", 1)
    assert (module, name) == (RequireKey.__module__, RequireKey.__name__)
