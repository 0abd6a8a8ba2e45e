# make demo: everything from nothing to pictures; make test: everything from nothing to tests passed.
PYTHON ?= python3
BIN := .venv/bin
RUN := checkpoints/demo

.PHONY: help demo cluster-demo test test-slow test-peers lint clean

help:
	@echo "make demo        install, train a small model for 2 minutes, sample it by DDIM and DDPM"
	@echo "make cluster-demo  train in 2 processes, compare with one (minutes)"
	@echo "make test        install, run all tests"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-peers  install PyTorch and diffusers, compare with them"
	@echo "make lint        ruff and mypy"
	@echo "make clean       remove what was installed and trained by the demo"

demo: .venv/base
	$(BIN)/python -m experiments.train --preset=demo --minutes=2 --run=$(RUN)
	$(BIN)/python -m experiments.sample --run=$(RUN) --sampler=ddim:25
	$(BIN)/python -m experiments.sample --run=$(RUN) --sampler=ddpm:500
	@echo "Look at $(RUN)/report.html and $(RUN)/samples/"

cluster-demo: .venv/test
	$(BIN)/python -m pytest -s -m slow -k processes_change_nothing tests/test_processes.py

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not peers"

test-slow: .venv/slow
	$(BIN)/python -m pytest -m "slow"

test-peers: .venv/peers
	$(BIN)/python -m pytest -m "peers"

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(RUN) .hypothesis build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# One stamp for each set of packages in the environment; they install again when setup.cfg changes.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/base: .venv/bin/python setup.cfg
	$(BIN)/pip install -q -e .
	@touch $@

.venv/test: .venv/bin/python setup.cfg
	$(BIN)/pip install -q -e '.[test]'
	@touch $@

.venv/slow: .venv/bin/python setup.cfg
	$(BIN)/pip install -q -e '.[test,notebook]'
	@touch $@

.venv/peers: .venv/bin/python setup.cfg
	$(BIN)/pip install -q -e '.[test,peers]'
	@touch $@

.venv/lint: .venv/bin/python setup.cfg
	$(BIN)/pip install -q -e '.[test,lint]'
	@touch $@
