"""Each number that the notebook quotes from a measurement equals the record of it in benchmarks/results."""

import json
import re
import sys
from statistics import median

import pytest

from benchmarks.records import record, values
from ci.common import ROOT, run
from support.machine import FIT_ON_H200, MEMORY_GIB

pytestmark = pytest.mark.section("The faster path")
CITATION = re.compile(
    r"\[([\d,.]+) [^]]*\]"
    r"\(benchmarks/results/h200-chat-([\w-]+)\.json \"(\w+) at (\d+)(?:, over ([\w-]+))?\"\)"
)
MEASURED = re.compile(r"\d[\d,.]* (?:times|ms|tok/s|tokens per second|%)(?!\w)")


def prose(notebook) -> dict[str, str]:
    """The Markdown cells by id, without code."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    return {cell.id: re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S) for cell in cells}


def test_each_number_equals_its_record(notebook):
    """A measured number in the text is a link to its record, whose title says where it stands there:

    [1.7 times](benchmarks/results/h200-chat-tutorial.json "output_throughput at 256, over default-path")
    """
    citations = [citation for text in prose(notebook).values() for citation in CITATION.findall(text)]
    assert len(citations) == sum(cell.source.count("](benchmarks/results/") for cell in notebook.cells) > 4
    for said, variant, metric, concurrency, other in citations:
        number = median(values(variant, int(concurrency), metric))
        if other:
            number /= median(values(other, int(concurrency), metric))
        digits = len(said.partition(".")[2])
        assert said == f"{number:,.{digits}f}", f"{variant} {metric} at {concurrency} {other}: the record says {number}"


def test_no_number_stands_without_its_record(each_notebook):
    free = {name: MEASURED.findall(CITATION.sub("", text)) for name, text in prose(each_notebook).items()}
    assert not any(free.values()), {name: numbers for name, numbers in free.items() if numbers}


def test_compared_records_are_of_one_sitting():
    records = {name: record(name) for name in ("tutorial", "default-path", "vllm-serve")}
    for name, one in records.items():
        assert len(one["runs"]) >= 3 and set(one["beside"]) == set(records) - {name}
        cells = [cell for run in one["runs"] for cell in run["concurrency"].values()]
        assert len(cells) == 5 * len(one["runs"]) and not any(cell["failed"] for cell in cells)
    assert len({(one["date"], one["commit"], one["hardware"]) for one in records.values()}) == 1


def test_figures_are_those_of_the_records(tmp_path):
    result = run(sys.executable, "-m", "benchmarks.figures", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (ROOT / "images" / file.name).read_bytes(), f"{file.name}: run `make figures`"


@pytest.fixture(scope="module")
def arithmetic(cell):
    names = {}
    exec(cell("kv-arithmetic"), names)
    return names


@pytest.mark.section("Scale with the load")
def test_room_of_the_smallest_gpu_for_the_autoscaling_target(arithmetic, cell):
    fit = arithmetic["kv_cache_tokens"](MEMORY_GIB["A10G, L4"]) / 700
    assert fit == pytest.approx(50, abs=2) and "holds some 50 requests of 700 tokens" in cell("about-autoscaling")
    target = int(re.search(r'TARGET_ONGOING_REQUESTS: "(\d+)"', cell("service-yaml"))[1])
    assert "ACCELERATOR_TYPE: L4" in cell("service-yaml") and target < fit
    assert f"TARGET_ONGOING_REQUESTS={target}`" in cell("about-autoscaling")


@pytest.mark.section("Improve concurrency")
def test_a_token_takes_what_the_text_says(arithmetic, cell):
    assert arithmetic["KV_BYTES_PER_TOKEN"] == 128 * 2**10 and "128 KiB, so 8,192 of them are exactly 1 GiB" in cell(
        "about-comparison"
    )


@pytest.mark.section("Improve concurrency")
@pytest.mark.parametrize("fp8", [False, True])
def test_kv_arithmetic_against_the_engines_log(arithmetic, fp8):
    """The notebook's formula is within 3 % of what the engine logged on an H200, whose mark is in the figure."""
    kv_cache = json.loads((ROOT / "benchmarks" / "results" / "h200-kv-cache.json").read_text())
    measured = kv_cache["runs"][fp8]["kv_cache_tokens"]
    assert arithmetic["kv_cache_tokens"](kv_cache["memory_mib"] / 1024, fp8) == pytest.approx(measured, rel=0.03)
    assert FIT_ON_H200[fp8] == pytest.approx(measured / 8192, abs=0.01)
    assert MEMORY_GIB["H200"] == pytest.approx(kv_cache["memory_mib"] / 1024, abs=0.1)


@pytest.mark.section("Improve concurrency")
def test_two_gpus_hold_the_weights_once(arithmetic):
    one, two = arithmetic["kv_cache_tokens"](79.6), arithmetic["kv_cache_tokens"](79.6, gpu_count=2)
    weights = 2 * 8.03e9 / arithmetic["KV_BYTES_PER_TOKEN"]
    assert two - 2 * one == pytest.approx(weights, rel=0.001)
