"""The notebook's checks of the machine: a clear sentence within seconds, for each way a machine can be unfit."""

import http.server
import socket
import sys
import threading

import pytest

from ci.common import run

pytestmark = pytest.mark.section("Check your machine")


@pytest.fixture
def execute(cell):
    """Run cells of the notebook by id, in a fresh Python, and return what they print."""

    def execute(*ids, **env):
        return run(sys.executable, "-c", "\n".join(map(cell, ids)), timeout_s=60, **env)

    return execute


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Pretend that this machine has a GPU: the one thing here that can't be had for real."""

    def gpu(name):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s' '{name}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return gpu


def test_no_gpu_means_the_stand_in(execute, gpu):
    gpu("")
    result = execute("check-gpu")
    assert result.returncode == 0 and "GPU: none\nApp: tiny_llama.app:app" in result.stdout


@pytest.mark.parametrize(
    "name, wanted", [("NVIDIA L4", ""), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100-80G")]
)
def test_any_gpu_means_the_real_app(execute, gpu, name, wanted):
    gpu(name)
    result = execute("check-gpu", ACCELERATOR_TYPE=wanted)
    assert result.returncode == 0, result.stdout
    assert f"GPU: {name}\nApp: serve_llama_3_1_8b:app" in result.stdout


@pytest.mark.parametrize("name, wanted", [("NVIDIA H200", "L4"), ("NVIDIA L40S", "L4"), ("NVIDIA A10G", "A100")])
def test_gpu_of_another_type_than_configured(execute, gpu, quoted, name, wanted):
    gpu(name)
    result = execute("check-gpu", ACCELERATOR_TYPE=wanted)
    assert result.returncode == 1
    assert f"RuntimeError: ACCELERATOR_TYPE is {wanted}, but this machine has ['{name}']. Unset it" in result.stdout
    quoted("ACCELERATOR_TYPE is ..., but this machine has ...", result.stdout)


def test_an_anyscale_workspace_gets_its_gpu_on_demand(execute, gpu):
    gpu("")
    result = execute("check-gpu", ANYSCALE_SESSION_ID="ses_1")
    assert result.returncode == 0 and "GPU: on demand\nApp: serve_llama_3_1_8b:app" in result.stdout


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
def test_gated_model_without_access(execute, gpu, hub, quoted, token):
    gpu("NVIDIA L4")
    result = execute("check-gpu", "check-model", HF_ENDPOINT=hub, HF_TOKEN=token)
    assert result.returncode == 1
    assert "RuntimeError: meta-llama/Llama-3.1-8B-Instruct is gated. Request access at" in result.stdout
    quoted("... is gated. Request access at ...", result.stdout)
    assert not token or token not in result.stdout


def test_gated_model_with_access(execute, gpu, hub):
    gpu("NVIDIA L4")
    result = execute("check-gpu", "check-model", HF_ENDPOINT=hub, HF_TOKEN="hf_friend")
    assert result.returncode == 0, result.stdout
    assert "Model: meta-llama/Llama-3.1-8B-Instruct\n" in result.stdout and "hf_friend" not in result.stdout


def test_local_model_needs_no_access(execute, gpu, tmp_path):
    gpu("NVIDIA L4")
    result = execute("check-gpu", "check-model", MODEL_SOURCE=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 0, result.stdout


def test_taken_port(execute, quoted):
    with socket.create_server(("127.0.0.1", 8000)):
        result = execute("check-gpu", "check-ports")
    assert result.returncode == 1
    assert "RuntimeError: Port 8000 is taken. `ss -ltnp 'sport = :8000'` says by which program." in result.stdout
    quoted("Port ... is taken.", result.stdout)


def test_serve_commands_without_ray(quoted):
    result = run("serve", "deploy", "--address", "http://127.0.0.1:9", "serve_config.yaml")
    assert result.returncode == 1
    quoted("Failed to connect to Ray at address: ...", result.stdout)
