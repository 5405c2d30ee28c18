.DEFAULT_GOAL := help
.PHONY: help tutorial tutorial-on-image-versions check mutations test nodes soak readme record docs template benchmark lock clean
SHELL := /bin/bash

# Ray can't start from an environment whose path has a space in it.
ENVIRONMENTS := $(if $(word 2,$(CURDIR)),$(HOME)/.cache/llama-3.1-8b-tutorial,$(CURDIR)/build)
VENV ?= $(ENVIRONMENTS)/venv
CHECK_VENV := $(ENVIRONMENTS)/check
# The tests use the engine for CPUs, also where there is a GPU.
TEST_VENV := $(VENV)$(if $(shell nvidia-smi -L 2> /dev/null),-cpu)
# What the caller's shell says of Python must not reach into the tutorial's own.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
in = PATH="$(1)/bin:$$PATH"

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 34

tutorial: ## set up, execute the notebook, write build/notebook.html
	@ci/tools/setup.sh tutorial "$(VENV)"
	@$(call in,$(VENV)) ci/tools/execute.sh

tutorial-on-image-versions: ## the same without a GPU, on the Ray and vLLM of the image in the Dockerfile
	@ci/tools/setup.sh image "$(VENV)-image"
	@# Ray 2.59.0's HAProxy wants 50,036 file descriptors, which not every machine grants. This is what newer ones want.
	@$(call in,$(VENV)-image) RAY_SERVE_HAPROXY_MAXCONN=4096 ci/tools/execute.sh

check: ## check in a minute what needs neither the engine nor a server
	@ci/tools/setup.sh check "$(CHECK_VENV)"
	@$(call in,$(CHECK_VENV)) python -m pytest ci/checks

mutations: ## see that harmful changes, made one at a time in a copy, fail a check: make mutations WORDS="key port"
	@ci/tools/setup.sh check "$(CHECK_VENV)"
	@$(call in,$(CHECK_VENV)) python -m ci.tools.mutate $(WORDS)

test: ## set up, check everything, on CPUs
	@ci/tools/setup.sh test "$(TEST_VENV)"
	@$(call in,$(TEST_VENV)) python -m pytest ci -m "not soak and not nodes"

nodes: ## several nodes on this machine, for root: who reaches whom, and what the loss of one costs
	@ci/tools/setup.sh test "$(TEST_VENV)"
	@$(call in,$(TEST_VENV)) python -m pytest ci -m nodes

soak: ## ten minutes of mixed load on the stand-in: nothing fails, nothing leaks
	@ci/tools/setup.sh test "$(TEST_VENV)"
	@$(call in,$(TEST_VENV)) python -m pytest ci -m soak

readme: ## write README.md and the files that the notebooks show, from the notebooks
	@ci/tools/setup.sh check "$(CHECK_VENV)"
	@$(call in,$(CHECK_VENV)) ci/tools/readme.sh

record: ## write what the runs in records/ printed and drew into the notebook, then as make readme
	@ci/tools/setup.sh check "$(CHECK_VENV)"
	@$(call in,$(CHECK_VENV)) python -m benchmarks.figure
	@$(call in,$(CHECK_VENV)) python ci/tools/record.py && $(call in,$(CHECK_VENV)) ci/tools/readme.sh

docs: ## build the docs pages, README.html and notebook.html in build/docs/html
	@ci/tools/setup.sh test "$(TEST_VENV)"
	$(call in,$(TEST_VENV)) sphinx-build -W --keep-going -q -c ci/docs -d build/docs/doctrees . build/docs/html

template: ## assemble Anyscale's template in build/template, and run its tests.sh there
	@ci/tools/setup.sh test "$(TEST_VENV)"
	@$(call in,$(TEST_VENV)) python -m ci.gallery.assemble build/template
	@cd build/template/templates/deployment-serve-llm && \
		$(call in,$(TEST_VENV)) bash ../../tests/deployment-serve-llm/tests.sh

benchmark: ## measure variants side by side: make benchmark VARIANTS="tutorial vllm-serve"
	@ci/tools/setup.sh tutorial "$(VENV)"
	@$(call in,$(VENV)) python -m benchmarks.run all $(VARIANTS)

lock: ## resolve pyproject.toml into ci/locks/ and requirements.txt
	@ci/tools/setup.sh check "$(CHECK_VENV)"
	@$(call in,$(CHECK_VENV)) ci/tools/lock.sh

clean: ## remove build/, with the environments in it
	rm -rf build "$(ENVIRONMENTS)"
