"""The notebook's checks of the machine: a clear sentence within seconds, for each way a machine can be unfit."""

import http.server
import shutil
import socket
import sys
import threading
from pathlib import Path

import pytest

from ci.common import run
from support.machine import PORTS

pytestmark = pytest.mark.section("Check your machine")


ALONE = "import support.machine as m; "  # What a fresh Python runs
LOOK = ALONE + "m.check_model = lambda _: ''; m.ray_runs = lambda _: {ray_runs}; m.check_machine()"
FINDINGS = ALONE + "m.check_model = m.ray_runs = lambda _: ''; m.check_ports = lambda: None; print(m.check_machine())"


def execute(program: str, **env: str):
    """Run a line of Python in a process of its own, as the notebook's kernel would."""
    return run(sys.executable, "-c", program, timeout_s=60, **env)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Pretend that this machine has a GPU: the one thing here that can't be had for real."""

    def gpu(name):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s' '{name}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return gpu


def test_no_gpu_means_the_stand_in(gpu):
    gpu("")
    result = execute(FINDINGS)
    assert result.returncode == 0 and "GPU: none\nApp: tiny_llama.app:app" in result.stdout, result.stdout
    assert "replicas_that_fit=2" in result.stdout


def test_broken_driver_means_no_gpu(gpu):
    gpu("")
    Path(shutil.which("nvidia-smi")).write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    said = execute(FINDINGS).stdout
    assert "nvidia-smi fails, so no GPU is used: NVIDIA-SMI has failed\nGPU: none\nApp: tiny_llama.app:app" in said


@pytest.mark.parametrize("visible, said", [("1", "GPU: L4 1\n"), ("", "GPU: none\n"), ("0,1", "GPU: L4 0,1\n")])
def test_hidden_gpus_dont_count(gpu, monkeypatch, visible, said):
    gpu("")
    nvidia_smi = Path(shutil.which("nvidia-smi"))
    nvidia_smi.write_text('#!/bin/sh\nfor last; do :; done\necho "L4 ${last#--id=}"\n')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    program = "import support.machine as m; print('GPU:', ', '.join(m.find_gpus()) or 'none')"
    assert said in execute(program).stdout


@pytest.mark.parametrize(
    "name, wanted", [("NVIDIA L4", ""), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100-80G")]
)
def test_any_gpu_means_the_real_app(gpu, name, wanted):
    gpu(name)
    result = execute(FINDINGS, ACCELERATOR_TYPE=wanted)
    assert result.returncode == 0, result.stdout
    assert f"GPU: {name}\nApp: serve_llama_3_1_8b:app" in result.stdout
    assert "replicas_that_fit=1" in result.stdout


@pytest.mark.parametrize("name, wanted", [("NVIDIA H200", "L4"), ("NVIDIA L40S", "L4"), ("NVIDIA A10G", "A100")])
def test_gpu_of_another_type_than_configured(gpu, quoted, name, wanted):
    gpu(name)
    result = execute(FINDINGS, ACCELERATOR_TYPE=wanted)
    assert result.returncode == 1
    assert f"RuntimeError: ACCELERATOR_TYPE is {wanted}, but this machine has ['{name}']. Unset it" in result.stdout
    quoted("ACCELERATOR_TYPE is ..., but this machine has ...", result.stdout)


def test_an_anyscale_workspace_gets_its_gpu_on_demand(gpu):
    gpu("")
    result = execute(FINDINGS, ANYSCALE_SESSION_ID="ses_1")
    assert result.returncode == 0 and "GPU: on demand\nApp: serve_llama_3_1_8b:app" in result.stdout, result.stdout


def test_foreign_cluster_is_refused(quoted):
    result = execute(FINDINGS, RAY_ADDRESS="10.1.2.3:6379")
    assert result.returncode == 1
    quoted("RAY_ADDRESS is .... The tutorial would deploy there", result.stdout)


def test_foreign_application_is_refused(tmp_path, monkeypatch, quoted):
    (tmp_path / "serve").write_text(
        "#!/bin/sh\nprintf 'proxies: {}\\napplications:\\n  theirs:\\n    status: RUNNING\\n'\n"
    )
    (tmp_path / "serve").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    result = execute(LOOK.format(ray_runs=True))
    assert result.returncode == 1
    quoted("An application runs on this Ray cluster already", result.stdout)
    (tmp_path / "serve").write_text("#!/bin/sh\nprintf 'proxies: {}\\napplications: {}\\n'\n")
    assert execute(LOOK.format(ray_runs=True)).returncode == 0
    (tmp_path / "serve").write_text("#!/bin/sh\nexit 1\n")
    assert "can't say what runs on this Ray cluster" in execute(LOOK.format(ray_runs=True)).stdout


@pytest.mark.parametrize(
    "before, after", [("", "localhost,127.0.0.1"), ("intra.net", "intra.net,localhost,127.0.0.1"), ("*", "*")]
)
def test_localhost_goes_round_the_proxy(before, after):
    show = "; import os; print('no_proxy=' + os.environ['no_proxy'])"
    result = execute(FINDINGS + show, http_proxy="http://proxy:3128", no_proxy=before, NO_PROXY="")
    assert f"no_proxy={after}\n" in result.stdout and ("http_proxy is set" in result.stdout) == (before != after)


def test_missing_program_is_named(quoted):
    missing = "m.shutil.which = lambda name: None if name == 'setpriv' else '/bin/true'; "
    result = execute(ALONE + missing + "m.check_model = lambda _: ''; m.find_gpus = lambda: []; m.check_machine()")
    assert result.returncode == 1 and "setpriv isn't installed" in result.stdout
    quoted("... isn't installed. On Debian and Ubuntu: apt-get install ...", result.stdout)


class GatedHub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does for a gated model: 401 without a token, 403 without access, 200 with it."""

    def do_GET(self):
        status = {None: 401, "Bearer hf_stranger": 403, "Bearer hf_friend": 200}[self.headers["Authorization"]]
        self.send_response(status)
        if status != 200:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("token", ["", "hf_stranger"])
def test_gated_model_without_access(gpu, hub, quoted, token):
    gpu("NVIDIA L4")
    result = execute(
        ALONE + "print('Model:', m.check_model('serve_llama_3_1_8b:app'))", HF_ENDPOINT=hub, HF_TOKEN=token
    )
    assert result.returncode == 1
    assert "RuntimeError: meta-llama/Llama-3.1-8B-Instruct is gated. Request access at" in result.stdout
    quoted("... is gated. Request access at ...", result.stdout)
    assert not token or token not in result.stdout


def test_gated_model_with_access(gpu, hub):
    gpu("NVIDIA L4")
    result = execute(
        ALONE + "print('Model:', m.check_model('serve_llama_3_1_8b:app'))", HF_ENDPOINT=hub, HF_TOKEN="hf_friend"
    )
    assert result.returncode == 0, result.stdout
    assert "Model: meta-llama/Llama-3.1-8B-Instruct\n" in result.stdout and "hf_friend" not in result.stdout


def test_local_model_needs_no_access(gpu, tmp_path):
    gpu("NVIDIA L4")
    result = execute(
        ALONE + "print('Model:', m.check_model('serve_llama_3_1_8b:app'))",
        MODEL_SOURCE=str(tmp_path),
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert result.returncode == 0, result.stdout


def test_taken_port(quoted):
    """With a port of this test's own: a Ray may run here meanwhile."""
    assert set(PORTS) == {8000, 8265, 6379, 8080}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = execute(
            f"import support.machine; support.machine.PORTS = {{{port}: 'the API'}}; {LOOK.format(ray_runs=False)}"
        )
    assert result.returncode == 1
    assert f"Port {port} is taken, and" in result.stdout and f"`ss -ltnp 'sport = :{port}'` says" in result.stdout
    quoted("Port ... is taken...", result.stdout)


def test_serve_commands_without_ray(quoted):
    result = run("serve", "deploy", "--address", "http://127.0.0.1:9", "serve_config.yaml")
    assert result.returncode == 1
    quoted("Failed to connect to Ray at address: ...", result.stdout)
