"""How Ray starts, where the app listens, and what is ended, in the notebook and by hand in a terminal."""

import json
import os
import re
import sys
import time
from types import SimpleNamespace

import pytest
from ray import serve

from ci.common import ROOT, run
from support import load, serving
from support.machine import STAND_IN, Machine
from support.serving import FAST_PATH, choose_host

pytestmark = pytest.mark.section("Launch")
REAL = "serve_llama_3_1_8b:app"
# Stands in for `ray`, and writes down how it was called.
RECORDER = """\
#!{python}
import json, os, sys
call = [sys.argv[1:], os.umask(0), {{name: value for name, value in os.environ.items() if name.startswith("RAY_")}}]
with open("{calls}", "a") as calls:
    print(json.dumps(call), file=calls)
print("token-canary" if sys.argv[1] == "get-auth-token" else "")
"""
# The launch cell, without the connection to the Ray that isn't there.
LAUNCH = """\
import os, sys, types
import support.machine, support.serving
os.chdir({folder!r})
sys.modules["ray.serve.llm"] = types.ModuleType("ray.serve.llm")
support.serving.connect = lambda head: head.wait()
support.machine.ray_runs(on_anyscale=False)
machine = support.machine.Machine(support.machine.STAND_IN, "model", "2 CPU cores", 2, ray_was_running=False)
exec({cell!r})
print("host:", host)
"""


@pytest.fixture
def calls_of_ray(tmp_path, monkeypatch):
    """Run a program, and return what it printed and how it called `ray`: arguments, umask and variables."""
    for name in [name for name in serving.os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    recorder, calls = tmp_path / "ray", tmp_path / "calls"
    recorder.write_text(RECORDER.format(python=sys.executable, calls=calls))
    recorder.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def calls_of_ray(*program: str) -> tuple[str, list]:
        calls.unlink(missing_ok=True)
        result = run(*program, timeout_s=60)
        assert result.returncode == 0, result.stdout
        return result.stdout, [json.loads(line) for line in calls.read_text().splitlines()]

    return calls_of_ray


def test_notebook_and_terminal_start_the_same_ray(calls_of_ray, cell, tmp_path):
    """With a token that isn't shown, for this user only, on the fast path, and without a report to Ray's makers."""
    block = re.search(r"```bash\n(.*?)```", cell("about-serve-deploy"), flags=re.S)[1]
    launch = LAUNCH.format(folder=str(tmp_path), cell=cell("start-ray"))
    ways = calls_of_ray("bash", "-c", block), calls_of_ray(sys.executable, "-c", launch)
    assert ways[1][0].endswith("host: 127.0.0.1\n"), ways[1][0]
    arguments = []
    for said, calls in ways:
        assert "token-canary" not in said
        calls = [call for call in calls if call[0] != ["status"]]
        assert [call[0][0] for call in calls] == ["get-auth-token", "start"], "Make the token first"
        assert calls[0][0] == ["get-auth-token", "--generate"]
        _, umask, variables = calls[1]
        assert umask == 0o077 and variables["RAY_AUTH_MODE"] == "token"
        assert {name: variables.get(name) for name in FAST_PATH} == dict.fromkeys(FAST_PATH, "1")
        assert variables["RAY_SERVE_HAPROXY_BINARY_PATH"].endswith("/build/haproxy")
        arguments.append(set(calls[1][0]))
    assert arguments[0] < arguments[1], "The terminal's Ray has an option that the notebook's hasn't"
    extra = {argument.split("=")[0] for argument in arguments[1] - arguments[0]}
    assert extra == {"--num-cpus"}, f"The terminal's Ray lacks {extra}"


def test_ray_ends_with_the_notebook(tmp_path, monkeypatch):
    (tmp_path / "ray").write_text(
        "#!/bin/sh\ntrap 'touch ended; exit' TERM\ntouch began\nwhile :; do sleep 0.1; done\n"
    )
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program = "import os, sys, time, support.serving as s; os.chdir(sys.argv[1]); head = s.start_head()\n"
    program += "while not os.path.exists('began'): time.sleep(0.05)\n"
    program += "print(head.pid, flush=True); os._exit(0)"
    pid = int(run(sys.executable, "-c", program, str(tmp_path)).stdout)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if not (tmp_path / "ended").exists():
        serving.os.kill(pid, 9)
        pytest.fail("The notebook's process ended, and Ray went on")


@pytest.mark.section("Scale with the load")
@pytest.mark.parametrize("app, gpus, off", [(REAL, 1, None), (REAL, 2, "1"), (STAND_IN, 2, None)])
def test_gpus_of_one_machine_share_no_compiled_code(monkeypatch, capsys, app, gpus, off):
    """What fails otherwise takes two GPUs, so it isn't provoked here: TROUBLESHOOTING.md quotes it."""
    monkeypatch.delenv("VLLM_DISABLE_COMPILE_CACHE", raising=False)
    seen = []
    monkeypatch.setattr(serving, "start_head", lambda: seen.append(os.environ.get("VLLM_DISABLE_COMPILE_CACHE")))
    monkeypatch.setattr(serving, "connect", lambda head: None)
    monkeypatch.setattr(serving, "choose_host", lambda head: "127.0.0.1")
    serving.start_ray(Machine(app, "model", "H200", gpus, ray_was_running=False))
    assert seen == [off] and ("compile cache: off" in capsys.readouterr().out) == bool(off)


@pytest.mark.section("Scale with the load")
def test_compile_cache_that_the_reader_asks_for_stays(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "0")
    for name in ("start_head", "connect", "choose_host"):
        monkeypatch.setattr(serving, name, lambda *_: None)
    serving.start_ray(Machine(REAL, "model", "H200", 2, ray_was_running=False))
    assert os.environ["VLLM_DISABLE_COMPILE_CACHE"] == "0" and "cache" not in capsys.readouterr().out


@pytest.mark.section("Scale with the load")
def test_autoscaler_that_is_given_up_says_what_the_logs_say(monkeypatch):
    monkeypatch.setattr(load, "read_metrics", lambda: {"replicas": 2})
    monkeypatch.setattr(load, "errors_in_logs", lambda: [f"Error: {number}" for number in range(9)])
    with pytest.raises(TimeoutError, match=r"After 1 s: {'replicas': 2}. .*\['Error: 4', .*, 'Error: 8'\]"):
        load.watch_autoscaler("model", target=1, timeout_s=1)


@pytest.mark.section("Where it listens")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("off", [None, *FAST_PATH[:2]])
def test_beyond_loopback_only_where_other_nodes_have_to_reach_replicas(monkeypatch, capsys, cell, alone, off):
    for name in FAST_PATH:
        monkeypatch.setenv(name, "0" if name == off else "1")
    monkeypatch.setattr(serving.ray, "remote", lambda **options: lambda read: SimpleNamespace(remote=read))
    monkeypatch.setattr(serving.ray, "get", lambda settings, timeout: settings)
    loopback, all_networks = re.findall(r"listens on (?:the loopback address, )?((?:\d+\.){3}\d+)", cell("harden"))
    assert choose_host(object() if alone else None) == (loopback if alone or off else all_networks)
    said = capsys.readouterr().out
    assert ("api_key.py doesn't work there" in said) == bool(off)
    assert ("It asks for no key" in said) == (not alone and not off)


@pytest.mark.section("Where it listens")
def test_all_networks_are_named_in_one_place_of_the_code():
    named = [
        str(file.relative_to(ROOT))
        for folder in ("support", "benchmarks", "tiny_llama")
        for file in (ROOT / folder).glob("*.py")
        for _ in range(file.read_text().count('"0.0.0.0"'))
    ]
    assert named == ["support/serving.py"], named


def test_app_listens_where_the_launch_says_and_is_waited_for(monkeypatch, cell):
    calls = []
    monkeypatch.setattr(serve, "start", lambda **options: calls.append(options))
    monkeypatch.setattr(serve, "run_many", lambda apps, **options: calls.append(apps[0].target))
    monkeypatch.setattr(serving, "load_app", str.upper)
    monkeypatch.setattr(serving, "wait_for_first_token", lambda: calls.append("first token"))
    exec(cell("run-app"), {"host": "10.0.0.7", "machine": SimpleNamespace(app="some:app")})
    assert calls == [{"http_options": {"host": "10.0.0.7"}}, "SOME:APP", "first token"]


def test_first_token_is_asked_for_once_a_replica_runs(monkeypatch):
    """A request before that might keep HAProxy busy: TROUBLESHOOTING.md."""
    said, asked = iter([None, "DEPLOYING", "RUNNING"]), []

    def status() -> SimpleNamespace:
        asked.append(next(said, "DEPLOYING"))
        deployments = {"LLMServer": SimpleNamespace(status=SimpleNamespace(value="UPDATING"))}
        app = SimpleNamespace(status=asked[-1], deployments=deployments)
        return SimpleNamespace(applications={"default": app} if asked[-1] else {})

    completions = SimpleNamespace(create=lambda **_: asked.append("a token"))
    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(serving.openai, "OpenAI", lambda **_: SimpleNamespace(completions=completions))
    serving.wait_for_first_token(timeout_s=60)
    assert asked == [None, "DEPLOYING", "RUNNING", "a token"]
    with pytest.raises(TimeoutError, match=r"After 1 s, the app doesn't run yet: \{'LLMServer': 'UPDATING'\}"):
        serving.wait_for_first_token(timeout_s=1)


@pytest.mark.section("Shut down the local deployment")
def test_notebook_ends_replicas_then_ray_and_nothing_else(monkeypatch, notebook, cell):
    executed = [one for one in notebook.cells if one.cell_type == "code" and not one.metadata.get("tags")]
    executed = [one.source for one in executed if not one.source.startswith("%%writefile")]
    by_hand = re.search(r"To end it, type `([^`]*)`", cell("about-serve-deploy"))[1]
    assert executed[-2].splitlines()[1:] == [by_hand], "Before Ray ends, the replicas do, as in the text"
    assert not [source for source in executed if re.search(r"\bray stop\b|\bp?kill(?:all)?\b", source)]
    ended = []
    monkeypatch.setattr(serving, "stop_ray", ended.append)
    exec(executed[-1], {"ray_head": "the notebook's Ray"})
    assert ended == ["the notebook's Ray"]


@pytest.mark.section("Shut down the local deployment")
def test_ray_that_was_here_before_stays(monkeypatch, capsys):
    monkeypatch.setattr(serving.ray, "shutdown", lambda: None)
    monkeypatch.setattr(serving.shutil, "rmtree", lambda *_, **__: pytest.fail("Its HAProxy's files were removed"))
    monkeypatch.setattr(serving.Path, "unlink", lambda *_, **__: pytest.fail("Its address was removed"))
    serving.stop_ray(None)
    assert "still runs" in capsys.readouterr().out
