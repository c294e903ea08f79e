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
EPOCHS ?=
SEED ?= 0
SEEDS ?= $(SEED)
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

METHODS := moco simclr fast-moco
script_moco := moco_cifar.py
script_simclr := simclr.py
script_fast-moco := fast_moco.py

# a folder's name: 200ep-seed0, and what is not the default, -<data>-<args>; or NAME
slug = $(shell printf '%s' '$1' | tr -cs 'A-Za-z0-9._\200-\377' '-' | sed 's/-*$$//')
tag = $(or $(NAME),$(call slug,$(or $(EPOCHS),$1)ep-seed$(SEED) $(filter-out cifar10,$(DATA)) $(ARGS)))
CIFAR := $(call tag,200)

##@ Run
.PHONY: help demo race bench figures test test-long check sync clean distclean $(METHODS:%=cifar-%)

help:  ## this list
	@awk -F ':.*## ' '/^##@/ {print "\n" substr($$0, 5)} /^[a-z0-9%-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nWhat pretrains takes DATA=, EPOCHS=, SEED=, ARGS="--flag value", EVAL="--flag value" (for linear_eval.py)\n'
	@printf 'and NAME= (of the folder); demo takes METHOD=simclr or fast-moco; PYTHON= uses that python\n'

cifar-moco:  ## MoCo: pretrain, probe, k-NN and figures (CIFAR-10 is downloaded; DATA= names other images)
cifar-simclr:  ## SimCLR, likewise
cifar-fast-moco:  ## Fast-MoCo, likewise

$(foreach m,$(METHODS),$(eval cifar-$m: figures/cifar-$m-$(CIFAR)/table.md))
$(foreach m,$(METHODS),$(eval runs/cifar-$m-$(CIFAR)/pretrain.pt: SCRIPT := $(script_$m)))

$(METHODS:%=runs/cifar-%-$(CIFAR)/pretrain.pt): | $(READY)
	$(PYTHON) $(SCRIPT) --data '$(DATA)' --epochs $(or $(EPOCHS),200) --seed $(SEED) --out $(@D) $(ARGS)

# a small encoder and drawn shapes: minutes on a laptop
DEMO := --data data/shapes.npz --arch resnet8 --width 16 --batch-size 128 --lr 0.12 --crop-scale 0.5,1 --knn-every 2
demo_moco := --epochs 16 --bn-splits 1 --queue-size 1024
demo_simclr := --epochs 12
demo_fast-moco := --epochs 12 --head-hidden 256 --dim 128 --predictor-hidden 64

demo: figures/demo-$(METHOD)-seed$(SEED)/table.md  ## the whole chain on drawn shapes, no download, minutes on a CPU

runs/demo-$(METHOD)-seed$(SEED)/pretrain.pt: data/shapes.npz | $(READY)
	$(PYTHON) $(script_$(METHOD)) $(DEMO) $(demo_$(METHOD)) --seed $(SEED) --out $(@D) $(ARGS)

data/shapes.npz: | $(READY)
	$(PYTHON) tools/make_shapes.py $@

# what follows a pretraining, for every run
runs/%/linear.pt: runs/%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --seed $(SEED) $(EVAL)

runs/%/random/linear.pt: runs/%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --init random --seed $(SEED) $(EVAL)

runs/%/knn.jsonl: runs/%/pretrain.pt
	$(PYTHON) knn_monitor.py $(<D) --baseline pixels
	$(PYTHON) knn_monitor.py $(<D) --baseline random
	$(PYTHON) knn_monitor.py $(<D)

figures/%/table.md: runs/%/linear.pt runs/%/random/linear.pt runs/%/knn.jsonl
	$(PYTHON) plots.py runs/$* --out $(@D) --table $@

figures: $(patsubst runs/%/pretrain.pt,figures/%/table.md,$(wildcard runs/*/pretrain.pt))  ## of all finished runs

##@ The documents' experiments
.PHONY: report-moco report-simclr fast-moco-linear fast-moco-semi-1 fast-moco-semi-10

report-moco: figures/report-moco-$(call tag,100)/report.md  ## the course report on MoCo: ResNet-18, 100 epochs, both loops
report-simclr: figures/report-simclr-$(call tag,50)/report.md  ## the course report on SimCLR: ResNet-50, 50 epochs, 10 % labels

runs/report-moco-$(call tag,100)/pretrain.pt: | $(READY)
	$(PYTHON) moco_cifar.py --recipe report --data '$(DATA)' --epochs $(or $(EPOCHS),100) --seed $(SEED) --out $(@D) $(ARGS)

runs/report-moco-%/linear.pt: runs/report-moco-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe report --seed $(SEED) $(EVAL)

runs/report-moco-%/random/linear.pt: runs/report-moco-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe report --init random --seed $(SEED) $(EVAL)

figures/report-moco-%/report.md: runs/report-moco-%/linear.pt runs/report-moco-%/random/linear.pt runs/report-moco-%/knn.jsonl
	$(PYTHON) plots.py runs/report-moco-$* --out $(@D) --report

# the accuracy along the way is drawn from five kept checkpoints
ALONG = $(shell echo $$((($(or $(EPOCHS),50) + 4) / 5)))
TABLE_1 := probe-0.1 finetune-0.1 random-probe-0.1 random-finetune-0.1 supervised-0.1 supervised

runs/report-simclr-$(call tag,50)/pretrain.pt: | $(READY)
	$(PYTHON) simclr.py --recipe report --data '$(DATA)' --epochs $(or $(EPOCHS),50) --seed $(SEED) --keep-every $(ALONG) --out $(@D) $(ARGS)

# Table 1: {pretrained, random} x {frozen, end-to-end}, and supervised with few labels and with all
runs/report-simclr-%/probe-0.1/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe simclr-report --mode probe --probe-every $(ALONG) --seed $(SEED) $(EVAL)

runs/report-simclr-%/finetune-0.1/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe simclr-report --mode finetune --probe-every $(ALONG) --seed $(SEED) $(EVAL)

runs/report-simclr-%/random-probe-0.1/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe simclr-report --mode probe --init random --seed $(SEED) $(EVAL)

runs/report-simclr-%/random-finetune-0.1/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe simclr-report --mode finetune --init random --seed $(SEED) $(EVAL)

runs/report-simclr-%/supervised-0.1/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe simclr-report --mode supervised --seed $(SEED) $(EVAL)

runs/report-simclr-%/supervised/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe simclr-report --mode supervised --labels 1 --seed $(SEED) $(EVAL)

figures/report-simclr-%/report.md: runs/report-simclr-%/knn.jsonl $(TABLE_1:%=runs/report-simclr-\%/%/linear.pt)
	$(PYTHON) plots.py runs/report-simclr-$* --out $(@D) --report

# Fast-MoCo's own evaluations of a cifar-fast-moco run
fast-moco-linear: runs/cifar-fast-moco-$(CIFAR)/fast-moco/linear.pt  ## its linear evaluation: LARS, large batches (B.2)
fast-moco-semi-1: runs/cifar-fast-moco-$(CIFAR)/semi-1/linear.pt  ## 1 % of the labels (B.3)
fast-moco-semi-10: runs/cifar-fast-moco-$(CIFAR)/semi-10/linear.pt  ## 10 % of the labels (B.3)

$(foreach p,fast-moco semi-1 semi-10,runs/%/$p/linear.pt): runs/%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe $(notdir $(@D)) --out $(@D) --seed $(SEED) $(EVAL)

# Ablations of Fast-MoCo: a run for each value and each of SEEDS, then one figure and one table
ABLATIONS := stage encode frameworks parts batch
values_stage := input stage1 stage2 stage3 final proj pred
values_encode := whole divide divide-combine sample sample-combine montage
values_frameworks := moco-whole moco byol-whole byol simsiam-whole simsiam nnclr-whole nnclr
values_parts := 1 2 3 4
values_batch := 256 512 1024
flag_stage = --combine-at $1
flag_encode = --encode $1
flag_frameworks = --framework $(patsubst %-whole,% --encode whole,$1)
flag_parts = --parts-combined $1
flag_batch = --batch-size $1
SCALE := $(or $(NAME),$(call slug,$(or $(EPOCHS),20)ep $(filter-out cifar10,$(DATA)) $(ARGS)))

.PHONY: $(ABLATIONS:%=ablate-%)
ablate-stage:  ## where the patches are combined (C.5)
ablate-encode:  ## how a view is divided and encoded (D)
ablate-frameworks:  ## BYOL, SimSiam and NNCLR with and without patches (C.1)
ablate-parts:  ## how many patches are combined
ablate-batch:  ## batch size (C.3)

runs_of = $(foreach v,$(values_$1),$(foreach s,$(SEEDS),runs/ablate-$1-$v-$(SCALE)-seed$s))
define ablation
ablate-$1: figures/ablate-$1-$(SCALE)/ablation-$1.md
figures/ablate-$1-$(SCALE)/ablation-$1.md: $(patsubst %,%/linear.pt,$(call runs_of,$1))
	$$(PYTHON) plots.py $(call runs_of,$1) --ablation $1 --out $$(@D)
$(foreach v,$(values_$1),$(foreach s,$(SEEDS),
runs/ablate-$1-$v-$(SCALE)-seed$s/pretrain.pt: FLAGS := $(call flag_$1,$v) --seed $s))
$(patsubst %,%/pretrain.pt,$(call runs_of,$1)): | $$(READY)
	$$(PYTHON) fast_moco.py --data '$$(DATA)' --epochs $(or $(EPOCHS),20) $$(ARGS) $$(FLAGS) --out $$(@D)

endef
$(foreach a,$(ABLATIONS),$(eval $(call ablation,$a)))

##@ Speed
bench: | $(READY)  ## images/s, memory and share of the machine, beside a plain baseline -> results/
	$(PYTHON) tools/bench.py $(ARGS)

race: figures/race-seed$(SEED)/table.md  ## to 90 % k-NN and linear on one GPU in the fewest minutes, see docs/race.md

RACE := --epochs 500 --knn-every 25
runs/race-seed$(SEED)/pretrain.pt: | $(READY)
	$(PYTHON) simclr.py $(RACE) --data '$(DATA)' --seed $(SEED) --out $(@D)

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
