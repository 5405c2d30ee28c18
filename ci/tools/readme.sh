#!/usr/bin/env bash
# Write README.md and the files that the notebook shows: `make readme`.
set -euo pipefail
python ci/tools/sync.py
jupyter nbconvert --log-level WARN --config ci/readme/nbconvert_config.py notebook.ipynb
ruff format --quiet .
