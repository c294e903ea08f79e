"""Peak memory and time of a training step of MoCo's three mechanisms (Figure 2), batch by batch.

    python tools/mechanism_cost.py             # ResNet-18, up to what would need more than 8 GB

All have N - 1 negatives, as many as end-to-end finds in a batch of N; the last row is MoCo with the
paper's queue. Each row is measured in a process of its own, by bench.py's means. Memory: on CUDA,
the most that tensors took; otherwise the most that the process held, less what it began with. What
would need more than --cap is not run: its memory is estimated as twice that of half the batch.
"""

import argparse
import contextlib
import io
import json
import re
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import bench
import numpy as np
import torch

COLUMNS = "mechanism batch_size negatives memory_gb seconds_per_step".split()
REVIEW = """
"Review - MoCo v2", ImageNet, ResNet-50, 8 V100: MoCo, batch 256: 5.0 GB, 53 h; end-to-end, batch
256: 7.4 GB, 65 h; end-to-end, batch 4096: 93 GB, estimated."""


class Orders(list):
    """bench.py's loop takes its orders here and leaves its answers: it is ready, then each step."""

    def __init__(self, steps):
        self.recv, self.send = iter([("step", 1)] * steps + [None]).__next__, self.append


def measure(options, settings):
    moco, config = bench.configure("moco", options, **settings)
    before, answers = bench.peak_memory(torch.device("cpu")), Orders(1 + options.steps)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        bench.ours(moco, config, answers)
    _, _, *answers = answers  # the first step warms up
    before = 0 if torch.cuda.is_initialized() else before
    seconds = statistics.median(answer["seconds"] for answer in answers)
    return {"memory_gb": (answers[-1]["bytes"] - before) / 1e9, "seconds_per_step": seconds}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--batch-size", type=int, nargs=2, default=[256, 4096], help="first, last")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--cap", type=float, default=8, help="GB that a step may need")
    parser.add_argument("--steps", type=int, default=3, help="to time, after one to warm up")
    parser.add_argument("--json", type=Path, help="file [results/mechanism-cost-<machine>.json]")
    options, rows = parser.parse_args(argv), []
    first, last = options.batch_size
    moco, config = bench.configure("moco", options, device=options.device, batch_size=first)
    machine = moco.describe_machine(*moco.start_device(config), 0)
    sizes = [first * 2**i for i in range(20) if first * 2**i <= last]
    plan = [(name, n, n - 1) for name in ("moco", *moco.MECHANISMS) for n in sizes]
    print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|")
    with tempfile.TemporaryDirectory() as folder:
        x, y = np.random.randint(0, 256, (last, 32, 32, 3), np.uint8), np.zeros(last, int)
        np.savez(f"{folder}/noise.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
        images = dict(data=f"{folder}/noise.npz", out=f"{folder}/run", device=options.device)
        for mechanism, size, negatives in [*plan, ("moco", first, 65_536)]:
            row = dict(mechanism=mechanism, batch_size=size, negatives=negatives, measured=False)
            row["memory_gb"] = 2 * rows[-1]["memory_gb"] if size > first else 0
            try:
                if row["memory_gb"] > options.cap:
                    raise MemoryError(f"stopped, an estimate: more than {options.cap:g} GB")
                settings = images | dict(mechanism=mechanism, batch_size=size, queue_size=negatives)
                with ProcessPoolExecutor(1, bench.CONTEXT) as pool:
                    row |= pool.submit(measure, options, settings).result() | dict(measured=True)
            except (MemoryError, RuntimeError) as error:  # the latter if the process was killed
                row["seconds_per_step"] = str(error).splitlines()[0]
            rows.append(row)
            cells = [f"{v:.2f}" if isinstance(v := row[name], float) else v for name in COLUMNS]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(REVIEW)
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].partition(" ")[2].lower()).strip("-")
    path = options.json or bench.ROOT / "results" / f"mechanism-cost-{name}.json"
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "device")}
    result = dict(schema=1, kind="mechanism-cost", machine=machine, settings=settings, rows=rows)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if type(error).__name__ not in bench.ONE_LINE:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
