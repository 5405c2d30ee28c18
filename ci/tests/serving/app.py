"""The app that these tests share: how to ask it, watch it, deploy it anew, and what runs of it."""

import contextlib
import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ci.common import ROOT, run
from support.machine import STAND_IN

URL = "http://127.0.0.1:8000"
MODEL = "my-llama-3.1-8b"
APP = os.environ.get("APP", STAND_IN)  # On a GPU, the real one: CONTRIBUTING.md
API_KEY, PROMPT = "key-canary-5e81", "Hello, this is prompt-canary-77c0"
KEY = {"Authorization": f"Bearer {API_KEY}"}
TOKEN_IN_VARIABLE, TOKEN_IN_FILE = "hf_CanaryOfTheVariable", "hf_CanaryOfTheFile"
COMPLETION = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
# As next_steps.ipynb says: it has to be there before the first update.
OLD_ROUTER_STAYS = {"graceful_shutdown_wait_loop_s": 10}
REPLICA, ROUTER = "ray::ServeReplica:default:LLMServer", "ray::ServeReplica:default:LLMRouter"
LOGS = Path("/tmp/ray/session_latest/logs")


def deploy(import_path: str, folder: Path, server: dict | None = None, router: dict = OLD_ROUTER_STAYS) -> None:
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
def load(ask=complete):
    """Send completions with `ask()` from four clients.

    Yields a growing list of each one's start and end (s), outcome and text.
    """
    outcomes, stop = [], threading.Event()

    def send():
        while not stop.wait(0.1):
            start_s = time.monotonic()
            try:
                answer = ask()
                outcome, text = answer.status_code, answer.text
            except requests.RequestException as error:
                outcome, text = type(error).__name__, str(error)
            outcomes.append((start_s, time.monotonic(), outcome, text))

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(send)
        try:
            yield outcomes
        finally:
            stop.set()


def report(what: str, outcomes: list, since_s: float) -> list:
    """Print one line for the table of faults, and return the requests that failed."""
    failed = [one for one in outcomes if one[2] != 200]
    until_s = max([one[1] for one in failed], default=since_s) - since_s
    wait_s = max(one[1] - one[0] for one in outcomes if one[2] == 200)
    print(f"{what}: {len(outcomes)} sent, {len(failed)} failed {dict(Counter(one[2] for one in failed))}")
    print(f"  the last failure ended after {until_s:.0f} s, the longest wait for an answer was {wait_s:.0f} s")
    return failed


def server_status() -> dict:
    """What `serve status` says of the model's deployment; empty values while it knows nothing of it."""
    nothing = {"status": "", "replica_states": {}, "message": ""}
    result = run("serve", "status")
    applications = {} if result.returncode else yaml.safe_load(result.stdout)["applications"]
    return applications.get("default", {}).get("deployments", {}).get("LLMServer:my-llama-3_1-8b", nothing)


def running_replicas() -> int:
    """How many replicas of the model Ray Serve says are running; 0 while they are being changed."""
    status = server_status()
    return status["replica_states"].get("RUNNING", 0) if status["status"] == "HEALTHY" else 0


def processes(name: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]


def replicas() -> list[psutil.Process]:
    return processes(REPLICA)


def engines() -> list[psutil.Process]:
    """The replicas' engines. In a small environment, they can't name themselves VLLM::EngineCore."""
    parents = [replica.pid for replica in replicas()]
    children = [p for p in psutil.process_iter(["cmdline", "ppid"]) if p.info["ppid"] in parents]
    return [p for p in children if re.search("VLLM::EngineCore|spawn_main", " ".join(p.info["cmdline"] or []))]


def listening() -> dict[int, set[str]]:
    """The addresses of each port that listens here."""
    found = {}
    for line in run("ss", "-ltnH").stdout.splitlines():
        address, _, port = line.split()[3].rpartition(":")
        found.setdefault(int(port), set()).add(address)
    return found


def metric(name: str, host: str = "127.0.0.1") -> float:
    families = text_string_to_metric_families(requests.get(f"http://{host}:8080/metrics", timeout=30).text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def stream_is_whole(lines) -> bool:
    """Read a stream to its end. A broken one raises, or ends without a finish_reason."""
    with contextlib.suppress(requests.RequestException):
        return any(b'"finish_reason":"length"' in line for line in lines)
    return False
