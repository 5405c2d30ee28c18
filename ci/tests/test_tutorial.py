"""The notebook, executed once, while a Prometheus with Ray's own configuration watches it. Minutes."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import requests

from ci.common import ROOT, run, troubleshooting
from ci.tests.processes import assert_nothing_left, ends_with_this, what_the_tutorial_runs
from support.load import OUTPUT_TOKENS, VARIED

pytestmark = [pytest.mark.timeout(2900), pytest.mark.section("Monitor your deployment")]
SESSION = Path("/tmp/ray/session_latest")
PROMETHEUS = "http://127.0.0.1:9097"
READ_S = 15  # After the load. Prometheus has last read 5 to 15 s after it, for Ray to report all of it first.
FIGURES = {"monitor.png", "capacity.png", "sweep.png", "autoscaling.png"}
needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="Prometheus isn't installed: apt-get install prometheus"
)


def query(expression: str, at_s: float) -> float | None:
    """The sum of what a PromQL expression gives at a Unix time, None when it gives nothing."""
    answer = requests.get(f"{PROMETHEUS}/api/v1/query", {"query": expression, "time": at_s}, timeout=10).json()
    assert answer["status"] == "success", f"{expression}: {answer}"
    values = [float(sample["value"][1]) for sample in answer["data"]["result"]]
    values = [value for value in values if value == value]  # Without NaN: 0 / 0 where nothing happened.
    return sum(values) if values else None


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Execute the notebook as `pytest --nbmake` does, with Prometheus beside it that keeps running afterwards."""
    for old in ("figures/*.png", "*.json", "*.csv"):  # What an earlier run left must not pass for this one's.
        for file in (ROOT / "build").glob(old):
            file.unlink()
    folder = tmp_path_factory.mktemp("prometheus")
    before, previous = what_the_tutorial_runs(), SESSION.resolve()
    with open(folder / "nbmake.log", "w") as log:
        command = ends_with_this(sys.executable, "-m", "pytest", "--nbmake", "notebook.ipynb")
        nbmake = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    prometheus = None
    if shutil.which("prometheus"):
        config = Path("metrics", "prometheus", "prometheus.yml")
        while nbmake.poll() is None and (SESSION.resolve() == previous or not (SESSION / config).exists()):
            time.sleep(0.5)
        flags = f"--config.file={SESSION / config} --storage.tsdb.path={folder / 'data'}".split()
        command = ends_with_this("prometheus", *flags, "--web.listen-address=127.0.0.1:9097")
        with open(folder / "prometheus.log", "w") as log:
            prometheus = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        nbmake.wait(timeout=2400)
        assert prometheus is None or prometheus.poll() is None, (folder / "prometheus.log").read_text()
        yield SimpleNamespace(
            passed=nbmake.returncode == 0,
            log=(folder / "nbmake.log").read_text(),
            before=before,
            session=SESSION.resolve(),
        )
    finally:
        for process in filter(None, [nbmake, prometheus]):
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def load(executed):
    """What the client saw of the load in the section on monitoring, and when, in Unix seconds."""
    file = ROOT / "build" / "load.json"
    end_s = file.stat().st_mtime
    result = json.loads(file.read_text())
    return SimpleNamespace(**result, start_s=end_s - result["duration"] - 3, end_s=end_s)


@pytest.mark.section("Deploy Llama-3.1-8B with Ray Serve LLM")
def test_notebook_passes_under_nbmake_and_leaves_nothing_behind(executed):
    assert executed.passed, executed.log
    assert "1 passed" in executed.log
    assert_nothing_left(executed.before)


def test_every_figure_is_saved(executed):
    assert {file.name for file in (ROOT / "build" / "figures").iterdir()} == FIGURES


@pytest.mark.section("Improve concurrency")
def test_stand_in_has_the_kv_cache_that_the_notebook_predicts(executed):
    logs = "".join(file.read_text(errors="replace") for file in (executed.session / "logs").glob("worker-*.*"))
    found = re.search(r"KV cache size: ([\d,]+) tokens", logs)
    config = json.loads((ROOT / "build" / "tiny-llama" / "config.json").read_text())
    per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert int(found[1].replace(",", "")) == pytest.approx(2**30 / per_token, rel=0.03)


@pytest.mark.section("Put it under load")
def test_load_failed_nowhere(load):
    assert load.failed == 0 and load.completed == 400


@pytest.mark.section("Scale with the load")
def test_autoscaler_adds_a_replica_and_takes_it_away(executed):
    timeline = pd.read_csv(ROOT / "build" / "autoscaling.csv")
    changes = timeline["replicas"][timeline["replicas"].diff() != 0].tolist()
    assert changes[0] == changes[-1] == 1 and max(changes) == 2, changes
    assert timeline["busy_replicas"].max() == 2, "The second replica never served."


@pytest.mark.section("Find the useful load")
def test_sweep_doubles_until_throughput_stops_growing(executed):
    files = {int(file.stem.split("-")[1]): file for file in (ROOT / "build").glob("sweep-*.json")}
    sweep = {concurrency: json.loads(files[concurrency].read_text()) for concurrency in sorted(files)}
    assert list(sweep) == [2**n for n in range(len(sweep))] and len(sweep) >= 2
    assert all(result["failed"] == 0 and result["completed"] == result["num_prompts"] for result in sweep.values())
    rates = [result["output_throughput"] for result in sweep.values()]
    growth = [after / before - 1 for before, after in itertools.pairwise(rates)]
    print("Growth with each doubling:", [f"{one:.0%}" for one in growth])
    assert all(one > 0.1 for one in growth[:-1])
    # Beyond the autoscaler's target, a second replica ends the sweep, too.
    assert growth[-1] <= 0.1 or max(sweep) > 64


@needs_prometheus
def test_each_panel_of_the_dashboard_has_data(executed, load):
    dashboard = executed.session / "metrics/grafana/dashboards/serve_llm_grafana_dashboard.json"
    panels = {}
    for row in json.loads(dashboard.read_text())["panels"]:
        for panel in [row, *row.get("panels", [])]:
            for target in panel.get("targets", []):
                expression = re.sub(r"\$interval|\$__rate_interval", "30s", target["expr"])
                panels.setdefault(panel["title"], re.sub(r"=~\"\$\w+\"", '=~".*"', expression))
    rows = ("Requests / s", "Generation Tokens/s", "Prompt Tokens/s", "Cache Utilization", "Scheduler: Running")
    assert len(panels) > 30, panels.keys()
    times = [load.start_s + 10 + 5 * i for i in range(int(load.duration / 5) + 5)]
    empty = {title for title, expression in panels.items() if all(query(expression, t) is None for t in times)}
    print("panels with data:", sorted(set(panels) - empty))
    print("empty panels:", sorted(empty))
    for title in rows:
        assert title not in empty
    assert "Scheduler: Swapped" in empty and "The panel Swapped stays empty." in troubleshooting()


@needs_prometheus
def test_prometheus_agrees_with_the_client(executed, load):
    def increase(metric):
        return query(metric, load.end_s + READ_S) - (query(metric, load.start_s) or 0)

    # When Prometheus reads late, some of the few requests before the load count, too (8 at most), and of the sweep's
    # points those that had begun. A fast machine is through with several by then.
    points = [(file.stat().st_mtime, json.loads(file.read_text())) for file in (ROOT / "build").glob("sweep-*.json")]
    begun = [point for saved_s, point in points if saved_s - point["duration"] - 3 < load.end_s + READ_S]
    others = 8 + sum(point["completed"] + 1 for point in begun)
    print(f"Counted beside the load: at most {others} requests, of {len(begun)} points of the sweep.")
    tokens, answers = (increase(f"sum(ray_vllm_{name}_total)") for name in ("generation_tokens", "request_success"))
    assert 0.99 * load.total_output_tokens < tokens <= load.total_output_tokens + (1 + VARIED) * OUTPUT_TOKENS * others
    assert 0.99 * load.completed < answers <= load.completed + others
    ttft = "sum(ray_vllm_time_to_first_token_seconds_{})"
    engine_ttft_ms = 1000 * increase(ttft.format("sum")) / increase(ttft.format("count"))
    # What Ray Serve, HAProxy and the client add lies between the two. The engine's mean is as coarse as its buckets.
    assert 0 < engine_ttft_ms < 1.5 * load.mean_ttft_ms


@needs_prometheus
def test_histograms_are_only_as_fine_as_their_buckets(executed, load):
    """The notebook says that Ray's exporter moves each observation to the middle of its bucket."""
    name, at_s = "ray_vllm_request_time_per_output_token_seconds", load.end_s + READ_S
    bounds = [0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
    below = [0.0] + [query(f'sum({name}_bucket{{le="{bound}"}})', at_s) for bound in bounds[1:]]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(bounds)]
    counts = [after - before for before, after in itertools.pairwise(below)]
    expected = sum(count * middle for count, middle in zip(counts, middles, strict=True))
    assert query(f"sum({name}_sum)", at_s) == pytest.approx(expected, rel=0.001)


@pytest.mark.section("Launch")
def test_failed_deployment_shows_the_replicas_own_error(tmp_path, quoted, nothing_left_behind):
    papermill = [
        sys.executable,
        "-m",
        "papermill",
        "notebook.ipynb",
        str(tmp_path / "out.ipynb"),
        "--kernel",
        "python3",
    ]
    result = run(
        *papermill,
        "--cwd",
        ".",
        "--log-output",
        timeout_s=1200,
        APP="ci.tests.too_long_app:app",
        MODEL_SOURCE="build/tiny-llama",
    )
    assert result.returncode != 0
    message = result.stdout.partition("RuntimeError: The deployment failed:")[2]
    controller = "".join(file.read_text() for file in (SESSION / "logs" / "serve").glob("controller*.log"))
    quoted("Engine core initialization failed. See root cause above.", controller)
    quoted("To serve at least one request with the model's max seq len (...), (... GiB KV cache is needed", message)
