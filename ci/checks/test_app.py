"""The app's settings as Ray gets them: the text says the same, and each is there."""

import ast
import copy
import re
import runpy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from openai._constants import MAX_RETRY_AFTER_DELAY
from ray.serve.schema import DeploymentSchema

from ci.common import ROOT, troubleshooting

pytestmark = pytest.mark.section("Harden the app")
# Of no use to a table that says what happens without a setting
SIZES = {"autoscaling_config", "max_model_len", "stream_interval"}
TOKEN = "hf_CanaryOfTheConfiguration"


class Settings(dict):
    def model_dump(self, exclude_unset: bool) -> dict:
        return copy.deepcopy(dict(self))


@pytest.fixture
def settings_of(monkeypatch):
    """What a file hands to LLMConfig. Ray Serve LLM itself can't be imported without the engine's packages."""
    llm, model = ModuleType("ray.serve.llm"), ModuleType("tiny_llama.make_model")
    llm.LLMConfig, llm.build_openai_app = lambda **settings: Settings(settings), lambda args: args
    model.MODEL_DIR = "build/tiny-llama"
    monkeypatch.setitem(sys.modules, llm.__name__, llm)
    monkeypatch.setitem(sys.modules, model.__name__, model)
    for name in ("MODEL_SOURCE", "ACCELERATOR_TYPE", "TARGET_ONGOING_REQUESTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def settings_of(file: str, **env: str) -> dict:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(ROOT / file))["llm_config"]

    return settings_of


@pytest.fixture
def app(settings_of):
    return settings_of("serve_llama_3_1_8b.py")


def test_table_has_each_setting_with_its_value(app, cell):
    rows = dict(re.findall(r"^\| `(\w+)(?:=([^`]*))?` \|", cell("harden"), flags=re.M))
    settings = app["deployment_config"] | app["engine_kwargs"]
    assert set(rows) == set(settings) - SIZES, set(rows) ^ (set(settings) - SIZES)
    for name, value in rows.items():
        assert not value or ast.literal_eval(value) == settings[name], f"{name}: text {value}, app {settings[name]}"


def test_refused_clients_come_back_by_themselves(app, cell):
    """OpenAI's client keeps to a Retry-After that isn't too long, and takes its own guess otherwise."""
    DeploymentSchema(name="LLMServer", **app["deployment_config"])  # Raises on a value that Ray doesn't take.
    refusal = app["deployment_config"]["backpressure_config"]
    assert str(refusal["status_code"]) == re.search(r"\| (\d+) with `Retry-After`, and OpenAI's", cell("harden"))[1]
    assert 0 < refusal["retry_after_s"] <= MAX_RETRY_AFTER_DELAY


def test_schemas_go_to_one_backend(app):
    backend = app["engine_kwargs"]["structured_outputs_config"]["backend"]
    assert backend != "auto", "The first request would choose it"
    said = re.findall(r'structured_outputs_config=dict\(backend="(\w+)"\)', (ROOT / "SECURITY.md").read_text())
    assert said == [backend], f"SECURITY.md says {said}"


def test_commit_goes_with_the_weights(settings_of):
    recorded = yaml.safe_load((ROOT / "ci" / "checks" / "weights.yaml").read_text())
    commits = {name: record["commit"] for name, record in recorded.items()} | {"build/tiny-llama": None}
    for name, commit in commits.items():
        settings = settings_of("serve_llama_3_1_8b.py", MODEL_SOURCE=name)
        assert settings["model_loading_config"]["model_source"] == name
        assert settings["engine_kwargs"]["revision"] == commit


@pytest.mark.section("Scale with the load")
def test_autoscaler_aims_at_the_target_that_was_exported(settings_of):
    settings = settings_of("serve_llama_3_1_8b.py", TARGET_ONGOING_REQUESTS="32")
    assert settings["deployment_config"]["autoscaling_config"]["target_ongoing_requests"] == 32


@pytest.mark.section("Configure Ray Serve LLM")
def test_configuration_holds_no_token(app):
    assert TOKEN not in str(app)


@pytest.mark.section("Troubleshooting")
def test_quoted_context_is_that_of_the_app(app):
    said = re.findall(r"maximum context length is (\d+) tokens", troubleshooting())
    assert said == [str(app["engine_kwargs"]["max_model_len"])]


@pytest.mark.section("The repository")
def test_stand_in_differs_where_it_must(app, settings_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "serve_llama_3_1_8b", SimpleNamespace(llm_config=app))
    tiny = settings_of("tiny_llama/app.py")
    engine = tiny["engine_kwargs"]
    assert engine.pop("enforce_eager") and engine == app["engine_kwargs"] | {"revision": None}
    delays = ("upscale_delay_s", "downscale_delay_s")
    for settings in (tiny, app):
        for name in delays:
            settings["deployment_config"]["autoscaling_config"].pop(name, None)
    assert tiny["deployment_config"] == app["deployment_config"]
    assert tiny["model_loading_config"]["model_id"] == app["model_loading_config"]["model_id"]
