"""client.py and patient_client.py against a server that says what OpenAI's API says."""

import http.server
import itertools
import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from ci.common import run

pytestmark = pytest.mark.section("Send requests")
patience = pytest.mark.section("Write a client that copes")


@pytest.fixture
def server():
    """Its address, what it streams, its first answers' statuses, and the path and the key of what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        streams, statuses, asked, asked_s = [], [], [], []

        def do_POST(self):
            self.asked.append((self.path, self.headers["Authorization"]))
            self.asked_s.append(time.monotonic())
            if self.statuses:
                self.send_response(self.statuses.pop(0))
                self.send_header("Retry-After", "2")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for choice in self.streams.pop(0) if isinstance(self.streams[0], list) else self.streams:
                self.wfile.write(f"data: {json.dumps({'choices': [{'index': 0} | choice]})}\n\n".encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()


CUT = {"delta": {"content": " it"}, "finish_reason": "length"}
BEGINNING, REST = {"delta": {"content": "Why did"}}, {"delta": {"content": " it?"}, "finish_reason": "stop"}


def test_whole_answer_is_printed(server):
    address, handler = server
    handler.streams[:] = [BEGINNING, REST]
    result = run(sys.executable, "client.py", BASE_URL=f"{address}/", API_KEY="key-canary")
    assert (result.returncode, result.stdout) == (0, "Why did it?\n"), result.stdout
    assert handler.asked == [("/v1/chat/completions", "Bearer key-canary")]


def test_answer_that_breaks_off_fails(server):
    address, handler = server
    handler.streams[:] = [BEGINNING]
    result = run(sys.executable, "client.py", BASE_URL=address)
    assert result.returncode == 1 and "broke off" in result.stdout, result.stdout


@patience
def test_patient_client_waits_as_long_as_it_was_told_and_prints_the_whole_answer(server):
    """It was told to wait twice, and the first stream breaks off."""
    address, handler = server
    handler.statuses[:], handler.streams[:] = [429, 503], [[BEGINNING], [BEGINNING, REST]]
    result = run(sys.executable, "patient_client.py", BASE_URL=f"{address}/", API_KEY="key-canary")
    assert (result.returncode, result.stdout) == (0, "Why did it?\n"), result.stdout
    assert handler.asked == [("/v1/chat/completions", "Bearer key-canary")] * 4
    waits_s = [after - before for before, after in itertools.pairwise(handler.asked_s)]
    assert all(wait_s >= 2 for wait_s in waits_s[:2]), waits_s


@patience
@pytest.mark.parametrize("status", [400, 401, 404])
def test_patient_client_does_not_repeat_what_waiting_does_not_mend(server, status):
    address, handler = server
    handler.statuses[:] = [status]
    result = run(sys.executable, "patient_client.py", timeout_s=60, BASE_URL=address)
    assert result.returncode == 1 and f"Error code: {status}" in result.stdout and len(handler.asked) == 1


@patience
def test_patient_client_returns_at_random_and_gives_up(monkeypatch):
    import patient_client

    error = patient_client.openai.APIConnectionError(request=None)
    state = SimpleNamespace(outcome=SimpleNamespace(exception=lambda: error), attempt_number=3)
    waits_s = [patient_client.wait_s(state) for _ in range(100)]
    assert len(set(waits_s)) > 50 and 0 <= min(waits_s) and max(waits_s) <= 8
    state.attempt_number = 50
    assert max(patient_client.wait_s(state) for _ in range(100)) <= 60
    before_delay, after_attempt = patient_client.ask.retry.stop.stops
    assert (before_delay.max_delay, after_attempt.max_attempt_number) == (600, 12)
    assert patient_client.is_temporary(error) and not patient_client.is_temporary(ValueError())
    assert (patient_client.client.timeout.read, patient_client.client.timeout.connect) == (300, 5)
    # A gateway may answer with a date, or with a time that nobody waits for.
    for told, most_s in ("Wed, 25 Nov 2026 20:00:00 GMT", 60), ("86400", 120):
        error.response = SimpleNamespace(headers={"Retry-After": told})
        assert patient_client.wait_s(state) <= most_s


@patience
def test_patient_client_takes_no_answer_that_was_cut_off(server):
    address, handler = server
    handler.streams[:] = [BEGINNING, CUT]
    result = run(sys.executable, "patient_client.py", BASE_URL=address)
    assert result.returncode == 1 and "The answer isn't whole: length." in result.stdout and len(handler.asked) == 1
