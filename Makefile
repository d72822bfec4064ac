PYTHON ?= python3
BIN = .venv/bin

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test lint

setup: .venv/ready

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/dev: .venv/ready requirements-wan.txt requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

demo: setup
	$(BIN)/python sample.py

# three files at a time, for two cores: tests of several processes often wait
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
