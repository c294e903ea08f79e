"""Peak memory and time of a training step of MoCo's three mechanisms (Figure 2), batch by batch.

    python tools/mechanism_cost.py               # ResNet-18, until a step would need more than 8 GB
    python tools/mechanism_cost.py --width 16 --batch-size 64 1024          # for a CPU

All have N - 1 negatives, as many as end-to-end finds in a batch of N; the last row is MoCo with the
paper's queue. Each row has a process of its own, run by bench.py's means. Memory: on CUDA, the most
that tensors took; otherwise the most that the process held, less what it held before training.
"""

import argparse
import contextlib
import io
import json
import re
import statistics
import tempfile
from pathlib import Path

import bench
import numpy as np
import torch

# "Review - MoCo v2": ImageNet, ResNet-50, 8 V100; the last is the review's own estimate
REVIEW = {("moco", 256): "5.0 GB, 53 h", ("end-to-end", 256): "7.4 GB, 65 h"}
REVIEW |= {("end-to-end", 4096): "93 GB, estimated"}
COLUMNS = ["mechanism", "batch_size", "negatives", "memory_gb", "seconds_per_step", "review"]


def perform(conn, options, settings):
    """What the process of a row does: train, on bench.py's orders."""
    try:
        conn.send({"bytes": bench.peak_memory(torch.device(options.device))})
        moco, config = bench.configure("moco", options, **settings)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            bench.ours(moco, config, conn)
    except Exception as error:
        conn.send({"trouble": str(error).splitlines()[0]})


class Measurement(bench.Variant):
    def __init__(self, *args):
        self.who, (self.conn, other) = "this row", bench.CONTEXT.Pipe()
        self.process = bench.CONTEXT.Process(target=perform, args=(other, *args))
        self.process.start()
        other.close()


def measure(options, **settings):
    with contextlib.closing(Measurement(options, settings)) as order:
        before, _, _ = order()["bytes"], order(), order("step", 1)  # warms up
        answers = [order("step", 1) for _ in range(options.steps)]
    seconds = statistics.median(answer["seconds"] for answer in answers)
    return dict(memory_gb=(answers[-1]["bytes"] - before) / 1e9, seconds_per_step=seconds)


def rows_of(mechanism, sizes, options, folder, negatives=None):
    """One row per batch size, until memory ends"""
    need = 0
    for size in sizes:
        row = dict(mechanism=mechanism, batch_size=size, negatives=negatives or size - 1)
        row["review"] = REVIEW.get((mechanism, size), "") if not negatives else ""
        settings = dict(mechanism=mechanism, batch_size=size, queue_size=row["negatives"])
        settings |= dict(device=options.device, data=f"{folder}/noise.npz", out=f"{folder}/run")
        try:
            if need > options.cap:
                raise bench.Trouble(f"stopped: would need about {need:.1f} GB")
            row |= measure(options, **settings)
        except bench.Trouble as error:
            yield row | dict(memory_gb=str(error))
            return
        need = row["memory_gb"] * 2
        yield row


def cells(row):
    numbers = {name: f"{row[name]:.2f}" for name in row if isinstance(row[name], float)}
    return f"| {' | '.join(str((row | numbers).get(name, '')) for name in COLUMNS)} |"


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--batch-size", type=int, nargs=2, default=[256, 4096], help="first, last [256 4096]")
    add("--arch", choices="resnet18 resnet34 resnet50 resnet8".split(), default="resnet18")
    add("--width", type=int, default=64, help="channels of the first stage [64]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--cap", type=float, default=8, help="stop before a step that would need more GB [8]")
    add("--steps", type=int, default=3, help="to time, after one to warm up [3]")
    add("--json", type=Path, help="where the rows go [results/mechanism-cost-<machine>.json]")
    options = parser.parse_args(argv)
    first, last = options.batch_size
    sizes = [first * 2**i for i in range(20) if first * 2**i <= last]
    moco, config = bench.configure("moco", options, device=options.device, batch_size=first)
    device, dtype = moco.start_device(config)
    options.device, machine = str(device), moco.describe_machine(device, dtype, 0)
    rows = []
    print("|".join(["", *COLUMNS, ""]), "|".join(["", *["---"] * len(COLUMNS), ""]), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        x, y = np.random.randint(0, 256, (last, 32, 32, 3), np.uint8), np.zeros(last, int)
        np.savez(f"{folder}/noise.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
        plans = [(name, sizes) for name in ("moco", *moco.MECHANISMS)]
        for mechanism, some, *negatives in [*plans, ("moco", sizes[:1], 65_536)]:
            for row in rows_of(mechanism, some, options, folder, *negatives):
                print(cells(row), flush=True)
                rows.append(row)
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].partition(" ")[2].lower()).strip("-")
    path = options.json or bench.ROOT / "results" / f"mechanism-cost-{name}.json"
    settings = dict(arch=options.arch, width=options.width, cap=options.cap, steps=options.steps)
    result = dict(schema=1, kind="mechanism-cost", machine=machine, settings=settings, rows=rows)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
