"""Put a load on a server with `vllm bench serve`, and note what each request saw and which processes used the CPU."""

import contextlib
import logging
import math
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context

import numpy as np
import psutil
from vllm.benchmarks import serve as vllm_bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.servers import BUILD, family

# The kind of a process by a part of its name. The first that fits counts.
KINDS = {
    "EngineCore": "engine core",
    "RayWorker": "engine worker",
    "VLLM::Worker": "engine worker",
    "LLMRouter": "router",
    "OpenAiIngress": "ingress",
    "ServeReplica": "replica or API server",
    "VLLM::APIServer": "replica or API server",
    "vllm.entrypoints": "replica or API server",
    "haproxy": "haproxy",
    "HAProxyManager": "proxy actor",
    "ProxyActor": "proxy actor",
    "ServeController": "controller",
    "raylet": "raylet",
    "gcs_server": "gcs",
}


def kind_of(process: psutil.Process) -> str:
    """What the process is, among KINDS, or "other"."""
    name = " ".join(process.cmdline()[:3]) or process.name()
    return next((kind for part, kind in KINDS.items() if part in name), "other")


class CpuClock:
    """Samples, twice a second, the CPU seconds of a server's and the clients' processes, while the context lasts."""

    def __init__(self, server: list[psutil.Process], clients: list[psutil.Process]):
        self.labels = {process: kind_of(process) for process in server}
        self.labels |= {process: f"client {number}" for number, process in enumerate(clients)}
        self.times_s, self.samples = [], []
        self.ended = threading.Event()

    def sample(self) -> None:
        seconds = dict.fromkeys([*self.labels.values(), "machine"], 0.0)
        for process, label in self.labels.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                seconds[label] += used.user + used.system
        machine = psutil.cpu_times()
        seconds["machine"] = sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
        self.times_s.append(time.perf_counter())
        self.samples.append(seconds)

    def run(self) -> None:
        while not self.ended.wait(0.5):
            self.sample()

    def __enter__(self):
        self.sample()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.sample()

    def cores(self, begin_s: float, end_s: float) -> dict[str, float]:
        """CPU seconds per second that each kind of process used between two times of time.perf_counter()."""
        used = {}
        for label in self.samples[0]:
            low, high = np.interp([begin_s, end_s], self.times_s, [sample[label] for sample in self.samples])
            used[label] = round(float(high - low) / (end_s - begin_s), 3)
        return {label: cores for label, cores in used.items() if cores >= 0.005 or label.startswith("client")}


def bench(command: str) -> dict:
    """One `vllm bench serve` in this process. Times: seconds of time.perf_counter(), one clock for all processes.

    An error of a request is in `errors`; it raises nothing.
    """
    logging.getLogger("vllm").setLevel(logging.ERROR)
    parser = FlexibleArgumentParser()
    vllm_bench_serve.add_cli_args(parser)
    with open(BUILD / "bench.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        result = vllm_bench_serve.main(parser.parse_args(command.split()))
    return {
        "start": np.array(result["start_times"]),
        "ttft": np.array(result["ttfts"]),
        "latency": np.array([ttft + sum(gaps) for ttft, gaps in zip(result["ttfts"], result["itls"], strict=True)]),
        "gaps": np.array([gap for gaps in result["itls"] for gap in gaps]),
        "input_tokens": np.array(result["input_lens"]),
        "output_tokens": np.array(result["output_lens"]),
        "errors": [error for error in result["errors"] if error],
    }


def clients_for(point: dict) -> int:
    """How many client processes share a load: one for 64 concurrent requests or 25 a second, so that none is busy for
    more than half of the time, and at most a quarter of the cores."""
    wanted = point["concurrency"] / 64 if "concurrency" in point else point["rate"] / 25
    return max(1, min(math.ceil(wanted), len(os.sched_getaffinity(0)) // 4))


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by at most one."""
    return [total // parts + (part < total % parts) for part in range(parts)]


class Clients:
    """Processes that send requests. They keep their imports from cell to cell, and end with the context."""

    def __init__(self, count: int):
        others = psutil.Process().children()  # The servers, where this process has started them
        self.pool = ProcessPoolExecutor(count, mp_context=get_context("fork"))
        self.pool.submit(int).result()
        self.processes = [process for process in psutil.Process().children() if process not in others]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:  # Otherwise, a measurement that is cut off would wait for its last cell.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.pool.shutdown(cancel_futures=True)

    def measure(self, server: dict, model: str, point: dict, requests: int, seed: int, timeout_s: float = 1800) -> dict:
        """Send `requests` requests at one point to a server. Returns the cell of a record (benchmarks/README.md).

        No two seeds make the same prompts: each client's have random first tokens of their own. Raises SystemExit when
        a client has no end within `timeout_s`.
        """
        count = clients_for(point)
        loads = shares(point["concurrency"], count) if "concurrency" in point else [point["rate"] / count] * count
        commands = []
        for client, (load, share) in enumerate(zip(loads, shares(requests, count), strict=True)):
            pace = f"--max-concurrency {load}" if "concurrency" in point else f"--request-rate {load}"
            commands.append(f"""--backend openai-chat --base-url http://127.0.0.1:{server["port"]}
                --endpoint /v1/chat/completions --model {server["model_id"]} --tokenizer {model}
                --dataset-name random --random-prefix-len 4 --input-len {point["input_len"] - 4}
                --output-len {point["output_len"]} --random-range-ratio {point["range_ratio"]}
                --num-prompts {share} --seed {1000 * seed + client} --temperature 0 --ignore-eos --disable-tqdm
                --save-detailed {pace}""")
        with CpuClock(family(server), self.processes) as clock:
            futures = [self.pool.submit(bench, command) for command in commands]
            if late := wait(futures, timeout_s).not_done:
                raise SystemExit(f"{server['name']}: {len(late)} clients haven't ended after {timeout_s:.0f} s")
        least = math.floor(point["output_len"] * (1 - point["range_ratio"]))
        return cell([future.result() for future in futures], clock, least) | {"clients": count, "seed": seed}


def tenths_ms(seconds: np.ndarray) -> list[int]:
    return np.rint(seconds * 1e4).astype(int).tolist()


def one_or_all(counts: np.ndarray) -> int | list[int]:
    """The one value that all of them have, or else all."""
    return int(counts[0]) if (counts == counts[0]).all() else counts.tolist()


def cell(parts: list[dict], clock: CpuClock, least: int) -> dict:
    """What the clients saw, in one: requests in the order of their starts, times in tenths of a millisecond.

    An answer of fewer tokens than `least` counts as failed: to vLLM's client, a stream that breaks off has succeeded.
    """
    errors = [error for part in parts for error in part["errors"]]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "errors"}
    short = whole["output_tokens"][whole["output_tokens"] < least]
    errors += [f"an answer of {tokens} tokens, where {least} were asked for" for tokens in short]
    if errors:
        return {
            "failed": len(errors),
            "requests": len(whole["start"]),
            "errors": sorted({e[-300:] for e in errors})[:3],
        }
    order = np.argsort(whole["start"])
    first_s = whole["start"].min()
    cores = clock.cores(first_s, (whole["start"] + whole["latency"]).max())
    clients = [cores.pop(label) for label in list(cores) if label.startswith("client")]
    return {
        "failed": 0,
        "requests": len(order),
        # All clients send between these two.
        "full": tenths_ms(
            np.array([max(p["start"].min() for p in parts), min(p["start"].max() for p in parts)]) - first_s
        ),
        "start": tenths_ms(whole["start"][order] - first_s),
        "ttft": tenths_ms(whole["ttft"][order]),
        "latency": tenths_ms(whole["latency"][order]),
        "input_tokens": one_or_all(whole["input_tokens"][order]),
        "output_tokens": one_or_all(whole["output_tokens"][order]),
        "chunk_gap_ms": dict(zip(("p50", "p99"), np.percentile(1000 * whole["gaps"], [50, 99]).round(1), strict=True)),
        "cores": cores | {"clients": round(sum(clients), 3)},
        "busiest_client": max(clients),
    }
