"""rayservice.yaml: what KubeRay's schema says of it, what the schema doesn't say, and kubectl's command lines."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubernetes.client import ApiClient
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from ci.common import ROOT, all_headings, read_notebook, run

pytestmark = pytest.mark.section("Deploy on Kubernetes")
# KubeRay's own file, ray-operator/config/crd/bases/ray.io_rayservices.yaml at the release that the text names
CRD = Path(os.environ.get("KUBERAY_CRD") or "KUBERAY_CRD")
KUBECTL = str(Path(sys.executable).parent / "kubectl")
RESERVED_S = 10  # For what comes after a drain before the pod is killed
needs_schema = pytest.mark.skipif(not CRD.is_file(), reason="KUBERAY_CRD names no file with KubeRay's schema")
needs_kubectl = pytest.mark.skipif(not shutil.which(KUBECTL), reason="kubectl isn't in this environment")


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "rayservice.yaml").read_text()))


@pytest.fixture(scope="module")
def service(documents):
    return documents[0]


@pytest.fixture(scope="module")
def cluster(service):
    return service["spec"]["rayClusterConfig"]


@pytest.fixture(scope="module")
def groups(cluster) -> dict[str, dict]:
    """The head's group and the workers', each with its only container as `container`."""
    [workers] = cluster["workerGroupSpecs"]
    found = {"head": {**cluster["headGroupSpec"]}, "workers": {**workers}}
    for group in found.values():
        [group["container"]] = group["template"]["spec"]["containers"]
    return found


@pytest.fixture(scope="module")
def applications(service):
    return yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]


def variables(container: dict) -> dict:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


def strict(schema):
    """A schema of Kubernetes for jsonschema: unknown keys are errors, which Kubernetes would drop without a word."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False) is True:
        schema["type"] = ["integer", "string"]
    properties = schema.get("properties")
    if isinstance(properties, dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", schema.get("x-kubernetes-preserve-unknown-fields", False))
        defaults = {key for key, value in properties.items() if "default" in value}
        schema["required"] = [key for key in schema.get("required", []) if key not in defaults]
    return schema


@needs_schema
def test_manifest_is_valid_in_kuberays_schema(service):
    crd = yaml.load(CRD.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [schema] = [one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    errors = jsonschema.Draft7Validator(schema).iter_errors(service)
    said = [f"rayservice.yaml, {'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
    assert not said, "\n".join(said)
    assert (service["kind"], crd["spec"]["names"]["plural"]) == ("RayService", "rayservices")


@needs_schema
def test_text_names_fields_and_states_of_kuberay(cell):
    """Each name of the API in the text's code stands in the schema, or is a value, which the schema doesn't list."""
    known = set(re.findall(r"\w+", CRD.read_text()))
    values = {"UpgradeInProgress", "InitializingTimeout", "ZeroServeEndpoints", "NewClusterWithIncrementalUpgrade"}
    values |= {"HeadOnly", "ContainerCreating", "FailedMount", "CreateContainerConfigError"}  # Ray's and Kubernetes'
    for name in ("about-kubernetes", "kubernetes-update", "kubernetes-not-ready"):
        named = set(re.findall(r"`([a-zA-Z.]*[a-z][A-Z]\w+)`", cell(name)))
        unknown = {one for one in named if not set(one.split(".")) <= known | values}
        assert not unknown, f"{name} names {unknown}"


def test_serve_config_is_valid_and_reaches_other_pods(service, applications):
    raw = yaml.safe_load(service["spec"]["serveConfigV2"])
    config = ServeDeploySchema.model_validate(raw)
    parts = (raw, ServeDeploySchema), (raw["http_options"], HTTPOptionsSchema)
    for part, schema in (*parts, *((application, ServeApplicationSchema) for application in applications)):
        assert set(part) <= set(schema.model_fields), f"serveConfigV2: {set(part) - set(schema.model_fields)}"
    assert config.http_options.host == "0.0.0.0", "HAProxy on one pod can't reach a replica on another's loopback"
    assert config.proxy_location == "EveryNode", "A pod without a proxy is never ready"


def test_app_is_in_the_config_map_and_asks_for_the_key(applications, groups, cell):
    line, later = [line for line in kubectl_lines() if "create configmap" in line]
    files = re.findall(r"--from-file=(\S+)", line)
    assert later == line.replace("llama-app", "llama-app-2")
    module, _, attribute = applications[0]["import_path"].partition(":")
    assert f"{module}.py" in files, f"import_path: {module}.py isn't in the ConfigMap {files}"
    source = (ROOT / f"{module}.py").read_text()
    assert re.search(rf"^{attribute} = ", source, flags=re.M), f"import_path: {module}.py has no {attribute}"
    assert 'settings["engine_kwargs"]["middleware"] = require_key()' in source, f"{module}.py asks for no key"
    imported = {f"{name}.py" for name in re.findall(r"^from (\w+) import", source, flags=re.M)}
    assert set(files) == {f"{module}.py", *imported}
    name = re.search(r"create configmap (\S+)", line)[1]
    for group in groups.values():
        [volume] = [one for one in group["template"]["spec"]["volumes"] if "configMap" in one]
        [mount] = [one for one in group["container"]["volumeMounts"] if one["name"] == volume["name"]]
        assert volume["configMap"]["name"] == name and variables(group["container"])["PYTHONPATH"] == mount["mountPath"]


def test_secrets_are_in_no_manifest(groups):
    [line] = [line for line in kubectl_lines() if "create secret" in line]
    name, keys = re.search(r"create secret generic (\S+)", line)[1], set(re.findall(r"--from-file=(\w+)=", line))
    for role, group in groups.items():
        [volume] = [one["secret"] for one in group["template"]["spec"]["volumes"] if "secret" in one]
        held = variables(group["container"])
        key = held["API_KEY"]["secretKeyRef"]
        assert {volume["secretName"], key["name"]} == {name}, f"{role}: the Secret is {name}"
        assert {key["key"], *(item["key"] for item in volume["items"])} == keys == {"api_key", "hf_token"}
        # Ray shows HF_TOKEN in the dashboard's API and a log: a file isn't shown.
        assert "HF_TOKEN" not in held and held["HF_TOKEN_PATH"].endswith(f"/{volume['items'][0]['path']}")


def test_variables_are_those_of_the_image_on_every_pod(groups):
    image = dict(re.findall(r"(RAY_SERVE_\w+)=(\S+)", (ROOT / "Dockerfile").read_text()))
    for role, group in groups.items():
        held = {name: value for name, value in variables(group["container"]).items() if name.startswith("RAY_SERVE_")}
        assert held == image, f"{role}: {held} instead of the Dockerfile's {image}"
    assert variables(groups["head"]["container"]) == variables(groups["workers"]["container"])


def test_image_is_the_dockerfiles_and_of_the_version_that_is_named(groups, cluster):
    image = re.search(r"^FROM (\S+)$", (ROOT / "Dockerfile").read_text(), flags=re.M)[1]
    for role, group in groups.items():
        assert group["container"]["image"] == image, f"{role}: the Dockerfile starts from {image}"
    assert image.split(":")[1].startswith(f"{cluster['rayVersion']}-"), f"rayVersion isn't that of {image}"


def test_pods_end_after_ray_has_drained_and_ray_after_the_answers(service, groups, cell):
    answers_s = int(re.search(r"graceful_shutdown_timeout_s=(\d+)", cell("serve-app"))[1])
    for role, group in groups.items():
        drains_s = float(variables(group["container"])["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drains_s >= answers_s + RESERVED_S, f"{role}: Ray drains {drains_s} s, an answer may take {answers_s} s"
        grace_s = group["template"]["spec"].get("terminationGracePeriodSeconds", 30)
        assert grace_s >= drains_s + RESERVED_S, f"{role}: killed after {grace_s} s, while Ray drains {drains_s} s"
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= answers_s, "The old cluster goes before its answers"


def test_gpus_and_bounds_are_those_of_the_app(groups, cell):
    workers, head = groups["workers"], groups["head"]
    bounds = {name: int(n) for name, n in re.findall(r"(min|max)_replicas=(\d+)", cell("serve-app"))}
    requested, limit = (workers["container"]["resources"][kind] for kind in ("requests", "limits"))
    assert requested["nvidia.com/gpu"] == limit["nvidia.com/gpu"] == "1", "One GPU for each replica, of one pod each"
    of_group = {"min": workers.get("minReplicas"), "max": workers.get("maxReplicas")}
    assert of_group == bounds, f"The group has {of_group}, the app {bounds}"
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert head["rayStartParams"]["num-cpus"] == "0" and "nvidia.com/gpu" not in str(head["container"]["resources"])


def test_what_only_the_operator_would_refuse(service, cluster):
    name = service["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47
    assert re.fullmatch(r"\d+m", service["metadata"]["annotations"]["ray.io/initializing-timeout"])
    assert service["spec"]["upgradeStrategy"]["type"] in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
    assert cluster["authOptions"] == {"mode": "token"} and cluster["enableInTreeAutoscaling"]
    # While a node drains the only replica, no worker passes the probe: ci/tests/nodes.
    assert not service["spec"].get("excludeHeadPodFromServeSvc"), "The head has to serve too"


def test_network_policy_opens_one_port_of_all_pods(documents, groups):
    policy = ApiClient().deserialize(json.dumps(documents[1]), "V1NetworkPolicy", "application/json")
    assert ApiClient().sanitize_for_serialization(policy) == documents[1], "A key that Kubernetes doesn't know"
    labels = policy.spec.pod_selector.match_labels
    for role, group in groups.items():
        assert labels.items() <= group["template"]["metadata"]["labels"].items(), f"{role}: not covered"
    inside, outside = policy.spec.ingress
    assert inside._from[0].pod_selector.match_labels == labels and inside.ports is None
    assert [port.port for port in outside.ports] == [8000] and outside._from is None
    assert policy.spec.policy_types == ["Ingress"]


def kubectl_lines() -> list[str]:
    """The command lines of kubectl in the cells of next_steps.ipynb, and in the shell blocks of its text."""
    text = []
    for cell in read_notebook("next_steps.ipynb").cells:
        text += [cell.source] if cell.source.startswith("%%bash") else []
        if cell.cell_type == "markdown":
            text += re.findall(r"^```bash\n(.*?)^```", cell.source, flags=re.S | re.M)
            text += re.findall(r"`(kubectl [^`]+)`", cell.source)
    lines = "\n".join(text).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split(" | ") if part.strip().startswith("kubectl ")]


@needs_kubectl
def test_command_lines_are_kubectls(tmp_path, service):
    """kubectl parses each line, and then finds no server. What it makes without one, it makes."""
    (tmp_path / "hf_token").write_text("canary")
    lines = kubectl_lines()
    assert len(lines) >= 10
    for line in lines:
        words = [re.sub(r"=(\$HOME|build)/.*", f"={tmp_path}/hf_token", word) for word in shlex.split(line)[1:]]
        words = ["rayservice.yaml" if word == "-" else word for word in words]
        result = run(KUBECTL, "--server=http://127.0.0.1:9", *words, KUBECONFIG=str(tmp_path / "none"))
        if "create" in words:
            result = run(KUBECTL, *words, "--dry-run=client", KUBECONFIG=str(tmp_path / "none"))
            assert result.returncode == 0, f"{line}\n{result.stdout}"
        else:
            assert "refused" in result.stdout, f"{line}\n{result.stdout}"
    named = set(re.findall(r"rayservices?[ /]([\w-]+)", "\n".join(lines)))
    assert named == {service["metadata"]["name"]}, named
    services = set(re.findall(r" service/([\w-]+)", "\n".join(lines)))
    assert services <= {f"{service['metadata']['name']}-{suffix}-svc" for suffix in ("serve", "head")}, services


def test_main_page_and_this_one_share_no_heading():
    assert len(all_headings()) == len(set(all_headings()))
