"""What benchmarks/README.md says of goodput, of cores by step, and of its aims, against the records."""

import json
import re

import pytest

from benchmarks import records
from benchmarks.variants import VARIANTS
from ci.checks.test_guide import said_of
from ci.checks.test_numbers import at, points_of
from ci.checks.test_steps import STEPS, TEXT, steps_at
from ci.common import ROOT

pytestmark = pytest.mark.section("The faster path")


def pair(sitting: str, point: str, other: str = "vllm-serve") -> list[dict]:
    """The app, or a variant of it, and another server at a point."""
    measured = points_of(sitting)
    [ours] = [name for name in measured if name.startswith("tutorial")]
    [theirs] = [name for name in measured if name.startswith(other)]
    return [measured[ours][point], measured[theirs][point]]


def ratio(
    sitting: str, point: str, metric: str = "output_tok_s", other: str = "vllm-serve", interval: bool = False
) -> str:
    one = records.ratio(*pair(sitting, point, other), metric)
    return f"{one.value:.3f}" + (" ({:.3f} to {:.3f})".format(*one.interval) if interval else "")


def test_goodput_beside_vllm_serve_is_that_of_the_records():
    def said(limits, sitting, load):
        return said_of(pair(sitting, at(load)), f"goodput_{limits}_req_s", 1)

    one, varied = "h200-vllm-serve", "h200-varied-lengths"
    server = f"tutorial over `vllm serve`: {said('server', one, '128')} at 128, {said('server', one, '256')} at 256, "
    server += f"{said('server', varied, '128 ±50%')} at 128 ±50%, and {said('server', varied + '-256', '256 ±50%')}"
    assert f"{server} at 256 ±50%." in TEXT, server
    interactive = said("interactive", one, "128")
    assert f"for some of one length at 128, {interactive}, and for next to none at 256." in TEXT, interactive
    ttft_ms, tpot_ms = records.LIMITS_MS["interactive"]
    for cells in pair(varied, at("128 ±50%")):
        assert all((one.ttft_ms <= ttft_ms).all() and (one.tpot_ms <= tpot_ms).all() for one in cells.values())
    few = [records.estimate(cells, "goodput_interactive_req_s").value for cells in pair(one, at("256"))]
    assert max(few) < 1.1, few
    server, interactive = (said(limits, "h200-fp8", "256") for limits in ("server", "interactive"))
    said = f"At 256, {server} requests per second keep the Server limits, and {interactive} the Interactive ones"
    assert said in TEXT, said


def test_cores_of_each_step_are_those_of_the_records():
    both = [steps_at(128), steps_at(256)]
    kinds = (("proxy actor", "ingress"), ("haproxy", "router"), ("replica or API server",))
    rows = []
    for label, number, server in [("defaults", 0, 1), *((label, n, 0) for n, label in enumerate(STEPS.values()))]:
        cores = [[sum(steps[number].cores(kind)[server] for kind in row) for steps in both] for row in kinds]
        said = [f"{few:.2f} / {many:.2f}" if few else "none" for few, many in cores]
        rows.append(f"| {label} | {' | '.join(said)} |")
    table = (ROOT / "benchmarks" / "README.md").read_text().partition("| replica |\n")[2].partition("\n\n")[0]
    assert table.splitlines()[1:] == rows, "\n".join(rows)


def test_aims_are_held_against_the_records():
    guide = (ROOT / "benchmarks" / "README.md").read_text()
    found = [line.split(" | ")[1].rstrip(" |") for line in guide.partition("| Aim | ")[2].splitlines()[2:9]]
    one, varied = "h200-vllm-serve", "h200-varied-lengths"
    fp8 = {
        metric: [records.estimate(cells, metric).value for cells in pair("h200-fp8", at(load))]
        for metric, load in (("output_tok_s", "256"), ("tpot_p50_ms", "1"))
    }
    [more] = points_of("h200-mlperf-512").values()
    mlperf = pair("h200-fp8", at("mlperf, 256"))[0], more[at("mlperf, 512")]
    mlperf = [records.estimate(cells, "output_tok_s").value for cells in mlperf]
    starts = json.loads((records.RESULTS / "h200-starts.json").read_text())["runs"]
    app_s, vllm_s = (run["first_token_s"] for run in starts if run["caches"] == "kept")
    ttft = [
        [
            ratio(sitting, f"chat, {rate} requests/s", f"ttft_{q}_ms", interval=q == "p99" and rate > 20)
            for q in ("p50", "p99")
        ]
        for sitting, rate in (("h200-poisson", 20), ("h200-poisson", 40), (one, 45))
    ]
    default = ratio("h200-default-path", at("128"), other="default-path", interval=True)
    default_varied = ratio("h200-default-path-varied", at("128 ±50%"), other="default-path", interval=True)
    assert found == [
        f"{ratio(one, at('1'))} at 1, {ratio(one, at('32'))} at 32, {ratio(varied, at('128 ±50%'))} at 128 ±50%; "
        f"not at 128 of one length, {ratio(one, at('128'), interval=True)}",
        f"{ratio(one, at('256'), interval=True)}, and "
        f"{ratio(varied + '-256', at('256 ±50%'), interval=True)} at 256 ±50%",
        "{} and {} at 20 requests a second; not shown at 40, {} and {}, nor at 45, {} and {}".format(*sum(ttft, [])),
        f"{default}, and {default_varied} at 128 ±50%",
        "{:,.0f}, where `vllm serve` has {:,.0f}; {:.1f} ms".format(*fp8["output_tok_s"], fp8["tpot_p50_ms"][0]),
        "{:,.0f}, and {:,.0f} with 512 requests".format(*mlperf),
        f"{app_s:.0f} s, {app_s / vllm_s:.2f} times",
    ], found
    assert not any(record["failures"] for file in records.RESULTS.glob("*/") for record in records.read(file).values())
    # The table of CPU for each request is in test_guide.py.
    core, alone = map(float, re.search(r"\| engine core \| ([\d.]+) \| ([\d.]+) \|", guide).groups())
    worker = float(re.search(r"\| engine worker \| ([\d.]+) \|", guide)[1])
    assert f"{core + worker:.1f} ms of CPU for a request at 128, where `vllm serve` takes {alone:.1f}." in TEXT
    begun = [run["phases_s"]["until_engine"] for run in starts if run["caches"] == "kept"]
    assert "before the engine begins, after {:.0f} s in place of {:.0f}".format(*begun) in TEXT


def test_what_the_guide_says_of_all_records():
    files = [json.loads(file.read_text()) for file in records.RESULTS.glob("*/*.json")]
    busiest = max(cell["busiest_client"] for one in files for cell in one["cells"])
    assert f"in all records at most {busiest:.2f} |" in TEXT, busiest
    least = {}
    for sitting in {file.parent.name for file in records.RESULTS.glob("*/*.json")}:
        for points in points_of(sitting).values():
            counts = [
                records.counted(list(cells.values()))
                for point, cells in points.items()
                if len(cells) >= records.CLAIM_REPETITIONS and ", 1 concurrent" not in point
            ]
            least[sitting] = min([least.get(sitting, 10**6), *counts])
    assert {sitting for sitting, count in least.items() if count < 1480} == {"h200-vllm-serve", "h200-default-path"}
    assert min(least.values()) == 1300 and "in `h200-vllm-serve` and `h200-default-path` from 1,300 on" in TEXT
    cells = [cell for one in files if one["server"] == "tutorial" for cell in one["cells"]]
    gaps = [{round(c["chunk_gap_ms"]["p50"]) for c in cells if c["point"].get("concurrency") == n} for n in (1, 32)]
    assert "Alone it is 38 ms, at 32 requests 45." in TEXT and gaps == [{38}, {45}], gaps
    unmeasured = """stream-interval-2 stream-interval-4 stream-interval-16 no-access-log batched-tokens-2048
        batched-tokens-4096 graphs-to-1024 fewer-graphs spinloop api-servers-2 api-servers-4 fp8""".split()
    measured = {part for one in files for part in one["server"].split("+")}
    assert set(unmeasured) <= VARIANTS.keys() and not measured & set(unmeasured)
    points = {cell["point"].get("concurrency") for one in files for cell in one["cells"]}
    rates = {cell["point"].get("rate", 0) for one in files for cell in one["cells"]}
    assert 8 not in points and max(rates) == 45
