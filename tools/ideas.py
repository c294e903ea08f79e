"""Ideas that are not in the scripts: what would they be worth? One script with one change.

    python tools/ideas.py rotation --recipe cpu --epochs 4 --holdout 5000 --out runs/rotation
    python knn_monitor.py runs/rotation

The flags after the idea's name are those of its script: moco_cifar.py for jitter-order and
stem-init, simclr.py for the others, in one process only. The checkpoint has one more setting,
`idea`. What they gained: docs/race.md; what those of MoCo change: docs/results.md.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import moco_cifar  # noqa: E402
import simclr  # noqa: E402

# a step's work over that of simclr.py's: an image of 16x16 costs a quarter of one of 32x32
WORK = {"rotation": 6 / 4, "small-crops": 6 / 4, "small-first": (5 * (24 / 32) ** 2 + 3) / 8}


def resize(x, side):
    return F.interpolate(x, size=side, mode="bilinear", antialias=True)


def rotation_loss(model, images, run):
    """By how many quarter turns was a small view rotated? E-SSL (arXiv:2111.00899), weight 0.4"""
    x = resize(simclr.augment(images, run.recipe), 16)
    turns = torch.arange(4, device=x.device).repeat_interleave(len(x))
    with run.autocast():
        logits = model[2](model[0](torch.cat([x.rot90(i, (2, 3)) for i in range(4)])))
    return 0.4 * F.cross_entropy(logits.float(), turns)


def small_crops_loss(model, images, run, full, temperature):
    """Four small crops, each against both full views: SwAV's multi-crop (arXiv:2006.09882), with
    SimCLR's loss. The sum over the eight pairs.
    """
    recipe = dataclasses.replace(run.recipe, crop_scale=(0.1, 0.5))
    small = [resize(simclr.augment(images, recipe), 16) for _ in range(4)]
    with run.autocast():
        small = model[:2](torch.cat(small)).chunk(4)
    return sum(simclr.nt_xent(z, other, temperature) for z in small for other in full)


def train(config, run):
    """simclr.train with an idea"""
    run.recipe = simclr.composition(config)
    encoder = simclr.build_encoder(config.arch, config.width)
    model = nn.Sequential(encoder, simclr.build_projector(encoder.dim, config))
    if config.idea == "rotation":
        hidden = nn.Linear(encoder.dim, config.head_hidden)
        model.append(nn.Sequential(hidden, nn.ReLU(), nn.Linear(config.head_hidden, 4)))
    optimizer = simclr.build_optimizer(config, model.parameters())
    optimizer = run.start(model, model, optimizer, math.log(2 * config.batch_size - 1))
    for epoch, images in run.batches():
        optimizer.param_groups[0]["lr"] = simclr.warmup_cosine(config, run.step / run.steps)
        views = [simclr.augment(images, run.recipe) for _ in range(2)]
        if config.idea == "small-first" and epoch < config.epochs * 5 // 8:
            views = [resize(view, config.image_size * 3 // 4) for view in views]
        with run.autocast():
            full = model[:2](torch.cat(views)).chunk(2)
        loss = simclr.nt_xent(*full, config.temperature)
        if config.idea == "rotation":
            loss = loss + rotation_loss(model, images, run)
        elif config.idea == "small-crops":
            loss = (loss + small_crops_loss(model, images, run, full, config.temperature)) / 9
        run.record(loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def jitter_in_random_order(x, strength):
    """torchvision's ColorJitter with an order of its own for each image, as in the papers"""
    low_high = [(max(0, 1 - most), 1 + most) for most in strength[:3]]
    factor = [moco_cifar.uniform(low, high, x, 1, 1, 1) for low, high in low_high]
    turns = moco_cifar.uniform(-strength[3], strength[3], x, 1, 1)
    changes = [
        lambda x: (factor[0] * x).clamp(0, 1),
        lambda x: torch.lerp(gray(x).mean((1, 2, 3), keepdim=True), x, factor[1]).clamp(0, 1),
        lambda x: torch.lerp(gray(x), x, factor[2]).clamp(0, 1),
        lambda x: moco_cifar.shift_hue(x, turns),
    ]
    order, gray = moco_cifar.uniform(0, 1, x, 4).argsort(1), moco_cifar.grayscale
    for turn in order.T.reshape(4, -1, 1, 1, 1):  # which change comes next, image by image
        x = sum(torch.where(turn == i, change(x), 0) for i, change in enumerate(changes))
    return x


build_encoder = moco_cifar.build_encoder


def with_default_stem(*how):
    """PyTorch's default weights in the first convolution, as in MoCo's official CIFAR-10 demo.
    With 64 channels they are twice as large, so that they learn a quarter as fast.
    """
    encoder = build_encoder(*how)
    encoder.conv1.reset_parameters()
    return encoder


IDEAS = {name: (simclr, dict(train=train)) for name in WORK}
IDEAS["jitter-order"] = moco_cifar, dict(color_jitter=jitter_in_random_order)
IDEAS["stem-init"] = moco_cifar, dict(build_encoder=with_default_stem)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("idea", choices=IDEAS)
    options, flags = parser.parse_known_args(argv)
    script, changes = IDEAS[options.idea]
    idea = [("idea", str, options.idea)]
    usual = script.Config
    script.Config = dataclasses.make_dataclass("Config", idea, bases=(usual,))
    script.Config.__annotations__ |= usual.__annotations__  # the command line is made from these
    script.SOURCE += Path(__file__).read_text()  # kept in the checkpoint
    for name, function in changes.items():
        setattr(script, name, function)
    return script.main(flags)


if __name__ == "__main__":
    sys.exit(main())
