"""Start the servers that are measured, and stop them. They outlive the command that starts them: STATE names them."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import openai
import psutil

from benchmarks.variants import VARIANTS, merged, variant
from support.serving import haproxy_without_splicing

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
STATE = BUILD / "servers.json"
KV_GIB = 40  # Of each server that shares a GPU: 327,680 tokens, room for 256 requests of 1,280
WEIGHTS_GIB, WORKING_GIB = 15, 4  # 16 bits; activations, CUDA graphs and context: 3.5 GiB for each of three on an H200
LAUNCH_ENV = {  # As in the notebook's launch step
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}
STEPS = {  # Of an engine that starts: what it logs, with the seconds. engine_init includes the next two.
    "model_loading": r"Model loading took [\d.]+ GiB memory and ([\d.]+) seconds",
    "engine_init": r"init engine \(.*?\) took ([\d.]+) s",
    "compilation": r"torch\.compile took ([\d.]+) s in total",
    "graph_capture": r"Graph capturing finished in (\d+) secs",
}
# Each server has its own: HTTP, Ray, dashboard, Ray Client, Ray's agent, HAProxy's statistics and metrics, replicas,
# and the proxy that HAProxy falls back on, for HTTP and gRPC.
PORTS = (8000, 6379, 8265, 10001, 52365, 8404, 9101, 30000, 8500, 9500)


def gpu() -> tuple[str, float] | None:
    """The first GPU's name and memory in GiB, or None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
        name, mib = subprocess.check_output(query, text=True, timeout=60).splitlines()[0].rsplit(",", 1)
        return name, int(mib) / 1024
    return None


def gpu_link() -> str | None:
    """How the first two GPUs reach each other, in the words of `nvidia-smi topo -m`: NV18 are 18 NVLinks."""
    with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
        table = subprocess.check_output(["nvidia-smi", "topo", "-m"], text=True, timeout=60)
        found = re.search(r"GPU0[ \t]+GPU1\b.*\n[ \t]*GPU0[ \t]+X[ \t]+(\w+)", table)
        return found[1] if found else None
    return None


def cpu_model() -> str:
    """The host's CPU and the cores that this process may use."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else os.uname().machine}, {len(os.sched_getaffinity(0))} cores"


def ports(index: int) -> list[int]:
    """The ports of the server with this index, counted from 0."""
    return [port + (100 if port == 30000 else 1) * index for port in PORTS]


def check_ports(count: int) -> None:
    """Raises SystemExit when something listens on a port that `count` servers need."""
    for port in (port for index in range(count) for port in ports(index)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise SystemExit(f"Port {port} is taken. End what listens there first, the notebook's Ray say.")


def needed_gib(count: int, kv_gib: float) -> float:
    """The memory in GiB of a GPU that `count` servers share, each with `kv_gib` of KV cache. A tenth stays free."""
    return count * (WEIGHTS_GIB + WORKING_GIB + kv_gib) / 0.9


def memory_settings(count: int, gpu_gib: float | None, kv_gib: float) -> dict:
    """Engine settings that give each of `count` servers its share of the GPU. One by itself has the engine's default.

    Raises SystemExit for a GPU that can't hold them, each with `kv_gib` of KV cache.
    """
    if count < 2 or gpu_gib is None:
        return {}
    if gpu_gib < needed_gib(count, kv_gib):
        raise SystemExit(
            f"{count} servers need {needed_gib(count, kv_gib):.0f} GiB of GPU memory, and this GPU has {gpu_gib:.0f}. "
            "Measure one at a time, make benchmark VARIANTS=tutorial, or give each less KV cache with --kv-gib"
        )
    return {"kv_cache_memory_bytes": int(kv_gib * 2**30), "gpu_memory_utilization": 0.9 / count}


def model_id(name: str) -> str:
    """The model's id at the server of this name: a request that reaches another server fails."""
    return re.sub(r"\W+", "-", name)


def spawn(command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen:
    """Start `command` in a session of its own, its output appended to `log`."""
    with open(log, "a") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def flags(engine_kwargs: dict) -> list[str]:
    """Flags of `vllm serve` that say the same as `engine_kwargs`."""
    said = []
    for name, value in engine_kwargs.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            said.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            said += [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return said


def spawn_vllm(server: dict, changes: dict, engine_kwargs: dict, model: str) -> list[subprocess.Popen]:
    """Start `vllm serve`."""
    said = ["--served-model-name", server["model_id"], "--host", "127.0.0.1", "--port", str(server["port"])]
    said += [*flags(engine_kwargs), *changes.get("vllm_flags", [])]
    server["command"] = shlex.join(["vllm", "serve", "MODEL", *said])
    cpu_env = {} if gpu() else {"VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *said]
    return [spawn(command, Path(server["log"]), {**cpu_env, **changes.get("env", {})})]


def ray_folder(index: int) -> str:
    """Where the Ray of the server with this index keeps its sessions. Short, as the paths of sockets have to be."""
    return f"/tmp/benchmark-{index}"


def spawn_ray(server: dict, index: int, env: dict) -> list[subprocess.Popen]:
    """Start a Ray, and what deploys on it the app that env["BENCHMARK"] describes."""
    folder = ray_folder(index)
    http, gcs, dashboard, client, agent, stats, metrics, replica, fallback, fallback_grpc = ports(index)
    env = {
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_SERVE_HAPROXY_BINARY_PATH": haproxy_without_splicing(),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica + 99),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(replica + 10000),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(replica + 10099),
        **env,
    }
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    subprocess.run([*ray, "get-auth-token", "--generate"], check=True, capture_output=True, timeout=60)
    head = f"""start --head --block --disable-usage-stats --num-cpus={max(8, len(os.sched_getaffinity(0)))} --port={gcs}
        --dashboard-port={dashboard} --ray-client-server-port={client} --dashboard-agent-listen-port={agent}
        --min-worker-port=0 --max-worker-port=0 --temp-dir={folder}"""
    deploy = [sys.executable, "-m", "benchmarks.app", str(http)]
    return [spawn(command, Path(server["log"]), env) for command in ([*ray, *head.split()], deploy)]


def settings_of(asks: list[dict]) -> list[dict]:
    """The settings of LLMConfig that benchmarks/app.py would use, each time it is asked.

    To import an app connects to a Ray, or starts one: here, one that ends with the import.
    """
    command = [sys.executable, "-m", "benchmarks.app", "settings"]
    env = {**os.environ, "BENCHMARK": json.dumps(asks), "RAY_ADDRESS": "local"}
    with open(BUILD / "settings.log", "w") as log:
        printed = subprocess.run(
            command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=log, check=False, timeout=300
        )
    if printed.returncode:
        raise SystemExit(f"The app's settings are wrong:\n{(BUILD / 'settings.log').read_text()[-3000:]}")
    return json.loads(printed.stdout.splitlines()[-1])


def logs(server: dict, index: int) -> str:
    """What the server has logged, with the engine's part, and Ray Serve's, which alone has a replica's errors."""
    session = Path(ray_folder(index), "session_latest", "logs")
    files = [Path(server["log"])]
    if server["kind"] == "ray":
        files += [*session.glob("worker-*"), *session.glob("serve/*.log")]
    return "".join(file.read_text(errors="replace") for file in files)


def errors(server: dict, index: int) -> str:
    """What the server has called an error, each once, the last 20."""
    return "\n".join([*dict.fromkeys(re.findall(r"[\w.]*Error: .+", logs(server, index)))][-20:])


def check_alive(server: dict, index: int, processes: list[subprocess.Popen]) -> None:
    """Raises RuntimeError when a process has ended that the server needs: the last may end once all is deployed."""
    codes = [process.poll() for process in processes]
    if codes[0] is not None or codes[-1]:
        end = Path(server["log"]).read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{server['name']} ended. The end of {server['log']}:\n{end}\n{errors(server, index)}")


def answers(server: dict) -> bool:
    """Whether the server completes one token."""
    url = f"http://127.0.0.1:{server['port']}/v1"
    with contextlib.suppress(openai.APIError), openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        client.completions.create(model=server["model_id"], prompt="Hello", max_tokens=1, timeout=15)
        return True
    return False


def phases(said: str, began: float) -> dict[str, float]:
    """Seconds of a start by what a server logged: until its engine begins, and what the engine says of its own steps.

    A step that it doesn't take, or whose result it finds in a cache, isn't logged: without CUDA graphs, say.
    """
    found = {name: re.findall(pattern, said) for name, pattern in STEPS.items()}
    steps = {name: float(seconds[-1]) for name, seconds in found.items() if seconds}
    # The log's clock is local, and has no year. The last, as above: an engine may start again.
    times = re.findall(r"(\d\d-\d\d \d\d:\d\d:\d\d) \S+ Initializing a V1 LLM engine", said)
    if times:
        engine = time.mktime(time.strptime(f"{time.localtime(began).tm_year}-{times[-1]}", "%Y-%m-%d %H:%M:%S"))
        steps["until_engine"] = round(engine - began, 1)
    return steps


def replicas(server: dict) -> int:
    """How many engines serve it."""
    return server.get("deployment_config", {}).get("num_replicas", 1)


def gpus(server: dict) -> int:
    """How many GPUs its engines have."""
    return replicas(server) * server["engine_kwargs"].get("tensor_parallel_size", 1)


def describe(server: dict, index: int) -> None:
    """Note how long the start took, and what the engine has logged of itself."""
    server["start_s"] = round(time.time() - server["began"], 1)
    said = logs(server, index)
    server["start_phases_s"] = phases(said, server["began"])
    found = re.findall(r"KV cache size: ([\d,]+) tokens", said)
    server["kv_cache_tokens"] = int(found[-1].replace(",", "")) * replicas(server) if found else None
    config = re.findall(r"Initializing a V1 LLM engine .*? with config: (.+)", said)
    server["engine_config"] = re.sub(r"'[^']*/[^']*'", "'MODEL'", config[-1]) if config else None
    print(
        f"{server['name']}: first token after {server['start_s']} s, {server['kv_cache_tokens']} KV tokens", flush=True
    )


def wait_for_first_tokens(servers: list[dict], processes: list[list[subprocess.Popen]], timeout_s: float) -> None:
    """Wait for a completion of one token from each. Raises RuntimeError when one ends, or `timeout_s` passes, first."""
    deadline, waiting = time.monotonic() + timeout_s, dict(enumerate(servers))
    while waiting:
        for index, server in list(waiting.items()):
            check_alive(server, index, processes[index])
            # One replica may answer before the others, and requests that give up on none keep HAProxy busy.
            deployed = server["kind"] != "ray" or processes[index][-1].poll() == 0
            if deployed and answers(server):
                describe(waiting.pop(index), index)
        if time.monotonic() > deadline:
            said = "\n".join(errors(server, index) for index, server in waiting.items())
            names = [server["name"] for server in waiting.values()]
            raise RuntimeError(f"No first token within {timeout_s:.0f} s from {names}. Errors in their logs:\n{said}")
        time.sleep(0.5)


def facts(machine: tuple[str, float] | None, random_weights: bool) -> dict:
    """What a record says of where and with what it was measured."""
    return {
        "hardware": machine[0] if machine else "CPU",
        "gpu_link": gpu_link(),
        "cpu": cpu_model(),
        "model": "Llama-3.1-8B" if machine else "the tiny stand-in",
        "weights": "random" if random_weights else "trained",
        "versions": {package: version(package) for package in ("ray", "vllm", "torch")},
        "date": date.today().isoformat(),
    }


def records_folder(results: Path, sitting: str | None, hardware: str) -> Path:
    """The folder for the records of these servers. Raises SystemExit when it is there already."""
    machine = re.sub(r"\W+", "-", hardware.removeprefix("NVIDIA ").lower())
    folder = results / (sitting or f"{machine}-{time.strftime('%Y-%m-%d-%H%M')}")
    if folder.exists():
        raise SystemExit(f"{folder} exists. Each start of servers has records of its own: name another --sitting.")
    return folder


def reaches(entry: dict, on_vllm: bool) -> bool:
    """Whether an entry of variants.yaml changes a server of this kind. The tutorial's is empty."""
    if on_vllm:
        config, env = entry.get("llm_config", {}), [name for name in entry.get("env", {}) if not name.startswith("RAY")]
        own = env or {"server", "vllm_flags"} & entry.keys() or "engine_kwargs" in config
        return bool(own) and "num_replicas" not in config.get("deployment_config", {})
    return not entry or bool({"env", "llm_config", "router_hop"} & entry.keys())


def asked(name: str, base: str, shared: dict) -> dict:
    """What benchmarks/app.py is asked for: the variant on top of the module `base` and the `shared` engine settings."""
    changes = variant(name)
    on_vllm = changes.get("server") == "vllm"
    for part in name.split("+"):
        if not reaches(VARIANTS[part], on_vllm):
            raise SystemExit(f"{name}: {part} changes nothing on {'`vllm serve`' if on_vllm else 'Ray Serve'}.")
    own = {"model_loading_config": {"model_id": model_id(name)}, "engine_kwargs": shared}
    llm_config = merged(own, changes.get("llm_config", {}))
    return {"base": base, "llm_config": llm_config, "router_hop": changes.get("router_hop", True)}


def start_one(index: int, name: str, ask: dict, settings: dict, model: str) -> tuple[dict, list[subprocess.Popen]]:
    """Start a server. Returns what STATE notes of it, and its processes."""
    changes, log = variant(name), BUILD / f"server-{index}.log"
    log.unlink(missing_ok=True)
    shutil.rmtree(ray_folder(index), ignore_errors=True)
    server = {"name": name, "kind": changes.get("server", "ray"), "port": ports(index)[0], "model_id": model_id(name)}
    server |= {"log": str(log), "changes": changes, "engine_kwargs": settings["engine_kwargs"], "began": time.time()}
    if server["kind"] == "vllm":
        processes = spawn_vllm(server, changes, settings["engine_kwargs"], model)
    else:
        server |= {"deployment_config": settings["deployment_config"], "env": {**LAUNCH_ENV, **changes.get("env", {})}}
        processes = spawn_ray(server, index, {**server["env"], "BENCHMARK": json.dumps(ask)})
    born = [(process.pid, psutil.Process(process.pid).create_time()) for process in processes]
    return server | {"processes": born}, processes


def start(
    names: list[str],
    sitting: str | None,
    results: Path,
    random_weights: bool,
    timeout_s: float,
    kv_gib: float,
) -> None:
    """Start one server for each name, wait for their first tokens, and write STATE.

    Raises SystemExit for what is wrong with the request, RuntimeError when a server doesn't come up.
    """
    machine = gpu()
    base = "serve_llama_3_1_8b" if machine else "tiny_llama.app"
    model = os.environ.get("MODEL_SOURCE", "meta-llama/Llama-3.1-8B-Instruct") if machine else "build/tiny-llama"
    shared = memory_settings(len(names), machine and machine[1], kv_gib)
    if random_weights:
        shared["load_format"] = "dummy"
    if not machine:
        subprocess.run([sys.executable, "-m", "tiny_llama.make_model"], cwd=ROOT, check=True, timeout=900)
    check_ports(len(names))
    state = {"model": model, "facts": facts(machine, random_weights), "servers": []}
    state["records"] = str(records_folder(results, sitting, state["facts"]["hardware"]))
    asks = [asked(name, base, shared) for name in names]
    BUILD.mkdir(parents=True, exist_ok=True)
    processes = []
    for index, (name, ask, settings) in enumerate(zip(names, asks, settings_of(asks), strict=True)):
        server, its_processes = start_one(index, name, ask, settings, model)
        processes.append(its_processes)
        state["servers"].append(server)
        STATE.write_text(json.dumps(state, indent=1))
    wait_for_first_tokens(state["servers"], processes, timeout_s)
    STATE.write_text(json.dumps(state, indent=1))


def refuse_a_second_start() -> None:
    """Raises SystemExit when servers are up."""
    if STATE.exists():
        raise SystemExit("Servers are up already. Measure them, or stop them: python -m benchmarks.run stop")


def load_state() -> dict:
    """What `start` noted. Raises SystemExit when no servers were started."""
    if not STATE.exists():
        raise SystemExit("No servers are up. Start them: python -m benchmarks.run start tutorial vllm-serve")
    return json.loads(STATE.read_text())


def family(server: dict) -> list[psutil.Process]:
    """The server's processes that are alive: those that `start` began, each with all that come from it."""
    found = []
    for pid, born in server["processes"]:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            # Otherwise the id has been given to another process since, or nobody has fetched its exit code.
            if parent.create_time() == born and parent.status() != psutil.STATUS_ZOMBIE:
                found += [parent, *parent.children(recursive=True)]
    return found


def stop() -> None:
    """Stop the servers in STATE: ask each, wait for up to a minute, end what is left of it."""
    for index, server in enumerate(load_state()["servers"]):
        processes = family(server)
        for process in processes:
            if process.pid in [pid for pid, _ in server["processes"]]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        for process in psutil.wait_procs(processes, timeout=60)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(ray_folder(index), ignore_errors=True)
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # Later `ray` commands would look for it.
    STATE.unlink()
