# Two commands: `make demo` and `make test`. Both make their own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
# Two test processes, one thread each; a file's tests stay together, for they share what is slow to make.
PARALLEL ?= -n 2 --dist loadfile

.PHONY: demo test test-slow test-all lint env clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,demo]'
	@touch $@

demo: env
	@mkdir -p $(DEMO)
	@test -f $(DEMO)/compress.yaml || $(BIN)/compress init $(DEMO)/compress.yaml --template mnist
	$(BIN)/compress run $(DEMO)/compress.yaml

test: env
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: env
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: env
	$(BIN)/python -m pytest -m slow $(PARALLEL)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache
