"""The k-NN accuracy of any checkpoint: what its features are worth, with no training at all.

Every training image keeps its label and its feature, a vector of length 1. A test image asks the k
that are most like it, and they vote for their classes: the nearer, the louder.

    test image --encoder--> h --.                           similarity s = cosine, from -1 to 1
                                +--> s --> the k nearest --> votes exp(s / T) --> largest sum wins
    training   --encoder--> bank (M, D), computed once

There is nothing to train, no rate to choose, no luck: it costs one pass over the images and says at
any epoch whether a run is on its way. The loss does not say that: its value depends on the queue,
the temperature and the augmentation, and it may rise while the features get better. A linear probe
may weigh the features anew, and usually ends higher; k-NN takes the distances as they are.

Two numbers compare only if they were measured alike, so each result carries its protocol:
 - features: here the backbone's h (512 numbers in ResNet-18). The official MoCo demo measures the
   128 numbers behind the head: --features head. They are the ones that the loss has seen.
 - k = 200 and T = 0.1 here and in the MoCo demo; T = 0.07 in Wu et al. 2018 (arXiv:1805.01978).
 - epoch: here the checkpoint's own, so the last. lightly's table has the best epoch *on the test
   set*, which is higher by luck alone. To choose something, choose it on --holdout images.
 - images as they are, neither cropped nor jittered, and batch norm in eval mode.
And no number stands alone: --baseline pixels compares the images themselves, --baseline random what
an encoder makes of them that has learned nothing.

    python knn_monitor.py runs/moco runs/simclr/last.pt     # a table; appends to runs/*/knn.jsonl
    python knn_monitor.py runs/moco --watch                 # beside a run, until it is complete
    python knn_monitor.py runs/moco --baseline random       # the same encoder, untrained
"""

# %%
import dataclasses
import functools
import time
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
    k: int = 200  # neighbours that vote
    temperature: float = 0.1  # T of the vote: the smaller, the more the nearest decide
    features: Literal["backbone", "head"] = "backbone"  # head: what the loss sees, behind the head
    baseline: Literal["none", "pixels", "random"] = "none"  # measure this in place of the encoder
    watch: bool = False  # follow a run's folder: measure each new state until it is complete
    watch_seconds: float = 5.0  # between two looks into that folder
    # -- data ("" and 0: what the checkpoint names)
    data: str = ""  # cifar10, cifar100, svhn, stl10, a folder train/<class>/*, an .npz file
    data_dir: str = ""  # where downloads and caches are kept
    limit: int = 0  # so many training images as the bank, equally many of each class
    holdout: int = 0  # measure on so many training images kept back, not on the test set
    # -- baselines without a checkpoint
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet8"] = "resnet18"  # of the untrained
    width: int = 64  # channels of its first stage
    image_size: int = 32  # pixels; images of another size are resized
    mean: tuple = (0.4914, 0.4822, 0.4465)  # of the pixels of each channel in [0, 1]: CIFAR-10's
    std: tuple = (0.2470, 0.2435, 0.2616)  # likewise
    # -- run
    out: str = ""  # folder for knn.jsonl; "": the checkpoint's own
    seed: int = 0  # of the untrained encoder
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the encoder, not of the vote


RECIPES = {}  # none


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


def load_head(checkpoint):
    """The head behind the encoder, rebuilt from its weights: (N, dim) -> (N, C)"""
    state, layers = checkpoint["head"], []  # {"0.weight": ...}
    for i in range(1 + max(int(name.split(".")[0]) for name in state)):
        weight, mean = state.get(f"{i}.weight"), state.get(f"{i}.running_mean")
        if mean is not None:
            layers.append(nn.BatchNorm1d(len(mean), affine=weight is not None))
        elif weight is not None:
            layers.append(nn.Linear(*weight.T.shape, bias=f"{i}.bias" in state))
        else:
            layers.append(nn.ReLU())  # it has no weights
    head = nn.Sequential(*layers)
    head.load_state_dict(state)
    return head.requires_grad_(False).eval()


def build_model(path, checkpoint, config):
    """What makes features of images, as the config asks for it; None for the pixels themselves."""
    if config.baseline == "pixels":
        return None
    if config.features == "head" and not checkpoint.get("head"):
        raise Halt(f"{path}: holds no head, --features head takes a pretraining run's checkpoint")
    torch.manual_seed(config.seed)  # for an untrained encoder
    try:
        encoder = load_encoder(checkpoint, random=config.baseline == "random")
        if config.features == "head":
            return nn.Sequential(encoder, load_head(checkpoint))
        return encoder
    except (LookupError, RuntimeError, TypeError, ValueError):
        what = f"{checkpoint.get('arch')} of width {checkpoint.get('width')}"
        raise Damaged(f"{path}: the weights in it are not those of a {what}") from None


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


def normalise(x, config):
    """Pixels (N, 3, H, W) in [0, 1] -> mean 0 and deviation 1, channels_last"""
    channels = zip(x.unbind(1), config.mean, config.std)
    return torch.stack([(c - mean) / std for c, mean, std in channels], dim=3).permute(0, 3, 1, 2)


# %% The vote
def knn_predict(features, bank, bank_labels, classes, k, temperature):
    """Weighted k-nearest-neighbour vote by cosine similarity (Wu et al. 2018, sec. 3.4).

    features (N, D), bank (M, D), normalised here; bank_labels (M,) -> class scores (N, classes)
    """
    similarity = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T  # (N, M)
    similarity, nearest = similarity.topk(k, dim=1)  # (N, k)
    weight = ((similarity - 1) / temperature).exp()
    return weight.new_zeros(len(weight), classes).scatter_add_(1, bank_labels[nearest], weight)


def count_correct(features, labels, bank, bank_labels, classes, config, chunk=1000):
    """How many of the features (N, D) get their own label from the bank (M, D) -> int"""
    correct = 0
    for h, y in zip(features.split(chunk), labels.split(chunk)):  # (N, M) at once is too much
        scores = knn_predict(h, bank, bank_labels, classes, config.k, config.temperature)
        correct += int((scores.argmax(1) == y).sum())
    return correct


# %% A measurement, and many of them beside a run
def measure_knn(path, checkpoint, config):
    """-> a row of the table. path, checkpoint: the file, and the dict that is in it"""
    start, data = time.monotonic(), find_data(path, checkpoint, config)
    about, y_bank, y = data.about, data.y_train, data.y_test
    if not 1 <= config.k <= len(y_bank):
        raise Halt(f"--k {config.k}: must be from 1 to {len(y_bank)}, the images in the bank")
    if len(y_bank.unique()) < 2:
        raise Halt(f"--data {about['name']}: one class only, so every vote would be right")
    device, dtype = start_device(config)
    model = build_model(path, checkpoint, config)
    if model:
        model.to(device, memory_format=torch.channels_last)
    pixels = SimpleNamespace(**about)  # their mean and std

    def represent(images):  # (N, 3, H, W) uint8 -> (N, D)
        if not model:
            return normalise(images.to(device) / 255, pixels).flatten(1)
        autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        parts = tqdm(images.split(1000), "features", leave=False, disable=None)
        return torch.cat([extract_features(model, part, pixels, autocast) for part in parts])

    bank, h = represent(data.x_train), represent(data.x_test)  # (M, D), (N, D)
    if not (bank.isfinite().all() and h.isfinite().all()):
        raise Halt(f"{path}: its features are not finite")  # a vote of nan goes to class 0
    y_bank, y, classes = y_bank.to(device), y.to(device), len(about["classes"])
    correct = count_correct(h, y, bank, y_bank, classes, config)

    trained = config.baseline == "none"
    seed = checkpoint["machine"]["seed"] if trained else config.seed
    return {
        "what": checkpoint["method"] if trained else config.baseline,
        "checkpoint": path and str(path),
        "epoch": checkpoint["epoch"] if trained else 0,
        "features": config.features if model else "pixels",
        "k": config.k,
        "temperature": config.temperature,
        "top1": correct / len(y),
        "correct": correct,
        "n_test": len(y),
        "n_train": len(bank),
        "data": about["name"],
        "data_sha256": about["sha256"],
        "evaluated_on": "holdout" if about["holdout"] else "test",
        "seconds": time.monotonic() - start,
        "machine": describe_machine(device, dtype, seed),
        "seed": seed,
    }


def watch(folder, config):
    """Yield path, checkpoint for each new state of the run in a folder; the last is pretrain.pt.
    They are saved by the clock, so there can be several in an epoch, which counts when it is over.
    """
    seen, complete = None, False
    while not complete:
        complete = (folder / "pretrain.pt").exists()
        path = folder / ("pretrain.pt" if complete else "last.pt")
        try:
            written = path.stat().st_mtime_ns
            checkpoint = load_checkpoint(path) if written != seen else None
        except (OSError, Halt):  # being replaced just now, or half a copy from elsewhere
            if complete:
                raise
            checkpoint = None
        if checkpoint:
            seen = written
            yield path, checkpoint
        if not complete:
            time.sleep(config.watch_seconds)


# ---- plumbing: the same in every script, nothing about the method below this line ----
import argparse
import contextlib
import ctypes
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import typing
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

FORMAT = "contrastive-cifar/1"
KEYS = set("method epoch epochs config data arch width dim encoder".split())


class Halt(Exception):
    """Ends the script: one line on standard error, and the exit code (2: the user can mend it)."""

    def __init__(self, message, code=2):
        super().__init__(" ".join(str(message).split()))
        self.code = code


class Damaged(Halt):
    """A checkpoint that is none, or not whole."""


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


@functools.lru_cache(maxsize=1)  # several checkpoints, or states, mostly name the same images
def load_data_once(**settings):
    return load_data(SimpleNamespace(**settings))


def find_data(path, checkpoint, config):
    """The images that a checkpoint names, or what the config says in their place."""
    named, about = checkpoint["config"], checkpoint["data"]
    settings = {k: getattr(config, k) or named[k] for k in "data data_dir limit holdout".split()}
    settings |= {k: tuple(about[k]) for k in ("mean", "std")} | {"image_size": about["image_size"]}
    try:
        return load_data_once(**settings)
    except Halt as halt:
        if not path or config.data or config.limit or config.holdout:
            raise
        raise Halt(f"{halt}: so {path} has it; if it is elsewhere now, pass --data") from None


def untrained(config):
    """What stands for a checkpoint in a baseline without one."""
    data = dict(image_size=config.image_size, mean=config.mean, std=config.std)
    named = dict(data="cifar10", data_dir="data", limit=0, holdout=0)
    return dict(arch=config.arch, width=config.width, data=data, config=named)


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


# %% Results
COLUMNS = "{:<10} {:>5}  {:<8}  {:>4}  {:>7}  {:>14} {:<8} {:>6}  {:<10}  {}"
HEADER = "method epoch features k top-1 correct images bank data checkpoint"


def table_row(row):
    """A measurement as a line of the table."""
    percent, correct = f"{100 * row['top1']:.2f} %", f"{row['correct']} of {row['n_test']}"
    first = [row[name] for name in ("what", "epoch", "features", "k")]
    last = [row["evaluated_on"], row["n_train"], Path(row["data"]).name, row["checkpoint"] or "-"]
    return COLUMNS.format(*first, percent, correct, *last)


def result_file(path, config):
    """The knn.jsonl that a result of this checkpoint goes to, if any."""
    folder = Path(config.out) if config.out else path and path.parent
    if not folder:
        return None
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise Halt(f"no knn.jsonl can be written to {folder}: name another folder with --out")
    return folder / "knn.jsonl"


SAME = "what checkpoint epoch features k temperature data_sha256 seed".split()


def record(path, row):
    """Add a row to knn.jsonl, in the place of an older one of the same measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if row["checkpoint"]:
        row = row | {"checkpoint": os.path.relpath(row["checkpoint"], path.parent)}

    def same(line):
        try:
            return all(json.loads(line).get(name) == row[name] for name in SAME)
        except (ValueError, AttributeError):  # torn by a full disk, for example
            return False

    old = path.read_text() if path.exists() else ""
    rest = [line for line in old.splitlines() if not same(line)]
    new = json.dumps(row) + "\n"
    if len(rest) < len(old.splitlines()):
        write_atomic(path, "\n".join([*rest, new]).encode())
        return
    with open(path, "a") as file:
        file.write("\n" + new if old and not old.endswith("\n") else new)
        file.flush()
        os.fsync(file.fileno())


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


def main(argv=None):
    """Measure as the command line says -> exit code"""
    try:
        config = parse_config(argv)
        paths, baseline = [Path(path) for path in config.checkpoints], config.baseline != "none"
        if not paths and not baseline:
            raise Halt("name run folders or checkpoints, for example runs/moco, or a --baseline")
        if baseline and (config.watch or config.features == "head"):
            raise Halt("--baseline goes with neither --watch nor --features head")
        if config.watch and (len(paths) != 1 or not paths[0].is_dir()):
            raise Halt(f"--watch follows the folder of one run, not {config.checkpoints}")
        if config.watch:
            files, states = [paths[0] / "last.pt"], watch(paths[0], config)
            print(f"following {paths[0]}/ until pretrain.pt is there; Ctrl-C stops", flush=True)
        elif paths:
            files = [find_checkpoint(path) for path in paths]
            states = ((path, load_checkpoint(path)) for path in files)  # one at a time
        else:
            files, states = [None], [(None, untrained(config))]
        for path in files:
            result_file(path, config)  # find out now whether it can be written
        header = COLUMNS.format(*HEADER.split()) + "\n"
        for path, checkpoint in states:
            row = measure_knn(path, checkpoint, config)
            print(header + table_row(row), flush=True)
            header = ""
            if target := result_file(path, config):
                record(target, row)
    except Halt as halt:
        print(f"error: {halt}", file=sys.stderr)
        return halt.code
    except torch.OutOfMemoryError:
        print("error: out of memory: lower --limit, or take --device cpu", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: knn.jsonl cannot be written: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("error: interrupted; what was measured is in knn.jsonl", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    if code and "__file__" in globals():  # a notebook stays open
        sys.exit(code)
