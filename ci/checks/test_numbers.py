"""Each number that the notebook quotes from a measurement equals the record of it in benchmarks/results."""

import json
import re
from statistics import fmean

import numpy as np
import pytest

from benchmarks import figure, records
from benchmarks.servers import gpus
from ci.common import ROOT
from support.machine import FIT_ON_H200, MEMORY_GIB

pytestmark = pytest.mark.section("The faster path")
CITATION = re.compile(
    r"\[([\d,.]+) [^]]*\]"
    r"\(benchmarks/results/([\w-]+)/([\w+-]+)\.json \"(\w+) at (\d+)(?:, over ([\w+-]+))?\"\)"
)
MEASURED = re.compile(
    r"\b\d[\d,.]* ?(?:times|x|fold|ms|s|seconds|tok/s|tokens per second|%)(?!\w)"
    r"|\w+(?: times|fold) (?:as|slower|faster|longer|shorter|higher|lower|more|less)\b|twice as \w+|half as \w+"
)
SERVERS = {
    "Ray Serve's defaults": "default-path",
    "`vllm serve`": "vllm-serve",
    "`stream_interval=1`": "tutorial+stream-interval-1",
}
TENSOR_PARALLEL = "tensor-parallel-2+no-multicast"
# Ray's default, in test_text_names_rays_defaults, and the stand-in's delays, in test_autoscaling_target_is_said_once
CONSTANTS = {"20 s", "40 s", "30 s"}
# Of lost nodes, in ci/tests/nodes/test_nodes.py
CONSTANTS |= {"15 seconds", "30 seconds", "60 seconds", "75 seconds", "120 seconds"}


def prose(notebook) -> dict[str, str]:
    """The Markdown cells by id, without code and without the recorded parts, which test_records.py has."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    cells = [cell for cell in cells if "recorded" not in cell.metadata.get("tags", [])]
    return {cell.id: re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S) for cell in cells}


def test_each_number_equals_its_record(notebook):
    """A measured number in the text is a link to its record, whose title says where it stands there:

    [1.4 times](benchmarks/results/h200-default-path/tutorial.json "output_tok_s at 128, over default-path")
    """
    citations = [citation for text in prose(notebook).values() for citation in CITATION.findall(text)]
    assert len(citations) == sum(cell.source.count("](benchmarks/results/") for cell in notebook.cells) > 4
    for said, sitting, server, metric, concurrency, other in citations:
        measured, point = records.read(records.RESULTS / sitting), f"chat, {concurrency} concurrent"
        ours = records.by_point(measured[server])[point]
        theirs = other and records.by_point(measured[other])[point]
        number = (records.ratio(ours, theirs, metric) if other else records.estimate(ours, metric)).value
        digits = len(said.partition(".")[2])
        assert said == f"{number:,.{digits}f}", (
            f"{sitting}/{server} {metric} at {concurrency}: the record says {number}"
        )


def test_text_says_what_may_not_be_claimed(notebook):
    """A ratio of fewer than five repetitions says how many, one whose interval includes 1 that it is noise."""
    for text in prose(notebook).values():
        for row in [line for line in text.splitlines() if CITATION.search(line) and ", over " in line]:
            _, sitting, server, metric, concurrency, other = CITATION.findall(row)[-1]
            points = [records.by_point(records.read(records.RESULTS / sitting)[name]) for name in (server, other)]
            found = records.ratio(*(point[f"chat, {concurrency} concurrent"] for point in points), metric)
            few, noise = found.repetitions < records.CLAIM_REPETITIONS, found.interval[0] <= 1 <= found.interval[1]
            assert ("repetitions" in row) == few and ("within the noise" in row) == (noise and not few), (row, found)


def test_no_number_stands_without_its_record(each_notebook):
    texts = prose(each_notebook).items()
    free = {name: set(MEASURED.findall(CITATION.sub("", text))) - CONSTANTS for name, text in texts}
    assert free.pop("title", {"60 %"}) == {"60 %"}  # test_price_at_the_top_is_the_records
    assert free.pop("about-quality", {"99.5 %"}) == {"99.5 %"}  # Of the model's card, which the text links to
    assert not any(free.values()), {name: numbers for name, numbers in free.items() if numbers}


def test_each_number_is_said_of_the_server_that_was_measured(cell):
    """In each row of the table: the app, what it is compared with, and the ratio of the two."""
    rows = [line for line in cell("compare").splitlines() if CITATION.search(line)]
    for row in rows:
        [other] = [server for name, server in SERVERS.items() if name in CITATION.sub("", row)]
        found = [(server, over) for _, _, server, _, _, over in CITATION.findall(row)]
        assert found == [("tutorial", ""), (other, ""), ("tutorial", other)], row
        assert {point for _, _, _, _, point, _ in CITATION.findall(row)} == {row.split("|")[1].strip()}
    assert len(rows) == 3


@pytest.fixture(scope="module")
def guide():
    """benchmarks/README.md"""
    return (ROOT / "benchmarks" / "README.md").read_text()


def said_of(pair: list[dict], metric: str, digits: int = 0) -> str:
    """A metric of two servers, from the repetitions that both have, and its ratio."""
    shared = pair[0].keys() & pair[1].keys()
    one, other = (records.estimate({n: cells[n] for n in shared}, metric).value for cells in pair)
    ratio = records.ratio(*pair, metric)
    few = f", {ratio.repetitions} repetitions" if ratio.repetitions < records.CLAIM_REPETITIONS else ""
    said = f"{one:,.{digits}f} / {other:,.{digits}f}: "
    return said + "{:.3f} ({:.3f} to {:.3f})".format(ratio.value, *ratio.interval) + few


def cells_of(record: dict, point: str) -> list[dict]:
    return [cell for cell in record["cells"] if records.label(cell["point"]) == point]


def cores_of(record: dict, point: str, *kinds: str) -> float:
    return fmean(sum(cell["cores"].get(kind, 0) for kind in kinds) for cell in cells_of(record, point))


def test_tables_of_the_records_are_theirs(guide):
    """ "What the records show": both servers, ratio, interval, and the CPU of the replica."""
    tables = guide.partition("| Sitting | Concurrent |")[2].split("| Sitting | Load |")
    rows, found = [], []
    for number, table in enumerate(tables):
        for row in re.findall(r"^\| `([\w-]+)` \| ([\w /]+) \| (.+: .+) \| (.+) \|$", table, flags=re.M):
            sitting, load, *_ = row
            measured = records.read(records.RESULTS / sitting)
            servers = [measured.pop("tutorial"), *measured.values()]
            point = f"chat, {load}" if "requests" in load else f"chat, {load} concurrent"
            pair = [records.by_point(record)[point] for record in servers]
            cores = "{:.2f} / {:.2f}".format(*(cores_of(record, point, "replica or API server") for record in servers))
            first_token = said_of(pair, "ttft_p50_ms"), said_of(pair, "ttft_p99_ms")
            rows.append(row)
            found.append((sitting, load, *((said_of(pair, "output_tok_s"), cores), first_token)[number]))
    assert len(rows) == 12
    assert rows == found, "\n".join("| `{}` | {} | {} | {} |".format(*row) for row in found)


def test_table_of_two_gpus_is_that_of_its_record(guide):
    """Two replicas with one GPU each, beside one that has both."""
    measured = {n: records.by_point(one) for n, one in records.read(records.RESULTS / "h200-two-gpus").items()}
    table = guide.partition("| `h200-two-gpus`, concurrent |")[2].partition("\n\n")[0]
    rows, found = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", table, flags=re.M), []
    for row in rows:
        pair = [measured[name][f"chat, {row[0]} concurrent"] for name in ("tutorial+two-replicas", TENSOR_PARALLEL)]
        metrics = said_of(pair, "output_tok_s"), said_of(pair, "ttft_p50_ms"), said_of(pair, "tpot_p50_ms", 1)
        found.append((row[0], *metrics))
    assert len(rows) == 2
    assert rows == found, "\n".join(f"| {' | '.join(row)} |" for row in found)


def test_cores_of_the_machine_are_those_of_the_records(guide):
    found = []
    for record in records.read(records.RESULTS / "h200-vllm-serve").values():
        cores = [cores_of(record, point, "machine") for point in records.by_point(record)]
        found += [min(cores), max(cores)]
    said = "used {:.1f} to {:.1f} cores while the tutorial was measured, and {:.1f} to {:.1f} during"
    assert said.format(*found) in guide.replace("\n", " ")


def test_milliseconds_of_cpu_for_a_request_are_those_of_the_records(guide):
    rest = ("controller", "gcs", "raylet", "proxy actor", "other")
    kinds = {"HAProxy": ("haproxy",), "the rest of Ray": rest}
    table = guide.partition("| Process | tutorial, 128 concurrent |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([\w ]+) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", table, flags=re.M)
    measured, found = records.read(records.RESULTS / "h200-vllm-serve"), []
    for name, *_ in rows:
        row = [name]
        for concurrent in (128, 256):
            for record in (measured["tutorial"], measured["vllm-serve"]):
                point = f"chat, {concurrent} concurrent"
                cores = cores_of(record, point, *kinds.get(name, (name,)))
                cells = cells_of(record, point)
                requests_s = fmean(c["requests"] / np.add(c["start"], c["latency"]).max() * 1e4 for c in cells)
                row.append(f"{1000 * cores / requests_s:.1f}" if cores else "none")
        found.append(tuple(row))
    assert len(rows) == 6
    assert rows == found, "\n".join(f"| {' | '.join(row)} |" for row in found)


def test_gaps_between_chunks_are_those_of_the_records(guide):
    found = []
    for server in ("tutorial", "tutorial+stream-interval-1"):
        cells = [c for file in records.RESULTS.glob(f"*/{server}.json") for c in json.loads(file.read_text())["cells"]]
        for concurrency in (128, 256):
            ms = [c["chunk_gap_ms"]["p50"] for c in cells if c["point"].get("concurrency") == concurrency]
            found += [round(min(ms)), round(max(ms))]
    said = "The median gap between two chunks is {} to {} ms at 128 concurrent requests and {} to {} ms at 256, "
    said += "in place of {} to {} ms and {} to {} ms"
    assert said.format(*found) in guide.replace("\n", " ")


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
            assert record["kv_cache_tokens"] / gpus(record) == one["kv_cache_tokens"] / gpus(one)
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
    assert said in text and f"a million output tokens for ${million}, for prompts" in text


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
def test_arithmetic_takes_the_share_of_the_memory_that_the_text_names(arithmetic, cell):
    """Where vLLM is installed, ci/tests/test_engine.py compares this share with the engine's."""
    said = re.search(r"`gpu_memory_utilization`, (\d\.\d+) by default", cell("dashboard"))[1]
    one_gib_more = arithmetic["kv_cache_tokens"](41) - arithmetic["kv_cache_tokens"](40)
    assert one_gib_more * arithmetic["KV_BYTES_PER_TOKEN"] / 2**30 == pytest.approx(float(said))


@pytest.mark.section("Improve concurrency")
def test_two_gpus_hold_the_weights_once(arithmetic):
    one, two = arithmetic["kv_cache_tokens"](79.6), arithmetic["kv_cache_tokens"](79.6, gpu_count=2)
    weights = 2 * 8.03e9 / arithmetic["KV_BYTES_PER_TOKEN"]
    assert two - 2 * one == pytest.approx(weights, rel=0.001)
