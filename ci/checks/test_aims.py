"""What benchmarks/README.md says of goodput, of cores by step, and of its aims, against the records."""

import json
import re

import numpy as np
import pytest

from benchmarks import records
from benchmarks.variants import VARIANTS
from ci.checks.test_guide import cores_of, said_of
from ci.checks.test_numbers import at, points_of
from ci.checks.test_steps import STEPS, TEXT, steps_at
from ci.common import ROOT

pytestmark = pytest.mark.section("The faster path")
CHANNEL = "tutorial+fp8-per-channel"


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
    one, varied, more = "h200-vllm-serve", "h200-varied-lengths", "h200-vllm-serve-8-and-50"
    fp8 = {
        metric: [records.estimate(cells, metric).value for cells in pair("h200-fp8", at(load))]
        for metric, load in (("output_tok_s", "256"), ("tpot_p50_ms", "1"))
    }

    def in_fp8(load, name=CHANNEL + "+fp8-kv-cache", sitting="h200-fp8-kv-cache"):
        return records.estimate(points_of(sitting)[name][at(load)], "output_tok_s").value

    per_tensor = "h200-fp8-per-tensor"
    others = [in_fp8("256", name, per_tensor) for name in ("tutorial+fp8", CHANNEL)]
    others += [in_fp8("256"), in_fp8("256", CHANNEL)]
    [admitted] = points_of("h200-mlperf-512").values()
    mlperf = pair("h200-fp8", at("mlperf, 256"))[0], admitted[at("mlperf, 512")]
    channel, more_admitted = (records.estimate(cells, "output_tok_s").value for cells in mlperf)
    here = in_fp8("mlperf, 256", CHANNEL)
    several = [channel, here, in_fp8("mlperf, 256", CHANNEL, per_tensor)]
    mlperf = [min(several), max(several), more_admitted, in_fp8("mlperf, 256"), here]
    starts = json.loads((records.RESULTS / "h200-starts.json").read_text())["runs"]
    app_s, vllm_s = (run["first_token_s"] for run in starts if run["caches"] == "kept")
    ttft = [
        [
            ratio(sitting, f"chat, {rate} requests/s", f"ttft_{q}_ms", interval=q == "p99" and rate > 20)
            for q in ("p50", "p99")
        ]
        for sitting, rate in (("h200-poisson", 20), ("h200-poisson", 40), (one, 45), (more, 50))
    ]
    default = ratio("h200-default-path", at("128"), other="default-path", interval=True)
    default_varied = ratio("h200-default-path-varied", at("128 ±50%"), other="default-path", interval=True)
    assert found == [
        f"{ratio(one, at('1'))} at 1, {ratio(one, at('32'))} at 32, {ratio(varied, at('128 ±50%'))} at 128 ±50%; "
        f"{ratio(more, at('8'))} at 8, in four repetitions; "
        f"not at 128 of one length, {ratio(one, at('128'), interval=True)}. "
        f"Beside two API servers, {ratio('h200-api-servers', at('128 ±50%'))} at 128 ±50%",
        f"{ratio(one, at('256'), interval=True)}, and "
        f"{ratio(varied + '-256', at('256 ±50%'), interval=True)} at 256 ±50%. "
        f"Beside two API servers, {ratio('h200-api-servers', at('256 ±50%'))} at 256 ±50%",
        "{0} and {1} at 20 requests a second; the p50 {6} at 50; not shown at 40, {2} and {3}, at 45, {4} and {5}, "
        "nor the p99 at 50, {7}".format(*sum(ttft, [])),
        f"{default}, and {default_varied} at 128 ±50%",
        "{:,.0f}, where `vllm serve` has {:,.0f}; with `fp8` {:,.0f} beside {:,.0f}, with the KV cache in FP8 {:,.0f} "
        "beside {:,.0f}; ".format(*fp8["output_tok_s"], *others)
        + f"{fp8['tpot_p50_ms'][0]:.1f} ms",
        "{:,.0f} to {:,.0f} in three sittings, {:,.0f} with 512 requests; with the KV cache in FP8 {:,.0f} "
        "beside {:,.0f}".format(*mlperf),
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
    few = {"h200-vllm-serve", "h200-vllm-serve-8-and-50", "h200-default-path"}
    assert {sitting for sitting, count in least.items() if count < 1480} == few and min(least.values()) == 1300
    assert "in `h200-vllm-serve`, `h200-vllm-serve-8-and-50` and `h200-default-path` from 1,300 on" in TEXT
    cells = [cell for one in files if one["server"] == "tutorial" for cell in one["cells"]]
    gaps = [{round(c["chunk_gap_ms"]["p50"]) for c in cells if c["point"].get("concurrency") == n} for n in (1, 32)]
    assert "Alone it is 37 to 38 ms, at 32 requests 45." in TEXT and gaps == [{37, 38}, {45}], gaps
    unmeasured = "stream-interval-2 no-access-log batched-tokens-2048 graphs-to-1024 fewer-graphs api-servers-4".split()
    measured = {part for one in files for part in one["server"].split("+")}
    assert set(unmeasured) <= VARIANTS.keys() and not measured & set(unmeasured)
    rates = {cell["point"]["rate"] for one in files for cell in one["cells"] if "rate" in cell["point"]}
    assert rates == {20, 40, 45, 50} and "four rates, 20, 40, 45 and 50 a second" in TEXT
    few = [
        (sitting, point, min(len(cells[point]) for cells in points_of(sitting).values()))
        for sitting, point in (
            ("h200-vllm-serve-8-and-50", at("8")),
            ("h200-fp8-per-tensor", at("mlperf, 256")),
            ("h200-spinloop", at("256 ±50%")),
        )
    ]
    assert [count for *_, count in few] == [4, 4, 1], few


def test_settings_that_arent_in_the_app_are_those_of_their_records():
    head = "| Sitting | Load | Of variants.yaml | Output tokens per second, first / second: ratio |"
    guide = (ROOT / "benchmarks" / "README.md").read_text()
    rows = guide.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    found, cores, claimed = [], {}, []
    for row in rows:
        sitting, load, both = re.match(r"\| `([\w-]+)` \| (.+?) \| (.+?) \|", row).groups()
        names = [name if name == "tutorial" else f"tutorial+{name}" for name in re.findall(r"`(.+?)`", both)]
        measured, digits = records.read(records.RESULTS / sitting), {"tpot_p50_ms": 1}
        assert measured.keys() == set(names)
        its = [points_of(sitting)[name][at(load)] for name in names]
        metrics = "output_tok_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms"
        said = " | ".join(said_of(its, metric, digits.get(metric, 0)) for metric in metrics)
        found.append(f"| `{sitting}` | {load} | {both} | {said} |")
        claimed.append([records.ratio(*its, metric).claimed for metric in metrics])
        for kind in ("replica or API server", "engine core", "engine worker"):
            cores[sitting, load, kind] = [cores_of(measured[name], at(load), kind) for name in names]
    assert len(rows) == 7 and rows == found, "\n".join(found)
    assert "No pair differs in tokens beyond the noise, with five" in TEXT and not any(row[0] for row in claimed)
    engine = [cores["h200-spinloop", "128", kind] for kind in ("engine core", "engine worker")]
    assert "take 1.0 core each as before" in TEXT and {round(one, 1) for both in engine for one in both} == {1.0}
    few, many = cores["h200-stream-interval-4-16", "256 ±50%", "replica or API server"]
    measured = records.read(records.RESULTS / "h200-stream-interval-4-16")
    chunks = [measured[f"tutorial+stream-interval-{tokens}"]["cells"] for tokens in (16, 4)]
    gaps = [np.mean([cell["chunk_gap_ms"]["p50"] for cell in cells]) for cells in chunks]
    said = f"save the replica a fifth of its CPU, {few:.2f} cores in place of {many:.2f}, but there are"
    said += " {:.0f} ms between two of them in place of {:.0f}.".format(*gaps)
    assert said in TEXT and 0.78 < few / many < 0.85, said
    assert claimed[2] == [False, False, True, False] and "the slowest first tokens come later." in TEXT
    steps = [points_of("h200-batched-tokens")[f"tutorial+batched-tokens-{n}"][at("256 ±50%")] for n in (16384, 4096)]
    assert records.ratio(*steps, "ttft_p99_ms").value > 1 and claimed[5][3] and claimed[6][3]
    names, both = (f"{CHANNEL}+fp8-kv-cache", CHANNEL), points_of("h200-fp8-kv-cache")
    loads = at("256"), at("mlperf, 256")
    ratios = [records.ratio(*(both[name][load] for name in names), "tpot_p50_ms").value for load in loads]
    assert "lowers the TPOT by {:.0f} and {:.0f} %.".format(*(100 * (1 - one) for one in ratios)) in TEXT, ratios
    medians = sorted(np.median(one.ttft_ms) / 1000 for one in both[names[0]][at("mlperf, 256")].values())
    said = "{2:.1f} to {4:.1f} s), and in two they didn't ({0:.1f} and {1:.1f} s).".format(*medians)
    assert f"three of five repetitions with it (median TTFT {said}" in TEXT, medians
    measured = records.read(records.RESULTS / "h200-fp8-kv-cache")
    assert "{:,} in place of {:,}".format(*(measured[name]["kv_cache_tokens"] for name in names)) in TEXT


def test_profile_is_that_of_its_record():
    profile = json.loads((records.RESULTS / "h200-profile.json").read_text())
    names = {"tutorial": "tutorial", "vllm-serve": "`vllm serve`"}
    parts = {
        "replica": {
            "AsyncLLM._run_output": "takes in the engine's output",
            "OpenAIServingChat.chat_comp": "writes chunks",
        },
        "engine core": {
            "FutureWrapper.result": "waits for the worker",
            "Scheduler.schedule": "schedules",
            "Scheduler.update_from": "takes in its output",
        },
        "engine worker": {"MessageQueue.dequeue": "waits for the core", "Worker.execute_model": "runs the model"},
        "engine": {
            "Worker.execute_model": "runs the model",
            "Scheduler.schedule": "schedules",
            "Scheduler.update_from": "takes in its output",
        },
        "router": {},
    }
    parts["API server"] = parts["replica"]
    rows = []
    for one in profile["processes"]:
        held, functions = one["held_gil"], one["functions"]
        found = {
            said: next(samples for name, samples in functions.items() if name.startswith(start))
            for start, said in parts[one["process"]].items()
        }
        of_that = ", ".join(f"{100 * samples / held:.0f} % {said}" for said, samples in found.items())
        whole = f"{100 * held / profile['samples']:.0f} %"
        rows.append(f"| {names[one['server']]}, {one['process']} | {whole} |{of_that and ' ' + of_that} |")
    table = (ROOT / "benchmarks" / "README.md").read_text().partition("| Process | holds the GIL, of the time |")[2]
    assert table.partition("\n\n")[0].splitlines()[2:] == rows, "\n".join(rows)
    assert "--duration 15" in profile["source"] and "--concurrency 128 --range-ratio 0.4" in profile["source"]
    assert "in each process in 15 s, at 128 requests whose lengths vary by 40 %" in TEXT
    shares = [
        one["held_gil"] / profile["samples"]
        for one in profile["processes"]
        if one["process"] in ("replica", "API server")
    ]
    assert "equally long, a quarter of the time" in TEXT and shares == pytest.approx([0.25, 0.25], abs=0.02)


def late_of(cells: dict[int, records.Steady]) -> list[np.ndarray]:
    """Of each repetition, which requests waited more than 2.5 times as long as the median for their first token."""
    return [np.flatnonzero(one.ttft_ms > 2.5 * np.median(one.ttft_ms)) for one in cells.values()]


def test_late_first_tokens_beside_two_api_servers_are_those_of_the_record():
    loads = [pair("h200-api-servers", at(f"{load} ±50%")) for load in (128, 256)]
    late = [late_of(cells) for cells in loads[0]]
    counts = sorted(len(some) for some in late[0])
    said = f"in three of five repetitions at 128, {counts[2]} to {counts[4]} of some 320 requests waited"
    assert said in TEXT and counts[:2] == [0, 0] and not sum(len(some) for some in late[1]), counts
    assert all(300 < len(one.ttft_ms) < 330 for one in loads[0][0].values())
    for sitting, point, said in (
        ("h200-varied-lengths", at("128 ±50%"), "{2} of {3:,} did, and {0} of the tutorial's {1:,}."),
        ("h200-vllm-serve-8-and-50", "chat, 50 requests/s", "a second, {0} of {1:,} did on the tutorial."),
    ):
        found = []
        for cells in pair(sitting, point):
            found += [sum(map(len, late_of(cells))), sum(len(one.ttft_ms) for one in cells.values())]
        assert said.format(*found) in TEXT, found
    for some in late[0]:  # "nearly all of them one after another"
        assert not len(some) or np.median(np.diff(some)) == 1 and (np.diff(some) < 5).mean() > 0.9
    metrics = "output_tok_s", "tpot_p50_ms", "ttft_p99_ms"
    more, lower, slowest = ([records.ratio(*cells, metric) for cells in loads] for metric in metrics)
    assert all(one.claimed for one in more + lower + slowest) and all(2.7 < one.value < 3.1 for one in slowest)
    values = [*(100 * (one.value - 1) for one in more), *(100 * (1 - one.value) for one in lower)]
    said = "{:.0f} and {:.0f} % more tokens at 128 and 256 ±50%, and a TPOT {:.0f} and {:.0f} % lower."
    assert f"the tutorial has {said.format(*values)}" in TEXT, values
    alone = pair("h200-varied-lengths", at("128 ±50%")), pair("h200-varied-lengths-256", at("256 ±50%"))
    tok_s = [records.estimate(both[1], "output_tok_s").value for both in alone]
    assert "`vllm serve` has {:,.0f} and {:,.0f}.".format(*tok_s) in TEXT, tok_s
