"""The notebook's four figures. Each function draws one, saves it into build/figures, and returns it."""

import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from support.load import INPUT_TOKENS, OUTPUT_TOKENS, VARIED, knee_of
from support.machine import FIT_ON_H200, MEMORY_GIB, Machine

FIGURES = Path("build/figures")
ENGINE, CLIENT = "black", "tab:orange"


def finish(figure: plt.Figure, name: str, title: str, caption: str) -> plt.Figure:
    figure.suptitle(textwrap.fill(title, int(8.5 * figure.get_figwidth())))
    lines = textwrap.wrap(caption, int(13 * figure.get_figwidth()))
    figure.supxlabel("\n".join(lines), fontsize="small")
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=120, metadata={"Software": None})
    plt.close(figure)  # The cell shows what it returns, once.
    return figure


def setup_of(machine: Machine, output_tokens: int = OUTPUT_TOKENS) -> str:
    versions = ", ".join(f"{label} {version(name)}" for label, name in (("Ray", "ray"), ("vLLM", "vllm")))
    lengths = f"{INPUT_TOKENS} tokens in, {output_tokens} out ±{VARIED:.0%}"
    return f"{Path(machine.model).name} on {machine.hardware}, {versions}, {lengths}, {time.strftime('%Y-%m-%d')}"


def draw_monitoring(samples: list[dict], seen: dict, machine: Machine) -> plt.Figure:
    """The panels of the Serve LLM Dashboard under a load: what the engine says, beside what the client saw.

    A rate, or the mean of a histogram, is the difference between two of the `samples`, divided. Ray's exporter moves
    each observation of a histogram to the middle of its bucket, so the engine's latencies are as coarse as those.
    """
    table = pd.DataFrame(samples).fillna(0)
    start_s = min(seen["start_times"])
    # Ray exports about as often as the samples are taken. One that repeats the last would make the next rate a double.
    repeats = (table.drop(columns="time_s").diff() == 0).all(axis=1) & (table["time_s"] > start_s)
    table = table[~repeats]
    change = table.diff()
    time_s = table["time_s"] - start_s

    def mean_ms(histogram: str) -> pd.Series:
        name = f"ray_vllm_{histogram}_seconds"
        return 1000 * change[f"{name}_sum"] / change[f"{name}_count"].where(change[f"{name}_count"] > 0)

    panels = {
        "Output tokens per second": change["ray_vllm_generation_tokens_total"] / change["time_s"],
        "TPOT, ms": mean_ms("request_time_per_output_token"),
        "TTFT, ms": mean_ms("time_to_first_token"),
        "Request latency, ms": mean_ms("e2e_request_latency"),
        "KV cache in use, %": 100 * table["ray_vllm_kv_cache_usage_perc"],
        "Requests": table["ray_vllm_num_requests_running"],
    }
    tpots_ms = [1000 * sum(gaps) / max(1, n - 1) for gaps, n in zip(seen["itls"], seen["output_lens"], strict=True)]
    ttfts_ms = [1000 * ttft for ttft in seen["ttfts"]]
    sent_s = [s - start_s for s in seen["start_times"]]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
        shown = values.where(time_s >= -2)  # What came before, the first token's wait say, would stretch the axis.
        axis.plot(
            time_s, shown, ".-", color=ENGINE, label="running" if title == "Requests" else "engine, bucket middles"
        )
        axis.set_title(title, loc="left")
        axis.grid(alpha=0.3)
    for axis, values_ms in (axes[0, 1], tpots_ms), (axes[0, 2], ttfts_ms):
        axis.plot(sent_s, values_ms, ".", color=CLIENT, alpha=0.4, label="client")
    axes[1, 2].plot(time_s, table["ray_vllm_num_requests_waiting"], "--", color=CLIENT, label="waiting")
    for axis in axes.flat:
        axis.set_ylim(0, 1.2 * max([axis.dataLim.y1, 1e-9]))
        axis.set_xlim(left=-2)
    for axis in axes[0, 1], axes[0, 2], axes[1, 2]:
        axis.legend(loc="upper center", ncols=2)  # In the margin above the points
    plt.setp(axes[1], xlabel="seconds since the first request")
    title = (
        f"{seen['max_concurrency']} concurrent requests: {seen['output_throughput']:,.0f} tokens per second, "
        f"and a first token after {seen['median_ttft_ms']:.0f} ms (client, p50)"
    )
    return finish(
        figure, "monitor", title, f"{setup_of(machine)}, {seen['max_concurrency']} concurrent, n = {seen['completed']}"
    )


def draw_capacity(requests_that_fit) -> plt.Figure:
    """How many requests fit a GPU, by their length: `requests_that_fit(memory_gib, tokens, fp8, gpu_count)`."""
    lengths = [2**n for n in range(10, 18)]
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    colors = plt.colormaps["viridis"].resampled(len(MEMORY_GIB) + 1).colors
    for axis, gpu_count in zip(axes, (1, 2), strict=True):
        for (name, memory), color in zip(MEMORY_GIB.items(), colors, strict=False):
            for fp8, style in (False, "-"), (True, "--"):
                fit = [requests_that_fit(memory, length, fp8, gpu_count) for length in lengths]
                axis.plot(lengths, fit, style, color=color, label=None if fp8 else name)
        axis.set(xscale="log", yscale="log", xlabel="max_model_len, tokens")
        axis.set_title("one GPU" if gpu_count == 1 else "two GPUs, tensor_parallel_size=2", loc="left")
        axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.axhspan(0, 1, color="0.9", zorder=0)
    axes[0].text(1024, 0.5, "The engine doesn't start.")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes[0].yaxis.set_major_formatter("{x:,g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    for fp8, marker, size in (False, "o", 11), (True, "s", 6):
        label = f"measured, H200{', FP8' if fp8 else ''}"
        axes[0].plot(8192, FIT_ON_H200[fp8], marker, color="black", markersize=size, fillstyle="none", label=label)
    axes[0].set_ylabel("requests of full length that fit")
    axes[1].legend(*axes[0].get_legend_handles_labels())
    title = "The longer the requests, the fewer fit. FP8 weights matter most on small GPUs"
    vllm = version("vllm").partition("+")[0]  # The same on CPUs
    caption = f"Llama-3.1-8B, vLLM {vllm}. Computed: solid with 16-bit weights, dashed with FP8 weights"
    return finish(figure, "capacity", title, caption)


def draw_sweep(sweep: pd.DataFrame, slo_ms: float, machine: Machine) -> plt.Figure:
    """Throughput and time to first token against concurrency, with the limit that users set."""
    kept = sweep.index[sweep["p99_ttft_ms"] <= slo_ms]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharex=True, layout="constrained")
    left.plot(sweep.index, sweep["output_throughput"], "o-", color=ENGINE)
    knee = knee_of(sweep)
    if knee < sweep.index[-1]:
        left.axvline(knee, color="0.6", linestyle=":", label=f"growth ends: {knee} concurrent")
        left.legend()
    left.set_title("Output tokens per second", loc="left")
    left.set_ylim(0, 1.1 * sweep["output_throughput"].max())
    left.yaxis.set_major_formatter("{x:,.0f}")
    right.plot(sweep.index, sweep["median_ttft_ms"], "o-", color=ENGINE, label="p50")
    right.plot(sweep.index, sweep["p99_ttft_ms"], "o--", color=ENGINE, label="p99")
    right.axhline(slo_ms, color=CLIENT, label=f"SLO: p99 within {slo_ms:.0f} ms")
    right.set_title("Time to first token, ms", loc="left")
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.yaxis.set_minor_formatter(NullFormatter())
    for axis in left, right:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sweep.index, sweep.index)
        axis.set_xlabel("concurrent requests")
        axis.margins(x=0.08)
        axis.grid(alpha=0.3)
    right.legend()
    answer = f"{kept.max()} concurrent requests keep the SLO" if len(kept) else "No concurrency keeps the SLO"
    return finish(
        figure,
        "sweep",
        f"{answer}, and throughput {'grows up to' if knee < sweep.index[-1] else 'still grows at'} {knee}",
        f"{setup_of(machine)}, n = 6 times the concurrency, 16 at least",
    )


def draw_autoscaling(timeline: pd.DataFrame, target: int, machine: Machine) -> plt.Figure:
    """The requests under way and the replicas over time, from the moment the load exceeded the target."""
    under_way = timeline["ray_vllm_num_requests_running"] + timeline["ray_vllm_num_requests_waiting"]
    time_s = timeline["time_s"] - timeline["time_s"][under_way.gt(target).idxmax()]
    second_s = time_s[timeline["replicas"].eq(2).idxmax()]
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    above.plot(time_s, under_way, color=ENGINE)
    above.axhline(target, color=CLIENT, label=f"target for one replica: {target}")
    above.set_ylabel("ongoing requests")
    above.legend(loc="upper right")
    above.grid(alpha=0.3)
    below.step(time_s, timeline["replicas"], where="post", color=ENGINE)
    below.set(
        xlabel="seconds since the load exceeded the target",
        ylabel="running replicas",
        yticks=[0, 1, 2],
        ylim=(-0.1, 2.3),
    )
    below.grid(alpha=0.3)
    title = f"{second_s:.0f} s after the load exceeded the target, a second replica ran"
    setup = setup_of(machine, 4 * OUTPUT_TOKENS)
    load = (
        f"two loads of {2 * target} concurrent until the second replica runs. At half height, one of them starts again"
    )
    return finish(figure, "autoscaling", title, f"{setup}, {load}")
