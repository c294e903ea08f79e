"""Why can MoCo's loss rise? The runs, the tables and the figure of docs/loss.md.

    python tools/loss_rise.py         # trains on CIFAR-10: 18 minutes on a busy core
    python tools/loss_rise.py --draw  # only tables and figure, from results/loss-rise.json

Every four epochs it takes 512 queries and looks for their keys among the queue as it is, and among
the same images encoded afresh by the current key encoder. So it sees what the keys' age does.
"""

import argparse
import copy
import hashlib
import json
import sys
import tempfile
from collections import deque
from pathlib import Path

import matplotlib
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import moco_cifar
import plots
from moco_cifar import augment, info_nce, seed_of, unit

FILE = ROOT / "results" / "loss-rise.json"
COMMON = "--arch resnet8 --width 16 --bn-splits 1 --batch-size 128"
RUNS = {  # name: the flags that differ
    "2,000 images": "--limit 2000 --epochs 40",
    "8,000 images": "--limit 8000 --epochs 10",
    "step schedule": "--limit 2000 --epochs 40 --schedule step",
    "step schedule, frozen after epoch 20": "--limit 2000 --epochs 40 --schedule step",
    "K = 512": "--limit 2000 --epochs 40 --queue-size 512",
    "20 epochs": "--limit 2000 --epochs 20",
    "20 epochs, m = 0.9": "--limit 2000 --epochs 20 --key-momentum 0.9",
}
DETAILED = "2,000 images"  # the run whose queue is looked at


class Watched(moco_cifar.Run):
    """A run that remembers whose keys are in the queue, and can stop its query encoder."""

    freeze_after = 10**9  # epochs

    def start(self, model, online, optimizer, chance):
        self.rows_in_queue = deque(maxlen=self.config.queue_size // self.config.batch_size)
        self.looks, shared = [], super().start(model, online, optimizer, chance)
        learn = shared.step
        shared.step = lambda: learn() if self.step < self.freeze_after * self.steps else None
        return shared

    def record(self, loss):
        self.rows_in_queue.appendleft(self.rows)  # the newest first
        return super().record(loss)

    def finish_epoch(self, epoch):
        super().finish_epoch(epoch)
        if epoch % 4 == 0 and len(self.rows_in_queue) == self.rows_in_queue.maxlen:
            self.looks.append({"epoch": epoch} | self.look(epoch))

    @torch.no_grad()
    def look(self, epoch):
        """Losses of 512 queries with the stored and with fresh keys, and both kinds by their age"""
        model, size = copy.deepcopy(self.model), self.config.batch_size  # its batch norm learns
        torch.manual_seed(seed_of(self.config.seed, "look", epoch))

        def encode(encoder, rows):
            with self.autocast():
                return unit(encoder(augment(self.images[rows], self.config))).float()

        some = torch.randperm(len(self.images))[:512]
        q = torch.cat([encode(model.encoder_q, rows) for rows in some.split(size)])
        k = torch.cat([encode(model.encoder_k, rows) for rows in some.split(size)])
        stored = model.queue.keys.roll(-int(model.queue.pointer), 0)  # the oldest first
        fresh = torch.stack([encode(model.encoder_k, rows) for rows in self.rows_in_queue])
        keys = {"stored": stored.unflatten(0, (-1, size)).flip(0), "fresh": fresh}  # (K/N, N, C)
        direction = F.normalize(q.mean(0), dim=0)
        own = torch.cat([*self.rows_in_queue]) == some[:, None]  # (512, K): of the query's image
        found = {"own_keys": own.sum(1).double().mean().item()}
        for kind, k_old in keys.items():
            found[f"loss_{kind}"] = info_nce(
                q, k, k_old.flatten(0, 1), self.config.temperature
            ).item()
            found[f"along_{kind}"] = (k_old @ direction).mean(1).tolist()  # newest first
        logits = q @ keys["stored"].flatten(0, 1).T
        logits = torch.cat([(q * k).sum(1, keepdim=True), logits.masked_fill(own, -9e9)], dim=1)
        without = F.cross_entropy(logits / self.config.temperature, own.new_zeros(len(q)).long())
        return found | {"loss_without_own": without.item()}


def train(name, data):
    """-> what the page needs of a run"""
    with tempfile.TemporaryDirectory() as out:
        flags = f"{COMMON} {RUNS[name]} --knn-every 0 --save-seconds 1000 --out {out}".split()
        config = moco_cifar.parse_config([*flags, "--data", data])
        run = Watched(config)
        if "frozen" in name:
            run.freeze_after = 20
        moco_cifar.train(config, run)
        run.ends.close()
    found = dict(name=name, flags=f"{COMMON} {RUNS[name]}", history=run.history)
    return found | dict(looks=run.looks if name == DETAILED else [], machine=run.about["machine"])


def table_of_looks(runs):
    """The losses with stored and with fresh keys, epoch by epoch"""
    looks = [look for look in runs[DETAILED]["looks"] if look["epoch"] in (8, 20, 32, 40)]
    rows = {"loss with the queue as it is": [look["loss_stored"] for look in looks]}
    rows["loss with its images encoded afresh"] = [look["loss_fresh"] for look in looks]
    rows["difference: what the keys' age gives away"] = [
        look["loss_fresh"] - look["loss_stored"] for look in looks
    ]
    rows["part of the loss due to keys of the query's own image"] = [
        look["loss_stored"] - look["loss_without_own"] for look in looks
    ]
    cells = [[name, *(f"{value:.3f}" for value in values)] for name, values in rows.items()]
    return plots.as_table(["after epoch", *(str(look["epoch"]) for look in looks)], cells)


def table_of_runs(runs):
    """The mean loss of three epochs, and the last k-NN accuracy"""
    rows = []
    for name, run in runs.items():
        history = run["history"]
        epochs = history[1], history[len(history) // 2 - 1], history[-1]
        cells = [f"{row['loss']:.2f}" for row in epochs]
        rows.append([name, *cells, f"{100 * history[-1]['knn_top1']:.1f}"])
    head = ["run", "loss in epoch 2", "half way", "at the end", "k-NN top-1 (%)"]
    return plots.as_table(head, rows)


def draw(runs):
    """The loss by epoch, and where the keys lie by their age"""
    figure = plots.new_figure("MoCo's loss rises when the features stop drifting", 10, 4.6)
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(name for name in RUNS if "--epochs 40" in RUNS[name]):
        rows = [row for row in runs[name]["history"] if row["epoch"] > 3]  # the queue is full
        plots.draw_curve(left, rows, "loss", name, i)
    plots.draw_curve(left, runs[DETAILED]["looks"], "loss_fresh", f"{DETAILED}, fresh keys", 5)
    left.set_ylabel("loss (nats)")
    for i, look in enumerate(look for look in runs[DETAILED]["looks"] if look["epoch"] in (8, 40)):
        for j, kind in enumerate(("stored", "fresh")):
            rows = [dict(age=age, along=x) for age, x in enumerate(look[f"along_{kind}"], 1)]
            name = f"epoch {look['epoch']}, {kind} keys"
            plots.draw_curve(right, rows, "along", name, 2 * i + j, against="age")
    right.set(xlabel="age of the keys (steps)", ylabel="keys along the mean query (cosine)")
    plots.legend_below(figure, 3)
    return figure


def rebuild(text, runs):
    """docs/loss.md with its two tables made anew"""
    for name, table in {"looks": table_of_looks(runs), "runs": table_of_runs(runs)}.items():
        before, rest = text.split(f"<!-- {name} -->")
        text = f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text += rest.split(f"<!-- /{name} -->")[1]
    return text


def fingerprint():
    """What the figure was drawn from, as a hash; the figure holds it"""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()


def published():
    return {run["name"]: run for run in json.loads(FILE.read_text())["runs"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", default="cifar10", help="as in pretraining [cifar10]")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.draw:
        done = dict(kind="loss-rise", runs=[train(name, args.data) for name in RUNS])
        FILE.write_text(json.dumps(done) + "\n")
    page = ROOT / "docs" / "loss.md"
    page.write_text(rebuild(page.read_text(), published()))
    with matplotlib.rc_context(plots.STYLE):
        mark = {"Description": fingerprint()}
        draw(published()).savefig(ROOT / "docs" / "loss-rise.png", dpi=100, metadata=mark)
