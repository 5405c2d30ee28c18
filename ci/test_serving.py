"""The app on a running cluster: deployed from its file, asked nonsense, overloaded, broken, changed, ended. Minutes.

The tests build on each other: each finds the app as the one before it left it.
"""

import contextlib
import json
import os
import random
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
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

pytestmark = pytest.mark.timeout(900)
URL = "http://127.0.0.1:8000"
MODEL = "my-llama-3.1-8b"
API_KEY, PROMPT = "key-canary-5e81", "Hello, this is prompt-canary-77c0"
KEY = {"Authorization": f"Bearer {API_KEY}"}
TOKEN_IN_VARIABLE, TOKEN_IN_FILE = "hf_CanaryOfTheVariable", "hf_CanaryOfTheFile"
COMPLETION = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
REPLICA, ROUTER = "ray::ServeReplica:default:LLMServer", "ray::ServeReplica:default:LLMRouter"
LOGS = Path("/tmp/ray/session_latest/logs")


@pytest.fixture(scope="module")
def cluster(cell, tmp_path_factory):
    """A Ray cluster, started and ended by the notebook's own cells. It knows secrets, which a test looks for later."""
    before, environment, names = what_the_tutorial_runs(), dict(os.environ), {}
    token_file = tmp_path_factory.mktemp("huggingface") / "token"
    token_file.write_text(TOKEN_IN_FILE)
    os.environ.update(API_KEY=API_KEY, HF_TOKEN=TOKEN_IN_VARIABLE, HF_TOKEN_PATH=str(token_file))
    os.environ["MODEL_SOURCE"] = str(ROOT / "build" / "tiny-llama")
    os.environ["RAY_SERVE_SLOW_STARTUP_WARNING_S"] = "10"
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
    return requests.post(f"{URL}/v1/completions", json=COMPLETION | changes, headers=KEY, timeout=120)


@contextlib.contextmanager
def load(clients: int = 4, **changes):
    """Send completions all the time. Yields a list that grows by (start, end, outcome, text) of each, in seconds."""
    outcomes, stop = [], threading.Event()

    def send():
        while not stop.wait(0.1):
            start_s = time.monotonic()
            try:
                answer = complete(**changes)
                outcome, text = answer.status_code, answer.text
            except requests.RequestException as error:
                outcome, text = type(error).__name__, str(error)
            outcomes.append((start_s, time.monotonic(), outcome, text))

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
    until_s = max([one[1] for one in failed], default=since_s) - since_s
    print(f"{what}: {len(outcomes)} sent, {len(failed)} failed {dict(Counter(one[2] for one in failed))}")
    print(f"  the last failure ended after {until_s:.0f} s, the longest wait for an answer was", end=" ")
    print(f"{max(one[1] - one[0] for one in outcomes if one[2] == 200):.0f} s")
    return failed


def server_status() -> dict:
    """What `serve status` says of the model's deployment; empty values before it knows it."""
    applications = yaml.safe_load(run("serve", "status").stdout)["applications"]
    nothing = {"status": "", "replica_states": {}, "message": ""}
    return applications.get("default", {}).get("deployments", {}).get("LLMServer:my-llama-3_1-8b", nothing)


def running_replicas() -> int:
    """How many replicas of the model Ray Serve says are running; 0 while they are being changed."""
    status = server_status()
    return status["replica_states"].get("RUNNING", 0) if status["status"] == "HEALTHY" else 0


def test_commands_from_another_ray_and_without_its_token(cluster, quoted):
    # Only the number is another one.
    program = "import ray; ray.__version__ = '2.59.0'; ray.init(address='auto')"
    quoted("Version mismatch: The cluster was started with: ...", run("python", "-c", program).stdout)
    result = run("serve", "status", RAY_AUTH_MODE="disabled")
    assert result.returncode != 0
    quoted("Authentication required: Unauthorized: Missing authentication token", result.stdout)


def test_app_that_asks_for_a_gpu_waits_and_says_so(cluster, quoted, tmp_path):
    deploy("serve_llama_3_1_8b:app", tmp_path)
    message = wait_for(lambda: server_status()["message"], "message of the deployment", 120)
    quoted("... replicas that have taken more than ... to be scheduled.", message)


@pytest.fixture(scope="module")
def served(cluster, tmp_path_factory):
    """The stand-in's app, deployed from the file, and answering. Its value is what was said of it on the way."""
    deploy("tiny_llama.app:app", tmp_path_factory.mktemp("served"))
    messages = []
    wait_for(lambda: messages.append(server_status()["message"]) or running_replicas() == 1, "replica")
    wait_for(lambda: complete().status_code == 200, "completion")
    return "\n".join(messages)


def processes(name: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]


def replicas() -> list[psutil.Process]:
    return processes(REPLICA)


def engines() -> list[psutil.Process]:
    """The replicas' engines. In a small environment, they can't name themselves VLLM::EngineCore."""
    children = [child for replica in replicas() for child in replica.children()]
    return [p for p in children if re.search("VLLM::EngineCore|spawn_main", " ".join(p.cmdline()))]


def metric(name: str) -> float:
    families = text_string_to_metric_families(requests.get("http://127.0.0.1:8080/metrics", timeout=30).text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def test_app_of_the_config_file_listens_on_loopback_only(served, quoted):
    quoted("... replicas that have taken more than ... to initialize.", served)
    sockets = [line.split()[3].rpartition(":") for line in run("ss", "-ltnH").stdout.splitlines()]
    addresses = {address for address, _, port in sockets if port == "8000" or 30000 <= int(port) <= 31000}
    assert addresses == {"127.0.0.1"}, sockets
    everywhere = {port for address, _, port in sockets if address in ("0.0.0.0", "*", "[::]")}
    assert {"8404", "9101", "8080", "44217", "44227"} <= everywhere, "The text says that metrics listen everywhere"


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
    before = engines()
    headers = {"Content-Type": "application/json", **(headers[0] if headers else {})}
    response = requests.post(f"{URL}{path}", data=data, headers=headers, timeout=60)
    print(response.status_code, response.text[:300])
    assert 400 <= response.status_code < 500, f"{response.status_code} {response.text[:500]}"
    assert len(before) == 1 and engines() == before and complete().status_code == 200


def test_troubleshooting_quotes_the_messages(served, quoted):
    def said(name: str) -> str:
        path, body = BAD_REQUESTS[name]
        return requests.post(f"{URL}{path}", json=body, timeout=60).json()["error"]["message"]

    quoted("The model `...` does not exist.", said("unknown model"))
    quoted("This model's maximum context length is 8192 tokens.", said("prompt longer than the context"))


# Defects of the pinned versions, by endpoint. The engine survives them.
KNOWN = {
    "/v1/responses": "500, or a stream that breaks off, on input items of some types",
    "/scale_elastic_ep": "500 on another size. Open to whoever reaches the port, like every endpoint without a key",
}


def test_requests_made_from_the_servers_own_description_get_no_server_error(served):
    description = schemathesis.openapi.from_dict(requests.get(f"{URL}/openapi.json", timeout=30).json())
    outcomes, failed, before = Counter(), {}, engines()
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
    assert len(before) == 1 and engines() == before and complete().status_code == 200


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


def test_more_than_a_replica_admits_is_told_to_come_back(served, cell, quoted):
    limits = re.findall(r"max_(?:ongoing|queued)_requests=(\d+)", cell("serve-app"))
    accepted = sum(map(int, limits))
    assert len(limits) == 2
    client = OpenAI(base_url=f"{URL}/v1", api_key=API_KEY, max_retries=20)
    with ThreadPoolExecutor(accepted + 80) as pool:
        sent = [pool.submit(complete, max_tokens=512, ignore_eos=True) for _ in range(accepted + 80)]
        wait_for(lambda: any(one.done() and one.result().status_code == 429 for one in sent), "refusal")
        patient = client.completions.with_raw_response.create(**COMPLETION)
    answers = [one.result() for one in sent]
    counts = Counter(answer.status_code for answer in answers)
    print(f"Overload: {dict(counts)}, a client that came back {patient.retries_taken} times has its answer")
    assert set(counts) == {200, 429} and counts[200] >= accepted
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.headers["Retry-After"] for answer in refused} == {"5"} and patient.retries_taken >= 1
    quoted("Request dropped due to backpressure", refused[0].text)
    assert complete().status_code == 200


@pytest.mark.parametrize("victims", [engines, replicas])
def test_only_replica_is_replaced(served, quoted, victims):
    [process] = victims()
    with load() as outcomes:
        time.sleep(3)
        process.kill()
        killed_s = time.monotonic()
        wait_for(lambda: any(one[2] != 200 for one in outcomes) or not process.is_running(), "sign of the death")
        time.sleep(5)
        wait_for(lambda: running_replicas() == 1 and complete().status_code == 200, "replacement", 400)
    report(f"One replica, {victims.__name__} killed", outcomes, killed_s)
    assert all(one[2] == 200 for one in outcomes if one[0] < killed_s - 2)
    if victims == engines:
        quoted("EngineCore encountered an issue.", next(one[3] for one in outcomes if one[2] == 500))
    assert len(engines()) == 1 and process.pid not in {p.pid for p in victims()}


def test_silent_router_means_503(served, quoted):
    [router] = processes(ROUTER)
    router.suspend()
    try:
        answer = complete()
    finally:
        router.resume()
    assert answer.status_code == 503
    quoted("Ingress request router failed", answer.text)
    wait_for(lambda: complete().status_code == 200, "completion")


def test_update_without_surge_interrupts_and_brings_a_key(served, quoted, tmp_path):
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
    quoted("Wrong or missing API key", answer.text)
    assert not "/invocations".startswith(GUARDED_PREFIX), "vLLM's own api_key covers it now: say so in the text"
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
    with contextlib.ExitStack() as stack:
        lines = []
        for _ in range(4):  # One after the other: the router deals them out in turn.
            answer = requests.post(f"{URL}/v1/completions", json=long, stream=True, timeout=60)
            lines.append(stack.enter_context(answer).iter_lines())
            assert next(lines[-1]).startswith(b"data: ")
        outcomes = stack.enter_context(load())
        time.sleep(2)
        replicas()[0].kill()
        killed_s = time.monotonic()
        whole = [stream_is_whole(line) for line in lines]
        time.sleep(3)
        wait_for(lambda: running_replicas() == 2, "second replica", 400)
        print(f"Two replicas again {time.monotonic() - killed_s:.0f} s after the death of one")
    assert set(whole) == {True, False}, "Some of the streams were on the replica that died, some on the other"
    failed = report("One of two replicas killed", outcomes, killed_s)
    assert not [one for one in failed if one[0] > killed_s + 1], failed


def stream_is_whole(lines) -> bool:
    """Read a stream to its end. A broken one raises, or ends without a finish_reason."""
    with contextlib.suppress(requests.RequestException):
        return any(b'"finish_reason":"length"' in line for line in lines)
    return False


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_ten_minutes_of_mixed_load_fail_nothing_and_leak_nothing(served):
    """`make soak`. The first two minutes fill caches and pools; the rest is compared with what they left."""
    chance, outcomes, memory_mib = random.Random(0), Counter(), []
    stream = {**COMPLETION, "ignore_eos": True, "stream": True}

    def send(kind: str) -> str:
        if kind == "malformed":
            return f"refused with {complete(max_tokens=-1).status_code}"
        if kind in ("short", "long"):
            return str(complete(max_tokens=8 if kind == "short" else 1000, ignore_eos=True).status_code)
        with requests.post(
            f"{URL}/v1/completions", json=stream | {"max_tokens": 300}, stream=True, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            if kind == "cancelled":
                return "left" if next(lines).startswith(b"data: ") else "no stream"
            return "whole" if stream_is_whole(lines) else "broken"

    def client():
        while time.monotonic() < end_s:
            kind = chance.choice(["short", "long", "streamed", "cancelled", "malformed"])
            try:
                outcomes[kind, send(kind)] += 1
            except requests.RequestException as error:
                outcomes[kind, type(error).__name__] += 1

    end_s = time.monotonic() + 600
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client) for _ in range(8)]
        while time.monotonic() < end_s:
            time.sleep(15)
            named = re.compile(
                r"ray::ServeReplica|ray::ServeController|ray::HAProxy|VLLM::|bin/haproxy|raylet/raylet|gcs_server"
            )
            found = {p.pid: (p.info["cmdline"], p.memory_info().rss / 2**20) for p in psutil.process_iter(["cmdline"])}
            found = {(pid, named.search(" ".join(c or []))): mib for pid, (c, mib) in found.items()}
            memory_mib.append({f"{name[0]} {pid}": mib for (pid, name), mib in found.items() if name})
    assert all(one.result() is None for one in clients)
    print(dict(outcomes))
    good = {
        ("short", "200"),
        ("long", "200"),
        ("streamed", "whole"),
        ("cancelled", "left"),
        ("malformed", "refused with 400"),
    }
    assert set(outcomes) == good and min(outcomes.values()) > 50
    wait_for(lambda: metric("ray_vllm_num_requests_running") == 0, "end of the last requests", 60)
    assert memory_mib[8].keys() == memory_mib[-1].keys()
    before, after = memory_mib[8], memory_mib[-1]
    for name, mib in before.items():
        print(f"{name}: {mib:.0f} MiB after two minutes, {after[name]:.0f} at the end")
    # 5 %, or 5 MiB where that is more: small processes, such as the raylet, grow by some 3 MiB at first.
    assert all(after[name] - mib < max(0.05 * mib, 5) for name, mib in before.items())


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
