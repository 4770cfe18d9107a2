# `make demo` and `make test` are all one needs; both make their environment in .venv first.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/.installed
	$(BIN)/deepen demo --model adapters/smollm2-drafter

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m "not slow"

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 DEEPEN_TEST_PROFILE=slow $(BIN)/pytest -n $(WORKERS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/deepen bench

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing deepen and what it needs into $(VENV) (minutes, the first time) ..."
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing deepen and the test tools into $(VENV) (minutes, the first time) ..."
	@$(PIP_INSTALL) --editable ".[dev]"
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "deepen needs Python 3.11 or newer, and $(PYTHON) is not; name one with: make PYTHON=python3.11 ..." >&2; \
		exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@
