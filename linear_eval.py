"""What are the features worth? Train a linear classifier on them and keep the encoder frozen.

Pretraining saw no labels. This second training takes the encoder of a checkpoint as it is and
learns one linear layer from its features to the classes. The encoder gets no gradient, stays in
eval mode, and is compared bit for bit afterwards: the accuracy is due to its features alone.

    images --encoder (frozen, eval mode)--> features (N, D) --linear--> logits --> cross-entropy
             computed once                                    ^ the only thing that learns

No learning rate suits every encoder: larger features make larger gradients and need a smaller one.
MoCo's own probe uses 30. That is nearly best on the synthetic shapes of `make demo`, but too high
for short runs on CIFAR-10: the logits (class scores) grow huge, and the test loss exceeds that of
guessing, ln 10. So by default eight learning rates are tried on 90% of the training images, and the
one that does best on the other 10% trains a new layer on all.

Two more modes ask other questions. Quoting their accuracies as "linear" is a common mistake:

    probe       the encoder is frozen: what are its features worth?
    finetune    all weights learn, starting from the checkpoint: is it a good place to start?
    supervised  all weights learn, starting untrained: what do the labels alone give?

With --labels 0.1 each mode learns from the same tenth of the labels. Accuracies are those of the
last epoch on the test set, and nothing is chosen by them: to compare settings, pretrain with
--holdout 5000. Top-5: the label is among the five largest logits; of 10 classes, 50% by chance.

    python linear_eval.py runs/moco                     # the best of eight learning rates
    python linear_eval.py runs/moco --recipe demo       # MoCo's own probe, learning rate 30
    python linear_eval.py runs/moco --init random       # the baseline: an untrained encoder
    python linear_eval.py runs/moco --mode finetune --labels 0.1    # compare --mode supervised
    python linear_eval.py runs/moco/epoch*.pt runs/moco  # kept by --keep-every, and the last one

Writes linear.pt (the second checkpoint) and linear.jsonl (its log). A plain probe puts them beside
the first checkpoint, anything else into a subfolder, such as random/, finetune-0.1/, epoch0010/.
"""

# %%
import copy
import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer, resnet


# %% Config: each field becomes a flag --like-this, and its comment the help text
@dataclasses.dataclass
class Config:
    checkpoints: list = dataclasses.field(default_factory=list)  # folders or files [the newest run]
    # -- what to measure
    mode: Literal["probe", "finetune", "supervised"] = "probe"  # what learns, see above
    init: Literal["pretrained", "random"] = "pretrained"  # random: an untrained encoder, to compare
    augment: bool = False  # new random crops and flips each epoch instead of features computed once
    crop_scale: tuple = (0.08, 1.0)  # smallest and largest share of the area that a crop keeps
    # -- data
    data: str = ""  # images to use instead of the checkpoint's: cifar10, ..., or an .npz file
    data_dir: str = ""  # folder for downloads; "": as in pretraining
    limit: int = 0  # number of training images, equally many of each class; 0: as in pretraining
    labels: float = 1.0  # share of the training labels to use, equally many of each class
    holdout: int = 0  # evaluate on this many training images, held out; 0: as in pretraining
    # -- optimisation
    epochs: int = 100  # passes over the labelled images
    batch_size: int = 256  # images per step
    optimizer: Literal["sgd", "lars", "adam"] = "sgd"  # LARS: layer-wise step sizes
    lr: tuple = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # initial; of several, the best wins
    encoder_lr: float = 1.0  # encoder's learning rate as a share of lr, except in probes; 0: frozen
    sgd_momentum: float = 0.9  # momentum of SGD and LARS
    nesterov: bool = False  # Nesterov's momentum in SGD
    weight_decay: float = 0.0  # weight decay
    schedule: Literal["cosine", "step"] = "step"  # step: x lr_decay at 60% and 80% of the epochs
    lr_decay: float = 0.1  # factor of the step schedule; 1: a constant learning rate
    # -- run
    out: str = ""  # folder for linear.pt; "": the checkpoint's, or finetune-0.1/ and so on in it
    seed: int = 0  # random seed of classifier, order of images, choice of labels, untrained encoder
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the encoder


# usual for training a ResNet on CIFAR with labels
WITH_LABELS = dict(augment=True, crop_scale=(0.2, 1.0), batch_size=128, schedule="cosine")
WITH_LABELS |= dict(nesterov=True, weight_decay=5e-4)
# Fast-MoCo, supplementary B.3. Its "5e2", the classifier's learning rate, is read as 5e-2
SEMI = dict(mode="finetune", lr=(5e-2,), batch_size=256, nesterov=True, lr_decay=0.2, augment=True)

RECIPES = {
    "default": {},  # Config as it stands: the best of several learning rates
    "demo": dict(lr=(30.0,)),  # MoCo's probe (v1, sec. 4.1), without its crops and flips
    # "Fine-tuning Momentum Contrast on Image Classification"; its schedule is not stated
    "report": dict(lr=(10.0,), batch_size=128),
    # Fast-MoCo, supplementary, Table 2, without its crops and flips (--augment adds them)
    "fast-moco": dict(optimizer="lars", lr=(0.8,), batch_size=4096, epochs=90, schedule="cosine"),
    # "Contrastive Self-Supervised Image Classification using SimCLR": "a similar training setup"
    "simclr-report": dict(labels=0.1, epochs=50, batch_size=200, augment=True)
    | dict(optimizer="adam", lr=(1e-3,), weight_decay=1e-5, lr_decay=1.0),
    "semi-1": SEMI | dict(labels=0.01, epochs=60, encoder_lr=0.0),
    "semi-10": SEMI | dict(labels=0.1, epochs=20, encoder_lr=1e-6 / 5e-2),
    # what --mode finetune and --mode supervised start from
    "finetune": dict(mode="finetune", lr=(0.05,), epochs=50) | WITH_LABELS,
    "supervised": dict(mode="supervised", lr=(0.1,), epochs=100) | WITH_LABELS,
}


# %% The encoder, as it comes out of a checkpoint
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


# %% What the classifier learns from
def encoder_learns(config):
    return config.mode != "probe" and config.encoder_lr > 0


def prepare(encoder, data, config, autocast):
    """Data on the device, with features (N, D) in place of images that look the same each epoch."""
    device = next(encoder.parameters()).device
    data = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(data).items()}
    if not encoder_learns(config):
        for part in ("x_test",) if config.augment else ("x_test", "x_train"):
            data[part] = extract_features(encoder, data[part], config, autocast)
    return SimpleNamespace(**data)


def features_of(encoder, x, config, autocast):
    """Features (N, D) of a training batch: images (N, 3, H, W) uint8, or already features (N, D)"""
    if x.ndim == 2:
        return x
    x = random_crop(x / 255, config.crop_scale) if config.augment else x / 255
    with autocast():  # no gradient reaches a frozen encoder: load_encoder() has seen to that
        return encoder(normalise(x, config)).float()


# %% The classifier
class LARS(torch.optim.Optimizer):
    """SGD with momentum, each layer's step in proportion to |w| (You et al., arXiv:1708.03888):

        v <- momentum v + lr r (grad + decay w),   r = trust |w| / (|grad| + decay |w|)
        w <- w - v

    Vectors (biases, batch norm) have r = 1 and no decay; r is also 1 where w or grad is 0.
    torch._foreach_ functions take whole lists: a few kernel launches instead of some per tensor.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):  # overwrites the gradients
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if matrices := [w for w in weights if w.ndim > 1]:
                grads, decay = [w.grad for w in matrices], group["weight_decay"]
                w_norm, grad_norm = (torch.stack(torch._foreach_norm(x)) for x in (matrices, grads))
                ratio = group["trust"] * w_norm / (grad_norm + decay * w_norm)  # one per matrix
                ratio = torch.where((w_norm > 0) & (grad_norm > 0), ratio, 1.0)
                torch._foreach_add_(grads, matrices, alpha=decay)
                torch._foreach_mul_(grads, ratio.unbind())
            for w in weights:
                if not self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
            if v := [self.state[w]["momentum_buffer"] for w in weights]:
                torch._foreach_mul_(v, group["momentum"])
                torch._foreach_add_(v, [w.grad for w in weights], alpha=group["lr"])
                torch._foreach_sub_(weights, v)


def lr_factor(config, epoch):
    """The learning rate in an epoch, counted from 0, as a share of lr; never 0"""
    if config.schedule == "step":
        return config.lr_decay ** sum(epoch >= part * config.epochs for part in (0.6, 0.8))
    return 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


def make_optimizer(layers, encoder, config):
    """A group of parameters for each learning rate: each layer's, and the encoder's if it learns"""
    groups = [dict(params=layer.parameters(), lr=lr) for layer, lr in zip(layers, config.lr)]
    if encoder_learns(config):
        encoder.requires_grad_(True)
        groups.append(dict(params=encoder.parameters(), lr=config.encoder_lr * config.lr[0]))
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=config.weight_decay, fused=True)
    how = dict(lr=config.lr[0], momentum=config.sgd_momentum, weight_decay=config.weight_decay)
    if config.optimizer == "lars":
        return LARS(groups, **how)
    optimizer = torch.optim.SGD(groups, nesterov=config.nesterov, fused=True, **how)
    # torch's fused SGD leaves the momentum uninitialised if the very first fp16 step overflows
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def train_linear(encoder, data, config, autocast, scaler):
    """Train a linear layer, and the encoder if it learns too -> [layer], history: a row per epoch.
    With several learning rates: one layer for each, side by side, and no history.
    """
    y, history, start = data.y_train, [], time.monotonic()
    torch.manual_seed(config.seed)
    layer = nn.Linear(encoder.dim, len(data.about["classes"])).to(y.device)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in config.lr)
    optimizer = make_optimizer(layers, encoder, config)
    initial = [group["lr"] for group in optimizer.param_groups]
    encoder.train(encoder_learns(config))  # frozen: eval mode, so that batch norm stays as it is
    for epoch in (bar := tqdm(range(config.epochs), config.mode, unit="epoch", disable=None)):
        for group, lr in zip(optimizer.param_groups, initial):
            group["lr"] = lr * lr_factor(config, epoch)
        total = torch.zeros(len(layers), device=y.device)
        for rows in torch.randperm(len(y)).to(y.device).split(config.batch_size):
            h = features_of(encoder, data.x_train[rows], config, autocast)  # (N, D)
            losses = torch.stack([F.cross_entropy(layer(h), y[rows]) for layer in layers])
            scaler.scale(losses.sum()).backward()  # layers share no weights: each gets its own
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            total += losses.detach() * len(rows)
        seconds, text = time.monotonic() - start, f"{len(layers)} learning rates"
        if len(layers) == 1:
            lr, loss = config.lr[0] * lr_factor(config, epoch), total.item() / len(y)
            row = {"epoch": epoch + 1, "loss": loss, "lr": lr}
            row |= score(predict(encoder, layers[0], data.x_test, config, autocast), data.y_test)
            if not math.isfinite(row["loss"] + row["test_loss"]):
                raise UserError("training diverged, the loss is not finite: lower --lr", 3)
            history.append(row | {"seconds": seconds})
            text = f"loss {row['loss']:.4f}, top-1 {100 * row['top1']:.2f}%"
        bar.set_postfix_str(text)
        if bar.disable and (epoch + 1) % 10 == 0:  # no terminal
            left = seconds / (epoch + 1) * (config.epochs - epoch - 1)
            print(f"epoch {epoch + 1}/{config.epochs}: {text}, {left:.0f} s left", flush=True)
    return layers, history


def choose_lr(encoder, data, config, autocast, scaler):
    """Which of several learning rates is best on the training images in data.held? The test set
    has no part in it. -> the rate, and {"lr", "top1"} for each, with None for one that diverged
    """
    x, y, rates = data.x_train, data.y_train, []
    rest = SimpleNamespace(x_train=x[data.rest], y_train=y[data.rest], about=data.about)
    layers, _ = train_linear(encoder, rest, config, autocast, scaler)
    for lr, layer in zip(config.lr, layers):
        logits, labels = predict(encoder, layer, x[data.held], config, autocast), y[data.held]
        finite = logits.isfinite().all() and F.cross_entropy(logits, labels).isfinite()
        rates.append({"lr": lr, "top1": topk_accuracy(logits, labels)[0] if finite else None})
        print(f"lr {lr:g}:", f"top-1 {rates[-1]['top1']:.2%}" if finite else "diverged")
    if not (good := [row for row in rates if row["top1"] is not None]):
        raise UserError("training diverged at each learning rate: lower --lr", 3)
    best = max(good, key=lambda row: row["top1"])["lr"]  # the first of equals
    print(f"lr {best:g} is best on the {len(labels)} training images held out", flush=True)
    return best, rates


# %% How good it is
@torch.no_grad()
def predict(encoder, classifier, x, config, autocast):
    """Logits (N, classes) of images (N, 3, H, W), or of features (N, D)"""
    return classifier(x if x.ndim == 2 else extract_features(encoder, x, config, autocast))


def topk_accuracy(logits, labels, ks=(1, 3, 5)):
    """How often the label is among the k best: (N, classes), (N,) -> a fraction for each k"""
    if not logits.isfinite().all():  # nan would count as right
        raise UserError("training diverged, the logits are not finite: lower --lr", 3)
    best = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices  # (N, max k)
    hit = best == labels[:, None]
    return [hit[:, :k].any(1).sum().item() / len(labels) for k in ks]


def score(logits, labels):
    """(N, classes), (N,) -> accuracies as fractions, and the loss"""
    top = dict(zip(("top1", "top3", "top5"), topk_accuracy(logits, labels)))
    return top | {"test_loss": F.cross_entropy(logits, labels).item()}


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
import sys
import tempfile
import time
import typing
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torchvision
from torch.utils.collect_env import run as ask
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


# %% Image operations
def random_crop(x, scale):
    """A random part of each image, resized to the whole; half of them are flipped: (N, C, H, W).
    scale: range of the part's area, as a share of the image's. Each side is at most the image's.
    """

    def uniform(low, high):
        return torch.empty(len(x), device=x.device).uniform_(low, high)

    area, ratio = uniform(*sorted(scale)), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
    left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)  # of the centre
    flip, zero = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0), torch.zeros_like(area)
    # an affine map from the view's coordinates to the image's, both from -1 to 1
    rows = torch.stack([width * flip, zero, left]), torch.stack([zero, height, top])
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), x.shape, align_corners=False)
    edge = 1 - 1 / x.shape[-1]  # the centre of the outermost pixel: Apple's GPUs pad with 0 only
    return F.grid_sample(x, grid.clamp(-edge, edge), align_corners=False)


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


def stratified(labels, n, flag):
    """A fixed choice of n images, equally many per class -> their indices, and the others'"""
    if not n <= len(labels) - (flag == "--holdout"):
        raise UserError(f"{flag} {n}: there are only {len(labels)} training images")
    order = labels.argsort(stable=True)
    place = torch.cat([torch.arange(count) for count in labels.bincount()])  # within its class
    order = order[place.argsort(stable=True)]  # the first of every class, the second of every...
    return order[:n].sort().values, order[n:].sort().values


# %% Features
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


def find_checkpoint(path):
    """A checkpoint file, or the newest one in a run's folder."""
    path = Path(path)
    names = "pretrain.pt", "last.pt", "prev.pt"
    for file in [path / name for name in names] if path.is_dir() else [path]:
        if file.is_file():
            return file
    missing = "no pretrain.pt or last.pt in this folder" if path.is_dir() else "no such file"
    raise UserError(f"{path}: {missing}; pretrain first")


def newest_run():
    """The finished run to take if none is named"""
    files = sorted(Path("runs").rglob("pretrain.pt"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError("pretrain first, or name at least one run folder or checkpoint")
    print(f"no run is named: taking the newest one, {files[-1].parent}")
    return files[-1].parent


# %% Devices
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


def describe_machine(device, dtype, seed):
    """What a result depends on, for the record"""
    name = ask("grep -m1 'model name' /proc/cpuinfo | cut -d: -f2")[1] or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    folder = shlex.quote(os.path.dirname(globals().get("__file__", "")) or ".")
    machine = dict(device=f"{device} {name}", precision=str(dtype), threads=torch.get_num_threads())
    machine |= dict(torch=str(torch.__version__), python=platform.python_version(), seed=seed)
    machine["commit"] = ask(f"git -C {folder} describe --match=- --always --dirty --abbrev=40")[1]
    return machine | dict(started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


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


# %% From a checkpoint to its result
def load_encoder(file, seed=None):
    """A checkpoint, and its encoder, or with a seed an untrained one of its shape: in eval mode,
    without gradients, on the CPU
    """
    checkpoint = load_checkpoint(file)
    torch.manual_seed(seed or 0)
    encoder = build_encoder(checkpoint["arch"], checkpoint["width"])
    try:
        if seed is None:
            encoder.load_state_dict(checkpoint["encoder"])
    except (RuntimeError, TypeError, AttributeError):
        shape = f"{checkpoint['arch']} of width {checkpoint['width']}"
        raise UserError(f"{file}: its weights are not those of a {shape}") from None
    return checkpoint, encoder.requires_grad_(False).eval()


def fingerprint(module):
    """A hash of every parameter and buffer, batch-norm statistics included."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def choose_labels(labels, share, seed):
    """The images whose labels are used, equally many of each class: (N,) -> their indices, sorted.
    Drawn by hashes: the same in every mode and on every machine, and 1% is a part of 10%.
    """
    n, classes = len(labels), len(labels.unique())
    each = round(share * n / classes)
    if share == 1:
        return torch.arange(n)
    if each < 1:
        raise UserError(f"--labels {share:g}: of {n} images, less than one of each class")
    hashes = [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(n)]
    order = torch.tensor(sorted(range(n), key=lambda i: hashes[i]))
    some, _ = stratified(labels[order], min(each * classes, n), "--labels")
    return order[some].sort().values


def read_data(source, config, sha256):
    """The images whose labels are used, and if there are several learning rates, the indices of
    those `held` out to choose one. sha256: what the images must have, if that is known
    """
    data = load_data(source, config)
    if sha256 not in (None, data.about["sha256"]):
        why = "these are not the images of the pretraining (another sha256)"
        raise UserError(f"{source}: {why}; restore them, or name others with --data")
    if (classes := len(data.about["classes"])) < 2:
        raise UserError(f"--data {source}: has only one class, there is nothing to tell apart")
    rows = choose_labels(data.y_train, config.labels, config.seed)
    data.x_train, data.y_train = data.x_train[rows], data.y_train[rows]
    if len(config.lr) > 1:
        n = min(max(len(rows) // 10, 10 * classes), len(rows) // 2)  # of few, up to a half
        data.held, data.rest = stratified(data.y_train, n, "--labels")
    digest = hashlib.sha256(json.dumps(rows.tolist()).encode()).hexdigest()
    data.labels = {"n_labels": len(rows), "labels_sha256": digest}
    return data


def output_folder(file, kind, config):
    """The folder for linear.pt: --out, or the checkpoint's, or one in it that is named after what
    is not a plain probe of the last epoch: random, finetune, probe-0.1, probe-0.1/epoch0010
    """
    parts = ["random"] if config.init == "random" and config.mode != "supervised" else []
    parts += [config.mode] if config.mode != "probe" or config.labels < 1 else []
    parts += [f"{config.labels:g}"] if config.labels < 1 else []
    parts = parts or ["probe"] * (kind == "linear")  # that folder has, or is for, another linear.pt
    epoch = file.stem if file.stem.startswith("epoch") else ""  # one that --keep-every kept
    out = Path(config.out) if config.out else file.parent / "-".join(parts) / epoch
    if (out / "linear.pt").resolve() == file.resolve():
        raise UserError(f"--out {out}: would replace the checkpoint that is measured")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    return out


def learn(encoder, data, config, device, dtype):
    """Train and evaluate -> what a checkpoint says of it"""
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    scaled = dtype == torch.float16 and encoder_learns(config)
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    data, more = prepare(encoder, data, config, autocast), dict(data.labels)
    if len(config.lr) > 1:
        best, more["rates"] = choose_lr(encoder, data, config, autocast, scaler)
        config = SimpleNamespace(**vars(config) | {"lr": (best,)})
    (classifier,), history = train_linear(encoder, data, config, autocast, scaler)
    logits, labels = predict(encoder, classifier, data.x_test, config, autocast), data.y_test
    result, right = score(logits, labels), logits.argmax(1) == labels
    more |= {"n_test": len(labels), "lr": config.lr[0]}
    more["correct"] = {k: round(result[k] * len(labels)) for k in ("top1", "top3", "top5")}
    hits = [right[labels == c].tolist() for c in range(logits.shape[1])]
    more["per_class"] = [sum(h) / len(h) if h else None for h in hits]  # None: no image of it
    learned = dict(encoder=encoder.cpu().state_dict(), classifier=classifier.cpu().state_dict())
    learned |= dict(history=history, result=result | more)
    return learned | dict(encoder_sha256=fingerprint(encoder))


def report(result, config):
    """Print it, and a warning if the classifier is worse than guessing."""
    loss, lr, classes = result["test_loss"], result["lr"], len(result["per_class"])
    top = ", ".join(f"top-{k} {result[f'top{k}']:.2%}" for k in (1, 3, 5))
    print(f"{top}, loss {loss:.4f} on {result['n_test']} images", flush=True)
    if config.epochs and loss > math.log(classes):
        guess = f"that of guessing, ln({classes}) = {math.log(classes):.2f}"
        several = f"--lr {lr / 1e3:g},{lr / 100:g},{lr / 10:g}"
        remedy = f"lower --lr, now {lr:g} (a probe takes the best of several: {several})"
        print(f"warning: the test loss is above {guess}: {remedy}", file=sys.stderr)


def measure(file, config):
    """Measure a checkpoint -> the folder of its run"""
    seed = config.seed if config.init == "random" else None  # of an untrained encoder
    saved, encoder = load_encoder(file, seed)
    if "train_state" in saved:
        state = f"{file} is of epoch {saved['epoch']} of {saved['epochs']}"
        print(f"warning: {state}; for the final result, pretrain first", file=sys.stderr)
    about, before = saved["data"], saved["config"]
    own = dict(data=about["name"], limit=before["limit"], holdout=about["holdout"])
    given = {key: getattr(config, key) or own[key] for key in own}
    more = dict(checkpoints=[], data_dir=config.data_dir or before["data_dir"])
    config = dataclasses.replace(config, **given, **more)
    device, dtype = start_device(config)
    # stop glibc from returning freed memory to the system: 1.28 times as fast (docs/race.md)
    with contextlib.suppress(OSError, AttributeError):  # another system, another library
        for option in ((-4, 0), (-1, -1), (-2, 64 << 20)):  # mmap, trim threshold, top pad
            ctypes.CDLL("libc.so.6").mallopt(*option)
    settings = SimpleNamespace(**about | vars(config))  # with size, mean and std of the images
    source = about.get("file", about["name"]) if config.data == about["name"] else config.data
    data = read_data(source, settings, about.get("sha256") if given == own else None)
    same = about.get("sha256") in (None, data.about["sha256"])  # the run's own images?
    out = output_folder(file, saved.get("kind") if same else "linear", config)
    folder = str(file.parent if file.parent in (out, *out.parents) else out)

    encoder = encoder.to(device, memory_format=torch.channels_last)
    mark, start = fingerprint(encoder), time.monotonic()
    method = "random" if config.init == "random" else saved["method"]
    method = "supervised" if config.mode == "supervised" else method
    pretrain = {key: saved[key] for key in ("method", "epoch", "epochs", "config")}
    pretrain["encoder_sha256"] = mark
    head = dict(method=method, config=vars(config), data=data.about, pretrain=pretrain)
    with contextlib.suppress(UserError):  # there is no linear.pt, or it cannot be read
        done, same = load_checkpoint(out / "linear.pt"), head | {"source": SOURCE}
        if all(done.get(key) == same[key] for key in same):
            report(done["result"], config)
            print(f"already measured: to measure again, delete {out / 'linear.pt'}")
            return folder
    what = f"{method}, epoch {saved['epoch']} of {saved['epochs']}" if seed is None else "untrained"
    where = f"{data.labels['n_labels']} images of {config.data}"
    print(f"{config.mode} of {saved['arch']} ({what}) on {where}", flush=True)
    head["machine"] = machine = describe_machine(device, dtype, config.seed)
    learned = learn(encoder, data, settings, device, dtype)
    if learned["encoder_sha256"] != mark and not encoder_learns(config):
        raise UserError("the encoder has changed, so this was no probe; please report it", 3)
    machine["seconds"] = time.monotonic() - start
    report(learned["result"], config)
    rows = head, *learned["history"], {"result": learned["result"]}
    write_atomic(out / "linear.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    checkpoint = dict(format=FORMAT, kind="linear", **head, **learned, source=SOURCE)
    checkpoint |= dict(epoch=config.epochs, epochs=config.epochs, dim=encoder.dim)
    checkpoint |= dict(arch=saved["arch"], width=saved["width"])
    torch.save(checkpoint, buffer := io.BytesIO())
    write_atomic(out / "linear.pt", buffer.getbuffer())
    print(f"saved {out / 'linear.pt'}")
    return folder


def check_together(config):
    """UserError if settings do not go together."""
    wrong = {
        "--out goes with one checkpoint": config.out and len(config.checkpoints) > 1,
        "--lr: only --mode probe takes several": len(config.lr) > 1 and config.mode != "probe",
        "--nesterov needs --sgd-momentum": config.nesterov and not config.sgd_momentum,
        "--encoder-lr 0 needs mode finetune": config.mode == "supervised" and not config.encoder_lr,
    }
    for why in (why for why in wrong if wrong[why]):
        raise UserError(why)


def main(argv=None):
    """Measure each checkpoint -> exit code"""
    try:
        config = parse_config(argv)
        if config.mode == "supervised":
            config.init = "random"
        check_together(config)
        files = [find_checkpoint(path) for path in config.checkpoints or [newest_run()]]
        folders = [measure(file, config) for file in files]
        print("next: python plots.py", shlex.join(dict.fromkeys(folders)))
        return 0
    except (UserError, OSError) as error:
        message, code = error, getattr(error, "code", 4)
    except KeyboardInterrupt:
        message, code = "interrupted; the same command starts over", 130
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "DefaultCPUAllocator" not in str(error):
            raise
        message, code = "out of memory: lower --batch-size, set --limit, or use --device cpu", 2
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__" and (code := main()):
    UserError._render_traceback_ = lambda error: [str(error)]  # in a notebook: not a traceback
    raise SystemExit(code) if "__file__" in globals() else UserError("see the error above", code)
