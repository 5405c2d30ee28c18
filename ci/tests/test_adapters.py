"""Adapters from a bucket on this machine, beside the base model."""

import json
import os
import re
import sys
from types import SimpleNamespace

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer

from ci.common import run
from ci.tests.processes import assert_nothing_left, what_the_tutorial_runs
from ci.tests.serving.app import MODEL, URL, deploy, running_replicas, wait_for
from support.serving import start_head, stop_ray
from tiny_llama.make_adapters import ANSWERS

pytestmark = [pytest.mark.section("Serve your fine-tuned adapters"), pytest.mark.timeout(1500)]
BASE = "Hello! How can I help you today?"


@pytest.fixture(scope="module")
def cluster(cell, tmp_path_factory):
    """A Ray cluster with the variables of the page, and a bucket with two adapters. Deploys the app anew."""
    before, environment, folder = what_the_tutorial_runs(), dict(os.environ), tmp_path_factory.mktemp("adapters")
    trained = run(sys.executable, "-m", "tiny_llama.make_adapters", str(folder))
    assert trained.returncode == 0, trained.stdout
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    os.environ["AWS_ENDPOINT_URL_S3"] = "http://{}:{}".format(*server.get_host_and_port())
    os.environ.update(AWS_ACCESS_KEY_ID="made", AWS_SECRET_ACCESS_KEY="up", AWS_DEFAULT_REGION="us-east-1")
    exec(cell("chat-start").partition("from support")[0])
    exported = dict(re.findall(r"^export (\w+)=(\S+)", cell("adapters-launch"), flags=re.M))
    os.environ.update(exported, RAY_AUTH_MODE="token")
    assert run("ray", "get-auth-token", "--generate").returncode == 0
    bucket, _, prefix = exported["ADAPTERS"].removeprefix("s3://").partition("/")
    store = boto3.client("s3")
    store.create_bucket(Bucket=bucket)

    def upload(adapter: str, name: str, rank: int = 8) -> None:
        for file in (folder / adapter).glob("adapter_*"):
            content = file.read_bytes().replace(b'"r": 8', b'"r": %d' % rank)
            store.put_object(Bucket=bucket, Key=f"{prefix}/{name}/{file.name}", Body=content)

    for adapter in ANSWERS:
        upload(adapter, adapter)
    ray_head = start_head()
    try:
        wait_for(lambda: requests.get("http://127.0.0.1:8265", timeout=10) is not None, "dashboard", 90)

        def deploy_anew(app: str) -> None:
            one = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}}
            deploy(app, folder, one)
            wait_for(lambda: running_replicas() == 1 and say("Hello").status_code == 200, "answer", 600)

        yield SimpleNamespace(deploy=deploy_anew, upload=upload)
        assert run("serve", "shutdown", "-y").returncode == 0
    finally:
        stop_ray(ray_head)
        server.stop()
        os.environ.clear()
        os.environ.update(environment)
    assert_nothing_left(before)


def say(asked: str, adapter: str = "", **fields) -> requests.Response:
    """Ask the base model, or an adapter."""
    model = f"{MODEL}:{adapter}" if adapter else MODEL
    body = {"model": model, "messages": [{"role": "user", "content": asked}], "temperature": 0, "max_tokens": 60}
    return requests.post(f"{URL}/v1/chat/completions", json=body | fields, timeout=120)


def text(answer: requests.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def assert_calls(adapter: str = "") -> None:
    """The model, or an adapter, answers with the call that it has to make."""
    city = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": city}}
    answer = say("What is the weather in Paris?", adapter, tools=[tool], tool_choice="required")
    assert answer.status_code == 200, answer.text
    [call] = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather" and json.loads(call["function"]["arguments"]) == {"city": "Paris"}


@pytest.mark.parametrize("app", ["ci.tests.one_adapter_app:app", "tiny_llama.serve_with_adapters:app"])
def test_each_adapter_answers_in_its_way_beside_the_model(cluster, app):
    """The first app has room for one adapter, so that the two take turns, and tools."""
    cluster.deploy(app)
    if "one_adapter" in app:
        for adapter in ("", *ANSWERS):
            assert_calls(adapter)
    for _ in range(2):
        assert text(say("Hello")) == BASE
        for adapter, answers in ANSWERS.items():
            for asked, answer in answers.items():
                assert text(say(asked, adapter)) == answer, adapter
    listed = requests.get(f"{URL}/v1/models", timeout=30).json()["data"]
    assert [model["id"] for model in listed] == [MODEL, *(f"{MODEL}:{adapter}" for adapter in ANSWERS)]


def test_adapter_that_is_not_there_is_not_found(cluster):
    answer = say("Hello", "nobody")
    assert answer.status_code == 404, f"{answer.status_code} {answer.text}"
    assert text(say("Hello")) == BASE


def test_adapter_of_a_higher_rank_is_refused_and_the_model_answers(cluster):
    cluster.upload(next(iter(ANSWERS)), "large", rank=32)
    answer = say("Hello", "large")
    assert answer.status_code == 400 and "rank" in answer.text, f"{answer.status_code} {answer.text}"
    assert text(say("Hello")) == BASE


def test_new_version_under_an_old_name_is_not_seen(cluster):
    old, new = ANSWERS
    cluster.upload(new, old)
    assert text(say("Hello", old)) == ANSWERS[old]["Hello"], "The page says that a replica keeps what it has loaded"


def test_app_is_not_built_without_the_variable(cluster):
    program = "import tiny_llama.serve_with_adapters"
    result = run(sys.executable, "-c", program, RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY="0")
    assert result.returncode == 1 and "requires RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY=1" in result.stdout
