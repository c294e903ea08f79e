"""How fast the pretraining scripts are, part by part, and beside a plain baseline.

    python tools/bench.py                      # MoCo and the baseline: up to 5 minutes on 2 cores
    python tools/bench.py --method all --end-to-end-batch-size 0
    python tools/bench.py --arch resnet8 --width 8 --batch-size 16 --images 512 --json x
    python tools/bench.py --count              # what a GPU would do in a step (count_kernels.py)

What is timed is the script's own `train`, fed with random images by its own `Run`. Each variant
(script or plain_moco.py) has its own process, and only one works at a time: A B C, A B C, ... The
machine's noise meets all alike; a ratio is the median of the ratios within a round. A turn is as
many steps as fill --seconds, with the device synchronised at both ends, after one step of warm-up
(5 on a GPU). "step": the batch is ready on the device, ours as uint8, to be augmented within the
step, the baseline's as finished views. "end to end": loading the data is included. Fast-MoCo is
compared with itself without patches (--encode whole, which is MoCo v3).

Peak memory is the process's: on CUDA torch's max_memory_allocated, else ru_maxrss, with Python,
torch and the images in it. FLOP are those of convolutions and matrix products in a real step. Share
of peak matmul: FLOP per image x images/s of a step / the best rate of a matrix product here.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import count_kernels
from plain_moco import Baseline, Pairs

SCRIPTS = {"moco": "moco_cifar", "fast-moco": "fast_moco", "simclr": "simclr"}
# a server imports torch once, and from it the processes of the variants are forked
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torchvision.transforms", "torch.utils.flop_counter"])


ONE_LINE = ("Trouble", "UserError", "Unsupported")  # errors; each script has its own UserError


class Trouble(Exception):
    """Ends the benchmark: one line on standard error, exit code 2."""


def now(device):
    """Seconds, when the device has done all that it was told"""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def configure(method, options, **changes):
    """-> the script, and its Config for this benchmark"""
    script = importlib.import_module(SCRIPTS[method])
    values = dict(arch=options.arch, width=options.width, batch_size=options.batch_size)
    values |= dict(image_size=32, epochs=10**6, knn_every=0, knn_k=1) | changes
    script.check_method(config := script.check_config(script.Config(**values)))
    return script, config


# %% A variant in a process of its own
@contextlib.contextmanager
def stopwatch(device, targets):
    """Time all calls of functions, {label: (owner, name)} -> {label: seconds}"""
    spent, start = dict.fromkeys(targets, 0), now(device)

    def watched(label, function):
        def wrapper(*args, **kwargs):
            start = now(device)
            result = function(*args, **kwargs)
            spent[label] += now(device) - start
            return result

        return wrapper

    with contextlib.ExitStack() as stack:
        for label, (owner, name) in targets.items():
            watch = watched(label, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, watch))
        yield spent
    spent["forward and backward"] = now(device) - start - sum(spent.values())


def peak_memory(device):
    """Bytes, at most, since the process began"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def serve(conn, device, fixed, fresh, targets=()):
    """The batches of a training loop, on order: at each yield it does one step. An order is (task,
    n); the answer has the seconds of one of the n steps.
    """
    conn.send({})  # ready
    while order := conn.recv():
        task, n = order
        counter = FlopCounterMode(display=False) if task == "flops" else contextlib.nullcontext()
        with counter, stopwatch(device, dict(targets) if task == "parts" else {}) as parts:
            start = now(device)
            yield from fresh(n) if task == "end_to_end" else itertools.repeat(fixed, n)
            seconds = (now(device) - start) / n
        flops = counter.get_total_flops() if task == "flops" else 0
        conn.send(dict(seconds=seconds, parts=parts, flops=flops, bytes=peak_memory(device)))


def ours(script, config, conn):
    """The script's own training, on its own Run, which serves it batches."""

    class Served(script.Run):
        def save(self, name):
            pass  # nothing to the disk

        def compiled(self, function):
            self.view = super().compiled(function)
            return lambda *args: self.view(*args)  # so that it can be timed

        def batches(self):
            for number in (signal.SIGINT, signal.SIGTERM):  # no state to be saved
                signal.signal(number, signal.SIG_DFL)
            source, targets = super().batches(), {"augment": (self, "view")}
            if hasattr(script, "momentum_update"):
                targets["momentum update"] = script, "momentum_update"
            targets["optimizer"] = self.optimizer, "step"
            fresh = lambda n: itertools.islice(source, n)
            yield from serve(conn, self.device, next(source), fresh, targets)

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
    for im_q, im_k in serve(conn, device, fixed, fresh):
        model.step(im_q, im_k)


def perform(conn, who, method, options, batch_size, folder):
    """What the process of a variant does."""
    changes = dict(data=f"{folder}/noise.npz", out=f"{folder}/{os.getpid()}", batch_size=batch_size)
    changes |= dict(encode="whole") if who == "encode whole" else {}
    changes |= dict(compile=options.compile and who != "eager", device=options.device)
    try:
        script, config = configure(method, options, **changes)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if who == "baseline":
                baseline(script, config, conn, torch.device(options.device), options.workers)
            else:
                ours(script, config, conn)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # nobody orders any more
    except Exception as error:
        if type(error).__name__ not in ONE_LINE and "memory" not in str(error):
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
        some = {
            name: stack.enter_context(contextlib.closing(Variant(name, *args))) for name in names
        }
        for variant in some.values():
            variant()  # waits
        yield some


# %% The measurements
def take_turns(turns, options):
    """turns {name: (variant, task)} -> {name: [answer, ...]}, interleaved, after a warm-up"""
    steps, answers = {}, {name: [] for name in turns}
    for name, (variant, task) in turns.items():
        # a loader with workers starts with no batch ready: its turn is a short epoch
        least = max(1, 2 * options.workers) if (name, task) == ("baseline", "end_to_end") else 1
        for _ in range(5 if options.device != "cpu" and least == 1 else 1):
            answer = variant(task, least)
        steps[name] = max(least, round(options.seconds / answer["seconds"]))
    start = time.monotonic()
    for n in tqdm(range(options.repeats), "rounds", disable=None, leave=False):
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
            ratios = summary([ours / theirs for ours, theirs in zip(rates["ours"], rounds)])
            result["ratios"].append({"of": what, "to": name} | ratios)


def measure(method, options, folder, matrix_flops):
    """Everything about one script -> a plain dict"""
    result, sizes = {"ratios": []}, (options.batch_size, options.end_to_end_batch_size)
    rivals = {"moco": ["baseline"], "fast-moco": ["encode whole"]}.get(method, [])
    rivals += ["eager"] if options.compile else []
    with variants(["ours", *rivals], method, options, sizes[0], folder) as some:
        turns = {name: (variant, "step") for name, variant in some.items()}
        turns["parts"] = some["ours"], "parts"  # which synchronises, so it isn't the step's time
        answers = take_turns(turns, options)
        plain = some.get("eager", some["ours"])  # what is compiled, can't be counted
        flops = result["flops_per_image"] = plain("flops", 1)["flops"] / sizes[0]
    compare(result, "step", answers, sizes[0])
    peaks = result["peak_bytes"] = {name: answers[name][-1]["bytes"] for name in some}
    for name in rivals:
        result["ratios"].append(dict(of="peak_bytes", to=name, median=peaks["ours"] / peaks[name]))
    result["share_of_matrix_rate"] = flops * result["step"]["ours"]["median"] / matrix_flops
    parts = [row["parts"] for row in answers["parts"]]
    shares = {name: [part[name] / sum(part.values()) for part in parts] for name in parts[0]}
    result["share_of_step"] = {name: summary(rounds) for name, rounds in shares.items()}
    if sizes[1]:
        with variants(["ours", *rivals], method, options, sizes[1], folder) as some:
            turns = {name: (variant, "end_to_end") for name, variant in some.items()}
            compare(result, "end_to_end", take_turns(turns, options), sizes[1])
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


def bench(options):
    """All that there is to say -> a plain dict for the JSON file"""
    script, config = configure(options.method[0], options, device=options.device)
    device, dtype = script.start_device(config)
    machine = script.describe_machine(device, dtype, 0)
    machine |= {"name": machine["device"].partition(" ")[2], "cores": os.cpu_count()}
    options.device = str(device)
    if options.workers is None:
        options.workers = 0 if device.type == "cpu" else os.cpu_count()
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "device", "count")}
    options.deadline = time.monotonic() + 60 * options.minutes - 15  # so much follows the rounds
    tflops = {t: matrix_rate(device, t) for t in {torch.bfloat16, torch.float32, dtype}}
    result = {"schema": 1, "kind": "bench", "machine": machine, "settings": settings}
    result["matrix_tflops"] = {str(t).removeprefix("torch."): v for t, v in tflops.items()}
    with tempfile.TemporaryDirectory() as folder:
        x = np.random.default_rng(0).integers(0, 256, (options.images, 32, 32, 3), np.uint8)
        y = np.arange(len(x)) % 10
        np.savez(f"{folder}/noise.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
        how = options, folder, 1e12 * max(tflops.values())
        result["methods"] = {method: measure(method, *how) for method in options.method}
    return result


# %% What a person sees
def table(result):
    """The same as text"""
    machine, settings = result["machine"], result["settings"]
    rates = [f"{name} {rate:.3g} TFLOP/s" for name, rate in result["matrix_tflops"].items()]
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    lines = [f"{where}, {machine['precision']}", f"matrix products: {', '.join(rates)}"]

    def row(name, value, text=""):
        lines.append(f"  {name:40}{value:>10,.4g} {text}")

    for method, r in result["methods"].items():
        size, step = settings["batch_size"], r["step"]["ours"]["median"]
        lines += ["", f"{method}, {settings['arch']} of width {settings['width']}, batch {size}"]
        row("training step", step, "images/s")
        for name, share in r["share_of_step"].items():
            row(f"  {name}", 1000 * share["median"] * size / step, f"ms, {share['median']:.2%}")
        row("one image", r["flops_per_image"] / 1e9, "GFLOP")
        share = f"TFLOP/s, {r['share_of_matrix_rate']:.1%} of peak matmul"
        row("all images", r["flops_per_image"] * step / 1e12, share)
        row("peak memory", r["peak_bytes"]["ours"] / 2**20, "MiB")
        for ratio in r["ratios"]:
            what, text = ratio["of"].replace("_", " "), ""
            if rounds := ratio.get("rounds"):
                text = f"({r[ratio['of']][ratio['to']]['median']:,.4g} images/s; {min(rounds):.2f} "
                text += f"to {max(rounds):.2f} in {len(rounds)} rounds)"
            row(f"ratio, {what}: {ratio['to']}", ratio["median"], text)
    return "\n".join(lines)


def parse(argv):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Trouble(f"{message} (--help shows the flags)")

    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--method", nargs="+", choices=[*SCRIPTS, "all"], default=["moco"], help="[moco]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    add("--arch", choices="resnet18 resnet34 resnet50 resnet8".split(), default="resnet18")
    add("--width", type=int, default=64, help="channels of the first stage [64]")
    add("--batch-size", type=int, help="[256; with --count 512]")
    add("--end-to-end-batch-size", type=int, default=512, help="0 leaves that part out [512]")
    add("--repeats", type=int, default=5, help="rounds [5]")
    add("--minutes", type=float, default=5, help="no round that would end later, after three [5]")
    add("--seconds", type=float, default=1.0, help="approximate length of a turn [1]")
    add("--images", type=int, default=50_000, help="random images to train on [50000]")
    add("--workers", type=int, help="of the baseline's loader [0; on a GPU one per core]")
    add("--compile", action="store_true", help="compile ours, and compare with ours as it is")
    add("--count", action="store_true", help="count kernels, FLOP and bytes, without a GPU")
    add("--json", type=Path, help="where the numbers go [results/bench-<machine>.json, count.json]")
    options = parser.parse_args(argv)
    if options.batch_size is None:
        options.batch_size = 512 if options.count else 256
    for name in "width batch_size repeats minutes seconds images".split():
        if not getattr(options, name) > 0:
            raise Trouble(f"--{name.replace('_', '-')}: must be more than 0")
    options.method = list(SCRIPTS) if "all" in options.method else options.method
    if options.json and not options.json.parent.is_dir():
        raise Trouble(f"--json {options.json}: there is no such folder")
    return options


def main(argv=None):
    try:
        options = parse(argv)
        if options.count:
            result = count_kernels.count_all(options.arch, options.width, options.batch_size)
            name, text = "count", count_kernels.table(result)
        else:
            result = bench(options)
            slug = re.sub(r"[^a-z0-9]+", "-", result["machine"]["name"].lower()).strip("-")
            name, text = f"bench-{slug}", table(result)
        print(text)
        path = options.json or ROOT / "results" / f"{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if type(error).__name__ not in ONE_LINE and not isinstance(error, OSError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
