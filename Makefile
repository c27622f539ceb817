# `make help` lists what there is. Everything is built by scripts/setup.sh into .venv* of this clone.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

BIN := $(CURDIR)/.venv/bin
# spark-submit and Spark's executors start the `python3` that is first on PATH.
export PATH := $(BIN):$(PATH)
# RECSPARK_CACHE, RECSPARK_PYTHON and SYSTEM may be given on the command line too.
export RECSPARK_CACHE RECSPARK_PYTHON SYSTEM
ifeq ($(RECSPARK_CACHE),)
unexport RECSPARK_CACHE
endif
# Container images set it. A night starts tens of Python processes: each would compile torch, pyspark
# and pandas anew, 2 s of CPU time a process.
unexport PYTHONDONTWRITEBYTECODE

# Tests: one thread for each process that computes; Spark and the ranks fill the cores.
TEST_ENV := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONHASHSEED=0
PYTEST := env $(TEST_ENV) $(BIN)/python -m pytest
# Two workers, each with a Spark session of its own; tests/conftest.py says what stays together.
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist loadscope
# More options for pytest, such as PYTEST_ARGS="-k ease -x".
PYTEST_ARGS ?=
# A folder with the tables of a night, for `make notebooks`.
NIGHT ?=
# More options for `recspark demo`.
DEMO_ARGS ?=

.PHONY: help
help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  PYTEST_ARGS="-k NAME"  options for pytest      RECSPARK_CACHE=DIR    cache of downloads and builds'
	@echo '  SYSTEM=no              no system packages      RECSPARK_PYTHON=PATH  the Python 3.11 to use'

.PHONY: setup
setup:  ## build .venv (done by the others when needed)
	@bash scripts/setup.sh

.PHONY: demo
demo: setup  ## the whole nightly run on the bundled data, into build/demo
	@$(BIN)/recspark demo $(DEMO_ARGS)

.PHONY: test
test: setup  ## the tests but the slow ones, those of the DAG and of the notebooks
	$(PYTEST) $(SPREAD) --durations=40 --durations-min=10 -m "not slow and not airflow and not notebook" $(PYTEST_ARGS)

.PHONY: test-all
test-all: setup  ## every test that runs in .venv
	$(PYTEST) -m "not airflow" $(PYTEST_ARGS)

.PHONY: lint
lint: setup  ## ruff, mypy, import-linter, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

.PHONY: format
format: setup  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: airflow
airflow: setup  ## build .venv-airflow and run the DAG tests in it
	@bash scripts/setup.sh airflow
	env $(TEST_ENV) bash scripts/airflow_tests.sh $(PYTEST_ARGS)

.PHONY: notebooks
notebooks: setup  ## execute the notebooks, on a small night or on that below NIGHT
	RECSPARK_NIGHT=$(NIGHT) $(PYTEST) -m notebook tests/test_notebooks.py $(PYTEST_ARGS)

.PHONY: bench
bench: setup  ## speed of the models and of the pipeline, side by side
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

.PHONY: bench-smoke
bench-smoke: setup  ## the same on tiny data, under 3 minutes: do they run at all?
	$(BIN)/python -m benchmarks --smoke $(BENCH_ARGS)

.PHONY: freeze
freeze:  ## write what .venv holds now into constraints.txt (after a change by hand)
	$(BIN)/python scripts/freeze.py

.PHONY: hashes
hashes:  ## write the hashes of the pinned packages (after a change of constraints*.txt)
	$(BIN)/python scripts/hashes.py write

.PHONY: clean
clean:  ## remove what runs and tests wrote
	rm -rf build dist spark-warehouse metastore_db derby.log *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

.PHONY: distclean
distclean: clean  ## remove the environments too (the cache outside the clone stays)
	rm -rf .venv .venv-airflow
