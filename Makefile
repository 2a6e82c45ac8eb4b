# Every target does its own set-up in .venv; nothing else is needed but Python 3.10 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-all test-wheel check docs bench clean

help:  ## Say what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(READY)  ## Serve eight prompts with the embedded model and show who owns which pages
	@$(BIN)/quire demo

test: $(READY)  ## Run the tests on all cores
	@$(BIN)/python -m pytest -n auto

test-all: $(READY)  ## Run the exhaustive cases too: every dtype, head_dim and chip
	@$(BIN)/python -m pytest -n auto -m ""

# With other Pythons than this one: make test-wheel PYTHONS="python3.10 python3.12 python3.13"
PYTHONS ?= $(PYTHON)

test-wheel:  ## Build the wheel, install it into an empty environment and use it, extra by extra
	@$(PYTHON) scripts/try_wheel.py $(foreach python,$(PYTHONS),--python $(python))

check: $(READY)  ## Lint, formatting and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## Build the docs as a site, strictly, into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Peers in environments of their own: make bench VLLM_PYTHON=~/envs/vllm/bin/python OPENVINO_PYTHON=...
VLLM := $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))
OPENVINO := $(if $(OPENVINO_PYTHON),--openvino-python $(OPENVINO_PYTHON))
RESULTS := benchmarks/results

bench: $(READY)  ## Measure this machine, then remake the CPU tables and plots
	@$(BIN)/python -m benchmarks.attention $(VLLM) --out $(RESULTS)/cpu.csv
	@$(BIN)/python -m benchmarks.shapes --out $(RESULTS)/cpu-shapes.csv
	@$(BIN)/python -m benchmarks.host --out $(RESULTS)/cpu-host.csv
	@$(BIN)/python -m benchmarks.prefix --out $(RESULTS)/cpu-prefix.csv
	@$(BIN)/python -m benchmarks.generation $(VLLM) $(OPENVINO) --out $(RESULTS)/cpu-generation.csv
	@$(BIN)/python -m benchmarks.report

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a minute or two, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Quire needs Python 3.10 to 3.13. Fix: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# The Triton that Hopper's kernel has run with; a build of torch for CUDA puts its own in its place.
	@$(BIN)/pip install --quiet --disable-pip-version-check "triton==3.6.0; sys_platform == 'linux'"
	@$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

clean:  ## Remove the environment and everything generated
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
