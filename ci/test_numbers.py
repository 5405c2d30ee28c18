"""Each number that the notebook quotes from a measurement equals the record of it in benchmarks/results."""

import json
from statistics import median

import pytest
from conftest import ROOT

LLAMA_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip


def record(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def tokens_per_s(variant: str, concurrency: int) -> float:
    """The median of the runs on an H200, 512 tokens in and 128 out."""
    results = [run["concurrency"][str(concurrency)] for run in record(f"h200-chat-{variant}")["runs"]]
    assert len(results) == 2 and all(result["failed"] == 0 for result in results)
    return median(result["output_throughput"] for result in results)


def test_direct_streaming_against_the_default_path(cell):
    ratio = tokens_per_s("tutorial", 256) / tokens_per_s("default-path", 256)
    said = f"On an H200 with 256 concurrent requests, that gave {ratio:.1f} times the tokens per second. (Two runs each"
    assert said in cell("launch")


def test_reasons_for_the_autoscaling_target(cell):
    names = {}
    exec(cell("kv-arithmetic"), names)
    llama_8b = names["LlamaConfig"](**LLAMA_8B)
    tokens = names["kv_cache_gib"](22.5, llama_8b) * 2**30 / names["kv_bytes_per_token"](llama_8b)
    assert round(tokens / 700) == pytest.approx(50, abs=2) and "some 50 requests of 700 tokens" in cell(
        "about-autoscaling"
    )
    gain = tokens_per_s("tutorial", 256) / tokens_per_s("tutorial", 32)
    assert f"gains {gain:.1f} times the throughput between 32 and 256" in cell("about-autoscaling")


@pytest.mark.parametrize("fp8", [False, True])
def test_kv_arithmetic_against_the_engines_log(cell, fp8):
    """The notebook's formula is within 3 % of what the engine logged on an H200, whose mark is in the figure."""
    names = {}
    exec(cell("kv-arithmetic"), names)
    kv_cache = record("h200-kv-cache")
    measured = kv_cache["runs"][fp8]["kv_cache_tokens"]
    llama_8b = names["LlamaConfig"](**LLAMA_8B)
    cache_gib = names["kv_cache_gib"](kv_cache["memory_mib"] / 1024, llama_8b, fp8)
    assert cache_gib * 2**30 / names["kv_bytes_per_token"](llama_8b) == pytest.approx(measured, rel=0.03)
    assert f"plot(8192, {measured / 8192:.2f}, " in cell("draw-capacity")
