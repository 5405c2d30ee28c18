"""Each number that the notebook quotes from a measurement equals the record of it in benchmarks/results."""

import json
import re
import sys
from statistics import median

import pytest
from conftest import ROOT, run

from benchmarks.records import record, values

LLAMA_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip


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
    assert len(citations) == sum(cell.source.count("](benchmarks/results/") for cell in notebook.cells) > 10
    for said, variant, metric, concurrency, other in citations:
        number = median(values(variant, int(concurrency), metric))
        if other:
            number /= median(values(other, int(concurrency), metric))
        digits = len(said.partition(".")[2])
        assert said == f"{number:,.{digits}f}", f"{variant} {metric} at {concurrency} {other}: the record says {number}"


def test_no_number_stands_without_its_record(notebook):
    free = {name: MEASURED.findall(CITATION.sub("", text)) for name, text in prose(notebook).items()}
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


def test_room_of_the_smallest_gpu_for_the_autoscaling_target(cell):
    names = {}
    exec(cell("kv-arithmetic"), names)
    llama_8b = names["LlamaConfig"](**LLAMA_8B)
    tokens = names["kv_cache_gib"](22.5, llama_8b) * 2**30 / names["kv_bytes_per_token"](llama_8b)
    assert round(tokens / 700) == pytest.approx(50, abs=2)
    assert "some 50 requests of 700 tokens" in cell("about-autoscaling")


@pytest.mark.parametrize("fp8", [False, True])
def test_kv_arithmetic_against_the_engines_log(cell, fp8):
    """The notebook's formula is within 3 % of what the engine logged on an H200, whose mark is in the figure."""
    names = {}
    exec(cell("kv-arithmetic"), names)
    kv_cache = json.loads((ROOT / "benchmarks" / "results" / "h200-kv-cache.json").read_text())
    measured = kv_cache["runs"][fp8]["kv_cache_tokens"]
    llama_8b = names["LlamaConfig"](**LLAMA_8B)
    cache_gib = names["kv_cache_gib"](kv_cache["memory_mib"] / 1024, llama_8b, fp8)
    assert cache_gib * 2**30 / names["kv_bytes_per_token"](llama_8b) == pytest.approx(measured, rel=0.03)
    assert f"plot(8192, {measured / 8192:.2f}, " in cell("draw-capacity")
