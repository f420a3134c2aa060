# make setup        .venv with the Python at hand (3.11 or newer) and everything installed
# make quickstart   the whole life of a small model on this machine, offline
# make test         the suite on 8 simulated devices           make test-slow   the long proofs
# make test-all     both, and all cases of products that they sample: about an hour
# make lint         ruff, codespell                            make bench       speed against peers
# make lab          tiny models that retrieve by key, measured to 16x: docs/long-context-lab.md
# make aot-ladder   what an 8B model would need on TPU slices that are not there: docs/aot.md

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/installed
CONFIG = --config=configs/quickstart.py

.PHONY: setup quickstart test test-slow test-all lint bench lab aot-ladder clean

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "installing into $(VENV): a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e .[test,dev]
	@touch $@

quickstart: setup
	$(BIN)/python -m data.prepare $(CONFIG)
	$(BIN)/python -m train.pretrain $(CONFIG)
	$(BIN)/python -m infer.decode $(CONFIG)
	$(BIN)/python -m evals.bench $(CONFIG)

test: setup
	$(BIN)/python -m pytest --durations=10

test-slow: setup
	$(BIN)/python -m pytest -m 'slow and not exhaustive' --durations=10

test-all: setup
	$(BIN)/python -m pytest -m '' --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

bench: setup
	$(BIN)/python -m bench.train
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.decode --batches=1

lab: setup
	$(BIN)/python -m bench.long_context_lab

aot-ladder: setup
	$(BIN)/python -m bench.aot_ladder

clean:
	rm -rf $(VENV) runs
