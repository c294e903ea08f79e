# contrastive-cifar: pretrain -> evaluate -> figures. `make` alone lists the targets.
#
# Every step is a file: an interrupted chain goes on where it stopped, and what is finished is not run
# again, not even when a script changes (the checkpoint holds the text of the script that wrote it).
# A run's folder is named by its settings, so other settings never land in an old run.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SECONDARY:
.DEFAULT_GOAL := help

DATA ?= cifar10
EPOCHS ?= 200
SEED ?= 0
ARGS ?=
VENV ?= .venv

# PYTHON=python (in Colab, say) uses that one; otherwise make installs its own into $(VENV)
ifdef PYTHON
READY :=
DEV_READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.dev-ready
endif

export MPLBACKEND := Agg
# glibc returns large blocks to the system at every free, and each step pays for getting them back, page
# by page; keeping them is worth 30 % and more on a CPU
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 17179869184
export MALLOC_TOP_PAD_ := 67108864

METHODS := moco
script_moco := moco_cifar.py

# cifar-moco-200ep-seed0, and what is not the default: -<data>-<args>; or NAME
tag = $(if $(NAME),$(NAME),$(shell printf '%s' '$(EPOCHS)ep-seed$(SEED) $(filter-out cifar10,$(DATA)) $(ARGS)' | tr -cs 'A-Za-z0-9._\200-\377' '-' | sed 's/-*$$//'))

##@ Run
.PHONY: help demo figures test test-long check sync clean distclean $(METHODS:%=cifar-%)

help:  ## this list
	@awk -F ':.*## ' '/^##@/ {print "\n" substr($$0, 5)} /^[a-z%-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\ncifar-moco takes DATA=, EPOCHS=, SEED=, ARGS="--flag value" and NAME=; PYTHON= uses that python\n'

cifar-moco:  ## MoCo: pretrain, probe, k-NN and figures (CIFAR-10 is downloaded; DATA= names other images)

$(foreach m,$(METHODS),$(eval cifar-$m: figures/cifar-$m-$(tag)/table.md))
$(foreach m,$(METHODS),$(eval runs/cifar-$m-$(tag)/pretrain.pt: SCRIPT := $(script_$m)))

$(METHODS:%=runs/cifar-%-$(tag)/pretrain.pt): | $(READY)
	$(PYTHON) $(SCRIPT) --data '$(DATA)' --epochs $(EPOCHS) --seed $(SEED) --out $(@D) $(ARGS)

# a small encoder and drawn shapes: minutes on a laptop
DEMO := --data data/shapes.npz --arch resnet8 --width 16 --epochs 16 --batch-size 128 --bn-splits 1 \
	--lr 0.12 --queue-size 1024 --crop-scale 0.5,1 --knn-every 2

demo: figures/demo-moco-seed$(SEED)/table.md  ## the whole chain on drawn shapes, no download, minutes on a CPU

runs/demo-moco-seed$(SEED)/pretrain.pt: data/shapes.npz | $(READY)
	$(PYTHON) moco_cifar.py $(DEMO) --seed $(SEED) --out $(@D)

data/shapes.npz: | $(READY)
	$(PYTHON) tools/make_shapes.py $@

# what follows a pretraining, for every run
runs/%/linear.pt: runs/%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D)

runs/%/random/linear.pt: runs/%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --init random

runs/%/knn.jsonl: runs/%/pretrain.pt
	$(PYTHON) knn_monitor.py $(<D) --baseline pixels
	$(PYTHON) knn_monitor.py $(<D) --baseline random
	$(PYTHON) knn_monitor.py $(<D)

figures/%/table.md: runs/%/linear.pt runs/%/random/linear.pt runs/%/knn.jsonl
	$(PYTHON) plots.py runs/$* --out $(@D) --table $@

figures: $(patsubst runs/%/pretrain.pt,figures/%/table.md,$(wildcard runs/*/pretrain.pt))  ## of all finished runs

##@ Work on it
test: | $(DEV_READY)  ## the test suite
	$(PYTHON) -m pytest -q

test-long: | $(DEV_READY)  ## with many more kills and damaged files
	LONG_TESTS=1 $(PYTHON) -m pytest -q

check: | $(DEV_READY)  ## what must hold before a commit: lint, equal copies, tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) tools/copies.py --check
	$(PYTHON) -m pytest -q

sync: | $(READY)  ## make the copies in the scripts equal again
	$(PYTHON) tools/copies.py --fix

clean:  ## remove figures and caches; runs and data stay
	rm -rf figures .pytest_cache .ruff_cache __pycache__ */__pycache__

distclean: clean  ## remove the virtual environment and the data too; runs stay
	rm -rf $(VENV) data

$(VENV)/.ready: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(VENV)/.dev-ready: tests/requirements.txt $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
