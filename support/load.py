"""Load from `vllm bench serve`, and the engine's metrics while it runs."""

import contextlib
import json
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import ray
import requests
from prometheus_client.parser import text_string_to_metric_families

from support.serving import MODEL_ID, URL, errors_in_logs, running_replicas

INPUT_TOKENS, OUTPUT_TOKENS = 128, 64
VARIED = 0.5  # Answers differ by up to this share. Of one length, they would end, and others begin, all at once.


def read_metrics() -> dict[str, float]:
    """The engine's metrics at this moment, each summed over the replicas, without the histograms' buckets.

    Beside them, `time_s` of the monotonic clock, and the number of `busy_replicas` and of running `replicas`.
    """
    totals = {"time_s": time.perf_counter(), "busy_replicas": 0, "replicas": running_replicas()}
    for node in [node for node in ray.nodes() if node["Alive"]]:
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        lines = requests.get(url, timeout=60).text.splitlines()
        wanted = [line for line in lines if line.startswith("ray_vllm_") and "_bucket{" not in line]
        for family in text_string_to_metric_families("\n".join(wanted)):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0) + sample.value
                totals["busy_replicas"] += sample.name == "ray_vllm_num_requests_running" and sample.value > 0
    return totals


@contextlib.contextmanager
def sampled(interval_s: float = 2):
    """Read the metrics every `interval_s` while the block runs. Yields the growing list of readings."""
    samples, stop = [read_metrics()], threading.Event()

    def sample():
        while not stop.wait(interval_s):
            samples.append(read_metrics())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join(timeout=30)


def start_load(
    name: str,
    tokenizer: str,
    concurrency: int,
    num_prompts: int,
    extra_body: dict | None = None,
    output_tokens: int = OUTPUT_TOKENS,
) -> subprocess.Popen:
    """Start `vllm bench serve` with `concurrency` requests under way. Its result goes to build/<name>.json.

    Answers have `output_tokens` on average, and each request also the fields of `extra_body`. Raises ValueError when
    there are no more requests than `concurrency`: TTFT leaves out the clients' first.
    """
    if num_prompts <= concurrency:
        raise ValueError(f"num_prompts is {num_prompts}. Send more than {concurrency}, the concurrency.")
    Path(f"build/{name}.json").unlink(missing_ok=True)
    # Another seed each time: no prompt is found in the prefix cache, but for the stand-in with its few tokens.
    lengths = json.dumps({"input": 0, "output": VARIED})
    command = f"""vllm bench serve --backend openai-chat --base-url {URL} --endpoint /v1/chat/completions
        --model {MODEL_ID} --tokenizer {tokenizer} --dataset-name random
        --input-len {INPUT_TOKENS} --output-len {output_tokens} --num-prompts {num_prompts}
        --max-concurrency {concurrency} --seed {time.time_ns() % 10**6} --temperature 0
        --metric-percentiles 50,99 --save-result --save-detailed --result-dir build --result-filename {name}.json"""
    with open(f"build/{name}.log", "w") as log:
        extra = ["--extra-body", json.dumps(extra_body)] if extra_body else []
        return subprocess.Popen([*command.split(), "--random-range-ratio", lengths, *extra], stdout=log, stderr=log)


def result_of(load: subprocess.Popen, name: str) -> dict:
    """Wait for the end of a load, and return its result, with the names and units of `vllm bench serve`.

    TTFT's median and p99 are of the requests after the clients' first, which all arrive at once. Raises RuntimeError
    unless every request succeeded, subprocess.TimeoutExpired after a quarter of an hour.
    """
    try:
        load.wait(timeout=900)
    finally:
        load.kill()  # Does nothing to one that has ended
    if load.returncode:
        raise RuntimeError(Path(f"build/{name}.log").read_text()[-3000:])
    result = json.loads(Path(f"build/{name}.json").read_text())
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} requests failed: {set(result['errors'])}")
    # To this client, a stream that breaks off has succeeded. It lacks the end, where the server counts the prompt's
    # tokens, those of the chat template included.
    if short := sum(tokens <= INPUT_TOKENS for tokens in result["input_lens"]):
        raise RuntimeError(f"{short} of {result['completed']} answers broke off. The replica's log may say why.")
    later = np.argsort(result["start_times"])[result["max_concurrency"] :]
    ttfts_ms = 1000 * np.array(result["ttfts"])[later]
    result["median_ttft_ms"], result["p99_ttft_ms"] = np.percentile(ttfts_ms, [50, 99]).tolist()
    return result


def run_load(name: str, tokenizer: str, concurrency: int, num_prompts: int, extra_body: dict | None = None) -> dict:
    """Send the load, wait for its end, print a line about it, and return its result."""
    result = result_of(start_load(name, tokenizer, concurrency, num_prompts, extra_body), name)
    print(
        f"{concurrency:3d} concurrent, {result['completed']} requests, {result['failed']} failed: "
        f"{result['output_throughput']:,.0f} output tokens/s, TTFT p50 {result['median_ttft_ms']:.0f} ms, "
        f"p99 {result['p99_ttft_ms']:.0f} ms, TPOT p50 {result['median_tpot_ms']:.1f} ms",
        flush=True,
    )
    return result


def sweep_load(tokenizer: str, most: int = 256) -> pd.DataFrame:
    """Double the concurrency until throughput stops growing, up to `most`; a row of results for each.

    Ends, too, when the autoscaler brings in a second replica: that point isn't one replica's, and is left out. Raises
    RuntimeError when no point is left.
    """
    results, concurrency, growth = {}, 1, 1.0
    while concurrency <= most and growth > 0.1:
        result = run_load(f"sweep-{concurrency}", tokenizer, concurrency, max(16, 6 * concurrency))
        if running_replicas() > 1:
            print("A second replica has joined, so this point isn't one replica's, and doesn't count.")
            break
        before = results.get(concurrency // 2, {"output_throughput": 0.5 * result["output_throughput"]})
        growth = result["output_throughput"] / before["output_throughput"] - 1
        results[concurrency] = result
        concurrency *= 2
    if not results:
        raise RuntimeError("Two replicas run. Wait until the autoscaler has ended one, and run this cell again.")
    return pd.DataFrame.from_dict(results, orient="index")


def knee_of(sweep: pd.DataFrame) -> int:
    """The last concurrency whose doubling still brought a tenth more tokens per second."""
    return int(sweep.index[sweep["output_throughput"].pct_change().fillna(1) > 0.1].max())


def watch_autoscaler(tokenizer: str, target: int, timeout_s: float = 900) -> pd.DataFrame:
    """Hold up to four times `target` until two replicas are busy, then wait until one is left. A row each two seconds.

    Raises TimeoutError when either takes more than `timeout_s`, RuntimeError when a load fails.
    """
    timeline = []

    def observe(until, concurrency=0):
        # Two loads in turns: while one starts again, the other holds half of the concurrency.
        loads, deadline_s = [None, None], time.monotonic() + timeout_s
        try:
            while not timeline or not until(timeline[-1]):
                for index, load in enumerate(loads):
                    if concurrency and (load is None or load.poll() is not None):
                        if load and load.returncode:
                            raise RuntimeError(Path(f"build/autoscale-{index}.log").read_text()[-3000:])
                        name, prompts = f"autoscale-{index}", (10 + 5 * index) * concurrency
                        # Short answers would leave the replica idle while clients prepare the next requests.
                        long = 4 * OUTPUT_TOKENS
                        loads[index] = start_load(name, tokenizer, concurrency // 2, prompts, output_tokens=long)
                if time.monotonic() > deadline_s:
                    raise TimeoutError(
                        f"After {timeout_s} s: {timeline[-1]}. Errors in the logs: {errors_in_logs()[-5:]}"
                    )
                timeline.append(read_metrics())
                time.sleep(2)
        finally:
            for load in filter(None, loads):
                load.terminate()

    observe(lambda now: now["replicas"] == 1)  # The sweep may have called for a second one.
    timeline.clear()
    observe(lambda now: now["busy_replicas"] >= 2 and now["replicas"] == 2, 4 * target)
    observe(lambda now: now["replicas"] == 1)
    frame = pd.DataFrame(timeline).ffill()
    frame.to_csv("build/autoscaling.csv")
    return frame
