"""What are the features worth? A linear classifier is trained on them, the encoder frozen.

Pretraining saw no labels. This second loop does: it takes the encoder of a checkpoint as it is,
feeds it the training images, and learns one linear layer from features to classes. It has no
gradient, is in eval mode, and is compared bit for bit afterwards: the accuracy is the features'.
That is also why a rate of 30 works: the problem is convex, and the features are small numbers.

    images --encoder (frozen, eval mode)--> features (N, D) --linear--> logits --> cross-entropy
             computed once                                    ^ the only thing that learns

Two more modes ask other questions. Quoting their figures as "linear" ones is a common mistake:

    probe       the encoder is frozen: what are its features worth?
    finetune    all weights learn on from the checkpoint: is it a good place to start from?
    supervised  the same from untrained weights: what do the labels alone give?

With --labels 0.1 each learns from the same tenth of the labels. What is reported is the last epoch
on the test set: nothing is chosen by looking at it. Settings are chosen on a holdout: pretrain and
probe with --holdout 5000. Of 10 classes, top-5 is 50 % by chance.

    python linear_eval.py runs/moco                     # 100 epochs, as MoCo's own probe
    python linear_eval.py runs/moco --recipe fast-moco  # LARS, large batches
    python linear_eval.py runs/moco --init random       # the same, encoder untrained
    python linear_eval.py runs/moco --lr 1,3,10,30 --holdout 5000    # the best rate, chosen there
    python linear_eval.py runs/moco --mode finetune --labels 0.1     # beside --mode supervised

Writes linear.pt (the second checkpoint) and linear.jsonl (its own log): a plain probe beside the
first, everything else into a folder there, such as random/ or finetune-0.1/.
"""

# %%
import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn


# %% Config: a flag --like-this is made from each field, and its comment is the help
@dataclasses.dataclass
class Config:
    checkpoints: list = dataclasses.field(default_factory=list)  # run folders or checkpoint files
    # -- what to measure
    mode: Literal["probe", "finetune", "supervised"] = "probe"  # what learns, see above
    init: Literal["pretrained", "random"] = "pretrained"  # random: an untrained encoder, to compare
    augment: bool = False  # crop and flip anew each epoch, in place of features computed once
    crop_scale: tuple = (0.08, 1.0)  # share of the image's area that such a crop keeps
    probe_every: int = 0  # measure the epochs kept by --keep-every too, every so many; 0: the last
    # -- data
    data: str = ""  # other data than the checkpoint's: cifar10, ..., a folder, an .npz file
    data_dir: str = "data"  # where downloads and caches are kept
    limit: int = 0  # train on so many images, equally many of each class; 0: as in pretraining
    labels: float = 1.0  # share of these images that is used, equally many of each class
    holdout: int = 0  # evaluate on so many training images kept back; 0: as in pretraining
    # -- optimisation
    epochs: int = 100  # passes over the labelled images
    batch_size: int = 256  # images a step
    optimizer: Literal["sgd", "lars", "adam"] = "sgd"  # LARS: steps in proportion to the weights
    lr: tuple = (30.0,)  # learning rate at the start; of several the best on the holdout is taken
    encoder_lr: float = 1.0  # finetune: the encoder's rate, as a share of lr; 0: it is frozen
    sgd_momentum: float = 0.9  # of SGD and LARS
    nesterov: bool = False  # of SGD: Nesterov's momentum
    weight_decay: float = 0.0  # on the weights
    schedule: Literal["cosine", "step"] = "step"  # step: x lr_decay at 60 % and 80 % of the epochs
    lr_decay: float = 0.1  # that factor; 1: a constant rate
    # -- run
    out: str = ""  # folder for linear.pt; "": the checkpoint's, or finetune-0.1/ and so on in it
    seed: int = 0  # of the classifier, the order, the choice of labels, and an untrained encoder
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the encoder


# usual for training a ResNet on CIFAR with labels
WITH_LABELS = dict(augment=True, crop_scale=(0.2, 1.0), batch_size=128, schedule="cosine")
WITH_LABELS |= dict(nesterov=True, weight_decay=5e-4)
# Fast-MoCo, supplementary B.3. Its exponents are damaged ("5e2"): read as 5e-2 and 1e-6
SEMI = dict(mode="finetune", lr=(5e-2,), batch_size=256, nesterov=True, lr_decay=0.2, augment=True)

RECIPES = {
    "demo": {},  # the defaults: MoCo's own linear probe (MoCo v1, sec. 4.1)
    # the course report on MoCo; its schedule is not stated
    "report": dict(lr=(10.0,), batch_size=128),
    # Fast-MoCo, supplementary, Table 2
    "fast-moco": dict(optimizer="lars", lr=(0.8,), batch_size=4096, epochs=90, schedule="cosine"),
    # the course report on SimCLR: "a similar training setup" to the pretraining's; for both modes
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
    """torchvision's ResNet without fc: (N, 3, H, W) -> (N, encoder.dim), with the stem for small
    images (SimCLR, appendix B.9). resnet8 has three stages of one block; width: of the first stage.
    """
    kind = torchvision.models.resnet50 if arch == "resnet50" else torchvision.models.resnet18
    with torch.device("meta"):  # costs nothing: every layer with weights is replaced
        net = kind(norm_layer=norm_layer)
    block, net.inplanes = type(net.layer1[0]), width
    net.conv1, net.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), norm_layer(width)
    net.maxpool, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Identity()
    depths = {"resnet8": (1, 1, 1), "resnet18": (2, 2, 2, 2)}.get(arch, (3, 4, 6, 3))
    for i, depth in enumerate(depths):
        stage = net._make_layer(block, width * 2**i, depth, stride=1 if i == 0 else 2)
        setattr(net, f"layer{i + 1}", stage)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    net.dim = net.inplanes
    return net


def load_encoder(checkpoint, random=False):
    """The encoder of a checkpoint, or an untrained one of its shape: frozen, in eval mode."""
    encoder = build_encoder(checkpoint["arch"], checkpoint["width"])
    try:
        encoder.load_state_dict(encoder.state_dict() if random else checkpoint["encoder"])
    except (RuntimeError, TypeError, AttributeError):
        shape = f"{checkpoint['arch']} of width {checkpoint['width']}"
        raise Halt(f"the weights in the checkpoint are not those of a {shape}") from None
    return encoder.requires_grad_(False).eval()


def crop_and_flip(images, config):
    """Random resized crops, half of them mirrored: (N, 3, H, W) uint8 -> float32 in [0, 1]"""
    n, size, device = len(images), images.shape[-1], images.device
    top, left, height, width = sample_crops(n, size, config.crop_scale, device)
    flip = torch.rand(n, device=device) < 0.5
    rows = interpolation(top, height, size, torch.zeros_like(flip))
    return separable(images / 255, rows, interpolation(left, width, size, flip))


# %% What the classifier learns from
def encoder_learns(config):
    return config.mode != "probe" and config.encoder_lr > 0


def prepare(encoder, data, config, autocast):
    """Data on the device, with features (N, D) in place of images wherever they stay the same"""
    device = next(encoder.parameters()).device
    data = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(data).items()}
    if not encoder_learns(config):
        for part in ("x_test",) if config.augment else ("x_test", "x_train"):
            data[part] = extract_features(encoder, data[part], config, autocast)
    return SimpleNamespace(**data)


def features_of(encoder, x, config, autocast):
    """Of a training batch: images (N, 3, H, W), or features (N, D) as they are -> (N, D)"""
    if x.ndim == 2:
        return x
    views = crop_and_flip(x, config) if config.augment else x / 255
    with autocast():  # no gradient reaches a frozen encoder: load_encoder() has seen to that
        return encoder(normalise(views, config)).float()


# %% The classifier
class LARS(torch.optim.Optimizer):
    """SGD with momentum, its steps in proportion to the weights (You et al., arXiv:1708.03888):

        v <- momentum v + lr r (grad + decay w),   r = trust |w| / (|grad| + decay |w|)
        w <- w - v

    Vectors (biases, batch norm) have r = 1 and no decay; r is 1 too where w or grad is 0.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                grad, decay = w.grad, group["weight_decay"]
                if w.ndim > 1:
                    w_norm, grad_norm = w.norm(), grad.norm()
                    ratio = group["trust"] * w_norm / (grad_norm + decay * w_norm)
                    ratio = torch.where((w_norm > 0) & (grad_norm > 0), ratio, 1.0)
                    grad = ratio * (grad + decay * w)
                v = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                v.mul_(group["momentum"]).add_(grad, alpha=group["lr"])
                w.sub_(v)


def rate_at(config, epoch):
    """The rate in an epoch, counted from 0, as a share of lr; the last one still learns"""
    if config.schedule == "step":
        return config.lr_decay ** sum(epoch >= part * config.epochs for part in (0.6, 0.8))
    return 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


def make_optimizer(layers, encoder, config):
    """One group of parameters for each rate: of each layer, and of the encoder if it learns"""
    groups = [dict(params=layer.parameters(), lr=lr) for layer, lr in zip(layers, config.lr)]
    if encoder_learns(config):
        encoder.requires_grad_(True)
        groups.append(dict(params=encoder.parameters(), lr=config.encoder_lr * config.lr[0]))
    decay, momentum = config.weight_decay, config.sgd_momentum
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=decay)
    if config.optimizer == "lars":
        return LARS(groups, lr=config.lr[0], momentum=momentum, weight_decay=decay)
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=decay, nesterov=config.nesterov)


def topk_accuracy(logits, labels, ks=(1, 3, 5)):
    """How often the label is among the k best: (N, classes), (N,) -> a fraction for each k"""
    if not logits.isfinite().all():  # nan would count as right
        raise Halt("training diverged, the logits are not finite: lower --lr", 3)
    best = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices  # (N, max k)
    hit = best == labels[:, None]
    return [hit[:, :k].any(1).sum().item() / len(labels) for k in ks]


def train_linear(encoder, data, config, autocast, scaler):
    """Train a linear layer, and the encoder if it learns too -> [layer], history: a row an epoch.
    For several rates in config.lr, as many layers side by side, and no history.
    """
    y, history, start = data.y_train, [], time.monotonic()
    torch.manual_seed(config.seed)
    layer = nn.Linear(encoder.dim, len(data.about["classes"])).to(y.device)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in config.lr)
    optimizer = make_optimizer(layers, encoder, config)
    rates = [group["lr"] for group in optimizer.param_groups]

    encoder.train(encoder_learns(config))  # frozen means eval mode: batch norm stands still too
    for epoch in (bar := tqdm(range(config.epochs), config.mode, unit="epoch", disable=None)):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * rate_at(config, epoch)
        total = torch.zeros(len(layers), device=y.device)
        for rows in torch.randperm(len(y)).to(y.device).split(config.batch_size):
            h = features_of(encoder, data.x_train[rows], config, autocast)  # (N, D)
            losses = torch.stack([F.cross_entropy(layer(h), y[rows]) for layer in layers])
            optimizer.zero_grad()
            scaler.scale(losses.sum()).backward()  # the layers share nothing: each gets its own
            scaler.step(optimizer)
            scaler.update()
            total += losses.detach() * len(rows)
        if len(layers) > 1:
            continue
        row = {"epoch": epoch + 1, "loss": total.item() / len(y)}
        row |= {"lr": config.lr[0] * rate_at(config, epoch)}
        row |= score(predict(encoder, layers[0], data.x_test, config, autocast), data.y_test)
        if not math.isfinite(row["loss"] + row["test_loss"]):
            raise Halt("training diverged, the loss is not finite: lower --lr", 3)
        history.append(row | {"seconds": time.monotonic() - start})
        bar.set_postfix(top1=f"{100 * row['top1']:.2f} %")
    return layers, history


def choose_rate(encoder, data, config, autocast, scaler):
    """Which of several rates is best on training images that are held out? The test set has no part
    in it. -> the rate, and for each {"lr", "top1"}, with None for one that diverged
    """
    x, y, rates = data.x_train, data.y_train, []
    part = SimpleNamespace(x_train=x[data.rest], y_train=y[data.rest], about=data.about)
    layers, _ = train_linear(encoder, part, config, autocast, scaler)
    for lr, layer in zip(config.lr, layers):
        logits = layer(x[data.held]).detach()
        whole = logits.isfinite().all() and F.cross_entropy(logits, y[data.held]).isfinite()
        rates.append({"lr": lr, "top1": topk_accuracy(logits, y[data.held])[0] if whole else None})
    if not (good := [row for row in rates if row["top1"] is not None]):
        raise Halt("training diverged at each rate: lower --lr", 3)
    return max(good, key=lambda row: row["top1"])["lr"], rates


@torch.no_grad()
def predict(encoder, classifier, x, config, autocast):
    """Logits (N, classes) of images (N, 3, H, W), or of features (N, D)"""
    return classifier(x if x.ndim == 2 else extract_features(encoder, x, config, autocast))


def score(logits, labels):
    """(N, classes), (N,) -> fractions right, and the loss"""
    top = dict(zip(("top1", "top3", "top5"), topk_accuracy(logits, labels)))
    return top | {"test_loss": F.cross_entropy(logits, labels).item()}


# ---- plumbing: the same in every script, nothing about the method below this line ----
import argparse
import contextlib
import ctypes
import hashlib
import inspect
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

FORMAT = "contrastive-cifar/1"
KEYS = set("method epoch epochs config data arch width dim encoder".split())


SOURCE = Path(__file__).read_text() if "__file__" in globals() else globals().get("In", [""])[-1]


class Halt(Exception):
    """Ends the script: one line on standard error, and the exit code (2: the user can mend it)."""

    def __init__(self, message, code=2):
        super().__init__(" ".join(str(message).split()))
        self.code = code


class Damaged(Halt):
    """A checkpoint that is none, or not whole."""


# %% Image operations
def sample_crops(n, size, scale, device="cpu"):
    """Random crops as torchvision's RandomResizedCrop draws them: area uniform in scale, log aspect
    ratio uniform, the first of ten tries that fits, else everything. -> top, left, height, width
    """
    area = size**2 * torch.empty(n, 10, device=device).uniform_(*scale)
    ratio = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    sides = torch.stack([area / ratio, area * ratio]).sqrt().round()  # (2, n, 10)
    fits = ((sides > 0) & (sides <= size)).all(0)  # (n, 10)
    first = fits.int().argmax(1).expand(2, n)[..., None]
    height, width = sides = torch.where(fits.any(1), sides.gather(2, first)[..., 0], size)
    top, left = (torch.rand(2, n, device=device) * (size + 1 - sides)).floor()
    return top, left, height, width  # (n,) each, pixels


def interpolation(start, length, size, flip):
    """Bilinear resizing of the pixels start...start + length to size pixels, mirrored where flip:
    (N,) each -> matrix (N, size, size). Clamped to the crop, or what lies outside bleeds in.
    """
    pixel = torch.arange(size, device=start.device)
    target = torch.where(flip[:, None], size - 1 - pixel, pixel)
    position = ((target + 0.5) * length[:, None] / size - 0.5).clamp(min=0)
    position = start[:, None] + torch.minimum(position, length[:, None] - 1)
    return (1 - (position[:, :, None] - pixel).abs()).clamp(min=0)


def separable(x, rows, columns):
    """rows @ x @ columns.T in each channel: (N, C, H, W), (N, H, H), (N, W, W) -> (N, C, H, W)"""
    x = x.flatten(1, 2) @ columns.mT  # (N, C*H, W)
    x = rows @ x.unflatten(1, (-1, rows.shape[1])).transpose(1, 2).flatten(2)  # (N, H, C*W)
    return x.unflatten(2, (-1, columns.shape[1])).transpose(1, 2)


def normalise(x, config):
    """Pixels (N, 3, H, W) in [0, 1] -> mean 0 and deviation 1, channels_last"""
    channels = zip(x.unbind(1), config.mean, config.std)
    return torch.stack([(c - mean) / std for c, mean, std in channels], dim=3).permute(0, 3, 1, 2)


# %% Data
BUILTIN = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}


def load_data(config):
    """-> x_train (N, 3, S, S) uint8, y_train (N,), x_test, y_test (the images held out, if any are)
    and about: what a checkpoint says of its data. Halt if --data names nothing of the kind.
    """
    size, name, parts = config.image_size, config.data, {}
    try:
        if name in BUILTIN:
            arrays = read_torchvision(BUILTIN[name], Path(config.data_dir))
        elif Path(name).is_dir():
            arrays = read_folder(Path(name), Path(config.data_dir), size)
        else:
            arrays = dict(np.load(name, allow_pickle=False))
        for part in ("train", "test"):
            x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
            if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
                raise ValueError(f"x_{part} is {x.dtype} {x.shape}, must be uint8 (N, H, W, 3)")
            if y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < 0 or y.max() > 99999:
                raise ValueError(f"y_{part} must be a whole number from 0 on for each image")
            x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
            if x.shape[2:] != (size, size):
                x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
            parts[part] = x, torch.from_numpy(y.astype(np.int64))
    except Halt:
        raise
    except Exception as error:  # a foreign file can raise anything
        known = (
            f"{', '.join(BUILTIN)}, a folder with train/<class>/* and test/<class>/*, or an .npz"
        )
        raise Halt(f"--data {name}: {error or type(error).__name__} (takes {known})") from None
    n_classes = 1 + max(int(y.max()) for _, y in parts.values())
    classes = [str(c) for c in np.ravel(arrays.get("classes", range(n_classes)))]
    if len(classes) < n_classes:
        raise Halt(f"--data {name}: {len(classes)} names of classes, {n_classes} classes")
    (x, y), (x_test, y_test) = parts["train"], parts["test"]
    if config.holdout:
        held, rest = stratified(y, config.holdout, "--holdout")
        x_test, y_test, x, y = x[held], y[held], x[rest], y[rest]
    if config.limit:
        some, _ = stratified(y, config.limit, "--limit")
        x, y = x[some], y[some]
    about = dict(name=name, classes=classes, image_size=size, n_train=len(x), n_test=len(x_test))
    about |= dict(mean=list(config.mean), std=list(config.std), holdout=config.holdout)
    digest = hashlib.sha256()
    for tensor in (x, y, x_test, y_test):
        digest.update(tensor.numpy())
    about["sha256"] = digest.hexdigest()
    return SimpleNamespace(x_train=x, y_train=y, x_test=x_test, y_test=y_test, about=about)


def read_torchvision(name, root):
    """One of torchvision's data sets, fetched when missing, checksums verified."""
    new, cifar, arrays = not root.exists(), name.startswith("CIFAR"), {}
    try:
        for part in ("train", "test"):
            which = {"train": part == "train"} if cifar else {"split": part}
            data = getattr(torchvision.datasets, name)(root, download=True, **which)
            arrays[f"x_{part}"] = data.data if cifar else data.data.transpose(0, 2, 3, 1)
            arrays[f"y_{part}"] = np.asarray(data.targets if cifar else data.labels)
            arrays["classes"] = getattr(data, "classes", range(10))
    except Exception as error:  # of the network, of a file, or because svhn needs scipy
        if new and root.exists() and not any(root.iterdir()):
            root.rmdir()
        ways = f"go online once, put its archive into {root}/, or --data FOLDER or FILE.npz"
        raise Halt(f"{name} is not in {root}/ and could not be fetched ({error}): {ways}") from None
    return arrays


def list_images(folder):
    """<folder>/<class>/* but for what is hidden -> class names, [(file, label), ...]"""
    classes = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."
    )
    kinds, samples = torchvision.datasets.folder.IMG_EXTENSIONS, []
    for label, name in enumerate(classes):
        files = [file for file in sorted((folder / name).iterdir()) if file.name[0] != "."]
        files = [(file, label) for file in files if file.suffix.lower() in kinds]
        if not files:
            raise ValueError(f"there is no image in {folder / name}")
        samples += files
    if not classes:
        raise ValueError(f"there is no folder in {folder}, one a class")
    return classes, samples


def read_folder(path, root, size):
    """<path>/train/<class>/* and test/<class>/* (or val/), resized; cached as .npz in root."""
    part = "test" if (path / "test").is_dir() else "val"
    (classes, train), (test_classes, test) = list_images(path / "train"), list_images(path / part)
    if classes != test_classes:
        raise ValueError(f"the classes in train/ and {part}/ differ")
    files = [(str(file), label, os.stat(file)) for file, label in train + test]
    key = repr([(file, label, stat.st_size, stat.st_mtime_ns) for file, label, stat in files])
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    cache = root / f"{path.resolve().name}-{size}px-{key}.npz"
    if not cache.exists():
        arrays = {"classes": classes}
        for part, samples in (("train", train), ("test", test)):
            images = np.empty((len(samples), size, size, 3), np.uint8)
            for i, (file, _) in enumerate(tqdm(samples, f"{part} images", disable=None)):
                try:
                    image = torchvision.datasets.folder.default_loader(file)
                    images[i] = image.resize((size, size))
                except Exception as error:  # a foreign file can raise anything
                    raise ValueError(f"{file} is not a readable image: {error}") from None
            arrays |= {f"x_{part}": images, f"y_{part}": [label for _, label in samples]}
        np.savez(buffer := io.BytesIO(), **arrays)
        root.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, buffer.getbuffer())
    try:
        return dict(np.load(cache))
    except Exception as error:
        raise ValueError(f"the cache {cache} is damaged, remove it ({error})") from None


def stratified(labels, n, flag):
    """A fixed choice of n images, equally many of each class -> their indices, and the others'."""
    if not n <= len(labels) - (flag == "--holdout"):
        raise Halt(f"{flag} {n}: there are {len(labels)} training images")
    order, count = labels.argsort(stable=True), labels.bincount()
    place = torch.arange(len(labels)) - (count.cumsum(0) - count)[labels[order]]  # within its class
    order = order[place.argsort(stable=True)]  # the first of every class, the second of every...
    return order[:n].sort().values, order[n:].sort().values


def choose_labels(labels, share, seed):
    """The images whose labels are used, equally many of each class: (N,) -> their indices, sorted.
    Drawn by hashes: the same in every mode and on every machine, and 1 % is a part of 10 %.
    """
    if share == 1:
        return torch.arange(len(labels))
    n, classes = len(labels), len(labels.unique())
    each = round(share * n / classes)
    if each < 1:
        raise Halt(f"--labels {share:g}: of {n} images that is less than one of each class")
    hashes = [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(n)]
    order = torch.tensor(sorted(range(n), key=lambda i: hashes[i]))
    some, _ = stratified(labels[order], min(each * classes, n), "--labels")
    return order[some].sort().values


# %% Checkpoints
def write_atomic(path, content, previous=None):
    """All of it or nothing, whenever the power goes off; the old file becomes `previous`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, checkpoint, previous=None):
    """Write it atomically, tensors on the CPU; Halt with 3 instead if one of them is not finite."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise Halt("training diverged, weights are not finite: lower --lr, and --restart", 3)
        return value.cpu() if isinstance(value, torch.Tensor) else value

    torch.save(plain(checkpoint), buffer := io.BytesIO())
    write_atomic(path, buffer.getbuffer(), previous)


def load_checkpoint(path):
    """The checkpoint in a file -> dict, on the CPU; Damaged if it is none or not whole."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not look at the checksums
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Halt(f"{path}: no such file") from None
    except Exception as error:  # a foreign file can raise anything
        why = error if type(error) is ValueError else type(error).__name__
        raise Damaged(f"{path}: not a readable checkpoint ({why})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise Damaged(f"{path}: not a checkpoint of format {FORMAT}")
    if missing := KEYS - checkpoint.keys():
        raise Damaged(f"{path}: lacks {', '.join(sorted(missing))}")
    weights = checkpoint["encoder"] if isinstance(checkpoint["encoder"], dict) else ()
    for prefix in ("_orig_mod.", "module."):  # of torch.compile, of DistributedDataParallel
        if weights and all(str(name).startswith(prefix) for name in weights):
            torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(weights, prefix)
            print(f"note: {path}: the names in it begin with {prefix}, which is taken off")
    return checkpoint


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


def fingerprint(module):
    """A hash of every parameter and buffer, batch-norm statistics included."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# %% Devices
def start_device(config):
    """-> the device, and the number type that it is fast in"""
    name, fast = config.device, "fp32"
    if name == "auto":
        accelerator = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if accelerator else "cpu"
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise Halt(f"--device {name} is not here; there is {', '.join(have)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        fast = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"  # a T4 has no bf16
    elif device.type == "cpu":
        keep_memory()
        fast = "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "fp32"
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return device, types[fast if config.precision == "auto" else config.precision]


def keep_memory():
    """Have glibc keep what it has got. By default it returns large blocks to the system at every
    free, and each step pays for getting them back page by page: on 2 cores 27 % (docs/race.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, another library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap
        libc.mallopt(-2, 64 << 20)  # M_TOP_PAD: grow in large pieces


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


def describe_machine(device, dtype, seed):
    """What a result depends on, for the record."""
    folder = str(Path(__file__).parent) if "__file__" in globals() else "."
    git = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = dict(device=f"{device} {name}", precision=str(dtype), processes=process_count())
    machine |= dict(threads=torch.get_num_threads(), torch=str(torch.__version__), commit=commit)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return machine | dict(python=platform.python_version(), seed=seed, started=started)


# %% Command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Halt(f"{message} (--help shows the flags)")


def parse_config(argv=None):
    """Config from the command line; in a notebook, which has none, Config as it stands."""
    if argv is None and sys.argv[0].endswith("kernel_launcher.py"):
        return check_config(Config())
    form = argparse.RawDescriptionHelpFormatter
    parser = group = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    if RECIPES:
        first = [*RECIPES][0]
        parser.add_argument("--recipe", choices=RECIPES, help=f"values to start from [{first}]")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    try:
        source = inspect.getsource(Config)
    except (OSError, TypeError):  # pasted into a notebook
        source = "".join(f"    {name}:  # \n" for name in fields)
    for title, name, text in re.findall(
        r"^    (?:# -- (.*)|(\w+):.*  # (.*))$", source, re.MULTILINE
    ):
        if title:
            group = parser.add_argument_group(title)
            continue
        field = fields[name]
        if field.type is list:
            parser.add_argument(name, nargs="*", default=field.default_factory(), help=text)
            continue
        how = {"type": field.type, "metavar": field.type.__name__[:1].upper()}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            how = {"type": lambda text: tuple(map(float, text.split(","))), "metavar": "X,..."}
        elif choices := typing.get_args(field.type):
            how = {"choices": choices}
        elif "or auto" in text:
            how["type"] = lambda text: 0 if text == "auto" else int(text)
        text = f"{text} [{field.default}]".replace("%", "%%")
        group.add_argument(flag_of(name), default=argparse.SUPPRESS, help=text, **how)
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("recipe", None) or flags.get("mode")  # a mode can have one of its name
    return check_config(Config(**RECIPES.get(recipe, {}) | flags))


def flag_of(name):
    return "--" + name.replace("_", "-")


POSITIVE = """image_size std width head_hidden predictor_hidden dim grid parts_combined queue_size
    temperature bn_splits knn_k""".split()
SHARES = "crop_scale flip jitter gray blur key_momentum sgd_momentum".split()


def check_config(config):
    """Halt if a value cannot work."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        values, wrong = value if field.type is tuple else [value], None
        if choices := typing.get_args(field.type):
            wrong = value not in choices and f"one of {', '.join(choices)}"
        elif field.type in (int, float, tuple):
            if not all(isinstance(v, int | float) and 0 <= v < math.inf for v in values):
                wrong = "a number, and not negative"
            elif field.type is int and value >= 2**31:
                wrong = "less than 2^31"
            elif field.type is tuple and len(value) != len(field.default) and name != "lr":
                wrong = f"{len(field.default)} numbers"
            elif name in POSITIVE and not min(values):
                wrong = "more than 0"
            elif name in SHARES and max(values) > 1:
                wrong = "from 0 to 1"
            elif name == "crop_scale" and values[0] > values[1]:
                wrong = "the smaller share and the larger"
            elif name == "warmup_epochs" and value > config.epochs > 0:
                wrong = f"at most --epochs {config.epochs}"
            elif name == "batch_size" and value == 1:
                wrong = "2 or more: an image is told from others"
        if wrong:
            raise Halt(f"{flag_of(name)} {','.join(map(str, values))}: must be {wrong}")
    return config


def find_checkpoint(path):
    """A checkpoint file, or the newest one in a run's folder."""
    path = Path(path)
    files = (
        [path / name for name in ("pretrain.pt", "last.pt", "prev.pt")] if path.is_dir() else [path]
    )
    for file in files:
        if file.is_file():
            return file
    raise Halt(
        f"{path}: no pretrain.pt and no last.pt there" if path.is_dir() else f"{path}: no such file"
    )


def check_together(config):
    """Halt if settings do not go together."""
    untrained = config.init == "random" or config.mode == "supervised"
    why = None
    rates = [*config.lr, *(lr * config.encoder_lr for lr in config.lr), config.weight_decay]
    if not 0 < config.labels <= 1:
        why = f"--labels {config.labels:g}: must be more than 0 and at most 1"
    elif config.batch_size < 2:
        why = f"--batch-size {config.batch_size}: must be 2 or more"
    elif not config.lr:
        why = "--lr: name at least one rate"
    elif config.lr_decay > 1:
        why = f"--lr-decay {config.lr_decay:g}: must be at most 1"
    elif max(rates) > (1e37 if config.optimizer == "adam" else 1e38):  # its first step: ten times
        why = "--lr, --encoder-lr or --weight-decay is more than float32 can hold"
    elif len(config.lr) > 1 and (config.mode != "probe" or config.augment):
        why = "--lr: several rates go with --mode probe and without --augment"
    elif config.nesterov and not config.sgd_momentum:
        why = "--nesterov: there is no momentum with --sgd-momentum 0"
    elif config.mode == "supervised" and not config.encoder_lr:
        why = "--encoder-lr 0: --mode supervised would learn nothing but the last layer"
    elif config.probe_every and untrained:
        why = "--probe-every: an untrained encoder has no epochs"
    if why:
        raise Halt(why)


def output_folder(file, kind, config):
    """The folder for linear.pt: --out, the checkpoint's, or one in it with a name such as random,
    finetune, probe-0.1 or random-finetune-0.1
    """
    parts = ["random"] if config.init == "random" and config.mode != "supervised" else []
    parts += [config.mode] if config.mode != "probe" or config.labels < 1 else []
    parts += [f"{config.labels:g}"] if config.labels < 1 else []
    if kind == "linear" and not parts:
        parts = ["probe"]  # beside it would be in its place
    out = Path(config.out) if config.out else file.parent / "-".join(parts)
    if (out / "linear.pt").resolve() == file.resolve():
        raise Halt(f"--out {out}: would replace the checkpoint that is measured")
    return out


def read_data(config):
    """load_data(), with the images whose labels are used. Of several rates the best is chosen on a
    part of these, `held`, while the test set stays what it is.
    """
    several = len(config.lr) > 1
    if several and not config.holdout:
        raise Halt("--lr: to choose among several rates, keep images back with --holdout N")
    kept = {"holdout": 0} if several else {}
    data = load_data(SimpleNamespace(**vars(config) | kept))
    if len(data.about["classes"]) < 2:
        raise Halt(f"--data {config.data}: has only one class, there is nothing to tell apart")
    rows = choose_labels(data.y_train, config.labels, config.seed)
    data.x_train, data.y_train = data.x_train[rows], data.y_train[rows]
    if several:
        data.held, data.rest = stratified(data.y_train, config.holdout, "--holdout")
    digest = hashlib.sha256(json.dumps(rows.tolist()).encode()).hexdigest()
    data.labels = {"n_labels": len(rows), "labels_sha256": digest}
    return data


def read_encoder(file, saved, config):
    """The encoder to start from, on the CPU"""
    torch.manual_seed(config.seed)  # of an untrained one
    try:
        return load_encoder(saved, random=config.init == "random")
    except Halt as halt:
        raise Halt(f"{file}: {halt}") from None


def find_kept(path, config, last):
    """The checkpoints that --probe-every asks for and that come before the epoch `last`"""
    if not config.probe_every:
        return []
    names = [re.fullmatch(r"epoch(\d+)\.pt", file.name) for file in Path(path).glob("epoch*.pt")]
    epochs = {int(name[1]): Path(path) / name[0] for name in names if name}
    kept = [epochs[e] for e in sorted(epochs) if e % config.probe_every == 0 and e < last]
    if not kept:
        which = f"--probe-every {config.probe_every}: no checkpoint of such an epoch in {path}"
        raise Halt(f"{which}; it takes a run's folder, pretrained with --keep-every")
    return kept


def read_along(path, head):
    """The rows in along.jsonl, by epoch, if settings and data are those in head"""

    def essence(head):
        local = "checkpoints out data data_dir device probe_every".split()
        config = {key: value for key, value in head["config"].items() if key not in local}
        return json.dumps([head["method"], config, head["data"]["sha256"]], sort_keys=True)

    try:
        before, *rows = map(json.loads, path.read_text().splitlines())
        return {row["epoch"]: row for row in rows} if essence(before) == essence(head) else {}
    except (OSError, LookupError, TypeError, ValueError):  # none there, or a foreign file
        return {}


def measure(path, config):
    """Measure a checkpoint, and with --probe-every the ones kept on the way to it."""
    file, config = find_checkpoint(path), dataclasses.replace(config)
    saved = load_checkpoint(file)
    before, about = saved["config"], saved["data"]
    if config.mode == "supervised":
        config.init = "random"
    out = output_folder(file, saved.get("kind"), config)
    config.data, config.out = config.data or before["data"], str(out)
    config.limit = config.limit or before["limit"]
    config.holdout = config.holdout or before["holdout"]
    pixels = dict(image_size=about["image_size"], mean=about["mean"], std=about["std"])
    settings = SimpleNamespace(**dataclasses.asdict(config) | pixels)
    device, dtype = start_device(config)
    kept = find_kept(path, config, saved["epoch"])
    data = read_data(settings)
    for each in kept:  # what is wrong with them shows before the training
        read_encoder(each, load_checkpoint(each), config)
    read_encoder(file, saved, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "linear.pt.tmp").touch()
        (out / "linear.pt.tmp").unlink()
    except OSError as error:
        raise Halt(f"--out {out}: {error.strerror}") from None

    base = dict(method=method_of(saved, config), config=dataclasses.asdict(config), data=data.about)
    along = read_along(out / "along.jsonl", base)  # what an earlier command has measured
    for each in [*kept, file]:
        part = saved if each is file else load_checkpoint(each)
        encoder = read_encoder(each, part, config).to(device, memory_format=torch.channels_last)
        mark = fingerprint(encoder)
        pretrain = {key: part[key] for key in ("method", "epoch", "epochs", "config")}
        machine = describe_machine(device, dtype, config.seed)
        head = base | dict(pretrain=pretrain, machine=machine)
        if each is not file and along.get(part["epoch"], {}).get("encoder_sha256") == mark:
            continue
        what = f"epoch {part['epoch']} of {part['epochs']}"
        what = "untrained" if config.init == "random" else what
        where = f"{data.labels['n_labels']} images of {config.data}"
        print(f"{config.mode} of {part['arch']}, {head['method']}, {what}, trained on {where}")
        learned = learn(encoder, data, settings, device, dtype)
        machine["seconds"] = learned.pop("seconds")
        result = learned["result"]
        text = ", ".join(f"{name} {100 * result[name]:.2f} %" for name in ("top1", "top3", "top5"))
        text += f", loss {result['test_loss']:.4f} on {result['n_test']} images"
        if each is file:
            write_rows(out / "linear.jsonl", [head, *learned["history"], {"result": result}])
            checkpoint = dict(format=FORMAT, kind="linear", **head, **learned)
            checkpoint |= dict(epoch=config.epochs, epochs=config.epochs, arch=part["arch"])
            checkpoint |= dict(width=part["width"], dim=encoder.dim, source=SOURCE)
            save_checkpoint(out / "linear.pt", checkpoint)
            text += f" -> {out / 'linear.pt'}"
        if kept:
            names = "top1 top3 top5 test_loss correct n_test".split()
            row = {"epoch": part["epoch"], **{name: result[name] for name in names}}
            along[part["epoch"]] = row | {"encoder_sha256": mark}
            write_rows(out / "along.jsonl", [head, *(along[epoch] for epoch in sorted(along))])
        print(text, flush=True)


def method_of(saved, config):
    if config.mode == "supervised":
        return "supervised"
    return "random" if config.init == "random" else saved["method"]


def write_rows(path, rows):
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def evaluate(encoder, classifier, data, config, autocast):
    """The result, on the test images: fractions, whole numbers of images, and each class's own."""
    logits, labels = predict(encoder, classifier, data.x_test, config, autocast), data.y_test
    result, n = score(logits, labels), len(labels)
    correct = {name: round(result[name] * n) for name in ("top1", "top3", "top5")}
    right = (logits.argmax(1) == labels).double()
    per_class = [right[labels == c].mean().item() for c in range(logits.shape[1])]
    per_class = [None if math.isnan(share) else share for share in per_class]  # no image of it
    return result | {"n_test": n, "correct": correct, "per_class": per_class}


def learn(encoder, data, config, device, dtype):
    """Train and evaluate -> what a checkpoint says of it"""

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    learns, start, mark = encoder_learns(config), time.monotonic(), fingerprint(encoder)
    scaler = torch.amp.GradScaler(device.type, enabled=learns and dtype == torch.float16)
    data = prepare(encoder, data, config, autocast)
    more = dict(data.labels)
    if len(config.lr) > 1:
        best, more["rates"] = choose_rate(encoder, data, config, autocast, scaler)
        for row in more["rates"]:
            share = "diverged" if row["top1"] is None else f"top1 {100 * row['top1']:.2f} %"
            taken = ", taken" if row["lr"] == best else ""
            print(f"lr {row['lr']:g}: {share} on the {len(data.held)} images held out{taken}")
        config = SimpleNamespace(**vars(config) | {"lr": (best,)})
    (classifier,), history = train_linear(encoder, data, config, autocast, scaler)
    result = evaluate(encoder, classifier, data, config, autocast) | {"lr": config.lr[0]} | more
    if not learns and fingerprint(encoder) != mark:
        raise Halt("the encoder has changed, so this was no probe; please report it", 3)
    learned = dict(encoder=encoder.state_dict(), classifier=classifier.state_dict())
    learned |= dict(history=history, result=result, encoder_sha256=fingerprint(encoder))
    return learned | dict(seconds=time.monotonic() - start)


def main(argv=None):
    """Measure each checkpoint -> exit code"""
    try:
        config = parse_config(argv)
        check_together(config)
        if not config.checkpoints:
            raise Halt("name at least one run folder or checkpoint, for example runs/moco")
        if config.out and len(config.checkpoints) > 1:
            raise Halt("--out goes with one checkpoint; without it each result lies beside its own")
        for path in config.checkpoints:
            measure(path, config)
    except Halt as halt:
        print(f"error: {halt}", file=sys.stderr)
        return halt.code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("error: interrupted; nothing is lost, the same command starts again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    if code and "__file__" in globals():  # a notebook stays open
        sys.exit(code)
