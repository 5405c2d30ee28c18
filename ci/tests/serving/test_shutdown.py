"""`serve shutdown` cuts answers under way. They finish where the app is deleted first."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
import yaml

from ci.common import run, troubleshooting
from ci.tests.serving.app import COMPLETION, URL, engines, replicas, wait_for

pytestmark = pytest.mark.section("Shut down the local deployment")


def begin(**changes):
    """The lines of a stream that has begun."""
    body = COMPLETION | {"ignore_eos": True, "stream": True} | changes
    lines = requests.post(f"{URL}/v1/completions", json=body, stream=True, timeout=120).iter_lines()
    assert next(lines).startswith(b"data: ")
    return lines


def hold(running: list[psutil.Process]):
    for one in running:
        one.suspend()


def let_go(running: list[psutil.Process]):
    for one in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.resume()


def test_answers_finish_where_the_app_is_deleted_and_are_cut_by_a_shutdown(served, tmp_path):
    """The engines are held meanwhile, so that no answer is over by itself, however fast the machine is."""
    held, running = engines(), engines() + replicas()
    long, short = begin(max_tokens=8000, n=4), begin(max_tokens=500)
    hold(held)
    nothing = "applications: []"
    assert f"`{nothing}`" in troubleshooting() and yaml.safe_load(nothing) == {"applications": []}
    (tmp_path / "nothing.yaml").write_text(nothing + "\n")
    deleted_s = time.monotonic()
    try:
        assert run("serve", "deploy", str(tmp_path / "nothing.yaml")).returncode == 0
        wait_for(lambda: "status: DELETING" in run("serve", "status").stdout, "app that is being deleted", 90)
        let_go(held)
        assert sum(b'"finish_reason":"length"' in line for line in short) == 1
        hold(held)
        with ThreadPoolExecutor(1) as pool:
            shutdown = pool.submit(run, "serve", "shutdown", "-y")
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                list(long)
            assert time.monotonic() - deleted_s < 110, "The deletion's own limit, 120 s, may have cut it"
            assert shutdown.result().returncode == 0
    finally:
        let_go(held)
    wait_for(lambda: not any(one.is_running() for one in running), "end of the replicas and engines")
