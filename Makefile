# Extra overrides for the built-in example: make train ARGS="trainer.max_steps=2000"
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
.DEFAULT_GOAL := help
# Keep compiled modules, the tests' too, whatever the environment says: half of the time until the first test starts.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install train test test-slow coverage check format rooms-model first-hour dist gpu

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: .venv/installed ## make .venv with everything a developer needs

# Cheap to repeat: runs again only when what is to be installed has changed.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mtcl needs Python >= 3.11; give one: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

train: install ## train the built-in example (procedural rooms, all six tasks)
	$(BIN)/python train.py experiment=rooms $(ARGS)

test: install ## run the tests, in about six minutes on two cores
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: install ## run the tests that start whole runs, in about half an hour
	$(BIN)/python -m pytest -n auto -m slow

coverage: install ## run the tests of "make test", print which lines of mtcl they miss; CI runs this
	$(BIN)/python -m pytest -n auto -m "not slow" --cov --cov-report=term

check: install ## check format, lint, types, imports and generated tables
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/docs/render_results.py --check

format: install ## format, and fix what can be fixed by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

rooms-model: install ## train the model that comes with mtcl, mtcl.load("rooms"), and write it into the package
	$(BIN)/python train.py experiment=rooms_small hydra.run.dir=outputs/rooms_small/shipped $(ARGS)
	$(BIN)/mtcl export outputs/rooms_small/shipped --format safetensors --output mtcl/inference/shipped/rooms --overwrite

first-hour: install ## follow docs/first_hour.md with a wheel in a new environment, print the time of each step
	$(BIN)/python scripts/dev/first_hour.py $(ARGS)

# The full installation into a new environment downloads PyTorch.
dist: install ## build the release's files into dist/, check them, install the wheel anew and run each command
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python scripts/dev/first_hour.py --tiny --full-install --wheel dist/*.whl $(ARGS)

# With .venv where there is one, else with $(PYTHON): a machine with a card may have no network to install from.
gpu: ## run all that needs a GPU, resumable, into docs/results/gpu (docs/gpu.md); ARGS="--device cpu --tiny" rehearses
	PYTHONPATH=.:$$PYTHONPATH $(or $(wildcard $(BIN)/python),$(PYTHON)) scripts/benchmarks/gpu.py $(ARGS)
