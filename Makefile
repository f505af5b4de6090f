# `make` lists the targets. Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
SCALE ?= nano
DATA ?= $(if $(filter nano,$(SCALE)),data/python,data/c4)
SEEDS ?= 3
NPROC ?= 1
JOBS ?= 1
PY := .venv/bin/python
NEED := .venv/installed $(if $(DRY),,$(DATA))
TABLES := $(PY) tables.py --scale=$(SCALE) --data=$(DATA) --seeds=$(SEEDS) --nproc=$(NPROC) --jobs=$(JOBS) $(if $(DRY),--dry) $(FLAGS)

help:  ## this list
	@echo "Targets (times: two CPU cores). SCALE=60m and so on, DATA=data directory, SEEDS=runs each, NPROC=processes of a"
	@echo "run, JOBS=runs at a time, FLAGS=settings of train.py for all, DRY=1 to see the commands only, PYTHON=interpreter."
	@awk -F ':.*## ' '/^[a-z\/]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(NEED)  ## Adam, SGD and clipped SGD side by side: a table and a picture in ten minutes
	$(TABLES) demo

gap: $(NEED)  ## five methods, each at its best settings, SEEDS seeds: the gap to Adam with its interval; three hours

lr: $(NEED)  ## the loss against the learning rate, the largest that each method bears: an hour

ablation: $(NEED)  ## each clip, both and none, at a small and a large learning rate: an hour

batch: $(NEED)  ## the gap against the batch size at a fixed number of tokens: two hours

dynamics: $(NEED)  ## norms, ratios, imbalance, spikes along training, in small and large batches; shares batch's runs

thresholds: $(NEED)  ## how the best clips move with the width, the batch and the number of steps: an hour

frequency: $(NEED)  ## the loss of ten groups of tokens, frequent to rare, along training; shares gap's runs

spikes: $(NEED)  ## Spike No More's models over learning rates: spikes, loss, the largest that each bears; two hours

cost: .venv/installed  ## what one run of SCALE takes: parameters, FLOPs, memory, hours; nothing is run

gap lr ablation batch dynamics thresholds frequency spikes cost:
	$(TABLES) $@

toy: .venv/installed  ## softmax regression with imbalanced classes: why Adam beats gradient descent; two minutes
	$(PY) toy.py

mnist: .venv/installed data/mnist  ## the same in images: MNIST with barcodes, a class for each; hours, or minutes on a GPU
	$(PY) mnist.py

bench: $(DATA)  ## speed and memory beside peers (.venv/bin/pip install transformers: one more): a quarter of an hour
	$(PY) bench.py --model=$(SCALE) --data=$(DATA)

drill: .venv/installed  ## faults and damaged files: what is done, what survives, what is lost; six minutes
	$(PY) tests/drill.py

test: .venv/installed  ## the tests: three minutes
	@$(MAKE) --no-print-directory -j2 test-runs test-rest
test-runs:
	@$(PY) -m pytest -q --disable-warnings tests/test_train.py tests/test_sample.py
test-rest:
	@$(PY) -m pytest -q --disable-warnings --ignore=tests/test_train.py --ignore=tests/test_sample.py tests

data/python: .venv/installed  ## the embedded corpus: the source of Python's own standard library
	$(PY) data/prepare.py python --out=$@

data/mnist: | .venv/installed  ## the four files of MNIST, downloaded
	$(PY) data/prepare.py mnist --out=$@

data/c4:
	@echo "make it first: $(PY) data/prepare.py c4 --out=data/c4 --train_shards=0-28"; exit 1

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: help demo gap lr ablation batch dynamics thresholds frequency spikes cost toy mnist bench drill test test-runs test-rest data/python
