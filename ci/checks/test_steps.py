"""What each step from Ray Serve's defaults to this app brought, on the page and in benchmarks/README.md."""

from dataclasses import dataclass
from statistics import fmean

import numpy as np
import pytest
from ray.llm._internal.serve.constants import MODEL_RESPONSE_BATCH_TIMEOUT_MS

from benchmarks import records
from ci.checks.test_guide import cells_of, said_of
from ci.checks.test_numbers import CITATION, at, cited, points_of
from ci.common import ROOT

pytestmark = pytest.mark.section("The faster path")
GUIDE = (ROOT / "benchmarks" / "README.md").read_text()
TEXT = GUIDE.replace("\n", " ")
STEPS = {  # From Ray Serve's defaults to the app, with what the tables call them
    "haproxy": "HAProxy",
    "direct-streaming": "direct streaming",
    "throughput-flags": "`RAY_SERVE_THROUGHPUT_OPTIMIZED`",
    "stream-interval": "`stream_interval=8`",
}


@dataclass
class Step:
    """A setting more than the one before: what both servers of its sitting had, the new one first, and their cells."""

    sitting: str
    pair: list[dict[int, records.Steady]]
    cells: list[list[dict]]

    def cores(self, kind: str) -> list[float]:
        return [fmean(cell["cores"].get(kind, 0) for cell in cells) for cells in self.cells]


def steps_at(concurrency: int) -> list[Step]:
    found, server, point = [], "default-path", at(f"{concurrency} ±50%")
    for step in STEPS:
        names = ["tutorial" if step == "stream-interval" else f"{server}+{step}", server]
        again = concurrency == 1 and step in ("throughput-flags", "stream-interval")
        suffix = "" if concurrency == 128 else "-alone" if again else "-loads"
        sitting, server = f"h200-ablation-{step}{suffix}", names[0]
        both, points = records.read(records.RESULTS / sitting), points_of(sitting)
        assert both.keys() == set(names), "A step goes on where the last one ended."
        cells = [cells_of(both[name], point) for name in names]
        found.append(Step(sitting, [points[name][point] for name in names], cells))
    return found


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return steps_at(128)


def rows_of(steps: list[Step], concurrency: str = "") -> list[str]:
    metrics = {"output_tok_s": 0, "ttft_p50_ms": 0, "ttft_p99_ms": 0, "tpot_p50_ms": 1}
    found = []
    for step, label in zip(steps, STEPS.values(), strict=False):
        said = (said_of(step.pair, metric, digits) for metric, digits in metrics.items())
        found.append(f"| `{step.sitting}` | {concurrency}{label} | {' | '.join(said)} |")
    return found


def test_tables_of_the_steps_are_theirs(steps):
    metrics = "Output tokens per second, with / without: ratio | TTFT p50, ms | TTFT p99, ms | TPOT p50, ms |\n"
    alone, many = steps_at(1), steps_at(256)
    assert all(len(one.pair[0].keys() & one.pair[1].keys()) == 5 for one in alone + many)
    for head, found in (
        ("| Sitting | Added | ", rows_of(steps)),
        ("| Sitting | Concurrent | Added | ", rows_of(alone, "1 | ") + rows_of(many, "256 | ")),
    ):
        table = GUIDE.partition(head + metrics)[2].partition("\n\n")[0].splitlines()[1:]
        assert table == found, "\n".join(found)


def multiplied(steps: list[Step], metric: str) -> np.ndarray:
    """All steps together, and their interval, in percent."""
    ratios = [records.ratio(*step.pair, metric) for step in steps]
    whole = np.prod([ratio.value for ratio in ratios])
    # Taken as independent, though two sittings ran at a time on one host. Each side adds up as squares.
    logs = np.log([[ratio.value / ratio.interval[0], ratio.interval[1] / ratio.value] for ratio in ratios])
    below, above = np.sqrt((logs**2).sum(axis=0))
    return 100 * np.array([whole, whole * np.exp(-below), whole * np.exp(above)])


def test_steps_together_at_256_are_the_product_of_their_ratios(cell):
    steps = steps_at(256)
    tokens, first, tpot = (multiplied(steps, metric) for metric in ("output_tok_s", "ttft_p50_ms", "tpot_p50_ms"))
    said = "give {:.0f} % more tokens than the defaults have ({:.0f} to {:.0f} %), and".format(*(tokens - 100))
    said += " a median first token in {:.0f} % of the time ({:.0f} to {:.0f} %), if they".format(*first)
    assert said in TEXT and tpot[1] < 100 < tpot[2], said
    more, sooner, paces = (
        [records.ratio(*step.pair, metric) for step in steps]
        for metric in ("output_tok_s", "ttft_p50_ms", "tpot_p50_ms")
    )
    assert [one.claimed and one.value > 1 for one in more] == [False, True, True, True]
    assert [one.claimed for one in paces] == [False, True, True, True] and paces[1].value < 1 < paces[3].value
    assert paces[2].value < 1 and "lower with direct streaming and the flags, higher with `stream_interval=8`" in TEXT
    said = "a fifth more, but a first token that comes a quarter later, which the next two steps make up for."
    assert said in TEXT and 1.2 < more[1].value < 1.25 < sooner[1].value < 1.3 and sooner[1].claimed
    cells = [cell for step in steps[2:] for cells in step.cells for cell in cells]
    fourth = [cell["cores"]["machine"] for cell in cells if cell["repetition"] == 3]
    assert f"used {min(fourth):.0f} to {max(fourth):.0f} cores" in TEXT, fourth
    assert all(cell["cores"]["machine"] < 15 for cell in cells if cell["repetition"] != 3)
    haproxy, streaming, flags, chunks = steps_at(1)
    one, other = (records.ratio(*step.pair, "output_tok_s") for step in (haproxy, streaming))
    assert f"HAProxy brings {100 * (one.value - 1):.1f} % more tokens, and direct streaming none beyond" in TEXT
    assert one.claimed and not other.claimed
    slower, more = records.ratio(*flags.pair, "tpot_p50_ms"), records.ratio(*chunks.pair, "output_tok_s")
    said = f"but a TPOT {100 * (slower.value - 1):.1f} % higher, and `stream_interval=8` brings"
    assert f"{said} {100 * (more.value - 1):.1f} % more tokens." in TEXT and slower.claimed and more.claimed, said
    assert not any(records.ratio(*flags.pair, m).claimed for m in ("output_tok_s", "ttft_p50_ms", "ttft_p99_ms"))
    first_ms = [records.estimate(one, "ttft_p50_ms").value for one in (*haproxy.pair[::-1], streaming.pair[0])]
    assert "goes from {:.0f} to {:.0f} and then to {:.0f} ms.".format(*first_ms) in TEXT, first_ms
    assert "some two thirds more tokens, the median first token in about a twentieth." in cell("steps")
    assert 160 < tokens[0] < 175 and 4 < first[0] < 6


def test_steps_together_are_the_product_of_their_ratios(steps):
    products = [multiplied(steps, metric) for metric in ("output_tok_s", "ttft_p50_ms", "tpot_p50_ms")]
    said = "{:.0f} % more tokens than the defaults have ({:.0f} to {:.0f} %), a median".format(*(products[0] - 100))
    said += " first token in {:.0f} % of the time ({:.0f} to {:.0f} %), and a TPOT".format(*products[1])
    said += " {:.0f} % higher ({:.0f} to {:.0f} %).".format(*(products[2] - 100))
    assert said in TEXT, said
    ends = [points_of("h200-default-path")[name][at("128")] for name in ("tutorial", "default-path")]
    more, first, tpot = (100 * records.ratio(*ends, m).value for m in ("output_tok_s", "ttft_p50_ms", "tpot_p50_ms"))
    wait_ms = records.estimate(ends[0], "ttft_p50_ms").value
    said = f"{more - 100:.0f} % more tokens, a first token in {first:.0f} % of the time, since it waits for the"
    said += f" prompts of all others ({wait_ms:.0f} ms), and a TPOT {100 - tpot:.0f} % lower."
    assert said in TEXT, said


def test_both_ends_side_by_side_are_those_of_their_record(steps):
    app, defaults = (
        points_of("h200-default-path-varied")[name][at("128 ±50%")] for name in ("tutorial", "default-path")
    )
    more, first, tpot = (records.ratio(app, defaults, m) for m in ("output_tok_s", "ttft_p50_ms", "tpot_p50_ms"))
    values = [100 * np.array([one.value, *one.interval]) for one in (more, first, tpot)]
    said = "differ more: {:.0f} % more tokens ({:.0f} to {:.0f} %),".format(*(values[0] - 100))
    said += " a median first token in {:.0f} % of the time ({:.0f} to {:.0f} %),".format(*values[1])
    said += " and a TPOT {:.0f} % higher ({:.0f} to {:.0f} %).".format(*(values[2] - 100))
    pairs = [(app, defaults), (steps[3].pair[0], steps[0].pair[1])]
    tok_s = [[records.estimate(one, "output_tok_s").value for one in pair] for pair in pairs]
    said += f" There, the defaults had {tok_s[0][1]:,.0f} output tokens per second, on the first step's host"
    said += f" {tok_s[1][1]:,.0f}, and the app {tok_s[0][0]:,.0f} and {tok_s[1][0]:,.0f}."
    assert said in TEXT, said
    server, interactive = (
        [records.estimate(one, f"goodput_{limits}_req_s").value for one in (app, defaults)]
        for limits in ("server", "interactive")
    )
    said = f"for all its {server[0]:.0f} requests per second, the defaults for {interactive[1]:.1f} of {server[1]:.0f}."
    assert said in TEXT and server[0] == interactive[0], said
    alone_ms = [
        records.estimate(points_of(sitting)["tutorial"][at("1")], "ttft_p50_ms").value
        for sitting in ("h200-default-path-varied", "h200-vllm-serve")
    ]
    assert "took {:.0f} ms on this host, and {:.0f} ms in `h200-vllm-serve`".format(*alone_ms) in TEXT, alone_ms


def test_chunks_of_eight_alone_are_within_the_noise():
    measured = points_of("h200-default-path-in-eights")
    pair = [measured[name][at("128 ±50%")] for name in ("default-path+stream-interval-8", "default-path")]
    said = f"with and without it are {said_of(pair, 'output_tok_s')}, and TTFT p50 is {said_of(pair, 'ttft_p50_ms')}."
    assert f"{said} Neither excludes 1." in TEXT, said
    intervals = [records.ratio(*pair, metric).interval for metric in ("output_tok_s", "ttft_p50_ms")]
    assert all(low <= 1 <= high for low, high in intervals)


def test_reasons_for_the_steps_are_those_of_the_records(steps):
    haproxy, streaming, last = steps[0], steps[1], steps[3]
    proxies, ingresses, replicas = (haproxy.cores(kind) for kind in ("proxy actor", "ingress", "replica or API server"))
    said = f"proxy took {proxies[1]:.2f} cores, the ingress {ingresses[1]:.2f} and the replica {replicas[1]:.2f}. With "
    said += f"HAProxy the proxy is gone, and the ingress takes {ingresses[0]:.2f}."
    assert said in TEXT and proxies[0] < 0.05 and streaming.cores("ingress")[0] == 0, said
    replicas = [step.cores("replica or API server")[0] for step in (streaming, last)]
    assert "The replica then took {:.2f} cores, and with all steps {:.2f}.".format(*replicas) in TEXT
    assert f"the tokens of {MODEL_RESPONSE_BATCH_TIMEOUT_MS:.0f} ms before it hands them on" in TEXT
    machine = [cell["cores"]["machine"] for cells in steps[2].cells for cell in cells]
    assert f"cores from {min(machine):.0f} to {max(machine):.0f} beside the third step" in TEXT, machine
    whole = [np.median([latency for cell in cells for latency in cell["latency"]]) for cells in last.cells]
    assert "the whole takes as long" in TEXT and whole[0] == pytest.approx(whole[1], rel=0.02)


def test_goodput_of_the_steps_is_that_of_their_records(steps):
    ratios = [records.ratio(*step.pair, "goodput_interactive_req_s") for step in steps]
    assert [low <= 1 <= high for low, high in (one.interval for one in ratios)] == [False, False, False, True]
    kept = [[records.estimate(one, "goodput_interactive_req_s").value for one in step.pair] for step in steps]
    *first, last = ("{:.1f} in place of {:.1f}".format(*pair) for pair in kept)
    limits = "Interactive limits ({:.0f} ms, {:.0f} ms)".format(*records.LIMITS_MS["interactive"])
    assert f"{limits}: {', '.join(first)}, and {last}, the last within the noise." in TEXT, kept


def test_steps_go_from_the_defaults_to_the_app(cell):
    """Each over the one before, at both loads, and those of the lower one multiplied."""
    head, _, *rows = [line for line in cell("steps").splitlines() if line.startswith("|")]
    assert head == "| Added | Throughput at 128 | at 256 | Median first token at 128 |"
    columns = [("", "output_tok_s", "128±50%"), ("-loads", "output_tok_s", "256±50%"), ("", "ttft_p50_ms", "128±50%")]
    products, before = {"output_tok_s": 1, "ttft_p50_ms": 1, "tpot_p50_ms": 1}, "default-path"
    for row, (step, label) in zip(rows, STEPS.items(), strict=True):
        _, said, *cells, _ = row.split("|")
        server = "tutorial" if step == "stream-interval" else f"{before}+{step}"
        found = [CITATION.findall(one) for one in cells]
        assert said.strip() == label and all(len(one) == 1 for one in found)
        assert [one[0][1:] for one in found] == [
            (f"h200-ablation-{step}{loads}", server, metric, load, before, "") for loads, metric, load in columns
        ]
        whole = {metric: cited((*found[0][0][:3], metric, *found[0][0][4:])) for metric in products}
        products = {metric: product * whole[metric].value for metric, product in products.items()}
        before = server
    said = "at 128, nearly a fifth more tokens, the median first token in an eighth of the time, a TPOT a tenth higher"
    said += " (side by side, a sixth);"
    ends = [points_of("h200-default-path-varied")[name][at("128 ±50%")] for name in ("tutorial", "default-path")]
    assert 1 / 7 < records.ratio(*ends, "tpot_p50_ms").value - 1 < 1 / 5.5
    assert said in cell("steps") and 1.15 < products["output_tok_s"] < 1.2
    assert 1 / 8.5 < products["ttft_p50_ms"] < 1 / 7.5 and 1.05 < products["tpot_p50_ms"] < 1.15, products
