"""k-NN accuracy of any checkpoint: how good its features are, without training anything.

A feature is the vector h that the encoder makes of an image. A test image is classified by the k
training images whose features are most similar to its own: each votes for its label, and the more
similar it is, the more its vote counts. The temperature T sets how much more.

    M training images --encoder--> bank: their features, D numbers each, computed once
                                   |
    test image --encoder--> h --> cosine similarity s with each row, from -1 to 1
                                   --> the k largest vote exp(s / T) each --> the largest sum wins

There is no learning rate to choose and nothing is random: one pass over the images shows at any
epoch whether a run is improving. The loss doesn't: its value depends on the number of negatives,
its own temperature and the augmentation, and it can rise while the features get better. A linear
probe can reweight the features and usually scores higher; k-NN takes the distances as they are.

Results can be compared only if they were measured alike, so each one carries its protocol:
 - features: here h, from the backbone (512 numbers in ResNet-18). Pretraining puts a small head
   behind it and computes the loss from the head's output. The official MoCo demo measures those
   128 numbers; --features head does too.
 - k = 200 and T = 0.1 here and in the MoCo demo; T = 0.07 in Wu et al. 2018 (arXiv:1805.01978).
 - epoch: here the checkpoint's own, so the last. lightly's table has the best epoch *on the test
   set*, which is higher by chance alone. To choose something, choose it on --holdout images.
 - images as they are, neither cropped nor jittered, with batch norm in eval mode.
And no number means much alone: --baseline pixels compares the images themselves, --baseline random
the features of an encoder that has learned nothing.

    python knn_monitor.py runs/moco runs/simclr/last.pt   # prints a table
    python knn_monitor.py runs/moco --watch               # follows a run until it is complete
    python knn_monitor.py runs/moco --baseline random     # the same encoder, untrained

Writes beside the checkpoint: knn.jsonl, a line per result, and for the figures of plots.py
neighbours.npz and map.npz (--baseline random: map-random.npz).
"""

# %%
import dataclasses
import time
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer, resnet


# %% Config: each field becomes a flag --like-this, and its comment is the help text
@dataclasses.dataclass
class Config:
    checkpoints: list = dataclasses.field(default_factory=list)  # folders or files [the newest run]
    # -- what to measure
    k: int = 200  # neighbours that vote
    temperature: float = 0.1  # T of the vote: the smaller, the more the nearest ones decide
    features: Literal["backbone", "head"] = "backbone"  # head: what the loss sees
    baseline: Literal["none", "pixels", "random"] = "none"  # measure this instead of the encoder
    watch: bool = False  # follow a run's folder: measure each new state until it is complete
    # -- data ("" or 0: as in the checkpoint)
    data: str = ""  # cifar10, cifar100, svhn, stl10 or an .npz file
    data_dir: str = ""  # folder for downloads
    limit: int = 0  # number of training images in the bank, equally many of each class
    holdout: int = 0  # hold out this many training images and measure on them, not the test set
    # -- run
    out: str = ""  # folder for the results; "": the checkpoint's own
    seed: int = 0  # random seed of the untrained encoder
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the encoder, not of the vote


RECIPES = {}  # none


# %% Features
def build_model(path, checkpoint, config):
    """What turns images into features: the encoder, with the head behind it if asked for."""
    if config.baseline == "pixels":
        return nn.Flatten()
    torch.manual_seed(config.seed)
    model = encoder = build_encoder(checkpoint["arch"], checkpoint["width"])
    try:
        if config.baseline == "none":
            encoder.load_state_dict(checkpoint["encoder"])
        if config.features == "head":
            model = nn.Sequential(encoder, load_head(checkpoint["head"]))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        shape = f"{checkpoint['arch']} of width {checkpoint['width']}"
        raise UserError(f"{path}: no {config.features} of a {shape} in it") from None
    return model.eval()  # batch norm uses the statistics of training, and leaves them alone


@torch.no_grad()
def embed(model, images, about, device, dtype, batch=1000):
    """Features of images as they are, only normalised: (N, 3, S, S) uint8 -> (N, D) float32"""
    mean, std = (torch.tensor(about[x], device=device).view(3, 1, 1) for x in ("mean", "std"))
    features = []
    for part in tqdm(images.split(batch), "features", leave=False, disable=None):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features.append(model((part.to(device) / 255 - mean) / std).float())
    return torch.cat(features)


# %% The vote
def knn_predict(features, bank, bank_labels, classes, k, temperature):
    """Weighted k-nearest-neighbour vote by cosine similarity (Wu et al. 2018, sec. 3.4).

    features (N, D), bank (M, D), normalised here; bank_labels (M,) -> class scores (N, classes)
    """
    similarity = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T  # (N, M)
    similarity, nearest = similarity.topk(k, dim=1)  # (N, k)
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # exp(s / T) but for a factor
    return weight.new_zeros(len(weight), classes).scatter_add_(1, bank_labels[nearest], weight)


# %% What the figures show: the neighbours of a few test images, and a map of many
def choose_images(labels, n):
    """Indices of n images, or of all: random but always the same ones, equally many per class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return order[stratified(labels[order], min(n, len(labels)), "n")[0]]


def find_neighbours(h, bank, data, rows=6, k=5):
    """A few test images, and the training images that the encoder considers most similar."""
    chosen = choose_images(data.y_test, rows)
    cosines = F.normalize(h[chosen], dim=1) @ F.normalize(bank, dim=1).T  # (rows, M)
    cosines, nearest = (x.cpu() for x in cosines.topk(min(k, len(bank)), dim=1))  # (rows, k)
    images = {"test_images": data.x_test[chosen], "images": data.x_train[nearest]}
    images = {name: x.movedim(-3, -1) for name, x in images.items()}  # (..., S, S, 3)
    labels = dict(test_labels=data.y_test[chosen], labels=data.y_train[nearest])
    return images | labels | dict(cosines=cosines, bank=len(bank))


def map_features(h, labels, n=2000):
    """Test images as points in the plane of largest variance of the features (PCA)."""
    chosen = choose_images(labels, n)
    x = F.normalize(h[chosen].cpu().double(), dim=1)
    x = x - x.mean(0)
    variances, directions = torch.linalg.eigh(x.T @ x)  # ascending
    two = directions[:, -2:].flip(1)  # (D, 2)
    two = two * two.gather(0, two.abs().argmax(0, keepdim=True)).sign()  # or the sign is arbitrary
    shares = variances[-2:].flip(0) / variances.sum().clamp(min=1e-12)
    return dict(points=(x @ two).float(), labels=labels[chosen], shares=shares.float())


# %% One measurement, and many while a run is under way
def measure_knn(path, checkpoint, config):
    """Measure a checkpoint, read from path -> a row of the table, {file name: arrays to write}"""
    start, data = time.monotonic(), find_data(checkpoint, config)
    about, y_bank, y = data.about, data.y_train, data.y_test
    if not 1 <= config.k <= len(y_bank):
        raise UserError(f"--k {config.k}: must be from 1 to {len(y_bank)}, the images in the bank")
    if len(y_bank.unique()) < 2:
        raise UserError(f"--data {about['name']}: only one class, so every vote would be right")
    device, dtype = start_device(config)
    model = build_model(path, checkpoint, config).to(device, memory_format=torch.channels_last)
    bank, h = (embed(model, x, about, device, dtype) for x in (data.x_train, data.x_test))
    if not (bank.isfinite().all() and h.isfinite().all()):
        raise UserError(f"{path}: its features are not finite")  # nan would vote for class 0
    vote = bank, y_bank.to(device), len(about["classes"]), config.k, config.temperature
    scores = torch.cat([knn_predict(part, *vote) for part in h.split(1000)])  # (N, M) is too large
    correct = int((scores.argmax(1).cpu() == y).sum())
    what, epoch, seed = config.baseline, 0, config.seed
    of = (checkpoint["method"] != "supervised" and checkpoint.get("pretrain")) or checkpoint
    if what == "none":  # of a probe: the epochs of its pretraining
        what, epoch, seed = checkpoint["method"], of["epoch"], checkpoint["machine"]["seed"]
    features = "pixels" if what == "pixels" else config.features
    row = dict(what=what, checkpoint=str(path), epoch=epoch, features=features)
    row |= dict(k=config.k, temperature=config.temperature, top1=correct / len(y), correct=correct)
    row |= dict(n_test=len(y), n_train=len(bank), data=about["name"])
    row |= dict(evaluated_on="holdout" if about["holdout"] else "test", data_sha256=about["sha256"])
    row |= dict(seed=seed, device=str(device), precision=str(dtype), torch=str(torch.__version__))
    files = {}  # for the figures
    if what == "random":
        files = {"map-random.npz": map_features(h, y)}
    elif features == "backbone":
        files = {"map.npz": map_features(h, y), "neighbours.npz": find_neighbours(h, bank, data)}
    files = {name: arrays | {"epoch": epoch} for name, arrays in files.items()}
    return row | dict(seconds=time.monotonic() - start), files


def watch(folder):
    """Yield path, checkpoint for each new state of a run; the last one is pretrain.pt."""
    path = seen = None
    while not path or path.name != "pretrain.pt":
        time.sleep(5 if seen else 0.1)
        try:
            path = find_checkpoint(folder)
            if (written := path.stat().st_mtime_ns) != seen:
                checkpoint, seen = load_checkpoint(path), written
                yield path, checkpoint
        except (OSError, UserError):  # not there yet, being replaced, or half a copy
            if path and path.name == "pretrain.pt":
                raise


# ---- plumbing: the same in every script, nothing about the method below this line ----
import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
import typing
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torchvision
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


# %% The encoder and the head, as a checkpoint holds them
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


def load_head(state):
    """Rebuild the head from its weights {"0.weight": ..., ...}: (N, dim) -> (N, C)"""
    layers = []
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
    return head


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


def find_data(checkpoint, config):
    """The images that a checkpoint was trained on, or those that the flags name instead."""
    flags = {k: v for k in "data data_dir limit holdout".split() if (v := getattr(config, k))}
    settings = checkpoint["config"] | checkpoint["data"] | flags
    source = config.data or settings.get("file", settings["name"])
    data, before = load_data(source, SimpleNamespace(**settings)), checkpoint["data"].get("sha256")
    if not flags.keys() - {"data_dir"} and before not in (None, data.about["sha256"]):
        why = "these are not the images of the pretraining (another sha256)"
        raise UserError(f"{source}: {why}; restore them, or name others with --data")
    return data


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


# %% Results
HEADER = "method     epoch  features    k    top-1     correct images    bank  data, checkpoint"
LINE = "{what:<10} {epoch:>5}  {features:<8} {k:>4}  {top1:>7.2%}  {correct:>6} of {n_test}"
LINE += " {evaluated_on:<7} {n_train:>6}  {data}  {checkpoint}"
SAME = "what checkpoint epoch features k temperature data_sha256 seed".split()


def record(path, row):
    """Add a row to knn.jsonl, instead of an older one of the same measurement and torn lines."""
    row = row | {"checkpoint": os.path.relpath(row["checkpoint"], path.parent)}
    rows = map(json.loads, re.findall("^{.*}$", path.read_text() if path.exists() else "", re.M))
    rows = [old for old in rows if any(old.get(name) != row[name] for name in SAME)]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in (*rows, row)).encode())


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


# %% Command line
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


POSITIVE = """image_size std width head_hidden predictor_hidden dim grid parts_combined queue_size
    temperature bn_splits knn_k batch_size""".split()
SHARES = "crop_scale flip jitter gray blur key_momentum sgd_momentum labels lr_decay".split()


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


def find_states(config):
    """Check what the flags name, and yield path, checkpoint for each thing to measure."""
    if config.baseline != "none" and (config.watch or config.features == "head"):
        raise UserError("--baseline cannot be combined with --watch or --features head")
    paths = [Path(path) for path in config.checkpoints or [newest_run()]]
    if not config.watch:
        for path in [find_checkpoint(path) for path in paths]:
            yield path, load_checkpoint(path)
    elif len(paths) > 1 or not paths[0].is_dir():
        raise UserError(f"--watch follows the folder of one run, not {shlex.join(map(str, paths))}")
    else:
        print(f"following {paths[0]}/ until it has pretrain.pt; Ctrl-C stops", flush=True)
        yield from watch(paths[0])


def main(argv=None):
    """Measure what the command line asks for -> exit code"""
    folders = []
    try:
        config = parse_config(argv)
        for path, checkpoint in find_states(config):
            folder = Path(config.out) if config.out else path.parent
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # fails now, not after the work
            row, arrays = measure_knn(path, checkpoint, config)
            if not folders:
                if (k := checkpoint["config"].get("knn_k", config.k)) != config.k:
                    print(f"note: this is with k = {config.k}; the log of pretraining has k = {k}")
                print(HEADER)
            print(LINE.format(**row), flush=True)
            folders.append(str(folder))
            record(folder / "knn.jsonl", row)
            own = row["data_sha256"] == checkpoint["data"].get("sha256", row["data_sha256"])
            if config.out or own and not path.name.startswith("epoch"):  # what figures show
                for name, found in arrays.items():
                    write_atomic(folder / name, lambda file, found=found: np.savez(file, **found))
        if not config.out:
            print("next: python plots.py", shlex.join(dict.fromkeys(folders)))
        return 0
    except UserError as error:
        message, code = error, error.code
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "DefaultCPUAllocator" not in str(error):
            raise
        message, code = "out of memory: set --limit, or use --device cpu", 2
    except OSError as error:
        message, code = f"{error}: name another folder with --out", 4 if folders else 2
    except KeyboardInterrupt:
        message, code = "interrupted; finished results are in knn.jsonl", 130
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__" and (code := main()):
    UserError._render_traceback_ = lambda error: [str(error)]  # in a notebook: not a traceback
    raise SystemExit(code) if "__file__" in globals() else UserError("see the error above", code)
