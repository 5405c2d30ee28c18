"""An update with surge fails no request."""

import re
import time

import pytest
import requests
import yaml

from ci.common import read_notebook
from ci.tests.serving.app import APP, OLD_ROUTER_STAYS, URL, deploy, load, report, running_replicas, wait_for


@pytest.mark.timeout(1600)  # Above its waits, so that they say what they waited for
@pytest.mark.section("Update without an outage")
def test_update_with_surge_fails_no_request(served, tmp_path):
    [text] = [cell.source for cell in read_notebook("next_steps.ipynb").cells if cell.id == "updates"]
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, flags=re.S)[1])
    server, router = ({**one} for one in shown["deployments"])
    assert (server.pop("name"), router.pop("name")) == ("LLMServer:my-llama-3_1-8b", "LLMRouter")
    assert router.items() >= OLD_ROUTER_STAYS.items(), "The routers that leave have other settings than the page's"
    began_s = time.monotonic()
    with load() as outcomes:
        two = {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}}
        deploy(APP, tmp_path, server | two, router)
        wait_for(lambda: requests.get(f"{URL}/v1/models", timeout=30).status_code == 200, "answer without a key", 700)
        wait_for(lambda: running_replicas() == 2, "second replica", 700)
    assert not report("Update with surge", outcomes, began_s)
