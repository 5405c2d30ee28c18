"""Write the records of a sitting, read them, and say what they show, with intervals.

A record is the file of one server: results/SITTING/SERVER.json. benchmarks/README.md describes it. All that is claimed
is computed here from its raw requests, and the figures, the page's table and the tests ask here.

**Steady state.** It begins a cell's longest latency after all its clients send, when the rush of the beginning is over,
and ends when the first of them has sent all. Tokens in between count, and requests that start so long before its end as
the longest of them takes: they never meet the calm that follows.

**Intervals of rates.** Student's t of the repetitions; of a ratio, of the logarithms of each repetition's own, since
the servers take turns. With five repetitions it holds in 95 of 100 cases where these are normal.

**Intervals of latencies.** A bootstrap of two stages: repetitions are drawn with replacement, then requests in each.
Two servers draw the same repetitions. As few repetitions make such an interval too narrow, it is widened as Hesterberg
says (2015, What Teachers Should Know About the Bootstrap): with n repetitions to sqrt(n/(n-1)) t(n-1) standard errors.
Even so it can't leave their range: with five it holds in about 92 of 100 cases.
"""

import contextlib
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

RESULTS = Path(__file__).parent / "results"
LIMITS_MS = {"server": (2000, 100), "interactive": (500, 30)}  # MLPerf's, of Llama-3.1-8B: TTFT and TPOT at p99
LATENCIES = {
    "ttft_p50_ms": ("ttft", 50),
    "ttft_p99_ms": ("ttft", 99),
    "tpot_p50_ms": ("tpot", 50),
    "tpot_p99_ms": ("tpot", 99),
}
RATES = ("output_tok_s", "goodput_server_req_s", "goodput_interactive_req_s")
METRICS = (*RATES, *LATENCIES)
DRAWS = 4000
CLAIM_REPETITIONS = 5  # Fewer say too little of how repetitions differ.
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, 1 to 9 degrees of freedom


def write(file: Path, record: dict) -> None:
    """Write a record with one cell a line, in one step: a reader never sees half of it."""
    head = json.dumps({name: value for name, value in record.items() if name != "cells"}, indent=1)[:-2]
    cells = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in record["cells"])
    partial = file.with_suffix(".partial")
    partial.write_text(f'{head},\n "cells": [\n{cells}\n]}}\n')
    partial.rename(file)


def read(folder: Path) -> dict[str, dict]:
    """The records of one sitting by server."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return {record["server"]: record for record in records}


def label(point: dict) -> str:
    """A point in a few words: "chat, 32 concurrent", "mlperf ±50 %, 20 requests/s"."""
    varied = f" ±{point['range_ratio']:.0%}" if point["range_ratio"] else ""
    load = f"{point['concurrency']} concurrent" if "concurrency" in point else f"{point['rate']:g} requests/s"
    return f"{point['workload']}{varied}, {load}"


@dataclass(eq=False)  # Each is itself, so that `drawn` can be cached.
class Steady:
    """The steady state of one cell. Arrays have one entry for each request that counts."""

    ttft_ms: np.ndarray
    tpot_ms: np.ndarray
    rates: dict[str, float]  # By the names in RATES


def steady(cell: dict) -> Steady:
    """Cut off a cell's warm-up and cool-down. Raises ValueError when nothing is left between them."""
    start, ttft, latency = (np.array(cell[name]) / 10 for name in ("start", "ttft", "latency"))
    tokens = np.broadcast_to(cell["output_tokens"], start.shape)
    begin, end = cell["full"][0] / 10 + latency.max(), cell["full"][1] / 10
    later = (start >= begin) & (start <= end)
    last = end - latency[later].max(initial=0)
    counts = later & (start <= last)
    if not counts.any() or last <= begin:
        raise ValueError(f"No steady state in {len(start)} requests at {label(cell['point'])}: send more, or load less")
    # Each token at its time: the first at the TTFT, the others spread evenly over the rest of the request.
    first, rest = start + ttft, np.maximum(latency - ttft, 1e-9)
    inside = np.clip(np.minimum(first + rest, end) - np.maximum(first, begin), 0, None)
    in_window = ((first >= begin) & (first <= end)) + (tokens - 1) * inside / rest
    tpot = (rest / np.maximum(tokens - 1, 1))[counts]
    rates = {"output_tok_s": in_window.sum() / (end - begin) * 1000}
    requests_per_s = rates["output_tok_s"] / tokens[counts].mean()
    for name, most_ms in LIMITS_MS.items():
        kept = (ttft[counts] <= most_ms[0]) & (tpot <= most_ms[1])
        rates[f"goodput_{name}_req_s"] = requests_per_s * kept.mean()
    return Steady(ttft[counts], tpot, rates)


def by_point(record: dict) -> dict[str, dict[int, Steady]]:
    """The steady states of a record: {label of the point: {repetition: steady state}}.

    Cells that have none are left out: a load that the server can't keep up with.
    """
    points = defaultdict(dict)
    for cell in record["cells"]:
        with contextlib.suppress(ValueError):
            points[label(cell["point"])][cell["repetition"]] = steady(cell)
    return dict(points)


def picks(repetitions: int) -> np.ndarray:
    """Which repetitions each draw takes: (DRAWS, repetitions). The same for every server and latency."""
    return np.random.default_rng(0).integers(repetitions, size=(DRAWS, repetitions))


@cache
def drawn(cells: tuple[Steady, ...], metric: str) -> tuple[float, np.ndarray]:
    """A latency over all repetitions, and in each draw of the bootstrap."""
    chosen = picks(len(cells))
    name, percentile = LATENCIES[metric]
    values = [getattr(cell, f"{name}_ms") for cell in cells]
    pooled, sizes = np.concatenate(values), np.array([len(value) for value in values])
    per_draw = max(1, len(pooled) // len(cells))
    within = np.random.default_rng(1).random((*chosen.shape, per_draw)) * sizes[chosen][:, :, None]
    index = (np.cumsum(sizes) - sizes)[chosen][:, :, None] + within.astype(int)
    draws = np.percentile(pooled[index].reshape(DRAWS, -1), percentile, axis=1)
    return float(np.percentile(pooled, percentile)), draws


def student(values: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of the mean of one value from each repetition, or None of a single one."""
    if len(values) < 2:
        return None
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def interval(draws: np.ndarray, repetitions: int) -> tuple[float, float] | None:
    """The 95 % interval of bootstrap draws, or None: one repetition says nothing of how others would differ."""
    if repetitions < 2:
        return None
    errors = (repetitions / (repetitions - 1)) ** 0.5 * STUDENT[min(repetitions - 1, len(STUDENT)) - 1]
    tail = NormalDist().cdf(-errors)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


@dataclass
class Estimate:
    """A metric, or a ratio of two servers, with its 95 % interval (None after a single repetition)."""

    value: float
    interval: tuple[float, float] | None
    requests: int  # That counted, of the server with fewer
    repetitions: int

    @property
    def claimed(self) -> bool:
        """Whether a ratio may be claimed to differ from 1: its interval, of enough repetitions, excludes 1."""
        if self.interval is None or self.repetitions < CLAIM_REPETITIONS:
            return False
        return not self.interval[0] <= 1 <= self.interval[1]


def counted(cells: list[Steady]) -> int:
    return sum(len(cell.ttft_ms) for cell in cells)


def estimate(cells: dict[int, Steady], metric: str) -> Estimate:
    """One of METRICS at one point of a record, as by_point gives it. Rates are per second, latencies in ms."""
    steady_states = list(cells.values())
    if metric in RATES:
        rates = np.array([one.rates[metric] for one in steady_states])
        return Estimate(float(rates.mean()), student(rates), counted(steady_states), len(cells))
    value, draws = drawn(tuple(steady_states), metric)
    return Estimate(value, interval(draws, len(cells)), counted(steady_states), len(cells))


def ratio(ours: dict[int, Steady], theirs: dict[int, Steady], metric: str) -> Estimate:
    """How many times theirs ours is, over the repetitions that both have. Raises ValueError when there are none."""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        raise ValueError("The two servers share no repetition")
    requests = min(counted([c[i] for i in both]) for c in (ours, theirs))
    if metric in RATES:
        our_rates, their_rates = (np.array([c[i].rates[metric] for i in both]) for c in (ours, theirs))
        if not their_rates.all():
            return Estimate(float("nan"), None, 0, len(both))  # Nothing kept the limits: there is no ratio.
        logs = student(np.log(our_rates / their_rates)) if our_rates.all() else None
        bounds = (float(np.exp(logs[0])), float(np.exp(logs[1]))) if logs else None
        return Estimate(float(our_rates.mean() / their_rates.mean()), bounds, requests, len(both))
    (our_value, our_draws), (their_value, their_draws) = (
        drawn(tuple(c[i] for i in both), metric) for c in (ours, theirs)
    )
    return Estimate(our_value / their_value, interval(our_draws / their_draws, len(both)), requests, len(both))


@cache
def published(server: str) -> dict[str, dict[int, Steady]]:
    """All that benchmarks/results has of a server, by point; of two sittings with the same point, the last by name."""
    points = {}
    for file in sorted(RESULTS.glob(f"*/{server}.json")):
        points |= by_point(json.loads(file.read_text()))
    return points
