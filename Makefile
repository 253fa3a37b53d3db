# `make run` and `make test` need Python 3.11 or newer and nothing else; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# A file of tests stays in one process, as its tests share what takes long; tests/conftest.py puts the slow ones first
PARALLEL ?= --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: attack audit coverage faults fuzz help install mutants run test test-cluster test-fast test-ray lint format types docs bench clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## create .venv and install the project with its tools, in the tested versions

# The stamp is written last: an installation that was interrupted is started again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

run: install ## run the main job on the embedded digits: make run ARGS="model=vit_att_mlp seed=7"
	$(BIN)/python -m recast_exp $(ARGS)

test: install ## run the tests, but for those on clusters
	$(BIN)/python -m pytest $(PARALLEL) -m "not cluster" $(ARGS)

test-cluster: install ## run the tests of launcher=joblib and, where SLURM is installed, launcher=slurm
	$(BIN)/python -m pytest tests/cluster $(ARGS)

test-fast: install ## run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# Its launcher wants older versions than .venv has (docs/cluster.md): they stand before those of .venv, which follow
test-ray: install ## run the test of launcher=ray, in an environment of its own: .venv-ray
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet 'hydra-ray-launcher>=1.2.2' 'joblib<1.6' 'ray>=2.40'
	.venv-ray/bin/python -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "zz-base.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})")' "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	RECAST_EXP_RAY_PYTHON=$(CURDIR)/.venv-ray/bin/python $(BIN)/python -m pytest tests/cluster -k ray

attack: install ## try all bad inputs (minutes)
	$(BIN)/python -m pytest $(PARALLEL) --dist load tests/attack --all-cases $(ARGS)

faults: install ## kill, fill disks, interrupt, and count what was lost (half an hour)
	$(BIN)/python -m pytest $(PARALLEL) --dist load tests/faults --all-cases $(ARGS)

coverage: install ## run the tests, and measure which branches they take: build/coverage
	$(BIN)/python -m pytest $(PARALLEL) -m "not cluster" --cov --cov-report=term --cov-report=html $(ARGS)

mutants: install ## change recast/, heads/ and task files bit by bit, and count what no test notices (hours)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mutmut
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mutmut run $(ARGS)
	$(BIN)/python tests/mutants.py

fuzz: install ## change files of others until a reader answers with an error that is not its own (minutes)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt atheris
	$(BIN)/python tests/attack/fuzz.py $(ARGS)

audit: install ## look for known holes in the tested versions of all libraries
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

lint: install ## check style, and the directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

format: install ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## check types
	$(BIN)/mypy

docs: install ## build the site into build/docs, and run its notebook; no network needed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -b html docs build/docs

bench: install ## measure speed and memory: one page in build/bench (half an hour)
	$(BIN)/python benchmarks/page.py $(ARGS)

clean: ## remove what was built; results under outputs/ and multirun/ stay
	rm -rf $(VENV) .venv-ray build mutants dist .pytest_cache .mypy_cache .ruff_cache .grimp_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
