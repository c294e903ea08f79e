"""What the papers compare: for each name the script, the settings of its runs, and the figures that
the paper printed. tools/ablate.py runs these, tools/report.py draws them.
"""

import itertools

# The flags of every run at each size, then more for each script. shapes: synthetic images, about a
# minute per run. cpu: all of CIFAR-10, half an hour per run and core. full: the paper's encoder and
# epochs, on CIFAR-10.
SCALES = {
    "shapes": dict(data="data/shapes.npz", arch="resnet8", width=16, batch_size=128, lr=0.12)
    | dict(crop_scale="0.5,1", epochs=8),
    "shapes moco_cifar.py": dict(bn_splits=1, queue_size=1024, lr=0.03),  # 0.12 is too high for it
    "shapes fast_moco.py": dict(head_hidden=256, dim=128, predictor_hidden=64),
    "cpu": dict(data="cifar10", arch="resnet18", width=16, batch_size=256, lr=0.12, epochs=10),
    "cpu moco_cifar.py": dict(lr=0.03),
    "cpu fast_moco.py": dict(head_hidden=256, dim=128, predictor_hidden=64),
    "full": dict(data="cifar10", arch="resnet50", batch_size=256, lr=0.03, epochs=200),
    "full moco_cifar.py": dict(recipe="v1", weight_decay=1e-4, key_momentum=0.999),
    "full simclr.py": dict(recipe="paper", lr=0.3),
    "full fast_moco.py": dict(recipe="paper-20", batch_size=512, lr=0.15, epochs=20),
}


def ablation(
    script, title, source, grid, printed=(), fields=None, labels=(1,), full=(), loss=False
):
    """source: where the printed figures are from. grid: the settings of each run, or the values to
    combine; epochs are multiples of the scale's, and the learning rate follows the batch size.
    printed: a figure in % for each run, or None. fields: the settings that tell runs apart, by
    default all. labels: shares of the labels to train probes on. full: changes at scale full.
    loss: is the loss of the settings comparable?
    """
    if isinstance(grid, dict):
        grid = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    fields = fields or [*grid[0]]
    printed = {tuple(s[f] for f in fields): p for s, p in zip(grid, printed) if p is not None}
    entry = dict(script=script, title=title, source=source, fields=fields, grid=grid)
    return entry | dict(printed=printed, labels=labels, full=dict(full), loss=loss)


def printed_for(name, setting, shortest=1):
    """The paper's figure for a run with these values of the fields, or None. shortest: the fewest
    epochs of any run compared, because the table counts epochs in multiples of it.
    """
    fields, printed = ABLATIONS[name]["fields"], ABLATIONS[name]["printed"]
    values = [v / shortest if f == "epochs" else v for f, v in zip(fields, setting)]
    return printed.get(tuple(values))


V1, V2 = dict(head="linear", temperature=0.07), dict(head="mlp", temperature=0.2)
V1_TO_V2 = [head | dict(blur=b, schedule="step", epochs=1) for b in (0.0, 0.5) for head in (V1, V2)]
V1_TO_V2 += [V2 | dict(blur=0.5, schedule="cosine", epochs=epochs) for epochs in (1, 4)]

KEYS = 63, 255, 1023  # the negatives that end-to-end has in batches of 64, 256 and 1,024
MECHANISMS = [dict(mechanism=m, queue_size=k) for m in ("moco", "memory-bank") for k in KEYS]
MECHANISMS += [dict(mechanism="end-to-end", batch_size=n) for n in (64, 256, 1024)]

GROUPS = dict(batch_size=32)  # 8 groups of 4 images: the smaller, the more a group gives away

OPERATIONS = ["crop", "flip", "color", "gray", "blur"]
HUANG = {"crop,flip,color,gray,blur": 89.8, "crop,color,gray,blur": 88.5, "crop,gray,blur": 83.5}
HUANG |= {"crop,blur": 63.2}
COMPOSITIONS = [",".join(c) for n in (1, 2, 4) for c in itertools.combinations(OPERATIONS, n)]
COMPOSITIONS = [*HUANG, *(c for c in COMPOSITIONS if c not in HUANG)]

FRAMEWORKS, ENCODE = ("nnclr", "byol", "simsiam", "moco"), ("whole", "divide-combine")
PATCHES = [dict(framework=f, optimizer="sgd", encode=e) for f in FRAMEWORKS for e in ENCODE]
ADAMW = dict(optimizer="adamw", lr=1e-3, weight_decay=0.05)  # a usual rate: the paper gives none
PATCHES += [setting | ADAMW for setting in PATCHES[-2:]]
AT_100_EPOCHS = dict(recipe="paper", lr=0.1, epochs=100)

# Printed figures are linear probes on ImageNet with ResNet-50, unless the source says otherwise.
ABLATIONS = {
    "temperature": ablation(
        "moco_cifar.py",
        "Temperature, with a linear and an MLP head",
        "MoCo v2, section 3, 200 epochs",
        dict(head=["linear", "mlp"], temperature=[0.07, 0.1, 0.2, 0.3, 0.4, 0.5]),
        [60.6, 60.7, 59.0, 58.2, 57.2, 56.4, 62.9, 64.9, 66.2, 65.7, 65.0, 64.3],
    ),
    "mocov2": ablation(
        "moco_cifar.py",
        "From MoCo v1 to v2: head, blur, schedule, epochs",
        "MoCo v2, Table 1, 200 epochs and 4 times as many",
        V1_TO_V2,
        [60.6, 66.2, 63.4, 67.3, 67.5, 71.1],
        fields=["head", "blur", "schedule", "epochs"],
    ),
    "mechanism": ablation(
        "moco_cifar.py",
        "Where the negative keys come from",
        "MoCo, Figure 3: only plotted",
        MECHANISMS,
        fields=["mechanism", "queue_size", "batch_size"],
    ),
    "shuffle": ablation(
        "moco_cifar.py",
        "ShuffleBN: batch norm over the batch, and over 8 groups with and without shuffling",
        "MoCo, Figure A.1: only plotted",
        [GROUPS | dict(shuffle=s, bn_splits=n) for s, n in ((True, 1), (True, 8), (False, 8))],
        fields=["bn_splits", "shuffle"],
        loss=True,
    ),
    "queue": ablation(
        "moco_cifar.py",
        "Keys in the queue",
        "MoCo, Figure 3: only plotted",
        dict(queue_size=[64, 256, 1024, 4096]),
    ),
    "momentum": ablation(
        "moco_cifar.py",
        "Momentum of the key encoder",
        "MoCo, section 4.1, K = 4096; with 0 the loss oscillates and training fails",
        dict(key_momentum=[0.0, 0.9, 0.99, 0.999]),
        [None, 55.2, 57.8, 59.0],
    ),
    "batch-moco": ablation(
        "moco_cifar.py",
        "Batch size of MoCo",
        "MoCo v2, Table 2, 200 epochs",
        dict(batch_size=[64, 128, 256]),
        [None, None, 67.5],
        full=dict(recipe="v2"),
    ),
    "batch-simclr": ablation(
        "simclr.py",
        "Batch size of SimCLR",
        "MoCo v2, Table 2, 200 epochs; 66.6 with 8,192",
        dict(batch_size=[32, 64, 128, 256, 512]),
        [None, None, None, 61.9],
    ),
    "augment": ablation(
        "simclr.py",
        "Compositions of augmentations",
        "Huang et al. 2021 (arXiv:2111.00743): k-NN on CIFAR-10, ResNet-18, 800 epochs; SimCLR, "
        "Figure 5, has pairs: only plotted",
        dict(augment=COMPOSITIONS, blur=[0.5]),
        HUANG.values(),
        fields=["augment"],
        full=dict(recipe="cifar", arch="resnet18", batch_size=512, lr=0.06, epochs=800),
    ),
    "stage": ablation(
        "fast_moco.py",
        "The stage after which patches are combined",
        "Fast-MoCo, supplementary, Figure 2: only plotted, falls sharply after the projector",
        dict(combine_at=["input", "stage1", "stage2", "stage3", "final", "proj", "pred"]),
    ),
    "encode": ablation(
        "fast_moco.py",
        "How a view is divided and encoded",
        "Fast-MoCo, section 5.2; the supplementary's Figure 3 only illustrates them",
        dict(encode="whole divide divide-combine sample sample-combine montage".split()),
    ),
    "frameworks": ablation(
        "fast_moco.py",
        "Patches in other frameworks",
        "Fast-MoCo, supplementary, Table 3 and section C.4, 100 epochs; MoCo v3 with patches: main "
        "result",
        PATCHES,
        [69.4, 72.5, 66.5, 73.6, 68.1, 71.7, None, 73.5, 69.3, 71.7],
        fields=["framework", "optimizer", "encode"],
        full=AT_100_EPOCHS,
    ),
    "parts": ablation(
        "fast_moco.py",
        "Patches in a combination",
        "not in the supplementary of Fast-MoCo, which combines 2",
        dict(parts_combined=[1, 2, 3, 4]),
    ),
    "batch": ablation(
        "fast_moco.py",
        "Batch size of Fast-MoCo",
        "Fast-MoCo, supplementary, Table 4, 100 epochs",
        dict(batch_size=[256, 512, 1024]),
        [72.5, 73.5, 73.6],
        full=AT_100_EPOCHS,
    ),
    "epochs": ablation(
        "fast_moco.py",
        "Epochs of pretraining, with all and with few labels",
        "Fast-MoCo, main results, 100, 200 and 400 epochs; few labels: supplementary, Figure 1, "
        "only plotted",
        dict(epochs=[1, 2, 4]),
        [73.5, 75.1, 75.5],
        labels=(1, 0.1, 0.01),
        full=AT_100_EPOCHS,
    ),
}
