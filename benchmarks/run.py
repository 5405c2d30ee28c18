"""Measure variants of the deployment side by side, and write one record for each into benchmarks/results.

Each repetition starts and stops every variant in turn (A B C A B C), so that a drift of the machine meets all alike.
Needs the tutorial's environment, and ports 8000, 8265 and 6379 free. Without a GPU, it measures the tiny stand-in.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import openai
import yaml
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
WORKLOADS = {"chat": (512, 128), "retrieval": (2048, 128), "generation": (128, 1024)}  # Tokens in, tokens out
MODEL_ID = "my-llama-3.1-8b"
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


def wait_for_first_token(process: subprocess.Popen, log: Path, timeout_s: float = 900) -> None:
    """Wait for a one-token completion. Raises RuntimeError when the server ends, APIError after `timeout_s`."""
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", timeout=15, max_retries=0)

    @retry(
        retry=retry_if_exception_type(openai.APIError),
        stop=stop_after_delay(timeout_s),
        wait=wait_fixed(1),
        reraise=True,
    )
    def ask():
        if process.poll() is not None or "Received unexpected error" in log.read_text():
            raise RuntimeError(f"The server ended before its first token:\n{log.read_text()[-4000:]}")
        client.completions.create(model=MODEL_ID, prompt="Hello", max_tokens=1)

    ask()


@contextlib.contextmanager
def running(variant: dict, base: str, changes: dict, model: str, log: Path):
    """A server of the variant on port 8000, ready to answer; yields the seconds that it took to start."""
    if variant.get("server") == "vllm":
        flags = []
        for name, value in engine_kwargs_of(base, json.dumps(changes)).items():
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        command = ["vllm", "serve", model, "--served-model-name", MODEL_ID, "--host", "127.0.0.1", "--port", "8000"]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1"} if base == "tiny_llama.app" else {}
        began = time.monotonic()
        server = start(command + flags, log, env)
    else:
        env = {**LAUNCH_ENV, **variant.get("env", {}), "BENCHMARK_BASE": base, "BENCHMARK_CHANGES": json.dumps(changes)}
        subprocess.run(["ray", "get-auth-token", "--generate"], check=True, capture_output=True)
        cpus = max(8, os.cpu_count())
        began = time.monotonic()
        server = start(["ray", "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={cpus}"], log, env)
        commands = "until ray status; do sleep 1; done; serve start --http-host 127.0.0.1"
        commands += "; serve run benchmarks.app:app --non-blocking"
        start(["bash", "-c", commands], log, env)
    try:
        wait_for_first_token(server, log)
        yield time.monotonic() - began
    finally:
        server.terminate()
        server.wait(timeout=120)
        wait_until_port_is_free()


@functools.cache
def engine_kwargs_of(base: str, changes: str) -> dict:
    """The engine's settings as benchmarks/app.py would pass them."""
    code = (
        "import json; from benchmarks.app import variant_settings as s; print('\\n' + json.dumps(s()['engine_kwargs']))"
    )
    env = {**os.environ, "BENCHMARK_BASE": base, "BENCHMARK_CHANGES": changes, "RAY_ADDRESS": "local"}
    return json.loads(
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True).splitlines()[-1]
    )


@retry(retry=retry_if_exception_type(ConnectionError), stop=stop_after_delay(60), wait=wait_fixed(1), reraise=True)
def wait_until_port_is_free() -> None:
    listening = subprocess.check_output(["ss", "-ltnH", "sport = :8000"], text=True)
    if listening:
        raise ConnectionError(f"Port 8000 is still taken a minute after the server's end: {listening}")


def measure(workload: str, concurrency: int, model: str, seed: int) -> dict:
    """One run of `vllm bench serve`: 4 prompts per slot, 8 at least. Raises RuntimeError unless all succeed."""
    input_len, output_len = WORKLOADS[workload]
    output = BUILD / "result.json"
    command = f"""vllm bench serve --backend openai-chat
        --base-url http://127.0.0.1:8000 --endpoint /v1/chat/completions --model {MODEL_ID} --tokenizer {model}
        --dataset-name random --input-len {input_len} --output-len {output_len}
        --num-prompts {max(8, 4 * concurrency)} --max-concurrency {concurrency} --num-warmups {min(32, concurrency)}
        --seed {seed} --temperature 0 --ignore-eos --percentile-metrics ttft,tpot,e2el --metric-percentiles 50,90,99
        --save-result --result-dir {BUILD} --result-filename {output.name}"""
    bench = subprocess.run(command.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    if bench.returncode != 0:
        raise RuntimeError(bench.stdout[-4000:])
    result = json.loads(output.read_text())
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} of {result['num_prompts']} requests failed")
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


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
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    gpu = "NVIDIA" in hardware()
    base = "serve_llama_3_1_8b" if gpu else "tiny_llama.app"
    model = os.environ.get("MODEL_SOURCE", "meta-llama/Llama-3.1-8B-Instruct") if gpu else "build/tiny-llama"
    BUILD.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    records = {}
    for repetition in range(args.repetitions):
        for name in args.variants:
            changes = dict(variants[name].get("llm_config", {}))
            if args.random_weights:
                changes["engine_kwargs"] = {**changes.get("engine_kwargs", {}), "load_format": "dummy"}
            record = records.setdefault(
                name,
                {
                    "variant": name,
                    "changes": variants[name],
                    "hardware": hardware(),
                    "model": "Llama-3.1-8B" if gpu else "the tiny stand-in",
                    "weights": "random" if args.random_weights else "trained",
                    "workload": dict(zip(("input_len", "output_len"), WORKLOADS[args.workload], strict=True)),
                    "versions": {package: version(package) for package in ("ray", "vllm", "torch")},
                    "date": date.today().isoformat(),
                    "commit": commit.strip(),
                    "runs": [],
                },
            )
            log = BUILD / f"{name}-{repetition}.log"
            log.unlink(missing_ok=True)
            with running(variants[name], base, changes, model, log) as start_s:
                found = re.findall(r"KV cache size: ([\d,]+) tokens", log.read_text())
                run = {"repetition": repetition, "start_s": round(start_s, 1), "concurrency": {}}
                run["kv_cache_tokens"] = int(found[-1].replace(",", "")) if found else None
                record["runs"].append(run)
                print(
                    f"{name} #{repetition}: ready after {start_s:.0f} s, {run['kv_cache_tokens']} KV tokens", flush=True
                )
                for concurrency in args.concurrency:
                    result = measure(args.workload, concurrency, model, seed=time.time_ns() % 10**6)
                    run["concurrency"][concurrency] = result
                    print(
                        f"{name} #{repetition} c={concurrency}: {result['output_throughput']:.0f} tok/s, "
                        f"TTFT p50 {result['median_ttft_ms']:.1f} ms, TPOT p50 {result['median_tpot_ms']:.2f} ms",
                        flush=True,
                    )
            machine = re.sub(r"\W+", "-", record["hardware"].removeprefix("NVIDIA ").lower())
            file = args.results / f"{machine}-{args.workload}-{name}.json"
            file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
