# The two commands: `make demo` shows the whole thing at work, `make test` proves it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test lint bench soak openapi clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: venv
	$(BIN)/python -m service.demo $(if $(ONCE),--once) $(if $(DATA),--data $(DATA))

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m benchmarks

# Kills the service for hours and counts what it forgot; goes on where it was interrupted, until .soak is removed.
SOAK_KILLS ?= 1000
soak: venv
	$(BIN)/python -m tests.faults.soak $(SOAK_KILLS) .soak/tally.json

openapi: venv
	$(BIN)/python -m service.api > docs/openapi.json

clean:
	rm -rf $(VENV) .demo .planted_faults .soak .pytest_cache .mypy_cache .ruff_cache .hypothesis
