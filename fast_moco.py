"""Fast-MoCo on CIFAR-10: more positive pairs from two views, at nearly the same cost.

A view is divided into 2x2 patches. Each is encoded on its own, which costs the encoder as much as
the whole view; the mean of any two of the four embeddings is an embedding of the image, and that
makes six. Each of the six must find its own image among the embeddings of the batch that a slow
copy of the encoder computes from whole views (a moving average of its weights, as in MoCo). There
is no queue: the negatives are the other images of the batch.

    view_1 -divide-> 4 patches -encoder-> 4 v -combine-> 6 c -projector-predictor-> 6 z_c --.
                                  | momentum update                                  ctr(z_c, z)
    view_2 ---- whole -------> its copy -----------------------> projector's copy --> z ----'
    ... and the same with the views exchanged

What differs from the paper (Fast-MoCo, arXiv:2207.08220, and its supplementary):
 1. The stem fits 32x32 images, and a patch has 16x16 pixels, not 112x112.
 2. The target branch starts as a copy of the online one. T is 0.2, not 1; there is no blur.
 3. --encode whole is MoCo v3 with these heads, without its factor 2T. Patches take 8% more FLOPs.
 4. Jitter changes brightness, contrast, saturation, hue in this order; torchvision's is random.
The loss sums both directions (the authors' code: their mean): guessing gives 2 ln N, 12.48 at 512.

    python fast_moco.py                                # CIFAR-10, ResNet-18, 200 epochs
    python fast_moco.py --framework byol               # or simsiam, nnclr; with or without patches

The same command resumes an interrupted run. In a notebook, paste this file into one cell and edit
Config. Next, linear_eval.py measures how good the features are.
"""

# %%
import copy
import dataclasses
import math
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer, resnet

METHOD = "fast-moco"
Encode = Literal["divide-combine", "divide", "sample", "sample-combine", "montage", "whole"]
Stage = Literal["input", "stage1", "stage2", "stage3", "final", "proj", "pred"]


# %% Config: each field becomes a flag --like-this, and its comment the flag's help
@dataclasses.dataclass
class Config:
    # -- data
    data: str = "cifar10"  # cifar10, cifar100, svhn, stl10, a folder train/<class>/*, an .npz file
    data_dir: str = "data"  # folder for downloads and caches
    image_size: int = 32  # pixels; images of another size are resized
    limit: int = 0  # train on this many images, equally many per class; 0: all
    holdout: int = 0  # hold out this many training images and evaluate on them, not the test set
    mean: tuple = (0.4914, 0.4822, 0.4465)  # per-channel mean of the pixels in [0, 1]: CIFAR-10's
    std: tuple = (0.2470, 0.2435, 0.2616)  # per-channel standard deviation
    # -- augmentation
    crop_scale: tuple = (0.2, 1.0)  # range of a random crop's area, as a share of the image's
    flip: float = 0.5  # probability of a horizontal flip
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)  # strength in brightness, contrast, saturation, hue
    gray: float = 0.2  # probability of a grayscale view
    blur: float = 0.0  # probability of a Gaussian blur (0.5 in the paper, on ImageNet)
    # -- model
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet8", "vit-tiny"] = "resnet18"  # encoder
    width: int = 64  # channels of the first stage; for vit-tiny, size of each of the 3 heads
    head_hidden: int = 2048  # units of the projector's two hidden layers
    dim: int = 2048  # C, the size of the vectors that are compared
    predictor_hidden: int = 512  # units of the predictor's hidden layer
    # -- method (letters: sections of the supplementary)
    framework: Literal["moco", "byol", "simsiam", "nnclr"] = "moco"  # whose targets and loss (C.1)
    encode: Encode = "divide-combine"  # how the online branch sees a view (D); whole: MoCo v3
    grid: int = 2  # a view is divided into grid x grid patches
    parts_combined: int = 2  # n, patches in a combination
    combine_at: Stage = "final"  # after which stage patches are combined (C.5)
    full_crops: int = 2  # views per image; only the first two have a target (B.5)
    small_crops: int = 0  # more views without a target, of a patch's size (multi-crop, SwAV)
    temperature: float = 0.2  # T of the softmax; 1 in the paper, on ImageNet
    key_momentum: float = 0.99  # a, the momentum of the target's moving average (Algorithm 1)
    queue_size: int = 4096  # of nnclr: embeddings among which a target's nearest neighbour is taken
    # -- optimisation
    epochs: int = 200  # passes over the training images
    batch_size: int = 512  # N, images per step over all devices; change lr in proportion
    optimizer: Literal["sgd", "adamw"] = "sgd"  # AdamW: section C.4
    lr: float = 0.1  # peak learning rate; the predictor's is constant
    sgd_momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4  # on all parameters
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    warmup_epochs: float = 1.0  # linear warm-up, in epochs
    warmup_start: float = 0.25  # learning rate when the warm-up begins, as a share of the peak
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    # -- run
    out: str = "runs/fast-moco"  # the run's folder
    seed: int = 0  # random seed
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: the fastest here
    knn_every: int = 10  # epochs between measurements of the k-NN accuracy; 0: only at the end
    knn_k: int = 200  # neighbours that vote (knn_monitor.py compares protocols)
    keep_every: int = 0  # epochs between checkpoints to keep; 0: keep only the last
    save_seconds: float = 60.0  # seconds between saves: the most a crash can lose
    compile: bool = False  # use torch.compile; meant for GPUs (docs/race.md)
    restart: bool = False  # start over in a folder that holds a run


RECIPES = {
    "cifar": {},  # the defaults: the paper's but for epochs, temperature and blur
    "cpu": dict(width=16, head_hidden=256, dim=128, predictor_hidden=64)
    | dict(epochs=40, batch_size=256, lr=0.4),
    "paper": dict(epochs=100, temperature=1.0, blur=0.5),  # Table 1
    "paper-20": dict(epochs=20, lr=0.15, temperature=1.0, blur=0.5),  # Table 1, for its ablations
    "adamw": dict(optimizer="adamw", lr=1e-3, weight_decay=0.05),  # usual values; C.4 gives none
    # MoCo v3 with a ViT (arXiv:2104.02057): optimizer, warm-up, heads and T of its sec. 5; epochs,
    # decay and lr (1.5e-4 per 256 images) of its code. Ours: sizes, views, m that doesn't grow to 1
    "vit": dict(arch="vit-tiny", encode="whole", epochs=300, optimizer="adamw", lr=3e-4, clip=0.0)
    | dict(weight_decay=0.1, warmup_epochs=40.0, warmup_start=0.0)
    | dict(head_hidden=4096, dim=256, predictor_hidden=4096),
}


# %% Augmentation: what the features should ignore
def augment(images, config):
    """One random view of each image: (N, 3, H, W) uint8 -> (N, 3, H, W) float32, normalised. Each
    operation (plumbing, below) draws its own random numbers for each image.
    """
    x = random_resized_crop(images / 255, config.crop_scale)
    x = sometimes(config.flip, horizontal_flip, x)
    x = sometimes(0.8, lambda x: color_jitter(x, config.jitter), x)  # 0.8: SimCLR, app. A; MoCo v2
    x = sometimes(config.gray, grayscale, x)
    x = sometimes(config.blur, gaussian_blur, x)
    return normalise(x, config)


# %% Divide and combine
def divide(x, grid=2):
    """(N, C, H, W) -> (grid**2 N, C, H/grid, W/grid), column-major: upper left, lower left, ..."""
    return torch.cat([patch for column in x.chunk(grid, 3) for patch in column.chunk(grid, 2)])


def combine(v, parts=4, n=2):
    """Mean of every n patches of an image: (parts N, D) -> (comb(parts, n) N, D), in blocks of N"""
    return torch.cat([sum(some) / n for some in combinations(v.chunk(parts), n)])


# %% Model
def build_encoder(arch, width=64, norm_layer=nn.BatchNorm2d):
    """A ResNet for small images (SimCLR, B.9) or a ViT: (N, 3, H, W) -> features (N, encoder.dim).
    Layers have torchvision's names; width: channels of the first stage, doubled in each later one.
    """
    if arch == "vit-tiny":  # 32x32 images, 4x4 patches, 6 layers, 3 heads of `width` channels
        net = VisionTransformer(32, 4, 6, 3, hidden_dim=3 * width, mlp_dim=12 * width)
        net.heads, net.dim = nn.Identity(), 3 * width  # the feature is the class token's output
        net.conv_proj.requires_grad_(False)  # fixed random patch projection (arXiv:2104.02057, 4.2)
        return net
    depths = {"resnet8": (1, 1, 1), "resnet18": (2, 2, 2, 2)}.get(arch, (3, 4, 6, 3))
    block = resnet.Bottleneck if arch == "resnet50" else resnet.BasicBlock
    net = nn.Sequential()  # runs its layers in the order in which they are assigned
    net.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)  # ImageNet: 7x7, stride 2, max-pool
    net.bn1, net.relu, net.dim = norm_layer(width), nn.ReLU(inplace=True), width
    for i, depth in enumerate(depths):
        stage, planes, stride = nn.Sequential(), width * 2**i, 1 if i == 0 else 2
        for _ in range(depth):
            out, shortcut = planes * block.expansion, None
            if stride != 1 or net.dim != out:
                shortcut = nn.Sequential(resnet.conv1x1(net.dim, out, stride), norm_layer(out))
            stage.append(block(net.dim, planes, stride, shortcut, norm_layer=norm_layer))
            net.dim, stride = out, 1
        setattr(net, f"layer{i + 1}", stage)
    net.avgpool, net.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    for conv in (module for module in net.modules() if isinstance(module, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return net


def build_mlp(*sizes):
    """Linear layers with batch norm and ReLU between them: (N, sizes[0]) -> (N, sizes[-1])"""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for wide, narrow in zip(sizes[1:], sizes[2:]):
        layers += [nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, narrow)]
    return nn.Sequential(*layers)


# %% The method
def ctr(z_c, z, temperature):
    """Algorithm 1: each combination, z_c (6N, C), must find its image among the N of z (N, C)."""
    with torch.autocast(z.device.type, enabled=False):  # bf16 is too coarse for logits
        logits = unit(z_c) @ unit(z).T / temperature  # (6N, N), cosines / T
        labels = torch.arange(len(z), device=z.device).repeat(len(z_c) // len(z))
        return F.cross_entropy(logits, labels)  # the mean of the six losses


def compare(model, z_c, z):
    """The loss of the framework (C.1): z_c (6N, C) of this process, z (N, C) of all -> scalar"""
    copies = len(z_c) * process_count() // len(z)  # how many combinations an image has
    z_c = torch.cat([gather(c) for c in z_c.chunk(copies)])  # (6N, C), combination-major
    if model.config.framework in ("byol", "simsiam"):  # no negatives: twice (1 - cosine)
        return 2 - 2 * (unit(z_c) * z.repeat(copies, 1)).sum(1).mean()
    if model.config.framework == "nnclr":  # not z itself, but its nearest neighbour in the queue
        with torch.autocast(z.device.type, enabled=False):
            z = model.queue.keys[(z @ model.queue.keys.T).argmax(1)]
    return ctr(z_c, z, model.config.temperature)


class FastMoCo(nn.Module):
    """Algorithm 1. online: encoder, projector, predictor; target: a slow copy of the first two."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        encoder = build_encoder(config.arch, config.width)
        for block in encoder.modules():  # in the authors' code each begins as the identity
            if last := getattr(block, "bn3", None) or getattr(block, "bn2", None):
                nn.init.zeros_(last.weight)
        hidden, dim = config.head_hidden, config.dim
        projector = build_mlp(encoder.dim, hidden, hidden, dim).append(nn.BatchNorm1d(dim))
        predictor = build_mlp(dim, config.predictor_hidden, dim)
        self.online = nn.Sequential(encoder, projector, predictor)
        if config.framework != "simsiam":
            self.target = copy.deepcopy(self.online[:2]).requires_grad_(False)
        if config.framework == "nnclr":
            self.queue = Queue(config.queue_size, dim)

    def predict(self, patches, parts):
        """The online branch: patches (4N, 3, h, w), 4 parts of each image -> z_c (6N, C)"""
        config, (encoder, projector, predictor) = self.config, self.online
        if config.combine_at != "final" or config.encode == "montage":
            return variant_predict(self, patches)
        v = encoder(patches)  # (4N, D)
        c = combine(v, parts, config.parts_combined if config.encode in COMBINES else 1)  # (6N, D)
        return predictor(projector(c))

    @torch.no_grad()
    def target_embed(self, view):
        """The target branch: a whole view (N, 3, H, W) -> z (N, C), rows of length 1"""
        branch = self.online[:2] if self.config.framework == "simsiam" else self.target
        return gather(unit(branch(view)))

    def forward(self, views, small=()):
        """Views (N, 3, H, W) of the same images, and small ones -> loss, z (N, C) of view 1"""
        if self.config.encode.startswith("divide"):
            seen = [divide(view, self.config.grid) for view in views]  # (4N, 3, h, w)
        else:
            seen, small = variant_inputs(self.config, views, small)
        z_c = [self.predict(x, len(x) // len(views[0])) for x in seen]
        z_c += [self.online(x) for x in small]
        z = [self.target_embed(view) for view in views[:2]]
        # ctr(z1_c, z2) + ctr(z2_c, z1); with more views, twice the mean over all pairs
        pairs = [(z_c[i], z[j]) for i in range(len(z_c)) for j in range(2) if i != j]
        return 2 * sum(compare(self, *pair) for pair in pairs) / len(pairs), z[0]


@torch.no_grad()
def momentum_update(encoder_q, encoder_k, m):
    """Eq. 2 of MoCo: theta_k <- m theta_k + (1 - m) theta_q; running statistics stay its own"""
    torch._foreach_lerp_(list(encoder_k.parameters()), list(encoder_q.parameters()), 1 - m)


# %% Training
def warmup_cosine(config, epoch):
    """Learning rate at a fractional epoch: linear warm-up, then half a cosine (or constant)"""
    if epoch < config.warmup_epochs:
        start = config.warmup_start
        return config.lr * (start + (1 - start) * epoch / config.warmup_epochs)
    if config.schedule == "constant":
        return config.lr
    part = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * 0.5 * (1 + math.cos(math.pi * part))


def train(config, run):
    """Algorithm 1. `run` (plumbing, below) supplies images, resumes, measures, logs and saves."""
    model = FastMoCo(config)
    # two groups: in the authors' code the predictor's learning rate is constant
    groups = [{"params": model.online[:2].parameters()}, {"params": model.online[2].parameters()}]
    how = dict(lr=config.lr, weight_decay=config.weight_decay, fused=True)
    sgd = torch.optim.SGD(groups, momentum=config.sgd_momentum, **how)
    optimizer = sgd if config.optimizer == "sgd" else torch.optim.AdamW(groups, **how)
    negatives = config.framework in ("moco", "nnclr")
    chance = 2 * math.log(config.batch_size) if negatives else 4.0  # the loss of guessing
    optimizer = run.start(model, model.online, optimizer, chance, config.clip)  # step() also clips
    view = run.compiled(augment)  # augment itself, unless --compile
    samples = config.grid**2 * config.full_crops if config.encode.startswith("sample") else 0
    for _, images in run.batches():  # images (N, 3, H, W) uint8, on the device
        optimizer.param_groups[0]["lr"] = warmup_cosine(config, run.step / run.steps)
        views = [view(images, config) for _ in range(config.full_crops)]
        small = [small_view(images, config) for _ in range(samples or config.small_crops)]
        with run.autocast():  # bf16 or fp16 where that is fast
            loss, z = model(views, small)
        loss = run.record(loss)  # for the log; fp16 also scales it, or small gradients would vanish
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if config.framework != "simsiam":
            momentum_update(model.online[:2], model.target, config.key_momentum)
        if config.framework == "nnclr":
            model.queue.enqueue(z)


# ---- variants: other ways to encode (D), other places to combine (C.5); the lesson ends here ----
COMBINES = ("divide-combine", "sample-combine", "montage")


def variant_inputs(config, views, small):
    """What the online branch sees in place of patches of views; the small views that are left"""
    if config.encode == "whole":  # MoCo v3
        return views, small
    if config.encode == "montage":
        return [divide(view, config.grid) for view in views], small
    return [torch.cat(small[i :: len(views)]) for i in range(len(views))], []


def small_view(images, config):
    """A random crop, a patch in scale and size: (N, 3, H, W) -> (N, 3, H/grid, W/grid)"""
    scale = tuple(share / config.grid**2 for share in config.crop_scale)
    view = augment(images, dataclasses.replace(config, crop_scale=scale))
    return F.avg_pool2d(view, config.grid)


def montage(encoder, patches, grid):
    """Patches of different images are put together into whole ones, encoded, and taken apart again:
    (4N, 3, h, w) -> (4N, D). Across the seams a patch sees other images; divided, it sees padding.
    """
    parts = patches.chunk(grid**2)
    shuffles = [torch.randperm(len(part), device=part.device) for part in parts]
    parts = [part[shuffle] for part, shuffle in zip(parts, shuffles)]
    columns = [torch.cat(parts[i : i + grid], dim=2) for i in range(0, grid**2, grid)]
    maps = encoder[:-2](torch.cat(columns, dim=3))  # all but the average and the flattening
    v = divide(maps, grid).mean((2, 3)).chunk(grid**2)  # 4 x (N, D)
    return torch.cat([part[shuffle.argsort()] for part, shuffle in zip(v, shuffles)])


def stitch(patches):
    """Two vertical and two horizontal pairs of 4 patches, as they lie in the image: (4N, C, h, w)
    -> (2N, C, 2h, w), (2N, C, h, 2w)
    """
    upper_left, lower_left, upper_right, lower_right = patches.chunk(4)
    left, right = (upper_left, lower_left), (upper_right, lower_right)
    vertical = [torch.cat(pair, dim=2) for pair in (left, right)]
    horizontal = [torch.cat(pair, dim=3) for pair in zip(left, right)]
    return torch.cat(vertical), torch.cat(horizontal)


def variant_predict(model, patches):
    """FastMoCo.predict for montages, and with pairs combined after another stage (C.5)"""
    (encoder, projector, predictor), config = model.online, model.config
    if config.encode == "montage":
        v = montage(encoder, patches, config.grid)
        return predictor(projector(combine(v, config.grid**2, config.parts_combined)))
    steps = dict(input=nn.Identity(), stage1=encoder[:4], stage2=encoder[4], stage3=encoder[5])
    steps |= dict(final=encoder[6:], proj=projector, pred=predictor)  # stage1 begins with conv1
    branches = [patches]  # one, or those vertical and those horizontal
    for name, step in steps.items():
        branches = [step(x) for x in branches]
        if name == config.combine_at:
            late = name in ("proj", "pred")
            branches = [combine(branches[0])] if late else stitch(branches[0])
    return torch.cat(branches)  # (4N or 6N, C)


class Queue(nn.Module):
    """The last `size` keys, first in, first out (MoCo, sec. 3.2); random unit vectors at first."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))  # (K, C)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # to the oldest key

    @torch.no_grad()
    def enqueue(self, keys):
        """Replace the oldest keys by new ones, (N, C); of more than K keys the last K stay."""
        size = len(self.keys)
        slots = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.keys[slots[-size:]] = keys[-size:].to(self.keys.dtype)
        self.pointer.add_(len(keys)).remainder_(size)


def check_method(config):
    """UserError if the method's settings don't go together."""
    encode, size, grid = config.encode, config.image_size, config.grid
    if 0 < config.epochs < config.warmup_epochs:
        raise UserError(f"--warmup-epochs {config.warmup_epochs:g}: must be at most --epochs")
    if config.arch == "vit-tiny" and (encode, size, config.small_crops) != ("whole", 32, 0):
        raise UserError("--arch vit-tiny needs --encode whole --image-size 32 --small-crops 0")
    if encode != "whole" and size % grid:
        raise UserError(f"--image-size {size} must be a multiple of --grid {grid}")
    step = grid * (4 if config.arch == "resnet8" else 8)  # the encoder halves a map 2 or 3 times
    if encode == "montage" and size % step:
        raise UserError(f"--encode montage: --image-size must be a multiple of {step}, not {size}")
    if config.parts_combined > grid**2:
        raise UserError(f"--parts-combined {config.parts_combined}: of {grid**2} patches")
    plain = (encode, grid, config.parts_combined) == ("divide-combine", 2, 2)
    if config.combine_at != "final" and not plain:
        raise UserError("--combine-at is for pairs of 2x2 patches: --encode divide-combine")
    if config.full_crops < 2:
        raise UserError(f"--full-crops {config.full_crops}: two views at least")
    if encode.startswith("sample") and config.small_crops:
        raise UserError(f"--small-crops goes with views that are divided, not --encode {encode}")


# ---- plumbing: the same in every script, nothing about the method below this line ----
import argparse
import contextlib
import ctypes
import difflib
import hashlib
import io
import json
import os
import platform
import re
import shlex
import signal
import sys
import time
import typing
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch.distributed as dist
import torchvision
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.collect_env import run as ask
from torchvision.transforms.v2.functional import horizontal_flip_image as horizontal_flip
from torchvision.transforms.v2.functional import rgb_to_grayscale_image as grayscale
from tqdm import tqdm

FORMAT = "contrastive-cifar/1"
NOTEBOOK = sys.argv[0].endswith("kernel_launcher.py")
SOURCE = Path(__file__).read_text() if "__file__" in globals() else globals().get("In", [""])[-1]


class UserError(Exception):
    """Ends the script with one line on standard error and an exit code (2: the user can fix it)."""

    def __init__(self, message, code=2):
        message = " ".join(str(message).split())
        if NOTEBOOK:  # which has fields of Config instead of flags
            message = re.sub(r"--([\w-]*\w)", lambda m: f"Config.{m[1].replace('-', '_')}", message)
        super().__init__(message)
        self.code = code


# %% Image operations: batches (N, C, H, W) in [0, 1], random numbers for each image
def uniform(low, high, x, *shape):
    """Random numbers for each image of x, (N, *shape), drawn for the images of all processes: the
    views don't depend on their number.
    """
    n = len(x) * process_count()
    return shard(torch.empty(n, *shape, device=x.device).uniform_(low, high))


def sometimes(p, change, x):
    """Change each image with probability p."""
    return torch.where(uniform(0, 1, x, 1, 1, 1) < p, change(x), x) if p else x


def random_resized_crop(x, scale):
    """torchvision's RandomResizedCrop: a random part of each image, resized to the whole. Its area
    is uniform in scale, the log of its aspect ratio in ±log 4/3; of ten tries the first that fits.
    """
    size = x.shape[-1]
    area = size**2 * uniform(*sorted(scale), x, 10)  # (N, 10)
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), x, 10).exp()
    sides = torch.stack([area / ratio, area * ratio]).sqrt().round()  # (2, N, 10)
    fits = ((sides > 0) & (sides <= size)).all(0)  # (N, 10)
    first = fits.int().argmax(1).expand(2, len(x))[..., None]
    height, width = sides = torch.where(fits.any(1), sides.gather(2, first)[..., 0], size)  # (N,)
    top, left = (uniform(0, 1, x, 2).T * (size + 1 - sides)).floor()
    return separable(x, interpolation(top, height, size), interpolation(left, width, size))


def interpolation(start, length, size):
    """Matrices (N, size, size) that resize pixels start...start + length to size, bilinearly"""
    pixel = torch.arange(size, device=start.device)
    position = ((pixel + 0.5) * length[:, None] / size - 0.5).clamp(min=0)
    position = start[:, None] + torch.minimum(position, length[:, None] - 1)
    return (1 - (position[:, :, None] - pixel).abs()).clamp(min=0)


def separable(x, rows, columns):
    """rows @ x @ columns.T in each channel: (N, C, h, w), (N, H, h), (N, W, w) -> (N, C, H, W)"""
    x = x.flatten(1, 2) @ columns.mT  # (N, C*h, W)
    x = rows @ x.unflatten(1, (-1, rows.shape[2])).transpose(1, 2).flatten(2)  # (N, H, C*W)
    return x.unflatten(2, (-1, columns.shape[1])).transpose(1, 2)


def color_jitter(x, strength):
    """torchvision's ColorJitter of brightness, contrast, saturation and hue, in this order"""
    factor = [uniform(max(0, 1 - most), 1 + most, x, 1, 1, 1) for most in strength[:3]]
    x = (factor[0] * x).clamp(0, 1)
    x = torch.lerp(grayscale(x).mean((1, 2, 3), keepdim=True), x, factor[1]).clamp(0, 1)
    x = torch.lerp(grayscale(x), x, factor[2]).clamp(0, 1)
    return shift_hue(x, uniform(-strength[3], strength[3], x, 1, 1))


def shift_hue(x, turns):
    """Turn the hue, turns (N, 1, 1) in [-0.5, 0.5]. HSV in closed form: each channel is
    value - chroma * clamp(min(t, 4 - t), 0, 1), where t = (n + 6 hue) mod 6 and n = 5, 3, 1.
    """
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    over = 1 / torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == green, 2 + (blue - red) * over, 4 + (red - green) * over)
    hue = torch.where(value == red, (green - blue) * over, hue) + 6 * turns
    t = torch.stack([5 + hue, 3 + hue, 1 + hue], dim=1) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(t, 4 - t).clamp(0, 1)


def gaussian_blur(x):
    """A Gaussian of 0.1 to 2 pixels, cut off at 6, with reflected borders"""
    sigma, size, radius = uniform(0.1, 2.0, x, 1, 1), x.shape[-1], min(6, x.shape[-1] - 1)
    source = torch.arange(-radius, size + radius, device=x.device)
    distance = source - torch.arange(size, device=x.device)[:, None]  # (size, size + 2 radius)
    weight = (-0.5 * (distance / sigma) ** 2).exp() * (distance.abs() <= radius)
    weight = weight / weight.sum(2, keepdim=True)  # (N, size, size + 2 radius)
    return separable(F.pad(x, [radius] * 4, mode="reflect"), weight, weight)


def normalise(x, config):
    """Pixels in [0, 1] -> mean 0 and standard deviation 1, channels_last"""
    channels = zip(x.unbind(1), config.mean, config.std)
    return torch.stack([(c - mean) / std for c, mean, std in channels], dim=3).permute(0, 3, 1, 2)


# %% Data
BUILTIN = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}


def load_data(source, config):
    """source: a name in BUILTIN or an .npz file -> x_train (N, 3, S, S) uint8, y_train (N,),
    x_test, y_test (with --holdout, the images held out), about (the checkpoint's "data")
    """
    size, root, parts = config.image_size, config.data_dir, []
    try:
        arrays = read_torchvision(source, root) if source in BUILTIN else dict(np.load(source))
        for part in ("train", "test"):
            x, y = torch.from_numpy(arrays.pop(f"x_{part}")), arrays.pop(f"y_{part}")
            if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[3] != 3 or not len(x):
                raise ValueError(f"x_{part} is {x.dtype} {tuple(x.shape)}, not uint8 (N, H, W, 3)")
            if y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < 0 or y.max() > 99999:
                raise ValueError(f"y_{part} must hold a label, 0, 1, ..., for each image")
            x = x.permute(0, 3, 1, 2)
            if x.shape[2:] != (size, size):
                x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
            parts += [x, torch.from_numpy(y.astype(np.int64))]
        x, y, x_test, y_test = parts
        classes = [str(c) for c in arrays.get("classes", range(1 + max(y.max(), y_test.max())))]
        if len(classes) <= max(y.max(), y_test.max()):
            raise ValueError(f"only {len(classes)} names of classes")
    except Exception as error:  # a foreign file can raise anything, and so can a download
        ways = f"takes {', '.join(BUILTIN)} (online, or with the archive in {root}/), an .npz file"
        text = f"--data {source}: {error or type(error).__name__}"
        raise UserError(f"{text} ({ways}; pretraining also takes a folder of images)") from None
    if config.holdout:
        held, rest = stratified(y, config.holdout, "--holdout")
        x_test, y_test, x, y = x[held], y[held], keep_rows(x, rest), y[rest]
    if config.limit:
        some, _ = stratified(y, config.limit, "--limit")
        x, y = keep_rows(x, some), y[some]
    digest = hashlib.sha256()
    for part in (part for tensor in (x, y, x_test, y_test) for part in tensor.split(1000)):
        digest.update(part.contiguous().numpy())
    about = dict(name=config.data or source, file=source, sha256=digest.hexdigest())
    about |= dict(classes=classes, image_size=size, mean=list(config.mean), std=list(config.std))
    about |= dict(n_train=len(x), n_test=len(x_test), holdout=config.holdout)
    return SimpleNamespace(x_train=x, y_train=y, x_test=x_test, y_test=y_test, about=about)


def keep_rows(x, rows):
    """x[rows] in the memory of x; rows ascend"""
    for start, part in zip(range(0, len(rows), 1000), rows.split(1000)):
        x[start : start + len(part)] = x[part]
    return x[: len(rows)]


def read_torchvision(name, root):
    """One of torchvision's data sets, downloaded if missing, checksums verified -> arrays"""
    cifar, arrays = name.startswith("cifar"), {}
    for part in ("train", "test"):
        which = {"train": part == "train"} if cifar else {"split": part}
        data = getattr(torchvision.datasets, BUILTIN[name])(root, download=True, **which)
        arrays[f"x_{part}"] = data.data if cifar else data.data.transpose(0, 2, 3, 1)
        arrays[f"y_{part}"] = np.asarray(data.targets if cifar else data.labels)
        arrays["classes"] = getattr(data, "classes", range(10))
    return arrays


def cache_folder(path, root, size):
    """Resize the images in <path>/train/<class>/ and test/ (or val/) -> an .npz file in root"""
    test = "test" if (path / "test").exists() else "val"
    kinds, files, arrays = torchvision.datasets.folder.IMG_EXTENSIONS, {}, {}
    for part, folder in (("train", path / "train"), ("test", path / test)):
        found = sorted(folder.glob("[!.]*/[!.]*"))  # hidden ones are left out
        files[part] = [file for file in found if file.suffix.lower() in kinds]
    classes, others = (sorted({file.parent.name for file in found}) for found in files.values())
    if not classes or classes != others:
        layout = f"needs images in train/<class>/ and {test}/<class>/, of the same classes"
        raise UserError(f"--data {path}: {layout}; found {classes[:3]}... and {others[:3]}...")
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sum(files.values(), [])]
    key = hashlib.sha256(repr(stats).encode()).hexdigest()[:12]
    cache = Path(root) / f"{path.resolve().name}-{size}px-{key}.npz"
    if not cache.exists():
        for part, found in files.items():
            arrays[f"y_{part}"] = [classes.index(file.parent.name) for file in found]
            arrays[f"x_{part}"] = images = np.empty((len(found), size, size, 3), np.uint8)
            for i, file in enumerate(tqdm(found, f"{part} images", disable=None)):
                try:
                    image = torchvision.datasets.folder.default_loader(file)
                except Exception as error:  # a foreign file can raise anything
                    raise UserError(f"{file} is not a readable image: {error}") from None
                images[i] = image.resize((size, size))
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, lambda file: np.savez(file, classes=classes, **arrays))
    return str(cache)


def stratified(labels, n, flag):
    """A fixed choice of n images, equally many per class -> their indices, and the others'"""
    if not n <= len(labels) - (flag == "--holdout"):
        raise UserError(f"{flag} {n}: there are only {len(labels)} training images")
    order = labels.argsort(stable=True)
    place = torch.cat([torch.arange(count) for count in labels.bincount()])  # within its class
    order = order[place.argsort(stable=True)]  # the first of every class, the second of every...
    return order[:n].sort().values, order[n:].sort().values


# %% Features, and how good they are without any training
def unit(x):
    """Rows scaled to length 1, (N, C), in float32 if they come in a shorter type"""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


@torch.no_grad()
def extract_features(encoder, images, config, autocast, batch=1000):
    """Features of plain images, the encoder in eval mode: (N, 3, H, W) uint8 -> (N, D) float32"""
    device, training, features = next(encoder.parameters()).device, encoder.training, []
    encoder.eval()
    for part in images.split(batch):
        with autocast():
            features.append(encoder(normalise(part.to(device) / 255, config)).float())
    encoder.train(training)
    return torch.cat(features)


def knn_predict(features, bank, bank_labels, classes, k, temperature):
    """Weighted k-nearest-neighbour vote by cosine similarity (Wu et al. 2018, sec. 3.4).

    features (N, D), bank (M, D), normalised here; bank_labels (M,) -> class scores (N, classes)
    """
    similarity = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T  # (N, M)
    similarity, nearest = similarity.topk(k, dim=1)  # (N, k)
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # exp(s / T) but for a factor
    return weight.new_zeros(len(weight), classes).scatter_add_(1, bank_labels[nearest], weight)


def knn_accuracy(encoder, data, config, autocast, temperature=0.1):
    """Top-1 accuracy in [0, 1] on the test images, with all training images as the bank"""
    bank = extract_features(encoder, data.x_train, config, autocast)
    h = extract_features(encoder, data.x_test, config, autocast)
    vote = bank, data.y_train.to(h.device), len(data.about["classes"]), config.knn_k, temperature
    predicted = [knn_predict(part, *vote).argmax(1) for part in h.split(1000)]
    return float((torch.cat(predicted).cpu() == data.y_test).double().mean())


# %% Checkpoints
def write_atomic(path, content, previous=None):
    """Write bytes, or let a function write, then rename: a crash never leaves half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)  # keeps the old one
        os.replace(temporary, path)
    except OSError as error:  # a full disk doesn't say where
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, checkpoint, previous=None):
    """Write it atomically, with tensors on the CPU; UserError with 3 if one is not finite."""
    checkpoint = tree_map_only(torch.Tensor, torch.Tensor.cpu, checkpoint)
    if not all(x.isfinite().all() for x in tree_leaves(checkpoint) if isinstance(x, torch.Tensor)):
        raise UserError("training diverged, loss or weights not finite: lower --lr, --restart", 3)
    torch.save(checkpoint, buffer := io.BytesIO())
    write_atomic(path, buffer.getbuffer(), previous)


def load_checkpoint(path):
    """The checkpoint in a file -> dict, on the CPU; UserError if it isn't a whole one"""
    needed = set("format method epoch epochs config data arch width dim encoder".split())
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load doesn't look at the checksums
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not needed <= dict(checkpoint).keys() or checkpoint["format"] != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
    except Exception as error:  # a foreign file can raise anything
        why = error if type(error) in (ValueError, FileNotFoundError) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({why})") from None
    return checkpoint


# %% Devices and processes: torchrun starts several; with one, these helpers do nothing
def start_device(config):
    """The device, and its fastest dtype unless --precision names one"""
    name, fast, rank = config.device, "fp32", os.environ.get("LOCAL_RANK")
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("cuda") and rank:
        name = f"cuda:{rank}"  # one GPU per process
    try:
        (probe := torch.zeros(1, device=name)).item()
        device = probe.device
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name} is not available on this machine") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        fast = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"  # a T4 has no bf16
    elif device.type == "cpu":
        fast = "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "fp32"
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return device, types[fast if config.precision == "auto" else config.precision]


def join_processes(device):
    """Meet the processes that torchrun started, if it did."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        # they meet in seconds (torchrun notices if one dies), but reading a folder can take hours
        meet = timedelta(seconds=600 if dist.is_torchelastic_launched() else 18)
        work, later = timedelta(days=7), hasattr(dist, "set_timeout")  # older torch has but one
        store, rank, size = next(dist.rendezvous("env://", timeout=meet))
        own = dict(device_id=device) if device.type == "cuda" else {}
        own |= dict(store=store, rank=rank, world_size=size, timeout=meet if later else work)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **own)
        store.set_timeout(work)
        getattr(dist, "set_timeout", bool)(work)


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(batch):
    """This process's rows of the whole batch"""
    return batch.chunk(process_count())[dist.get_rank()] if dist.is_initialized() else batch


def gather(rows):
    """The rows of all processes, in order. Gradients reach only a process's own rows: the gradient
    of a loss of all rows is the *sum* of what the processes have.
    """
    if not dist.is_initialized():
        return rows
    own = rows.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(process_count())]
    dist.all_gather(parts, own)
    parts[dist.get_rank()] = rows
    return torch.cat(parts)


def sum_over_processes(tensors, divisor=1):
    """Replace each tensor by its sum over the processes / divisor, in one message."""
    if dist.is_initialized() and tensors:
        dist.all_reduce(flat := torch.cat([tensor.flatten() for tensor in tensors]))
        parts = (flat / divisor).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors)])


def agree(action, here):
    """Run it where `here` is true -> the first process's result, in all; one's error ends all."""
    try:
        outcome = action() if here else None
    except Exception as error:
        outcome = error
    outcomes = [outcome] * process_count()
    if dist.is_initialized():
        dist.all_gather_object(outcomes, outcome)
    for error in (outcome for outcome in outcomes if isinstance(outcome, Exception)):
        raise error
    return outcomes[0]


class SharedOptimizer:
    """What train() calls optimizer: step() sums the gradients over the processes, undoes fp16's
    scale and clips; where fp16 overflowed, it changes nothing.
    """

    def __init__(self, optimizer, scaler, clip):
        self.optimizer, self.scaler, self.clip = optimizer, scaler, clip
        self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad
        # torch's fused SGD leaves them uninitialised if the very first fp16 step overflows
        for p in (p for group in self.param_groups for p in group["params"]):
            if isinstance(optimizer, torch.optim.SGD):
                optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))

    def step(self):
        learned = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        sum_over_processes([p.grad for p in learned])
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(learned, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def describe_machine(device, dtype, seed):
    """What a result depends on, for the record"""
    name = ask("grep -m1 'model name' /proc/cpuinfo | cut -d: -f2")[1] or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    folder = shlex.quote(os.path.dirname(globals().get("__file__", "")) or ".")
    machine = dict(device=f"{device} {name}", precision=str(dtype), threads=torch.get_num_threads())
    machine |= dict(torch=str(torch.__version__), python=platform.python_version(), seed=seed)
    machine["commit"] = ask(f"git -C {folder} describe --match=- --always --dirty --abbrev=40")[1]
    return machine | dict(started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def seed_of(*numbers):
    """One seed from several numbers, different for (0, 1) and (1, 0)"""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


# %% A run: its folder, what is saved there, and how it resumes
STATEFUL = "model", "optimizer", "scaler"
MAY_CHANGE = "out data data_dir device knn_every knn_k keep_every save_seconds compile restart"
OF_A_RUN = """pretrain.pt pretrain.jsonl last.pt prev.pt epoch*.pt knn.jsonl map*.npz neighbours.npz
    linear.* epoch*/linear.* random*/linear.* random*/epoch*/linear.* supervised*/linear.*
    probe*/linear.* probe*/epoch*/linear.* finetune*/linear.* finetune*/epoch*/linear.*"""


class Run:
    """Serves a training loop its images; measures, logs, saves, and resumes after a stop."""

    ends = contextlib.ExitStack()  # what main() undoes: the lock of the folder, signal handlers

    def __init__(self, config):
        self.config, self.out, self.recipe = config, Path(config.out), config
        self.again = "run it again" + ", without --restart" * config.restart
        self.device, self.dtype = start_device(config)
        # stop glibc from returning freed memory to the system: 1.28 times as fast (docs/race.md)
        with contextlib.suppress(OSError, AttributeError):  # another system, another library
            for option in ((-4, 0), (-1, -1), (-2, 64 << 20)):  # mmap, trim threshold, top pad
                ctypes.CDLL("libc.so.6").mallopt(*option)
        join_processes(self.device)
        self.is_main = not dist.is_initialized() or dist.get_rank() == 0  # the one that writes
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # on its machine: it fills the caches
        agree(self.load, first)
        agree(self.load, not first)
        if (n := len(self.images)) < max(config.batch_size, config.knn_k):
            raise UserError(f"--batch-size and --knn-k must be at most {n}, all training images")
        self.steps = len(self.images) // config.batch_size  # an epoch; the ragged rest is left out
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.loss = torch.zeros((), device=self.device)  # sum over this epoch's steps
        self.step, self.history, self.signal = 0, [], 0
        self.about = dict(format=FORMAT, kind="pretrain", method=METHOD, epochs=config.epochs)
        self.about |= dict(config=dataclasses.asdict(config), data=self.data.about, source=SOURCE)
        machine = describe_machine(self.device, self.dtype, config.seed)
        self.about |= dict(machine=machine | dict(processes=process_count()))
        torch.manual_seed(config.seed)  # for the weights, drawn next

    def load(self):
        source, size, n = self.config.data, self.config.batch_size, process_count()
        if size % n or size < 2 * n:
            raise UserError(f"--batch-size {size} must be {2 * n}, {3 * n}, ... (processes: {n})")
        check_method(self.config)
        if source not in BUILTIN and Path(source).is_dir():
            source = cache_folder(Path(source), self.config.data_dir, self.config.image_size)
        self.data = load_data(source, self.config)
        self.data.x_train = self.images = self.data.x_train.to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def compiled(self, function):
        return torch.compile(function, dynamic=False) if self.config.compile else function

    def start(self, model, online, optimizer, chance, clip=0.0):
        """Move the model to the device, take the folder, and resume from the state in it, if any.

        online: the part that learns, [0] its encoder and [1] its head; chance: the loss of
        guessing; clip: the largest norm of the gradient, 0: no limit -> the optimizer to use
        """
        self.model = model.to(self.device, memory_format=torch.channels_last)
        if self.config.compile:
            self.model.compile(dynamic=False)  # in place: the names of the weights stay
        self.encoder, self.head, self.compared = online[0], online[1], online[:2]
        self.about["chance"], self.warned, self.optimizer = chance, set(), optimizer
        self.clock = self.saved = time.monotonic()
        # the first process reads for all: what is in the folder changes as soon as one saves
        if found := agree(self.take_folder, self.is_main):
            self.restore(*found)
        else:
            self.save("last.pt")  # shows now whether the folder can be written
        for number in (signal.SIGINT, signal.SIGTERM):
            self.ends.callback(signal.signal, number, signal.signal(number, self.on_signal))
        if self.is_main:
            data, machine = self.data.about, self.about["machine"]
            print(f"{METHOD} on {data['n_train']} images of {data['name']}, into {self.out}/")
            print(f"{machine['device']}, threads: {machine['threads']}, {machine['precision'][6:]}")
            n, each = self.config.epochs * self.steps, f"{self.steps} per epoch"
            print(f"steps {self.step} to {n}, {each}; a loss of {chance:.2f} is chance", flush=True)
        return SharedOptimizer(optimizer, self.scaler, clip)

    def take_folder(self):
        """Lock the folder -> the newest whole checkpoint in it and its path, or None"""
        self.out.mkdir(parents=True, exist_ok=True)
        lock, trouble = self.ends.enter_context(open(self.out / ".lock", "a")), None
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.out}: in use by {Path(lock.name).read_text()}") from None
        except (OSError, ImportError):  # some network drives, Windows
            print(f"warning: {self.out} can't be locked: start no second run there")
        lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
        restart = self.config.restart and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        for pattern in ("*.[0-9]*.tmp", *OF_A_RUN.split() * restart):  # not if torchrun restarts
            for path in self.out.glob(pattern):
                path.unlink()
        names = "pretrain.pt", "last.pt", "prev.pt"
        for path in filter(Path.exists, (self.out / name for name in names)):
            try:
                found = load_checkpoint(path), path
                if trouble:
                    print(f"warning: {trouble}; resuming from {path.name}", file=sys.stderr)
                    path.replace(self.out / "last.pt")  # or the next save would overwrite it
                return found
            except UserError as error:
                trouble = trouble or error
        if trouble:
            raise UserError(f"{trouble}, and no earlier state is left: --restart starts over")

    def restore(self, saved, path):
        """Take over the state of a checkpoint, if it has the same settings and images."""
        # a setting that is newer than the run has its default there
        old = dataclasses.asdict(Config()) | saved["config"] | {"images": saved["data"]["sha256"]}
        new = self.about["config"] | {"images": self.data.about["sha256"]}
        if changed := [k for k in new if old[k] != new[k] and k not in MAY_CHANGE.split()]:
            changed = ", ".join(f"{k} {str(old[k])[:9]} -> {str(new[k])[:9]}" for k in changed)
            changed = f"{self.out} holds a run with other settings ({changed})"
            raise UserError(f"{changed}: choose another --out, or --restart")
        if path.name == "pretrain.pt":
            last = [describe_epoch(row, saved["epoch"]) for row in saved["history"]][-1:]
            raise UserError(f"{path} is complete: {' '.join(last) or 'no epochs'}", 0)
        try:
            state = saved["train_state"]
            for part in filter(state.__getitem__, STATEFUL):  # a scaler's is empty but in fp16
                getattr(self, part).load_state_dict(state[part])
            self.loss.copy_(state["loss"])
            self.step, self.history = state["step"], saved["history"]
            self.clock -= saved["machine"]["seconds"]
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a state of this run ({error})") from None
        old, new = old | saved["machine"], new | self.about["machine"]
        keys = ("device", "precision", "threads", "processes", "torch", "compile")
        if (other := [k for k in keys if old[k] != new[k]]) and self.is_main:
            print(f"note: {', '.join(other)} changed: resuming, but not bit for bit")

    def save(self, name):
        """Write a checkpoint (docs/checkpoint.md) and the log."""
        config, self.about["machine"]["seconds"] = self.config, time.monotonic() - self.clock
        checkpoint = self.about | dict(epoch=self.step // self.steps, history=self.history)
        checkpoint |= dict(encoder=self.encoder.state_dict(), head=self.head.state_dict())
        checkpoint |= dict(arch=config.arch, width=config.width, dim=self.encoder.dim)
        if name == "last.pt":
            state = {part: getattr(self, part).state_dict() for part in STATEFUL}
            checkpoint["train_state"] = state | dict(step=self.step, loss=self.loss)
        elif name == "pretrain.pt":
            checkpoint["gallery"] = self.gallery()
        agree(lambda: self.write(name, checkpoint), self.is_main)
        self.saved = time.monotonic()

    def write(self, name, checkpoint):
        """Write it in the main process. If the disk refuses, try again for a quarter of an hour."""
        for wait in (10, 100, 800, 0):
            try:
                old = self.out / "prev.pt" if name == "last.pt" else None
                save_checkpoint(self.out / name, checkpoint, old)
                return self.log()
            except OSError as error:
                message = f"{self.out / name} can't be written: {error.strerror}"
                if self.step == 0 or not wait:
                    raise UserError(message, 4 if self.step else 2) from None
                print(f"warning: {message}; trying again in {wait} s", file=sys.stderr)
                time.sleep(wait)

    def log(self):
        head = {key: self.about[key] for key in ("method", "config", "data", "machine")}
        rows = "".join(json.dumps(row) + "\n" for row in (head, *self.history))
        write_atomic(self.out / "pretrain.jsonl", rows.encode())

    def gallery(self):
        """For figures: some images, two views of each, and the cosines between all these views"""
        torch.manual_seed(seed_of(self.config.seed, "gallery"))
        rows, cosines = torch.randperm(len(self.images))[:256], {}
        images, labels = self.images[rows.to(self.device)], self.data.y_train[rows]
        recipe = dataclasses.replace(self.recipe, mean=(0, 0, 0), std=(1, 1, 1))
        views = [(255 * augment(images, recipe)).round().to(torch.uint8) for _ in range(2)]
        for name, model in dict(backbone=self.encoder, head=self.compared).items():
            a, b = (extract_features(model, view, self.config, self.autocast) for view in views)
            cosines[name] = (unit(a) @ unit(b).T).half()  # [i, j]: view 1 of i with view 2 of j
        n = max(1, min(32, 400_000 // images[0].numel()))  # at most 1.2 MB of pixels
        images, views = images[:n].clone(), torch.stack([view[:n] for view in views])
        return dict(images=images, views=views, labels=labels, cosines=cosines)

    def on_signal(self, number, frame):
        if self.signal:  # the second time
            raise UserError(f"stopped at once; to resume from the last save, {self.again}", 130)
        self.signal = number
        with contextlib.suppress(RuntimeError):  # raised if it interrupts another print
            if self.is_main:
                print("stopping soon; a second signal stops at once", flush=True)

    def batches(self):
        """Yield epoch, images (N, 3, H, W) uint8 for all steps that are left; then pretrain.pt."""
        config, first, total = self.config, self.step, self.config.epochs * self.steps
        self.bar = tqdm(total=total, initial=first, unit="step", disable=not self.is_main or None)
        statistics = [b for name, b in self.model.named_buffers() if ".running_" in name]
        for epoch in range(first // self.steps, config.epochs):
            generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
            order = torch.randperm(len(self.images), generator=generator).to(self.device)
            for rows in order.split(config.batch_size)[self.step % self.steps : self.steps]:
                if process_count() == 1 or self.step % 10 == 0:
                    self.check_clock()
                # all that is random in a step follows from its number: nothing else can disturb it
                torch.manual_seed(seed_of(config.seed, "step", self.step))
                self.rows = rows  # of the batch, in all processes
                yield epoch, self.images[shard(rows)]
                self.step += 1
                self.bar.update()
                if self.step == first + 10:
                    began = time.monotonic()
                elif self.step == first + 30 and self.is_main:
                    minutes = (time.monotonic() - began) / 20 * (total - self.step) / 60
                    self.bar.write(f"about {minutes:.1f} min to go")
                # the processes' mean, at fixed steps: no result may depend on when a state is saved
                if self.step % 10 == 0 or self.step % self.steps == 0:
                    sum_over_processes(statistics, process_count())
            self.finish_epoch(epoch + 1)
        self.bar.close()
        self.save("pretrain.pt")
        if self.is_main:
            for name in ("last.pt", "prev.pt"):
                with contextlib.suppress(OSError):  # the run is complete
                    (self.out / name).unlink()
            print(f"next: python linear_eval.py {shlex.quote(str(self.out))}")

    def record(self, loss):
        """Add the loss to the epoch's mean -> the loss, scaled if the precision is fp16"""
        self.loss += loss.detach()
        return self.scaler.scale(loss)

    def check_clock(self):
        """Between steps: is it time to save, or to stop?"""
        due = [self.signal, time.monotonic() - self.saved > self.config.save_seconds]
        if dist.is_initialized():  # all processes must do the same
            dist.all_reduce(due := torch.tensor(due, device=self.device), dist.ReduceOp.MAX)
        stop, save = map(int, due)
        if save or stop:
            self.save("last.pt")
        if stop:
            raise UserError(f"stopped by signal {stop}, saved; to resume, {self.again}", 128 + stop)

    def finish_epoch(self, epoch):
        """Log it; measure the k-NN accuracy and keep a checkpoint when it is time."""
        config, left = self.config, self.config.epochs - epoch
        loss = float(self.loss) / self.steps  # until now training has not waited for the device
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step}: lower --lr, --restart", 3)
        self.bar.set_postfix(loss=f"{loss:.3f}")
        row = {"epoch": epoch, "loss": loss, "lr": self.optimizer.param_groups[0]["lr"]}
        z = unit(extract_features(self.compared, self.images[:1000], config, self.autocast))
        row["spread"] = float(z.std(0).mean() * z.shape[1] ** 0.5)  # 1: on all the sphere
        if not left or config.knn_every and epoch % config.knn_every == 0:
            row["knn_top1"] = knn_accuracy(self.encoder, self.data, config, self.autocast)
        row["seconds"] = time.monotonic() - self.clock
        self.loss.zero_()
        self.history.append(row)
        if self.is_main:
            with contextlib.suppress(OSError):  # write() decides what a full disk means
                self.log()
            text = f", {row['seconds'] / epoch * left / 60:.1f} min left" if left else ""
            end = "  \r" if left and "knn_top1" not in row and NOTEBOOK else "\n"  # overwrites it
            self.bar.write(f"{describe_epoch(row, config.epochs)}{text}", end=end)
            sys.stdout.flush()  # for those who follow a log file
            self.warn()
        if config.keep_every and epoch % config.keep_every == 0 and left:
            self.save(f"epoch{epoch:04d}.pt")

    def warn(self):
        """Say once, in a line, that learning seems to fail."""
        row, knn = self.history[-1], [r["knn_top1"] for r in self.history if "knn_top1" in r][-4:]
        falling = len(knn) == 4 and knn == sorted(set(knn))[::-1] and knn[0] > knn[3] + 0.01
        stuck = row["loss"] > 0.99 * self.about["chance"]
        early = row["epoch"] <= 2 + getattr(self.config, "warmup_epochs", 0)
        signs = {
            "the loss is still at chance: try another --lr": stuck,
            "the features have collapsed: all images get nearly the same": row["spread"] < 0.1,
            "the k-NN accuracy has fallen three times in a row": falling,
        }
        for sign in {s for s, seen in signs.items() if seen and not early} - self.warned:
            self.bar.write(f"warning: {sign}", file=sys.stderr)
            self.warned.add(sign)


def describe_epoch(row, epochs):
    knn = f", k-NN {row['knn_top1']:.2%}" if "knn_top1" in row else ""
    return f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}{knn}"


# %% Command line
POSITIVE = """image_size std width head_hidden predictor_hidden dim grid parts_combined queue_size
    temperature bn_splits knn_k batch_size""".split()
SHARES = "crop_scale flip jitter gray blur key_momentum sgd_momentum labels lr_decay".split()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        near = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
        hint = f"did you mean {near[0]}?" if near else "--help shows the flags"
        raise UserError(f"{message} ({hint})")


def parse_config(argv=None):
    """Config from the command line; in a notebook, which has none, Config as it stands"""
    form = argparse.RawDescriptionHelpFormatter
    parser = group = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    if RECIPES:
        parser.add_argument("--recipe", choices=RECIPES, help="settings to start from")
    line = r"^    (?:# -- (.*)|(\w+):.*  # (.*))$"  # a group's title, or a field and its comment
    lines = SOURCE.rpartition("class Config:\n")[2].partition("\n\n\n")[0]
    for title, name, text in re.findall(line, lines, re.MULTILINE):
        if title:
            group = parser.add_argument_group(title)
            continue
        kind, default = Config.__annotations__[name], getattr(Config, name, None)
        if kind is list:
            parser.add_argument(name, nargs="*", default=argparse.SUPPRESS, help=text)
            continue
        how = {"type": kind, "metavar": getattr(kind, "__name__", "").upper()}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            how = {"type": lambda text: tuple(map(float, text.split(","))), "metavar": "X,..."}
        elif choices := typing.get_args(kind):
            how = {"choices": choices}
        how |= dict(default=argparse.SUPPRESS, help=f"{text} [{default}]".replace("%", "%%"))
        group.add_argument(f"--{name.replace('_', '-')}", **how)
    flags = vars(parser.parse_args([] if argv is None and NOTEBOOK else argv))
    recipe = flags.pop("recipe", None) or flags.get("mode")  # a mode can have one of its name
    return check_config(Config(**RECIPES.get(recipe, {}) | flags))


def check_config(config):
    """UserError if a value is not one of its choices, not a number, or out of range."""
    for field in dataclasses.fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        values, choices = np.atleast_1d(value), typing.get_args(kind)
        least = 0 if name not in POSITIVE else 1 if kind is int else 1e-9
        most = 1 if name in SHARES else 2**31 - 1
        fits = values.dtype.kind in ("iu" if kind is int else "iuf")  # a notebook's may not
        if choices and value not in choices:
            must = f"one of {', '.join(choices)}"
        elif kind is tuple and name != "lr" and len(values) != len(field.default):
            must = f"{len(field.default)} numbers, such as {','.join(map(str, field.default))}"
        elif kind in (int, float, tuple) and not (fits and all(least <= v <= most for v in values)):
            must = f"from {least} to {most}"
        else:  # plain types: with NumPy's or a Path, a checkpoint would be unreadable
            plain = {tuple: values.tolist(), list: map(str, values)}.get(kind, value)
            setattr(config, name, plain if choices else kind(plain))
            continue
        raise UserError(f"--{name.replace('_', '-')} {','.join(map(str, values))}: must be {must}")
    return config


def main(argv=None):
    """Pretrain as the command line says -> exit code"""
    try:
        train(config := parse_config(argv), Run(config))
        return 0
    except (UserError, OSError) as error:
        message, code = error, getattr(error, "code", 2)
    except KeyboardInterrupt:
        message, code = "stopped before the first step", 130
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if full or "DefaultCPUAllocator" in str(error):
            message, code = "out of memory: lower --batch-size or set --limit (fewer images)", 2
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            message, code = "another process ended; the same command resumes", 1
        else:
            raise
    finally:
        Run.ends.close()
        if dist.is_initialized():
            time.sleep(0.1)  # torch 2.6 hangs if a thread of gloo has not yet let go of a tensor
            dist.destroy_process_group()
    print(f"error: {message}" if code else message, file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__" and (code := main()):
    UserError._render_traceback_ = lambda error: [str(error)]  # in a notebook: not a traceback
    raise SystemExit(code) if "__file__" in globals() else UserError("see the error above", code)
