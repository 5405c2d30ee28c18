"""Each number in benchmarks/README.md equals the record of it in benchmarks/results."""

import json
import re
from statistics import fmean

import numpy as np
import pytest

from benchmarks import records
from ci.checks.test_numbers import SERVERS, at, points_of
from ci.common import ROOT, read_notebook

pytestmark = pytest.mark.section("The faster path")
TWO, TENSOR_PARALLEL, FP8 = "tutorial+two-replicas", "tensor-parallel-2+no-multicast", "fp8-per-channel"


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
    """ "What the records show": what the app stood beside, what both had, and the CPU of the replica."""
    tables = guide.partition("| Sitting | Beside | Concurrent |")[2].split("| Sitting | Beside | Load |")
    names, rows, found = {server: name.lower() for name, server in SERVERS.items()}, [], []
    names |= {"default-path": "default path", "tutorial+stream-interval-1": "`stream_interval=1`"}
    names["vllm-serve+api-servers-2"] = "`vllm serve`, two API servers"
    for number, table in enumerate(tables):
        table = table.partition("\n\n")[0]
        for row in re.findall(r"^\| `([\w-]+)` \| (.+?) \| ([\w /±%]+) \| (.+: .+) \| (.+) \|$", table, flags=re.M):
            sitting, _, load, *_ = row
            measured = records.read(records.RESULTS / sitting)
            servers = [measured.pop("tutorial"), *measured.values()]
            point = f"chat, {load}" if "requests" in load else at(load)
            pair = [records.by_point(record)[point] for record in servers]
            cores = "{:.2f} / {:.2f}".format(*(cores_of(record, point, "replica or API server") for record in servers))
            first_token = said_of(pair, "ttft_p50_ms"), said_of(pair, "ttft_p99_ms")
            rows.append(row)
            beside = names[servers[1]["server"]]
            found.append((sitting, beside, load, *((said_of(pair, "output_tok_s"), cores), first_token)[number]))
    assert len(rows) == 33
    assert rows == found, "\n".join("| `{}` | {} | {} | {} | {} |".format(*row) for row in found)


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


def test_more_requests_at_mlperfs_lengths_are_those_of_their_record(guide):
    [cells] = points_of("h200-mlperf-512")["tutorial+fp8-per-channel+more-admitted"].values()
    fewer = points_of("h200-fp8")["tutorial+fp8-per-channel"][at("mlperf, 256")]
    metrics = "output_tok_s", "tpot_p99_ms", "ttft_p99_ms"
    tok_s, tpot_ms, ttft_ms = (records.estimate(cells, metric) for metric in metrics)
    tok_s_256, tpot_ms_256, ttft_ms_256 = (records.estimate(fewer, metric).value for metric in metrics)
    text = guide.replace("\n", " ")
    assert f"tutorial's TTFT p99 of {ttft_ms_256:.0f} ms and TPOT p99 of {tpot_ms_256:.0f} ms are" in text
    assert (
        "512 at once get {:,.0f} output tokens per second ({:,.0f} to {:,.0f})".format(tok_s.value, *tok_s.interval)
        in text
    )
    assert f"about as many as 256 did, at twice the TPOT: p99 {tpot_ms.value:.0f} ms." in text
    assert tok_s.value == pytest.approx(tok_s_256, rel=0.02) and 1.9 < tpot_ms.value / tpot_ms_256 < 2.1
    assert "TTFT p99 is {:,.0f} ms ({:,.0f} to {:,.0f})".format(ttft_ms.value, *ttft_ms.interval) in text
    *others, most = sorted(np.percentile(one.ttft_ms, 99) / 1000 for one in cells.values())
    assert len(cells) == 5 and others[-1] < 1 < 1.8 < most
    assert f"in one of five repetitions the requests moved in a wave, and in the others it was {others[0]:.1f}" in text
    assert f" to {others[-1]:.1f} s." in text


def test_cores_of_the_default_path_are_those_of_the_records(guide):
    files = [json.loads(file.read_text()) for file in records.RESULTS.glob("*/default-path.json")]
    said = []
    for kind in ("ingress", "proxy actor"):
        cores = [
            cores_of(one, point, kind) for one in files for point in records.by_point(one) if ", 1 conc" not in point
        ]
        said.append(f"{min(cores):.2f} to {max(cores):.2f}")
    loads = {cell["point"]["concurrency"] for one in files for cell in one["cells"]}
    assert sorted(loads)[:2] == [1, 32] and "from 32 concurrent requests on" in guide
    assert "the ingress takes another {} cores, and Serve's proxy {}.".format(*said) in guide.replace("\n", " "), said


def test_what_poisson_arrivals_show_is_in_their_records(guide):
    def both(sitting, rate):
        measured = points_of(sitting)
        return [measured[name][f"chat, {rate} requests/s"] for name in ("tutorial", "vllm-serve")]

    p99 = records.ratio(*both("h200-poisson", 20), "ttft_p99_ms")
    assert "TTFT p99 is a sixth lower" in guide and 1 / 7 < 1 - p99.value < 1 / 5 and p99.interval[1] < 1
    fewer = 1 - records.ratio(*both("h200-poisson", 20), "output_tok_s").value
    assert f"has {fewer:.0%} fewer tokens".replace("%", " %") in guide
    for pair in both("h200-poisson", 40), both("h200-vllm-serve", 45):
        for metric in ("ttft_p50_ms", "ttft_p99_ms", "output_tok_s"):
            low, high = records.ratio(*pair, metric).interval
            assert low <= 1 <= high, metric
    fast = both("h200-vllm-serve-8-and-50", 50)
    first, slowest, pace = (records.ratio(*fast, metric) for metric in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms"))
    assert first.claimed and pace.claimed and not slowest.claimed and slowest.repetitions == 8
    said = (
        f"its median first token comes {100 * (1 - first.value):.0f} % sooner, its TPOT is a fifth lower, and the p99"
    )
    assert said in guide.replace("\n", " ") and 0.77 < pace.value < 0.83, said
    app, other = (records.estimate(cells, "goodput_server_req_s").value for cells in fast)
    assert f"`vllm serve` answered {other:.1f} in its steady states and the app {app:.1f}" in guide.replace("\n", " ")
    most = records.estimate(points_of("h200-varied-lengths-256")["tutorial"][at("256 ±50%")], "goodput_server_req_s")
    assert "At 50, nine tenths of what" in guide and 0.88 < 50 / most.value < 0.92


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


def test_seconds_of_shorter_starts_are_those_of_the_record(guide):
    runs = json.loads((records.RESULTS / "h200-starts.json").read_text())["variants"]["runs"]
    table = guide.partition("| Added | first token after, s |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    for (added, *seconds), run in zip(rows, runs, strict=True):
        assert re.findall(r"`([\w-]+)`", added) == run["server"].split("+")[1:]
        assert ("compile cache empty" in added) == (run["caches"] != "kept")
        steps = [run["phases_s"][name] for name in ("until_engine", "engine_init")]
        found = [run["first_token_s"], *steps, run["first_token_s"] - sum(steps)]
        assert seconds == [f"{one:.0f}" for one in found], run["server"]
    with_imports = [run["first_token_s"] for run in runs if "preloaded" in run["server"]]
    assert len(with_imports) == 3 and [number for number, run in enumerate(runs, 1) if run.get("together")] == [4, 6]
    text, known = guide.replace("\n", " "), json.loads((records.RESULTS / "h200-starts.json").read_text())["runs"][1]
    said = f"took {min(with_imports):.0f} to {max(with_imports):.0f} s, in place of {runs[0]['first_token_s']:.0f} and,"
    assert f"{said} above, {known['first_token_s']:.0f}." in text and "The fourth and the last started" in text
    sooner = [runs[0]["first_token_s"] - seconds for seconds in with_imports]
    for host in json.loads((records.RESULTS / "h200-starts.json").read_text())["again"]:
        assert [run["server"] for run in host["runs"]] == ["tutorial", "tutorial+preloaded-imports"]
        without, with_it = (run["first_token_s"] for run in host["runs"])
        assert f"{without:.0f} s and, with it, {with_it:.0f} s" in text
        sooner.append(without - with_it)
    assert f"sooner, by {min(sooner):.0f} to {max(sooner):.0f} s." in text, sooner
    fifth = json.loads((records.RESULTS / "h200-starts.json").read_text())["fifth_host"]["runs"]
    assert [(run["server"], run["caches"]) for run in fifth] == [("tutorial", "kept"), ("vllm-serve", "empty")]
    said = "the app took {:.0f} s, with its cache kept, and `vllm serve` {:.0f} s with an empty one."
    assert said.format(*(run["first_token_s"] for run in fifth)) in text, fifth


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
    def gaps(concurrency: int, quantile: str, varied=False, server="tutorial") -> str:
        """The least and the most of all cells: milliseconds of a median, seconds of a p99."""
        cells = [c for file in records.RESULTS.glob(f"*/{server}.json") for c in json.loads(file.read_text())["cells"]]
        load = {"concurrency": concurrency, "workload": "chat", "range_ratio": 0.5 * varied}
        ms = [c["chunk_gap_ms"][quantile] for c in cells if load.items() <= c["point"].items()]
        low, high = (f"{one:.0f}" if quantile == "p50" else f"{one / 1000:.1f}" for one in (min(ms), max(ms)))
        return low if low == high else f"{low} to {high}"

    text, one = guide.replace("\n", " "), "tutorial+stream-interval-1"
    for said in (
        f"two chunks is {gaps(128, 'p50')} ms at 128 concurrent requests and {gaps(256, 'p50')} ms at 256, in place of "
        f"{gaps(128, 'p50', server=one)} ms and {gaps(256, 'p50', server=one)} ms.",
        f"takes {gaps(128, 'p99')} s at 128 and {gaps(256, 'p99')} s at 256, "
        f"in place of {gaps(128, 'p99', server=one)} s",
        f"median gap is {gaps(128, 'p50', True)} ms at 128 and {gaps(256, 'p50', True)} ms at 256",
        f"one in a hundred takes {gaps(128, 'p99', True)} s and {gaps(256, 'p99', True)} s.",
    ):
        assert said in text, said
    assert gaps(256, "p99", server=one) == gaps(128, "p99", server=one)


def test_distance_to_the_limit_is_that_of_the_records(guide):
    names = {}
    exec(next(c.source for c in read_notebook("notebook.ipynb").cells if c.id == "kv-arithmetic"), names)
    inner, outer = names["PARAMETERS"] - names["EMBEDDINGS"], names["EMBEDDINGS"] / 2
    measured = points_of("h200-vllm-serve")["tutorial"]
    tpot_ms, tok_s = (
        records.estimate(measured[at(n)], m).value for n, m in (("1", "tpot_p50_ms"), ("256", "output_tok_s"))
    )
    share = 2 * (inner + outer) / 4.8e12 / tpot_ms * 1000
    tflops = tok_s * (2 * inner * (535 / 128 + 1) + 2 * outer) / 1e12
    text = guide.replace("\n", " ")
    assert f"one request has a TPOT of {tpot_ms:.1f} ms: {share:.0%} of".replace("%", " %") in text, (tpot_ms, share)
    assert f"{tok_s:,.0f} output tokens per second at 256 concurrent are {tflops:.0f} TFLOP/s" in text, tflops
