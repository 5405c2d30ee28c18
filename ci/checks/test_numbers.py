"""Each number that the notebook quotes from a measurement equals the record of it in benchmarks/results."""

import re
import sys
from statistics import median

import pytest

from benchmarks.records import record, values
from ci.common import ROOT, run

pytestmark = pytest.mark.section("Compare with plain vLLM")
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
