"""A shutdown lets answers under way finish."""

import inspect
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from ray import serve
from ray.dashboard.modules.serve import serve_head
from ray.serve._private.client import ServeControllerClient

from ci.common import run
from ci.tests.serving.app import COMPLETION, URL, engines, replicas, wait_for


@pytest.mark.section("Shut down the local deployment")
def test_serve_shutdown_waits_half_a_minute_at_most():
    """What the command asks the dashboard for. A stream that outlasts it would take minutes on a slow machine."""
    assert inspect.signature(ServeControllerClient.shutdown).parameters["timeout_s"].default == 30
    assert " client.shutdown()\n" in inspect.getsource(serve.shutdown)
    assert " serve.shutdown()\n" in inspect.getsource(serve_head)


@pytest.mark.section("Shut down the local deployment")
def test_answers_under_way_may_finish(served):
    long = {**COMPLETION, "max_tokens": 4000, "n": 4, "ignore_eos": True, "stream": True}
    with (
        ThreadPoolExecutor(1) as pool,
        requests.post(f"{URL}/v1/completions", json=long, stream=True, timeout=60) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith(b"data: ")
        began_s, running = time.monotonic(), replicas() + engines()
        shutdown = pool.submit(run, "serve", "shutdown", "-y")
        finished = sum(b'"finish_reason":"length"' in line for line in lines)
        print(f"The stream ended {time.monotonic() - began_s:.0f} s after the shutdown began")
        assert finished == 4 and shutdown.result().returncode == 0
    wait_for(lambda: not any(p.is_running() for p in running), "end of the replicas and engines")
