#!/usr/bin/env bash
# Write README.md and the files that the notebook shows: `make readme`.
set -euo pipefail
ruff check --quiet --fix notebook.ipynb
ruff format --quiet notebook.ipynb
python ci/tools/sync.py
jupyter nbconvert --log-level WARN --config ci/readme/nbconvert_config.py notebook.ipynb
