# Each target sets up what it needs: a virtual environment in the clone, pinned packages.
# PYTHON picks the interpreter; TORCH another build, as in `make TORCH=torch==2.11.0 test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= $(shell grep '^torch==' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint bench clean

demo: $(VENV)/ready
	$(BIN)/comemo demo

test: $(VENV)/ready lint
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m bench decode

# Torch first: where there is no GPU its CPU build, if an index or folder that pip knows has one.
$(VENV)/ready: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	nvidia-smi -L >/dev/null 2>&1 || $(PIP) install '$(TORCH)+cpu' 2>/dev/null || true
	$(PIP) install '$(TORCH)'
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
