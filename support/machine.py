"""Look before anything is started: what is here, and what would let a later step hang or hurt somebody."""

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass

LLAMA, UNGATED = "meta-llama/Llama-3.1-8B-Instruct", "unsloth/Meta-Llama-3.1-8B-Instruct"
STAND_IN = "tiny_llama.app:app"
PORTS = {8000: "the API", 8265: "Ray's dashboard", 6379: "Ray", 8080: "Ray's metrics"}
MEMORY_GIB = {  # As nvidia-smi reports it
    "B200": 179.1, "H200": 140.4, "A100-80G, H100": 79.6, "L40S": 45.0, "A100-40G": 40.0, "A10G, L4": 22.5,
}  # fmt: skip
# What an H200's engine logged for 8,192 tokens, by FP8 weights: benchmarks/results/h200-kv-cache.json
FIT_ON_H200 = {False: 110.76, True: 117.26}


@dataclass
class Machine:
    app: str  # The import path of the app to deploy
    model: str  # A Hugging Face id or a local folder, with the tokenizer
    hardware: str  # For captions
    replicas_that_fit: int  # At one GPU each, or on demand
    ray_was_running: bool  # A cluster that was here before is used, and stays.


def check_machine() -> Machine:
    """Decide what to serve here, and print it in a line for each finding.

    Raises RuntimeError with what to do when a later step would fail, hang, or touch what isn't the tutorial's.
    """
    on_anyscale = "ANYSCALE_SESSION_ID" in os.environ  # GPU nodes join on demand there.
    refuse_foreign_cluster(on_anyscale)
    keep_localhost_off_the_proxy()
    gpus = find_gpus()
    app = os.environ.get("APP") or (f"{'serve_llama_3_1_8b' if gpus or on_anyscale else 'tiny_llama.app'}:app")
    print(f"GPU: {', '.join(gpus) or ('on demand' if on_anyscale else 'none')}")
    print(f"App: {app}, {'the tiny stand-in on CPUs' if app == STAND_IN else 'on the GPU'}")
    model = check_model(app)
    print(f"Model: {model}", flush=True)
    for program, package in ("setpriv", "util-linux"), ("curl", "curl"):
        if shutil.which(program) is None:
            raise RuntimeError(f"{program} isn't installed. On Debian and Ubuntu: apt-get install {package}")
    ray_was_running = ray_runs(on_anyscale)
    if ray_was_running:
        refuse_foreign_applications()
        print("Ray: runs already, and stays")
    else:
        check_ports()
        print("Ray: doesn't run yet, and its ports are free")
    if app == STAND_IN:
        hardware, fit = f"{os.cpu_count()} CPU cores", 2
    else:
        hardware = gpus[0].removeprefix("NVIDIA ") if gpus else "a GPU on demand"
        fit = 2 if on_anyscale else len(gpus)
    return Machine(app, model, hardware, fit, ray_was_running)


def refuse_foreign_cluster(on_anyscale: bool) -> None:
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "auto" and not on_anyscale:
        raise RuntimeError(
            f"RAY_ADDRESS is {address}. The tutorial would deploy there, and its last step would end every "
            "Serve application on that cluster. Unset it, and restart the kernel."
        )


def keep_localhost_off_the_proxy() -> None:
    """A proxy answers requests to localhost with errors of its own, which look like a server that isn't up yet."""
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if proxies and not {"localhost", "127.0.0.1"} <= set(excepted.split(",")) and excepted != "*":
        excepted = ",".join(filter(None, [excepted, "localhost", "127.0.0.1"]))
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = excepted
        print(f"Proxy: {proxies[0]} is set, so localhost was added to no_proxy")


def find_gpus() -> list[str]:
    """The names of the NVIDIA GPUs that Ray may use. Raises RuntimeError when ACCELERATOR_TYPE names another type."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # Ray counts no other, so a second replica wouldn't find one.
    if shutil.which("nvidia-smi") is None or visible in ("", "-1"):
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", *([f"--id={visible}"] if visible else [])]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    if answer.returncode:  # It says why on stdout, where the names would be.
        print(f"nvidia-smi fails, so no GPU is used: {answer.stdout.strip() or answer.stderr.strip()}")
        return []
    gpus = answer.stdout.splitlines()
    wanted = os.environ.get("ACCELERATOR_TYPE")
    if gpus and wanted and not any(wanted.split("-")[0] in re.split("[ -]", gpu) for gpu in gpus):
        raise RuntimeError(
            f"ACCELERATOR_TYPE is {wanted}, but this machine has {gpus}. Unset it, or name the GPU you have."
        )
    return gpus


def check_model(app: str) -> str:
    """Make the stand-in, or see that the weights may be loaded: a replica that may not fails only after minutes."""
    if app == STAND_IN:
        subprocess.run([sys.executable, "-m", "tiny_llama.make_model"], check=True)
        return "build/tiny-llama"
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError

    model = os.environ.get("MODEL_SOURCE", LLAMA)
    if not os.path.isdir(model):
        try:
            auth_check(model)
        except GatedRepoError as error:
            raise RuntimeError(
                f"{model} is gated. Request access at https://huggingface.co/{model}, then `hf auth login`, "
                f"or export MODEL_SOURCE={UNGATED}. Then restart the kernel."
            ) from error
    return model


def ray_runs(on_anyscale: bool) -> bool:
    """Whether a Ray cluster runs here. Switches Ray's token authentication on, except where Anyscale runs it."""
    if not on_anyscale:
        os.environ["RAY_AUTH_MODE"] = "token"
        subprocess.run(["ray", "get-auth-token", "--generate"], check=True, capture_output=True, timeout=60)
    return subprocess.run(["timeout", "30", "ray", "status"], capture_output=True).returncode == 0


def refuse_foreign_applications() -> None:
    status = subprocess.run(["timeout", "60", "serve", "status"], capture_output=True, text=True)
    if status.returncode:
        raise RuntimeError(f"`serve status` can't say what runs on this Ray cluster: {status.stderr[-500:]}")
    if re.search(r"^applications:\n +\w", status.stdout, flags=re.M):
        raise RuntimeError(
            "An application runs on this Ray cluster already, and the tutorial would replace it. Wait until it is "
            "done, or end it with `serve shutdown -y`. Then run this cell again."
        )


def check_ports() -> None:
    for port, use in PORTS.items():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise RuntimeError(
                    f"Port {port} is taken, and {use} needs it. `ss -ltnp 'sport = :{port}'` says by which program. "
                    "Stop it, and run this cell again."
                )
