"""Draw a run's figures and print its accuracies: what happened, and what the features are worth.

    pretraining   loss, k-NN accuracy and learning rate per epoch
    diagram       the method, with this run's own images and numbers
    pairs         positive and negative pairs, and how similar their features are
    map           test images in two dimensions, for the untrained and the trained encoder
    neighbours    test images, and the training images that the encoder considers most similar
    probe         top-1, top-5 and loss of the linear classifier
    classes       accuracy of each class
    along         accuracy of classifiers along the pretraining, if it had --keep-every

This script only draws: it needs neither images nor a GPU, because the other scripts leave what it
draws in the run's folder. What is missing is skipped, with one line that says what to run.

    python plots.py runs/moco                              # PNG and PDF files in figures/
    python plots.py runs/moco runs/simclr --table FILE     # compared, and a table in FILE
    python plots.py runs/moco --report                     # a report as well: report.html
    python plots.py runs/ablate-batch/* --ablation batch   # runs that differ in one setting

The last three need tools/report.py. In a notebook, paste this file into a cell and edit Config.
"""

# %%
import dataclasses
import itertools
import math

import matplotlib
import numpy as np


@dataclasses.dataclass
class Config:
    runs: list = dataclasses.field(default_factory=list)  # run folders or checkpoint files
    out: str = "figures"  # folder for the figures
    table: str = ""  # Markdown file whose table is replaced
    report: bool = False  # also write report.html and report.md
    ablation: str = "none"  # compare runs, see tools/ablations.py


# %% Pretraining
def draw_pretraining(run):
    """Loss, k-NN accuracy and learning rate per epoch"""
    figure = new_figure(f"Pretraining: {run.title}", 7, 6.5)
    loss, knn, rate = figure.subplots(3, 1, sharex=True, height_ratios=[4, 4, 1])
    draw_curve(loss, run.history, "loss", run.label)
    if run.chance:  # the loss of a network that cannot tell images apart
        draw_level(loss, run.chance, f"chance: {run.chance:.2f}", 4)
    for x, y in draw_curve(knn, run.history, "knn_top1", run.label, 0, 100)[-1:]:
        knn.annotate(f"{y:.1f} (k = {run.settings.knn_k})", (x, y), (0, 6), **ABOVE)
    for i, what in enumerate(BASELINES, 1):
        if row := knn_of(run, what):
            draw_level(knn, 100 * row["top1"], f"{BASELINES[what]} (k = {row['k']})", i)
    draw_level(knn, 100 / len(run.classes), "guessing")
    rate.plot([row["epoch"] for row in run.history], [row["lr"] for row in run.history], color=GRAY)
    for axes, text in zip((loss, knn, rate), ("loss (nats)", "k-NN top-1 (%)", "learning rate")):
        axes.set(ylabel=text, xlabel="epoch")
        axes.label_outer()
    rate.set_ylim(bottom=0)
    figure.align_ylabels()
    legend_below(figure, 3)
    return figure


# %% The method as a diagram: the same picture for all, so that the difference stands out
def draw_moco(run):
    """A query, its positive key and K negatives (MoCo's Figure 1; other mechanisms: Figure 2)"""
    c, mechanism = run.settings, run.mechanism
    net = f"{c.arch}, width {c.width}\n{c.head} head to C = {c.dim}"
    nets = f"encoder_q\n{net}", f"encoder_k\n{net}\nno gradient"
    vectors = f"q\n{c.batch_size} x {c.dim}", f"k\n{c.batch_size} x {c.dim}"
    update = f"momentum update\nm = {c.key_momentum:g}\neach step"
    which, views = "1 + K", ("im_q", "im_k")
    if mechanism == "end-to-end":
        nets, update, which = (f"encoder\n{net}",) * 2, "the same\nweights", "N"
    elif mechanism == "memory-bank":
        nets, views = (f"encoder\n{net}",), views[:1]
    task = f"InfoNCE, T = {c.temperature:g}\nwhich of {which} keys is mine?"
    figure, box, arrow, text = new_diagram(run, views, nets, vectors, update, task)
    arrow((9.1, 5.0), (10.3, 5.0), "query", (9.7, 5.2))
    arrow((12, 5.8), (5.7, 5.8), "gradient", (8.9, 6.2), BLUE, ":", 0.05)
    if mechanism == "end-to-end":
        arrow((9.1, 1.4), (12, 4.2), "N keys: its own\nand N - 1 negatives", (9.4, 3.2))
        arrow((12.8, 4.2), (5.8, 0.6), "gradient", (12.4, 1.0), BLUE, ":", -0.45)
        return figure
    for i in range(8):  # the queue, newest keys on the left; a bank has one key for each image
        opacity = 0.55 - 0.06 * i if mechanism == "moco" else 0.3
        box(10.9 + 0.27 * i, 0.7, 0.27, 1.4, "", GREEN, opacity=opacity, square=True)
    arrow((12.6, 2.2), (12.6, 4.2), "K negatives", (13.4, 3.2))
    if mechanism == "memory-bank":
        text(12, 0.4, f"memory bank: {run.data['n_train']} keys, one for each image")
        arrow((11.4, 2.2), (11.4, 4.2), "its key:\npositive", (10.8, 3.2))
        arrow((8.4, 4.4), (10.8, 1.4), "replaces\nits key", (9.0, 2.6))
        return figure
    keys = c.batch_size * (1 + c.symmetric)
    text(12, 0.4, f"queue: K = {c.queue_size} keys")
    arrow((9.1, 1.4), (10.8, 1.4), f"{keys} in,\noldest out", (9.95, 0.95))
    arrow((8.9, 2.0), (10.8, 4.2), "its key:\npositive", (9.2, 3.2))
    return figure


def draw_simclr(run):
    """Each of the 2N views of a batch against all the others (SimCLR's Figure 2)"""
    c = run.settings
    inside = f" of {c.head_hidden} units" if c.head == "mlp" else ""
    net = f"encoder\n{c.arch}, width {c.width}\n{c.head} head{inside}\nto C = {c.dim}"
    vectors = f"z_1\n{c.batch_size} x {c.dim}", f"z_2\n{c.batch_size} x {c.dim}"
    update = f"the same weights\n2N = {2 * c.batch_size} views\nat once"
    task = f"NT-Xent, T = {c.temperature:g}\nwhich of 2N - 1 is my other view?"
    two, views = (net, net), ("view_1", "view_2")
    figure, box, arrow, text = new_diagram(run, views, two, vectors, update, task)
    for i, j in itertools.product(range(8), range(8)):  # similarities of the views of four images
        opacity, hatch = (0, "///////") if i == j else (0.8 if abs(i - j) == 4 else 0.2, "")
        look = dict(color=GREEN if abs(i - j) == 4 else "#888888", opacity=opacity, hatch=hatch)
        box(10.9 + 0.27 * j, 2.6 - 0.27 * i, 0.27, 0.27, "", square=True, **look)
    text(12, 0.4, "z · z / T for all views: 2N x 2N")
    text(14.6, 1.8, "green: my other view\ngray: 2N - 2 negatives\nhatched: myself, left out")
    arrow((8.9, 4.5), (10.8, 2.6))
    arrow((9.1, 1.4), (10.8, 1.4))
    arrow((12, 3.0), (12, 4.2), "each row", (12.6, 3.6))
    return figure


def draw_fast_moco(run):
    """One view in patches, combined, against the other view as a whole (its Algorithm 1)"""
    c, n = run.settings, run.settings.batch_size
    grid, parts = (1, 1) if c.encode == "whole" else (c.grid, c.grid**2)
    combines = c.encode in ("divide-combine", "sample-combine", "montage")
    means = [*itertools.combinations(range(parts), c.parts_combined if combines else 1)]
    how = f"{len(means)} means of any {len(means[0])} of {parts}" if combines else "not combined"
    how = how if c.combine_at == "final" else f"combined at {c.combine_at}"
    what = {"whole": "whole", "montage": "of several images"}
    what = what.get(c.encode, "crops" if "sample" in c.encode else "patches")
    names = f"view_1: {what},\n{parts} x {c.image_size // grid} x {c.image_size // grid}", "view_2"
    net, side = f"{c.arch}, width {c.width}", 0.5 / grid
    nets = [f"encoder, projector,\npredictor\n{net}\n{parts}N = {parts * n} at once"]
    nets += [f"encoder, projector\n{net}\nno gradient"]
    vectors = f"z_c\n{len(means) * n} x {c.dim}", f"z\n{n} x {c.dim}"
    update = f"moving average\na = {c.key_momentum:g}\neach step"
    update = "the same\nweights" if c.framework == "simsiam" else update
    task = f"{FRAMEWORKS[c.framework]}\n" + "no negatives: 2 - 2 cos(z_c, z)" * (not run.negatives)
    task += f"T = {c.temperature:g}, which of N = {n} is mine?" * run.negatives
    task += f"\nz: nearest of {c.queue_size} before" * (c.framework == "nnclr")
    figure, box, arrow, text = new_diagram(run, names, nets, vectors, update, task, grid)
    for k, chosen in enumerate(means[:6] if 1 < parts <= 9 and c.combine_at == "final" else []):
        for i, j in itertools.product(range(grid), range(grid)):  # which patches are averaged
            at = 9.5 + 0.6 * (k % 3) + side * j, 3.6 - 0.6 * (k // 3) - side * i
            opacity = 0.8 if grid * i + j in chosen else 0.1
            box(*at, side, side, "", GREEN, opacity=opacity, square=True)
    text(10.3, 2.55, how * (parts > 1))
    arrow((9.1, 5.0), (10.3, 5.0))
    arrow((9.1, 1.4), (12.4, 1.4), "target: whole view", (10.8, 1.6))
    arrow((12.4, 1.4), (12.4, 4.2), "both\ndirections", (13.1, 3.2))
    return figure


FRAMEWORKS = {"nnclr": "NNCLR", "byol": "BYOL", "simsiam": "SimSiam", "moco": "MoCo v3"}
DIAGRAMS = {"moco": draw_moco, "simclr": draw_simclr, "fast-moco": draw_fast_moco}


def new_diagram(run, names, nets, vectors, update, task, grid=1):
    """What all methods share -> the figure, and functions that draw a box, an arrow, a text"""
    figure = new_figure(f"How it works: {run.title}", 10.5, 4.5)
    axes, size = figure.subplots(), run.settings.image_size

    def text(x, y, words, color="black"):
        axes.text(x, y, words, ha="center", va="center", size=8, color=color)

    def box(x, y, width, height, words, color, ls="-", opacity=0.13, square=False, hatch=""):
        shape = "square,pad=0" if square else "round,pad=0,rounding_size=0.12"
        look = dict(boxstyle=shape, fc=(color, opacity), ec=color, lw=1.5 - 0.5 * square, ls=ls)
        axes.add_patch(patches.FancyBboxPatch((x, y), width, height, hatch=hatch, **look))
        text(x + width / 2, y + height / 2, words)

    def arrow(start, end, words="", at=(0, 0), color="0.2", ls="-", bend=0):
        look = dict(arrowstyle="-|>", color=color, ls=ls, lw=1.4, shrinkA=0, shrinkB=0)
        axes.annotate("", end, start, arrowprops=look | {"connectionstyle": f"arc3,rad={bend}"})
        text(*at, words, color)

    pictures = [run.gallery.images[0], *run.gallery.views[:, 0]] if run.gallery else [None] * 3
    corners = (0.1, 2.5), (2.6, 4.3), (2.6, 0.7)
    for name, picture, (x, y), parts in zip(("image", *names), pictures, corners, (1, grid, 1)):
        side, small = (1.5 - 0.1 * parts) / parts, size // parts
        for i, j in itertools.product(range(parts), range(parts)):  # row, column
            left, bottom = x + (side + 0.1) * j, y + (side + 0.1) * (parts - 1 - i)
            if picture is None:
                box(left, bottom, side, side, f"{size} x {size}" * (parts == 1), COLORS[6])
            else:
                patch = picture[small * i :, small * j :][:small, :small]
                axes.imshow(patch, extent=(left, left + side, bottom, bottom + side))
        text(x + 0.7, y - 0.2 - 0.15 * name.count("\n"), name)
    second = ((RED, "--"), (BLUE, "-"))[nets[0] == nets[-1]]  # red if it is another network
    for y, net, vector, look in zip((4.3, 0.7), nets, vectors, ((BLUE, "-"), second)):
        arrow((1.6, 2.8 + 0.8 * (y > 1)), (2.5, y + 0.7), "augment", (1.4, y + 0.3 + (y < 1)))
        arrow((4.1, y + 0.7), (4.6, y + 0.7))
        box(4.65, y, 2.3, 1.4, net, *look)
        arrow((7.0, y + 0.7), (7.6, y + 0.7))
        box(7.65, y + 0.25, 1.4, 0.9, vector, *look)
    if nets[1:]:
        arrow((5.8, 4.2), (5.8, 2.2), update, (6.75, 3.2), *second)
    chance = f"\nchance: {run.chance:.2f}" if run.chance else ""
    box(10.4, 4.3, 3.2, 1.4, task + chance, PURPLE)
    axes.set(xlim=(0, 15.9), ylim=(0, 6.4), aspect="equal")
    axes.axis("off")
    return figure, box, arrow, text


# %% Positive and negative pairs
PAIRS = {"positive": ("#0072B2", "-"), "negative": ("#D55E00", "--")}  # colour and line style
PAIRS |= {"false negative": ("#000000", ":")}  # of the same class, which the loss does not know


def draw_pairs(run, rows=4, columns=5):
    """Two views of an image are pulled together, views of different images are pushed apart"""
    gallery, labels, n = run.gallery, run.gallery.labels, len(run.gallery.images)
    rows = sorted(np.unique(labels[:n], return_index=True)[1])[:rows]  # one image of each class
    figure = new_figure(f"Positive and negative pairs: {run.title}", 9, 1.75 * len(rows) + 3)
    panels = figure.subplot_mosaic("AA;BC", height_ratios=[1.75 * len(rows), 2.4])
    for row, i in enumerate(rows):
        draw_image(panels["A"], row, 0, gallery.images[i], "image")
        draw_image(panels["A"], row, 1, gallery.views[0, i], "view 1")
        for column in range(min(columns, n)):
            j = (i + column) % n  # the other view of image i, then views of other images
            alike = "false negative" if labels[i] == labels[j] else "negative"
            kind = "positive" if i == j else alike
            cosines = "\n".join(f"{key} {cos[i, j]:.2f}" for key, cos in gallery.cosines.items())
            what = gallery.views[1, j], kind, cosines.replace("-0.00", "0.00"), PAIRS[kind]
            draw_image(panels["A"], row, 2 + column, *what)
    same, own = labels[:, None] == labels, np.eye(len(labels), dtype=bool)
    for axes, (key, cosine) in zip((panels["B"], panels["C"]), gallery.cosines.items()):
        for (kind, (color, style)), some in zip(PAIRS.items(), (own, ~same, same & ~own)):
            text = f"{kind}s: mean {cosine[some].mean():.2f}" if some.any() else f"{kind}s: none"
            how = dict(bins=np.linspace(-1, 1, 61), density=some.any(), histtype="step", lw=1.5)
            axes.hist(cosine[some], color=color, ls=style, label=text, **how)
        axes.set(xlabel=f"cosine similarity, {key}", ylabel="density", yticks=[])
        axes.legend(loc="upper left")
    return figure


# %% The feature space
def draw_map(run):
    """Test images in two dimensions: in the features of an untrained encoder, and of this one"""
    maps = {"untrained encoder": run.map_random, f"{run.label}, epoch {run.epoch}": run.map}
    maps = {name: found for name, found in maps.items() if found}
    named = np.unique(np.linspace(0, len(run.classes) - 1, 10).astype(int))  # at most ten
    figure = new_figure(f"Feature map: {run.title}", 5.5 * len(maps), 4.6)
    for axes, (name, found) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items()):
        axes.scatter(*found.points[~np.isin(found.labels, named)].T, s=4, color="0.85")
        groups = [(i, found.points[found.labels == i]) for i in named if i in found.labels]
        for color, marker, (_, points) in zip(TEN, MARKERS, groups):
            axes.scatter(*points.T, alpha=0.6, linewidths=0, s=14, color=color, marker=marker)
        label_centres(axes, {run.classes[i]: points.mean(0) for i, points in groups})
        axes.set_xlabel(f"component 1 ({found.shares[0]:.1%} of the variance)")
        axes.set(title=name, xticks=[], yticks=[], ylabel=f"component 2 ({found.shares[1]:.1%})")
    return figure


def label_centres(axes, centres):
    """Class names in a column on either side, each with a line to the mean of its class"""
    names, means = [*centres], np.array([*centres.values()])
    for side, some in enumerate(np.array_split(means[:, 0].argsort(), 2)):
        for place, i in enumerate(some[means[some, 1].argsort()]):
            line = dict(arrowstyle="-", color=TEN[i], lw=1.2, shrinkA=1, shrinkB=0)
            how = dict(xytext=(0.01 + 0.98 * side, (place + 0.5) / len(some)), arrowprops=line)
            how |= dict(textcoords="axes fraction", ha=["left", "right"][side], va="center", size=8)
            axes.annotate(fill(names[i], 20), means[i], **how)
            axes.plot(*means[i], "o", ms=9, mec="white", color=TEN[i], zorder=5)
    axes.margins(x=0.3)  # room for the names


def draw_neighbours(run):
    """Test images and their nearest training images (the SimCLR report's Figure 4)"""
    found, names = run.neighbours, [fill(name, 16) for name in run.classes]
    rows, k = found.labels.shape
    figure = new_figure(f"Nearest neighbours: {run.title}", 1.35 * (1 + k), 1.75 * rows + 0.5)
    axes = figure.subplots()
    for i, truth in enumerate(found.test_labels):
        draw_image(axes, i, 0, found.test_images[i], names[truth], run.which)
        for j, label in enumerate(found.labels[i]):
            sign, kind = ("\u2713", "positive") if label == truth else ("\u2717", "negative")
            text, cosine = f"{sign} {names[label]}", f"cos {found.cosines[i, j]:.3f}"
            draw_image(axes, i, 1 + j, found.images[i, j], text, cosine, PAIRS[kind])
    return figure


# %% The linear classifier
def draw_probe(run):
    """Top-1, top-5 and test loss of the linear classifier (the MoCo report's Figures 3 to 5)"""
    mode, n = run.probe["config"].get("mode", "probe"), len(run.classes)
    what = "Linear evaluation" if mode == "probe" else "Training all weights"
    figure = new_figure(f"{what}: {run.title}", 9, 3.5)
    panels = {"top1": (100, 100 / n, "top-1 (%)"), "top5": (100, 500 / max(5, n), "top-5 (%)")}
    panels |= {"test_loss": (1, math.log(n), "loss (nats, log scale)")}
    for axes, (key, (scale, guess, text)) in zip(figure.subplots(1, 3), panels.items()):
        for i, (name, probe) in enumerate(((run.label, run.probe), ("untrained", run.untrained))):
            draw_curve(axes, probe["history"] if probe else [], key, name, i, scale)
        draw_level(axes, guess, "guessing")
        axes.set_ylabel(f"{run.which}s, {text}")
    axes.set_yscale("log")  # of the last one, the loss
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    legend_below(figure)
    return figure


def draw_classes(run, most=25):
    """Accuracy of each class, best first; 100 classes take several columns"""
    accuracy = 100 * np.array(run.probe["result"]["per_class"], dtype=float)  # nan: no image
    columns = math.ceil(len(accuracy) / most)
    parts = np.array_split((-accuracy).argsort(kind="stable"), columns)
    title, height = f"Accuracy by class: {run.title}", 1.4 + len(parts[0]) / 4
    figure = new_figure(title, max(7, 3 * columns), height)
    for axes, some in zip(figure.subplots(1, columns, squeeze=False)[0], parts):
        axes.barh(range(len(some)), accuracy[some], color=BLUE, alpha=0.75, label=run.label)
        for place, value in enumerate(accuracy[some]):
            axes.text(102, place, f"{value:.1f}".replace("nan", "no image"), va="center", size=8)
        if run.untrained:
            untrained = 100 * np.array(run.untrained["result"]["per_class"], dtype=float)[some]
            axes.plot(untrained, range(len(some)), "D", color=RED, ms=4, label="untrained encoder")
        axes.set_yticks(range(len(some)), [fill(run.classes[i], 24) for i in some])
        axes.set(xlim=(0, 100), ylim=(len(some) - 0.4, -0.6), xlabel=f"{run.which}s, top-1 (%)")
    legend_below(figure)
    return figure


def draw_along(run):
    """Accuracy of classifiers along the pretraining (the SimCLR report's Figure 2)"""
    figure = new_figure(f"Accuracy along the pretraining: {run.title}", 9, 4.6)
    supervised = [e for e in run.evaluations.values() if e.mode == "supervised" and e.result]
    for axes, k in zip(figure.subplots(1, 2), (1, 3)):
        for i, e in enumerate(run.along):
            draw_curve(axes, e.along, f"top{k}", e.title, i, 100)
        for i, e in enumerate(supervised, len(run.along)):
            draw_level(axes, 100 * e.result[f"top{k}"], e.title, i)
        draw_level(axes, 100 * min(1, k / len(run.classes)), "guessing")
        axes.set(xlabel="epoch of pretraining", ylabel=f"{run.which}s, top-{k} (%)")
    legend_below(figure, 2)
    return figure


# %% Drawing helpers. Colours for colour-blind readers (Okabe and Ito 2008; ten: Petroff 2021)
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
BLUE, RED, GREEN, PURPLE, GRAY = *COLORS[:4], "0.4"
TEN = "#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 #a96b59 #e76300 #b9ac70 #717581 #92dadd".split()
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", "*", ">"]  # for black-and-white prints
ABOVE = dict(textcoords="offset points", ha="center")  # a text some points above what it is about
DASHES = ["-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "legend.fontsize": 8, "pdf.fonttype": 42}
STYLE |= {"legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"text.parse_math": False, "axes.prop_cycle": matplotlib.cycler(color=COLORS)}


def new_figure(title, width, height):
    """A Figure of that many inches with a title"""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    figure.suptitle(fill(title, int(9.5 * width)), x=0.01, ha="left", size=11, weight="bold")
    return figure


def draw_curve(axes, rows, key, label, i=0, scale=1, against="epoch"):
    """A value against the epoch (or minutes) in the i-th colour, with a band of "± value" if any"""
    rows = [row | {"minutes": row["seconds"] / 60} if "seconds" in row else row for row in rows]
    rows = [row for row in rows if against in row and math.isfinite(row.get(key, math.nan))]
    points = [(row[against], scale * row[key]) for row in rows]
    if points:
        every = math.ceil(len(points) / 20)  # 200 markers would hide the line
        look = dict(color=f"C{i}", ls=DASHES[i % 5], marker=MARKERS[i % 10], ms=4, label=label)
        axes.plot(*zip(*points), markevery=((len(points) - 1) % every, every), **look)
    if band := [scale * row[f"± {key}"] for row in rows if f"± {key}" in row]:
        x, y = np.array(points).T
        axes.fill_between(x, y - band, y + band, color=f"C{i}", alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=against == "epoch", min_n_ticks=1))
    axes.set_xlabel(against)
    axes.grid(alpha=0.25)
    return points


def draw_level(axes, value, label, i=None):
    """A horizontal line: dotted gray, or in the i-th colour"""
    look = dict(color=GRAY, ls=":") if i is None else dict(color=f"C{i}", ls=(0, (6, 2)))
    axes.axhline(value, label=label, linewidth=1.2, **look)


def legend_below(figure, columns=4):
    """One legend for all panels"""
    found = (zip(*axes.get_legend_handles_labels()) for axes in figure.axes)
    handles = {fill(label, 50): handle for pairs in found for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def draw_image(axes, row, column, image, above="", below="", frame=None):
    """An image (H, W, 3) uint8 as part of a grid; frame: a colour and a line style"""
    x, y, size = column, 1.42 * row, 0.85
    axes.imshow(image, extent=(x, x + size, y + size, y), interpolation="nearest")
    axes.text(x + size / 2, y - 0.05, above, ha="center", va="bottom", size=8)
    axes.text(x + size / 2, y + size + 0.06, below, ha="center", va="top", size=8)
    if frame:
        look = dict(fc="none", ec=frame[0], ls=frame[1], lw=2.5, boxstyle="square,pad=0")
        axes.add_patch(patches.FancyBboxPatch((x, y), size, size, **look))
    axes.set(xlim=(-0.05, max(column + 0.9, axes.get_xlim()[1])), ylim=(y + 1.25, -0.25))
    axes.axis("off")


# ---- plumbing: the same in every script, nothing about the method below this line ----
import argparse
import difflib
import importlib
import json
import os
import re
import sys
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace

import torch
from matplotlib import patches, ticker
from matplotlib.figure import Figure

METHODS = {"memory-bank": "Memory bank", "end-to-end": "End-to-end"}
METHODS |= {"moco": "MoCo", "fast-moco": "Fast-MoCo", "simclr": "SimCLR", "random": "untrained"}
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "stl10": "STL-10"}
BASELINES = {"pixels": "raw pixels", "random": "untrained encoder"}
NOTEBOOK = sys.argv[0].endswith("kernel_launcher.py")


class UserError(Exception):
    """Ends the script with one line on standard error and an exit code (2: the user can fix it)."""

    def __init__(self, message, code=2):
        message = " ".join(str(message).split())
        if NOTEBOOK:  # which has fields of Config instead of flags
            message = re.sub(r"--([\w-]*\w)", lambda m: f"Config.{m[1].replace('-', '_')}", message)
        super().__init__(message)
        self.code = code


# %% Reading runs
def read_run(path):
    """What is known of a run, from its folder or from one checkpoint"""
    path = Path(path).parent if Path(path).name == "pretrain.pt" else Path(path)
    base = read_checkpoint(*(path / f"{name}.pt" for name in ("pretrain", "last", "prev")))
    found = {"": read_evaluation(path)} if path.is_dir() else {}
    for folder in sorted(file.parent for file in path.glob("*/linear.pt")):
        if not (folder / "pretrain.pt").exists() and not folder.name.startswith("epoch"):
            found[folder.name] = read_evaluation(folder)  # neither another run nor part of along
    if path.is_file() and (base := read_checkpoint(path))["kind"] == "linear":
        found = {"": read_evaluation(path.parent, base)}
    base = base or found and found[""].saved
    if not base:
        raise UserError(f"{path}: no such file, or no pretrain.pt, last.pt or linear.pt in it")
    for name, e in found.items() if base["kind"] == "pretrain" else ():
        of = e.saved.get("pretrain", base) if e.saved and e.init == "pretrained" else base
        images = {None} | {one["data"].get("sha256") for one in (e.saved or base, base)}
        same = of["config"] == base["config"] and len(images) < 3
        if not same or of["epoch"] != base["epoch"]:
            print(f"note: {path / name / 'linear.pt'} is of another epoch, run or data, skipped")
            e.saved, e.result, e.along = None, {}, e.along * same
    pretrain = base if base["kind"] == "pretrain" else base.get("pretrain") or {}
    if base["method"] in ("random", "supervised"):  # its encoder was not pretrained
        pretrain = {k: base[k] for k in ("epoch", "epochs") if base["method"] == "supervised"}
    run = SimpleNamespace(path=path, base=base, method=base["method"], data=base["data"])
    run.name = path.resolve().name if path.is_dir() else f"{path.resolve().parent.name}/{path.stem}"
    run.config, run.classes = pretrain.get("config") or base["config"], run.data["classes"]
    run.epoch, run.epochs = pretrain.get("epoch", 0), pretrain.get("epochs", 0)
    run.history, run.chance = pretrain.get("history", []), pretrain.get("chance")  # of guessing
    if base["kind"] == "pretrain" and not run.history:
        raise UserError(f"{path}: no epoch is finished yet, there is nothing to draw")
    run.settings, run.diagram = SimpleNamespace(**run.config), DIAGRAMS.get(run.method)
    run.negatives = run.config.get("framework") not in ("byol", "simsiam")
    run.probe, run.untrained = (found[n].saved if n in found else None for n in ("", "random"))
    run.evaluations = {name: e for name, e in found.items() if e.config}
    run.along = [e for e in run.evaluations.values() if e.along]
    run.gallery, own = read_gallery(base), (None, run.data.get("sha256"))  # None: older rows
    run.knn = [row for row in read_rows(path / "knn.jsonl") if row.get("data_sha256") in own]
    run.map, run.neighbours = (read_npz(path / f"{n}.npz", run) for n in ("map", "neighbours"))
    run.map_random = read_npz(path / "map-random.npz")
    run.mechanism = run.config.get("mechanism", run.method)  # of MoCo; other methods have none
    whole = run.config.get("encode") == "whole" and FRAMEWORKS[run.config["framework"]]
    run.label, data = whole or METHODS.get(run.mechanism, run.method), Path(run.data["name"]).stem
    run.which = "held-out training image" if run.data.get("holdout") else "test image"
    run.dataset, width = DATASETS.get(data, data), base["width"]
    run.shape = base["arch"].replace("resnet", "ResNet-") + f" of width {width}" * (width != 64)
    done = f"{run.epoch} of {run.epochs}" if run.epoch < run.epochs else f"{run.epoch}"
    run.done = f"{done} epoch{'s' * (run.epochs != 1)}"
    for e in run.evaluations.values():
        start = f"{run.label}, " if e.init == "pretrained" else "untrained, "
        kind = {"probe": f"{start}frozen", "finetune": f"{start}fine-tuned"}.get(e.mode, e.mode)
        e.title = f"{kind}, {100 * e.labels:g}% of the labels"
    run.label = run.evaluations[""].title if base["kind"] == "linear" else run.label
    run.title = f"{run.label} on {run.dataset} ({run.shape}, {run.done})"
    return run


def read_checkpoint(*paths):
    """The first of these that exists and can be read, without its weights; None if none exists"""
    error = None
    for path in (path for path in paths if path.exists()):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            needed = "format kind method epoch config data arch width dim encoder history".split()
            needed += ["result"] * (saved["kind"] == "linear")
            if saved["format"] == "contrastive-cifar/1" and all(key in saved for key in needed):
                if error:
                    print(f"note: {error}")
                return saved | dict(encoder=None, source=None, train_state=None)
            raise ValueError("of another format, or incomplete")
        except Exception as wrong:  # a foreign file can raise anything
            why = wrong if type(wrong) is ValueError else type(wrong).__name__
            error = UserError(f"{path}: not a readable checkpoint ({why})")
    if error:
        raise error


def read_evaluation(folder, saved=None):
    """What linear_eval.py left in a folder, and of kept checkpoints in epoch0010/, ... there"""
    saved = saved or read_checkpoint(folder / "linear.pt")
    e = SimpleNamespace(saved=saved, **{k: saved[k] if saved else {} for k in ("result", "config")})
    e.mode, e.labels = e.config.get("mode", "probe"), e.config.get("labels", 1.0)
    e.init = "random" if e.mode == "supervised" else e.config.get("init", "pretrained")
    kept = [read_checkpoint(file) for file in sorted(folder.glob("epoch*/linear.pt"))]
    alike = [one for one in (*kept, saved) if kept and saved and one["config"] == e.config]
    e.along = [one["result"] | {"epoch": one["pretrain"]["epoch"]} for one in alike]
    return e


def read_gallery(saved):
    """The gallery of a checkpoint as arrays, images (n, S, S, 3), views (2, n, S, S, 3); or None"""
    found = saved.get("gallery") and SimpleNamespace(**saved["gallery"])
    if found:
        found.images, found.views = (x.movedim(-3, -1).numpy() for x in (found.images, found.views))
        found.cosines = {key: found.cosines[key].float().numpy() for key in ("head", "backbone")}
        found.labels = found.labels.numpy()
    return found


def read_npz(path, run=None):
    """The arrays that knn_monitor.py left in a file; None if there are none, or of another epoch"""
    try:
        found = SimpleNamespace(**np.load(path)) if path.exists() else None
        return found if not (run and found) or found.epoch == run.epoch else None
    except Exception as error:  # a foreign file can raise anything
        print(f"note: {path}: not readable, skipped ({type(error).__name__})")


def read_rows(path):
    """The objects in a .jsonl file; a torn line, as after a crash, is skipped with a note"""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            print(f"note: {path}: a torn line is skipped: {line[:20]}...")
    return rows


# %% Tables
def knn_of(run, what=None):
    """The k-NN row of a baseline, or of this epoch: knn_monitor.py's, else pretraining's; or {}"""
    rows = [row for row in run.knn if row.get("what") == (what or run.method)]
    rows = [row for row in rows if row.get("features") != "head"]
    if not what:
        during = [row for row in run.history if "knn_top1" in row]
        during = [dict(top1=r["knn_top1"], k=run.config.get("knn_k")) | r for r in during]
        rows = [row for row in (*during, *rows) if row["epoch"] == run.epoch]
    return rows[-1] if rows else {}


def percent(value):
    return "" if value is None else f"{value:.2%}"


def as_table(head, rows, left=1):
    """Markdown with aligned columns; the first ones to the left, the others to the right"""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * (w - (i >= left)) + ":" * (i >= left) for i, w in enumerate(widths)])
    sides = [str.ljust] * left + [str.rjust] * (len(head) - left)
    lines = [" | ".join(side(*c) for side, c in zip(sides, zip(row, widths))) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def table_of(runs):
    """The accuracies of each run, beside those of raw pixels, an untrained encoder and guessing"""
    rows = []
    for run in runs:
        guess = {f"top{k}": min(1, k / len(run.classes)) for k in (1, 3, 5)}
        for name, knn, probe in (
            ("raw pixels", knn_of(run, "pixels"), None),
            ("untrained encoder", knn_of(run, "random"), run.untrained),
            (f"{run.label}, {run.done}", knn_of(run), run.probe),
            ("guessing", guess, {"result": guess}),
        ):
            if knn or probe or run.label in name:
                tops = [probe and probe["result"].get(f"top{k}") for k in (1, 3, 5)]
                cells = percent(knn.get("top1")), knn.get("k", ""), *map(percent, tops)
                rows.append([run.name, name, *cells])
    probes = all(run.probe["config"].get("mode", "probe") == "probe" for run in runs if run.probe)
    head = ["run", "features", "k-NN", "k", "probe " * probes + "top-1", "top-3", "top-5"]
    return as_table(head, rows, 2)


# %% Drawing everything
FIGURES = {  # name: what draws it, what it needs of a run, and how to get that
    "pretraining": (draw_pretraining, "history", "run a pretraining script"),
    "diagram": (lambda run: run.diagram(run), "diagram", "run a pretraining script"),
    "pairs": (draw_pairs, "gallery", "finish a pretraining run with this version"),
    "map": (draw_map, "map", "run knn_monitor.py {path}"),
    "neighbours": (draw_neighbours, "neighbours", "run knn_monitor.py {path}"),
    "probe": (draw_probe, "probe", "run linear_eval.py {path}"),
    "classes": (draw_classes, "probe", "run linear_eval.py {path}"),
    "along": (draw_along, "along", "run linear_eval.py {path} {path}/epoch*.pt"),
}


def draw(config):
    """All figures and tables"""
    extra = load_report(config.report or config.ablation != "none")
    paths, out = {os.path.realpath(path): path for path in config.runs}, Path(config.out)
    runs = [read_run(path) for path in paths.values()]  # each one once
    for run in [run for run in runs if sum(run.name == other.name for other in runs) > 1]:
        run.name = str(run.path)
    if config.ablation != "none":
        return extra.draw_ablation(config, runs)
    table, page = table_of(runs), Path(config.table)
    text = config.table and page_with(table, page)
    if runs[1:] and extra:
        extra.draw_comparisons(runs, out)
    elif runs[1:]:
        print("no comparison: needs tools/report.py beside plots.py")
    for run in runs:
        folder = out / re.sub(r"[^\w.=-]+", "-", run.name).strip("-.") if runs[1:] else out
        drawn = [name for name, (_, needs, _) in FIGURES.items() if getattr(run, needs)]
        for name, (make, _, advice) in FIGURES.items():
            if name in drawn:
                save_figure(make(run), folder / name)
            elif name != "along" or [*run.path.glob("epoch*.pt")]:
                how = advice if run.path.is_dir() else "drawn only from a run's folder"
                print(f"{run.name}: no {name}: {how.format(path=run.path)}")
        print(f"{folder}/ (.png and .pdf): {', '.join(drawn)}")
        if config.report:
            extra.write_report(run, drawn, folder)
    if text:  # last, so that this file tells that all figures are there
        write_page(page, text)
    print(f"\n{table}")


def load_report(needed):
    """tools/report.py, which imports this very module as plots; None if it is not there"""
    path = Path(globals().get("__file__", "plots.py")).resolve().parent / "tools/report.py"
    if path.exists():
        sys.modules.setdefault("plots", sys.modules[__name__])
        sys.path.insert(0, str(path.parent))
        return importlib.import_module("report")
    if needed:
        raise UserError("--report and --ablation need tools/report.py beside plots.py")


def page_with(table, path):
    """The text of a Markdown file with this table between its two markers"""
    markers = ["<!-- table -->", "<!-- /table -->"]
    text = path.read_text("utf-8") if path.is_file() else "\n".join(markers) + "\n"
    parts = re.split("(<!-- /?table -->)", text)
    if parts[1::2] != markers:
        raise UserError(f"--table {path}: must hold {' and '.join(markers)} once each, in order")
    return "".join([*parts[:2], f"\n{table}\n", *parts[3:]])


def write_page(path, text):
    """Write a file under another name, then rename it: a crash leaves the old one"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.{os.getpid()}.tmp").write_text(text, encoding="utf-8")
    path.with_name(f"{path.name}.{os.getpid()}.tmp").replace(path)


def save_figure(figure, path):
    """As path.png and path.pdf (Type 42 fonts, as journals ask); in a notebook shown as well"""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()  # places everything; once is enough for both files
    figure.set_layout_engine("none")
    figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})
    figure.savefig(f"{path}.png", dpi=160)
    if NOTEBOOK:
        display(SimpleNamespace(_repr_png_=Path(f"{path}.png").read_bytes))  # noqa: F821


# %% Command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        near = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
        hint = f"did you mean {near[0]}?" if near else "--help shows the flags"
        raise UserError(f"{message} ({hint})")


def parse_flags(argv=None):
    """Config from the command line; in a notebook, which has none, Config as it stands"""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="run folders or checkpoint files")
    parser.add_argument("--out", help="folder for the figures [figures]")
    parser.add_argument("--table", help="Markdown file whose table is replaced []")
    parser.add_argument("--report", action="store_true", help="also write report.html, .md [False]")
    parser.add_argument("--ablation", help="compare runs, see tools/ablations.py [none]")
    parser.set_defaults(**vars(Config()))
    return Config(**vars(parser.parse_args([] if argv is None and NOTEBOOK else argv)))


def main(argv=None):
    """Draw as the command line says -> exit code"""
    try:
        with matplotlib.rc_context(STYLE):
            config = parse_flags(argv)
            if not config.runs:
                raise UserError("name at least one run folder or checkpoint, such as runs/moco")
            draw(config)
    except (UserError, OSError, UnicodeDecodeError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        return getattr(error, "code", 130 if isinstance(error, KeyboardInterrupt) else 2)
    return 0


if __name__ == "__main__" and (code := main()):
    UserError._render_traceback_ = lambda error: [str(error)]  # in a notebook: not a traceback
    raise SystemExit(code) if "__file__" in globals() else UserError("see the error above", code)
