"""Each number that the notebook quotes from a measurement equals the record of it in benchmarks/results."""

import json
import re
from functools import cache

import pytest

from benchmarks import figure, records
from benchmarks.servers import gpus
from ci.common import ROOT, read_notebook
from ci.tools.record import outputs, read_records

pytestmark = pytest.mark.section("The faster path")
CITATION = re.compile(
    r"\[([\d,.]+) [^]]*\]"
    r"\(benchmarks/results/([\w-]+)/([\w+-]+)\.json"
    r" \"(\w+)@(\d+(?:±50%)?)(?:/([\w+-]+)(?:@(\d+(?:±50%)?))?)?\"\)"
)
MEASURED = re.compile(
    r"\b\d[\d,.]* ?(?:times|x|fold|ms|s|seconds|tok/s|tokens per second|%)(?!\w)"
    r"|\w+(?: times|fold) (?:as|slower|faster|longer|shorter|higher|lower|more|less)\b|twice as \w+|half as \w+"
)
SERVERS = {
    "Ray Serve's defaults": "default-path",
    "`vllm serve`": "vllm-serve",
}
# Ray's times, in test_text_names_rays_defaults, and the recorded app's delay, in test_autoscaling_target_is_said_once
CONSTANTS = {"35 s", "36 s", "150 s", "30 s"}
# Of lost nodes, in ci/tests/nodes/test_nodes.py
CONSTANTS |= {"15 seconds", "30 seconds", "60 seconds", "75 seconds", "120 seconds"}


def prose(notebook) -> dict[str, str]:
    """The Markdown cells by id, without code and without the recorded parts, which test_records.py has."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    cells = [cell for cell in cells if "recorded" not in cell.metadata.get("tags", [])]
    return {cell.id: re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S) for cell in cells}


@cache
def points_of(sitting: str) -> dict[str, dict]:
    """What each server of a sitting had, by point."""
    return {name: records.by_point(one) for name, one in records.read(records.RESULTS / sitting).items()}


def at(load: str) -> str:
    """The label of a closed loop: "128 ±50%" is "chat ±50%, 128 concurrent", and "mlperf, 256" names its lengths.

    A citation has no blank before "±".
    """
    workload, _, load = load.rpartition(", ")
    concurrency, sign, share = load.partition("±")
    return f"{workload or 'chat'}{sign and f' ±{share}'}, {concurrency.strip()} concurrent"


def cited(citation: tuple[str, ...]) -> records.Estimate:
    """What the record has of a citation: a metric, or the ratio of two servers, each at its point."""
    _, sitting, server, metric, load, other, other_load = citation
    measured = points_of(sitting)
    ours = measured[server][at(load)]
    if not other:
        return records.estimate(ours, metric)
    return records.ratio(ours, measured[other][at(other_load or load)], metric)


def test_each_number_equals_its_record(notebook):
    """A measured number in the text is a link to its record, whose title says where it stands there:

    [1.4 times](benchmarks/results/h200-default-path/tutorial.json "output_tok_s@128/default-path")

    "@128±50%" stands for lengths that vary, "/default-path" for what it is divided by, "/tutorial@96" for that server's
    other load. Without blanks, so that who counts the page's words doesn't count these.
    """
    citations = [citation for text in prose(notebook).values() for citation in CITATION.findall(text)]
    assert len(citations) == sum(cell.source.count("](benchmarks/results/") for cell in notebook.cells) > 4
    for citation in citations:
        said, number = citation[0], cited(citation).value
        digits = len(said.partition(".")[2])
        assert said == f"{number:,.{digits}f}", f"{citation}: the record says {number}"


def test_text_says_what_may_not_be_claimed(notebook):
    """Of a ratio of fewer than five repetitions it says how many, and of one whose interval includes 1, noise: behind
    the number, before the next one and in the same cell of a table."""
    for text in prose(notebook).values():
        for *citation, after in re.findall(CITATION.pattern + r"([^[|\n]*)", text):
            if citation[5]:
                one = cited(tuple(citation))
                few = one.repetitions < records.CLAIM_REPETITIONS
                noise = one.interval[0] <= 1 <= one.interval[1] and not few
                assert ("repetitions" in after) == few and ("within the noise" in after) == noise, (citation, after)


def test_no_number_stands_without_its_record(each_notebook):
    texts = prose(each_notebook).items()
    free = {name: set(MEASURED.findall(CITATION.sub("", text).replace("±50%", ""))) - CONSTANTS for name, text in texts}
    assert free.pop("title", {"60 %"}) == {"60 %"}  # test_price_at_the_top_is_the_records
    assert free.pop("about-quality", {"99.5 %"}) == {"99.5 %"}  # Of the model's card, which the text links to
    assert not any(free.values()), {name: numbers for name, numbers in free.items() if numbers}


def test_each_ratio_stands_where_its_server_and_load_do(cell):
    """The app over the server that the table's head names, at the load that the row does."""
    head, _, *rows = [line.split("|")[1:-1] for line in cell("compare").splitlines() if line.startswith("|")]
    found = 0
    for load, *ratios in rows:
        for title, ratio in zip(head[1:], ratios, strict=True):
            [other] = [server for name, server in SERVERS.items() if name in title]
            for citation in CITATION.findall(ratio):
                assert citation[2:] == ("tutorial", "output_tok_s", load.replace(" ", ""), other, ""), title
                found += 1
    assert found == 10


def test_requests_that_a_fault_failed_are_those_of_the_record():
    update, death = json.loads((records.RESULTS / "h200-faults.json").read_text())["runs"]
    text = "".join(cell.source for cell in read_notebook("next_steps.ipynb").cells)
    assert update["failed"] == death["failed"] == 0
    assert f"none of {update['sent']:,} one-token requests failed" in text and 120 <= update["took_s"] < 130
    said = f"none of {death['sent']:,} other one-token requests failed in the {death['two_replicas_again_s']} seconds"
    assert said in (ROOT / "TROUBLESHOOTING.md").read_text()


def test_first_figure_is_drawn_from_the_records(tmp_path, cell):
    drawn = {figure.PAGE: figure.draw(figure.rows_of_page())}
    for kept, picture in {**drawn, figure.PREVIEW: figure.preview()}.items():
        figure.save(picture, tmp_path / kept.name)
        assert (tmp_path / kept.name).read_bytes() == kept.read_bytes(), f"Run `make record`: {kept.name}"
    assert f"(images/{figure.PAGE.name})" in cell("title")


def test_compared_records_are_of_one_sitting():
    """And had room in the KV cache for the load, and no failure."""
    folders = [folder for folder in records.RESULTS.iterdir() if folder.is_dir()]
    assert folders
    for folder in folders:
        found = records.read(folder)
        one = next(iter(found.values()))
        stood = {one["server"], *one["beside"]}
        assert set(found) <= stood and (set(found) == stood or folder.name == "h200-two-gpus")
        for server, record in found.items():
            assert {server, *record["beside"]} == stood
            for key in ("date", "commit", "hardware", "cpu", "versions", "weights"):
                assert record[key] == one[key], f"{folder.name}: {key}"
            tokens = [r["kv_cache_tokens"] / gpus(r) / (1 + ("fp8-kv-cache" in r["server"])) for r in (record, one)]
            assert tokens[0] == tokens[1], f"{folder.name}: as much memory for each"
            for cell in record["cells"]:
                point = cell["point"]
                assert not cell["failed"]
                request = point["input_len"] + point["output_len"] + 64
                assert point.get("concurrency", 1) * request <= record["kv_cache_tokens"]
            assert not record["failures"]


def test_price_at_the_top_is_the_records(cell):
    """The price, and what it is computed from: the cell with the cost, and its output on the H200."""
    price, utilization = re.search(r"price_per_hour, utilization = ([\d.]+), ([\d.]+)", cell("cost")).groups()
    million = re.search(r"within  500 ms: \$([\d.]+) per million", cell("cost-recorded"))[1]
    said = f"At ${price} an hour and busy {float(utilization):.0%}".replace("%", " %")
    text = re.sub(r"[\\*]", "", cell("title"))
    assert said in text and f"a million output tokens for ${million}: " in text
    tok_s = float(price) / float(utilization) / 3600 / float(million) * 1e6
    points = re.findall(r"(\d+) concurrent.* ([\d,]+) output tokens/s", cell("sweep-recorded"))
    [concurrent] = [n for n, seen in points if abs(float(seen.replace(",", "")) / tok_s - 1) < 0.02]
    assert f": {concurrent} requests at once," in text
    # The other run, on a host with more to do
    other = read_records()["two-h200s"]
    million = re.search(r"within  500 ms: \$([\d.]+) per million", outputs(other, "cost")[0])[1]
    sweeps = cell("sweep-recorded"), outputs(other, "sweep")[0]
    rows = [re.findall(r"(\d+) concurrent.*: ([\d,]+) output.* p99 (\d+) ms", sweep) for sweep in sweeps]
    tok_s, p99_ms = ({int(n): float(row[i].replace(",", "")) for n, *row in rows[1]} for i in (0, 1))
    kept = max(n for n, ms in p99_ms.items() if ms <= 500)
    assert f"On a busier host, only {kept} kept that: ${million}." in text
    first = {int(n): (float(seen.replace(",", "")), ms) for n, seen, ms in rows[0]}
    most, dearer = int(concurrent), float(price) / float(utilization) / 3600 / first[kept][0] * 1e6
    lower = [100 * (1 - tok_s[n] / first[n][0]) for n in (most, kept)]
    said = (
        f"{most} requests had a TTFT p99 of {p99_ms[most]:.0f} ms, in place of {first[most][1]}. So {kept} is the most "
    )
    said += f"within half a second, at \\${million}, where the first run has \\${dearer:.2f}. Throughput was "
    said += f"{lower[0]:.0f} % lower at {most}, and {lower[1]:.0f} % at {kept}."
    assert said in (ROOT / "benchmarks" / "README.md").read_text().replace("\n", " "), said
