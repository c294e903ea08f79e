"""Figures and tables from the folders of runs: what happened, and what the features are worth.

    pretraining   loss, k-NN accuracy and learning rate against the epoch
    diagram       the method, drawn with the run's own images and numbers (MoCo's Figure 1)
    pairs         the views that training pulls together, and the ones that it pushes apart
    map           the features of test images in two dimensions, untrained and trained
    neighbours    what the encoder takes for similar: test images and the nearest training images
    probe         top-1, top-5 and loss of the linear classifier, and a table of the final values
    classes       which classes it knows, and which it does not
    along         accuracy of classifiers against the epochs of pretraining, if it was measured
    comparison    several runs in one figure, when several are given

Each one is written as PNG and PDF and says at its foot what it was made from. Curves need only the
checkpoints; pairs, map and neighbours need the images too. In the end the accuracies are printed
beside those of raw pixels and of an untrained encoder, if these have been measured.

    python plots.py runs/moco --report
    python plots.py runs/moco runs/simclr --out figures/both --table README.md
    python plots.py runs/ablate-batch-* --ablation batch

In a notebook, paste this file into one cell and edit Config. draw_...() returns a Figure.
"""

# %%
import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

Ablation = Literal["none", "encode", "frameworks", "parts", "stage", "batch", "epochs"]


# %% Config: a flag --like-this is made from each field, and its comment is the help
@dataclasses.dataclass
class Config:
    runs: list = dataclasses.field(default_factory=list)  # run folders or checkpoint files
    out: str = "figures"  # folder for the figures; of several runs each gets a folder in it
    table: str = ""  # Markdown file, rewritten between <!-- table --> and <!-- /table -->
    report: bool = False  # write report.md as well, beside the figures of each run
    ablation: Ablation = "none"  # runs that differ in one setting: one figure, one table
    data: str = ""  # the images, named as for moco_cifar.py; "": as the checkpoint names them
    data_dir: str = "data"  # where downloads and caches are kept
    limit: int = 10000  # look for neighbours among so many training images; 0: all of the run's
    seed: int = 0  # of the choice of images, and of their views
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps


RECIPES = {}  # none


# %% Pretraining
def draw_pretraining(run):
    """Loss, k-NN accuracy and learning rate against the epoch"""
    figure = new_figure(f"Pretraining: {run.name}", f"{about(run)}. {about_knn(run)}", 7, 7)
    loss, knn, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.5])
    draw_curve(loss, run.history, "loss", "mean over the epoch")
    if chance := chance_of(run):  # the loss of what tells nothing apart: all logits equal
        draw_level(loss, *chance)
    draw_curve(knn, run.history, "knn_top1", title_of(run), 0, 100)
    for i, (what, text) in enumerate((("random", "untrained encoder"), ("pixels", "raw pixels"))):
        if row := last_knn(run, what):
            draw_level(knn, 100 * row["top1"], text, i + 1)
    draw_level(knn, 100 / len(run.data["classes"]), "chance")
    draw_curve(rate, run.history, "lr", None, 2)
    rate.set_ylim(bottom=0)
    for axes, text in zip((loss, knn, rate), ("loss (nats)", "k-NN top-1 (%)", "learning rate")):
        axes.set_ylabel(text)
        axes.label_outer()
        legend_above(axes, 4)
    figure.align_ylabels()
    return figure


# %% The method as a diagram. Those of the other methods stand below, with the reports
def draw_moco(run, images=None):
    """MoCo's Figure 1 with this run's numbers; with images, one of them and two views of it"""
    c, (blue, red, green, purple) = SimpleNamespace(**run.config), COLORS[:4]
    keys, chance = c.batch_size * (1 + c.symmetric), math.log(1 + c.queue_size)
    title = f"Momentum contrast, with the numbers of {run.name}"
    figure = new_figure(title, about_queue(run, keys), 9, 5.6)
    axes = figure.subplots()
    box, arrow = functools.partial(draw_box, axes), functools.partial(draw_arrow, axes)
    pictures = {}
    if images:
        x = images.data.x_train[:1]
        pictures = {"image": x[0], "im_q": view(x, run)[0], "im_k": view(x, run)[0]}
    for name, x, y in (("image", 0.2, 2.5), ("im_q", 2.6, 4.3), ("im_k", 2.6, 0.7)):
        if name in pictures:
            axes.imshow(pictures[name].permute(1, 2, 0).numpy(), extent=(x, x + 1.4, y, y + 1.4))
            axes.text(x + 0.7, y - 0.2, name, ha="center", va="center", size=8)
        else:
            box(x, y, 1.4, 1.4, f"{name}\n3 x {c.image_size} x {c.image_size}", "#000000")
    axes.set(xlim=(0, 12.2), ylim=(0, 6.4), aspect="equal")
    axes.axis("off")
    arrow((1.7, 3.6), (2.5, 4.7), "augment", (1.75, 4.5))
    arrow((1.7, 2.8), (2.5, 1.7), "augment", (1.75, 1.9))
    net = f"{c.arch}, width {c.width}\n{c.head} head to C = {c.dim}"
    box(4.7, 4.3, 2.3, 1.4, f"encoder_q\n{net}", blue)
    box(4.7, 0.7, 2.3, 1.4, f"encoder_k\n{net}\nno gradient", red, "--")
    text = f"momentum update\nm = {c.key_momentum:g}, each step"
    arrow((5.85, 4.2), (5.85, 2.2), text, (4.55, 3.2), red, "--")
    box(7.8, 4.55, 1.1, 0.9, f"q\n{c.batch_size} x {c.dim}", blue)
    box(7.8, 0.95, 1.1, 0.9, f"k\n{c.batch_size} x {c.dim}", red)
    for y in (5.0, 1.4):
        arrow((4.05, y), (4.65, y))
        arrow((7.05, y), (7.75, y))
    for i in range(6):  # the queue, newest keys on the left
        box(10 + 0.3 * i, 0.7, 0.3, 1.4, "", green, fill=f"{80 - 10 * i}", rounding=0)
    axes.text(10.9, 0.42, f"queue: K = {c.queue_size} keys", ha="center", va="center", size=8)
    arrow((8.95, 1.4), (9.95, 1.4), f"{keys} in,\noldest out", (9.45, 0.95))
    text = f"InfoNCE, T = {c.temperature:g}\nwhich of 1 + K is mine?\nchance: {chance:.2f}"
    box(9.8, 4.3, 2.2, 1.4, text, purple)
    arrow((8.95, 5.0), (9.75, 5.0), "query", (9.35, 5.2))
    arrow((8.6, 1.95), (10.1, 4.2), "its key:\npositive", (8.75, 3.2))
    arrow((10.9, 2.2), (10.9, 4.2), "K negatives", (11.5, 3.2))
    arrow((10.9, 5.8), (5.85, 5.8), "gradient", (8.35, 6.2), blue, ":", 0.08)
    return figure


DIAGRAMS = {"moco": draw_moco}


# %% Positive and negative pairs
def view(images, run):
    """A random view as pixels again: (N, 3, H, W) uint8 -> (N, 3, H, W) uint8"""
    recipe = recipe_of(run)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    return ((augment(images, recipe) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def draw_pairs(run, images, rows=4, negatives=4, n=256):
    """What training sees: of each image two views, which belong together, among views of others"""
    some, names = images.data.x_train, PAIRS.get(run.method, PAIRS[""])
    some = some[torch.randperm(len(some))[: max(n, rows + negatives)]]
    im_q, im_k = view(some, run), view(some, run)
    q, k = (F.normalize(images.encode(x), dim=1) for x in (im_q, im_k))  # (n, D)
    cosine = q @ k.T  # (n, n), positive pairs on the diagonal
    title = f"Positive and negative pairs: {run.name}"
    figure = new_figure(title, about_pairs(run, len(some)), 8, 1.25 * rows + 3)
    grid = figure.add_gridspec(rows + 2, 3 + negatives)
    for i in range(rows):
        draw_image(figure.add_subplot(grid[i, 0]), some[i], "" if i else "image")
        draw_image(figure.add_subplot(grid[i, 1]), im_q[i], "" if i else names[0])
        for j in range(1 + negatives):
            other, frame = (i + j) % len(some), (COLORS[1], "--") if j else (COLORS[0], "-")
            head = "" if i else names[2] if j else names[1]
            text = f"cos {cosine[i, other]:.2f}"
            draw_image(figure.add_subplot(grid[i, 2 + j]), im_k[other], head, text, frame)
    draw_formula(figure.add_subplot(grid[rows:, 4:]), run)
    axes, same = figure.add_subplot(grid[rows:, :4]), torch.eye(len(some), dtype=torch.bool)
    edges = torch.linspace(min(0, float(cosine.min())), 1, 51).numpy()
    for values, i, text in ((cosine[same], 0, "positive"), (cosine[~same], 1, "negative")):
        text = f"{text} pairs: mean {values.mean():.2f}"
        how = dict(histtype="stepfilled", density=True, alpha=0.35, fc=COLORS[i], label=text)
        axes.hist(values.numpy(), edges, ec=COLORS[i], ls=DASHES[i], lw=1.5, **how)
    axes.set(xlabel="cosine similarity of two views", ylabel="density", yticks=[])
    legend_above(axes)
    return figure


# %% The feature space
def pca(features):
    """Rows (N, D) along their two directions of greatest variance -> (N, 2), shares of it (2,)"""
    centred = features.cpu().double() - features.cpu().double().mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    two = directions[:, -2:].flip(1)  # (D, 2)
    two = two * two.gather(0, two.abs().argmax(0, keepdim=True)).sign()  # or the sign is arbitrary
    return centred @ two, variances[-2:].flip(0) / variances.sum().clamp(min=1e-12)


def draw_map(run, images, n=2000, most=10):
    """Test images in two dimensions: in the features of an untrained encoder, and of this one"""
    chosen = torch.randperm(len(images.data.x_test))[:n]
    x, y, classes = images.data.x_test[chosen], images.data.y_test[chosen], run.data["classes"]
    named = torch.randperm(len(classes))[:most].sort().values  # as many as have a marker
    figure = new_figure(f"Feature map: {run.name}", about_map(run, len(x), len(named)), 9, 5)
    before, after = figure.subplots(1, 2)
    before.set_title("untrained encoder")
    after.set_title(f"{title_of(run)}, epoch {run.epoch}")
    for axes, encode in ((before, images.encode_untrained), (after, images.encode)):
        points, shares = pca(F.normalize(encode(x), dim=1))  # (N, 2), (2,)
        axes.scatter(*points[~torch.isin(y, named)].T.numpy(), s=4, color="0.8", linewidths=0)
        for i, label in enumerate(named):
            how = dict(marker=MARKERS[i], color=COLORS[i % 7], alpha=0.6, linewidths=0, s=13)
            axes.scatter(*points[y == label].T.numpy(), label=wrap(classes[label], 20), **how)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"component 1 ({100 * shares[0]:.1f} % of the variance)")
        axes.set_ylabel(f"component 2 ({100 * shares[1]:.1f} % of the variance)")
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside right center", markerscale=1.8)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    return figure


def nearest(features, bank, k):
    """The k rows of the bank most similar to each of features (N, D), by cosine: values, indices"""
    return (F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T).topk(k, dim=1)


def draw_neighbours(run, images, rows=6, k=5):
    """Random test images and their nearest training images (the SimCLR report's Figure 4)"""
    data, names = images.data, [wrap(name, 16) for name in run.data["classes"]]
    chosen = torch.randperm(len(data.x_test))[:rows]
    bank, labels = data.x_train[images.bank], data.y_train[images.bank]
    k = min(k, len(bank))
    values, found = nearest(images.encode(data.x_test[chosen]), images.encode(bank), k)
    right = labels[found] == data.y_test[chosen, None]  # (rows, k)
    foot = about_neighbours(run, len(bank), right)
    figure = new_figure(f"Nearest neighbours: {run.name}", foot, 7.5, 1.35 * len(chosen) + 1)
    panels = figure.subplots(len(chosen), 1 + k, squeeze=False)
    for i, test in enumerate(chosen):
        draw_image(panels[i, 0], data.x_test[test], names[data.y_test[test]], run.which)
        for j, (train, same) in enumerate(zip(found[i], right[i])):
            frame = (COLORS[0], "-") if same else (COLORS[1], "--")
            text = ("\u2713 " if same else "\u2717 ") + names[labels[train]]
            draw_image(panels[i, 1 + j], bank[train], text, f"cos {values[i, j]:.3f}", frame)
    return figure


# %% The probe
REPORT = "first course report (CIFAR-10, ResNet-18)", "67.3899", "0.4099", "0.8740"  # its Figure 6


def draw_probe(run):
    """Top-1, top-5 and loss against the epoch (the first report's Figures 3-5), and its Figure 6"""
    probes = {title_of(run): run.probe, "untrained encoder": run.untrained}
    figure = new_figure(f"Linear evaluation: {run.name}", about_probe(run), 9, 5.2)
    places = [["top1", "top5", "test_loss"], ["table"] * 3]
    panels, rows = figure.subplot_mosaic(places, height_ratios=[3, 1]), []
    for i, (name, probe) in enumerate((n, p) for n, p in probes.items() if p):
        for key, scale in (("top1", 100), ("top5", 100), ("test_loss", 1)):
            draw_curve(panels[key], probe["history"], key, wrap(name, 40), i, scale)
        text = wrap(f"{name}, training", 40)
        draw_curve(panels["test_loss"], probe["history"], "loss", text, i + 3)
        final = [probe["result"].get(key) for key in ("test_loss", "top1", "top5")]
        rows.append([name, *("" if value is None else f"{value:.4f}" for value in final)])
    for k in (1, 5):
        draw_level(panels[f"top{k}"], 100 * min(1, k / len(run.data["classes"])), "chance")
        panels[f"top{k}"].set_ylabel(f"{run.which} top-{k} (%)")
    panels["test_loss"].set_ylabel("loss (nats)")
    for key in places[0]:
        legend_above(panels[key], 1)
    draw_table(panels["table"], ["final values", "loss", "top-1", "top-5"], [*rows, REPORT])
    return figure


def draw_classes(run, most=25):
    """Accuracy of each class, the best known first; 100 classes take several columns"""
    parts = math.ceil(len(run.data["classes"]) / most)
    accuracy = torch.tensor(run.probe["result"]["per_class"])
    untrained = run.untrained and torch.tensor(run.untrained["result"]["per_class"])
    order = accuracy.argsort(descending=True, stable=True).chunk(parts)
    size = max(7, 3 * parts), 1.6 + 0.22 * len(order[0])
    figure = new_figure(f"Accuracy of each class: {run.name}", about_probe(run), *size)
    for axes, some in zip(figure.subplots(1, parts, squeeze=False)[0], order):
        places = range(len(some))
        bars = axes.barh(places, (100 * accuracy[some]).numpy(), color=COLORS[0], alpha=0.75)
        axes.bar_label(bars, fmt="%.1f", padding=7, size=7)
        if untrained is not None:
            how = dict(color=COLORS[1], label="untrained encoder")
            axes.plot(100 * untrained[some], places, "D", **how)
        axes.set_yticks(places, [wrap(run.data["classes"][i], 24) for i in some])
        axes.set(xlim=(0, 112), ylim=(len(some) - 0.4, -0.6), xlabel="top-1 (%)")
    legend_above(figure.axes[0])
    return figure


# ---- reports and ablations: as the four documents have them; the lesson ends here ----
# %% The other methods as diagrams
def draw_simclr(run, images=None):
    """SimCLR's Figure 2 and the first report's Figure 1: who is compared with whom"""
    c, (blue, red, green, purple) = SimpleNamespace(**run.config), COLORS[:4]
    title = f"SimCLR, with the numbers of {run.name}"
    figure = new_figure(title, about_batch(run), 10, 5.2)
    axes = figure.subplots()
    box, arrow = functools.partial(draw_box, axes), functools.partial(draw_arrow, axes)
    draw_views(axes, run, images, ("image", "view_1", "view_2"), 2.6)
    axes.set(xlim=(0, 14.1), ylim=(0, 6.4), aspect="equal")
    text = f"encoder\n{c.arch}, width {c.width}\n\none for both views:\n"
    text += f"2N = {2 * c.batch_size} at once"
    box(4.7, 0.7, 2.2, 5, text, blue)
    inside = f", {c.head_hidden} units" if c.head == "mlp" else ""
    text = f"projector\n{c.head}{inside}\nto C = {c.dim}\n\ndiscarded\nafter pretraining"
    box(8, 0.7, 1.8, 5, text, red, "--")
    for y, i in ((5.0, 1), (1.4, 2)):
        arrow((4.05, y), (4.65, y))
        arrow((6.95, y), (7.95, y), f"h_{i}\nN x {run.base['dim']}", (7.42, y + 0.4))
        arrow((9.85, y), (10.75, 3.2 + 0.5 * (y > 3)), f"z_{i}\nN x {c.dim}", (10.55, y))
    for i in range(8):  # the similarities: of each row one is its partner, and one is itself
        for j in range(8):
            color = green if abs(i - j) == 4 else "#FFFFFF" if i == j else "#888888"
            fill = "cc" if abs(i - j) == 4 else "33"
            box(10.9 + 0.27 * j, 4.5 - 0.27 * i, 0.27, 0.27, "", color, fill=fill, rounding=0)
    axes.text(11.98, 5.3, "z · z / T for all 2N views", ha="center", va="center", size=8)
    text = "green: its other view\ngray: 2N - 2 negatives\nwhite: itself, left out"
    axes.text(11.98, 2.15, text, ha="center", va="center", size=7.5)
    text = f"NT-Xent, T = {c.temperature:g}\nwhich of the 2N - 1 others\nis my second view?"
    box(11.0, 0.25, 2.8, 1.35, f"{text}\nchance: {chance_of(run)[0]:.2f}", purple)
    return figure


def draw_fast_moco(run, images=None):
    """Algorithm 1: one view in patches, combined, against the other one as a whole"""
    c, (blue, red, green, purple) = SimpleNamespace(**run.config), COLORS[:4]
    figure = new_figure(f"Fast-MoCo, with the numbers of {run.name}", about_batch(run), 11, 5)
    axes, n, d = figure.subplots(), c.batch_size, run.base["dim"]
    box, arrow = functools.partial(draw_box, axes), functools.partial(draw_arrow, axes)
    pictures = draw_views(axes, run, images, ("image", "view_1", "view_2"), 2.3)
    axes.set(xlim=(0, 15.6), ylim=(0, 6.4), aspect="equal")
    grid, parts = (1, 1) if c.encode == "whole" else (c.grid, c.grid**2)
    side, small = 1.4 / grid, c.image_size // grid
    for i, j in itertools.product(range(grid), range(grid)):  # row, column
        x, y = 4.4 + j * (side + 0.1), 4.2 + (grid - 1 - i) * (side + 0.1)
        if pictures and not c.encode.startswith("sample"):
            patch = pictures["view_1"][:, small * i :, small * j :][:, :small, :small]
            axes.imshow(patch.permute(1, 2, 0).numpy(), extent=(x, x + side, y, y + side))
        else:
            box(x, y, side, side, "", "#000000", rounding=0)
    text = {"montage": "patches of several\nimages, put together", "whole": "whole"}
    text = text.get(c.encode) or f"{parts} {'patches' if 'divide' in c.encode else 'crops'}"
    axes.text(5.15, 3.8, f"{text}, {small} x {small}", ha="center", va="center", size=8)
    arrow((3.75, 5.0), (4.3, 5.0))
    net = f"{c.arch}, width {c.width}"
    box(6.7, 4.3, 2.1, 1.4, f"encoder\n{net}\n{parts}N = {parts * n} at once", blue)
    arrow((4.4 + grid * (side + 0.1), 5.0), (6.65, 5.0))
    late = c.combine_at if c.combine_at != "final" else ""
    combines = c.encode in ("divide-combine", "sample-combine", "montage")
    some = [*itertools.combinations(range(parts), c.parts_combined if combines else 1)]
    cell = 0.5 / grid
    for k, chosen in enumerate([] if late or parts > 9 else some[:6]):  # which patches are averaged
        for q in range(parts):  # column by column
            x, y = 9.5 + 0.62 * (k // 2), 5.55 - 0.62 * (k % 2)
            x, y, fill = (
                x + q // grid * cell,
                y - (q % grid + 1) * cell,
                "11cc"[2 * (q in chosen) :],
            )
            box(x, y, cell, cell, "", green, fill=fill[:2], rounding=0)
    text = f"{len(some)} means of\nany {len(some[0])} of {parts}" if combines else "not combined"
    text = f"two upright and two lying\npairs, from {late}" if late in STITCHED else text
    text = f"combined after\nthe {late}" if late in ("proj", "pred") else text
    axes.text(10.35, 4.35 if late else 3.8, text, ha="center", va="center", size=8)
    arrow((8.85, 5.0), (9.4, 5.0), f"{d}", (9.12, 5.25))
    text = f"projector, to {c.dim}\npredictor,\n{c.predictor_hidden} units inside"
    box(12, 4.3, 2.2, 1.4, text, blue)
    arrow((9.4 if late else 11.4, 5.0), (11.95, 5.0))
    text = "the same weights"
    if c.framework != "simsiam":
        text = f"moving average\na = {c.key_momentum:g}, each step"
    box(6.7, 0.7, 2.1, 1.4, f"encoder\nprojector\n{net}\nno gradient", red, "--")
    arrow((3.75, 1.4), (6.65, 1.4), "whole", (5.15, 1.6))
    arrow((7.75, 4.2), (7.75, 2.2), text, (6.5, 3.1), red, "--")
    box(9.6, 0.95, 1.2, 0.9, f"z\n{n} x {c.dim}", red)
    arrow((8.85, 1.4), (9.55, 1.4))
    which = "no negatives: 2 - 2 cos(z_c, z)"
    if chance := chance_of(run):
        which = f"T = {c.temperature:g}: which of N = {n}\nis mine? chance: {chance[0]:.2f}"
        which += f"\nz: nearest of {c.queue_size} before" * (c.framework == "nnclr")
    name = "ctr(z_c, z)" if c.framework == "moco" else FRAMEWORKS[c.framework]
    text = f"{name}\n{which}\nboth directions"
    box(12, 0.7, 3.1, 1.4, text, purple)
    arrow((10.85, 1.4), (11.95, 1.4), "target", (11.4, 1.6))
    rows = 4 if late in STITCHED else len(some)
    arrow((13.1, 4.2), (13.1, 2.2), f"z_c\n{rows}N x {c.dim}", (13.9, 3.2))
    return figure


DIAGRAMS |= {"simclr": draw_simclr, "fast-moco": draw_fast_moco}


# %% Accuracy along the pretraining
def draw_along(run):
    """Accuracy of classifiers against the epochs of pretraining (the SimCLR report's Figure 2)"""
    title = f"Accuracy along the pretraining: {run.name}"
    figure = new_figure(title, about_along(run), 11, 4.4)
    panels, curves = figure.subplots(1, 2), [e for e in run.evaluations if e.along]
    levels = [e for e in run.evaluations if e.mode == "supervised" and e.result and not e.along]
    for axes, key in zip(panels, ("top1", "top3")):
        for i, e in enumerate(curves):
            draw_curve(axes, e.along, key, e.title, i, 100)
        for i, e in enumerate(levels, len(curves)):
            draw_level(axes, 100 * e.result[key], e.title, i % 7)
        draw_level(axes, 100 * min(1, int(key[3:]) / len(run.data["classes"])), "chance")
        axes.set_ylabel(f"{run.which} top-{key[3:]} (%)")
        axes.set_xlabel("epoch of pretraining")
    labels = panels[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside right upper")
    return figure


# %% A report of one run, in the form of the course reports
def differences(said, config):
    """What a document says of settings, where that is not what was done: lines of Markdown"""
    lines = []
    for key, value in said.items():
        values = value if isinstance(value, list) else [value]
        if (here := simple(config.get(key))) not in values:
            lines.append(f"- `{key}`: {' or '.join(map(plain, values))} → {plain(here)}")
    return lines


def table_1(run):
    """The SimCLR report's Table 1, for each share of the labels that was used; with its figures"""
    found, rows = {(e.labels, e.init, e.mode): e for e in run.evaluations if e.result}, []
    names = dict(pretrained=title_of(run), random="Random init")
    for labels in sorted({e.labels for e in run.evaluations if e.result}):
        for init, name in names.items():
            pair = [found.get((labels, init, mode)) for mode in ("finetune", "probe")]
            if any(pair):
                cells = [e and e.result.get(key) for e in pair for key in ("top1", "top3")]
                rows.append([f"{name}, {100 * labels:g} % of the labels", *map(percent, cells)])
        if e := found.get((labels, "random", "supervised")):
            cells = percent(e.result["top1"]), percent(e.result.get("top3")), "", ""
            rows.append([f"Supervised, {100 * labels:g} % of the labels", *cells])
    head = ["", "end-to-end top-1", "top-3", "frozen top-1", "top-3"]
    return as_table(head, [*rows, *TABLE_1]) if rows else ""


def report(run, figures):
    """-> a report on a run in Markdown, with links to those of the figures that were made"""
    said = document_of(run)
    config = defaultdict(lambda: "?", {key: plain(value) for key, value in run.config.items()})
    state = f"epoch {run.epoch} of {run.epochs}" + " (unfinished)" * (run.epoch < run.epochs)
    parts = [f"# {title_of(run)}: {run.name}", about(run) + "."]
    if said:
        parts[1] += f" Written by plots.py, after {said.name}."
        parts += ["## 1 Objective", said.aim, "## 2 Method", said.method.format_map(config)]
    parts += [figure_link(figures, "diagram"), figure_link(figures, "pairs")]
    parts += ["## 3 Experimental procedure", about_data(run), f"Pretraining, {state}:"]
    parts.append(as_table(["setting", "value"], settings_of(run), 2) + f"\n\n{about_machine(run)}")
    if run.evaluations:
        parts += ["Evaluations, each of the last epoch:", evaluations_table(run)]
    parts += ["## 4 Results", figure_link(figures, "pretraining"), knn_table(run)]
    parts += [probe_table(run), figure_link(figures, "probe"), figure_link(figures, "classes")]
    table = table_1(run) if run.method == "simclr" or len(run.evaluations) > 2 else ""
    parts += ["Fine-tuned end-to-end, and with frozen features:", table] * bool(table)
    parts += [figure_link(figures, key) for key in ("along", "neighbours", "map")]
    if missing := [key for key in CAPTIONS if key not in figures]:
        parts.append(f"Not drawn, for want of what they are made from: {', '.join(missing)}.")
    if said:
        lines = differences(said.pretrain, vars(recipe_of(run)))
        for e in run.evaluations:
            if e.init == "pretrained" and e.mode in said.modes:
                more = differences(said.evaluate, e.config | {"lr": e.lr, "labels": e.labels})
                lines += [f"{line} ({e.title})" for line in more]
        parts += ["## 5 What differs from the document", "As *document → here*, of what it states:"]
        parts.append("\n".join(lines) or "Nothing.")
    return "\n\n".join(part for part in parts if part) + "\n"


# %% Several runs
def draw_comparison(runs):
    """Several runs: loss and k-NN accuracy, at equal epochs and in equal time, and the probe's; of
    runs that differ only in their seed the mean, and a band of a standard deviation each way
    """
    groups = same_but_seed(runs)
    foot = " ".join(f"{about(*some)}." for some in groups.values()) if len(groups) < 5 else ""
    foot += " Losses of other methods or temperatures do not compare, nor minutes elsewhere."
    figure = new_figure("Comparison of runs", foot, 11, 5 + 0.6 * len(groups))
    bars = [["bars"] * 3] if any(run.probe for run in runs) else []
    heights = [3, 0.4 * len(groups)][: 1 + len(bars)]
    panels = figure.subplot_mosaic([["loss", "knn", "time"], *bars], height_ratios=heights)
    for i, (name, some) in enumerate(groups.items()):
        rows, probe = mean_history(some), spread(some, MEASURED[1])
        draw_curve(panels["loss"], rows, "loss", name, i)
        draw_curve(panels["knn"], rows, "knn_top1", name, i, 100)
        draw_curve(panels["time"], rows, "knn_top1", name, i, 100, against="minutes")
        if probe:
            look = dict(color=COLORS[i % 7], alpha=0.75, ecolor=GRAY, capsize=3)
            bar = panels["bars"].barh(i, probe[0], xerr=probe[1], **look)
            panels["bars"].bar_label(bar, fmt="%.2f", padding=3, size=8)
    if bars:
        panels["bars"].set_yticks(range(len(groups)), [wrap(name, 30) for name in groups])
        panels["bars"].set(xlabel="linear probe, top-1 (%)", xlim=(0, 110))
        panels["bars"].invert_yaxis()
    panels["loss"].set_ylabel("loss (nats)")
    panels["knn"].set_ylabel("k-NN top-1 (%)")
    lines, names = panels["loss"].get_legend_handles_labels()
    figure.legend(lines, [wrap(name, 24) for name in names], loc="outside right upper")
    return figure


def same_but_seed(runs):
    """-> {name: the runs that differ in nothing but their seed}"""
    groups, seen = defaultdict(list), Counter()
    for run in runs:
        settings = {key: run.config[key] for key in run.config if key not in LOCAL}
        key = run.method, run.epoch, str(sorted(settings.items()))
        again = key, run.config.get("seed", 0)  # the second run of a seed does not count as another
        groups[*key, seen[again]].append(run)
        seen[again] += 1
    named = {}
    for some in groups.values():
        shared = os.path.commonprefix([run.name for run in some]).removesuffix("seed").rstrip("-_")
        name = f"{shared or some[0].name}, {len(some)} seeds" if some[1:] else some[0].name
        named[name if name not in named else some[0].name] = some
    return named


def mean_history(runs):
    """Rows of an epoch each, with the mean of every value that all runs have there, and under
    "± name" its standard deviation
    """
    rows = []
    for some in zip(*(run.history for run in runs)):
        values = {k: [row[k] for row in some] for k in some[0] if all(k in row for row in some)}
        rows.append({k: statistics.mean(values[k]) for k in values})
        rows[-1] |= {f"± {k}": statistics.stdev(values[k]) for k in values if runs[1:]}
    return rows


# %% Ablations, in the forms of Fast-MoCo's supplementary
def group_runs(name, runs):
    """-> {setting: the runs that have it, which differ in the seed}, in the document's order"""
    fields, groups = ABLATIONS[name][0], {}
    for run in runs:
        if missing := [field for field in fields if field not in run.config]:
            text = f"{run.path} ({title_of(run)}) has no setting {missing[0]}"
            raise Halt(f"--ablation {name}: {text}")
        groups.setdefault(tuple(run.config[field] for field in fields), []).append(run)
    if len({run.method for run in runs}) > 1 or len(groups) < 2:
        what = f"runs of one method that differ in {' or '.join(fields)}"
        raise Halt(f"--ablation {name}: takes {what}, these are {len(groups)} settings")
    return {key: groups[key] for key in sorted(groups, key=lambda key: [*map(rank, key)])}


def spread(runs, key):
    """-> mean, standard deviation (n - 1; of one: None), n; None if nothing was measured"""
    values = [value for run in runs if (value := measured(run)[key]) is not None]
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if values[1:] else None, len(values)


def gain(groups, setting, key):
    """What patches add to a framework (Table 3): a difference of means, or None"""
    plain = groups.get((*setting[:2], "whole")) if setting[2:] and setting[2] != "whole" else None
    with_patches, without = spread(groups[setting], key), plain and spread(plain, key)
    return with_patches[0] - without[0] if with_patches and without else None


def draw_ablation(name, groups):
    """What each setting is worth, and what it costs: curves over an order, or else bars"""
    keys = [key for key in MEASURED if any(spread(runs, key) for runs in groups.values())]
    height = 4.2 if name in CURVES else 2.2 + 0.35 * len(groups)
    foot, places = about_ablation(name, groups), range(len(groups))
    figure = new_figure(f"Ablation: {ABLATIONS[name][1]}", foot, 3.6 * len(keys) + 1, height)
    panels, labels = figure.subplots(1, len(keys), squeeze=False)[0], [*map(label_of, groups)]
    for axes, key in zip(panels, keys):
        found = [(i, s, spread(groups[s], key)) for i, s in enumerate(groups)]
        found = [(i, s, *value) for i, s, value in found if value]
        at, mean = [row[0] for row in found], [row[2] for row in found]
        deviation = [row[3] or 0 for row in found] if any(row[3] for row in found) else None
        if name in CURVES:
            axes.errorbar(at, mean, deviation, color=COLORS[0], marker="o", capsize=3)
            said = [(i, printed(name, s, runs[0])) for i, (s, runs) in enumerate(groups.items())]
            said = [point for point in said if point[1]]
            if said and key == MEASURED[1]:
                how = dict(color=GRAY, ls="--", marker="s", label=IMAGENET)
                axes.plot(*zip(*said), **how)
            axes.set_xticks(places, labels)
            axes.set(xlabel=ABLATIONS[name][0][0], ylabel=key)
            axes.grid(alpha=0.25)
            legend_above(axes)
            continue
        color = [COLORS[5] if "whole" in s else COLORS[0] for _, s, *_ in found]
        bars = axes.barh(at, mean, xerr=deviation, color=color, capsize=3, ecolor=GRAY)
        more = [gain(groups, s, key) for _, s, *_ in found]
        text = [f"{m:.2f}" + ("" if g is None else f" ({g:+.2f})") for m, g in zip(mean, more)]
        axes.bar_label(bars, text, padding=3, size=7)
        axes.set_yticks(places, labels if axes is panels[0] else [""] * len(labels))
        axes.set(xlabel=key, xlim=(0, 1.35 * max(mean)), ylim=(len(labels) - 0.4, -0.6))
    return figure


def ablation_table(name, groups):
    """The same as Markdown, beside what the document prints of ImageNet"""
    rows = []
    for setting, runs in groups.items():
        cells = [label_of(setting), len(runs)]
        for key in MEASURED:
            value, more = spread(runs, key), gain(groups, setting, key)
            text = plain_spread(value, len(runs))
            cells.append(text + ("" if more is None else f" ({more:+.2f})"))
        value, first = (
            printed(name, setting, runs[0]),
            printed(name, (*setting[:2], "whole"), runs[0]),
        )
        text = "drawn only" if name in ("encode", "stage") else ""
        text = text if value is None else f"{value:.1f}"
        cells.append(f"{text} ({value - first:+.1f})" if first and first != value else text)
        rows.append(cells)
    table = as_table([name, "runs", *MEASURED, IMAGENET], rows)
    return f"{table}\n\n{about_ablation(name, groups)}"


# ---- plumbing: the same in every script, nothing about the method below this line ----
import argparse
import contextlib
import ctypes
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import statistics
import sys
import textwrap
import typing
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from torch import nn
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


# %% What a figure says of itself
def title_of(run):
    return TITLES.get(run.method, run.method)


def about(run, *others):
    """The run in one sentence; the others differ in their seed"""
    base, data = run.base, run.data
    text = f"{title_of(run)}, {base['arch']} of width {base['width']}, {data['name']}"
    text += f" ({data['n_train']:,} training images), "
    text += f"epoch {run.epoch} of {run.epochs}, " if run.epochs else ""
    seeds = ", ".join(str(some.config.get("seed", 0)) for some in (run, *others))
    return text + f"{'seeds' if others else 'seed'} {seeds}"


def chance_of(run):
    """The loss of what tells nothing apart -> nats, in words; None where there are no negatives"""
    c = SimpleNamespace(**run.config)
    if run.method == "moco":
        twice = "2 " * c.symmetric
        nats = (1 + c.symmetric) * math.log(1 + c.queue_size)
        return nats, f"chance: {twice}ln(1 + K), K = {c.queue_size}"
    if run.method == "simclr":
        return math.log(2 * c.batch_size - 1), f"chance: ln(2N - 1), N = {c.batch_size}"
    if run.method == "fast-moco" and c.framework in ("moco", "nnclr"):
        return 2 * math.log(c.batch_size), f"chance: 2 ln N, N = {c.batch_size}"
    return None


def about_knn(run):
    """How the k-NN accuracy of the pretraining was measured"""
    k = run.config.get("knn_k", 200)
    return (
        f"k-NN: {k} neighbours among all training images, weights exp(cos / 0.1), "
        f"backbone features; {run.data['n_test']:,} {run.which}s."
    )


def about_probe(run):
    """How the probe was measured"""
    config, modes = run.probe["config"], {"finetune": "all weights fine-tuned"}
    modes |= {"probe": "linear classifier on frozen features", "supervised": "trained with labels"}
    mode = modes.get(config.get("mode"), config.get("mode"))
    lr = simple(run.probe["result"].get("lr") or config.get("lr"))
    return (
        f"{about(run)}. Evaluation: {mode}, {100 * config.get('labels', 1):g} % of the labels, "
        f"{config.get('epochs')} epochs, learning rate {plain(lr)}; "
        f"{run.probe['result']['n_test']:,} {run.which}s; the last epoch, not the best."
    )


def about_queue(run, keys):
    """How long a key waits, and how slowly the key encoder moves; keys: new ones in a step"""
    c = SimpleNamespace(**run.config)
    return (
        f"{about(run)}. A key waits {c.queue_size / keys:.3g} steps in the queue (K / N) and there "
        f"are {run.data['n_train'] // c.batch_size} steps in an epoch; encoder_k follows as an "
        f"average over about the last {1 / (1 - c.key_momentum + 1e-9):.3g} steps, 1 / (1 - m)."
    )


def about_batch(run):
    """How much a step compares, where the negatives are the batch"""
    c, text = SimpleNamespace(**run.config), f"{about(run)}. "
    text += f"{run.data['n_train'] // c.batch_size} steps in an epoch; loss: mean over the batch"
    if run.method == "simclr":
        return f"{text} of 2N = {2 * c.batch_size} views, each against all the others."
    text += f", summed over both directions. Encoding: {c.encode}, combined at: {c.combine_at}."
    text += f" Views: {c.full_crops}, small ones besides: {c.small_crops}."
    if c.framework == "simsiam":
        return f"{text} SimSiam: the target is the online branch, without a gradient."
    steps = 1 / (1 - c.key_momentum + 1e-9)
    return f"{text} The target branch averages over about the last {steps:.3g} steps, 1 / (1 - a)."


def about_along(run):
    """How the accuracy along the pretraining was measured"""
    text = f"{about(run)}. Each point: a checkpoint that was kept, evaluated as it is; each level: "
    text += f"a network trained with labels only. {run.data['n_test']:,} {run.which}s, the last "
    text += "epoch of each, not the best."
    for e in run.evaluations:
        if e.config and (e.along or e.mode == "supervised"):
            text += f" {e.title}: {e.config['epochs']} epochs, lr {plain(e.lr)}."
    return text


def about_data(run):
    """What it was pretrained on"""
    data, c, text = run.data, recipe_of(run), ""
    if hasattr(c, "jitter"):
        text = f" A view: {about_views(c)}."
    return (
        f"Data: {data['name']}, {data['n_train']:,} training images and {data['n_test']:,} "
        f"{run.which}s of {data['image_size']} x {data['image_size']} pixels in "
        f"{len(data['classes'])} classes; pretraining sees no label.{text}"
    )


def about_machine(run):
    """On what, and for how long"""
    m = defaultdict(lambda: "unknown", run.base.get("machine") or {})
    text = f"Machine: {m['device']}, {str(m['precision']).removeprefix('torch.')}, "
    text += f"threads: {m['threads']}, processes: {m['processes']}, PyTorch {m['torch']}. "
    seconds = f"{m['seconds'] / 60:.1f} minutes" if "seconds" in m else "a time unknown"
    return f"{text}Seed {run.config.get('seed', 0)}. It took {seconds}, measurements included."


def about_ablation(name, groups):
    """What the runs of an ablation have in common, and what else they differ in"""
    runs = [run for some in groups.values() for run in some]
    fields, first = ABLATIONS[name][0], runs[0]
    keys = sorted({key for run in runs for key in run.config} - {*fields, *LOCAL})
    differ = {key: sorted({plain(simple(run.config.get(key))) for run in runs}) for key in keys}
    differ = [f"{key} ({'; '.join(v)})" for key, v in differ.items() if len(v) > 1]
    text = f"{title_of(first)}, {first.data['name']}; runs: {len(runs)}, seeds: "
    text += ", ".join(map(str, sorted({run.config.get("seed", 0) for run in runs})))
    text += f". {about_knn(first)} Probe: a linear classifier on frozen features. The last epoch, "
    text += "not the best; mean ± standard deviation (n - 1) over runs of one setting. Minutes: of "
    text += "pretraining, on each run's own machine."
    if first.method == "fast-moco":
        text += f" The document's figures: {ABLATIONS[name][3]}."
    late = [run.name for run in runs if run.epoch < run.epochs]
    text += f" Not finished: {', '.join(late)}." if late else ""
    return text + (f" They differ also in {', '.join(differ)}." if differ else "")


def about_pairs(run, n):
    """How the views of n images were made and compared"""
    c = recipe_of(run)
    return (
        f"{about(run)}. Cosine similarities of the backbone's features, not of the projections "
        f"that the loss compares; eval mode, {n} random training images. Views: {about_views(c)}."
    )


def about_views(c):
    """How a view is made; c: what recipe_of() gives"""
    return (
        f"crop of {c.crop_scale[0]:g} to {c.crop_scale[1]:g} of the area, flip {c.flip:g}, jitter "
        f"{plain(c.jitter)} with 0.8, gray {c.gray:g}, blur {c.blur:g}"
    )


def about_map(run, n, named):
    """Of what the map shows the principal components; named: classes that have a colour"""
    text = (
        f"{about(run)}. Principal components of the unit-length backbone features of {n} "
        f"random {run.which}s, each encoder with its own."
    )
    classes = len(run.data["classes"])
    more = f" {named} of {classes} classes, chosen at random; the others in gray."
    return text + more * (named < classes)


def about_neighbours(run, n, right):
    """Among how many images the neighbours are, and how many are right (rows, k)"""
    return (
        f"{about(run)}. Left: random {run.which}s; right: the nearest of {n} training "
        f"images by cosine similarity of the backbone's features. {int(right.sum())} of "
        f"{right.numel()} are of the same class (solid frame, \u2713), the others not (dashed, "
        f"\u2717)."
    )


def last_knn(run, what):
    """The last k-NN accuracy that knn_monitor.py measured of this: its row, or None"""
    rows = [row for row in run.knn if row.get("what") == what and row.get("features") != "head"]
    if what == run.method:
        rows = [row for row in rows if row.get("epoch") == run.epoch]
    return rows[-1] if rows and "top1" in rows[-1] else None


# %% Drawing helpers. Colours that the colour-blind can tell apart (Okabe and Ito 2008), with
# markers and dashes besides, for those who see none
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", "*", ">"]
DASHES = ["-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]
GRAY = "0.4"  # of what is only there for comparison
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8}
STYLE |= {"legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"lines.markersize": 4, "pdf.fonttype": 42, "text.parse_math": False}
TITLES = {"moco": "MoCo", "fast-moco": "Fast-MoCo", "simclr": "SimCLR", "random": "untrained"}
TITLES |= {"supervised": "supervised"}


def new_figure(title, foot, width, height):
    """-> a Figure of so many inches, with its title above, and below what it was made from"""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    figure.suptitle(wrap(title, 9.5 * width), x=0.01, ha="left", size=11, weight="bold")
    figure.supxlabel(wrap(foot, 15 * width), x=0.01, ha="left", size=7.5, color=GRAY)
    return figure


def wrap(text, width):
    """Lines of at most so many characters; a longer word is broken too, so that none is clipped"""
    return "\n".join(textwrap.wrap(str(text), int(width)))


def draw_curve(axes, rows, key, label, i=0, scale=1, against="epoch"):
    """The values of a key against the epoch (or minutes), in the i-th colour, dash and marker, with
    a band of "± key" each way where rows have it
    """
    rows = [row | {"minutes": row["seconds"] / 60} if "seconds" in row else row for row in rows]
    rows = [row for row in rows if key in row and against in row]
    points = [(row[against], scale * row[key]) for row in rows]
    every = math.ceil(len(points) / 20) or 1  # 200 markers would hide the line
    how = dict(color=COLORS[i % 7], linestyle=DASHES[i % 5], marker=MARKERS[i % 10])
    if points:
        axes.plot(*zip(*points), label=label, markevery=((len(points) - 1) % every, every), **how)
        spreads = [scale * row.get(f"± {key}", 0) for row in rows]
        if any(f"± {key}" in row for row in rows):
            edges = [(x, y - spread, y + spread) for (x, y), spread in zip(points, spreads)]
            axes.fill_between(*zip(*edges), color=COLORS[i % 7], alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=against == "epoch", min_n_ticks=1))
    axes.set_xlabel(against)
    axes.grid(alpha=0.25)


def draw_level(axes, value, label, i=None):
    """A horizontal line for comparison: chance (dotted), or a baseline in the i-th colour"""
    how = dict(color=GRAY, ls=":") if i is None else dict(color=COLORS[i], ls=(0, (6, 2)))
    axes.axhline(value, label=label, linewidth=1.2, **how)


def legend_above(axes, columns=3):
    """A legend that cannot lie on a curve"""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderaxespad=0.2)


def draw_image(axes, image, above="", below="", frame=None):
    """An image (3, H, W) uint8 without ticks; frame: a colour and a line style"""
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(above, pad=3, size=8)
    axes.set_xlabel(below, labelpad=3, size=8)
    for spine in axes.spines.values():
        spine.set(visible=bool(frame), lw=2.5, color=frame and frame[0], ls=frame and frame[1])


def draw_box(axes, x, y, width, height, text, color, ls="-", fill="22", rounding=0.12):
    """A box with its text in the middle; fill: the opacity of its colour, two hexadecimal digits"""
    shape = f"round,pad=0,rounding_size={rounding}" if rounding else "square,pad=0"
    how = dict(boxstyle=shape, fc=color + fill, ec=color, lw=1.5 if rounding else 1, ls=ls)
    axes.add_patch(FancyBboxPatch((x, y), width, height, **how))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=8)


def draw_arrow(axes, start, end, text="", at=None, color="0.2", ls="-", bend=0):
    """An arrow, bent by a share of its length, and its text at a place"""
    how = dict(arrowstyle="-|>", color=color, ls=ls, lw=1.4, shrinkA=0, shrinkB=0)
    axes.annotate("", end, start, arrowprops=how | {"connectionstyle": f"arc3,rad={bend}"})
    if text:
        axes.text(*at, text, ha="center", va="center", size=7.5, color=color)


def draw_views(axes, run, images, names, x):
    """An image and two views of it, one above and one below, at x -> {name: picture}, if any"""
    c, pictures = SimpleNamespace(**run.config), {}
    if images:
        some = images.data.x_train[:1]
        pictures = dict(zip(names, (some[0], view(some, run)[0], view(some, run)[0])))
    for name, left, y in zip(names, (0.1, x, x), (2.5, 4.3, 0.7)):
        if name in pictures:
            extent = left, left + 1.4, y, y + 1.4
            axes.imshow(pictures[name].permute(1, 2, 0).numpy(), extent=extent)
            axes.text(left + 0.7, y - 0.2, name, ha="center", va="center", size=8)
        else:
            text = f"{name}\n3 x {c.image_size} x {c.image_size}"
            draw_box(axes, left, y, 1.4, 1.4, text, "#000000")
    draw_arrow(axes, (1.6, 3.6), (x - 0.1, 4.7), "augment", (1.55, 4.5))
    draw_arrow(axes, (1.6, 2.8), (x - 0.1, 1.7), "augment", (1.55, 1.9))
    axes.axis("off")
    return pictures


PAIRS = {"moco": ("query", "positive key", "negative key"), "": ("view 1", "view 2", "another's")}
FRACTION = r"$%s=-\,\log\,\frac{\exp(%s\,/\,T)}{%s\exp(%s\,/\,T)}$"


def draw_formula(axes, run):
    """The loss, written out, in the place of a plot"""
    c = SimpleNamespace(**run.config)
    text = {
        "moco": lambda: (
            "InfoNCE (MoCo, Eq. 1)\n\n"
            + FRACTION % (r"L_q", r"q\cdot k_+", r"\sum_{i=0}^{K}\,", r"q\cdot k_i")
            + f"\n\nof 1 + K keys, one is positive\nK = {c.queue_size}, T = {c.temperature:g}"
        ),
        "simclr": lambda: (
            "NT-Xent (SimCLR, Eq. 1)\n\n"
            + FRACTION % (r"l_{i,j}", r"z_i\cdot z_j", r"\sum_{k\neq i}^{2N}\,", r"z_i\cdot z_k")
            + "\n\nmean over the 2N views; j: the\nother view of i's image; "
            + f"N = {c.batch_size}, T = {c.temperature:g}"
        ),
        "fast-moco": lambda: (
            "ctr (Fast-MoCo, Algorithm 1)\n\n"
            + FRACTION % (r"L_i", r"z^c_i\cdot z_i", r"\sum_{j=1}^{N}\,", r"z^c_i\cdot z_j")
            + r"""

mean over images i and combinations c
loss: $ctr(z_1^c,\,z_2)+ctr(z_2^c,\,z_1)$"""
            + f"\nN = {c.batch_size}, T = {c.temperature:g}"
            + "\n$z$: its nearest neighbour in the queue" * (c.framework == "nnclr")
        ),
    }
    if run.method == "fast-moco" and not chance_of(run):
        name = FRAMEWORKS[c.framework]
        text["fast-moco"] = lambda: (
            f"{name}: no negatives\n\n" + r"$L_i=2-2\;z^c_i\cdot z_i$"
            "\n\nmean over images i and combinations c,\nsum of both directions"
        )
    axes.axis("off")
    if run.method in text:
        how = dict(ha="center", va="center", size=10, linespacing=1.3, parse_math=True)
        axes.text(0.5, 0.5, text[run.method](), transform=axes.transAxes, **how)


def draw_table(axes, head, rows):
    """A table in the place of a plot, its first column wide"""
    axes.axis("off")
    how = dict(cellLoc="left", loc="upper left", colWidths=[0.55, *[0.15] * (len(head) - 1)])
    rows = [head, *([wrap(row[0], 60), *row[1:]] for row in rows)]
    for cell in axes.table(rows, edges="horizontal", **how).get_celld().values():
        cell.set(edgecolor="0.8")


# %% Images, encoder and features: as in moco_cifar.py
def recipe_of(run):
    """Its settings, without the augmentations that SimCLR's --augment does not name"""
    off = dict(crop=("crop_scale", (1.0, 1.0)), flip=("flip", 0.0), color=("jitter", (0.0,) * 4))
    off |= dict(gray=("gray", 0.0), blur=("blur", 0.0))
    named = run.config.get("augment")
    left = off.keys() - set(named.split(",")) if isinstance(named, str) else ()
    return SimpleNamespace(**{"flip": 0.5} | run.config | dict(off[name] for name in left))


def augment(images, recipe):
    """One random view of each image: (N, 3, H, W) uint8 -> (N, 3, H, W) float32, normalised.

    recipe: a Config. Every image draws its own crop, flip, jitter...; the operations stand below.
    """
    n, size, device = len(images), images.shape[-1], images.device

    def chance(p):
        return torch.rand(n, 1, 1, device=device) < p

    top, left, height, width = sample_crops(n, size, recipe.crop_scale, device)
    flip, never = chance(recipe.flip)[:, 0, 0], chance(0)[:, 0, 0]
    rows, columns = interpolation(top, height, size, never), interpolation(left, width, size, flip)
    x = separable(images / 255, rows, columns)

    # nothing here looks at a value or copies from the host, so that a GPU never has to wait
    change = [torch.empty(n, device=device).uniform_(-most, most) for most in recipe.jitter]
    change = torch.stack(change, dim=1) * chance(0.8)[:, 0]  # (N, 4)
    change[:, :3] += 1  # factors of brightness, contrast, saturation; the hue is a shift
    order = torch.rand(n, 3, device=device).argsort(1)
    parts = torch.randperm(n, device=device).tensor_split(4)
    hue_turns = [parts[i] for i in torch.randperm(4)]
    x = color_jitter(x, change, order, hue_turns)
    x = torch.where(chance(recipe.gray)[..., None], grayscale(x), x)
    if recipe.blur:
        blur = gaussian(torch.empty(n, device=device).uniform_(0.1, 2.0), size)  # (N, H, H)
        blur = torch.where(chance(recipe.blur), blur, torch.eye(size, device=device))
        x = separable(x, blur, blur)
    return normalise(x, recipe)


def sample_crops(n, size, scale, device="cpu"):
    """Random crops as torchvision's RandomResizedCrop draws them: area uniform in scale, log aspect
    ratio uniform, the first of ten tries that fits, else everything. -> top, left, height, width
    """
    area = size**2 * torch.empty(n, 10, device=device).uniform_(*scale)
    ratio = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    sides = torch.stack([area / ratio, area * ratio]).sqrt().round()  # (2, n, 10)
    fits = ((sides > 0) & (sides <= size)).all(0)  # (n, 10)
    first = fits.int().argmax(1).expand(2, n)[..., None]
    height, width = sides = torch.where(fits.any(1), sides.gather(2, first)[..., 0], size)
    top, left = (torch.rand(2, n, device=device) * (size + 1 - sides)).floor()
    return top, left, height, width  # (n,) each, pixels


def interpolation(start, length, size, flip):
    """Bilinear resizing of the pixels start...start + length to size pixels, mirrored where flip:
    (N,) each -> matrix (N, size, size). Clamped to the crop, or what lies outside bleeds in.
    """
    pixel = torch.arange(size, device=start.device)
    target = torch.where(flip[:, None], size - 1 - pixel, pixel)
    position = ((target + 0.5) * length[:, None] / size - 0.5).clamp(min=0)
    position = start[:, None] + torch.minimum(position, length[:, None] - 1)
    return (1 - (position[:, :, None] - pixel).abs()).clamp(min=0)


def gaussian(sigma, size):
    """Gaussian blur, borders reflected, cut at 6 pixels: (N,) -> matrix (N, size, size)"""
    radius = min(6, size - 1)
    pixel = torch.arange(size, device=sigma.device)
    source = torch.arange(-radius, size + radius, device=sigma.device)  # with a border
    distance = (source - pixel[:, None]).to(sigma.dtype)
    weight = (-0.5 * (distance / sigma[:, None, None]) ** 2).exp() * (distance.abs() <= radius)
    reflected = size - 1 - (size - 1 - source.abs()).abs()
    inside = (reflected[:, None] == pixel).to(sigma.dtype)
    return weight @ inside / weight.sum(2, keepdim=True)


def separable(x, rows, columns):
    """rows @ x @ columns.T in each channel: (N, C, H, W), (N, H, H), (N, W, W) -> (N, C, H, W)"""
    x = x.flatten(1, 2) @ columns.mT  # (N, C*H, W)
    x = rows @ x.unflatten(1, (-1, rows.shape[1])).transpose(1, 2).flatten(2)  # (N, H, C*W)
    return x.unflatten(2, (-1, columns.shape[1])).transpose(1, 2)


def grayscale(x):
    """Luma (ITU-R 601): (N, 3, H, W) -> (N, 1, H, W)"""
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def shift_hue(x, turns):
    """Turn the hue: x (N, 3, H, W) in [0, 1], turns (N,). HSV in closed form: each channel is
    value - chroma * clamp(min(t, 4 - t), 0, 1), where t = (n + 6 hue) mod 6 and n = 5, 3, 1.
    """
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    over = 1 / torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == green, 2 + (blue - red) * over, 4 + (red - green) * over)
    hue = torch.where(value == red, (green - blue) * over, hue) + 6 * turns[:, None, None]
    t = torch.stack([5 + hue, 3 + hue, 1 + hue], dim=1) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(t, 4 - t).clamp(0, 1)


def color_jitter(x, factors, order, hue_turns):
    """Brightness, contrast, saturation and hue in any order, clamped after each; x (N, 3, H, W).

    factors (N, 4): 1, 1, 1, 0 change nothing; order (N, 3): a permutation of the first three;
    hue_turns: four lists of images, whose hue turns before the 1st, 2nd, 3rd of those, and last.
    """
    brightness, contrast, saturation, hue = factors.unbind(1)
    zero = torch.zeros_like(hue)  # each of the three is  a x + b gray(x) + c mean(gray(x))
    abc = [
        [brightness, zero, zero],
        [contrast, zero, 1 - contrast],
        [saturation, 1 - saturation, zero],
    ]
    abc = torch.stack([torch.stack(row) for row in abc])  # (3 operations, 3 coefficients, N)
    images = torch.arange(len(x), device=x.device)
    for i, turn in enumerate(hue_turns):
        x[turn] = shift_hue(x[turn], hue[turn])
        if i < 3:
            a, b, c = abc[order[:, i], :, images].T[..., None, None, None]
            gray = grayscale(x)
            rest = b * gray + c * gray.mean((2, 3), keepdim=True)
            x = torch.addcmul(rest, x, a).clamp_(0, 1)
    return x


def normalise(x, config):
    """Pixels (N, 3, H, W) in [0, 1] -> mean 0 and deviation 1, channels_last"""
    channels = zip(x.unbind(1), config.mean, config.std)
    return torch.stack([(c - mean) / std for c, mean, std in channels], dim=3).permute(0, 3, 1, 2)


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


# %% Reading runs
def read_run(path):
    """What is known of a run, from its folder or from one checkpoint."""
    path = Path(path)
    pretrain, evaluations = None, []
    if not path.exists():
        raise Halt(f"{path}: no such file or folder")
    if path.is_dir():
        pretrain = read_first(path / name for name in ("pretrain.pt", "last.pt", "prev.pt"))
        evaluations = read_evaluations(path)
        found = {e.name: e.saved for e in evaluations}
        probe, untrained = found.get(""), found.get("random")
        base = pretrain or probe
    else:
        base, untrained = read_checkpoint(path), None
        pretrain, probe = (base, None) if base["kind"] == "pretrain" else (None, base)
        evaluations = [evaluation("", base, [])] if probe else []
    if not base:
        inner = next(path.glob("*/*.pt"), None)
        hint = f": name a run's folder, such as {inner.parent}" if inner else ""
        raise Halt(f"{path}: no pretrain.pt, last.pt or linear.pt in it{hint}")
    place = path.resolve()
    name = place.name if path.is_dir() else f"{place.parent.name}/{place.stem}"
    before = pretrain or probe.get("pretrain") or {}
    run = SimpleNamespace(name=name, path=path, base=base, probe=probe, untrained=untrained)
    run.method, run.data = base["method"], base["data"]
    run.config = before.get("config") or base["config"]
    run.epoch, run.epochs = before.get("epoch", 0), before.get("epochs", 0)
    run.which = "held-out training image" if run.data.get("holdout") else "test image"
    run.history = finite_rows(pretrain["history"], f"{name}, pretraining") if pretrain else []
    if pretrain and not run.history:
        raise Halt(f"{path}: no epoch is finished yet, there is nothing to draw")
    for part in (probe, untrained):
        if part:
            part["history"] = finite_rows(part["history"], f"{name}, linear evaluation")
    run.knn = read_rows(path / "knn.jsonl") if path.is_dir() else []
    run.evaluations = evaluations
    for e in evaluations:
        init = {"supervised": ""}.get(e.mode, "untrained, " if e.init == "random" else "")
        mode = {"probe": "frozen", "finetune": "fine-tuned"}.get(e.mode, e.mode)
        init = f"{title_of(run)}, " if e.init == "pretrained" else init
        e.title = f"{init}{mode}, {100 * e.labels:g} % of the labels"
    return run


def read_evaluations(path):
    """What linear_eval.py left in the folder of a run, whose name is "", and in those inside it"""
    files = [file for kind in ("linear.pt", "along.jsonl") for file in path.glob(f"*/{kind}")]
    inside = sorted({f.parent for f in files if not (f.parent / "pretrain.pt").exists()})
    found = []
    for folder in [path, *inside]:
        name = "" if folder == path else folder.name
        saved, rows = read_first([folder / "linear.pt"]), read_rows(folder / "along.jsonl")
        if saved or rows:
            found.append(evaluation(name, saved, rows))
    return [e for e in found if e.config]


def evaluation(name, saved, rows):
    """One of them: from its checkpoint and its along.jsonl, either of which may be missing"""
    heads = [row["config"] for row in rows if isinstance(row.get("config"), dict)]
    config = saved["config"] if saved else heads[0] if heads else {}
    result, mode = saved["result"] if saved else {}, config.get("mode", "probe")
    if saved and name:  # what no figure is made from, and large
        saved = {key: saved[key] for key in saved.keys() - {"encoder", "classifier", "source"}}
    e = SimpleNamespace(name=name, saved=saved, config=config, result=result, mode=mode)
    e.init = "random" if mode == "supervised" else config.get("init", "pretrained")
    e.labels, e.lr = config.get("labels", 1.0), simple(result.get("lr") or config.get("lr"))
    e.along = [row for row in rows if {"epoch", "top1", "top3"} <= row.keys()]
    e.machine = (saved or {}).get("machine") or {}
    return e


def read_first(paths):
    """The first of these checkpoints that is there and whole, or None if none is there"""
    trouble = None
    for path in paths:
        try:
            if path.exists():
                return read_checkpoint(path)
        except Damaged as error:
            print(f"note: {error}")
            trouble = trouble or error
    if trouble:
        raise trouble
    return None


def read_checkpoint(path):
    checkpoint = load_checkpoint(path)
    keys = "kind method epoch config data arch width encoder history".split()
    keys += ["result"] if checkpoint.get("kind") == "linear" else []
    if missing := [key for key in keys if key not in checkpoint]:
        raise Damaged(f"{path}: not a whole checkpoint, {', '.join(missing)} missing")
    return checkpoint


def finite_rows(rows, where):
    """Those whose numbers are all finite"""
    good = [r for r in rows if all(math.isfinite(v) for v in r.values() if isinstance(v, float))]
    if len(good) < len(rows):
        print(f"note: {where}: {len(rows) - len(good)} of {len(rows)} epochs not finite, skipped")
    return good


def read_rows(path):
    """The objects in a .jsonl file; one that is none, as after a crash, is skipped with a note"""
    rows = []
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise Halt(f"{path}: {error.strerror}") from None
    for i, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            print(f"note: {path}, line {i} of {len(lines)} is torn, skipped")
    return finite_rows(rows, path)


def open_images(run, config, loaded):
    """The run's images and its encoder; None, with a note, if the images are not there.

    loaded: what has been read already, {settings: data}, for the next run
    """
    data, base = run.data, run.base
    settings = dict(data=config.data or data["name"], data_dir=config.data_dir)
    settings |= {key: data[key] for key in ("image_size", "mean", "std")}
    own = not config.data or config.data == data["name"]  # else all images of the other set
    settings |= {key: run.config.get(key, 0) if own else 0 for key in ("limit", "holdout")}
    device, dtype = start_device(SimpleNamespace(device=config.device, precision="auto"))
    try:
        if repr(settings) not in loaded:
            loaded[repr(settings)] = load_data(SimpleNamespace(**settings))
    except Halt as halt:
        if config.data:
            raise
        print(f"note: pairs, map and neighbours are left out: {halt}")
        return None
    images = SimpleNamespace(data=loaded[repr(settings)])
    n, labels = config.limit, images.data.y_train
    images.bank = stratified(labels, n, "--limit")[0] if 0 < n < len(labels) else slice(None)
    torch.manual_seed(config.seed)
    untrained, encoder = (build_encoder(base["arch"], base["width"]) for _ in range(2))
    try:
        encoder.load_state_dict(base["encoder"])
    except RuntimeError:
        text = f"its encoder is no {base['arch']} of width {base['width']}"
        raise Halt(f"{run.path}: {text}") from None

    def features_of(net, x):
        def autocast():
            return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

        return extract_features(net, x, SimpleNamespace(**data), autocast).cpu()

    for name, net in (("encode", encoder), ("encode_untrained", untrained)):
        net.to(device, memory_format=torch.channels_last)
        setattr(images, name, functools.partial(features_of, net))
    return images


# %% Tables
def scores(run):
    """-> (name, k-NN accuracy or None, the probe's result or {}): two baselines, then the run"""
    knn = {what: last_knn(run, what) for what in ("pixels", "random", run.method)}
    knn = {what: row and row["top1"] for what, row in knn.items()}
    if knn[run.method] is None and run.history and run.history[-1]["epoch"] == run.epoch:
        knn[run.method] = run.history[-1].get("knn_top1")
    untrained = run.untrained["result"] if run.untrained else {}
    rows = [("raw pixels", knn["pixels"], {}), ("untrained encoder", knn["random"], untrained)]
    name = f"{title_of(run)}, {run.epoch} epochs" if run.epochs else title_of(run)
    rows.append((name, knn[run.method], run.probe["result"] if run.probe else {}))
    return [row for row in rows if row[1] is not None or row[2] or row is rows[-1]]


def percent(value):
    return "" if value is None else f"{100 * value:.2f} %"


def simple(value):
    """A list as a tuple, and one of a single value as that value"""
    value = tuple(value) if isinstance(value, list) else value
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def plain(value):
    """A setting as text"""
    if value is None or isinstance(value, bool):
        return {None: "not recorded", True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_table(head, rows, left=1):
    """Markdown; the first columns to the left, the others to the right"""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in lines]
    return "\n".join(f"| {line} |" for line in lines)


def settings_of(run):
    """What was set for the pretraining, without what is only about the place"""
    local = "out data_dir device knn_every keep_every save_seconds restart".split()
    config = ({"optimizer": "sgd"} if run.method == "moco" else {}) | run.config
    return [[key, plain(value)] for key, value in config.items() if key not in local]


def evaluations_table(run):
    keys = "epochs batch_size optimizer lr weight_decay schedule augment seed".split()
    rows = []
    for e in run.evaluations:
        result, seconds = e.result, e.machine.get("seconds")
        cells = [e.title, e.name or ".", *(percent(result.get(f"top{k}")) for k in (1, 3, 5))]
        cells += [f"{result['test_loss']:.4f}" if result else "", result.get("n_labels", "")]
        cells += [plain(simple((e.config | {"lr": e.lr}).get(key))) for key in keys]
        rows.append([*cells, "" if seconds is None else f"{seconds / 60:.2f}"])
    head = "evaluation | folder | top-1 | top-3 | top-5 | loss | labelled images".split(" | ")
    return as_table([*head, *(key.replace("_", " ") for key in keys), "minutes"], rows, 2)


def knn_table(run):
    """With the protocol of each row"""
    names, rows = {"pixels": "raw pixels", "random": "untrained encoder"}, []
    for what in ("pixels", "random", run.method):
        if row := last_knn(run, what):
            cells = [names.get(what, f"{title_of(run)}, epoch {run.epoch}"), percent(row["top1"])]
            row = defaultdict(lambda: None, row)
            keys = "k temperature features n_train n_test".split()
            rows.append([*cells, *(plain(row[key]) for key in keys)])
    head = ["weighted k-NN", "top-1", "k", "T", "features", "training images", f"{run.which}s"]
    if not last_knn(run, run.method) and (knn := scores(run)[-1][1]) is not None:
        cells = [f"{title_of(run)}, epoch {run.epoch}", percent(knn), run.config.get("knn_k", 200)]
        rows.append([*cells, "0.1", "backbone", run.data["n_train"], run.data["n_test"]])
    text = "\n\nThe k nearest training images vote with weights exp(cos / T); the last epoch."
    return as_table(head, rows) + text if rows else ""


def probe_table(run):
    """Of the plain probe, and what the document reports of its own"""
    probes, rows = {"untrained encoder": run.untrained, title_of(run): run.probe}, []
    for name, probe in probes.items():
        if probe:
            result = probe["result"]
            tops = [percent(result.get(f"top{k}")) for k in (1, 3, 5)]
            rows.append([name, f"{result['test_loss']:.4f}", *tops])
    if not rows:
        return ""
    said = document_of(run)
    table = as_table(
        ["linear probe", "loss", "top-1", "top-3", "top-5"], rows + (said.results if said else [])
    )
    return f"{table}\n\n{about_probe(run)}" if run.probe else table


def figure_link(figures, key):
    return f"![{CAPTIONS[key]}]({key}.png)\n\n*{CAPTIONS[key]}.*" if key in figures else ""


def print_summary(run):
    print(f"\n{run.name}: {about(run)}\n")
    print(f"{'':26}{'k-NN top-1':>12}{'probe top-1':>14}{'top-3':>10}{'top-5':>10}")
    for name, knn, result in scores(run):
        top = [percent(result.get(key)) or "-" for key in ("top1", "top3", "top5")]
        print(f"{name:26}{percent(knn) or '-':>12}{top[0]:>14}{top[1]:>10}{top[2]:>10}")
    n, classes = run.data.get("n_test"), len(run.data["classes"])
    print(f"{'chance':26}{percent(1 / classes):>12}{percent(1 / classes):>14}", end="")
    print("".join(f"{percent(min(1, k / classes)):>10}" for k in (3, 5)), f"\non {n} {run.which}s")


def markdown(runs):
    """-> a table of runs, one a line"""
    head = "run | method | encoder | data | epochs | seed | k-NN | probe top-1 | top-3 | top-5"
    rows = []
    for run in runs:
        _, knn, result = scores(run)[-1]
        cells = [run.name, title_of(run), f"{run.base['arch']}, width {run.base['width']}"]
        cells += [run.data["name"], run.epoch or "", run.config.get("seed", "")]
        cells += [percent(v) for v in (knn, *(result.get(k) for k in ("top1", "top3", "top5")))]
        rows.append(cells)
    return as_table(head.split(" | "), rows, 6)


# %% What the documents say
CAPTIONS = {
    "diagram": "The method, with the numbers of this run",
    "pairs": "Positive and negative pairs, as training sees them",
    "pretraining": "Loss, k-NN accuracy and learning rate against the epoch",
    "probe": "Top-1, top-5 and loss of the linear classifier, and the final values",
    "classes": "Accuracy of each class",
    "along": "Accuracy of classifiers against the epochs of pretraining",
    "neighbours": "Test images and their nearest training images, failures dashed",
    "map": "Test images in the features of an untrained encoder, and of this one",
}
FRAMEWORKS = {"nnclr": "NNCLR", "byol": "BYOL", "simsiam": "SimSiam", "moco": "MoCo v3"}
STITCHED = "input", "stage1", "stage2", "stage3"  # there pairs lie side by side, no means
PATCHES, IMAGENET = "divide-combine", "the document (ImageNet, ResNet-50)"
LOCAL = "seed out data_dir device knn_every keep_every save_seconds compile restart".split()
MEASURED = ["k-NN top-1 (%)", "probe top-1 (%)", "minutes"]
CURVES = "stage", "batch", "epochs"
ORDER = [*FRAMEWORKS, "sgd", "adamw", "whole", "sample", "sample-combine", "montage", "divide"]
ORDER += [PATCHES, *STITCHED, "final", "proj", "pred"]
TABLE_1 = [
    ["the document: SimCLR", "77.4 %", "94.8 %", "71.3 %", "93.6 %"],
    ["the document: Random init", "38.2 %", "60.1 %", "15.6 %", "34.4 %"],
]
TABLE_3 = {  # and section C.4; MoCo v3 with patches is the main result
    ("nnclr", "sgd", "whole"): 69.4,
    ("nnclr", "sgd", PATCHES): 72.5,
    ("byol", "sgd", "whole"): 66.5,
    ("byol", "sgd", PATCHES): 73.6,
    ("simsiam", "sgd", "whole"): 68.1,
    ("simsiam", "sgd", PATCHES): 71.7,
    ("moco", "sgd", PATCHES): 73.5,
    ("moco", "adamw", "whole"): 69.3,
    ("moco", "adamw", PATCHES): 71.7,
}
TABLE_4, MAIN = {256: 72.5, 512: 73.5, 1024: 73.6}, {100: 73.5, 200: 75.1, 400: 75.5}

# the settings that differ, a title, what the document prints of each and where, or that it does not
ABLATIONS = {
    "encode": (["encode"], "how a view is encoded (D)", {}, "drawn only (D, Figure 3)"),
    "frameworks": (
        ["framework", "optimizer", "encode"],
        "combinatorial patches on other frameworks (C.1)",
        TABLE_3,
        "C.1, Table 3, and C.4 for AdamW; MoCo v3: the main result; all at 100 epochs",
    ),
    "parts": (["parts_combined"], "patches in a combination", {}, "not in the supplementary"),
    "stage": (["combine_at"], "the stage of combining (C.5)", {}, "drawn only (C.5, Figure 2)"),
    "batch": (["batch_size"], "batch size (C.3)", TABLE_4, "C.3, Table 4, at 100 epochs"),
    "epochs": (["epochs"], "epochs of pretraining (C.2)", MAIN, "main results; C.2 is drawn only"),
}

DOCUMENTS = {
    "moco": SimpleNamespace(
        name='"Fine-tuning Momentum Contrast on Image Classification", a course report',
        aim="Learn features of images without labels, by momentum contrast, then ask what they are "
        "worth: a linear classifier is trained on the frozen encoder. These are two loops, with "
        "two checkpoints and two logs.",
        method="Two random views of an image are a query and its key. The encoder of the queries "
        "learns by gradient to tell the key of its own image from K = {queue_size} keys of others, "
        "which wait in a queue; the loss is InfoNCE, T = {temperature}. The encoder of keys has "
        "no gradient: it follows as a moving average, momentum {key_momentum}.",
        pretrain=dict(data="cifar10", limit=0, arch="resnet18", width=64, epochs=100, lr=0.015)
        | dict(batch_size=128, weight_decay=1e-6, key_momentum=0.99, blur=0),
        modes=["probe"],
        evaluate=dict(labels=1, epochs=100, batch_size=128, optimizer="sgd", lr=10, weight_decay=0),
        results=[[REPORT[0], REPORT[1], "40.99 %", "", "87.40 %"]],
    ),
    "simclr": SimpleNamespace(
        name='"Contrastive Self-Supervised Image Classification using SimCLR", a course report',
        aim="Learn features of images without labels, by contrasting views, then train a "
        "classifier with a small share of the labels, frozen or end-to-end, beside untrained "
        "weights and beside networks that are trained with labels only.",
        method="Two random views of each of N = {batch_size} images pass one encoder and a "
        "projector that is discarded afterwards. For each of the 2N vectors the loss (NT-Xent, T = "
        "{temperature}) asks which of the other 2N - 1 is the second view of its image: the "
        "negatives are the batch. (The document's batch is the largest that fitted, about 200.)",
        pretrain=dict(data="cifar10", limit=0, arch="resnet50", width=64, head="linear", dim=1024)
        | dict(epochs=50, batch_size=200, temperature=0.5, optimizer="adam", lr=1e-3)
        | dict(flip=0.5, gray=0.2, blur=0),
        modes=["probe", "finetune"],
        evaluate=dict(labels=0.1, optimizer="adam", lr=1e-3, weight_decay=1e-5),
        results=[["the document, 10 % of the labels", "", "71.3 %", "93.6 %", ""]],
    ),
    "fast-moco": SimpleNamespace(
        name='"Fast-MoCo: Boost Momentum-based Contrastive Learning with Combinatorial Patches", '
        "the supplementary material",
        aim="Learn features of images without labels, from more positive pairs of the same two "
        "views at the same cost, and measure them with a linear classifier.",
        method="Fast-MoCo divides a view into patches, encodes each on its own, and takes means of "
        "n of them as embeddings of the image. Each is to find its own among the N = {batch_size} "
        "images of the batch, which the target branch sees whole. Here: framework `{framework}`, "
        "encoding `{encode}`, grid {grid} x {grid}, n = {parts_combined}, combined at "
        "`{combine_at}`, T = {temperature}.",
        pretrain=dict(data="ImageNet", arch="resnet50", framework="moco", encode=PATCHES, grid=2)
        | dict(parts_combined=2, combine_at="final", epochs=[100, 200, 400], batch_size=512)
        | dict(optimizer="sgd", lr=0.1, sgd_momentum=0.9, weight_decay=1e-4, clip=1)
        | dict(schedule="cosine", warmup_epochs=1, warmup_start=0.25, temperature=1)
        | dict(key_momentum=0.99),
        modes=["probe"],
        evaluate=dict(labels=1, epochs=90, batch_size=4096, optimizer="lars", sgd_momentum=0.9)
        | dict(lr=0.8, schedule="cosine"),
        results=[[f"{IMAGENET}, {n} epochs", "", f"{top1} %", "", ""] for n, top1 in MAIN.items()],
    ),
}


def document_of(run):
    """What the document behind a method says of it, of its settings and of its results; or None"""
    said = DOCUMENTS.get(run.method)
    if said and run.method == "fast-moco" and run.epochs == 20:  # Tables 1 and 2, for ablations
        more = dict(pretrain=said.pretrain | dict(epochs=20, lr=0.15))
        more |= dict(evaluate=said.evaluate | dict(epochs=10, lr=1.6), results=[])
        return SimpleNamespace(**vars(said) | more)
    return said


def rank(value):
    """The place of a setting in the document's order"""
    return (ORDER.index(value) if value in ORDER else len(ORDER)) if type(value) is str else value


def printed(name, setting, run):
    """The top-1 accuracy that the document prints for a setting of an ablation, or None"""
    return ABLATIONS[name][2].get(simple(setting)) if run.method == "fast-moco" else None


def label_of(setting):
    """A setting of an ablation as text"""
    if len(setting) == 1:
        return plain(setting[0])
    framework, optimizer, encode = setting
    name = FRAMEWORKS.get(framework, framework) + (", AdamW" if optimizer == "adamw" else "")
    return name + {"whole": "", PATCHES: " + combinatorial patches"}.get(encode, f", {encode}")


def measured(run):
    """-> {what: its value, or None}, in percent and minutes"""
    _, knn, result = scores(run)[-1]
    values = [100 * v if v is not None else None for v in (knn, result.get("top1"))]
    seconds = run.history[-1].get("seconds") if run.history else None
    return dict(zip(MEASURED, [*values, seconds and seconds / 60]))


def plain_spread(value, runs):
    """What spread() gives, as text; n is named if it is not that of the runs"""
    if not value:
        return ""
    mean, deviation, n = value
    text = f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
    return text + f" (n = {n})" * (n < runs)


def tabled_page(path, table):
    """The text of a Markdown file with the table between its two markers, the rest as it is."""
    first, last = "<!-- table -->", "<!-- /table -->"
    try:
        text = path.read_bytes().decode() if path.exists() else f"{first}\n{last}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise Halt(f"--table {path}: {getattr(error, 'strerror', error)}") from None
    before, found, rest = text.partition(first)
    _, found_too, after = rest.partition(last)
    if not (found and found_too) or first in rest or last in before + after:
        raise Halt(f"--table {path}: must hold the lines {first} and {last} once each")
    return f"{before}{first}\n{table}\n{last}{after}"


def write_page(path, text, flag="--table"):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    except OSError as error:
        raise Halt(f"{flag} {path}: {error.strerror}") from None


def save_figure(figure, path):
    """As path.png and path.pdf; in a notebook it is shown as well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.draw_without_rendering()  # places everything; once is enough for both files
        figure.set_layout_engine("none")
        for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
            how = dict(format=kind, metadata=metadata, dpi=160, bbox_inches="tight")
            figure.savefig(buffer := io.BytesIO(), **how)
            write_atomic(path.with_name(f"{path.name}.{kind}"), buffer.getbuffer())
    except OSError as error:
        raise Halt(f"--out {path.parent}: {error.strerror}") from None
    if sys.argv[0].endswith("kernel_launcher.py"):
        png = buffer.getvalue()
        display(SimpleNamespace(_repr_png_=lambda: png))  # noqa: F821


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


def draw_all(run, images, rows=6):
    """-> {name: what draws it}, of all the figures for which this run has what they need

    rows: of neighbours
    """
    figures = {}
    if run.history:
        figures["pretraining"] = lambda: draw_pretraining(run)
    if run.method in DIAGRAMS:
        figures["diagram"] = lambda: DIAGRAMS[run.method](run, images)
    if images and "crop_scale" in run.config:
        figures["pairs"] = lambda: draw_pairs(run, images)
    if images:
        figures["map"] = lambda: draw_map(run, images)
        figures["neighbours"] = lambda: draw_neighbours(run, images, rows)
    if run.probe:
        figures["probe"] = lambda: draw_probe(run)
        figures["classes"] = lambda: draw_classes(run)
    if any(e.along for e in run.evaluations):
        figures["along"] = lambda: draw_along(run)
    return figures


def draw_ablations(config, runs):
    """One figure and one table of runs that differ in one setting"""
    name = config.ablation
    groups, folder = group_runs(name, runs), Path(config.out)
    table, path = ablation_table(name, groups), folder / f"ablation-{name}.md"
    page = Path(config.table or path)
    text = tabled_page(page, table)
    save_figure(draw_ablation(name, groups), folder / f"ablation-{name}")
    write_page(page, text)
    print(f"{table}\n\n{page} has this table; figure (.png and .pdf): {folder}/ablation-{name}")


def draw(config):
    """All figures and tables"""
    paths = {os.path.realpath(path): path for path in config.runs}.values()  # each one once
    runs, written, loaded = [read_run(path) for path in paths], {}, {}
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    if config.ablation != "none":
        return draw_ablations(config, runs)
    page = tabled_page(Path(config.table), markdown(runs)) if config.table else None
    if len(runs) > 1:
        folder = Path(config.out)
        save_figure(draw_comparison(runs), folder / "comparison")
        written[folder] = ["comparison"]
    for run in runs:
        folder = Path(config.out)
        folder = (
            folder / re.sub(r"[^\w.=-]+", "-", run.name).strip("-.") if len(runs) > 1 else folder
        )
        # the SimCLR report's Figure 4 has four rows
        figures = draw_all(run, open_images(run, config, loaded), 4 if config.report else 6)
        for name, make in tqdm(figures.items(), run.name, disable=None, leave=False):
            torch.manual_seed(config.seed)
            save_figure(make(), folder / name)
            written.setdefault(folder, []).append(name)
        if config.report:  # after its figures, so that this file tells that they are there
            text = report(run, figures)
            write_page(folder / "report.md", text, "--out")
            print(f"{folder / 'report.md'}: the report on {run.name}")
    if page:  # last, so that this file tells that all figures are there
        write_page(Path(config.table), page)
    for run in runs:
        print_summary(run)
    print(*[f"\n{markdown(runs)}\n\n{config.table} has this table"] * bool(config.table))
    for folder, names in written.items():
        print(f"figures (.png and .pdf) in {folder}/: {', '.join(names)}")


def main(argv=None):
    """Draw as the command line says -> exit code"""
    try:
        with matplotlib.rc_context(STYLE):
            config = parse_config(argv)
            if not config.runs:
                raise Halt("name at least one run folder or checkpoint, for example runs/moco")
            draw(config)
    except Halt as halt:
        print(f"error: {halt}", file=sys.stderr)
        return halt.code
    except torch.OutOfMemoryError:
        print("error: out of memory: --device cpu, or a smaller --limit", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    if code and "__file__" in globals():  # a notebook stays open
        sys.exit(code)
