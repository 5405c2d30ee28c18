#!/usr/bin/env bash
# Write README.md and the files that the notebooks show: `make readme`.
set -euo pipefail
ruff check --quiet --fix ./*.ipynb
ruff format --quiet ./*.ipynb
python ci/tools/sync.py
jupyter nbconvert --log-level WARN --config ci/readme/nbconvert_config.py notebook.ipynb
