"""The app on a running cluster: deployed from its file, asked nonsense, overloaded, broken, changed, ended. Minutes.

The tests build on each other: each finds the app as the one before it left it.
"""

import contextlib
import json
import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
import schemathesis
import yaml
from conftest import ROOT, run, what_the_tutorial_runs
from hypothesis import HealthCheck, Phase, given, settings
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.timeout(900)
URL = "http://127.0.0.1:8000"
MODEL = "my-llama-3.1-8b"
API_KEY, PROMPT = "key-canary-5e81", "Hello, this is prompt-canary-77c0"
KEY = {"Authorization": f"Bearer {API_KEY}"}
TOKEN_IN_VARIABLE, TOKEN_IN_FILE = "hf_CanaryOfTheVariable", "hf_CanaryOfTheFile"
COMPLETION = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
ENGINE, REPLICA = "VLLM::EngineCore", "ray::ServeReplica:default:LLMServer"
LOGS = Path("/tmp/ray/session_latest/logs")


@pytest.fixture(scope="module")
def cluster(cell, tmp_path_factory):
    """A Ray cluster, started and ended by the notebook's own cells. It knows secrets, which a test looks for later."""
    before, environment, names = what_the_tutorial_runs(), dict(os.environ), {}
    token_file = tmp_path_factory.mktemp("huggingface") / "token"
    token_file.write_text(TOKEN_IN_FILE)
    os.environ.update(API_KEY=API_KEY, HF_TOKEN=TOKEN_IN_VARIABLE, HF_TOKEN_PATH=str(token_file))
    for name in ("check-gpu", "check-model", "check-ports", "start-ray"):
        exec(cell(name), names)
    try:
        deadline = time.monotonic() + 90
        while True:  # The dashboard, which `serve deploy` talks to, comes last.
            with contextlib.suppress(requests.ConnectionError):
                requests.get("http://127.0.0.1:8265", timeout=10)
                break
            assert time.monotonic() < deadline, "Ray's dashboard isn't up after 90 s"
            time.sleep(1)
        yield
        assert run("serve", "shutdown", "-y").returncode == 0
    finally:
        exec(cell("stop-ray"), {**names, "ray": SimpleNamespace(shutdown=lambda: None)})
        os.environ.clear()
        os.environ.update(environment)
    deadline = time.monotonic() + 15
    while (left := what_the_tutorial_runs() - before) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left, "\n".join(sorted(left))


def deploy(import_path: str, folder: Path, server: dict | None = None, router: dict | None = None) -> None:
    """Deploy serve_config.yaml with another app in it, and with options for its two deployments."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    options = {"LLMServer:my-llama-3_1-8b": server, "LLMRouter": router}
    deployments = [{"name": name, **options} for name, options in options.items() if options]
    config["applications"][0] |= {"import_path": import_path, "deployments": deployments}
    (folder / "serve_config.yaml").write_text(yaml.safe_dump(config))
    result = run("serve", "deploy", str(folder / "serve_config.yaml"))
    assert result.returncode == 0, result.stdout


def wait_for(condition, what: str, timeout_s: float = 300):
    """Poll until `condition()` holds, and return what it gave. A refused connection counts as not yet."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(requests.RequestException):
            if result := condition():
                return result
        assert time.monotonic() < deadline, f"After {timeout_s} s, still no {what}: {run('serve', 'status').stdout}"
        time.sleep(1)


def complete(**changes) -> requests.Response:
    return requests.post(f"{URL}/v1/completions", json=COMPLETION | changes, headers=KEY, timeout=60)


@contextlib.contextmanager
def load(clients: int = 4, **changes):
    """Send completions all the time. Yields a list that grows by (start, end, outcome) of each, in seconds."""
    outcomes, stop = [], threading.Event()

    def send():
        while not stop.wait(0.1):
            start_s = time.monotonic()
            try:
                outcome = complete(**changes).status_code
            except requests.RequestException as error:
                outcome = type(error).__name__
            outcomes.append((start_s, time.monotonic(), outcome))

    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(send)
        try:
            yield outcomes
        finally:
            stop.set()


def report(what: str, outcomes: list, since_s: float) -> list:
    """Print one line for the table of faults, and return the requests that failed."""
    failed = [one for one in outcomes if one[2] != 200]
    until_s = max([end_s for _, end_s, _ in failed], default=since_s) - since_s
    print(f"{what}: {len(outcomes)} sent, {len(failed)} failed {dict(Counter(one[2] for one in failed))}")
    print(f"  the last failure ended after {until_s:.0f} s, the longest wait for an answer was", end=" ")
    print(f"{max(end_s - start_s for start_s, end_s, outcome in outcomes if outcome == 200):.0f} s")
    return failed


def running_replicas() -> int:
    """How many replicas of the model Ray Serve says are running; 0 while they are being changed."""
    application = yaml.safe_load(run("serve", "status").stdout.split("target_capacity")[0])["applications"]["default"]
    states = application["deployments"]["LLMServer:my-llama-3_1-8b"]
    return states["replica_states"].get("RUNNING", 0) if states["status"] == "HEALTHY" else 0


@pytest.fixture(scope="module")
def served(cluster, tmp_path_factory):
    """The stand-in's app, deployed from the file, and answering."""
    deploy("tiny_llama.app:app", tmp_path_factory.mktemp("served"))
    wait_for(lambda: complete().status_code == 200, "completion")


def processes(name: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]


def metric(name: str) -> float:
    families = text_string_to_metric_families(requests.get("http://127.0.0.1:8080/metrics", timeout=30).text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def test_app_of_the_config_file_listens_on_loopback_only(served):
    listening = run("ss", "-ltnH", "sport = :8000 or ( sport >= :30000 and sport <= :31000 )").stdout
    addresses = {line.split()[3].rpartition(":")[0] for line in listening.splitlines()}
    assert addresses == {"127.0.0.1"}, listening


def chat(**changes) -> tuple:
    return "/v1/chat/completions", CHAT | changes


def completion(**changes) -> tuple:
    return "/v1/completions", COMPLETION | changes


def message(**changes) -> tuple:
    return chat(messages=[{"role": "user", "content": "Hello"} | changes])


# What is wrong, and the request: path, body as an object (sent as JSON) or as bytes, headers.
BAD_REQUESTS = {
    "JSON that breaks off": ("/v1/completions", b'{"model": '),
    "empty body": ("/v1/completions", b""),
    "array": ("/v1/completions", b"[]"),
    "null": ("/v1/completions", b"null"),
    "string": ("/v1/completions", b'"Hello"'),
    "invalid UTF-8": ("/v1/completions", b'{"model": "my-llama-3.1-8b", "prompt": "\xff\xfe"}'),
    "nested 100,000 deep": ("/v1/completions", b"[" * 100_000),
    "form instead of JSON": ("/v1/completions", b"prompt=Hello", {"Content-Type": "application/x-www-form-urlencoded"}),
    "plain text": ("/v1/completions", b"Hello", {"Content-Type": "text/plain"}),
    "no messages": ("/v1/chat/completions", {"model": MODEL}),
    "empty messages": chat(messages=[]),
    "messages as text": chat(messages="Hello"),
    "message without a role": chat(messages=[{"content": "Hello"}]),
    "content is a number": message(content=7),
    "content of an unknown kind": message(content=[{"type": "smell", "smell": "roses"}]),
    "image for a text model": message(
        content=[{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    ),
    "file URL": message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
    "unknown model": completion(model="gpt-9"),
    "model is a number": completion(model=7),
    "no prompt": ("/v1/completions", {"model": MODEL}),
    "prompt is an object": completion(prompt={"text": "Hello"}),
    "empty list of prompts": completion(prompt=[]),
    "negative token": completion(prompt=[-1]),
    "token beyond the vocabulary": completion(prompt=[10**9]),
    "prompt longer than the context": completion(prompt="word " * 20_000),
    "prompt of 10 MB": completion(prompt="word " * 2_000_000),
    "max_tokens below zero": completion(max_tokens=-1),
    "max_tokens is text": completion(max_tokens="many"),
    "max_tokens beyond the context": completion(max_tokens=10**12),
    "temperature below zero": completion(temperature=-1),
    "temperature is text": completion(temperature="hot"),
    "temperature is NaN": ("/v1/completions", json.dumps(COMPLETION | {"temperature": float("nan")}).encode()),
    "top_p above one": completion(top_p=2),
    "top_p is zero": completion(top_p=0),
    "top_k below -1": completion(top_k=-7),
    "n is zero": completion(n=0),
    "n is a million": completion(n=10**6),
    "logprobs below zero": completion(logprobs=-5),
    "too many logprobs": completion(logprobs=10**6),
    "too many top_logprobs": chat(logprobs=True, top_logprobs=10**6),
    "seed beyond 64 bits": completion(seed=2**70),
    "presence penalty beyond 2": completion(presence_penalty=99),
    "response format of an unknown type": chat(response_format={"type": "poem"}),
    "JSON schema that is none": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    ),
    "regular expression that is none": chat(structured_outputs={"regex": "("}),
    "grammar that is none": chat(structured_outputs={"grammar": "root ::= ("}),
    "tools as text": chat(tools="hammer"),
    "choice of a tool that isn't there": chat(tool_choice={"type": "function", "function": {"name": "hammer"}}),
    "chat template of one's own": chat(chat_template="{{ messages.__class__.__mro__ }}"),
    "stream options without a stream": chat(stream_options={"include_usage": True}),
    "text to tokens without a text": ("/tokenize", {"model": MODEL}),
    "unknown endpoint": ("/v1/telepathy", COMPLETION),
    "climbing path": ("/v1/../../etc/passwd", COMPLETION),
    "header of 100 kB": (*completion(), {"X-Padding": "x" * 100_000}),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request_gets_an_error_that_blames_the_client(served, name):
    path, body, *headers = BAD_REQUESTS[name]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    before = processes(ENGINE)
    headers = {"Content-Type": "application/json", **(headers[0] if headers else {})}
    response = requests.post(f"{URL}{path}", data=data, headers=headers, timeout=60)
    print(response.status_code, response.text[:300])
    assert 400 <= response.status_code < 500, f"{response.status_code} {response.text[:500]}"
    assert processes(ENGINE) == before and complete().status_code == 200


@pytest.mark.parametrize(
    "name, quoted",
    [
        ("unknown model", "The model `...` does not exist."),
        ("prompt longer than the context", "This model's maximum context length is 8192 tokens."),
    ],
)
def test_troubleshooting_quotes_the_real_message(served, cell, name, quoted):
    assert quoted in cell("troubleshooting")
    path, body = BAD_REQUESTS[name]
    said = requests.post(f"{URL}{path}", json=body, timeout=60).json()["error"]["message"]
    assert re.match(re.escape(quoted).replace(re.escape("..."), ".*"), said), said


# Defects of the pinned versions, by endpoint. The engine survives them.
KNOWN = {
    "/v1/responses": "500, or a stream that breaks off, on input items of some types",
    "/scale_elastic_ep": "500 on another size. Open to whoever reaches the port, like every endpoint without a key",
}


def test_requests_made_from_the_servers_own_description_get_no_server_error(served):
    description = schemathesis.openapi.from_dict(requests.get(f"{URL}/openapi.json", timeout=30).json())
    outcomes, failed, before = Counter(), {}, processes(ENGINE)
    for operation in [result.ok() for result in description.get_all_operations()]:

        @settings(
            max_examples=15,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def send(case):
            if isinstance(case.body, dict):  # A known model and a short answer get further than noise does.
                case.body |= {"model": MODEL, "max_tokens": 1}
                for name in ("n", "best_of", "max_completion_tokens", "max_output_tokens", "sampling_params"):
                    case.body.pop(name, None)
            try:
                outcome = case.call(base_url=URL, timeout=60).status_code
            except requests.exceptions.ChunkedEncodingError:
                outcome = 500  # The stream broke off.
            outcomes[outcome] += 1
            if outcome >= 500:
                failed.setdefault(case.path, case.body)

        send()
    print("Requests by outcome:", dict(outcomes))
    assert sum(outcomes.values()) > 200 and outcomes[200] > 50
    assert set(failed) <= set(KNOWN), failed
    assert processes(ENGINE) == before and complete().status_code == 200


@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "?1"}], ids=["plain", "header game"])
def test_requests_of_a_client_that_leaves_end(served, headers):
    def tokens() -> float:
        return metric("ray_vllm_generation_tokens_total")

    before = tokens()
    long = {**COMPLETION, "max_tokens": 8000, "n": 4, "ignore_eos": True, "stream": True}
    with requests.post(f"{URL}/v1/completions", json=long, headers=headers, stream=True, timeout=60) as response:
        assert next(response.iter_lines()).startswith(b"data: ")
    time.sleep(5)  # Ray reports the metrics every two seconds, later when the machine is busy.
    wait_for(lambda: metric("ray_vllm_num_requests_running") == 0, "end of the abandoned requests")
    assert 0 < tokens() - before < 16_000, "They ran to their end, which is after 32,000 tokens"


def test_more_than_a_replica_takes_on_is_told_to_come_back(served):
    from tiny_llama.app import llm_config

    limits = llm_config.deployment_config
    accepted = limits["max_ongoing_requests"] + limits["max_queued_requests"]
    with ThreadPoolExecutor(accepted + 80) as pool:
        sent = [pool.submit(complete, max_tokens=256, ignore_eos=True) for _ in range(accepted + 80)]
    answers = [one.result() for one in sent]
    counts = Counter(answer.status_code for answer in answers)
    print("Overload:", dict(counts))
    assert set(counts) == {200, 429} and counts[200] >= accepted
    assert {answer.headers["Retry-After"] for answer in answers if answer.status_code == 429} == {"5"}
    assert complete().status_code == 200


@pytest.mark.parametrize("victim", [ENGINE, REPLICA])
def test_only_replica_is_replaced(served, victim):
    [process] = processes(victim)
    with load() as outcomes:
        time.sleep(3)
        process.kill()
        killed_s = time.monotonic()
        wait_for(lambda: any(one[2] != 200 for one in outcomes) or not process.is_running(), "sign of the death")
        time.sleep(5)
        wait_for(lambda: running_replicas() == 1 and complete().status_code == 200, "replacement", 400)
    report(f"{victim} killed, one replica", outcomes, killed_s)
    assert all(outcome == 200 for start_s, _, outcome in outcomes if start_s < killed_s - 2)
    assert len(processes(ENGINE)) == 1 and process.pid not in {p.pid for p in processes(victim)}


def test_update_without_surge_interrupts_and_brings_a_key(served, tmp_path):
    began_s = time.monotonic()
    with load() as outcomes:
        deploy("ci.api_key_app:app", tmp_path)
        wait_for(lambda: requests.get(f"{URL}/v1/models", timeout=30).status_code == 401, "demand for a key", 400)
    report("Update, one replica, no surge", outcomes, began_s)
    # Serve's own health check answers before the app does.
    paths = [*requests.get(f"{URL}/openapi.json", headers=KEY, timeout=30).json()["paths"], "/openapi.json", "/metrics"]
    assert {"/v1/chat/completions", "/invocations", "/tokenize"} < set(paths)
    for path in paths:
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": API_KEY}):
            for method in ("GET", "POST"):
                answer = requests.request(method, f"{URL}{path}", json=CHAT, headers=wrong, timeout=30)
                assert answer.status_code == 401, f"{method} {path} with {wrong}: {answer.status_code}"
    assert complete().status_code == 200


def test_update_with_surge_fails_no_request(served, cell, tmp_path):
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", cell("about-serve-deploy"), flags=re.S)[1])
    server, router = ({**one} for one in shown["deployments"])
    assert (server.pop("name"), router.pop("name")) == ("LLMServer:my-llama-3_1-8b", "LLMRouter")
    began_s = time.monotonic()
    with load() as outcomes:
        two = {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}}
        deploy("tiny_llama.app:app", tmp_path, server | two, router)
        wait_for(lambda: requests.get(f"{URL}/v1/models", timeout=30).status_code == 200, "answer without a key", 400)
        wait_for(lambda: running_replicas() == 2, "second replica", 400)
    assert not report("Update to two replicas, with surge", outcomes, began_s)


def test_one_of_two_replicas_dies_and_later_requests_succeed(served):
    long = {**COMPLETION, "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with contextlib.ExitStack() as stack, load() as outcomes:
        post = requests.post
        streams = [stack.enter_context(post(f"{URL}/v1/completions", json=long, stream=True)) for _ in range(2)]
        lines = [stream.iter_lines() for stream in streams]
        assert all(next(line).startswith(b"data: ") for line in lines)
        processes(REPLICA)[0].kill()
        killed_s = time.monotonic()
        whole = [stream_is_whole(line) for line in lines]
        time.sleep(3)
        wait_for(lambda: running_replicas() == 2, "second replica", 400)
        print(f"Two replicas again {time.monotonic() - killed_s:.0f} s after the death of one")
    assert sorted(whole) == [False, True], "One stream of the two was on the replica that died"
    failed = report("One of two replicas killed", outcomes, killed_s)
    assert not [one for one in failed if one[0] > killed_s + 1], failed


def stream_is_whole(lines) -> bool:
    """Read a stream to its end. A broken one raises, or ends without a finish_reason."""
    with contextlib.suppress(requests.RequestException):
        return any(b'"finish_reason":"length"' in line for line in lines)
    return False


def test_secrets_and_prompts_are_in_no_log(served):
    """The exceptions are those that the text names."""
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    places = {str(file): file.read_text(errors="replace") for file in LOGS.rglob("*") if file.is_file()}
    places |= {name: (ROOT / "build" / name).read_text() for name in ("ray.log",)}
    places["serve status"] = run("serve", "status").stdout + run("serve", "config").stdout
    for path in ("serve/applications/", "v0/actors", "v0/runtime_envs", "v0/tasks", "v0/workers", "v0/jobs", "jobs/"):
        url = f"http://127.0.0.1:8265/api/{path}?detail=1&limit=1000"
        places[path] = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=60).text
    assert len(places) > 20 and "my-llama-3.1-8b" in "".join(places.values())
    found = {
        secret: {name for name, text in places.items() if secret in text}
        for secret in (TOKEN_IN_FILE, API_KEY, PROMPT.split()[-1], TOKEN_IN_VARIABLE)
    }
    assert found.pop(TOKEN_IN_VARIABLE) == {str(LOGS / "runtime_env_agent.log"), "v0/runtime_envs", "v0/tasks"}
    assert not any(found.values()), found


def test_answers_under_way_may_finish(served):
    long = {**COMPLETION, "max_tokens": 8000, "n": 4, "ignore_eos": True, "stream": True}
    with requests.post(f"{URL}/v1/completions", json=long, stream=True, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(b"data: ")
        began_s = time.monotonic()
        assert run("serve", "shutdown", "-y").returncode == 0
        assert stream_is_whole(lines)
    print(f"The stream ended {time.monotonic() - began_s:.0f} s after the shutdown began")
    wait_for(lambda: not processes(REPLICA) and not processes(ENGINE), "end of the replicas")
