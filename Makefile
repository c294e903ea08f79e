# contrastive-cifar: pretrain -> evaluate -> figures. `make` alone lists the targets.
#
# Every step makes a file. An interrupted chain resumes where it stopped, and a finished step is not
# repeated, not even when its script changes (a checkpoint holds the text of the script that wrote it).
# A run's folder is named after its settings, so other settings never land in an old run (except
# by demo and race, whose folders are named after the seed alone, demo's after the method too).

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SECONDARY:
.DEFAULT_GOAL := help

DATA ?= cifar10
RECIPE ?=
EPOCHS ?=
SEED ?= 0
METHOD ?= moco
ARGS ?=
EVAL ?=
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

# $(call tag,200) names a folder: 200ep-seed0, then whatever is not the default; or all of it is NAME.
# A recipe brings its own epochs.
epochs = $(or $(EPOCHS),$(if $(RECIPE),,$1))
slug = $(shell printf '%s' '$(strip $1)' | tr -cs 'A-Za-z0-9._\200-\377' '-' | sed 's/-*$$//')
settings = $(RECIPE) $(patsubst %,%ep,$(call epochs,$1)) seed$(SEED) $(filter-out cifar10,$(DATA)) $(ARGS)
tag = $(or $(if $(filter command,$(origin NAME)),$(NAME)),$(call slug,$(call settings,$1)))
CIFAR := $(call tag,200)

# the flags of a pretraining script
option = $(if $2,$1 $2 )
pretrain = $(call option,--recipe,$(RECIPE))--data '$(DATA)' $(call option,--epochs,$(call epochs,$1))$(seed_and_out)
seed_and_out = --seed $(SEED) --out $(@D) $(ARGS)

##@ Run
.PHONY: help demo cifar-moco cifar-simclr cifar-fast-moco figures bench test test-long check diff sync notebooks clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^##@/ {print "\n" substr($$0, 5)} /^[a-z0-9%-]+:.*## / {sub("%", "NAME", $$1); printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\ncifar-* and report-* take DATA=, RECIPE=, EPOCHS=, SEED=, ARGS="--flag value" and NAME= (of its folder),\n'
	@printf 'evaluation EVAL="--flag value"; demo takes METHOD=simclr or fast-moco; PYTHON= uses that python\n'

# The chain is the same for every method: pretrain.pt -> linear.pt, map-random.npz -> table.md
cifar-moco: figures/cifar-moco-$(CIFAR)/table.md  ## MoCo: pretrain, probe, k-NN and figures; downloads CIFAR-10 unless DATA= is given
cifar-simclr: figures/cifar-simclr-$(CIFAR)/table.md  ## the same for SimCLR
cifar-fast-moco: figures/cifar-fast-moco-$(CIFAR)/table.md  ## the same for Fast-MoCo

runs/cifar-moco-$(CIFAR)/pretrain.pt: | $(READY)
	$(PYTHON) moco_cifar.py $(call pretrain,200)

runs/cifar-simclr-$(CIFAR)/pretrain.pt: | $(READY)
	$(PYTHON) simclr.py $(call pretrain,200)

runs/cifar-fast-moco-$(CIFAR)/pretrain.pt: | $(READY)
	$(PYTHON) fast_moco.py $(call pretrain,200)

runs/%/linear.pt: runs/%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --seed $(SEED) $(EVAL)

runs/%/random/linear.pt: runs/%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --init random --seed $(SEED) $(EVAL)

# the last of three measurements leaves this file, so it is there only if all are
runs/%/map-random.npz: runs/%/pretrain.pt
	$(PYTHON) knn_monitor.py $(<D) --baseline pixels
	$(PYTHON) knn_monitor.py $(<D)
	$(PYTHON) knn_monitor.py $(<D) --baseline random --seed $(SEED)

figures/%/table.md: runs/%/linear.pt runs/%/random/linear.pt runs/%/map-random.npz
	$(PYTHON) plots.py runs/$* --out $(@D) --table $@

figures: $(patsubst runs/%/pretrain.pt,figures/%/table.md,$(wildcard runs/*/pretrain.pt))  ## of all finished runs

# The demo is the same chain with a small encoder on synthetic images: minutes on a laptop
DEMO := --data data/shapes.npz --arch resnet8 --width 16 --batch-size 128 --crop-scale 0.5,1 --knn-every 2
demo_moco := moco_cifar.py $(DEMO) --lr 0.03 --epochs 16 --bn-splits 1 --queue-size 1024
demo_simclr := simclr.py $(DEMO) --lr 0.12 --epochs 12
demo_fast-moco := fast_moco.py $(DEMO) --lr 0.12 --epochs 12 --head-hidden 256 --dim 128 --predictor-hidden 64

demo: figures/demo-$(METHOD)-seed$(SEED)/table.md  ## the whole chain on synthetic shapes: no data to download, minutes on a CPU

runs/demo-$(METHOD)-seed$(SEED)/pretrain.pt: data/shapes.npz | $(READY)
	$(PYTHON) $(demo_$(METHOD)) $(seed_and_out)

data/shapes.npz: | $(READY)
	$(PYTHON) tools/make_shapes.py $@

include experiments.mk

##@ Speed and development
bench: | $(READY)  ## images/s, memory and use of the machine, beside a plain baseline -> results/
	$(PYTHON) tools/bench.py $(ARGS)

test: | $(DEV_READY)  ## the test suite
	$(PYTHON) -m pytest -q

test-long: | $(DEV_READY)  ## the same with many more kills and damaged files
	LONG_TESTS=1 $(PYTHON) -m pytest -q

check: | $(DEV_READY)  ## what must hold before a commit: lint, identical copies, tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) tools/copies.py --check
	$(PYTHON) -m pytest -q

# what stands between the docstring and the plumbing; --patience keeps a function's lines together
A ?= moco_cifar
B ?= simclr

diff:  ## how the methods of two scripts differ: A=moco_cifar B=fast_moco
	@ls $(A).py $(B).py > /dev/null; folder=$$(mktemp -d); trap 'rm -r "$$folder"' EXIT; \
	for name in $(A) $(B); do \
	    sed -n '/^\# %% Config/,/^\# ---- plumbing/p' $$name.py > "$$folder/$$name.py"; \
	done; cd "$$folder"; git diff --no-index --patience -U2 $(A).py $(B).py || [ $$? = 1 ]

sync: | $(READY)  ## make the copies in the scripts identical again
	$(PYTHON) tools/copies.py --fix

notebooks: | $(READY)  ## write notebooks/*.ipynb from the scripts
	$(PYTHON) tools/notebooks.py
	$(PYTHON) tools/lesson.py

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
