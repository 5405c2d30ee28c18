"""The arithmetic of the KV cache: what the text says of it, and what the engine logged on an H200."""

import json
import re

import pytest

from ci.common import ROOT
from support.machine import FIT_ON_H200, MEMORY_GIB

pytestmark = pytest.mark.section("Improve concurrency")


@pytest.fixture(scope="module")
def arithmetic(cell):
    names = {}
    exec(cell("kv-arithmetic"), names)
    return names


@pytest.mark.section("Scale with the load")
def test_room_of_the_smallest_gpu_for_the_autoscaling_target(arithmetic, cell):
    fit = arithmetic["kv_cache_tokens"](MEMORY_GIB["A10G, L4"]) / 700
    assert fit == pytest.approx(50, abs=2) and "holds about 50 requests of 700 tokens" in cell("about-autoscaling")
    target = int(re.search(r'TARGET_ONGOING_REQUESTS: "(\d+)"', cell("service-yaml"))[1])
    assert "ACCELERATOR_TYPE: L4" in cell("service-yaml") and target < fit
    assert f"TARGET_ONGOING_REQUESTS={target}`" in cell("about-autoscaling")


def test_a_token_takes_what_the_text_says(arithmetic, cell):
    assert arithmetic["KV_BYTES_PER_TOKEN"] == 128 * 2**10 and "128 KiB, so 8,192 of them are exactly 1 GiB" in cell(
        "about-comparison"
    )


@pytest.mark.parametrize("fp8", [False, True])
def test_kv_arithmetic_against_the_engines_log(arithmetic, fp8):
    """The notebook's formula is within 3 % of what the engine logged on an H200, whose mark is in the figure."""
    kv_cache = json.loads((ROOT / "benchmarks" / "results" / "h200-kv-cache.json").read_text())
    measured = kv_cache["runs"][fp8]["kv_cache_tokens"]
    assert arithmetic["kv_cache_tokens"](kv_cache["memory_mib"] / 1024, fp8) == pytest.approx(measured, rel=0.03)
    assert FIT_ON_H200[fp8] == pytest.approx(measured / 8192, abs=0.01)
    assert MEMORY_GIB["H200"] == pytest.approx(kv_cache["memory_mib"] / 1024, abs=0.1)


def test_arithmetic_takes_the_share_of_the_memory_that_the_text_names(arithmetic, cell):
    """Where vLLM is installed, ci/tests/test_engine.py compares this share with the engine's."""
    said = re.search(r"`gpu_memory_utilization`, (\d\.\d+) by default", cell("dashboard"))[1]
    one_gib_more = arithmetic["kv_cache_tokens"](41) - arithmetic["kv_cache_tokens"](40)
    assert one_gib_more * arithmetic["KV_BYTES_PER_TOKEN"] / 2**30 == pytest.approx(float(said))


def test_two_gpus_hold_the_weights_once(arithmetic):
    one, two = arithmetic["kv_cache_tokens"](79.6), arithmetic["kv_cache_tokens"](79.6, gpu_count=2)
    weights = 2 * 8.03e9 / arithmetic["KV_BYTES_PER_TOKEN"]
    assert two - 2 * one == pytest.approx(weights, rel=0.001)
