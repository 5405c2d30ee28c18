"""The files and command lines of the production sections, each read by the real program that will consume it."""

import importlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from anyscale.client.openapi_client.models.supportedbaseimagesenum import SUPPORTEDBASEIMAGESENUM
from anyscale.compute_config.models import ComputeConfig
from anyscale.service.models import ServiceConfig
from ray.llm._internal.serve.constants import DEFAULT_MAX_ONGOING_REQUESTS
from ray.serve._private.constants import (
    DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S,
    DEFAULT_HEALTH_CHECK_PERIOD_S,
    RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S,
    RAY_SERVE_DIRECT_INGRESS_SHUTDOWN_BUFFER_S,
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S,
    RAY_SERVE_HAPROXY_MAXCONN,
    REPLICA_HEALTH_CHECK_UNHEALTHY_THRESHOLD,
)

from ci.common import NOTEBOOKS, ROOT, code_cells, read_notebook, run, troubleshooting
from ci.gallery.assemble import assemble

pytestmark = pytest.mark.section("Deploy to production with Anyscale Services")
IMAGES = set(SUPPORTEDBASEIMAGESENUM.allowable_values)


@pytest.fixture(scope="module")
def service() -> ServiceConfig:
    return ServiceConfig.from_yaml(str(ROOT / "service.yaml"))  # Raises on keys and types that Anyscale doesn't know.


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def shell_lines(notebook, *programs: str) -> list[str]:
    """The command lines of a program in the notebook's shell cells and in the shell blocks of its text."""
    text = [cell.source for cell in notebook.cells if cell.source.startswith("%%bash")]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text += re.findall(r"^```bash\n(.*?)^```", cell.source, flags=re.S | re.M)
            text += re.findall(r"`(anyscale [^`]+)`", cell.source)
    lines = "\n".join(text).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.split(" ")[0] in programs]


def test_service_names_one_image_and_it_exists(service, dockerfile):
    assert (service.image_uri is None) != (service.containerfile is None), "image_uri or containerfile, not both"
    base = re.search(r"^FROM (\S+)$", dockerfile, flags=re.M)[1]
    assert base in IMAGES, f"Dockerfile: Anyscale knows no image {base}"
    if service.containerfile:
        assert (ROOT / service.containerfile).is_file()


def test_service_asks_for_its_token(service):
    assert service.query_auth_token_enabled


def test_service_excludes_what_exists_or_is_made(service):
    for name in service.excludes:
        assert name == "build" or (ROOT / name).exists(), f"service.yaml excludes {name}, which isn't there"


def test_service_takes_the_app_along(service):
    """What the app imports, and the file that lets it ask for a key."""
    app = service.applications[0]["import_path"].partition(":")[0]
    assert not [name for name in service.excludes if (ROOT / name) in (ROOT / f"{app}.py", ROOT / "api_key.py")]


def test_each_deployment_of_the_service_brings_the_same_variables(notebook):
    """A new version takes nothing over from the old one."""
    lines = [line for line in shell_lines(notebook, "anyscale") if line.startswith("anyscale service deploy -f")]
    brought = [re.findall(r"--env (\S+)", line) for line in lines]
    assert len(lines) == 3 and all(brought[0] == one != [] for one in brought), lines


def test_image_switches_on_what_the_launch_cell_does(cell, dockerfile):
    launch = dict(re.findall(r'os.environ\["(RAY_SERVE_\w+)"\] = "(1)"', cell("start-ray")))
    terminal = dict(re.findall(r"export (RAY_SERVE_\w+)=(\S+)", cell("about-serve-deploy")))
    image = dict(re.findall(r"(RAY_SERVE_\w+)=(\S+)", dockerfile))
    # In the image, a wrapper takes the place of HAProxy itself: test_haproxy.py.
    assert terminal.pop("RAY_SERVE_HAPROXY_BINARY_PATH")
    # Ray 2.60.0's own default; tutorial-on-image-versions sets it, too.
    assert image.pop("RAY_SERVE_HAPROXY_MAXCONN") == str(RAY_SERVE_HAPROXY_MAXCONN)
    assert f"RAY_SERVE_HAPROXY_MAXCONN={RAY_SERVE_HAPROXY_MAXCONN} ci/" in (ROOT / "Makefile").read_text()
    assert image == terminal == launch and len(launch) == 3
    benchmark = (ROOT / "benchmarks" / "servers.py").read_text()
    assert all(f'"{name}": "1"' in benchmark for name in launch)


def test_serve_config_is_valid_and_stays_on_this_machine(service):
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    raw = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config = ServeDeploySchema.model_validate(raw)
    # Ray ignores a key that it doesn't know.
    parts = (raw, ServeDeploySchema), (raw["http_options"], HTTPOptionsSchema)
    for part, schema in (*parts, *((application, ServeApplicationSchema) for application in raw["applications"])):
        assert set(part) <= set(schema.model_fields), f"serve_config.yaml: {set(part) - set(schema.model_fields)}"
    assert config.http_options.host == "127.0.0.1"
    assert config.applications[0].import_path == service.applications[0]["import_path"] == "serve_llama_3_1_8b:app"


def test_serve_compares_the_file_only_and_notices_a_variable_in_it():
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve.schema import ServeApplicationSchema

    application = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]
    same = get_app_code_version(ServeApplicationSchema(**application))
    changed = ServeApplicationSchema(**application, runtime_env={"env_vars": {"VERSION": "2"}})
    assert get_app_code_version(ServeApplicationSchema(**application)) == same != get_app_code_version(changed)


def test_text_names_rays_defaults(cell):
    assert DEFAULT_MAX_ONGOING_REQUESTS == 10**9 and "a billion are admitted" in cell("harden")
    assert DEFAULT_HEALTH_CHECK_PERIOD_S * REPLICA_HEALTH_CHECK_UNHEALTHY_THRESHOLD == 30
    assert "after half a minute | after three checks, six seconds" in cell("harden")
    assert "health_check_period_s=2," in cell("serve-app")
    at_least = RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S + RAY_SERVE_DIRECT_INGRESS_SHUTDOWN_BUFFER_S
    assert DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S < at_least == 35 and "are cut after 35 s" in cell("harden")
    # Three checks, and the time that a replica whose engine is dead stays, too
    assert 6 + RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S == 36 and "an outage of 36 s plus" in cell("harden")
    allowed = int(re.search(r"graceful_shutdown_timeout_s=(\d+)", cell("serve-app"))[1])
    assert allowed == RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S == 120 and "120 s by default" in troubleshooting()
    [nodes] = [one.source for one in read_notebook("next_steps.ipynb").cells if one.id == "about-nodes"]
    [drained] = {int(seconds) for seconds in re.findall(r"DRAIN_TIMEOUT_S=(\d+)", nodes)}
    assert f"with {drained} s, after {drained - allowed}." in nodes
    [deadline] = re.findall(r"say (\d+), which is more than a start and an answer", nodes)
    # Two H200s took 184 s to the first token.
    assert f"--deadline-remaining-seconds={deadline}\n" in nodes and int(deadline) > 184 + allowed


@pytest.mark.section("Harden the app")
def test_limits_admit_what_the_text_promises(cell):
    """A request counts as queued until it starts: a queue shorter than the largest burst refuses on an idle replica."""
    ongoing, queued = (
        int(re.search(rf"max_{kind}_requests=(\d+)", cell("serve-app"))[1]) for kind in ("ongoing", "queued")
    )
    assert queued >= ongoing
    assert f"the replica works on {ongoing}" in cell("harden") and f"{queued} more wait" in cell("harden")


@pytest.mark.section("Harden the app")
def test_weights_are_pinned_as_recorded(cell):
    """Without a network, commits can't be asked for: `huggingface_hub.model_info(repo).sha` tells the newest."""
    recorded = yaml.safe_load((ROOT / "ci" / "checks" / "weights.yaml").read_text())
    pinned = dict(re.findall(r'"([\w-]+/[\w.-]+)": "([0-9a-f]{40})"', cell("serve-app")))
    assert pinned == {name: record["commit"] for name, record in recorded.items()} and len(pinned) == 2
    text = (ROOT / "README.md").read_text() + (ROOT / "support" / "machine.py").read_text()
    assert set(re.findall(r"(?:MODEL_SOURCE=|LLAMA, UNGATED = \")([\w-]+/[\w.-]+)", text)) <= set(pinned)


def parse(line: str) -> None:
    """Parse a command line as its program would, without running it. Raises click.UsageError on a wrong one."""
    program, *arguments = shlex.split(line.split(" > ")[0].split(" && ")[0])
    module = {"anyscale": "anyscale.scripts", "serve": "ray.serve.scripts", "ray": "ray.scripts.scripts"}[program]
    command = importlib.import_module(module).cli
    context = command.make_context(program, arguments)
    while hasattr(command, "resolve_command"):
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, arguments, parent=context)


def test_command_lines_are_those_of_the_programs():
    lines = [line for name in NOTEBOOKS for line in shell_lines(read_notebook(name), "anyscale", "serve", "ray")]
    assert len([line for line in lines if line.startswith("anyscale")]) >= 8
    for line in lines:
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"{line}: {getattr(error, 'message', error)}")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The gallery's folders, assembled."""
    out = tmp_path_factory.mktemp("template")
    assemble(out)
    return out


def test_template_is_in_the_gallerys_layout(template, dockerfile):
    entry = yaml.safe_load((template / "BUILD.yaml").read_text())[0]
    assert entry["cluster_env"]["image_uri"] in dockerfile
    assert (template / entry["dir"] / "small-size-llm" / "README.ipynb").is_file()
    for file in entry["compute_config"].values():
        config = ComputeConfig.from_yaml(str(template / file))
        assert config.auto_select_worker_config and config.head_node.resources == {"CPU": 0}
    assert Path(entry["test"]["tests_path"]).name == entry["name"]
    assert (template / entry["test"]["tests_path"] / entry["test"]["command"].split()[-1]).is_file()
    assert run("bash", "-n", str(template / entry["test"]["tests_path"] / "tests.sh")).returncode == 0


def test_template_shows_the_notebook_with_absolute_addresses(template, notebook):
    folder = template / "templates" / "deployment-serve-llm" / "small-size-llm"
    readme = (folder / "README.md").read_text()
    relative = re.findall(r"\]\((?!https?://|#)[^)]*\)", readme)
    assert not relative, f"Relative addresses: {relative}"
    cells = nbformat.read(folder / "README.ipynb", as_version=4).cells
    assert not [cell.id for cell in cells if cell.source.strip() not in readme], "README.md lacks these cells"
    assert code_cells(SimpleNamespace(cells=cells)) == code_cells(notebook)


def test_template_names_nothing_that_it_does_not_contain(template):
    """A reader of the template has neither the Makefile nor the environment that it makes."""
    folder = template / "templates" / "deployment-serve-llm" / "small-size-llm"
    readme = (folder / "README.md").read_text()
    targets = "|".join(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    absent = re.findall(rf"(?:^|`)make (?:{targets})\b|build/venv|notebook\.ipynb", readme, flags=re.M)
    assert not absent, f"README.md says {absent}"
    named = set(re.findall(r"`([\w/.-]+\.(?:py|yaml|md|txt|sh|ipynb))`", readme))
    named |= set(re.findall(r"(?:-f|-r|python|serve deploy|%%writefile) ([\w/.-]+\.\w+)", readme))
    named |= {f"{module.replace('.', '/')}.py" for module in re.findall(r"from (support\.\w+) import", readme)}
    absent = [name for name in named if not (folder / name).exists()]
    assert len(named) > 8 and not absent, f"README.md names {absent}"
    requirements = (folder / "requirements.txt").read_text()
    assert "openai==" in requirements and not re.search("^(ray|vllm)", requirements, flags=re.M)
    assert not list(folder.rglob("*.lock")) and not (folder / "ci").exists()
    assert "Time to complete" in readme and "git clone" in readme
