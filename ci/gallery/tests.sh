#!/usr/bin/env bash
# Runs the template's notebook as its reader would, without the cells that need an account. The notebook itself waits for a
# real completion with a deadline, and shuts down what it started.
set -euo pipefail
cd small-size-llm

ray_runs() { timeout 30 ray status > /dev/null 2>&1; }
if ray_runs && serve status | grep -q "status: RUNNING"; then
	echo "An application runs on this cluster already. Shut it down first: the notebook would replace it." >&2
	exit 1
fi
# A notebook that fails half-way leaves its application on a cluster that was there before.
trap 'if ray_runs; then serve shutdown -y; fi' EXIT

export MODEL_SOURCE="${MODEL_SOURCE:-unsloth/Meta-Llama-3.1-8B-Instruct}" # Needs no token.
uv pip install --quiet --python "$(command -v python)" -r requirements.txt
mkdir -p build
jupyter nbconvert --to notebook --output-dir build --output test.ipynb README.ipynb \
	--TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=skip-in-ci
timeout 1700 papermill build/test.ipynb build/executed.ipynb --kernel python3 --cwd . --log-output --no-progress-bar 2>&1 | tee build/test.log
# A run that was cut off must not pass for a success.
started=$(grep -c "Executing Cell" build/test.log)
ended=$(grep -c "Ending Cell" build/test.log)
if [ "$started" != "$ended" ]; then
	echo "$started cells started, but only $ended ended." >&2
	exit 1
fi
