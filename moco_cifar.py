"""MoCo on CIFAR-10: learn to recognise an image that was seen before, without any label.

Two random views of an image are a *query* and its *key*. The encoder of the queries learns by
gradient to tell the key of its own image from K keys of other images. Those wait in a *queue*,
renewed batch by batch, so K does not depend on the batch size. To stay comparable, all keys come
from a slow copy of the encoder, which no gradient reaches: it follows as a moving average.

    image --augment--> im_q --encoder_q--> q ----.
       |                   | momentum update      +--> q.k and q.queue, / T --> cross-entropy:
       |                   v                      |    which of the 1 + K keys is mine?
       `----augment--> im_k --encoder_k--> k -----'--> into the queue; the oldest keys leave

What differs from the papers (MoCo v1, arXiv:1911.05722; v2, arXiv:2003.04297):
 1. The stem is made for 32x32: a 3x3 first convolution of stride 1, no max-pool.
 2. One device stands for eight: batch norm runs over `bn_splits` groups of the batch.
 3. The loss *rises* for some epochs: the queue starts with random vectors, and real keys, which
    replace them, are harder to tell apart. Chance is ln(1 + K) = 8.32 for K = 4096.
 4. --symmetric adds the loss with the views exchanged, as a sum: an epoch costs about twice.

    python moco_cifar.py                       # CIFAR-10, ResNet-18, 200 epochs (recipe demo)
    python moco_cifar.py --recipe v2 --epochs 100 --out runs/v2

The same command goes on after an interruption. In a notebook, paste this file into one cell and
edit Config. Then linear_eval.py says what the features are worth.
"""

# %%
import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

METHOD = "moco"


# %% Config: a flag --like-this is made from each field, and its comment is the help
@dataclasses.dataclass
class Config:
    # -- data
    data: str = "cifar10"  # or cifar100, svhn, stl10, a folder train/<class>/*, an .npz file
    data_dir: str = "data"  # where downloads and caches are kept
    image_size: int = 32  # pixels; images of another size are resized
    limit: int = 0  # train on so many images, equally many of each class; 0: all
    holdout: int = 0  # keep so many training images back and evaluate on them, not on the test set
    mean: tuple = (0.4914, 0.4822, 0.4465)  # of the pixels of each channel in [0, 1]: CIFAR-10's
    std: tuple = (0.2470, 0.2435, 0.2616)  # likewise
    # -- augmentation
    crop_scale: tuple = (0.08, 1.0)  # share of the image's area that a random crop keeps
    flip: float = 0.5  # probability of a mirrored view
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)  # strength in brightness, contrast, saturation, hue
    gray: float = 0.2  # probability of a grayscale view
    blur: float = 0.0  # probability of a Gaussian blur ("aug+" of MoCo v2: 0.5)
    # -- model
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet8"] = "resnet18"  # the backbone
    width: int = 64  # channels of its first stage
    head: Literal["linear", "mlp"] = "linear"  # v1: one layer; v2: a hidden layer with ReLU
    head_hidden: int = 2048  # units of that hidden layer (MoCo v2, sec. 3)
    dim: int = 128  # C, the size of queries and keys
    # -- method
    queue_size: int = 4096  # K, the number of negative keys; need not be a multiple of the batch
    key_momentum: float = 0.99  # m of the moving average (Eq. 2); 0.999 in the paper, on ImageNet
    temperature: float = 0.1  # of the softmax (Eq. 1)
    bn_splits: int = 8  # groups of the batch for batch norm, as if on so many GPUs; 1: ordinary
    symmetric: bool = False  # add the loss with the two views exchanged
    # -- optimisation
    epochs: int = 200  # passes over the training images
    batch_size: int = 512  # images a step, on all devices together; 0 or auto: what memory allows
    lr: float = 0.06  # learning rate at the start
    sgd_momentum: float = 0.9  # the optimizer's, not the key encoder's
    weight_decay: float = 5e-4  # on all parameters
    schedule: Literal["cosine", "step"] = "cosine"  # step: x 0.1 at 60 % and at 80 % of the epochs
    # -- run
    out: str = "runs/moco"  # the run's folder
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: what the device is good at
    knn_every: int = 10  # epochs between measurements of the k-NN accuracy; 0: only at the end
    knn_k: int = 200  # neighbours that vote
    keep_every: int = 0  # keep a checkpoint every so many epochs; 0: only the last
    save_seconds: float = 60.0  # what an interruption can cost at most
    compile: bool = False  # torch.compile, for a GPU: a CPU gains nothing (docs/race.md)
    restart: bool = False  # start over in a folder that holds a run


RECIPES = {
    "demo": {},  # the defaults: the official CIFAR-10 demo of MoCo
    # the course report; "initialized to 0.015" is taken as the start of a cosine
    "report": dict(batch_size=128, epochs=100, lr=0.015, weight_decay=1e-6, key_momentum=0.99),
    # what MoCo v2 (Table 1) changes in v1: head, blur, schedule, and with the head the temperature
    "v1": dict(head="linear", temperature=0.07, blur=0.0, schedule="step"),
    "v2": dict(head="mlp", temperature=0.2, blur=0.5, schedule="cosine"),
}


# %% Augmentation: what the network is told to ignore
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


def augment(images, recipe):
    """One random view of each image: (N, 3, H, W) uint8 -> (N, 3, H, W) float32, normalised.

    recipe: a Config. Every image draws its own crop, flip, jitter...; the operations stand below.
    """
    n, size, device = len(images), images.shape[-1], images.device

    def chance(p):
        return torch.rand(n, 1, 1, device=device) < p

    top, left, height, width = sample_crops(n, size, recipe.crop_scale, device)
    flip, never = chance(recipe.flip)[:, 0, 0], chance(0)[:, 0, 0]
    rows, columns = interpolation(top, height, size, never), interpolation(left, width, size, flip)
    x = separable(images / 255, rows, columns)

    # nothing here looks at a value or copies from the host, so that a GPU never has to wait
    change = [torch.empty(n, device=device).uniform_(-most, most) for most in recipe.jitter]
    change = torch.stack(change, dim=1) * chance(0.8)[:, 0]  # (N, 4)
    change[:, :3] += 1  # factors of brightness, contrast, saturation; the hue is a shift
    order = torch.rand(n, 3, device=device).argsort(1)
    parts = torch.randperm(n, device=device).tensor_split(4)
    hue_turns = [parts[i] for i in torch.randperm(4)]
    x = color_jitter(x, change, order, hue_turns)
    x = torch.where(chance(recipe.gray)[..., None], grayscale(x), x)
    if recipe.blur:
        blur = gaussian(torch.empty(n, device=device).uniform_(0.1, 2.0), size)  # (N, H, H)
        blur = torch.where(chance(recipe.blur), blur, torch.eye(size, device=device))
        x = separable(x, blur, blur)
    return normalise(x, recipe)


# %% Model
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


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm over `splits` groups of the batch, as if each were on a GPU of its own (sec. 3.3).
    The running statistics are the mean of the groups'; in eval mode it is an ordinary batch norm.
    """

    def __init__(self, channels, splits):
        super().__init__(channels)
        self.splits = splits

    def forward(self, x):
        if not self.training or self.splits == 1:
            return super().forward(x)
        means, variances = (b.repeat(self.splits, 1) for b in (self.running_mean, self.running_var))
        groups = zip(x.chunk(self.splits), means, variances)
        rest = self.weight, self.bias, True, self.momentum, self.eps
        x = torch.cat([F.batch_norm(group, mean, var, *rest) for group, mean, var in groups])
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked += 1
        return x


# %% The method
def info_nce(q, k, queue, temperature):
    """Eq. 1: tell k from the keys in the queue; q, k (N, C), queue (K, C), unit rows -> scalar"""
    with torch.autocast(q.device.type, enabled=False):  # bf16 is too coarse for a softmax
        l_pos = (q * k).sum(1, keepdim=True)  # (N, 1)
        l_neg = q @ queue.T  # (N, K)
        logits = torch.cat([l_pos, l_neg], dim=1) / temperature  # (N, 1+K), column 0 is right
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


class Queue(nn.Module):
    """The last `size` keys, first in, first out (sec. 3.2); random unit vectors at the start."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))  # (K, C)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # to the oldest key

    @torch.no_grad()
    def enqueue(self, keys):
        """Put keys (N, C) in the place of the oldest; of more than K keys the last K stay."""
        size = len(self.keys)
        slots = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, slots[-size:], keys[-size:].to(self.keys.dtype))
        self.pointer.add_(len(keys)).remainder_(size)


@torch.no_grad()
def momentum_update(encoder_q, encoder_k, m):
    """Eq. 2, theta_k <- m theta_k + (1 - m) theta_q, in one fused call. Parameters only: encoder_k
    has its own batch-norm statistics, of the keys that it has seen, as in MoCo's own code.
    """
    torch._foreach_lerp_(list(encoder_k.parameters()), list(encoder_q.parameters()), 1 - m)


class MoCo(nn.Module):
    """Algorithm 1. Both encoders are a backbone and a head; encoder_k starts as a copy."""

    def __init__(self, config):
        super().__init__()
        group, rest = divmod(config.batch_size, config.bn_splits)
        if rest or group < 2 or config.bn_splits % process_count():
            raise Halt("--batch-size must be a multiple of --bn-splits, twice it or more")
        self.config = config
        self.encoder_q, self.encoder_k = self.build(), self.build()
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.queue = Queue(config.queue_size, config.dim)

    def build(self):
        config, splits = self.config, self.config.bn_splits // process_count()
        backbone = build_encoder(config.arch, config.width, lambda c: SplitBatchNorm(c, splits))
        head = [nn.Linear(backbone.dim, config.dim)]
        if config.head == "mlp":
            hidden = nn.Linear(backbone.dim, config.head_hidden)
            head = [hidden, nn.ReLU(), nn.Linear(config.head_hidden, config.dim)]
        return nn.Sequential(backbone, nn.Sequential(*head))

    def contrast(self, im_q, im_k):
        """-> loss of the queries of im_q against the keys of im_k and the queue; the keys (N, C)"""
        q = unit(self.encoder_q(shard(im_q)))  # (N, C)
        with torch.no_grad():
            # ShuffleBN (sec. 3.3): in its batch-norm group a key meets other images than its query,
            # or else the group's statistics would tell which key it is
            shuffle = torch.randperm(len(im_k), device=im_k.device)
            k = gather(unit(self.encoder_k(shard(im_k[shuffle]))))[shuffle.argsort()]  # (N, C)
        return info_nce(q, shard(k), self.queue.keys, self.config.temperature), k

    def forward(self, im_q, im_k):
        """Two views (N, 3, H, W) of the same images -> loss, keys for the queue"""
        loss, keys = self.contrast(im_q, im_k)
        if self.config.symmetric:
            loss_swapped, keys_swapped = self.contrast(im_k, im_q)
            loss, keys = loss + loss_swapped, torch.cat([keys, keys_swapped])
        return loss, keys


def unit(x):
    """Rows of length 1, (N, C), in float32 if they come in less"""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


# %% Training
def learning_rate(config, epoch):
    """The rate in an epoch, counted from 0, so that the last one still learns"""
    if config.schedule == "step":
        return config.lr * 0.1 ** sum(epoch >= part * config.epochs for part in (0.6, 0.8))
    return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


def train(config, run):
    """The algorithm. `run` brings images, goes on after a crash, measures, logs and saves."""
    model = MoCo(config)
    sgd = dict(momentum=config.sgd_momentum, weight_decay=config.weight_decay, foreach=True)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), config.lr, **sgd)
    run.resume(model, model.encoder_q, optimizer)
    for epoch, images in run.batches():  # images (N, 3, H, W) uint8, on the device
        optimizer.param_groups[0]["lr"] = learning_rate(config, epoch)
        im_q, im_k = augment(images, config), augment(images, config)
        momentum_update(model.encoder_q, model.encoder_k, config.key_momentum)
        with run.autocast():
            loss, keys = model(im_q, im_k)
        run.descend(loss)  # backward, mean over the processes, optimizer step
        model.queue.enqueue(keys)  # only now: no query meets its own key among the negatives


# ---- plumbing: the same in every script, nothing about the method below this line ----
import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import inspect
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

FORMAT = "contrastive-cifar/1"
KEYS = set("method epoch epochs config data arch width dim encoder".split())
HARMLESS = (
    "out data data_dir device knn_every knn_k keep_every save_seconds compile restart".split()
)
SOURCE = Path(__file__).read_text() if "__file__" in globals() else globals().get("In", [""])[-1]


class Halt(Exception):
    """Ends the script: one line on standard error, and the exit code (2: the user can mend it)."""

    def __init__(self, message, code=2):
        super().__init__(" ".join(str(message).split()))
        self.code = code


class Damaged(Halt):
    """A checkpoint that is none, or not whole."""


# %% Image operations: whole batches, each image with parameters of its own
def interpolation(start, length, size, flip):
    """Bilinear resizing of the pixels start...start + length to size pixels, mirrored where flip:
    (N,) each -> matrix (N, size, size). Clamped to the crop, or what lies outside bleeds in.
    """
    pixel = torch.arange(size, device=start.device)
    target = torch.where(flip[:, None], size - 1 - pixel, pixel)
    position = ((target + 0.5) * length[:, None] / size - 0.5).clamp(min=0)
    position = start[:, None] + torch.minimum(position, length[:, None] - 1)
    return (1 - (position[:, :, None] - pixel).abs()).clamp(min=0)


def gaussian(sigma, size):
    """Gaussian blur, borders reflected, cut at 6 pixels: (N,) -> matrix (N, size, size)"""
    radius = min(6, size - 1)
    pixel = torch.arange(size, device=sigma.device)
    source = torch.arange(-radius, size + radius, device=sigma.device)  # with a border
    distance = (source - pixel[:, None]).to(sigma.dtype)
    weight = (-0.5 * (distance / sigma[:, None, None]) ** 2).exp() * (distance.abs() <= radius)
    reflected = size - 1 - (size - 1 - source.abs()).abs()
    inside = (reflected[:, None] == pixel).to(sigma.dtype)
    return weight @ inside / weight.sum(2, keepdim=True)


def separable(x, rows, columns):
    """rows @ x @ columns.T in each channel: (N, C, H, W), (N, H, H), (N, W, W) -> (N, C, H, W)"""
    x = x.flatten(1, 2) @ columns.mT  # (N, C*H, W)
    x = rows @ x.unflatten(1, (-1, rows.shape[1])).transpose(1, 2).flatten(2)  # (N, H, C*W)
    return x.unflatten(2, (-1, columns.shape[1])).transpose(1, 2)


def grayscale(x):
    """Luma (ITU-R 601): (N, 3, H, W) -> (N, 1, H, W)"""
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def shift_hue(x, turns):
    """Turn the hue: x (N, 3, H, W) in [0, 1], turns (N,). HSV in closed form: each channel is
    value - chroma * clamp(min(t, 4 - t), 0, 1), where t = (n + 6 hue) mod 6 and n = 5, 3, 1.
    """
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    over = 1 / torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == green, 2 + (blue - red) * over, 4 + (red - green) * over)
    hue = torch.where(value == red, (green - blue) * over, hue) + 6 * turns[:, None, None]
    t = torch.stack([5 + hue, 3 + hue, 1 + hue], dim=1) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(t, 4 - t).clamp(0, 1)


def color_jitter(x, factors, order, hue_turns):
    """Brightness, contrast, saturation and hue in any order, clamped after each; x (N, 3, H, W).

    factors (N, 4): 1, 1, 1, 0 change nothing; order (N, 3): a permutation of the first three;
    hue_turns: four lists of images, whose hue turns before the 1st, 2nd, 3rd of those, and last.
    """
    brightness, contrast, saturation, hue = factors.unbind(1)
    zero = torch.zeros_like(hue)  # each of the three is  a x + b gray(x) + c mean(gray(x))
    abc = [
        [brightness, zero, zero],
        [contrast, zero, 1 - contrast],
        [saturation, 1 - saturation, zero],
    ]
    abc = torch.stack([torch.stack(row) for row in abc])  # (3 operations, 3 coefficients, N)
    images = torch.arange(len(x), device=x.device)
    for i, turn in enumerate(hue_turns):
        x[turn] = shift_hue(x[turn], hue[turn])
        if i < 3:
            a, b, c = abc[order[:, i], :, images].T[..., None, None, None]
            gray = grayscale(x)
            rest = b * gray + c * gray.mean((2, 3), keepdim=True)
            x = torch.addcmul(rest, x, a).clamp_(0, 1)
    return x


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


# %% k-NN: what the features are worth, without any training
def knn_predict(features, bank, bank_labels, classes, k, temperature):
    """Weighted k-nearest-neighbour vote by cosine similarity (Wu et al. 2018, sec. 3.4).

    features (N, D), bank (M, D), normalised here; bank_labels (M,) -> class scores (N, classes)
    """
    similarity = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T  # (N, M)
    similarity, nearest = similarity.topk(k, dim=1)  # (N, k)
    weight = ((similarity - 1) / temperature).exp()
    return weight.new_zeros(len(weight), classes).scatter_add_(1, bank_labels[nearest], weight)


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


def knn_accuracy(encoder, data, config, autocast, k, temperature=0.1):
    """Top-1 accuracy in [0, 1] on the test images, with all training images as the bank"""
    bank, correct = extract_features(encoder, data.x_train, config, autocast), 0
    labels = data.y_train.to(bank.device)
    for x, y in zip(data.x_test.split(1000), data.y_test.split(1000)):
        features = extract_features(encoder, x, config, autocast)
        scores = knn_predict(features, bank, labels, len(data.about["classes"]), k, temperature)
        correct += int((scores.argmax(1).cpu() == y).sum())
    return correct / len(data.y_test)


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


# %% Devices and processes (torchrun starts several; with one, the helpers do nothing)
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


class SmallMapConv(nn.Conv2d):
    """A convolution that does small maps otherwise: oneDNN works on 16 pixels of a row at once, and
    a short row wastes most. On a CPU MoCo takes 1.3 times as long without, Fast-MoCo 2.1 times.
    """

    @staticmethod
    def knows(conv):
        """Is it one of a ResNet's: 3x3 within a border of zeros or 1x1, and nothing special?"""
        kind = conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.padding_mode
        kinds = [((k, k), (k // 2, k // 2), (1, 1), 1, "zeros") for k in (1, 3)]
        return kind in kinds and conv.stride[0] == conv.stride[1] and conv.bias is None

    def forward(self, x):
        step, small = self.stride[0], 8 if x.dtype.itemsize == 2 else 4  # float32 gains less
        if max(x.shape[2:]) > small * step:
            return super().forward(x)
        x, width = x.permute(0, 2, 3, 1), x.shape[3]  # (N, H, W, C)
        if self.kernel_size == (1, 1):
            x = F.linear(x[:, ::step, ::step].contiguous(), self.weight.flatten(1))
        elif x.shape[1:3] == (2, 2) and step == 1:  # each pixel sees all four: one matrix
            w = self.weight.permute(0, 2, 3, 1).to(x.dtype)  # (C', 3, 3, C)
            corners = [w[:, 1 - i : 3 - i, 1 - j : 3 - j] for i in (0, 1) for j in (0, 1)]
            x = F.linear(x.flatten(1), torch.cat(corners).flatten(1)).unflatten(1, (2, 2, -1))
        else:  # many maps side by side, zeros between them
            many, zeros = math.gcd(len(x), 128 * step // width), step + -width % step
            x = F.pad(x.unflatten(0, (-1, many)).transpose(1, 2), (0, 0, 0, zeros))
            x = super().forward(x.flatten(2, 3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = x.unflatten(2, (many, -1))[:, :, :, :-1].transpose(1, 2).contiguous().flatten(0, 1)
        return x.permute(0, 3, 1, 2)  # (N, C', h, w)


def place(model, device):
    """Move it there; channels_last is 15 % faster with bf16, itself 1.9 times (docs/race.md)."""
    for module in model.modules() if device.type == "cpu" else ():
        if type(module) is nn.Conv2d and SmallMapConv.knows(module):
            module.__class__ = SmallMapConv  # the same weights
    return model.to(device, memory_format=torch.channels_last)


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(batch):
    """The rows that this process works on."""
    return batch.chunk(process_count())[dist.get_rank()] if dist.is_initialized() else batch


class Gather(torch.autograd.Function):
    """The rows of all processes, in order; the gradients go back to the processes they are of."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(process_count())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.contiguous())
        return shard(grad)


def gather(rows):
    """The rows of all processes, in order."""
    return Gather.apply(rows) if dist.is_initialized() else rows


def average(tensors):
    """Replace each tensor by its mean over the processes."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)
        tensor /= process_count()


def in_first(action):
    """Do it in the first process alone -> its result, in all; where it halts, all halt."""
    if not dist.is_initialized():
        return action()
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Halt as halt:
            outcome[1] = halt
    dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


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


def lock_folder(folder):
    """Make the folder, and keep other runs out of it until this process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")
    except OSError as error:
        raise Halt(f"--out {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise Halt(f"--out {folder} is in use by {lock.read().strip()}") from None
    except OSError:  # some network drives
        print(f"warning: {folder} cannot be locked, start no second run in it", file=sys.stderr)
    lock.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
    return lock


def largest_batch(config, device, dtype):
    """The largest power of two for which the activations of two views take at most half of the
    device's memory (the other half: gradients, weights, images, workspace). It is computed from
    the memory that there is, free or not, so that the same command finds the same number again.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = Path("/sys/fs/cgroup/memory.max")  # of a container
        limit = limit.read_text().strip() if limit.exists() else "max"
        memory = min(memory, int(limit)) if limit.isdigit() else memory
    encoder = build_encoder(config.arch, config.width).to(device)
    kept = {}

    def count(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def bytes_for(views):
        kept.clear()
        x = torch.zeros(views, 3, config.image_size, config.image_size, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                encoder(x)
        return sum(kept.values())

    return 2 ** int(math.log2(memory / 2 / (bytes_for(4) - bytes_for(2))))


def seed_of(*numbers):
    """One seed from several numbers, in which (0, 1) and (1, 0) differ."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


# %% A run: its folder, what is saved there, and how it goes on
class Run:
    """Brings a training loop its images; measures, logs, saves, goes on after an interruption."""

    def __init__(self, config):
        self.config, self.out = config, Path(config.out)
        self.device, self.dtype = start_device(config)
        self.first = not dist.is_initialized() or dist.get_rank() == 0  # the process that writes

        def load():
            self.data = load_data(config)

        in_first(load)  # fetches the images, or makes a cache of them
        if not self.first:
            load()
        if not config.batch_size:
            most = largest_batch(config, self.device, self.dtype)
            config.batch_size = min(most, 2 ** int(math.log2(len(self.data.x_train))))
            print(f"--batch-size {config.batch_size} is what the memory of {self.device} allows")
        for flag, n in (("--batch-size", config.batch_size), ("--knn-k", config.knn_k)):
            if n > len(self.data.x_train):
                raise Halt(f"{flag} {n}: there are only {len(self.data.x_train)} training images")
        self.images = self.data.x_train.to(self.device)
        self.steps = len(self.images) // config.batch_size  # an epoch; the ragged rest is left out
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.loss = torch.zeros((), device=self.device)  # sum over this epoch's steps
        self.step = self.signal = self.failures = 0
        self.seconds, self.history = 0.0, []
        self.about = dict(format=FORMAT, kind="pretrain", method=METHOD, epochs=config.epochs)
        self.about |= dict(config=dataclasses.asdict(config), data=self.data.about, source=SOURCE)
        self.about |= dict(machine=describe_machine(self.device, self.dtype, config.seed))
        self.about |= dict(arch=config.arch, width=config.width)
        torch.manual_seed(config.seed)  # for the weights, drawn next

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def resume(self, model, online, optimizer):
        """Move the model to the device, take the folder, go on from the state in it, if any.

        online: the part of the model that is learned, of which [0] is the encoder and [1] the head
        """
        self.model = place(model, self.device)
        if self.config.compile:
            if not any(map(shutil.which, ("c++", "g++", "clang++"))):
                raise Halt("--compile: needs a C++ compiler, g++ or clang++, on the PATH")
            self.model.compile(dynamic=False)  # in place: the names of the weights stay
        self.encoder, self.head, self.optimizer = online[0], online[1], optimizer

        def take_folder():
            self.lock = lock_folder(self.out)  # until this process ends
            for pattern in ("pretrain.*", "last.pt", "prev.pt", "epoch*.pt"):
                for path in self.out.glob(pattern) if self.config.restart else ():
                    path.unlink()

        in_first(take_folder)
        self.clock = self.saved = self.shown = time.monotonic()
        trouble = None
        for path in (self.out / name for name in ("pretrain.pt", "last.pt", "prev.pt")):
            try:
                if path.exists():
                    self.load(path)
                    break
            except Damaged as error:
                trouble = trouble or str(error)
        else:
            if trouble:
                raise Halt(f"{trouble}, and there is no state before it: --restart starts over")
            self.save("last.pt")  # finds out now whether the folder takes it
        if trouble:
            print(f"warning: {trouble}; going on from {path.name}", file=sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        if self.first:
            self.announce()

    def load(self, path):
        """Take over the state in a file, if it is of the same settings and images."""
        saved, machine = load_checkpoint(path), self.about["machine"]
        old = dataclasses.asdict(Config()) | saved["config"]  # a setting that is newer than the run
        old |= {"images": saved["data"]["sha256"][:8]}
        new = self.about["config"] | {"images": self.data.about["sha256"][:8]}
        changed = [k for k in new if old.get(k) != new[k] and k not in HARMLESS]
        if changed:
            changed = ", ".join(f"{k} {old.get(k)} -> {new[k]}" for k in changed)
            changed = f"{self.out} holds a run with other settings ({changed})"
            raise Halt(f"{changed}: name another --out, or --restart")
        if path.name == "pretrain.pt":
            raise Halt(f"{path} is complete, {saved['epoch']} epochs", 0)
        try:
            state = saved["train_state"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.loss.copy_(state["loss"])
            self.step, self.history = state["step"], saved["history"]
            self.seconds = saved["machine"]["seconds"]
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise Damaged(f"{path}: not a state of this run ({error})") from None
        keys = ("device", "precision", "threads", "processes", "torch")
        if (other := [k for k in keys if saved["machine"][k] != machine[k]]) and self.first:
            print(f"note: begun with another {', '.join(other)}: goes on, but not bit for bit")

    def checkpoint(self):
        """What a checkpoint holds: see docs/checkpoint.md."""
        self.about["machine"]["seconds"] = self.elapsed()
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        state |= dict(scaler=self.scaler.state_dict(), step=self.step, loss=self.loss)
        progress = dict(epoch=self.step // self.steps, history=self.history, dim=self.encoder.dim)
        modules = dict(encoder=self.encoder.state_dict(), head=self.head.state_dict())
        return self.about | progress | modules | dict(train_state=state)

    def save(self, name):
        """Write a checkpoint and the log. A disk that refuses is asked again later, three times."""
        checkpoint = self.checkpoint()
        if name != "last.pt":
            del checkpoint["train_state"]

        def write():
            try:
                previous = self.out / "prev.pt" if name == "last.pt" else None
                save_checkpoint(self.out / name, checkpoint, previous)
                self.log()
            except OSError as error:
                self.failures += 1
                message = f"{self.out / name}: cannot be written, {error.strerror}"
                if self.step == 0 or self.failures == 3:
                    raise Halt(message, 4 if self.step else 2) from None
                print(f"warning: {message}; trying again later", file=sys.stderr)
                return False
            self.failures = 0
            return True

        self.saved = time.monotonic()
        return in_first(write)

    def on_signal(self, number, frame):
        if self.signal:  # the second time: at once
            os._exit(128 + number)
        self.signal = number

    def announce(self):
        about, config, machine = self.data.about, self.config, self.about["machine"]
        size, dtype = about["image_size"], machine["precision"].removeprefix("torch.")
        weights = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        print(f"{METHOD}: {about['n_train']} images of {size}x{size} from {about['name']}")
        print(f"{config.arch} of width {config.width}, {weights:.2f} M weights to learn")
        print(f"{config.epochs} epochs of {self.steps} steps, into {self.out}/")
        more = ", compiled: the first step takes minutes" if config.compile else ""
        print(f"on {machine['device']}, {machine['threads']} threads, {dtype}{more}", flush=True)
        if self.step:
            print(f"going on after step {self.step}, epoch {self.step / self.steps:.2f}")

    def log(self):
        head = {key: self.about[key] for key in ("method", "config", "data", "machine")}
        rows = "".join(json.dumps(row) + "\n" for row in (head, *self.history))
        write_atomic(self.out / "pretrain.jsonl", rows.encode())

    def elapsed(self):
        return self.seconds + time.monotonic() - self.clock

    def batches(self):
        """Yield epoch, images (N, 3, H, W) uint8 for all steps that are left; then pretrain.pt."""
        total, size, order = self.config.epochs * self.steps, self.config.batch_size, None
        quiet = not (self.first and sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=self.step, unit="step", disable=quiet)
        while self.step < total:
            epoch, i = divmod(self.step, self.steps)
            if order is None or i == 0:
                generator = torch.Generator().manual_seed(seed_of(self.config.seed, epoch))
                order = torch.randperm(len(self.images), generator=generator).to(self.device)
            # all that is random in a step follows from its number: nothing else can disturb it
            torch.manual_seed(seed_of(self.config.seed, "step", self.step))
            yield epoch, self.images[order[i * size : (i + 1) * size]]
            self.step += 1
            self.bar.update()
            if self.step % 10 == 0 or i + 1 == self.steps:
                self.level()
            if i + 1 == self.steps:
                self.finish_epoch(epoch + 1)
            if process_count() == 1 or self.step % 10 == 0:
                self.look_around()
        self.bar.close()
        while not self.save("pretrain.pt"):
            time.sleep(1)
        for name in ("last.pt", "prev.pt") if self.first else ():
            (self.out / name).unlink(missing_ok=True)

    def descend(self, loss, clip=0.0):
        """One step of the optimizer, down the mean gradient of the processes, of norm <= clip."""
        self.scaler.scale(loss).backward()
        learned = [p for p in self.model.parameters() if p.grad is not None]
        average([p.grad for p in learned])
        if clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(learned, clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.loss += loss.detach()

    def level(self):
        """What differs between the processes becomes their mean. At fixed steps, not when it saves,
        or else the rounding would tell when that was.
        """
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        average([self.loss, *(b for m in norms for b in (m.running_mean, m.running_var))])

    def look_around(self):
        """Between steps, by the clock: is the loss a number? Is it time to save, or to stop?"""
        now = time.monotonic()
        due = [self.signal, now - self.saved > self.config.save_seconds, now - self.shown > 1]
        if dist.is_initialized():  # all processes must do the same
            dist.all_reduce(due := torch.tensor(due, device=self.device), dist.ReduceOp.MAX)
        stop, save, show = (int(item) for item in due)
        if show and self.step % self.steps:
            self.shown = now
            self.bar.set_postfix(loss=f"{self.mean_loss(self.step % self.steps):.3f}")
        if save or stop:
            while not self.save("last.pt") and stop:
                time.sleep(1)
        if stop:
            raise Halt(f"stopped by signal {stop}, saved: the same command goes on", 128 + stop)

    def mean_loss(self, steps):
        """Of this epoch's first steps; the one place where training waits for the device."""
        loss = self.loss / steps
        if not loss.isfinite():
            raise Halt(f"the loss is {loss:.3g} at step {self.step}: lower --lr, and --restart", 3)
        return float(loss)

    def finish_epoch(self, epoch):
        """Log it; measure the k-NN accuracy and keep a checkpoint when it is time."""
        config, left = self.config, self.config.epochs - epoch
        row = {"epoch": epoch, "loss": self.mean_loss(self.steps)}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        if not left or config.knn_every and epoch % config.knn_every == 0:
            knn = knn_accuracy(self.encoder, self.data, config, self.autocast, config.knn_k)
            row["knn_top1"] = knn
        self.loss.zero_()
        self.history.append(row | {"seconds": self.elapsed()})
        if self.first:
            with contextlib.suppress(OSError):  # what a full disk means, save() decides
                self.log()
            text = f"epoch {epoch}/{config.epochs}: loss {row['loss']:.4f}"
            text += f", k-NN {100 * row['knn_top1']:.2f} %" if "knn_top1" in row else ""
            text += f", {self.elapsed() / epoch * left / 60:.1f} min left" if left else ""
            if self.bar.disable:  # no terminal: a line an epoch
                print(text, flush=True)
            elif "knn_top1" in row:
                self.bar.write(text)
        if config.keep_every and epoch % config.keep_every == 0 and left:
            self.save(f"epoch{epoch:04d}.pt")


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


def main(argv=None):
    """Pretrain as the command line says -> exit code"""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        config = parse_config(argv)
        train(config, Run(config))
    except Halt as halt:
        text = f"error: {halt}" if halt.code else str(halt)
        print(text, file=sys.stderr if halt.code else sys.stdout)
        return halt.code
    except KeyboardInterrupt:  # before the first step
        return 130
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"error: {config.device}: out of memory, lower --batch-size", file=sys.stderr)
        return 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main()
    if code and "__file__" in globals():  # a notebook stays open
        sys.exit(code)
