"""What the benchmark computes from its records, against numbers that are known."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import figure, records, servers, table
from benchmarks.run import main, measure, parse, planned, points_of, requests_of
from benchmarks.servers import asked, gpu_link, gpus, memory_settings, phases
from benchmarks.variants import VARIANTS, variant
from support.machine import MEMORY_GIB

pytestmark = pytest.mark.section("The faster path")


def closed_loop(latency_ms: float, ttft_ms: float, concurrency: int, rounds: int, tokens: int = 11) -> dict:
    """A cell of clients that send without a pause, all in step, as benchmarks/load.py writes it."""
    start = np.repeat(np.arange(rounds) * latency_ms, concurrency)
    return {
        "point": {"workload": "chat", "range_ratio": 0, "concurrency": concurrency},
        "start": (10 * start).tolist(),
        "ttft": [10 * ttft_ms] * len(start),
        "latency": [10 * latency_ms] * len(start),
        "output_tokens": tokens,
        "full": [0, 10 * float(start.max())],
    }


def test_steady_state_gives_rate_and_latencies_of_a_known_load():
    """4 clients, 11 tokens in 1,100 ms: 40 tokens/s, and 100 ms for each token after the first, at 100 ms."""
    seen = records.steady(closed_loop(latency_ms=1100, ttft_ms=100, concurrency=4, rounds=30))
    assert seen.rates["output_tok_s"] == pytest.approx(40, rel=0.01)
    assert seen.ttft_ms == pytest.approx(100) and seen.tpot_ms == pytest.approx(100)
    assert seen.rates["goodput_server_req_s"] == pytest.approx(40 / 11, rel=0.01)  # 100 ms keep MLPerf's Server limits
    assert seen.rates["goodput_interactive_req_s"] == 0


def test_what_is_too_short_for_a_steady_state_is_refused():
    with pytest.raises(ValueError, match="send more, or load less"):
        records.steady(closed_loop(latency_ms=1100, ttft_ms=100, concurrency=4, rounds=2))


def cells(rates: list[float]) -> dict:
    rng = np.random.default_rng(0)
    named = [{name: rate for name in records.RATES} for rate in rates]
    return {i: records.Steady(rng.normal(100, 5, 300), rng.normal(10, 1, 300), rate) for i, rate in enumerate(named)}


def test_ratio_is_claimed_only_of_five_repetitions_that_agree():
    slow, fast = [100, 102, 98, 101, 99], [120, 121, 118, 123, 119]
    assert records.ratio(cells(fast), cells(slow), "output_tok_s").claimed
    assert not records.ratio(cells(fast[:4]), cells(slow[:4]), "output_tok_s").claimed
    assert not records.ratio(cells([90, 121, 118, 123, 95]), cells(slow), "output_tok_s").claimed
    low, high = records.ratio(cells(fast), cells(slow), "output_tok_s").interval
    assert low < 1.202 < high and high - low < 0.1


def test_interval_keeps_its_promise():
    """Of 1,000 pairs of equal servers, about 5 in 100 are told apart, and about 95 in 100 intervals hold the mean."""
    rng, held, claimed = np.random.default_rng(1), 0, 0
    for _ in range(1000):
        one, other = (cells(rng.normal(100, 5, 5).tolist()) for _ in range(2))
        found = records.estimate(one, "output_tok_s")
        held += found.interval[0] <= 100 <= found.interval[1]
        claimed += records.ratio(one, other, "output_tok_s").claimed
    assert 0.93 <= held / 1000 <= 0.97 and 0.03 <= claimed / 1000 <= 0.07


def test_one_repetition_has_no_interval():
    assert records.estimate(cells([100]), "ttft_p50_ms").interval is None


def test_table_puts_the_record_beside_what_was_measured():
    """At a point that the records have, and not where they have none."""
    point, other = "chat, 128 concurrent", "chat, 3 concurrent"
    measured = {"tutorial": {point: cells([1000.0]), other: cells([1000.0])}}
    titles, throughput, *_ = table.rows(measured, point)
    assert titles[2:] == ["record of tutorial"] and throughput[0] == "output tok/s"
    assert throughput[2].startswith(
        f"{records.estimate(records.published('tutorial')[point], 'output_tok_s').value:,.0f}"
    )
    assert len(table.rows(measured, other)[0]) == 2


def test_servers_take_turns_in_an_order_of_their_own_at_each_point():
    args = parse(["measure", "--repetitions", "20", "--concurrency", "1", "128"])
    plan = planned(points_of(args), args, [1, 1])
    turns = [tuple(index for _, _, index in plan[i : i + 2]) for i in range(0, len(plan), 2)]
    assert len(plan) == 80 and set(turns) == {(0, 1), (1, 0)}


def test_each_gpu_of_a_server_has_the_load():
    args = parse(["measure", "--repetitions", "2", "--concurrency", "128", "--request-rate", "20"])
    plan = planned(points_of(args), args, [1, 2])
    loads = {(index, point.get("concurrency"), point.get("rate")) for _, point, index in plan}
    assert loads == {(0, 128, None), (1, 256, None), (0, None, 20), (1, None, 40)}
    one, two, spread = {"engine_kwargs": {}}, {"num_replicas": 2}, {"tensor_parallel_size": 2}
    assert gpus(one) == 1 and gpus({**one, "deployment_config": two}) == 2 and gpus({"engine_kwargs": spread}) == 2


def test_second_start_does_not_stop_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "STATE", tmp_path / "servers.json")
    servers.STATE.write_text("{}")
    monkeypatch.setattr(servers, "stop", lambda: pytest.fail("The first one's servers were stopped"))
    monkeypatch.setattr(sys, "argv", ["run", "all", "tutorial"])
    with pytest.raises(SystemExit, match="Servers are up already"):
        main()


@pytest.mark.parametrize("step", ["all", "start"])
def test_start_that_fails_stops_what_it_started(tmp_path, monkeypatch, step):
    def start(*_):
        servers.STATE.write_text("{}")
        raise RuntimeError("No first token")

    stopped = []
    monkeypatch.setattr(servers, "STATE", tmp_path / "servers.json")
    monkeypatch.setattr(servers, "start", start)
    monkeypatch.setattr(servers, "stop", lambda: stopped.append(1))
    monkeypatch.setattr(sys, "argv", ["run", step, "tutorial"])
    with pytest.raises(RuntimeError, match="No first token"):
        main()
    assert stopped == [1]


def test_error_of_a_replica_is_told_though_only_ray_serve_has_logged_it(tmp_path, monkeypatch):
    ended, running = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])
    assert ended.wait(timeout=30) == 0
    (tmp_path / "server.log").write_text("Deploying application default failed")
    server = {"name": "tutorial", "kind": "ray", "log": str(tmp_path / "server.log"), "port": 1, "model_id": "m"}
    monkeypatch.setattr(servers, "ray_folder", lambda index: tmp_path)
    logs = tmp_path / "session_latest" / "logs"
    (logs / "serve").mkdir(parents=True)
    (logs / "serve" / "controller_1.log").write_text("Traceback:\nTypeError: unknown setting\nINFO stopping\n")
    (logs / "worker-1.out").write_text("(EngineCore pid=1) ValueError: too little memory\n")
    said = "ValueError: too little memory\nTypeError: unknown setting"
    try:
        with pytest.raises(RuntimeError, match=f"(?s)tutorial ended.*application default failed\n{said}"):
            servers.check_alive(server, 0, [ended])
        with pytest.raises(RuntimeError, match=f"(?s)No first token within 0 s .*{said}"):
            servers.wait_for_first_tokens([server], [[running]], timeout_s=0)
    finally:
        running.kill()


def test_servers_that_did_not_come_up_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "STATE", tmp_path / "servers.json")
    servers.STATE.write_text(json.dumps({"servers": [{"name": "tutorial", "start_s": 99.0}, {"name": "vllm-serve"}]}))
    with pytest.raises(SystemExit, match="Not all came up. See .*/server-"):
        measure(parse(["measure"]))


@pytest.mark.parametrize("second, link", [("NV18", "NV18"), ("SYS", "SYS"), (None, None)])
def test_record_names_the_link_of_two_gpus(tmp_path, monkeypatch, second, link):
    """The fake one prints what `nvidia-smi topo -m` printed on two H200s, or on one."""
    rows = ["\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m", f"GPU0\t X \t{second}\t0-31", f"GPU1\t{second}\t X \t0-31"]
    rows = rows if second else ["\t\x1b[4mGPU0\tNIC0\tCPU Affinity\x1b[0m", "GPU0\t X \tPIX\t0-15", "NIC0\tPIX\t X "]
    (tmp_path / "printed").write_text("\n".join(rows))
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$*" = "topo -m" ] && cat {tmp_path}/printed\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_link() == link


@pytest.mark.parametrize("count, kv_gib", [(2, 40), (3, 20), (4, 12)])
def test_servers_share_a_gpu_that_holds_them(count, kv_gib):
    shared = memory_settings(count, MEMORY_GIB["H200"], kv_gib)
    assert shared["kv_cache_memory_bytes"] == kv_gib * 2**30 and shared["gpu_memory_utilization"] * count < 0.91
    with pytest.raises(SystemExit, match=f"{count + 1} servers need [0-9]+ GiB .* has 140.* --kv-gib"):
        memory_settings(count + 1, MEMORY_GIB["H200"], kv_gib)


@pytest.mark.parametrize("concurrency, counted", [(1, 200), (32, 1500), (128, 1500), (256, 1500)])
def test_enough_requests_are_sent(concurrency, counted):
    args = parse(["measure"])
    point = {"concurrency": concurrency, "input_len": 512, "output_len": 128}
    assert args.repetitions * (requests_of(point, args, True) - 3 * concurrency) >= counted


def test_variants_join_from_left_to_right_and_unknown_ones_are_named():
    joined = variant("default-path+haproxy+stream-interval-8")
    assert joined["env"]["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert joined["llm_config"]["engine_kwargs"] == {"stream_interval": 8}
    assert VARIANTS["default-path"]["env"]["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    with pytest.raises(ValueError, match="'no-such' is not in benchmarks/variants.yaml"):
        variant("tutorial+no-such")


def test_replicas_are_asked_only_of_ray_serve():
    assert asked("tutorial+two-replicas", "base", {})["llm_config"]["deployment_config"] == {"num_replicas": 2}
    for name, idle, on in (
        ("vllm-serve+no-router", "no-router", "`vllm serve`"),
        ("vllm-serve+two-replicas", "two-replicas", "`vllm serve`"),
        ("vllm-serve+haproxy", "haproxy", "`vllm serve`"),
        ("vllm-serve+more-queued", "more-queued", "`vllm serve`"),
        ("tutorial+api-servers-2", "api-servers-2", "Ray Serve"),
    ):
        with pytest.raises(SystemExit, match=f"{idle} changes nothing on {on}"):
            asked(name, "base", {})


def test_start_is_told_by_the_engines_steps():
    """Of a log in the engine's words. ci/tests/test_benchmark.py finds the first and the last in a real one."""
    began = time.mktime((2026, 11, 25, 23, 17, 46, 0, 0, -1))
    log = """(EngineCore pid=1) INFO 11-25 23:17:56 [core.py:123] Initializing a V1 LLM engine (v0.29.0) with config: x
        INFO 11-25 23:18:01 [gpu_model_runner.py:5472] Model loading took 14.99 GiB memory and 4.250000 seconds
        INFO 11-25 23:18:20 [monitor.py:53] torch.compile took 17.30 s in total
        INFO 11-25 23:18:30 [gpu_model_runner.py:7002] Graph capturing finished in 8 secs, took 0.61 GiB
        INFO 11-25 23:18:31 [core.py:352] init engine (profile, create kv cache, warmup model) took 29.10 s"""
    steps = {"model_loading": 4.25, "compilation": 17.3, "graph_capture": 8, "engine_init": 29.1, "until_engine": 10}
    assert phases(log, began) == steps
    assert phases("", began) == {}


@pytest.mark.parametrize(
    "servers, names",
    [
        (["default-path", "tutorial"], ["this app", "Ray Serve's defaults"]),
        (["tutorial", "tutorial+stream-interval-1"], ["this app", "tutorial+stream-interval-1"]),
        (["tutorial+fp8", "vllm-serve+fp8"], ["tutorial+fp8", "vllm-serve+fp8"]),
    ],
)
def test_figure_names_what_was_measured(tmp_path, servers, names):
    head = {"model": "a model", "weights": "random", "hardware": "a GPU", "date": "2026-11-25"}
    cell = closed_loop(latency_ms=1100, ttft_ms=100, concurrency=4, rounds=30) | {"repetition": 0}
    cell["point"] |= {"input_len": 512, "output_len": 11}
    for server in servers:
        record = {"server": server, **head, "versions": {"ray": "2.60.0", "vllm": "0.29.0"}, "cells": [cell]}
        records.write(tmp_path / f"{server}.json", record)
    [row] = figure.rows_of(tmp_path)
    assert row.names == names and row.load == (0, 4) and row.lengths == "512 tokens in, 11 out"
