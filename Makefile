# `make` lists the targets. Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
SCALE ?= nano
DATA ?= data/python
PY := .venv/bin/python

help:  ## this list
	@echo "Targets (times: two CPU cores). SCALE and DATA choose another scale or data directory, PYTHON the interpreter."
	@awk -F ':.*## ' '/^[a-z\/]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DATA)  ## Adam, SGD and clipped SGD side by side: a table and a picture in ten minutes
	$(PY) tables.py demo --scale=$(SCALE) --data=$(DATA)

lr: $(DATA)  ## the loss against the learning rate, by which the demo's were chosen: half an hour
	$(PY) tables.py lr --scale=$(SCALE) --data=$(DATA)

bench: $(DATA)  ## speed and memory beside peers: a quarter of an hour; `.venv/bin/pip install transformers` adds that peer
	$(PY) bench.py --data=$(DATA)

test: .venv/installed  ## the tests: two minutes
	@$(MAKE) --no-print-directory -j2 test-runs test-rest
test-runs:
	@$(PY) -m pytest -q --disable-warnings tests/test_train.py
test-rest:
	@$(PY) -m pytest -q --disable-warnings --ignore=tests/test_train.py tests

data/python: .venv/installed  ## the embedded corpus: the source of Python's own standard library
	$(PY) data/prepare.py python --out=$@

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: help demo lr bench test test-runs test-rest data/python
