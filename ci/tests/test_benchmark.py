"""The benchmark's one command, on the stand-in with tiny numbers: two servers, their records, and the table."""

import subprocess
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks import records
from ci.common import ROOT
from ci.tests.processes import assert_nothing_left, ends_with_this, what_the_tutorial_runs

pytestmark = [pytest.mark.timeout(900), pytest.mark.section("The faster path")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command printed, and the folder of its records."""
    results, before = tmp_path_factory.mktemp("results"), what_the_tutorial_runs()
    command = "benchmarks.run all tutorial vllm-serve --sitting tiny --repetitions 1 --concurrency 1 4 --requests 12"
    started = time.monotonic()
    command = ends_with_this(sys.executable, "-m", *command.split(), "--results", str(results))
    # In a session of its own, so that it outlives whoever kills this process with its group, and stops the servers.
    benchmark = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        said, _ = benchmark.communicate(timeout=800)
    finally:
        benchmark.terminate()
        benchmark.wait(timeout=120)
    assert benchmark.returncode == 0, said
    print(said, f"{time.monotonic() - started:.0f} s")
    assert_nothing_left(before)
    return said, results / "tiny"


def test_says_first_what_it_takes(measured):
    first, _, _ = measured[0].partition("Warming up")
    assert "Ports: 6379, 6380, 8000, 8001," in first and "Then to measure: about " in first


def test_each_cell_is_told_and_recorded(measured):
    said, folder = measured
    found = records.read(folder)
    assert set(found) == {"tutorial", "vllm-serve"}
    for name, record in found.items():
        points = records.by_point(record)
        assert set(points) == {"chat, 1 concurrent", "chat, 4 concurrent"}
        for point, cells in points.items():
            assert f"{name}, {point}: " in said and records.counted(list(cells.values())) >= 4
        assert record["kv_cache_tokens"] > 4 * 704 and record["weights"] and len(record["commit"]) >= 40
        steps = record["start_phases_s"]
        assert 0 < steps["until_engine"] and steps["until_engine"] + steps["engine_init"] < record["start_s"] + 1
        assert not record["failures"] and all(cell["busiest_client"] < 1 for cell in record["cells"])
    assert found["tutorial"]["engine_kwargs"] == found["vllm-serve"]["engine_kwargs"]


def test_ends_in_a_table_and_a_figure_beside_the_records_of_the_page(measured):
    table = measured[0].rpartition("tiny: in brackets")[2]
    assert "tutorial, n=" in table and "vllm-serve, n=" in table and "ratio" in table
    assert "output tok/s" in table and " *" not in table.partition("\n")[2]
    assert ("record of tutorial" in table) == ("chat, 1 concurrent" in records.published("tutorial"))
    assert str(measured[1] / "comparison.png") in table
    assert plt.imread(measured[1] / "comparison.png").shape[0] > 300


def test_answer_that_broke_off_is_a_failure():
    from benchmarks.load import cell  # Imports vLLM

    part = {name: np.array([0.0, 0.1]) for name in ("start", "ttft", "latency", "gaps", "input_tokens")}
    found = cell([part | {"output_tokens": np.array([128, 3]), "errors": []}], None, 128)
    assert found["failed"] == 1 and found["errors"] == ["an answer of 3 tokens, where 128 were asked for"]


def test_measurement_that_is_ended_does_not_wait_for_its_clients():
    code = """
import signal, sys, time
from benchmarks.load import Clients
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # As benchmarks/run.py
with Clients(1) as clients:
    cell = clients.pool.submit(time.sleep, 300)
    print("up", flush=True)
    cell.result()
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE) as measurement:
        assert any(line == "up\n" for line in measurement.stdout)
        measurement.terminate()
        try:
            assert measurement.wait(timeout=60) == 143
        finally:
            measurement.kill()
