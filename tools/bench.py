"""How fast the pretraining scripts are, part by part, and beside a plain baseline.

    python tools/bench.py                      # MoCo and the baseline: up to 5 minutes on 2 cores
    python tools/bench.py --method all --end-to-end-batch-size 0
    python tools/bench.py --arch resnet8 --width 8 --batch-size 16 --images 500    # a quick look

What is timed is the script's own `train`, fed with random images by its own `Run`. Each variant
(script or baseline) has a process of its own, and only one works at a time: A B C, A B C, ... The
machine's noise meets all alike; a ratio is the median of those within a round. A repeat is as many
steps as fill --seconds, the device synchronised at both ends. The first round, of one step (5 on a
GPU), is the warm-up; on a CPU it counts if the others are no longer. "step": the batch is ready on
the device, ours as uint8, to be augmented within the step, the baseline's as finished views. "end
to end": the data is included. With workers, the baseline's is a short epoch that starts with no
batch ready.

Fast-MoCo is compared with itself without patches, --encode whole, which is MoCo v3.

The baseline is MoCo as plain scripts do it: PIL transforms image by image in a DataLoader, float32,
NCHW, a loop over the parameters for the momentum update, .item() at each step. It has glibc's
memory allocator as it comes. On a CPU the scripts tell theirs to keep its memory;
--same-allocator adds a baseline that does so too.

Peak memory is the process's after the rounds: on CUDA torch's max_memory_allocated, else ru_maxrss,
with Python, torch and the images in it. FLOPs are what torch's FlopCounterMode counts in a real
step (convolutions, matrix products). Share of the matrix rate: FLOPs an image x images/s of a step
/ the best rate of a matrix product here. "~": in proportion, from a part of the images or epochs.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image  # torchvision brings it
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SCRIPTS = {"moco": "moco_cifar", "fast-moco": "fast_moco", "simclr": "simclr"}
ARCHS = "resnet18 resnet34 resnet50 resnet8".split()
PARTS = ("augment", "momentum_update")  # functions of a script that are timed by their name
# a server imports torch once, and from it the processes of the variants are forked
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torchvision.transforms", "torch.utils.flop_counter"])


class Trouble(Exception):
    """Ends the benchmark: one line on standard error, exit code 2."""


def now(device):
    """Seconds, when the device has done all that it was told"""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


# %% The baseline, from the paper and from how such scripts are written
class PlainSplitNorm(nn.BatchNorm2d):
    """Batch norm in `splits` groups of the batch, in one call: groups become channels. A group is
    every splits-th image here; which images form a group does not matter.
    """

    def __init__(self, channels, splits):
        super().__init__(channels)
        self.splits = splits

    def forward(self, x):  # in training
        s, (n, c, h, w) = self.splits, x.shape
        mean, var = self.running_mean.repeat(s), self.running_var.repeat(s)
        weight, bias = self.weight.repeat(s), self.bias.repeat(s)
        x = x.reshape(n // s, s * c, h, w)
        x = F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(s, c).mean(0))
        self.running_var.copy_(var.view(s, c).mean(0))
        return x.view(n, c, h, w)


class Baseline:
    """MoCo, asymmetric, with a linear head, on the script's settings; float32 and NCHW"""

    def __init__(self, script, config, device):
        if config.batch_size % config.bn_splits:
            raise script.Halt("--batch-size must be a multiple of --bn-splits")

        def build():
            norm = lambda channels: PlainSplitNorm(channels, config.bn_splits)
            backbone = script.build_encoder(config.arch, config.width, norm)
            return nn.Sequential(backbone, nn.Linear(backbone.dim, config.dim)).to(device)

        self.config, self.device, self.encoder_q, self.encoder_k = config, device, build(), build()
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
            param_k.data.copy_(param_q.data)
            param_k.requires_grad = False
        self.queue = F.normalize(torch.randn(config.dim, config.queue_size, device=device), dim=0)
        sgd = dict(momentum=config.sgd_momentum, weight_decay=config.weight_decay)
        self.optimizer = torch.optim.SGD(self.encoder_q.parameters(), config.lr, **sgd)
        self.pointer = 0

    def update_keys(self):
        m = self.config.key_momentum
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
            param_k.data = param_k.data * m + param_q.data * (1 - m)

    def loss(self, im_q, im_k):
        """-> loss, keys (N, C)"""
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            shuffle = torch.randperm(len(im_k)).to(self.device)
            k = F.normalize(self.encoder_k(im_k[shuffle]), dim=1)[torch.argsort(shuffle)]
        positive = torch.einsum("nc,nc->n", [q, k])[:, None]
        logits = torch.cat([positive, q @ self.queue], dim=1) / self.config.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long).to(self.device)), k

    def step(self, im_q, im_k):
        self.update_keys()
        loss, keys = self.loss(im_q, im_k)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        slots = (self.pointer + torch.arange(len(keys))) % self.queue.shape[1]
        self.queue[:, slots.to(self.device)] = keys.T
        self.pointer = (self.pointer + len(keys)) % self.queue.shape[1]
        return loss.item()


class Pairs(torch.utils.data.Dataset):
    """Two views of each image (N, H, W, 3) uint8; and, for its loader, lists of random indices"""

    def __init__(self, images, config):
        self.images, self.batch_size, self.batches = images, config.batch_size, 1
        crop = T.RandomResizedCrop(config.image_size, config.crop_scale)
        jitter = T.RandomApply([T.ColorJitter(*config.jitter)], p=0.8)
        steps = crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(config.gray)
        self.transform = T.Compose([*steps, T.ToTensor(), T.Normalize(config.mean, config.std)])

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        return self.transform(image), self.transform(image)

    def __iter__(self):
        for _ in range(self.batches):
            yield torch.randint(len(self.images), (self.batch_size,)).tolist()


# %% A variant in a process of its own
def serve(conn, device, fixed, fresh, extras):
    """The batches of a training loop, on order: at each yield it does one step. An order is (task,
    n); the answer is {"seconds": of one of the n steps} and what extras[task] notes besides.
    """
    conn.send({})  # ready
    while order := conn.recv():
        task, n = order
        with extras.get(task, contextlib.nullcontext)() as notes:
            start = now(device)
            yield from fresh(n) if task == "end_to_end" else itertools.repeat(fixed, n)
            seconds = now(device) - start
        conn.send({"seconds": seconds / max(n, 1)} | (notes or {}))


@contextlib.contextmanager
def stopwatch(device, targets):
    """Time all calls of functions, {label: (owner, name)} -> {"parts": {label: seconds}}"""
    spent, start = {}, now(device)

    def watched(label, function):
        def wrapper(*args, **kwargs):
            start = now(device)
            result = function(*args, **kwargs)
            spent[label] = spent.get(label, 0) + now(device) - start
            return result

        return wrapper

    with contextlib.ExitStack() as stack:
        for label, (owner, name) in targets.items():
            watch = watched(label, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, watch))
        yield {"parts": spent}
    spent["forward and backward"] = now(device) - start - sum(spent.values())


@contextlib.contextmanager
def count_flops(script):
    """-> {"flops": of all that is done within, as if each map were convolved by itself}"""
    notes, plain = {}, torch.nn.Conv2d.forward
    with mock.patch.object(script.SmallMapConv, "forward", plain):
        with FlopCounterMode(display=False) as counter:
            yield notes
    notes["flops"] = counter.get_total_flops()


@contextlib.contextmanager
def peak_memory(device):
    """-> {"bytes": at most, since the process began}"""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield {"bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak}


@contextlib.contextmanager
def knn_pass(script, run):
    """-> {"images", "features", "vote"}: seconds of a part of the script's knn_accuracy"""
    bank = torch.randn(len(run.data.x_train), run.encoder.dim, device=run.device)
    labels = torch.randint(10, (len(bank),), device=run.device)
    images = run.data.x_train[: 250 if run.device.type == "cpu" else 10_000]
    start = now(run.device)
    features = script.extract_features(run.encoder, images, run.config, run.autocast)
    middle = now(run.device)
    for part in features.split(1000):
        script.knn_predict(part, bank, labels, 10, run.config.knn_k, 0.1).argmax(1).cpu()
    vote = now(run.device) - middle
    yield {"images": len(images), "features": middle - start, "vote": vote}


def ours(script, config, conn):
    """The script's own training, on its own Run, which serves it batches."""

    class Served(script.Run):
        def save(self, name):
            return True  # nothing to the disk

        def resume(self, model, online, optimizer):
            super().resume(model, online, optimizer)
            for number in (signal.SIGINT, signal.SIGTERM):  # no state to be saved
                signal.signal(number, signal.SIG_DFL)

        def batches(self):
            source, device = super().batches(), self.device
            targets = {name.replace("_", " "): (script, name) for name in PARTS}
            targets = {k: v for k, v in targets.items() if hasattr(*v)}
            targets["optimizer"] = self.optimizer, "step"
            extras = {
                "parts": lambda: stopwatch(device, targets),
                "flops": lambda: count_flops(script),
            }
            extras |= {"peak": lambda: peak_memory(device), "knn": lambda: knn_pass(script, self)}
            fresh = lambda n: itertools.islice(source, n)
            yield from serve(conn, device, next(source), fresh, extras)

    script.train(config, Served(config))


def baseline(script, config, conn, device, workers):
    """The baseline's training, served likewise."""
    model, pairs = Baseline(script, config, device), Pairs(np.load(config.data)["x_train"], config)
    how = dict(num_workers=workers, persistent_workers=workers > 0)
    how |= dict(pin_memory=device.type == "cuda")
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=pairs, **how)

    def fresh(n):
        pairs.batches = n
        for views in loader:
            yield [view.to(device, non_blocking=True) for view in views]

    (fixed,) = fresh(1)
    for im_q, im_k in serve(conn, device, fixed, fresh, {"peak": lambda: peak_memory(device)}):
        model.step(im_q, im_k)


def perform(conn, who, method, options, batch_size, folder):
    """What the process of a variant does."""
    script = load(method)
    values = dict(data=f"{folder}/noise.npz", out=f"{folder}/{os.getpid()}", batch_size=batch_size)
    values |= dict(arch=options.arch, width=options.width, device=options.device, image_size=32)
    values |= dict(epochs=10**6, knn_every=0, knn_k=min(200, options.images))
    values |= dict(encode="whole") if who == "encode whole" else {}
    values |= dict(compile=options.compile and who not in ("eager", "baseline"))
    values = {k: values[k] for k in script.Config.__dataclass_fields__ if k in values}
    try:
        config = script.check_config(script.Config(**values))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if who != "baseline":
                script.start_device(config)  # tells the allocator
            if who.startswith("baseline"):
                baseline(script, config, conn, torch.device(options.device), options.workers)
            else:
                ours(script, config, conn)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # nobody orders any more
    except Exception as error:
        if not isinstance(error, script.Halt) and "memory" not in str(error):
            traceback.print_exc()
        conn.send({"trouble": f"{method}, {who}: {str(error).splitlines()[0]}"})


class Variant:
    """The side that orders: variant("step", n) -> the answer"""

    def __init__(self, who, *args):
        self.who, (self.conn, other) = who, CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=perform, args=(other, who, *args))
        self.process.start()
        other.close()

    def __call__(self, *order):
        try:
            if order:
                self.conn.send(order)
            answer = self.conn.recv()
        except (EOFError, OSError):
            raise Trouble(f"{self.who}: its process has ended (out of memory?)") from None
        if "trouble" in answer:
            raise Trouble(answer["trouble"])
        return answer

    def close(self):
        with contextlib.suppress(OSError):
            self.conn.send(None)
        self.process.join(5)
        self.process.terminate()
        self.process.join()


@contextlib.contextmanager
def variants(names, *args):
    """{name: Variant}, all of them ready"""
    with contextlib.ExitStack() as stack:
        some = {}
        for name in names:
            some[name] = Variant(name, *args)
            stack.callback(some[name].close)
        for variant in some.values():
            variant()  # waits
        yield some


# %% The measurements
def take_turns(turns, options):
    """turns {name: (variant, task)} -> {name: [answer, ...]}, interleaved, after a warm-up"""
    gpu, steps, answers = options.device != "cpu", {}, {name: [] for name in turns}
    start = time.monotonic()
    for name, (variant, task) in turns.items():
        workers = options.workers if (name, task) == ("baseline", "end_to_end") else 0
        least = max(1, 2 * workers)
        for _ in range(5 if gpu and least == 1 else 1):
            answer = variant(task, least)
        steps[name] = max(least, round(options.seconds / answer["seconds"]))
        answers[name].append(answer)
    if gpu or options.compile or max(steps.values()) > 1:
        answers = {name: [] for name in turns}
    counted = len(answers["ours"])
    for n in tqdm(range(counted, options.repeats), "rounds", disable=None, leave=False):
        seconds, start = time.monotonic() - start, time.monotonic()
        if n >= 3 and start + seconds > options.deadline:
            break
        for name, (variant, task) in turns.items():
            answers[name].append(variant(task, steps[name]))
    return answers


def summary(values):
    return {"rounds": values, "median": statistics.median(values)}


def compare(result, what, answers, images):
    """Put the images/s of each variant into result[what], and the ratios of ours to the others."""
    rates = {k: [images / row["seconds"] for row in answers[k]] for k in answers if k != "parts"}
    result[what] = {name: summary(rounds) for name, rounds in rates.items()}
    for name, rounds in rates.items():
        if name != "ours":
            pairs = zip(rates["ours"], rounds)
            result["ratios"][what, name] = summary([ours / theirs for ours, theirs in pairs])


def measure(method, options, folder, matrix_flops):
    """Everything about one script -> a plain dict"""
    result, sizes = {"ratios": {}}, (options.batch_size, options.end_to_end_batch_size)
    gpu = options.device != "cpu"
    rivals = {"moco": ["baseline"], "fast-moco": ["encode whole"]}.get(method, [])
    rivals += ["eager"] if options.compile else []
    names = ["ours", *rivals]
    names += ["baseline, same allocator"] if method == "moco" and options.same_allocator else []
    with variants(names, method, options, sizes[0], folder) as some:
        # watching the parts synchronises: on a GPU it gets a turn of its own
        turns = {name: (variant, "step") for name, variant in some.items()}
        turns["parts" if gpu else "ours"] = some["ours"], "parts"
        answers = take_turns(turns, options)
        result["peak_bytes"] = {name: some[name]("peak", 0)["bytes"] for name in names}
        plain = some.get("eager", some["ours"])  # what is compiled, is not counted
        result["flops_per_image"] = plain("flops", 1)["flops"] / sizes[0]
        result["knn"] = [some["ours"]("knn", 0) for _ in range(options.repeats)]
    compare(result, "step", answers, sizes[0])
    result["flops_per_second"] = result["step"]["ours"]["median"] * result["flops_per_image"]
    result["share_of_matrix_rate"] = result["flops_per_second"] / matrix_flops
    parts = [row["parts"] for row in answers["parts" if gpu else "ours"]]
    shares = {name: [part[name] / sum(part.values()) for part in parts] for name in parts[0]}
    result["share_of_step"] = {name: summary(rounds) for name, rounds in shares.items()}
    if sizes[1]:
        with variants(["ours", *rivals], method, options, sizes[1], folder) as some:
            turns = {name: (variant, "end_to_end") for name, variant in some.items()}
            compare(result, "end_to_end", take_turns(turns, options), sizes[1])
    for name in names[1:]:
        peaks = result["peak_bytes"]
        result["ratios"]["peak_bytes", name] = {"median": peaks["ours"] / peaks[name]}
    result["ratios"] = [{"of": k[0], "to": k[1], **v} for k, v in result["ratios"].items()]
    return result


def matrix_rate(device, dtype, tries=20):
    """TFLOP/s of a product of square matrices, the best of some tries"""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    seconds = []
    for _ in range(tries + 1):  # the first warms up
        start = now(device)
        a @ b
        seconds.append(now(device) - start)
    return 2 * n**3 / min(seconds[1:]) / 1e12


def probe_epochs(options, dim=512):
    """Seconds of each epoch of linear_eval's own training of a classifier, on given features"""
    script, data = importlib.import_module("linear_eval"), {"about": {"classes": range(10)}}
    for part, n in (("train", options.images), ("test", max(5, options.images // 5))):
        data[f"x_{part}"] = torch.randn(n, dim, device=options.device) / dim**0.5
        data[f"y_{part}"] = torch.randint(10, (n,), device=options.device)
    config = script.Config(epochs=options.repeats + 1)  # the first warms up
    encoder, scaler = nn.Identity(), torch.amp.GradScaler(enabled=False)
    encoder.dim, data = dim, SimpleNamespace(**data)
    with contextlib.redirect_stderr(io.StringIO()):
        _, history = script.train_linear(encoder, data, config, contextlib.nullcontext, scaler)
    return [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(history)]


def bench(options):
    """All that there is to say -> a plain dict for the JSON file"""
    script = load(options.method[0])
    try:
        device, dtype = script.start_device(script.Config(device=options.device))
    except script.Halt as halt:
        raise Trouble(halt) from None
    machine = {"name": machine_name(device), "cores": os.cpu_count()}
    machine |= script.describe_machine(device, dtype, 0)
    options.device = str(device)
    if options.workers is None:
        options.workers = 0 if device.type == "cpu" else os.cpu_count()
    options.deadline = time.monotonic() + 60 * options.minutes - 15  # so much follows the rounds
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "device", "deadline")}
    tflops = {t: matrix_rate(device, t) for t in {torch.bfloat16, torch.float32, dtype}}
    result = {"schema": 1, "kind": "bench", "machine": machine, "settings": settings}
    result["matrix_tflops"] = {str(t).removeprefix("torch."): v for t, v in tflops.items()}
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]  # set by make: the scripts do without, the baseline is to
    with tempfile.TemporaryDirectory() as folder:
        arrays, rng = {}, np.random.default_rng(0)
        for part, n in (("train", options.images), ("test", 10)):
            arrays[f"x_{part}"] = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
            arrays[f"y_{part}"] = np.arange(n) % 10
        np.savez(f"{folder}/noise.npz", **arrays)
        how = options, folder, 1e12 * max(tflops.values())
        result["methods"] = {method: measure(method, *how) for method in options.method}
    seconds = probe_epochs(options)
    result["probe"] = {"features": [options.images, 512], "epoch_seconds": summary(seconds)}
    return result


# %% What a person sees
def table(result):
    """The same as text"""
    machine, settings = result["machine"], result["settings"]
    rates = [f"{name} {rate:.3g} TFLOP/s" for name, rate in result["matrix_tflops"].items()]
    lines = [
        f"{machine['name']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, {machine['precision'].removeprefix('torch.')}",
        f"matrix products: {', '.join(rates)}",
    ]

    def row(name, value, text=""):
        lines.append(f"  {name:46}{value:>10,.4g} {text}")

    for method, r in result["methods"].items():
        size, step = settings["batch_size"], r["step"]["ours"]["median"]
        lines += ["", f"{method}, {settings['arch']} of width {settings['width']}, batch {size}"]
        row("training step", step, "images/s")
        for name, share in r["share_of_step"].items():
            row(f"  {name}", 1000 * share["median"] * size / step, f"ms, {share['median']:.2%}")
        row("one image", r["flops_per_image"] / 1e9, "GFLOP")
        share = f"TFLOP/s, {r['share_of_matrix_rate']:.1%} of the matrix rate"
        row("all images", r["flops_per_second"] / 1e12, share)
        features, vote = (
            statistics.median(knn[key] / knn["images"] for knn in r["knn"])
            for key in ("features", "vote")
        )
        row("k-NN: features", 1 / features, "images/s")
        row(f"k-NN: vote of {settings['images']:,}", 1 / vote, "images/s")
        row("k-NN on 50,000 + 10,000 images", 60_000 * features + 10_000 * vote, "s ~")
        row("peak memory", r["peak_bytes"]["ours"] / 2**20, "MiB")
        for ratio in r["ratios"]:
            other, of = r[ratio["of"]][ratio["to"]], ratio["of"].replace("_", " ")
            size = settings["batch_size" if of != "end to end" else "end_to_end_batch_size"]
            text = f"({other / 2**20:,.0f} MiB)" if of == "peak bytes" else ""
            if not text:
                low, high = min(ratio["rounds"]), max(ratio["rounds"])
                text = f"({other['median']:,.4g} images/s; {low:.2f} to {high:.2f}"
                text += f" in {len(ratio['rounds'])} rounds)"
            row(f"ratio, {of}, {size}: {ratio['to']}", ratio["median"], text)
    n, dim = result["probe"]["features"]
    lines += ["", f"linear probe on {n:,} x {dim} features"]
    row("100 epochs", 100 * result["probe"]["epoch_seconds"]["median"], "s ~")
    return "\n".join(lines)


def machine_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return names[0] if names else platform.processor() or platform.machine()


def load(method):
    return importlib.import_module(SCRIPTS[method])


def parse(argv):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Trouble(f"{message} (--help shows the flags)")

    there = [name for name, script in SCRIPTS.items() if (ROOT / f"{script}.py").exists()]
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--method", nargs="+", choices=[*there, "all"], default=["moco"], help="[moco]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    add("--arch", choices=ARCHS, default="resnet18", help="[resnet18]")
    add("--width", type=int, default=64, help="channels of the first stage [64]")
    add("--batch-size", type=int, default=256, help="[256]")
    add("--end-to-end-batch-size", type=int, default=512, help="0 leaves that part out [512]")
    add("--repeats", type=int, default=5, help="rounds [5]")
    add("--minutes", type=float, default=5, help="no round that ends later, after three [5]")
    add("--seconds", type=float, default=1.0, help="of a repeat, about [1]")
    add("--images", type=int, default=50_000, help="random images to train on [50000]")
    add("--workers", type=int, help="of the baseline's loader [0; on a GPU one a core]")
    add("--compile", action="store_true", help="compile ours, and compare with ours as it is")
    help = "another baseline, which keeps its memory too"
    add("--same-allocator", action="store_true", help=help)
    add("--json", type=Path, help="where the numbers go [results/bench-<machine>.json]")
    options = parser.parse_args(argv)
    for name in "width batch_size repeats minutes seconds images".split():
        if not getattr(options, name) > 0:
            raise Trouble(f"--{name.replace('_', '-')}: must be more than 0")
    options.method = there if "all" in options.method else options.method
    if options.json and not options.json.parent.is_dir():
        raise Trouble(f"--json {options.json}: there is no such folder")
    return options


def main(argv=None):
    try:
        options = parse(argv)
        text = json.dumps(result := bench(options), indent=1) + "\n"
        slug = re.sub(r"[^a-z0-9]+", "-", result["machine"]["name"].lower()).strip("-")
        path = options.json or ROOT / "results" / f"bench-{slug}.json"
        print(table(result))
        path.write_text(text)
    except (Trouble, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
