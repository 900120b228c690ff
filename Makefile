# Everything runs in a virtual environment of the project's own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNNABLE := $(VENV)/.runnable
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# Many processes import torch, in the demo and in the tests. Compiled once, that takes each half the time.
export PYTHONDONTWRITEBYTECODE =

.PHONY: install demo test lint types format docs clean

install: $(INSTALLED)

# The pin keeps pip from taking a build of torch with gigabytes of CUDA packages.
$(RUNNABLE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[all]"
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[dev]"
	touch $(RUNNABLE) $@

# Full training, random data and CREST at a tenth of the steps; runs that are there are not run again. The net is
# tiny: a second thread would not make it faster, a second run beside the first does.
demo: $(RUNNABLE)
	OMP_NUM_THREADS=1 $(BIN)/torchcrest compare mnist1d --methods full random crest --budget 0.1 --seeds 0 1 2 --processes 2 --out runs/demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(PIP) --editable ".[docs]"
	$(BIN)/sphinx-build --fail-on-warning --quiet docs docs/_build
	@echo "Docs: docs/_build/index.html"

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
