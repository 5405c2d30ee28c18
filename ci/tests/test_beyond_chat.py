"""beyond_chat.ipynb, executed once on the stand-in: what each cell printed is what the text beside it says. Minutes."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from ci.common import ROOT, run
from ci.tests.processes import assert_nothing_left, ends_with_this, what_the_tutorial_runs
from ci.tools import record

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What a cell printed, by its ID."""
    before, executed = what_the_tutorial_runs(), tmp_path_factory.mktemp("beyond") / "beyond_chat.ipynb"
    papermill = [sys.executable, "-m", "papermill", "beyond_chat.ipynb", str(executed), "--kernel", "python3"]
    result = run(*ends_with_this(*papermill), "--cwd", ".", "--no-progress-bar", timeout_s=1500)
    assert result.returncode == 0, result.stdout
    assert_nothing_left(before)
    notebook = record.nbformat.read(executed, as_version=4)
    (ROOT / "build" / executed.name).write_bytes(executed.read_bytes())
    return lambda cell_id: record.outputs(notebook, cell_id)[0]


@pytest.mark.section("Answer in JSON")
def test_answer_is_an_object_of_the_model(printed):
    person = "Person(name='Ada', age=36, city='London')"
    assert printed("ask-json") == person
    pieces, last = printed("json-stream").splitlines()
    assert last == person and len(re.findall(r"'[^']+'", pieces)) > 1


@pytest.mark.section("Answer in JSON")
def test_loads_with_and_without_a_schema_fail_nothing(printed):
    lines = printed("json-cost").splitlines()
    assert len(lines) == 4 and all("128 requests, 0 failed" in line for line in lines), lines


@pytest.mark.section("Call functions")
def test_loop_goes_from_the_question_to_the_answer(printed):
    called = 'get_weather({"city": "Paris"}) returned 21 degrees'
    assert printed("tool-loop").splitlines() == [called, "It is 21 degrees in Paris."]


@pytest.mark.section("Call functions")
def test_choices_call_as_the_text_says(printed):
    said = [line.partition(" -> ") for line in printed("tool-choice").splitlines()]
    calls = [calls for choice, _, calls in said if choice != "none"]
    assert [re.sub(r"\s", "", one) for one in calls] == ["""['{"city":"Paris"}']"""] * 3
    assert said[-1] == ("none", " -> ", '{"name": "get_weather", "parameters": {"city": "Paris"}}')


@pytest.mark.section("Call functions")
def test_call_after_a_word_is_text_in_a_stream(printed):
    whole, streamed = printed("tool-stream").splitlines()
    assert re.fullmatch(r"""Whole: .*\['{"city": "Paris"}'\]""", whole), whole
    assert streamed == 'Streamed: Sure! {"name": "get_weather", "parameters": {"city": "Paris"}} []'


@pytest.mark.section("Write a client that copes")
def test_client_answers_and_a_stream_that_is_closed_ends(printed):
    assert printed("run-patient-client").startswith("Why did the GPU go to therapy?")
    assert printed("cancel").splitlines() == ["Running: 1", "Running: 0"]


@pytest.mark.section("See what FP8 does to the answers")
def test_quality_compares_every_token(printed):
    line = r"(\d+) tokens: mean KL divergence (\S+) nats, the same top token at ([\d.]+)%"
    said = printed("quality-before").splitlines() + [printed("quality-after")]
    (kept, *itself), (again, *noise), (compared, *after) = (re.fullmatch(line, one).groups() for one in said)
    assert int(kept) == int(again) == int(compared) > 1000 and itself == ["0", "100.0"]
    # 16 against 32 bits: not the same, and close. Another model would be far from it.
    assert float(noise[0]) < 1e-6 < float(after[0]) < 0.01 and 95 < float(after[1]) <= 100


@pytest.mark.section("See what FP8 does to the answers")
def test_harness_takes_the_command_line(cell, monkeypatch):
    import lm_eval
    from lm_eval._cli.harness import HarnessCLI

    line = re.search(r"^lm_eval .*?(?=^```)", cell("about-quality-after"), flags=re.M | re.S)[0]
    monkeypatch.setattr(sys, "argv", shlex.split(line.replace("\\\n", " ")))
    args = HarnessCLI().parse_args()
    assert args.model_args["model"] == "my-llama-3.1-8b" and args.apply_chat_template
    tasks = "".join(file.read_text() for file in Path(lm_eval.__file__).parent.glob("tasks/gsm8k/*.yaml"))
    assert f"task: {args.tasks[0]}\n" in tasks
