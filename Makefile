# chanopt: every command a reader of the README needs. Nothing has to be prepared but Python 3.10 or newer.
#   make demo    optimise a masked ResNet-50 and DenseNet-121 on this CPU, print reports and timings
#   make test    the whole test suite, slow tests included
# Others: quick doctest lint format types wheel sweep speed smoke bench clean
# Variables: PYTHON (interpreter that makes the environment), VENV (where), JOBS (test processes), ARGS (passed on)

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=

# Absolute, because `make wheel` and the recipes of .ci/run leave this folder.
VENV   := $(abspath $(VENV))
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
# One thread per process: timings on several OpenMP threads are noise on a shared machine, and tests run in parallel.
ENV    := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=

# pip obeys the constraint files named here as well as in isolated builds.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test quick doctest lint format types wheel sweep speed smoke bench clean

help:
	@sed -n '2,5s/^# \{0,1\}//p' Makefile

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "chanopt needs Python 3.10 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	touch $@

# torch comes first, so that what depends on it is satisfied by the build that was chosen. torchvision, timm and the
# peers go without their dependencies: one pins versions long gone, and none may bring another torch.
$(VENV)/.run: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(PIP) install --quiet torch
	$(PIP) install --quiet --no-deps torchvision timm apple-upscale torch-pruning
	$(PIP) install --quiet --editable '.[report,pruning,bench]'
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) install --quiet --editable '.[test,export]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.run
	$(ENV) $(BIN)/chanopt demo $(ARGS)

test: $(VENV)/.test
	$(ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'slow or not slow' $(ARGS)

quick: $(VENV)/.test
	$(ENV) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

doctest: $(VENV)/.test
	$(ENV) $(BIN)/python -m pytest --doctest-modules src $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel: $(VENV)/.dev
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .

sweep: $(VENV)/.run
	$(ENV) $(BIN)/python -m benchmarks.sweep $(ARGS)

smoke: $(VENV)/.run
	$(ENV) $(BIN)/python -m benchmarks.sweep --smoke $(ARGS)

speed: $(VENV)/.run
	$(ENV) $(BIN)/python -m benchmarks.speed $(ARGS)

bench: $(VENV)/.run
	$(ENV) $(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
