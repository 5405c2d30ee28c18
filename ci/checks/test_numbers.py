"""Each number that the notebook quotes from a measurement equals the record of it in benchmarks/results."""

import json
import re
from functools import cache
from statistics import fmean

import numpy as np
import pytest

from benchmarks import figure, records
from benchmarks.servers import gpus
from ci.common import ROOT

pytestmark = pytest.mark.section("The faster path")
CITATION = re.compile(
    r"\[([\d,.]+) [^]]*\]"
    r"\(benchmarks/results/([\w-]+)/([\w+-]+)\.json"
    r" \"(\w+) at (\d+(?: ±50%)?)(?:, over ([\w+-]+)(?: at (\d+(?: ±50%)?))?)?\"\)"
)
MEASURED = re.compile(
    r"\b\d[\d,.]* ?(?:times|x|fold|ms|s|seconds|tok/s|tokens per second|%)(?!\w)"
    r"|\w+(?: times|fold) (?:as|slower|faster|longer|shorter|higher|lower|more|less)\b|twice as \w+|half as \w+"
)
SERVERS = {
    "Ray Serve's defaults": "default-path",
    "`vllm serve`": "vllm-serve",
}
TWO, TENSOR_PARALLEL, FP8 = "tutorial+two-replicas", "tensor-parallel-2+no-multicast", "fp8-per-channel"
# Ray's default, in test_text_names_rays_defaults, and the recorded app's delay, in test_autoscaling_target_is_said_once
CONSTANTS = {"20 s", "30 s"}
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
    """The label of a closed loop: "128 ±50%" is "chat ±50%, 128 concurrent", and "mlperf, 256" names its lengths."""
    workload, _, load = load.rpartition(", ")
    concurrency, _, varied = load.partition(" ")
    return f"{workload or 'chat'}{varied and f' {varied}'}, {concurrency} concurrent"


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

    [1.4 times](benchmarks/results/h200-default-path/tutorial.json "output_tok_s at 128, over default-path")

    "at 128 ±50%" stands for lengths that vary, "over tutorial at 96" for another load of the other server.
    """
    citations = [citation for text in prose(notebook).values() for citation in CITATION.findall(text)]
    assert len(citations) == sum(cell.source.count("](benchmarks/results/") for cell in notebook.cells) > 4
    for citation in citations:
        said, number = citation[0], cited(citation).value
        digits = len(said.partition(".")[2])
        assert said == f"{number:,.{digits}f}", f"{citation}: the record says {number}"


def test_text_says_what_may_not_be_claimed(notebook):
    """A ratio of fewer than five repetitions says how many, one whose interval includes 1 that it is noise."""
    for text in prose(notebook).values():
        for row in [line for line in text.splitlines() if CITATION.search(line) and ", over " in line]:
            found = [cited(citation) for citation in CITATION.findall(row) if citation[5]]
            few = any(one.repetitions < records.CLAIM_REPETITIONS for one in found)
            noise = any(one.interval[0] <= 1 <= one.interval[1] for one in found)
            assert ("repetitions" in row) == few and ("within the noise" in row) == (noise and not few), (row, found)


def test_no_number_stands_without_its_record(each_notebook):
    texts = prose(each_notebook).items()
    free = {name: set(MEASURED.findall(CITATION.sub("", text))) - CONSTANTS for name, text in texts}
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
            point = load.strip() + " ±50%" * ("lengths vary" in title)
            for citation in CITATION.findall(ratio):
                assert citation[2:] == ("tutorial", "output_tok_s", point, other, ""), title
                found += 1
    assert found == 7


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
        table = table.partition("\n\n")[0]
        for row in re.findall(r"^\| `([\w-]+)` \| ([\w /±%]+) \| (.+: .+) \| (.+) \|$", table, flags=re.M):
            sitting, load, *_ = row
            measured = records.read(records.RESULTS / sitting)
            servers = [measured.pop("tutorial"), *measured.values()]
            point = f"chat, {load}" if "requests" in load else at(load)
            pair = [records.by_point(record)[point] for record in servers]
            cores = "{:.2f} / {:.2f}".format(*(cores_of(record, point, "replica or API server") for record in servers))
            first_token = said_of(pair, "ttft_p50_ms"), said_of(pair, "ttft_p99_ms")
            rows.append(row)
            found.append((sitting, load, *((said_of(pair, "output_tok_s"), cores), first_token)[number]))
    assert len(rows) == 19
    assert rows == found, "\n".join("| `{}` | {} | {} | {} |".format(*row) for row in found)


@pytest.mark.parametrize(
    "title, one, other, expected",
    [
        ("two replicas / tensor parallelism", (TWO, ""), (TENSOR_PARALLEL, ""), 4),
        ("two replicas / one", (TWO, "192 ±50%"), ("tutorial", "96 ±50%"), 1),
        ("router / HAProxy", (TWO, "192 ±50%"), (f"{TWO}+no-router", "192 ±50%"), 1),
        ("tutorial / `vllm serve`, both in FP8", (f"tutorial+{FP8}", ""), (f"vllm-serve+{FP8}", ""), 3),
    ],
)
def test_tables_of_pairs_are_those_of_their_records(guide, title, one, other, expected):
    """Each server with its load: that of the row, where none is given."""
    table = guide.partition(f"Output tokens per second, {title}: ratio |")[2].partition("\n\n")[0]
    rows, found = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", table, flags=re.M), []
    for sitting, load, *_ in rows:
        pair = [points_of(sitting)[server][at(its or load)] for server, its in (one, other)]
        metrics = said_of(pair, "output_tok_s"), said_of(pair, "ttft_p50_ms"), said_of(pair, "tpot_p50_ms", 1)
        found.append((sitting, load, *metrics))
    assert len(rows) == expected
    assert rows == found, "\n".join("| `{}` | {} | {} | {} | {} |".format(*row) for row in found)


def test_cost_of_an_engine_of_two_processes_is_that_of_its_record(guide):
    measured = points_of("h200-engine-processes")
    pair = [measured[name][at("128")] for name in ("vllm-serve+two-process-engine", "vllm-serve")]
    assert f"`h200-engine-processes`: {said_of(pair, 'output_tok_s')} at 128" in guide.replace("\n", " ")


def test_seconds_of_a_start_are_those_of_the_record(guide):
    runs = json.loads((records.RESULTS / "h200-starts.json").read_text())["runs"]
    assert [(run["server"], run["caches"]) for run in runs[::3]] == [("tutorial", "empty"), ("vllm-serve", "kept")]
    phases = [{"first_token": run["first_token_s"], "rest": 0} | run["phases_s"] for run in runs]
    for run in phases:
        run["rest"] = run["first_token"] - run["until_engine"] - run["engine_init"]
    table = guide.partition("| Seconds | tutorial, caches empty |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    names = "first_token", "until_engine", "engine_init", "compilation", "graph_capture", "rest"
    found = [[f"{run[name]:.0f}" for run in phases] for name in names]
    assert [row[1:] for row in rows] == found, found


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
            same = [c for c in cells if c["point"].get("concurrency") == concurrency and not c["point"]["range_ratio"]]
            ms = [c["chunk_gap_ms"]["p50"] for c in same]
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
