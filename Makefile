# `make` lists the targets. Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
SCALE ?= nano
DATA ?= $(if $(filter micro nano,$(SCALE)),data/python,data/c4)
PY := .venv/bin/python
MNIST := data/mnist/t10k-labels-idx1-ubyte.gz  # the last of its files
READY := .venv/installed $(if $(DRY),,$(DATA))
OPTIONS = --scale=$(SCALE) --data=$(DATA) $(if $(SEEDS),--seeds=$(SEEDS)) \
	$(if $(NPROC),--nproc=$(NPROC)) $(if $(JOBS),--jobs=$(JOBS)) $(if $(DRY),--dry) \
	$(if $(TUNE),--tune) $(FLAGS)
ECHO := $(if $(DRY),@echo)

help:  ## this list
	@echo "Targets (times: two CPU cores). Variables: SCALE=60m and so on, DATA=data directory,"
	@echo "SEEDS=runs of each final setting, NPROC=processes per run, JOBS=runs at a time,"
	@echo "FLAGS=settings of train.py for all runs, DRY=1 to print the commands, TUNE=1 to search"
	@echo "at a scale beyond nano, TARGET=what to cost, PYTHON=interpreter."
	@awk -F ':.*## ' '/^[a-z_\/]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## Adam, SGD with momentum and two clipped SGDs: a table and a picture in four to eight minutes

gap: $(READY)  ## seven methods, each at its best settings: the gap to Adam, with intervals; four hours

one_lr: $(READY)  ## of gap, the half with one learning rate for all tensors; an hour and a half

lr: $(READY)  ## loss against learning rate, and the maximum stable learning rate; a quarter of an hour

ablation: $(READY)  ## each clip, both and none, at a small and a large learning rate; forty minutes

batch: $(READY)  ## the gap against the batch size at a fixed number of tokens; two hours

dynamics: $(READY)  ## norms, ratios, imbalance and spikes along training; shares batch's runs

thresholds: $(READY)  ## how the best clips move with width, batch size and steps; forty minutes

frequency: $(READY)  ## the loss of frequent and rare tokens along training; shares gap's runs

demo gap one_lr lr ablation batch dynamics thresholds frequency:
	$(PY) -m experiments.adam_sgd_gap $@ $(OPTIONS)

LONG := $(if $(filter command environment,$(origin DATA)),$(DATA),data/packages)
length: DATA = $(LONG)
length: .venv/installed $(if $(DRY),,$(LONG))  ## the gap against tokens per parameter, up to 7: 2.7 hours; SCALE=micro: up to 20, five hours
	$(PY) -m experiments.length $(OPTIONS)

paper: $(READY)  ## at SCALE the paper's comparison at stated settings, no search: four runs
	$(PY) -m experiments.paper $(OPTIONS)

cost: .venv/installed  ## of TARGET at SCALE: runs, hours, memory, disk, files; runs nothing
	$(PY) -m experiments.paper cost --scale=$(SCALE) --data=$(DATA) \
		$(if $(TARGET),--target=$(TARGET)) $(if $(SEEDS),--seeds=$(SEEDS)) \
		$(if $(NPROC),--gpus=$(NPROC)) $(FLAGS)

spikes: $(READY)  ## Spike No More's variants over learning rates: loss and spikes; an hour
	$(PY) -m experiments.spikes $(OPTIONS)

toy: .venv/installed  ## softmax and quadratic models with rare classes; two minutes
	$(ECHO) $(PY) -m experiments.heavy_tails $(FLAGS)

images: .venv/installed $(if $(DRY),,$(MNIST) data/omniglot)  ## rare classes in images: a CNN, ResNet18 and ViT; 1.2 hours
	$(ECHO) $(PY) -m experiments.images $(FLAGS)

report: .venv/installed  ## RESULTS.md from results/; seconds
	$(PY) -m experiments.report

bench: $(READY)  ## speed and memory beside transformers (if it is installed); a quarter of an hour
	$(ECHO) $(PY) -m experiments.bench --model=$(SCALE) --data=$(DATA) $(FLAGS)

drill: .venv/installed  ## faults and damaged files: what survives, what is lost; six minutes
	$(PY) dev/drill.py
	FUZZ_FILES=2000 $(PY) -m pytest -q -s tests/test_fuzz.py

test: .venv/installed  ## the tests; six minutes
	@$(MAKE) --no-print-directory -j2 test-runs test-rest
# two halves that take as long
RUNS := tests/test_train.py tests/test_sample.py tests/test_model.py tests/test_optim.py \
	tests/test_heavy_tails.py tests/test_images.py
test-runs:
	@$(PY) -m pytest -q --disable-warnings $(RUNS)
test-rest:
	@$(PY) -m pytest -q --disable-warnings $(addprefix --ignore=,$(RUNS)) tests

data/python: .venv/installed  ## the embedded corpus: the source of Python's own standard library
	$(PY) data/prepare.py python --out=$@

data/packages: .venv/installed  ## the source of the packages that requirements.txt pins, 70 MB
	$(PY) data/prepare.py packages --out=$@

$(MNIST): | .venv/installed
	$(PY) data/prepare.py mnist --out=data/mnist

data/omniglot:
	@echo "put images_background_small1.zip and _small2.zip of github.com/brendenlake/omniglot there"; exit 1

data/c4:
	@echo "make it first: $(PY) data/prepare.py c4 --out=data/c4 --train_shards=0-28"; exit 1

data/%:
	@echo "make it first: $(PY) data/prepare.py files FILE... --out=$@"; exit 1

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: help demo gap one_lr lr ablation batch dynamics thresholds frequency spikes length paper cost toy images report \
	bench drill test test-runs test-rest data/python data/packages
