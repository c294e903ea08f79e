"""Publish finished runs: a JSON file each in results/, and from all of them the tables of README.md
and docs/results.md, and the pictures in docs/.

    python tools/results.py runs/NAME [...] --data "CIFAR-10"
    python tools/results.py runs/NAME/epoch0010.pt --data "CIFAR-10"  # of a run that was stopped
    python tools/results.py runs/NAME --data "CIFAR-10" --again       # it repeats a published run
    python tools/results.py runs/ablate-NAME-SCALE/* --ablation NAME   # into docs/ablations.md
    python tools/results.py                     # only rebuild the tables and pictures

A file holds settings, machine, hashes, every epoch, and accuracies as whole numbers of images. No
number in a table is typed by hand: tests/test_results.py rebuilds them. Runs that differ only in
their seed share a row, with mean and standard deviation. tools/bench.py writes the files of the
table of speeds; of equal measurements the latest counts.
"""

import argparse
import dataclasses
import fnmatch
import functools
import hashlib
import importlib
import itertools
import json
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import ideas  # noqa: E402
import report  # noqa: E402

import plots  # noqa: E402

# between <!-- NAME --> and <!-- /NAME --> on a page stands what table_of_NAME() makes
PAGES = {
    "README.md": ["best"],
    "docs/results.md": "runs tuning labels again report_moco demo demo_small speed".split(),
    "docs/race.md": ["race", "efficiency"],
}
# files whose code has since changed in a way that matters: their rows say so
STALE = ["bench-intel-r-xeon-r-processor*"]  # before the scripts were simplified
SCRIPTS = {"moco": "moco_cifar", "simclr": "simclr", "fast-moco": "fast_moco"}
LOCAL = ("out", "data", "data_dir", "checkpoints")  # settings that only name places on a machine
# and those that no accuracy depends on
WITHOUT_EFFECT = (*LOCAL, *"seed device knn_every keep_every save_seconds compile restart".split())


# %% From a run's folder to a file
def load(path):
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def rows_of(path):
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def without(row, names):
    return {key: value for key, value in row.items() if key not in names}


def evaluation(linear, folder):
    """What is kept of a linear.pt, and of those of kept checkpoints in the same folder"""
    how = dict(config=without(linear["config"], LOCAL), machine=linear["machine"])
    along = plots.read_evaluation(folder).along
    if linear["config"].get("lr") == (10.0,):  # the report's: what it does before it falls
        keys = "epoch", "lr", "top1", "top5", "test_loss"
        how["history"] = [{key: row[key] for key in keys} for row in linear["history"]]
    return linear["result"] | how | (dict(along=along) if along else {})


def belongs(file, linear, checkpoint, whole=False):
    """Is this evaluation of the checkpoint's images, and of its weights unless it began untrained?
    whole: is it also a linear probe with all labels? If not, say so.
    """
    config, of = linear["config"], linear["pretrain"]
    fits = linear["data"].get("sha256") == checkpoint["data"].get("sha256")
    if config["mode"] != "supervised" and config["init"] == "pretrained":
        fits &= all(of[key] == checkpoint[key] for key in ("epoch", "config"))
    if whole:
        fits &= (config["mode"], config["labels"]) == ("probe", 1)
    if not fits:
        print(f"note: {file} is of another epoch, run, kind or data, left out")
    return fits


def collect(run, data, minutes=True):
    """Everything worth keeping of a run's folder, or of a run up to a checkpoint -> a plain dict"""
    path, run = (run, run.parent) if run.suffix == ".pt" else (run / "pretrain.pt", run)
    checkpoint = load(path)
    if checkpoint is None:
        sys.exit(f"error: {path} is not there: is the run finished?")
    about, source = checkpoint["data"], checkpoint["source"].encode()
    images = {key: about[key] for key in ("n_train", "n_test", "image_size", "holdout")}
    result = dict(
        schema=1,
        method=checkpoint["method"],
        data=images | dict(name=data, classes=len(about["classes"])),
        data_sha256=about["sha256"],
        checkpoint_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        script_sha256=hashlib.sha256(source).hexdigest(),
        config=without(checkpoint["config"], LOCAL),
        machine=checkpoint["machine"],
        evaluations={},  # with few labels, fine-tuned, supervised: one for each folder
    )
    probe = run / (path.stem if path.stem.startswith("epoch") else "") / "linear.pt"
    for name, file in (("probe", probe), ("random_probe", run / "random/linear.pt")):
        if (linear := load(file)) and belongs(file, linear, checkpoint, whole=True):
            result[name] = evaluation(linear, file.parent)
    for file in sorted(run.glob("*/linear.pt")):
        name, linear = file.parent.name, load(file)
        other = name == "random" or name.startswith("epoch")
        if not other and belongs(file, linear, checkpoint):
            result["evaluations"][name] = evaluation(linear, file.parent)
    result["knn"] = [without(row, ("checkpoint", "data")) for row in rows_of(run / "knn.jsonl")]
    result["history"] = checkpoint["history"]
    if not minutes:
        result["history"] = [without(row, ["seconds"]) for row in result["history"]]
        result["machine"] = without(result["machine"], ["seconds"])
    return result


def published(folder=ROOT / "results"):
    """The contents of all files. A run has its repetition as `again`, and the evaluations that were
    made only of that one.
    """
    results = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        result["stale"] = any(fnmatch.fnmatch(file.stem, pattern) for pattern in STALE)
        if (again := folder / "again" / file.name).exists():
            result["again"] = json.loads(again.read_text())
            result["evaluations"] = result["again"]["evaluations"] | result["evaluations"]
        results.append(result)
    return results


# %% From the files to the rows
def stopped(run):
    """Is this a run up to a checkpoint, not up to its last epoch?"""
    return bool(run["history"]) and run["history"][-1]["epoch"] < run["config"]["epochs"]


def grouped(results, tuning=False):
    """Lists of runs that differ only in seed and CPU: real images first, and most of them first.
    tuning: those that were evaluated on held-out training images, to choose settings with
    """
    groups = {}
    ended = [result for result in results if "history" in result and not stopped(result)]
    for result in sorted(ended, key=lambda result: result["config"]["seed"]):
        if bool(result["data"].get("holdout")) == tuning:
            device = result["machine"]["device"].partition(" ")[0]  # cpu or cuda
            config = without(result["config"], WITHOUT_EFFECT)
            key = json.dumps([result["method"], result["data"], config, device], sort_keys=True)
            groups.setdefault(key, []).append(result)

    def place(group):
        return not is_real(group), -group[0]["data"]["n_train"], -mean_knn(group)

    return sorted(groups.values(), key=place)


def name_of_data(group):
    """As it was published, but for a remark in brackets"""
    return group[0]["data"]["name"].partition(" (")[0]


def is_real(group):
    return "shapes" not in name_of_data(group)


def is_cifar10(group):
    """And not its JPEG-compressed copy?"""
    return group[0]["data"]["name"] == "CIFAR-10"


def by_protocol(row, run):
    """Is a k-NN row of this run's images and last epoch (of a baseline 0), and by our protocol?"""
    wanted = dict(k=200, temperature=0.1, data_sha256=run.get("data_sha256"))
    alike = all(row.get(key, value) == value for key, value in wanted.items())
    last = 0 if row["what"] in plots.BASELINES else run["config"]["epochs"]
    return alike and row["epoch"] == last and row.get("features") != "head"


def knn(group, what=None):
    """Accuracies of the method itself or of a baseline, one for each run that has it"""
    found = []
    for run in group:
        rows = [row for row in run["knn"] if row["what"] == (what or run["method"])]
        if rows := [row for row in rows if by_protocol(row, run)]:
            found.append(rows[-1]["correct"] / rows[-1]["n_test"])
        elif not what and run["history"] and run["config"].get("knn_k", 200) == 200:
            # the run's own monitor
            found.append(run["history"][-1]["knn_top1"])
    return found


def mean_knn(group):
    return statistics.mean(knn(group) or [0])


def probe(group, name="probe"):
    """Top-1 accuracies, but not of probes whose test loss exceeds that of guessing: their learning
    rate was too high.
    """
    found = [(run[name], math.log(run["data"]["classes"])) for run in group if name in run]
    return [p["correct"]["top1"] / p["n_test"] for p, guess in found if p["test_loss"] < guess]


def show(values, scale=100, digits=1):
    """Fractions -> mean ± standard deviation, in percent; or the one value that all are"""
    values = [scale * value for value in values]
    if len(set(values)) < 2:
        return f"{values[0]:.{digits}f}" if values else ""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def machine_of(result):
    machine = result["machine"]
    name = re.sub(r"^cpu |\(R\)| Processor", "", machine.get("name") or machine["device"])
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return f"{name}, {threads}, {machine['precision'].removeprefix('torch.')}"


def machines_of(group):
    return "; ".join(dict.fromkeys(map(machine_of, group)))


def cells_of(group):
    """What tables say of a group, by column"""
    run, config, name = group[0], group[0]["config"], group[0]["method"]
    seconds = [run["machine"]["seconds"] for run in group if "seconds" in run["machine"]]
    if name == "fast-moco":  # which of its variants
        name += f", {config['framework']}" if config["framework"] != "moco" else ""
        name += f", {config['encode']}" if config["encode"] != "divide-combine" else ""
        name = "fast-moco, whole (MoCo v3)" if name == "fast-moco, whole" else name
    return {
        "method": name + " (stale)" * any(run.get("stale") for run in group),
        "images": f"{run['data']['name']}, {run['data']['n_train']:,}",
        "encoder": f"{config['arch']}, width {config['width']}",
        "epochs": config["epochs"],
        "temperature": config.get("temperature"),
        "learning rate": config.get("lr"),
        "image size": config.get("image_size"),
        "seeds": len(group),
        "k-NN %": show(knn(group)),
        "probe %": show(probe(group)),
        "pixels k-NN %": show(knn(group, "pixels")),
        "untrained k-NN %": show(knn(group, "random")),
        "PFLOP": f"{config['epochs'] * training_flop(group) / 1e15:.2g}",
        "minutes": f"{statistics.median(seconds) / 60:.1f}" if seconds else "",
        "machine": machines_of(group),
        "date": run["machine"]["started"][:10],
        "commit": run["machine"]["commit"][:7],
    }


@functools.cache
def forward_flop(script, arch, width, size):
    """What one image costs in a pass through the encoder, counted; a multiply-add is two"""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder = importlib.import_module(script).build_encoder(arch, width).eval()
        encoder(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()


def training_flop(group):
    """The encoder's work in an epoch; heads, augmentation and k-NN are left out. A view that is
    learned from costs three passes, one with its backward pass, and any other costs one.
    """
    run, config = group[0], group[0]["config"]
    passes = {"simclr": 6, "fast-moco": 8, "moco": 4}[run["method"]]
    passes = {"memory-bank": 3, "end-to-end": 6}.get(config.get("mechanism"), passes)
    passes *= (1 + config.get("symmetric", False)) * ideas.WORK.get(config.get("idea"), 1)
    shape = config["arch"], config["width"], run["data"].get("image_size", 32)
    return passes * run["data"]["n_train"] * forward_flop(SCRIPTS[run["method"]], *shape)


def flags_of(group, recipe=None):
    """The settings of the first of the runs that are not its script's defaults or, if it is given,
    its recipe's -> {name: flag}
    """
    script, config = importlib.import_module(SCRIPTS[group[0]["method"]]), group[0]["config"]
    flags = {}
    for name, usual in dataclasses.asdict(script.Config()).items():
        value, usual = config.get(name, usual), script.RECIPES.get(recipe, {}).get(name, usual)
        value = tuple(value) if isinstance(value, list) else value
        if name not in WITHOUT_EFFECT and value != usual:
            flag = name.replace("_", "-")
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            yes_no = {True: f"--{flag}", False: f"--no-{flag}"}
            flags[name] = yes_no[value] if isinstance(value, bool) else f"--{flag} {text}"
    return flags


def changes_of(group):
    """How the first of the runs differs from --recipe cpu, but for its length -> {name: flag}"""
    flags = without(flags_of(group, "cpu"), ("epochs", "holdout"))
    idea = group[0]["config"].get("idea")
    return flags | ({"idea": f"tools/ideas.py {idea}"} if idea else {})


def command_of(group):
    """The command that repeats the first of the runs, with the scripts as they are now"""
    idea = group[0]["config"].get("idea")
    script = f"tools/ideas.py {idea}" if idea else f"{SCRIPTS[group[0]['method']]}.py"
    words = ["python", script]
    files = {name: flag for flag, name in plots.DATASETS.items()}
    file = files.get(name_of_data(group), "FILE.npz") if is_real(group) else "data/shapes.npz"
    words += ["--data", file] * (file != "cifar10")
    return " ".join([*words, *flags_of(group).values(), f"--seed {group[0]['config']['seed']}"])


# %% From the rows to the tables
def markdown(rows, columns=None):
    """A Markdown table of dicts with the same keys, or of some of the keys"""
    columns = columns or [*rows[0]]
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def with_commands(groups, columns=None, cells_of=cells_of):
    """A table of groups, its rows numbered, and the command of each row"""
    rows = [{"": i} | cells_of(group) for i, group in enumerate(groups, 1)]
    commands = [f"{command_of(group)}  # {i}" for i, group in enumerate(groups, 1)]
    if not all(map(is_real, groups)):
        commands.insert(0, "make data/shapes.npz  # once: the synthetic shapes")
    return "\n".join([markdown(rows, columns), "", "```", *commands, "```"])


def table_of_runs(results):
    """All runs, a row for those that differ only in their seed"""
    columns = ["", "method", "images", "encoder", "epochs", "seeds", "k-NN %", "probe %"]
    columns += ["pixels k-NN %", "untrained k-NN %", "PFLOP", "minutes"]
    return with_commands(grouped(results), [*columns, "machine", "date", "commit"])


def table_of_tuning(results):
    """The runs with which the settings of --recipe cpu were chosen, the best first"""
    columns = ["", "method", "temperature", "learning rate", "image size", "otherwise", "epochs"]
    columns += ["k-NN %", "PFLOP", "machine", "date"]
    own = "temperature", "lr", "image_size"  # have columns

    def cells(group):
        others = without(changes_of(group), own).values()
        return cells_of(group) | {"otherwise": " ".join(others)}

    return with_commands(grouped(results, tuning=True), columns, cells)


def table_of_efficiency(results):
    """What gains on SimCLR's recipe in as much work: accuracies on held-out training images"""
    groups = [g for g in grouped(results, tuning=True) if g[0]["method"] == "simclr"]
    rows, (usual,) = [], [mean_knn(group) for group in groups if not changes_of(group)]
    for group in groups:
        what, cells = " ".join(changes_of(group).values()), cells_of(group)
        row = {"instead of the recipe's": what or "(the recipe)", "epochs": cells["epochs"]}
        row |= {"PFLOP": cells["PFLOP"], "k-NN %": cells["k-NN %"], "seeds": cells["seeds"]}
        gain = 100 * (mean_knn(group) - usual)
        rows.append(row | {"difference": f"{gain:+.1f}" if what else ""})
    return markdown(rows)


def table_of_race(results):
    """Minutes and PFLOP of the runs on all real images when k-NN was first seen at 60, 65, 70%"""
    rows = []
    for group in grouped(results):
        full = is_cifar10(group) and group[0]["data"]["n_train"] == 50_000
        for goal in (60, 65, 70) if full else ():
            reached = [r for r in curve_of(group, "minutes") if 100 * r["knn_top1"] >= goal]
            if reached:  # k-NN is measured every few epochs
                first, cells = reached[0], cells_of(group)
                row = {"k-NN %": f"{goal} ({100 * first['knn_top1']:.1f})"}
                row |= {name: cells[name] for name in ("method", "encoder", "epochs")}
                row |= {"epoch": first["epoch"], "minutes": f"{first['seconds'] / 60:.0f}"}
                row |= {"PFLOP": f"{first['epoch'] * training_flop(group) / 1e15:.2g}"}
                rows.append(row | {"machine": cells["machine"]})
    return markdown(sorted(rows, key=lambda row: (row["k-NN %"][:2], float(row["PFLOP"]))))


def best_of(results):
    """Of each method the best run on CIFAR-10, then on synthetic images"""
    best = {}
    for group in sorted(grouped(results), key=lambda group: (not is_real(group), -mean_knn(group))):
        shown = is_cifar10(group) or not is_real(group)
        if shown and not any(run.get("stale") for run in group):
            best.setdefault((is_real(group), cells_of(group)["method"]), group)
    return [*best.values()]


def table_of_best(results):
    """The README's table: the first six of these"""
    columns = ["", "method", "images", "encoder", "epochs", "k-NN %", "probe %"]
    columns += ["pixels k-NN %", "untrained k-NN %", "minutes"]
    return with_commands(best_of(results)[:6], columns)


LABELS = {  # folder of an evaluation: what it is, and the SimCLR course report's top-1 and top-3
    "finetune": ("pretrained, end to end", "77.4 / 94.8"),
    "probe": ("pretrained, frozen", "71.3 / 93.6"),
    "random-finetune": ("random init, end to end: supervised", "38.2 / 60.1"),
    "random-probe": ("random init, frozen", "15.6 / 34.4"),
    "supervised": ("supervised", "only plotted"),
}


def table_of_labels(results):
    """What is reached with a part of the labels: the SimCLR report's Table 1 and more"""
    rows = []
    for group in grouped(results):
        for folder in group[0].get("evaluations", {}):
            kind, _, share = folder.rpartition("-") if folder[-1].isdigit() else (folder, "", "1")
            if kind == "supervised" and share != "1":  # the same experiment under another name
                if f"random-finetune-{share}" in group[0]["evaluations"]:
                    continue
                kind = "random-finetune"
            found = [r["evaluations"][folder] for r in group if folder in r["evaluations"]]
            if kind in LABELS:
                cells = cells_of(group)
                row = {name: cells[name] for name in ("method", "images", "encoder", "epochs")}
                recipe = group[0]["config"].get("optimizer"), group[0]["config"].get("head")
                of_report = group[0]["method"] == "simclr" and recipe == ("adam", "linear")
                row["method"] += ", as the report" * of_report
                row |= {"evaluation": LABELS[kind][0], "labels": f"{100 * float(share):g}%"}
                row |= {"seeds": len(found)}
                for k in (1, 3):
                    values = [each["correct"][f"top{k}"] / each["n_test"] for each in found]
                    row[f"top-{k} %"] = show(values)
                share_said = "1" if kind == "supervised" else "0.1"  # in the SimCLR report
                printed = LABELS[kind][1] if of_report and share == share_said else ""
                rows.append(row | {"the report, ResNet-50": printed})
    return markdown(rows)


def table_of_again(results):
    """Runs and their repetitions, with the same settings and seed"""
    rows = []
    for first in [run for run in results if "again" in run]:
        for what, run in (("first", first), ("again", first["again"])):
            cells = cells_of([run])
            row = {key: cells[key] for key in ("method", "epochs")} | {"run": what}
            row |= {"machine": cells["machine"], "loss": f"{run['history'][-1]['loss']:.3f}"}
            row |= {"k-NN %": show(knn([run]), digits=2), "probe %": show(probe([run]), digits=2)}
            for share in (0.1, 0.01):
                found = probe([run["evaluations"] | {"data": run["data"]}], f"probe-{share}")
                row[f"probe, {share:.0%} of the labels"] = show(found, digits=2)
            rows.append(row)
    return markdown(rows)


REPORT_MOCO = {  # where an evaluation is found in a file: what it is
    "probe": "as in the report",
    "default": "the rate chosen on held-out images",
    "random_probe": "of the untrained encoder",
}


def table_of_report_moco(results):
    """`make report-moco` with a smaller encoder and fewer epochs, beside its report's Figure 6"""
    recipe, rows = importlib.import_module("moco_cifar").RECIPES["report"], []
    usual = without(recipe, ["epochs"])
    for group in grouped(results):
        if not is_cifar10(group) or not usual.items() <= group[0]["config"].items():
            continue
        cells = cells_of(group)
        for name, kind in REPORT_MOCO.items():
            found = [r.get(name) or r["evaluations"].get(name) for r in group]
            if found := [evaluation for evaluation in found if evaluation]:
                row = {key: cells[key] for key in ("encoder", "epochs", "seeds")}
                row |= {"evaluation": kind, "learning rate": f"{found[0]['lr']:g}"}
                for k in ("top1", "top5"):
                    row[f"{k[:3]}-{k[3]} %"] = show([e["correct"][k] / e["n_test"] for e in found])
                rows.append(row | {"loss": f"{statistics.mean(e['test_loss'] for e in found):.2f}"})
            high = [r for e in found for r in e.get("history", [])[20:] if r["lr"] == 10]
            if high and name == "probe":
                what = f"{kind}, mean of epochs 21 to {high[-1]['epoch']}: before the rate falls"
                mean = {key: statistics.mean(r[key] for r in high) for key in high[0]}
                row |= {"evaluation": what, "top-1 %": f"{100 * mean['top1']:.1f}"}
                row |= {"top-5 %": f"{100 * mean['top5']:.1f}", "loss": f"{mean['test_loss']:.2f}"}
                rows.append(row)
    said = "resnet18, width 64", 100, 1, "the report", 10, "41.0", "87.4", "67.39"
    return markdown([*rows, dict(zip(rows[0], said))])


# the official CIFAR-10 demo's own log (asymmetric, 200 epochs): k-NN in % on the head, and the loss
OFFICIAL = {1: (31.98, 6.957), 2: (33.52, 7.250), 5: (37.95, 6.862), 10: (48.03, 5.991)}
OFFICIAL |= {20: (61.38, 4.341), 30: (67.05, 3.692), 50: (73.30, 3.195)}


def log_of(run):
    """{epoch: (k-NN in % on the head or None, loss)}"""
    wanted = dict(what="moco", features="head", k=200, temperature=0.1)
    rows = [row for row in run["knn"] if wanted.items() <= row.items()]
    knn = {row["epoch"]: 100 * row["correct"] / row["n_test"] for row in rows}
    return {row["epoch"]: (knn.get(row["epoch"]), row["loss"]) for row in run["history"]}


def demo_log(results):
    """That of the run with the demo's settings that got furthest, stopped or not"""
    runs = [r for r in results if r.get("method") == "moco" and is_cifar10([r])]
    runs = [r for r in runs if not flags_of([r]) and not r["data"].get("holdout")]
    runs = [r for r in runs if "idea" not in r["config"]]
    return log_of(max(runs, key=lambda run: run["history"][-1]["epoch"])) if runs else {}


def table_of_demo(results):
    """`--recipe demo` beside the official demo's log, at the epochs known of both"""
    rows = []
    for epoch, (knn, loss) in demo_log(results).items():
        if knn and epoch in OFFICIAL:
            row = {"epoch": epoch, "k-NN %": f"{knn:.2f}", "the demo's k-NN %": OFFICIAL[epoch][0]}
            row |= {"difference": f"{knn - OFFICIAL[epoch][0]:+.2f}", "loss": f"{loss:.3f}"}
            rows.append(row | {"the demo's loss": f"{OFFICIAL[epoch][1]:.3f}"})
    return markdown(rows)


def table_of_demo_small(results):
    """The demo's first epochs at width 16, and what some of its differences from the official one
    are worth
    """
    groups = {}
    for run in (r for r in results if "history" in r and stopped(r) and is_cifar10([r])):
        flags = flags_of([run])
        if flags.pop("width", "") == "--width 16":
            idea = [f"tools/ideas.py {run['config']['idea']}"] if "idea" in run["config"] else []
            groups.setdefault(" ".join([*flags.values(), *idea]), []).append(run)
    rows = []
    for what, runs in sorted(groups.items()):
        row, logs = {"what differs": what or "(nothing)"}, [*map(log_of, runs)]
        row["seeds"] = len(runs)
        for i, (name, digits) in enumerate([("k-NN %", 1), ("loss", 3)]):
            for epoch in (1, 2, 5):
                found = [log[epoch][i] for log in logs if epoch in log and log[epoch][i]]
                row[f"{name}, epoch {epoch}"] = show(found, 1, digits)
        rows.append(row | {"machine": machines_of(runs)})
    return markdown(rows)


def table_of_speed(results):
    """What tools/bench.py has found of each method, at each batch size on each machine"""
    latest, rows = {}, []
    bench = [result for result in results if result.get("kind") == "bench"]
    for result in sorted(bench, key=lambda result: result["machine"]["started"]):
        how, machine = result["settings"], machine_of(result) + " (stale)" * result["stale"]
        encoder = f"{how['arch']}, width {how['width']}" + ", --compile" * how["compile"]
        for method, found in result["methods"].items():
            key = method, encoder, how["batch_size"], machine
            latest[key] = found, how["end_to_end_batch_size"]
    for (method, encoder, batch_size, machine), (found, other_size) in sorted(latest.items()):
        references = {ratio["to"]: {} for ratio in found["ratios"]} or {"": {}}
        for ratio in found["ratios"]:
            references[ratio["to"]][ratio["of"]] = f"{ratio['median']:.2f} ×"
        for reference, ratios in references.items():
            row = {"method": method, "encoder": encoder, "batch": batch_size}
            row |= {"images/s": f"{found['step']['ours']['median']:.1f}"}
            row |= {"of peak matmul": f"{found['share_of_matrix_rate']:.0%}"}
            row |= {"reference": reference, "step": ratios.get("step", "")}
            row |= {"with the data": ratios.get("end_to_end", "")}
            row |= {"at batch": other_size if "end_to_end" in ratios else ""}
            rows.append(row | {"peak memory": ratios.get("peak_bytes", ""), "machine": machine})
    return markdown(rows)


# %% From the files to the pictures
def is_copy(group):
    return "JPEG" in group[0]["data"]["name"]


def title_of(group):
    return f"{group[0]['data']['name']}, {group[0]['data']['n_train']:,} images"


def panels_of_best(results, against):
    """{title: groups}: of each method the best run"""
    panels = {}
    for group in best_of(results):
        panels.setdefault(title_of(group), []).append(group)
    return panels


def panels_of_data(results, against):
    """{title: groups}: of each data set the runs on most of its images"""
    panels, most = {}, {}
    for group in grouped(results):  # most images first
        name, n = group[0]["data"]["name"], group[0]["data"]["n_train"]
        current = not is_copy(group) and not any(run.get("stale") for run in group)
        if current and curve_of(group, against):
            panels.setdefault(name, []).extend([group] * (n == most.setdefault(name, n)))
    return {title_of(groups[0]): groups for groups in panels.values()}


def panels_of_patches(results, against):
    """Fast-MoCo with patches and with whole views, on 10,000 images"""
    groups = [group for group in grouped(results) if group[0]["method"] == "fast-moco"]
    groups = [group for group in groups if group[0]["data"]["n_train"] == 10_000]
    return {"Fast-MoCo: patches and whole views, 10,000 images": groups}


# file in docs/: what is drawn in it, against what, and whether the deviation over seeds is a band
# (or only an error bar at the end)
PICTURES = {
    "knn-epochs.png": (panels_of_best, "epoch", True),
    "knn-minutes.png": (panels_of_data, "minutes", True),
    "fast-moco-small.png": (panels_of_patches, "epoch", False),
    "along.png": (),
    "demo.png": (),
}


def curve_of(group, against):
    """k-NN accuracy along the training: mean and deviation over seeds, at the median time"""
    rows = report.mean_history([SimpleNamespace(history=run["history"]) for run in group])
    for row, *same in zip(rows, *(run["history"] for run in group)):
        if "seconds" in row:
            row["seconds"] = statistics.median(each["seconds"] for each in same)
    return [r for r in rows if "knn_top1" in r and (against == "epoch" or "seconds" in r)]


def encoder_of(group):
    """Such as ResNet-18 of width 16"""
    config = group[0]["config"]
    return f"{config['arch'].replace('resnet', 'ResNet-')} of width {config['width']}"


def levels_of(groups):
    """{name: accuracies} of what needs no pretraining, on the images of these runs"""
    levels, several = {}, len({encoder_of(group) for group in groups}) > 1
    for group in groups:
        encoder = f", {encoder_of(group)}" * several
        supervised = [run.get("evaluations", {}).get("supervised") for run in group]
        supervised = [e["correct"]["top1"] / e["n_test"] for e in supervised if e]
        for name, values in (
            ("raw pixels", knn(group, "pixels")),
            (f"untrained encoder{encoder}", knn(group, "random")),
            (f"supervised{encoder} (not k-NN)", supervised),
        ):
            if values:
                levels.setdefault(name, []).extend(values)
    return levels


def draw_knn(panels, against, band):
    """k-NN accuracy along the pretraining, a panel for each data set, beside what needs none"""
    width = max(4 * len(panels), 6)
    most = max(len(groups) + len(levels_of(groups)) for groups in panels.values())
    figure = plots.new_figure("k-NN accuracy during pretraining", width, 4 + 0.2 * most)
    for axes, (title, groups) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
        encoders, drawn = {encoder_of(group) for group in groups}, Counter()
        machines = {machines_of(group) for group in groups}
        several = len({group[0]["method"] for group in groups}) > 1
        styles = itertools.cycle(plots.DASHES[1:])
        for place, group in enumerate(groups):
            method, rows = group[0]["method"], curve_of(group, against)
            label = cells_of(group)["method"].replace(method, plots.METHODS[method], 1)
            short = encoder_of(group).replace(" of width ", " w")
            label += f", {short}" * (len(encoders) > 1)
            others = {g[0]["config"].get("temperature") for g in groups if g[0]["method"] == method}
            label += f", T {group[0]['config'].get('temperature')}" * (len(others) > 1)
            label += f", {group[0]['config']['epochs']} epochs: {show(knn(group))}"
            label = plots.fill(label, 50)
            label += f"\n({machines_of(group)})" * (len(machines) > 1 and against == "minutes")
            i = [*SCRIPTS].index(method) if several else place  # a colour per method
            end, deviation = rows[-1], 100 * rows[-1].get("± knn_top1", 0)
            if not band:
                rows = [without(row, ["± knn_top1"]) for row in rows]
                x = end[against] + 0.12 * place  # side by side
                axes.errorbar(x, 100 * end["knn_top1"], deviation, color=f"C{i}", capsize=3)
            plots.draw_curve(axes, rows, "knn_top1", label, i, 100, against)
            n, drawn[method] = drawn[method], drawn[method] + 1
            axes.lines[-1].set(ls=plots.DASHES[n % 5], marker=plots.MARKERS[(i + 3 * n) % 10])
        for style, (name, values) in zip(styles, levels_of(groups).items()):
            value = 100 * statistics.mean(values)
            axes.axhline(value, color=plots.GRAY, ls=style, lw=1, label=f"{name}: {value:.1f}")
        title += f"\n{encoder_of(groups[0])}" * (len(encoders) == 1)
        axes.set(title=title, ylabel="k-NN top-1 (%)")
        axes.set_xlim(left=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def along_of(results):
    """{title: curves, levels} of runs on CIFAR-10 whose kept checkpoints were evaluated. A curve is
    a kind of evaluation, its share of the labels, and its epochs and top-1; a level is the share
    and the top-1 of a supervised network.
    """
    panels = {}
    for run in (group[0] for group in grouped(results) if is_cifar10(group)):
        found = [run.get("probe"), *run.get("evaluations", {}).values()]
        found = [(e["config"]["mode"], e["config"]["labels"], e) for e in found if e]
        curves = [
            [LABELS[mode][0], share, [(row["epoch"], row["top1"]) for row in e["along"]]]
            for mode, share, e in found
            if "along" in e
        ]
        levels = [[share, e["top1"]] for mode, share, e in found if mode == "supervised"]
        title = f"{plots.METHODS[run['method']]}, {encoder_of([run])}"
        if curves:
            panels[f"{title}, {run['config']['epochs']} epochs"] = [curves, levels]
    return panels


def draw_along(panels):
    """Accuracy against the epochs of pretraining: the SimCLR report's Figure 2. A colour for each
    share of the labels.
    """
    figure = plots.new_figure("Classifiers along the pretraining", max(4.5 * len(panels), 6), 4.6)
    shares = {share for curves, _ in panels.values() for _, share, _ in curves}
    shares |= {share for _, levels in panels.values() for share, _ in levels}
    colors = {share: i for i, share in enumerate(sorted(shares, reverse=True))}
    kinds = [kind for kind, _ in LABELS.values()]
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        curves, levels = panels[title]
        for kind, share, points in curves:
            rows = [dict(epoch=epoch, top1=top1) for epoch, top1 in points]
            label = f"{kind}, {share:.0%} of labels"
            plots.draw_curve(axes, rows, "top1", label, kinds.index(kind), 100)
            axes.lines[-1].set_color(f"C{colors[share]}")
        for share, top1 in levels:
            plots.draw_level(axes, 100 * top1, f"supervised, {share:.0%} of labels", colors[share])
        axes.set(title=title, xlabel="epoch of pretraining", ylabel="top-1 (%)")
    plots.legend_below(figure, 2)
    return figure


def draw_demo(log):
    """`--recipe demo` beside the official demo: k-NN accuracy on the head, and the loss"""
    figure = plots.new_figure("--recipe demo beside the official demo's log", 8, 3.4)
    official = {epoch: row for epoch, row in OFFICIAL.items() if epoch <= max(log)}
    panels = zip(figure.subplots(1, 2), ("k-NN top-1 on the head (%)", "loss"))
    for i, (axes, what) in enumerate(panels):
        for place, (name, rows) in enumerate({"ours": log, "the demo": official}.items()):
            rows = [{"epoch": e, what: row[i]} for e, row in rows.items() if row[i] is not None]
            plots.draw_curve(axes, rows, what, name, place)
        axes.set(ylabel=what)
        axes.legend()
    return figure


def picture(name, results):
    """-> what a picture is drawn from, as plain values, and the function that draws it"""
    if name == "demo.png":
        log = demo_log(results)
        return [log, OFFICIAL], lambda: draw_demo(log)
    if name == "along.png":
        panels = along_of(results)
        return panels, lambda: draw_along(panels)
    select, against, band = PICTURES[name]
    panels = select(results, against)
    found = {
        title: [[cells_of(group), curve_of(group, against)] for group in groups]
        + [levels_of(groups)]
        for title, groups in panels.items()
    }
    return [found, against, band], lambda: draw_knn(panels, against, band)


def fingerprint(name, results):
    """What a picture was drawn from, as a hash; the picture holds it"""
    return hashlib.sha256(json.dumps(picture(name, results)[0]).encode()).hexdigest()


def draw_pictures(results, folder=ROOT / "docs"):
    """Draw what is not there yet, or was drawn from other results"""
    for name in PICTURES:
        mark = fingerprint(name, results)
        if not (folder / name).exists() or mark_in(folder / name) != mark:
            with matplotlib.rc_context(plots.STYLE):
                figure = picture(name, results)[1]()
                figure.savefig(folder / name, dpi=120, metadata={"Description": mark})


def mark_in(path):
    with Image.open(path) as image:
        return image.text.get("Description")


# %% Comparisons: of each run, what tools/report.py needs for the table and the figure
def collect_comparison(name, folders, published=()):
    """published: runs of earlier sittings, kept unless one of their name is among the new ones"""
    runs = []
    for run in map(plots.read_run, folders):
        found = {key: getattr(run, key) for key in "method label dataset epoch epochs".split()}
        found |= dict(name=run.name, config=without(run.config, report.LOCAL[1:]))
        last = without(run.history[-1], ["seconds"])  # taken beside other runs, so worth nothing
        found |= dict(history=[last], knn=[plots.knn_of(run)])
        probes = {n: e for n, e in run.evaluations.items() if e.result}
        found["evaluations"] = {
            n: dict(mode=e.mode, init=e.init, labels=e.labels, result={"top1": e.result["top1"]})
            for n, e in probes.items()
        }
        runs.append(found | dict(machine=run.base["machine"]))
    new = {run["name"] for run in runs}
    runs += [run for run in published if run["name"] not in new]
    return dict(comparison=name, runs=sorted(runs, key=lambda run: run["name"]))


def comparisons(folder=ROOT / "results" / "comparisons"):
    """-> {name of the file: name of the comparison, {setting: its runs}}"""
    saved = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return {stem: (one["comparison"], settings_of(one)) for stem, one in saved.items()}


def settings_of(saved):
    """-> {setting: its runs} of a comparison, as tools/report.py wants them"""
    runs = [SimpleNamespace(**run, path=run["name"]) for run in saved["runs"]]
    for run in runs:
        probes = run.evaluations.items()
        run.evaluations = {name: SimpleNamespace(**probe) for name, probe in probes}
    return report.group_runs(saved["comparison"], runs)


def rebuild_comparisons(folder=ROOT / "docs"):
    """Their tables in docs/ablations.md, <!-- NAME -->, and figures docs/ablation-NAME.png"""
    text = page = (folder / "ablations.md").read_text()
    for stem, (name, groups) in comparisons().items():
        table = report.ablation_table(name, groups)
        before, _, rest = text.partition(f"<!-- {stem} -->")
        text = f"{before}<!-- {stem} -->\n{table}\n<!-- /{stem} -->"
        text += rest.partition(f"<!-- /{stem} -->")[2]
        picture, mark = folder / f"ablation-{stem}.png", hashlib.sha256(table.encode()).hexdigest()
        if not picture.exists() or mark_in(picture) != mark:
            with matplotlib.rc_context(plots.STYLE):
                figure = report.draw_ablation_figure(name, groups)
                figure.savefig(picture, dpi=100, metadata={"Description": mark})
    if text != page:
        (folder / "ablations.md").write_text(text)


# %% From the tables to the pages
def rebuild(text, names, results):
    """A page's text with the tables between its markers made anew"""
    for name in names:
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n{globals()[f'table_of_{name}'](results)}\n{end}{after}"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--data", help="name of the images in the tables, such as CIFAR-10")
    parser.add_argument("--ablation", help="name of the comparison that the runs belong to")
    busy = "leave the minutes out, because the machine had other work or the run was paused"
    parser.add_argument("--no-minutes", action="store_true", help=busy)
    same = "they repeat published runs, with the same settings and seed"
    parser.add_argument("--again", action="store_true", help=same)
    args = parser.parse_args()
    if args.ablation and not args.runs:
        parser.error("name the folders of the runs")
    if args.ablation:
        stem = args.runs[0].resolve().parent.name.removeprefix("ablate-")
        file = ROOT / "results" / "comparisons" / f"{stem}.json"
        file.parent.mkdir(exist_ok=True)
        old = json.loads(file.read_text())["runs"] if file.exists() else ()
        try:  # nothing is written if there is nothing to compare
            comparison = json.dumps(collect_comparison(args.ablation, args.runs, old))
            settings_of(json.loads(comparison))
        except plots.UserError as error:
            sys.exit(f"error: {error}")
        file.write_text(comparison + "\n")
    elif args.runs and not args.data:
        parser.error("say with --data what the images are")
    for run in args.runs if args.data else ():
        name = f"{run.parent.name}-{run.stem}" if run.suffix == ".pt" else run.name
        file = ROOT / "results" / ("again" if args.again else "") / f"{name}.json"
        if args.again and not (ROOT / "results" / file.name).exists():
            sys.exit(f"error: results/{file.name} is not there: what does {run} repeat?")
        file.parent.mkdir(exist_ok=True)
        result = collect(run, args.data, not args.no_minutes)
        file.write_text(json.dumps(result, indent=1) + "\n")
    for page, names in PAGES.items():
        (ROOT / page).write_text(rebuild((ROOT / page).read_text(), names, published()))
    draw_pictures(published())
    rebuild_comparisons()
