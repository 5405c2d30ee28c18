"""Draw images/ from the records in benchmarks/results: `make figures`. The same records give the same bytes."""

import argparse
from pathlib import Path
from statistics import median

import matplotlib
import matplotlib.pyplot as plt

from benchmarks.records import record, values

# Llama-3.1-8B on one H200: 32 layers, hidden size 4096, vocabulary 128,256.
CORE_PARAMETERS, HEAD_PARAMETERS = 6.980e9, 0.525e9
KV_BYTES_PER_TOKEN = 131_072
BYTES_PER_S, FLOP_PER_S = 4.8e12, {"bf16": 989e12, "fp8": 1979e12}  # NVIDIA's data sheet: HBM3e, dense
SERVERS = {
    "default-path": ("Ray Serve LLM, default path", "tab:gray", "s"),
    "vllm-serve": ("plain vllm serve", "tab:blue", "^"),
    "tutorial": ("this tutorial", "tab:orange", "o"),
}
CONCURRENCIES = [1, 8, 32, 128, 256]


def tpot_bound_s(batch: int, context: float, weights: str = "bf16") -> float:
    """The least time per output token: all weights and the batch's KV cache are read, all products computed, once."""
    core_bytes = CORE_PARAMETERS * (2 if weights == "bf16" else 1)
    memory_s = (core_bytes + 2 * HEAD_PARAMETERS + batch * context * KV_BYTES_PER_TOKEN) / BYTES_PER_S
    flop = batch * (2 * (CORE_PARAMETERS + HEAD_PARAMETERS) + 4 * 32 * 4096 * context)
    return max(memory_s, flop / FLOP_PER_S[weights])


def tokens_per_s_bound(batch: int, input_len: float, output_len: int, weights: str = "bf16") -> float:
    """The most output tokens per second when prefill and decode take turns, each at its own bound."""
    prefill_flop = 2 * CORE_PARAMETERS * input_len + 2 * HEAD_PARAMETERS + 2 * 32 * 4096 * input_len**2
    decode_s = output_len * tpot_bound_s(batch, input_len + output_len / 2, weights) / batch
    return output_len / (prefill_flop / FLOP_PER_S[weights] + decode_s)


def caption(*variants: str) -> str:
    records = [record(variant) for variant in variants]
    versions = records[0]["versions"]
    repetitions = sorted({len(record["runs"]) for record in records})
    return (
        f"Llama-3.1-8B (random weights) on one {records[0]['hardware']}, 512 tokens in, 128 out, "
        f"Ray {versions['ray']}, vLLM {versions['vllm']}, torch {versions['torch']}, {records[0]['date']}.\n"
        f"Lines: medians of {' to '.join(map(str, repetitions))} runs. Bars: from the lowest to the highest."
    )


def plot(axis, variant: str, metric: str, label: str | None = None) -> None:
    name, color, marker = SERVERS.get(variant, (variant, "tab:green", "D"))
    runs = {c: values(variant, c, metric) for c in CONCURRENCIES if str(c) in record(variant)["runs"][0]["concurrency"]}
    middle = [median(run) for run in runs.values()]
    spread = [
        [mid - run[0] for mid, run in zip(middle, runs.values(), strict=True)],
        [run[-1] - mid for mid, run in zip(middle, runs.values(), strict=True)],
    ]
    axis.errorbar(
        list(runs), middle, spread, fmt="-" + marker, color=color, capsize=3, markersize=5, label=label or name
    )


def axes_of(figure, titles: tuple[str, ...]):
    axes = figure.subplots(1, 2)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left")
        axis.set_xscale("log", base=2)
        axis.set_xticks(CONCURRENCIES, CONCURRENCIES)
        axis.set_xlim(0.8, 420)
        axis.set_xlabel("concurrent requests")
        axis.grid(alpha=0.3)
    return axes


def log_y(axis, ticks: list[int]) -> None:
    axis.set_yscale("log")
    axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()


def draw_throughput() -> plt.Figure:
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    left, right = axes_of(figure, ("Output tokens per second", "Time to first token, ms: p50 solid, p99 dashed"))
    for variant in SERVERS:
        plot(left, variant, "output_throughput")
        plot(right, variant, "median_ttft_ms")
        p99_ms = [median(values(variant, c, "p99_ttft_ms")) for c in CONCURRENCIES]
        right.plot(CONCURRENCIES, p99_ms, "--", color=SERVERS[variant][1])
    left.legend()
    left.set_ylim(0)
    left.yaxis.set_major_formatter("{x:,.0f}")
    log_y(right, [30, 100, 300, 1000, 3000])
    more = median(values("tutorial", 256, "output_throughput")) / median(
        values("default-path", 256, "output_throughput")
    )
    sooner = median(values("tutorial", 1, "median_ttft_ms")) / median(values("default-path", 1, "median_ttft_ms"))
    figure.suptitle(
        f"Direct streaming: {more:.1f} times the throughput under load, "
        f"and a lone request's first token after {sooner:.0%} of the time"
    )
    figure.supxlabel(caption(*SERVERS), fontsize="small")
    return figure


def draw_bound() -> plt.Figure:
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    left, right = axes_of(figure, ("Time per output token, ms", "Output tokens per second"))
    output_len = record("tutorial")["workload"]["output_len"]
    cell = record("tutorial")["runs"][0]["concurrency"]["256"]
    input_len = cell["total_input_tokens"] / cell["completed"]
    for variant, weights, label in ("tutorial", "bf16", "16-bit weights"), ("fp8", "fp8", "FP8 weights"):
        color = SERVERS.get(variant, ("", "tab:green"))[1]
        plot(left, variant, "median_tpot_ms", label=f"measured, {label}")
        plot(right, variant, "output_throughput", label=f"measured, {label}")
        tpot_ms = [1000 * tpot_bound_s(c, input_len + output_len / 2, weights) for c in CONCURRENCIES]
        tokens_per_s = [tokens_per_s_bound(c, input_len, output_len, weights) for c in CONCURRENCIES]
        left.plot(CONCURRENCIES, tpot_ms, ":", color=color, label=f"physical limit, {label}")
        right.plot(CONCURRENCIES, tokens_per_s, ":", color=color, label=f"physical limit, {label}")
        for axis, metric, bound in (left, "median_tpot_ms", tpot_ms), (right, "output_throughput", tokens_per_s):
            for concurrency in (1, 256):
                measured = median(values(variant, concurrency, metric))
                limit = bound[CONCURRENCIES.index(concurrency)]
                share = limit / measured if axis is left else measured / limit
                offset = (8, -12) if (variant == "tutorial") == (axis is right) else (8, 4)
                label = axis.annotate(
                    f"{share:.0%}", (concurrency, measured), offset, textcoords="offset points", color=color
                )
                label.set_bbox(dict(facecolor="white", edgecolor="none", pad=1))
    log_y(left, [2, 3, 5, 10, 20, 30])
    log_y(right, [200, 500, 1000, 2000, 5000, 10_000, 20_000])
    left.legend()
    share = 1000 * tpot_bound_s(1, input_len + output_len / 2) / median(values("tutorial", 1, "median_tpot_ms"))
    figure.suptitle(
        f"A lone request runs at {share:.0%} of what the memory's bandwidth allows. Load leaves more to gain"
    )
    kv_tokens = [f"{record(variant)['kv_cache_tokens']:,}" for variant in ("tutorial", "fp8")]
    limits = " Limits: from 4.8 TB/s and 989 (FP8: 1,979) TFLOP/s. Percent: of the limit."
    kv_cache = f"\nKV cache: {kv_tokens[0]} tokens, with FP8 weights {kv_tokens[1]}."
    figure.supxlabel(caption("tutorial", "fp8") + limits + kv_cache, fontsize="small")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("images"))
    out = parser.parse_args().out
    out.mkdir(exist_ok=True)
    matplotlib.use("agg")
    for name, draw in ("throughput", draw_throughput), ("physical-limit", draw_bound):
        draw().savefig(out / f"{name}.png", dpi=120, metadata={"Software": None})
