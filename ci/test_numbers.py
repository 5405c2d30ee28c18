"""Each number that the notebook quotes from a measurement equals the record of it in benchmarks/results."""

import json
from statistics import median

import pytest
from conftest import ROOT


def record(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_direct_streaming_against_the_default_path(notebook):
    def tokens_per_s(variant):
        runs = record(f"h200-chat-{variant}")["runs"]
        assert len(runs) == 2 and all(run["concurrency"]["256"]["failed"] == 0 for run in runs)
        return median(run["concurrency"]["256"]["output_throughput"] for run in runs)

    ratio = tokens_per_s("tutorial") / tokens_per_s("default-path")
    text = "\n".join(cell.source for cell in notebook.cells)
    assert f"On an H200 with 256 concurrent requests, that gave {ratio:.1f} times the tokens per second." in text


@pytest.mark.parametrize("fp8", [False, True])
def test_kv_arithmetic_against_the_engines_log(cell, fp8):
    """The notebook's formula is within 3 % of what the engine logged on an H200, whose mark is in the figure."""
    names = {}
    exec(cell("kv-arithmetic"), names)
    kv_cache = record("h200-kv-cache")
    measured = kv_cache["runs"][fp8]["kv_cache_tokens"]
    llama_8b = names["LlamaConfig"](
        vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    cache_gib = names["kv_cache_gib"](kv_cache["memory_mib"] / 1024, llama_8b, fp8)
    assert cache_gib * 2**30 / names["kv_bytes_per_token"](llama_8b) == pytest.approx(measured, rel=0.03)
    assert f"plot(8192, {measured / 8192:.2f}, " in cell("draw-capacity")
