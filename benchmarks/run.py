"""Measure servers of the model side by side on one machine: `python -m benchmarks.run [all] tutorial vllm-serve`.

Without a GPU, the tiny stand-in is measured. The steps by themselves: `start` starts the servers and leaves them up,
`measure` measures until it is done or --time-limit-s is near, and goes on where it stopped when called again,
`table` prints what there is, `stop` stops the servers. benchmarks/README.md says what is measured and how.
"""

import argparse
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import figure, records, servers, table
from benchmarks.servers import BUILD, ROOT
from benchmarks.variants import VARIANTS

WORKLOADS = {"chat": (512, 128), "mlperf": (778, 128), "retrieval": (2048, 128), "generation": (128, 1024)}
GENERATIONS = 4  # Of requests that a cell sends beyond those that count: warm-up and cool-down


def points_of(args: argparse.Namespace) -> list[dict]:
    """The loads that the command line asks for."""
    input_len, output_len = WORKLOADS[args.workload]
    shape = {
        "workload": args.workload,
        "input_len": input_len,
        "output_len": output_len,
        "range_ratio": args.range_ratio,
    }
    return [{**shape, "concurrency": c} for c in args.concurrency] + [{**shape, "rate": r} for r in args.request_rate]


def guessed_s(point: dict, on_gpu: bool) -> tuple[float, float]:
    """A rough latency in seconds and requests per second at a point: on an H200, or the stand-in on two cores."""
    alone_s = point["output_len"] / (200 if on_gpu else 100) + point["input_len"] / 20_000
    most_per_s = 1 / (point["output_len"] / (9000 if on_gpu else 800) + point["input_len"] / 70_000)
    if "rate" in point:
        return 3 * alone_s, min(point["rate"], most_per_s)
    return max(alone_s, point["concurrency"] / most_per_s), min(point["concurrency"] / alone_s, most_per_s)


def requests_of(point: dict, args: argparse.Namespace, on_gpu: bool) -> int:
    """How many requests a cell sends, so that all repetitions together have --requests that count."""
    wanted = args.requests or (200 if point.get("concurrency") == 1 else 1500)
    latency_s, _ = guessed_s(point, on_gpu)
    beside = GENERATIONS * (point["concurrency"] if "concurrency" in point else math.ceil(point["rate"] * latency_s))
    return math.ceil(wanted / args.repetitions + beside)


def cell_s(point: dict, args: argparse.Namespace, on_gpu: bool) -> float:
    """About how long a cell takes: its requests, and some seconds to make the prompts."""
    return 3 + requests_of(point, args, on_gpu) / guessed_s(point, on_gpu)[1]


def announce(args: argparse.Namespace) -> None:
    """Say which ports it needs, and how long it takes."""
    on_gpu = servers.gpu() is not None
    needed = sorted(port for index in range(len(args.servers)) for port in servers.ports(index))
    print(f"Starting {' and '.join(args.servers)}: 2 to 5 minutes. Nothing else may use the GPU meanwhile.")
    print(f"Ports: {', '.join(map(str, needed))}", flush=True)
    if args.step == "all":
        cells_s = args.repetitions * sum(cell_s(point, args, on_gpu) for point in points_of(args))
        minutes = len(args.servers) * cells_s / 60
        print(f"Then to measure: about {minutes:.0f} minutes on {'an H200' if on_gpu else 'CPUs'}", flush=True)


def commit_of_checkout() -> str | None:
    """The commit of this checkout, "-dirty" when files differ from it. None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def new_record(state: dict, server: dict, commit: str) -> dict:
    """The head of a record: all that doesn't change while the server is up."""
    own = (
        "changes",
        "command",
        "engine_kwargs",
        "deployment_config",
        "env",
        "engine_config",
        "kv_cache_tokens",
        "start_s",
        "start_phases_s",
    )
    beside = [other["name"] for other in state["servers"] if other is not server]
    facts = {"server": server["name"], "beside": beside, "commit": commit, **state["facts"]}
    return {**facts, **{name: server[name] for name in own if name in server}, "failures": [], "cells": []}


def planned(points: list[dict], args: argparse.Namespace, times: list[int]) -> list[tuple[int, dict, int]]:
    """(repetition, point, index of the server) of every cell. At each point the servers follow one another in an order
    drawn from --seed: drift of the machine meets all alike. Each server has so many `times` the load."""
    order, plan = random.Random(args.seed), []
    for repetition in range(args.repetitions):
        for point in points:
            turns = order.sample(range(len(times)), len(times))
            plan += [(repetition, scaled(point, times[index]), index) for index in turns]
    return plan


def scaled(point: dict, times: int) -> dict:
    """The point at so many times its load."""
    return {name: value * times if name in ("concurrency", "rate") else value for name, value in point.items()}


def has_room(point: dict, server: dict) -> bool:
    """Whether the KV cache holds all requests of a closed loop at once. (An open loop has no most.)"""
    longest = (point["input_len"] + point["output_len"]) * (1 + point["range_ratio"]) + 64  # The chat template
    return point.get("concurrency", 1) * longest <= (server["kv_cache_tokens"] or math.inf)


def measure(args: argparse.Namespace) -> bool:
    """Measure the servers that are up. Returns whether nothing is left to do.

    Writes the record after each cell. Raises SystemExit when requests fail: their number and errors are in the record,
    except of the warm-up.
    """
    began, state = time.monotonic(), servers.load_state()
    on_gpu, up = servers.gpu() is not None, state["servers"]
    if not all("start_s" in server for server in up):
        raise SystemExit(f"Not all came up. See {servers.BUILD}/server-*.log, then: python -m benchmarks.run stop")
    from benchmarks.load import Clients, clients_for  # Its imports take a while. `start`, `table`, `stop` need none.

    if unknown := sorted(set(args.servers) - {server["name"] for server in up}):
        raise SystemExit(f"Not up: {', '.join(unknown)}. There are: {', '.join(server['name'] for server in up)}")
    up = [server for server in up if not args.servers or server["name"] in args.servers]
    folder = Path(state["records"])
    folder.mkdir(parents=True, exist_ok=True)
    commit = args.commit or commit_of_checkout()
    if not commit:
        raise SystemExit("Not in a git checkout: say with --commit which commit is measured.")
    files = [folder / f"{server['name']}.json" for server in up]
    found = records.read(folder)
    ours = [found.get(server["name"]) or new_record(state, server, commit) for server in up]
    everything = {**found, **{record["server"]: record for record in ours}}.values()
    if any(record["commit"] != commit for record in everything):
        raise SystemExit(f"{folder} has records of another commit than {commit}.")
    wanted = points_of(args)
    times = [servers.gpus(server) if args.per_gpu else 1 for server in up]
    with_times = list(zip(up, times, strict=True))
    points = [point for point in wanted if all(has_room(scaled(point, n), server) for server, n in with_times)]
    for point in wanted:
        if point not in points:
            per_gpu = " on each GPU" if args.per_gpu else ""
            print(f"Left out: {records.label(point)}{per_gpu} doesn't fit into the KV cache")
    done = {(c["repetition"], records.label(c["point"]), i) for i, record in enumerate(ours) for c in record["cells"]}
    plan = [p for p in planned(points, args, times) if (p[0], records.label(p[1]), p[2]) not in done]
    with Clients(max((clients_for(point) for _, point, _ in plan), default=1)) as clients:
        for index in sorted({index for _, _, index in plan if not ours[index]["cells"]}):
            heaviest = max(points, key=lambda point: requests_of(point, args, on_gpu))
            server, n = with_times[index]
            print(f"Warming up {server['name']}", flush=True)
            requests = 2 * n * heaviest.get("concurrency", 32)
            warm = clients.measure(server, state["model"], scaled(heaviest, n), requests, random.getrandbits(20))
            if warm["failed"]:
                raise SystemExit(f"{warm['failed']} of {warm['requests']} requests failed: {warm['errors']}")
        took_s = {}
        for number, (repetition, point, index) in enumerate(plan):
            expected_s = took_s.get(records.label(point), 1.5 * cell_s(point, args, on_gpu))
            if args.time_limit_s and time.monotonic() - began + expected_s > args.time_limit_s - 5:
                print(f"{len(plan) - number} of {len(plan)} cells are left. The same command goes on with them.")
                return False
            cell_began = time.monotonic()
            seed = random.getrandbits(20)
            cell = clients.measure(up[index], state["model"], point, requests_of(point, args, on_gpu), seed)
            order = sum(len(record["cells"]) for record in everything)
            cell = {"repetition": repetition, "order": order, "point": point, "began": int(time.time())} | cell
            took_s[records.label(point)] = time.monotonic() - cell_began
            ours[index]["failures" if cell["failed"] else "cells"].append(cell)
            records.write(files[index], ours[index])
            name = f"{number + 1}/{len(plan)} {up[index]['name']}, {records.label(point)}"
            if cell["failed"]:
                raise SystemExit(f"{name}: {cell['failed']} of {cell['requests']} requests failed: {cell['errors']}")
            report(name, cell, took_s[records.label(point)])
    return True


def report(name: str, cell: dict, took_s: float) -> None:
    """One line on a cell."""
    try:
        seen = records.steady(cell)
        said = f"{seen.rates['output_tok_s']:,.0f} output tok/s, TTFT p50 {np.median(seen.ttft_ms):,.0f} ms, "
        said += f"TPOT p50 {np.median(seen.tpot_ms):.2f} ms; {len(seen.ttft_ms)} of {cell['requests']} requests count"
    except ValueError as error:
        said = str(error)
    print(f"{name}: {said}; client {cell['busiest_client']:.0%}, {took_s:.0f} s", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["all", "start", "measure", "table", "stop"], help="all: each in turn")
    names = f"of {', '.join(VARIANTS)}; or several joined by +; measure: those that are up, unless named"
    parser.add_argument("servers", nargs="*", help=names)
    parser.add_argument("--sitting", help="name of the folder for the records (default: machine, date and time)")
    parser.add_argument("--results", type=Path, default=BUILD / "results", help="where that folder is made")
    parser.add_argument("--commit", help="the commit that is measured (default: ask git)")
    parser.add_argument("--random-weights", action="store_true", help="only config.json and the tokenizer are there")
    parser.add_argument("--workload", choices=WORKLOADS, default="chat", help=f"tokens in, tokens out: {WORKLOADS}")
    parser.add_argument(
        "--range-ratio", type=float, default=0.0, help="lengths differ by up to this share (0.5: ±50 %%)"
    )
    parser.add_argument(
        "--concurrency", type=int, nargs="*", default=[1, 8, 32, 128, 256], help="requests under way at once"
    )
    parser.add_argument(
        "--request-rate", type=float, nargs="*", default=[], help="requests per second, Poisson arrivals"
    )
    parser.add_argument("--per-gpu", action="store_true", help="this load for each GPU that a server has")
    parser.add_argument(
        "--kv-gib", type=float, default=servers.KV_GIB, help="KV cache of each server that shares a GPU"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="rounds in which the servers take turns")
    parser.add_argument(
        "--requests", type=int, help="that count, per server and point (default: 200 alone, 1,500 under load)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the servers")
    parser.add_argument("--time-limit-s", type=float, help="measure: begin no cell that would end later than this")
    parser.add_argument("--start-limit-s", type=float, default=900, help="start: wait as long for the first tokens")
    args = parser.parse_intermixed_args(arguments)
    if len(set(args.servers)) < len(args.servers):
        parser.error("name each server once: a record has the server's name")
    if args.kv_gib <= 0:
        parser.error("--kv-gib has to be more than 0")
    if args.step in ("all", "start") and not args.servers:
        machine = servers.gpu()
        both = machine is None or machine[1] >= servers.needed_gib(2, args.kv_gib)
        args.servers = ["tutorial", "vllm-serve"] if both else ["tutorial"]
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that what was started is stopped, too
    if args.step in ("all", "start"):
        servers.refuse_a_second_start()  # Before anything here stops what it didn't start
        announce(args)
        try:
            servers.start(
                args.servers, args.sitting, args.results, args.random_weights, args.start_limit_s, args.kv_gib
            )
        except BaseException:
            if servers.STATE.exists():
                servers.stop()
            raise
    folder = args.results / args.sitting if args.sitting else Path(servers.load_state()["records"])
    try:
        if args.step in ("all", "measure") and not measure(args):
            return
        if args.step in ("all", "measure", "table"):
            table.show(folder)
            figure.show(folder)
    finally:
        if args.step in ("all", "stop"):
            servers.stop()


if __name__ == "__main__":
    main()
