"""client.py against a server that says what OpenAI's API says."""

import http.server
import json
import sys
import threading

import pytest

from ci.common import run

pytestmark = pytest.mark.section("Send requests")


@pytest.fixture
def server():
    """Its address, what it streams, and the path and the key of what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        streams, asked = [], []

        def do_POST(self):
            self.asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for choice in self.streams:
                self.wfile.write(f"data: {json.dumps({'choices': [{'index': 0} | choice]})}\n\n".encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()


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
