"""Comparisons of several runs, ablations, and course reports. plots.py draws them with this file:

python plots.py runs/moco runs/simclr                  # draw_comparisons()
python plots.py runs/ablate-batch/* --ablation batch   # draw_ablation()
python plots.py runs/moco --report                     # write_report()
"""

import itertools
import json
import math
import os
import statistics
from collections import defaultdict
from pathlib import Path

from ablations import ABLATIONS, printed_for
from webpage import page_of

import plots
from plots import UserError, as_table, draw_curve, fill, knn_of, new_figure, percent

# settings that make no difference to a result; what the source documents say, captions, sentences
LOCAL = "seed out data_dir device knn_every keep_every save_seconds compile restart".split()
TEXTS = json.loads(Path(__file__).with_name("documents.json").read_text())
DOCUMENTS, CAPTIONS = TEXTS["documents"], TEXTS["captions"]


# %% Several runs on one data set
def draw_comparisons(runs, folder):
    """One figure for each data set with several runs"""
    for data in dict.fromkeys(run.dataset for run in runs):
        some = [run for run in runs if run.dataset == data]
        name = "comparison" if some == runs else f"comparison-{data}"
        if some[1:]:
            plots.save_figure(draw_comparison(some), folder / name)
            print(f"{folder}/ (.png and .pdf): {name}")


def draw_comparison(runs):
    """At equal epochs, in equal time, and what the probes reach; seeds are averaged"""
    groups = same_but_seed(runs)
    probes = {name: spread(some, "probe top-1 (%)") for name, some in groups.items()}
    bars = sum(map(bool, probes.values()))
    figure = new_figure(f"Comparison on {runs[0].dataset}", 11, 4.5 + 0.4 * bars)
    places = [["loss", "knn", "time"], *[["probe"] * 3] * bool(bars)]
    panels = figure.subplot_mosaic(places, height_ratios=[3.2, 0.3 + 0.4 * bars][: len(places)])
    for i, (name, some) in enumerate(groups.items()):
        rows = mean_history(some)
        draw_curve(panels["loss"], rows, "loss", name, i)
        draw_curve(panels["knn"], rows, "knn_top1", name, i, 100)
        draw_curve(panels["time"], rows, "knn_top1", name, i, 100, against="minutes")
        if probe := probes[name]:
            bar = panels["probe"].barh(fill(name, 40), probe[0], xerr=probe[1], color=f"C{i}")
            panels["probe"].bar_label(bar, fmt="%.1f", padding=3)
            panels["probe"].set(xlabel="probe, top-1 (%)", xlim=(0, 100), ylim=(bars - 0.4, -0.6))
    for key, text in zip(panels, ("loss (nats)", "k-NN top-1 (%)", "k-NN top-1 (%)", "")):
        panels[key].set_ylabel(text)
    plots.legend_below(figure)
    return figure


def same_but_seed(runs):
    """-> {name: runs that differ only in their seed}"""
    groups, named = defaultdict(dict), {}
    for run in runs:
        settings = sorted((k, str(v)) for k, v in run.config.items() if k not in LOCAL)
        key, seed = (run.method, run.epoch, *settings), run.config.get("seed")
        key = (*key, run.name) if seed in groups[key] else key  # a seed counts once
        groups[key][seed] = run
    for some in groups.values():
        names = [run.name for run in some.values()]
        shared = os.path.commonprefix(names).removesuffix("seed").rstrip("-_") or names[0]
        name = f"{shared}, {len(names)} seeds" if names[1:] else names[0]
        named[name if name not in named else names[0]] = [*some.values()]
    return named


def mean_history(runs):
    """The mean over runs of each value in each epoch, and under "± name" its standard deviation"""
    rows = []
    for some in zip(*(run.history for run in runs)):
        shared = [key for key in some[0] if all(key in row for row in some)]
        values = {key: [row[key] for row in some] for key in shared}
        rows.append({key: statistics.mean(values[key]) for key in shared})
        rows[-1] |= {f"± {key}": statistics.stdev(values[key]) for key in shared if runs[1:]}
    return rows


# %% Ablations
def measured(run):
    """-> {what: its value}, in percent and minutes, of what was measured"""
    knn, last = knn_of(run).get("top1"), (run.history or [{}])[-1]  # evaluations have no history
    found = {"loss (nats)": last.get("loss"), "k-NN top-1 (%)": knn and 100 * knn}
    for e in run.evaluations.values():
        if (e.mode, e.init) == ("probe", "pretrained") and e.result:
            few = f", {100 * e.labels:g}% of the labels" * (e.labels < 1)
            found.setdefault(f"probe top-1{few} (%)", 100 * e.result["top1"])  # the plain one
    found["minutes"] = last["seconds"] / 60 if "seconds" in last else None
    return {what: value for what, value in found.items() if value is not None}


def columns_of(name, groups):
    """What was measured in any run: the loss if it is comparable, k-NN, probes, minutes"""
    found = {key for run in sum(groups.values(), []) for key in measured(run)}
    found -= set() if ABLATIONS[name]["loss"] else {"loss (nats)"}
    return sorted(found, key=lambda key: ("lkpm".index(key[0]), len(key)))


def spread(runs, key):
    """-> mean, standard deviation (n - 1; of one: None), n; None if nothing was measured"""
    values = [value for run in runs if (value := measured(run).get(key)) is not None]
    deviation = statistics.stdev(values) if values[1:] else None
    return (statistics.mean(values), deviation, len(values)) if values else None


def group_runs(name, runs):
    """-> {setting: the runs that have it, which differ in the seed}, in the order of the paper"""
    if name not in ABLATIONS:
        raise UserError(f"--ablation {name}: must be one of {', '.join(ABLATIONS)}")
    fields, grid, groups = ABLATIONS[name]["fields"], ABLATIONS[name]["grid"], defaultdict(list)
    for run in runs:
        if missing := [field for field in fields if field not in run.config]:
            raise UserError(f"--ablation {name}: {run.path} has no setting {missing[0]}")
        groups[tuple(run.config[field] for field in fields)].append(run)
    if len({run.method for run in runs}) > 1 or len(groups) < 2:
        raise UserError(f"--ablation {name}: runs of one method must differ in {'/'.join(fields)}")

    def rank(setting):  # numbers by size, names as the paper lists them
        order = [[row.get(field) for row in grid] for field in fields]
        places = [o.index(v) if v in o else len(o) for v, o in zip(setting, order)]
        return [v if isinstance(v, int | float) else p for v, p in zip(setting, places)]

    return {setting: groups[setting] for setting in sorted(groups, key=rank)}


def paper_figures(name, groups):
    """-> {setting: the paper's figure, or None}"""
    shortest = min(run.epochs for runs in groups.values() for run in runs)
    return {setting: printed_for(name, setting, shortest) for setting in groups}


def gain(setting, values):
    """What patches add to a framework (Fast-MoCo, Table 3), or None; values: {setting: value}"""
    without = values.get((*setting[:-1], "whole")) if setting[-1] != "whole" else None
    return values[setting] - without if without and values[setting] else None


def label_of(name, setting):
    """A setting as text"""
    if name == "frameworks":
        text = plots.FRAMEWORKS[setting[0]].removesuffix(" (ctr)")
        return text + ", AdamW" * ("adamw" in setting) + " + patches" * ("whole" not in setting)
    if name == "mechanism":
        where, queue, batch = setting
        return f"{where}, {batch - 1 if where == 'end-to-end' else queue} negatives"
    shuffled = {True: "shuffled", False: "not shuffled"}
    return ", ".join(shuffled[v] if isinstance(v, bool) else plain(v) for v in setting)


def draw_ablation_figure(name, groups):
    """What each setting is worth, and what it costs: a row for each, in the order of the paper"""
    paper, keys = paper_figures(name, groups), columns_of(name, groups)
    figure = new_figure(ABLATIONS[name]["title"], 3.6 * len(keys) + 1, 1.8 + 0.35 * len(groups))
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False, sharey=True)[0], keys):
        found = {s: spread(runs, key) for s, runs in groups.items()}
        means = {s: row and row[0] for s, row in found.items()}
        for y, setting in enumerate(groups):
            if found[setting]:
                look = dict(color="C5" if "whole" in setting else "C0", marker="o", capsize=3)
                axes.errorbar(means[setting], y, xerr=found[setting][1], **look)
                text = f"{means[setting]:.2f}"
                text += f" ({more:+.2f})" if (more := gain(setting, means)) else ""
                axes.annotate(text, (means[setting], y), (0, 5), size=8, **plots.ABOVE)
            if paper[setting] and key == "probe top-1 (%)":
                axes.plot(paper[setting], y, "s", color=plots.GRAY, mfc="w", label="in the paper")
        axes.set_yticks(range(len(groups)), [fill(label_of(name, s), 30) for s in groups])
        axes.set(xlabel=key, xmargin=0.2, ylim=(len(groups) - 0.4, -0.7))
        axes.grid(alpha=0.25)
    plots.legend_below(figure)
    return figure


def ablation_table(name, groups):
    """The same as Markdown, beside what the paper prints, and how it was measured"""
    runs, paper, rows = sum(groups.values(), []), paper_figures(name, groups), []
    keys = columns_of(name, groups)
    means = {k: {s: (spread(some, k) or [None])[0] for s, some in groups.items()} for k in keys}
    for setting, some in groups.items():
        cells = [label_of(name, setting), len(some)]
        for key in keys:
            mean, deviation, n = spread(some, key) or (None, None, 0)
            text = f"{mean:.2f}" if n else ""
            text += f" ± {deviation:.2f}" if deviation is not None else ""
            text += f" (n = {n})" * (0 < n < len(some))
            more = gain(setting, means[key])
            cells.append(text + (f" ({more:+.2f})" if more is not None else ""))
        text, more = paper[setting] or "", gain(setting, paper)
        rows.append([*cells, f"{text} ({more:+.1f})" if more is not None else text])
    others = sorted(runs[0].config.keys() - {*ABLATIONS[name]["fields"], *LOCAL})
    values = {key: sorted({plain(run.config.get(key)) for run in runs}) for key in others}
    vary = [f"{key} ({'; '.join(some)})" for key, some in values.items() if some[1:]]
    seeds = sorted({run.config.get("seed", 0) for run in runs})
    about = dict(run=runs[0], n=len(runs), seeds="s" * len(seeds[1:2]) + f" {str(seeds)[1:-1]}")
    text = TEXTS["ablation"].format(**about, **ABLATIONS[name], k=knn_of(runs[0]).get("k"))
    if late := ", ".join(run.name for run in runs if run.epoch < run.epochs):
        text += f" Not finished: {late}."
    text += f" The runs also differ in {', '.join(vary)}." if vary else ""
    head = [", ".join(ABLATIONS[name]["fields"]).replace("_", " "), "runs", *keys, "in the paper"]
    return f"{as_table(head, rows)}\n\n{text}"


def draw_ablation(config, runs):
    """One figure and one table of runs that differ in one setting"""
    name, folder = config.ablation, Path(config.out)
    groups, page = group_runs(name, runs), Path(config.table or folder / f"ablation-{name}.md")
    table = ablation_table(name, groups)
    text = plots.page_with(table, page)
    plots.save_figure(draw_ablation_figure(name, groups), folder / f"ablation-{name}")
    plots.write_page(page, text)
    print(f"{table}\n\n{page} has this table; figure (.png and .pdf): {folder}/ablation-{name}")


# %% Course reports
AUGMENTATIONS = dict(crop=("crop_scale", 1), flip=("flip", 0), color=("jitter", 0))
AUGMENTATIONS |= dict(gray=("gray", 0), blur=("blur", 0))  # SimCLR's --augment names those in use
INACTIVE = {  # settings: when they have no effect
    "head_hidden": lambda c: c.get("head") == "linear",
    "sgd_momentum": lambda c: c.get("optimizer", "sgd") != "sgd",
    "warmup_start": lambda c: not c.get("warmup_epochs"),
    "grid": lambda c: c["encode"] == "whole",
    "parts_combined combine_at": lambda c: c["encode"] in ("whole", "divide", "sample"),
    "queue_size": lambda c: "end-to-end" in c.values() or c.get("framework", "nnclr") != "nnclr",
    "key_momentum": lambda c: c.get("mechanism", "moco") != "moco",
}


def plain(value):
    """A setting as text; data sets without their folder"""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if value is None or isinstance(value, bool):
        return {None: "not recorded", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value).split("/")[-1]


def settings_of(run):
    """The settings of the pretraining that had an effect"""
    config = {"optimizer": "sgd"} | run.config if run.method == "moco" else dict(run.config)
    config["data"] = Path(str(config.get("data"))).stem
    for name, (field, off) in AUGMENTATIONS.items():
        if isinstance(config.get("augment"), str) and name not in config["augment"].split(","):
            config[field] = off
    rules = [(key, rule) for keys, rule in INACTIVE.items() for key in keys.split()]
    off = [key for key, rule in rules if key in config and rule(config)]
    off += [key for key in ("limit", "holdout") if not config.get(key)]  # all images
    return {k: v for k, v in config.items() if k == "seed" or k not in (*off, *LOCAL)}


def differences(said, config, where=""):
    """What a document says of settings, where that is not what was done: lines of Markdown"""
    lines = []
    for key, value in said.items():
        here = config.get(key, 0 if key == "limit" else None)
        here = here[0] if isinstance(here, list | tuple) and len(here) == 1 else here
        if here not in (value if isinstance(value, list) else [value]):
            value = " or ".join(map(plain, value)) if isinstance(value, list) else plain(value)
            lines.append(f"- `{key}`: {value} → {plain(here)}{where}")
    return lines


def conclusions(run):
    """What the numbers say: lines of Markdown (sampling error: two standard errors)"""
    probe, untrained = ((p or {}).get("result", {}) for p in (run.probe, run.untrained))
    pairs = [("Linear probe", probe, probe.get("n_test"), "random", untrained)]
    knn, n, lines = knn_of(run), run.data["n_test"], []
    pairs += [("k-NN", knn, n, what, knn_of(run, what)) for what in plots.BASELINES]
    for name, ours, n, what, other in pairs:
        if "top1" in ours and "top1" in other and ours.get("k") == other.get("k"):
            value, base = ours["top1"], other["top1"]
            gap, where = 100 * abs(value - base), "above" if value >= base else "below"
            error = 200 * math.sqrt((value * (1 - value) + base * (1 - base)) / n)
            text = TEXTS["gap"].format(name, value, gap, where, TEXTS[what], base)
            lines.append(f"- {text}{f', within sampling error (±{error:.1f})' * (gap < error)}.")
    during = [row["knn_top1"] for row in run.history if "knn_top1" in row]
    if during and knn and knn["k"] != (k := run.config.get("knn_k")):
        lines.append(f"- {TEXTS['other k'].format(during[-1], k, knn['k'])}")
    if probe.get("test_loss", 0) > (guess := math.log(len(run.classes))):
        lines.append(f"- {TEXTS['high loss'].format(probe['test_loss'], guess)}")
    if classes := [p for p in zip(probe.get("per_class", ()), run.classes) if p[0] is not None]:
        best, worst = (f"{name} ({percent(top1)})" for top1, name in (max(classes), min(classes)))
        lines.append(f"- Easiest class: {best}, hardest: {worst}.")
    return "\n".join(lines)


def limits(run):
    """What the numbers do not say: lines of Markdown"""
    n, images = run.data["n_test"], run.data["n_train"]
    keys = run.config.get("queue_size", 0) if run.mechanism == "moco" else 0
    span = keys / images / (views := 1 + run.config.get("symmetric", False))  # in epochs
    own = views * (span - 0.5 if span > 1 else span**2 / 2)  # mean over an epoch without repeats
    missing = [f"k-NN on {name}" for what, name in plots.BASELINES.items() if not knn_of(run, what)]
    missing += ["a probe of an untrained encoder"] * bool(run.probe and not run.untrained)
    true = {"unfinished": run.epoch < run.epochs, "missing": missing, "queue": 2 * keys > images}
    true |= {"no paper": run.dataset not in plots.DATASETS.values()}
    lines = [f"- {text}" for name, text in TEXTS["limits"].items() if true.get(name, True)]
    values = dict(run=run, seed=run.config.get("seed", 0), error=100 / math.sqrt(n), keys=keys)
    return "\n".join(lines).format(**values, missing=", ".join(missing), own=own)


def evaluations_table(run):
    """All classifiers that were trained on this encoder, or beside it"""
    rows = []
    for e in run.evaluations.values():
        if r := e.result:
            lr, tried = plain(r.get("lr") or e.config.get("lr")), len(r.get("rates") or [])
            lr += f" (best of {tried})" * (tried > 1)
            tops = [percent(r.get(f"top{k}")) for k in (1, 3, 5)]
            cells = f"{r['test_loss']:.4f}", r.get("n_labels", ""), e.config.get("epochs", "")
            rows.append([e.title, *tops, *cells, e.config.get("optimizer", ""), lr])
    head = "evaluation|top-1|top-3|top-5|loss|labelled images|epochs|optimizer|learning rate"
    return as_table(head.split("|"), rows) if rows else ""


def table_1(run):
    """Fine-tuned end to end and frozen, for each share of the labels (SimCLR report, Table 1)"""
    found = [e for e in run.evaluations.values() if e.result][::-1]  # of several, the first counts
    found, rows = {(e.labels, e.init, e.mode): e.result for e in found}, []
    for labels in sorted({labels for labels, _, _ in found}):
        share, supervised = f"{100 * labels:g}% of the labels", (labels, "random", "supervised")
        for init, name in (("pretrained", run.label), ("random", "Random init")):
            pair = [found.get((labels, init, mode), {}) for mode in ("finetune", "probe")]
            if init == "random" and supervised in found:  # the same experiment under another name
                pair[0] = found[supervised]
            if any(pair):
                cells = [percent(result.get(key)) for result in pair for key in ("top1", "top3")]
                rows.append([f"{name}, {share}", *cells])
    rows += DOCUMENTS["simclr"]["table"] if run.dataset == "CIFAR-10" else []
    return as_table(["", "end-to-end top-1", "top-3", "frozen top-1", "top-3"], rows)


def report(run, drawn):
    """A report on a run: blocks of Markdown, with the figures that were drawn"""
    said, order = DOCUMENTS.get(run.mechanism, {}), [name for name in CAPTIONS if name in drawn]
    if run.epochs == 20 and "20 epochs" in said:  # Fast-MoCo's ablations have other rates
        said = said | {k: said[k] | more for k, more in said["20 epochs"].items()}
    tables, machine = itertools.count(1), defaultdict(lambda: "?", run.base.get("machine") or {})

    def table(caption, text):
        return [f"**Table {next(tables)}.** {caption}", text] if text else []

    def figures(*names):
        for i, name in enumerate(order, 1):
            if name in names:
                text = f"**Figure {i}.** {CAPTIONS[name].format(run=run)}"
                yield f"![Figure {i}]({name}.png)\n\n{text}"

    settings = settings_of(run)
    head, main = ["setting", "value"], [key for key in TEXTS["main settings"] if key in settings]
    first = [[key, plain(settings[key])] for key in main]
    others = [[key, plain(value)] for key, value in settings.items() if key not in main]
    blocks = [f"# {run.title}", f"Run `{run.name}`{', after [1]' * bool(said)}."]
    if said:
        named = defaultdict(lambda: "?", {key: plain(v) for key, v in run.config.items()})
        blocks += ["## Objective", said["aim"]]
        blocks += ["## Method", said["method"].format_map(named)]
        blocks += [said["loss"]] * run.negatives
    blocks += [*figures("diagram", "pairs"), "## Experimental procedure"]
    minutes = f"{machine['seconds'] / 60:.1f}" if "seconds" in machine else "?"
    text = TEXTS["procedure"].format(run=run, machine=machine, minutes=minutes)
    blocks += [text, *table("Settings of the pretraining.", as_table(head, first, 2))]
    blocks += table(TEXTS["classifiers"], evaluations_table(run))
    blocks += ["## Results", *table(TEXTS["k-NN"], plots.table_of([run])), conclusions(run)]
    blocks += figures("pretraining", "probe", "classes")
    if run.method == "simclr" or len(run.evaluations) > 2:
        blocks += table(TEXTS["few labels"], table_1(run))
    blocks += figures("along", "neighbours", "map")
    missing = ", ".join(name for name in CAPTIONS if name not in drawn)
    blocks += [f"Not drawn, because not measured: {missing}."] * bool(missing)
    if said:
        lines = differences(said["pretrain"], settings)
        for e in run.evaluations.values():
            if e.init == "pretrained" and e.mode in said["modes"]:
                here = e.config | {"labels": e.labels, "lr": e.result.get("lr", e.config.get("lr"))}
                lines += differences(said["evaluate"], here, f" ({e.title})")
        blocks += ["## What differs from [1]: there → here", "\n".join(lines) or "Nothing."]
        if said["results"] and run.dataset == "CIFAR-10":  # other images: no comparison
            blocks.append(f"Results of [1]: {said['results']}.")
    blocks += ["## Limits", limits(run), "## Discussion", TEXTS["discussion"]]
    references = [f"[{i}] {text}." for i, text in enumerate(said.get("references", []), 1)]
    blocks += ["## References", *references] if said else []
    blocks += ["## Appendix: other settings", as_table(head, others, 2)]
    return [block for block in blocks if block]


def write_report(run, drawn, folder):
    """report.md and, with the figures inside, report.html"""
    blocks = report(run, drawn)
    plots.write_page(folder / "report.md", "\n\n".join(blocks) + "\n")
    plots.write_page(folder / "report.html", page_of(blocks, folder))
    print(f"{folder}/report.html and report.md")
