# Two commands on a fresh machine: `make demo` and `make test`. Both need the network only the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format wheel-check bench-quick clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

# A stamp says that pyproject.toml, as it is now, has been installed; as long as it holds, nothing calls pip.
$(VENV)/stamp-demo: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/stamp-test: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test,dev]"
	@touch $(VENV)/stamp-demo $@

demo: $(VENV)/stamp-demo ## train, prune and measure a small network on real images (ARGS="seed=1" adds overrides)
	$(BIN)/python -m lightning_compress $(ARGS)

lint: $(VENV)/stamp-test ## formatting, lint, spelling, types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m mypy

test: lint ## lint, types and the fast tests
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/stamp-test ## the tests that take longer
	$(BIN)/python -m pytest -m slow $(ARGS)

wheel-check: $(VENV)/stamp-test ## build sdist and wheel, install the wheel in an empty environment, use it from an empty folder
	$(BIN)/python scripts/wheel_check.py --python "$(PYTHON)"

bench-quick: $(VENV)/stamp-test ## every benchmark on less
	@for file in benchmarks/[a-z]*.py; do \
		name=$$(basename "$$file" .py); echo "== $$name"; $(BIN)/python -m "benchmarks.$$name" --quick || exit 1; \
	done

format: $(VENV)/stamp-test ## rewrite the sources the way the linter wants them
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## remove the environment and everything that was built (outputs/ stays)
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
