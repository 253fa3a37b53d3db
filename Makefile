# `make run` and `make test` need Python 3.11 or newer and nothing else; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# A file of tests stays in one process, as its tests share what takes long; the slow files come early in the alphabet
PARALLEL ?= --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install run test test-fast lint format types docs bench clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## create .venv and install the project with its tools, in the tested versions

# The stamp is written last: an installation that was interrupted is started again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

run: install ## run the main job on the embedded digits: make run ARGS="model=vit_att_mlp seed=7"
	$(BIN)/python -m recast_exp $(ARGS)

test: install ## run all tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-fast: install ## run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: install ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## check types
	$(BIN)/mypy

docs: install ## build the site into build/docs, and run its notebook; no network needed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -b html docs build/docs

bench: install ## measure speed (minutes)
	for name in training_step inference mimicry startup input_pipeline adapters sweep; do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean: ## remove what was built; results under outputs/ and multirun/ stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
