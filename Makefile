# make install | train | test | test-slow | check | format
# Extra words for the built-in example: make train ARGS="trainer.max_steps=2000"
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: install train test test-slow check format

install: .venv/installed

# Cheap to repeat: runs again only when what is to be installed has changed.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mtcl needs Python >= 3.11; give one: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

train: install
	$(BIN)/python train.py experiment=rooms $(ARGS)

test: install
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -n auto -m slow

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/docs/render_results.py --check

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
