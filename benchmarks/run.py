"""Measure variants of the deployment side by side, and write one record for each into build/benchmarks/results.

All servers stay up, each with its share of the GPU's memory, while the variants take turns (A B C A B C). So a drift of
the machine meets all alike. One variant by itself has the whole GPU. Needs the tutorial's environment, and the ports
from 6379, 8000, 8265, 8404, 9101 and 30000 on. Without a GPU, it measures the tiny stand-in.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import openai
import yaml
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed
from vllm.benchmarks import serve as vllm_bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
WORKLOADS = {"chat": (512, 128), "retrieval": (2048, 128), "generation": (128, 1024)}  # Tokens in, tokens out
KV_BYTES_PER_TOKEN = 2 * 32 * 8 * 128 * 2  # Llama-3.1-8B: keys and values, layers, KV heads, head size, 16 bits
LAUNCH_ENV = {  # As in the notebook's launch step
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


def start(command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen:
    """Start `command` as a child that ends with this process, its output in `log`."""
    with open(log, "a") as file:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command], cwd=ROOT, env={**os.environ, **env}, stdout=file, stderr=file
        )


@dataclass
class Server:
    model_id: str  # The variant's name: a request that reaches another variant's server fails.
    port: int
    process: subprocess.Popen
    log: Path
    began_s: float

    def wait_for_first_token(self, timeout_s: float = 900) -> float:
        """Wait for a one-token completion; return the seconds since the start of the server.

        Raises RuntimeError when the server ends, openai.APIError after `timeout_s`.
        """
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=15, max_retries=0)

        @retry(
            retry=retry_if_exception_type(openai.APIError),
            stop=stop_after_delay(timeout_s),
            wait=wait_fixed(1),
            reraise=True,
        )
        def ask():
            log = self.log.read_text()
            if self.process.poll() is not None or "Received unexpected error" in log:
                raise RuntimeError(f"The server ended before its first token. The end of {self.log}:\n{log[-4000:]}")
            client.completions.create(model=self.model_id, prompt="Hello", max_tokens=1)

        ask()
        return time.monotonic() - self.began_s

    def kv_cache_tokens(self) -> int | None:
        found = re.findall(r"KV cache size: ([\d,]+) tokens", self.log.read_text())
        return int(found[-1].replace(",", "")) if found else None


@contextlib.contextmanager
def running(name: str, variant: dict, index: int, base: str, changes: dict, model: str, log: Path):
    """A server of the variant on port 8000 + `index`, starting. It ends with the context."""
    port, ingress = 8000 + index, json.dumps(variant.get("ingress_deployment_config"))
    settings = {"BENCHMARK_BASE": base, "BENCHMARK_CHANGES": json.dumps(changes), "BENCHMARK_INGRESS": ingress}
    if variant.get("server") == "vllm":
        flags = []
        for flag, value in engine_kwargs_of(json.dumps(settings)).items():
            if value is None:
                continue
            flags += [f"--{flag.replace('_', '-')}"] + ([] if value is True else [str(value)])
        server = ["vllm", "serve", model, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1"} if base == "tiny_llama.app" else {}
        began_s = time.monotonic()
        process = start(server + flags, log, env)
    else:
        folder = f"/tmp/benchmark-{index}"
        env = {
            **LAUNCH_ENV,
            "RAY_ADDRESS": f"127.0.0.1:{6379 + index}",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(8404 + index),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(9101 + index),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(30000 + 100 * index),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(30099 + 100 * index),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(40000 + 100 * index),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(40099 + 100 * index),
            **variant.get("env", {}),
            **settings,
        }
        subprocess.run(["ray", "get-auth-token", "--generate"], check=True, capture_output=True)
        head = f"""ray start --head --block --disable-usage-stats --num-cpus={max(8, os.cpu_count())}
            --port={6379 + index} --dashboard-port={8265 + index} --ray-client-server-port={10001 + index}
            --dashboard-agent-listen-port={52365 + index} --min-worker-port=0 --max-worker-port=0 --temp-dir={folder}"""
        began_s = time.monotonic()
        process = start(head.split(), log, env)
        commands = f"until ray status; do sleep 1; done; serve start --http-host 127.0.0.1 --http-port {port}"
        start(["bash", "-c", f"{commands}; serve run benchmarks.app:app --non-blocking"], log, env)
    try:
        yield Server(name, port, process, log, began_s)
    finally:
        process.terminate()
        process.wait(timeout=120)
        wait_until_free(port)
        shutil.rmtree(f"/tmp/benchmark-{index}", ignore_errors=True)
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # Later `ray` commands would look for it.


@functools.cache
def engine_kwargs_of(settings: str) -> dict:
    """The engine's settings as benchmarks/app.py would pass them."""
    code = (
        "import json; from benchmarks.app import variant_settings as s; print('\\n' + json.dumps(s()['engine_kwargs']))"
    )
    env = {**os.environ, **json.loads(settings), "RAY_ADDRESS": "local"}
    return json.loads(
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True).splitlines()[-1]
    )


@retry(retry=retry_if_exception_type(ConnectionError), stop=stop_after_delay(60), wait=wait_fixed(1), reraise=True)
def wait_until_free(port: int) -> None:
    listening = subprocess.check_output(["ss", "-ltnH", f"sport = :{port}"], text=True)
    if listening:
        raise ConnectionError(f"Port {port} is still taken a minute after the server's end: {listening}")


def measure(server: Server, workload: str, concurrency: int, model: str) -> dict:
    """One run of `vllm bench serve`: 4 prompts per slot, 8 at least. Raises RuntimeError unless all succeed."""
    input_len, output_len = WORKLOADS[workload]
    # Another seed each time: no run finds its prompts in the prefix cache.
    command = f"""--backend openai-chat --base-url http://127.0.0.1:{server.port} --endpoint /v1/chat/completions
        --model {server.model_id} --tokenizer {model} --dataset-name random
        --input-len {input_len} --output-len {output_len}
        --num-prompts {max(8, 4 * concurrency)} --max-concurrency {concurrency} --num-warmups {min(32, concurrency)}
        --seed {time.time_ns() % 10**6} --temperature 0 --ignore-eos --disable-tqdm
        --percentile-metrics ttft,tpot,e2el --metric-percentiles 50,90,99"""
    parser = FlexibleArgumentParser()
    vllm_bench_serve.add_cli_args(parser)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    with open(BUILD / "bench.log", "a") as log, contextlib.redirect_stdout(log):
        result = vllm_bench_serve.main(parser.parse_args(command.split()))
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} of {result['num_prompts']} requests failed")
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    # Near 1, the client itself would limit what is measured.
    return {**numbers, "client_cpu_share": (time.process_time() - cpu_s) / (time.perf_counter() - began_s)}


def hardware() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.check_output(query, text=True).splitlines()[0]
    return f"{os.cpu_count()} CPU cores"


def main() -> None:
    variants = yaml.safe_load((ROOT / "benchmarks" / "variants.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "variants", nargs="*", default=["tutorial", "default-path", "vllm-serve"], choices=[*variants, []]
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--workload", choices=WORKLOADS, default="chat")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--random-weights", action="store_true", help="only config.json and the tokenizer are there")
    parser.add_argument("--results", type=Path, default=BUILD / "results", help="folder for the records")
    args = parser.parse_args()

    gpu = "NVIDIA" in hardware()
    base = "serve_llama_3_1_8b" if gpu else "tiny_llama.app"
    model = os.environ.get("MODEL_SOURCE", "meta-llama/Llama-3.1-8B-Instruct") if gpu else "build/tiny-llama"
    BUILD.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"\W+", "-", hardware().removeprefix("NVIDIA ").lower())
    files = {name: args.results / f"{machine}-{args.workload}-{name}.json" for name in args.variants}
    for file in files.values():
        if file.exists():
            parser.error(f"{file} exists. Move it, or name another folder: --results FOLDER")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    shared = {"load_format": "dummy"} if args.random_weights else {}
    if gpu and len(args.variants) > 1:
        # A tenth more than the workload says: the chat template adds to each prompt.
        tokens = max(args.concurrency) * sum(WORKLOADS[args.workload])
        shared["kv_cache_memory_bytes"] = tokens * KV_BYTES_PER_TOKEN * 11 // 10
        shared["gpu_memory_utilization"] = round(0.92 / len(args.variants), 3)
    records, servers = {}, {}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        for index, name in enumerate(args.variants):
            changes = dict(variants[name].get("llm_config", {}))
            changes["engine_kwargs"] = {**shared, **changes.get("engine_kwargs", {})}
            changes["model_loading_config"] = {"model_id": name}
            log = BUILD / f"{name}.log"
            log.unlink(missing_ok=True)
            servers[name] = stack.enter_context(running(name, variants[name], index, base, changes, model, log))
            records[name] = {
                "variant": name,
                "changes": variants[name],
                "engine_kwargs": changes["engine_kwargs"],
                "hardware": hardware(),
                "model": "Llama-3.1-8B" if gpu else "the tiny stand-in",
                "weights": "random" if args.random_weights else "trained",
                "workload": dict(zip(("input_len", "output_len"), WORKLOADS[args.workload], strict=True)),
                "versions": {package: version(package) for package in ("ray", "vllm", "torch")},
                "date": date.today().isoformat(),
                "commit": commit.strip(),
                "beside": [other for other in args.variants if other != name],
            }
        for name, start_s in zip(servers, pool.map(Server.wait_for_first_token, servers.values()), strict=True):
            records[name] |= {"start_s": round(start_s, 1), "kv_cache_tokens": servers[name].kv_cache_tokens()}
            records[name]["runs"] = []
            print(
                f"{name}: first token after {start_s:.0f} s, {records[name]['kv_cache_tokens']} KV tokens", flush=True
            )
        for repetition in range(args.repetitions):
            for name, server in servers.items():
                cells = {}
                for concurrency in args.concurrency:
                    cells[concurrency] = result = measure(server, args.workload, concurrency, model)
                    print(
                        f"{name} #{repetition} c={concurrency}: {result['output_throughput']:.0f} tok/s, "
                        f"TTFT p50 {result['median_ttft_ms']:.1f} ms, TPOT p50 {result['median_tpot_ms']:.2f} ms, "
                        f"client {result['client_cpu_share']:.0%}",
                        flush=True,
                    )
                records[name]["runs"].append({"repetition": repetition, "concurrency": cells})
                files[name].write_text(json.dumps(records[name], indent=1) + "\n")


if __name__ == "__main__":
    main()
