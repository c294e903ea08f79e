# The experiments of the papers and the course reports, included by the Makefile

##@ Experiments
.PHONY: report-moco report-simclr race fast-moco-linear fast-moco-semi-1 fast-moco-semi-10

# The comparisons are listed in tools/ablations.py; the same command resumes. DATA is passed on only
# if it was given, because each SCALE brings its own.
SCALE ?= shapes
SEEDS ?= $(SEED)
GIVEN = $(if $(filter file,$(origin DATA)),,--data '$(DATA)' )$(call option,--epochs,$(EPOCHS))

ablate-%: | $(READY)  ## a comparison of a paper (docs/ablations.md); SCALE=shapes, cpu or full; SEEDS="0 1 2"
	$(PYTHON) tools/ablate.py $* --scale $(SCALE) --seeds $(SEEDS) $(GIVEN)--args='$(ARGS)'

# "Fine-tuning Momentum Contrast on Image Classification": two loops, two checkpoints, two logs
REPORT_MOCO := report-moco-$(call tag,100)
report-moco: figures/$(REPORT_MOCO)/report.html  ## the course report on MoCo: ResNet-18, 100 epochs, both loops

runs/$(REPORT_MOCO)/pretrain.pt: | $(READY)
	$(PYTHON) moco_cifar.py --recipe report $(call pretrain,100)

runs/report-moco-%/linear.pt: runs/report-moco-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe report --seed $(SEED) $(EVAL)

runs/report-moco-%/random/linear.pt: runs/report-moco-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe report --init random --seed $(SEED) $(EVAL)

figures/report-moco-%/report.html: runs/report-moco-%/linear.pt runs/report-moco-%/random/linear.pt runs/report-moco-%/map-random.npz
	$(PYTHON) plots.py runs/report-moco-$* --out $(@D) --report

# "Contrastive Self-Supervised Image Classification using SimCLR". Its Table 1: {pretrained, random} x
# {frozen, end to end}, and supervised with all labels; random and end to end is supervised with few,
# one experiment. Figure 2 has five checkpoints.
REPORT_SIMCLR := report-simclr-$(call tag,50)
TABLE_1 := probe-0.1 finetune-0.1 random-probe-0.1 supervised-0.1 supervised
A_FIFTH = $(shell echo $$((($(or $(EPOCHS),50) + 4) / 5)))
KEPT = $(shell ls $(<D)/epoch*.pt 2>/dev/null) $(<D)
report-simclr: figures/$(REPORT_SIMCLR)/report.html  ## the course report on SimCLR: ResNet-50, 50 epochs, 10% of the labels

runs/$(REPORT_SIMCLR)/pretrain.pt: | $(READY)
	$(PYTHON) simclr.py --recipe report --keep-every $(A_FIFTH) $(call pretrain,50)

runs/report-simclr-%/probe-0.1/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(KEPT) --recipe simclr-report --mode probe --seed $(SEED) $(EVAL)

runs/report-simclr-%/finetune-0.1/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(KEPT) --recipe simclr-report --mode finetune --seed $(SEED) $(EVAL)

runs/report-simclr-%/random-probe-0.1/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe simclr-report --mode probe --init random --seed $(SEED) $(EVAL)

runs/report-simclr-%/supervised-0.1/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe simclr-report --mode supervised --seed $(SEED) $(EVAL)

runs/report-simclr-%/supervised/linear.pt: runs/report-simclr-%/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe simclr-report --mode supervised --labels 1 --seed $(SEED) $(EVAL)

figures/report-simclr-%/report.html: runs/report-simclr-%/map-random.npz $(TABLE_1:%=runs/report-simclr-\%/%/linear.pt)
	$(PYTHON) plots.py runs/report-simclr-$* --out $(@D) --report

# Fast-MoCo's own evaluations of a cifar-fast-moco run
FAST_MOCO := runs/cifar-fast-moco-$(CIFAR)
fast-moco-linear: $(FAST_MOCO)/fast-moco/linear.pt  ## Fast-MoCo's linear evaluation: LARS, large batches (B.2)
fast-moco-semi-1: $(FAST_MOCO)/semi-1/linear.pt  ## 1% of the labels (B.3)
fast-moco-semi-10: $(FAST_MOCO)/semi-10/linear.pt  ## 10% of the labels (B.3)

$(FAST_MOCO)/fast-moco/linear.pt $(FAST_MOCO)/semi-1/linear.pt $(FAST_MOCO)/semi-10/linear.pt: $(FAST_MOCO)/pretrain.pt
	$(PYTHON) linear_eval.py $(<D) --recipe $(notdir $(@D)) --out $(@D) --seed $(SEED) $(EVAL)

race: figures/race-seed$(SEED)/table.md  ## the fewest minutes to 90% on one GPU: docs/race.md

runs/race-seed$(SEED)/pretrain.pt: | $(READY)
	$(PYTHON) simclr.py --data '$(DATA)' --temperature 0.2 --epochs 200 --knn-every 25 --seed $(SEED) --out $(@D)

# make would delete the file of a rule that a signal stops, even if it is complete
TRAINED := $(REPORT_MOCO) $(REPORT_SIMCLR) $(patsubst %,cifar-%-$(CIFAR),moco simclr fast-moco)
.PRECIOUS: $(patsubst %,runs/%/pretrain.pt,$(TRAINED) race-seed$(SEED) demo-$(METHOD)-seed$(SEED))
