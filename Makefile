# Each target sets up what it needs in .venv; set-up runs again only when its requirements change.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
REQUIREMENTS := requirements.txt setup.py pyproject.toml

.PHONY: help setup demo test check bench

help:
	@echo "make setup   run-time dependencies and the command modicum, in .venv"
	@echo "make demo    setup, then modicum run digits: from 40 labels to a report, in minutes"
	@echo "make test    the tests"
	@echo "make check   the gate: format, lint, types, tests"
	@echo "make bench   speed beside the peers"

setup: .venv/.runtime

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Modicum needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv

.venv/.runtime: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

.venv/.bench: .venv/.dev
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[bench]'
	@touch $@

demo: .venv/.runtime
	$(BIN)/modicum run digits

# A file of tests on each core; more threads than cores would make them wait for one another.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Types are checked on the built copy, where every module has its one name, modicum.STAGE.
check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/types
	$(BIN)/python setup.py -q build_py --build-lib build/types
	MYPYPATH=build/types $(BIN)/mypy build/types/modicum benchmarks
	$(MAKE) test

bench: .venv/.bench
	$(BIN)/python -m benchmarks
