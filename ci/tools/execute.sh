#!/usr/bin/env bash
# Execute the notebook, and write the page of it, also of a run that failed: `make tutorial`.
set -euo pipefail
mkdir -p build
status=0
papermill notebook.ipynb build/notebook.ipynb --kernel python3 --cwd . --log-output --no-progress-bar || status=$?
cp -r images build/ # nbconvert looks for them beside the executed notebook, and puts them into the page.
jupyter nbconvert --to html --embed-images --CoalesceStreamsPreprocessor.enabled=True --log-level WARN build/notebook.ipynb
echo "Executed notebook: build/notebook.ipynb, page: build/notebook.html"
exit $status
