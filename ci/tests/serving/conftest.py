"""One Ray cluster for all of these tests, and the app on it. Each test finds the app as the one before it left it."""

import os

import pytest
import requests

from ci.common import ROOT, run
from ci.tests.processes import assert_nothing_left, what_the_tutorial_runs
from ci.tests.serving.app import (
    API_KEY,
    APP,
    TOKEN_IN_FILE,
    TOKEN_IN_VARIABLE,
    complete,
    deploy,
    listening,
    running_replicas,
    server_status,
    wait_for,
)
from support.machine import STAND_IN
from support.serving import start_head, stop_ray

ORDER = """start limits listening structured advisories bad_requests faults key update two_replicas soak secrets
    shutdown""".split()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """In ORDER, each with its time limit."""
    ours = [index for index, item in enumerate(items) if item.path.parent.name == "serving"]
    ordered = sorted((items[i] for i in ours), key=lambda item: ORDER.index(item.path.stem.removeprefix("test_")))
    for index, item in zip(ours, ordered, strict=True):
        items[index] = item
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="package")
def cluster(cell, tmp_path_factory):
    """A Ray cluster, started and ended by the notebook's own cells. It knows secrets, which a test looks for later.

    Its value: the ports on which something listened before.
    """
    before, environment, names, ray_head = what_the_tutorial_runs(), dict(os.environ), {}, None
    listened = set(listening())
    token_file = tmp_path_factory.mktemp("huggingface") / "token"
    token_file.write_text(TOKEN_IN_FILE)
    try:
        os.environ.update(API_KEY=API_KEY, HF_TOKEN=TOKEN_IN_VARIABLE, HF_TOKEN_PATH=str(token_file))
        if APP == STAND_IN:
            os.environ["MODEL_SOURCE"] = str(ROOT / "build" / "tiny-llama")
            # In place of 5: on two busy cores, the router may answer a burst later than that.
            os.environ["RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S"] = "20"
            # In place of 120: a stream of thousands of tokens may take longer there.
            os.environ["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] = "600"
        # Said early and often, as a fast machine starts a replica in less than Ray Serve's half a minute.
        os.environ |= {"RAY_SERVE_SLOW_STARTUP_WARNING_S": "3", "RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S": "1"}
        exec(cell("check"), names)
        exec(cell("start-ray").partition("from support")[0], names)  # The variables
        ray_head = start_head()
        # The dashboard, which `serve deploy` talks to, comes last.
        wait_for(lambda: requests.get("http://127.0.0.1:8265", timeout=10) is not None, "dashboard", 90)
        yield listened
        assert run("serve", "shutdown", "-y").returncode == 0
    finally:
        if ray_head:
            stop_ray(ray_head)
        os.environ.clear()
        os.environ.update(environment)
    assert_nothing_left(before)


@pytest.fixture(scope="package")
def served(cluster, tmp_path_factory):
    """The app, deployed from the file, and answering. Its value is what was said of it on the way."""
    # One replica under any load: bursts would call for a second one.
    one = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}}
    deploy(APP, tmp_path_factory.mktemp("served"), one)
    messages = []
    wait_for(lambda: messages.append(server_status()["message"]) or running_replicas() == 1, "replica", 600)
    wait_for(lambda: complete().status_code == 200, "completion")
    return "\n".join(messages)
