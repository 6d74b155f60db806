# Everything runs in .venv, installed from pyproject.toml under the pins of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
export PYTHONDONTWRITEBYTECODE :=  # set, it would have each of hundreds of interpreters compile the package anew

.DEFAULT_GOAL := help
.PHONY: help setup train test lint test-slow test-crash test-browser pictures bench format

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## create .venv and install, pinned by constraints.txt

train: setup  ## train DINO on real images (about a minute on two cores); again: continues, or says finished
	$(BIN)/python -m dino_exp.train

test: setup  ## the test suite (up to 14 minutes on two slow cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist load --maxschedchunk 2

lint: setup  ## ruff, strict types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## let ruff lay out the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-slow: setup  ## wheels in fresh environments, full trainings over seeds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 3600  # one by one: each training uses all cores

test-crash: setup  ## hundreds of kills and faults; prints how many there were and how they ended
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m crash --timeout 7200

test-browser: setup  ## reports in a real browser, at desk and phone width; installs Chromium where apt can
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  echo "installing chromium and chromium-driver"; \
	  $$([ "$$(id -u)" = 0 ] || echo sudo) sh -c 'apt-get update -qq && apt-get install -y -qq chromium chromium-driver'; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

pictures: setup  ## draw the pictures of README anew, from a run that is trained, killed and stopped for them
	$(BIN)/python -m benchmarks.pictures docs/pictures

bench: setup  ## the benchmarks, as ratios within one run
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.loop_overhead
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.ranks
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.catalogue
