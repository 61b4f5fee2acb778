# Two commands: `make demo` and `make test`. Each sets up what it needs first, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
STAMP := $(VENV)/.ready

.PHONY: demo test gpu-test contracts lint types docs bench clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -q

gpu-test:
	$(PYTHON) -m pytest -q -m gpu

# What adapters call, read anew out of the real distributions; then what the newest releases change.
# LIBRARIES="flashinfer-python ..." reads some only; ARGS=--check writes nothing and fails on a difference.
contracts: $(STAMP)
	$(BIN)/python tools/snapshot_signatures.py $(LIBRARIES) $(ARGS)
	-$(BIN)/python tools/snapshot_signatures.py $(LIBRARIES) --latest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" pyright --verifytypes hal --ignoreexternal

docs: $(STAMP)
	$(BIN)/python -m sphinx -q -n -W -b html docs docs/_build/html
	$(BIN)/python -m sphinx -q -n -W -b doctest docs docs/_build/doctest

bench: $(STAMP)
	$(BIN)/python benchmarks/dispatch.py

$(STAMP): pyproject.toml requirements-dev.txt constraints.txt platforms/nvidia/pyproject.toml platforms/rocm/pyproject.toml platforms/musa/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) docs/_build build dist
