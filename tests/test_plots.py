"""Figures and tables: which are drawn, from what, and what they show."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import fast_moco
import knn_monitor
import linear_eval
import moco_cifar
import plots
import simclr

FAST = ["--epochs", "2", "--device", "cpu", "--precision", "fp32"]
WITHOUT_IMAGES = {"pretraining", "diagram", "probe", "classes"}
WITH_IMAGES = WITHOUT_IMAGES | {"pairs", "map", "neighbours"}


@pytest.fixture(scope="module")
def finished(pretrained, tmp_path_factory):
    """A run with everything in its folder. Read only."""
    run = shutil.copytree(pretrained, tmp_path_factory.mktemp("runs") / "moco")
    for more in ([], ["--init", "random"]):
        assert linear_eval.main([str(run), *FAST, *more]) == 0
    for baseline in ("pixels", "random", "none"):
        flags = ["--k", "5", "--device", "cpu", "--baseline", baseline]
        assert knn_monitor.main([str(run), *flags]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "moco")


@pytest.fixture
def draw(tmp_path, capsys):
    """draw(argument...) -> the names of the figures, what was printed"""

    def call(*arguments):
        assert plots.main([*map(str, arguments), "--out", str(tmp_path / "figures")]) == 0
        return {p.stem for p in (tmp_path / "figures").rglob("*.png")}, capsys.readouterr().out

    return call


@pytest.fixture
def few(monkeypatch):
    """No figures of single runs: they take a second each"""
    monkeypatch.setattr(plots, "draw_all", lambda *_: {})


def change(run, name="pretrain.pt", **values):
    torch.save(torch.load(run / name, weights_only=True) | values, run / name)


def test_all_figures_and_the_summary(run, draw, tmp_path):
    names, out = draw(run)
    assert names == WITH_IMAGES
    for name in names:
        assert np.asarray(Image.open(tmp_path / f"figures/{name}.png").convert("L")).std() > 5
        assert (tmp_path / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")
    result = torch.load(run / "linear.pt", weights_only=True)["result"]
    assert f"{100 * result['top1']:.2f} %" in out
    for row in map(json.loads, (run / "knn.jsonl").read_text().splitlines()):
        assert f"{100 * row['top1']:.2f} %" in out


def test_curves_need_no_images(run, draw):
    data = torch.load(run / "pretrain.pt", weights_only=True)
    gone = "/no/such/images.npz"
    change(run, config=data["config"] | {"data": gone}, data=data["data"] | {"name": gone})
    names, out = draw(run)
    assert names == WITHOUT_IMAGES and gone in out


def test_several_runs_are_compared(run, draw, few, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    assert "comparison" in draw(run, other)[0]


def test_rows_that_are_no_numbers_are_left_out(run, draw, few):
    history = torch.load(run / "pretrain.pt", weights_only=True)["history"]
    change(run, history=[history[0] | {"loss": float("nan")}, history[1]])
    assert "1 of 2 epochs not finite" in draw(run)[1]


def test_a_torn_line_is_left_out(run, draw, few):
    with open(run / "knn.jsonl", "a") as file:
        file.write('{"what": "mo')
    assert "torn" in draw(run)[1]


def test_map_is_a_principal_component_analysis():
    features = torch.randn(50, 6, dtype=torch.float64) * torch.arange(1, 7)
    points, share = plots.pca(features)
    centred = features.numpy() - features.numpy().mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(points.abs().numpy(), np.abs(u[:, :2] * s[:2]), atol=1e-6)
    np.testing.assert_allclose(share.numpy(), s[:2] ** 2 / (s**2).sum(), atol=1e-6)


def test_neighbours_are_the_nearest():
    features, bank = torch.randn(5, 8), torch.randn(40, 8)
    similarity, nearest = plots.nearest(features, bank, 3)
    for i, h in enumerate(features.double().numpy()):
        cos = [h @ b / np.linalg.norm(h) / np.linalg.norm(b) for b in bank.double().numpy()]
        assert nearest[i].tolist() == np.argsort(cos)[::-1][:3].tolist()
        np.testing.assert_allclose(similarity[i], sorted(cos)[::-1][:3], atol=1e-6)


def test_table_replaces_what_is_between_the_markers(run, draw, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter")
    save, seen = plots.save_figure, []

    def watch(*args):
        seen.append(page.read_text())
        return save(*args)

    monkeypatch.setattr(plots, "save_figure", watch)
    monkeypatch.setattr(plots, "draw_all", lambda run, *_: {"a": lambda: plots.draw_classes(run)})
    draw(run, "--table", page)
    text = page.read_text()
    assert text.startswith("before\n<!-- table -->\n|") and text.endswith("<!-- /table -->\nafter")
    assert "old" not in text and "| moco |" in text
    assert seen and all("old" in before for before in seen), (
        "the table is written last: make trusts it"
    )


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("page.md", b"no markers", "<!-- table -->"),
        ("x.pt", b"", "x.pt"),
        ("x.pt", b"<html>quota</html>", "x.pt"),
        ("x.pt", None, "no such file"),
    ],
)
def test_refused_files(name, content, says, run, tmp_path, refused):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    argv = [run, "--table", path] if name == "page.md" else [path]
    refused(plots.main, [*argv, "--out", tmp_path / "figures"], says)
    assert not (tmp_path / "figures").exists()


def test_refused_runs(run, tmp_path, refused):
    refused(plots.main, [tmp_path], "pretrain.pt")
    change(run, history=[])
    refused(plots.main, [run], "no epoch is finished")
    refused(plots.main, [], "run")
    refused(plots.main, [run, "--nonsense"], "--nonsense")


# ---------------------------------------------------------------- all methods
DATA = dict(
    name="/no/such/images.npz", classes=list("abcdefghij"), image_size=32, n_train=5000, n_test=1000
)
DATA |= dict(mean=[0.5] * 3, std=[0.25] * 3, holdout=0)


@pytest.fixture
def craft(tmp_path):
    """craft(script, name, knn, seconds, setting...) -> the folder of a run, its weights left out"""

    def make(script, name, knn=0.5, seconds=60.0, **settings):
        config = dataclasses.asdict(script.Config(**settings))
        base = dict(format="contrastive-cifar/1", kind="pretrain", method=script.METHOD)
        base |= dict(arch=config["arch"], width=config["width"], dim=512, encoder={})
        base |= dict(config=config, data=DATA, epoch=config["epochs"], epochs=config["epochs"])
        rows = [dict(epoch=e, loss=3.0 / e, lr=0.1, seconds=seconds * e) for e in (1, 2)]
        rows.append(dict(epoch=config["epochs"], loss=1.0, lr=0.1, seconds=3 * seconds))
        rows[-1] |= {} if knn is None else dict(knn_top1=knn)
        (tmp_path / name).mkdir()
        torch.save(base | dict(history=rows), tmp_path / name / "pretrain.pt")
        return tmp_path / name

    return make


def evaluated(run, folder="", mode="probe", top1=0.5, along=(), **config):
    """What linear_eval.py leaves in a folder of a run"""
    before = torch.load(run / "pretrain.pt", weights_only=True)
    config = dict(mode=mode, init="pretrained", labels=1.0, epochs=5, lr=(10.0,)) | config
    result = dict(top1=top1, top3=top1 + 0.2, top5=top1 + 0.3, test_loss=1.5, n_test=1000, lr=10.0)
    pretrain = {key: before[key] for key in ("method", "epoch", "epochs", "config")}
    history = [dict(epoch=5, loss=1.0, **{k: result[k] for k in result if k != "n_test"})]
    result |= dict(per_class=[0.5] * 10)
    linear = before | dict(kind="linear", config=config, result=result, history=history)
    (run / folder).mkdir(exist_ok=True)
    torch.save(linear | dict(pretrain=pretrain), run / folder / "linear.pt")
    if along:
        rows = [dict(epoch=e, top1=t, top3=t + 0.1, n_test=1000) for e, t in along]
        rows = [dict(config=config, method=before["method"]), *rows]
        (run / folder / "along.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def texts(figure):
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def curves(axes):
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}


VARIANTS = [dict(framework=f) for f in ("moco", "byol", "simsiam", "nnclr")]
VARIANTS += [dict(encode=e) for e in ("divide", "sample", "sample-combine", "montage", "whole")]
VARIANTS += [dict(combine_at=stage) for stage in ("input", "stage3", "proj")] + [dict(grid=4)]
CASES = [(moco_cifar, {}), (simclr, {}), (simclr, {"head": "linear"})]
CASES += [(fast_moco, variant) for variant in VARIANTS]


@pytest.mark.parametrize("script, settings", CASES)
def test_each_method_has_its_diagram_its_loss_and_its_level(script, settings, craft, few):
    run = plots.read_run(craft(script, "a", batch_size=128, **settings))
    shown = texts(plots.DIAGRAMS[run.method](run))
    level = plots.chance_of(run)
    if settings.get("framework") in ("byol", "simsiam"):
        assert level is None and "no negatives" in shown
    else:
        queue = math.log(4097)  # of the defaults
        right = {"moco": queue, "simclr": math.log(255), "fast-moco": 2 * math.log(128)}
        assert level[0] == pytest.approx(right[run.method]) and f"{level[0]:.2f}" in shown
    if run.method == "fast-moco" and settings.keys() <= {"framework"}:
        assert "6 means" in shown and "of 4" in shown and "4N = 512 at once" in shown
        assert "16 x 16" in shown
    assert ("8 x 8" in shown) == ("grid" in settings)
    figure = plots.new_figure("", "", 4, 3)
    plots.draw_formula(figure.subplots(), run)
    name = {"moco": "InfoNCE", "simclr": "NT-Xent", "fast-moco": "z^c_i"}[run.method]
    assert name in texts(figure)
    if settings.keys() <= {"framework"}:
        figure.draw_without_rendering()  # fails if the formula cannot be set
    drawn = curves(plots.draw_pretraining(run).axes[0])
    at_level = [level[1]] if level else []
    assert [name for name in drawn if name.startswith("chance")] == at_level


def test_views_are_those_that_the_composition_names(craft):
    """SimCLR's --augment: without any a view is the image, with flips it is that or its mirror."""
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    run = plots.read_run(craft(simclr, "none", augment=""))
    assert torch.equal(plots.view(images, run), images)
    run = plots.read_run(craft(simclr, "flip", augment="flip"))
    same = (plots.view(images, run) == images).flatten(1).all(1)
    mirrored = (plots.view(images, run) == images.flip(3)).flatten(1).all(1)
    assert 0 < same.sum() < 20 and 0 < mirrored.sum() < 20


def test_comparison_in_equal_time(craft):
    runs = [plots.read_run(craft(simclr, name, 0.4, 60.0 * i)) for i, name in enumerate("ab", 1)]
    _, _, time = plots.draw_comparison(runs).axes
    assert time.get_xlabel() == "minutes"
    assert [line.get_xdata().tolist() for line in time.lines] == [[3.0], [6.0]]


def test_comparison_takes_the_mean_over_seeds(craft):
    """Of runs that differ in nothing else; one of another rate stays by itself."""
    how = (("a-seed0", 0.4, 60.0, {}), ("b", 0.5, 60.0, dict(lr=9.0)), ("a-seed1", 0.6, 120.0, {}))
    folders = [craft(simclr, *some, seed=i, **more) for i, (*some, more) in enumerate(how)]
    evaluated(folders[0], top1=0.3)
    evaluated(folders[2], top1=0.5)
    loss, knn, time, bars = (figure := plots.draw_comparison([*map(plots.read_run, folders)])).axes
    assert {k: v.tolist() for k, v in curves(knn).items()} == {"a, 2 seeds": [50], "b": [50]}
    (band,) = knn.collections  # 50 and the standard deviation of 40 and 60 (n - 1)
    edges = sorted({y for _, y in band.get_paths()[0].vertices})
    np.testing.assert_allclose(edges, [50 - 200**0.5, 50 + 200**0.5])
    assert time.lines[0].get_xdata().tolist() == [4.5] and len(loss.collections) == 1
    assert [patch.get_width() for patch in bars.patches] == [pytest.approx(40)]
    assert "seeds 0, 2." in texts(figure).replace("\n", " ")


# ---------------------------------------------------------------- along the pretraining, Table 1
@pytest.fixture
def table_1(craft):
    """A SimCLR run with all that its report's Table 1 and Figure 2 are made from"""
    run = craft(simclr, "simclr", batch_size=64, gray=0.2)
    tenth = dict(labels=0.1, optimizer="adam", weight_decay=1e-5)
    evaluated(run, "probe-0.1", "probe", 0.41, [(1, 0.31), (2, 0.36), (200, 0.41)], **tenth)
    evaluated(run, "finetune-0.1", "finetune", 0.52, [(1, 0.42), (200, 0.52)], **tenth)
    evaluated(run, "random-probe-0.1", "probe", 0.13, init="random", **tenth)
    evaluated(run, "random-finetune-0.1", "finetune", 0.24, init="random", **tenth)
    evaluated(run, "supervised-0.1", "supervised", 0.25, init="random", **tenth)
    evaluated(run, "supervised", "supervised", 0.66, init="random")
    return run


def test_accuracy_along_the_pretraining(table_1):
    run = plots.read_run(table_1)
    assert "along" in plots.draw_all(run, None)
    top1, top3 = map(curves, plots.draw_along(run).axes)
    frozen, tuned = (f"SimCLR, {mode}, 10 % of the labels" for mode in ("frozen", "fine-tuned"))
    np.testing.assert_allclose(top1[frozen], [31, 36, 41])
    np.testing.assert_allclose(top1[tuned], [42, 52])
    np.testing.assert_allclose(top3[tuned], [52, 62])
    assert top1["supervised, 10 % of the labels"].tolist() == [25, 25]
    assert top1["supervised, 100 % of the labels"].tolist() == [66, 66]
    assert len(top1) == 5 and top1["chance"][0] == 10
    for path in table_1.glob("*/along.jsonl"):
        path.unlink()
    assert "along" not in plots.draw_all(plots.read_run(table_1), None)


def cells(table):
    """{first cell: the others} of a Markdown table"""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_table_1(table_1):
    rows = cells(plots.table_1(plots.read_run(table_1)))
    assert rows["SimCLR, 10 % of the labels"] == ["52.00 %", "72.00 %", "41.00 %", "61.00 %"]
    assert rows["Random init, 10 % of the labels"] == ["24.00 %", "44.00 %", "13.00 %", "33.00 %"]
    assert rows["Supervised, 10 % of the labels"][0] == "25.00 %"
    assert rows["the document: SimCLR"] == ["77.4 %", "94.8 %", "71.3 %", "93.6 %"]
    assert rows["the document: Random init"] == ["38.2 %", "60.1 %", "15.6 %", "34.4 %"]
    shutil.rmtree(table_1 / "finetune-0.1")
    rows = cells(plots.table_1(plots.read_run(table_1)))
    assert rows["SimCLR, 10 % of the labels"] == ["", "", "41.00 %", "61.00 %"]


# ---------------------------------------------------------------- reports
@pytest.fixture
def light(monkeypatch):
    """Figures are built, but only their names are written"""

    def save(figure, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.png").touch()

    monkeypatch.setattr(plots, "save_figure", save)


def links(text):
    return set(re.findall(r"!\[.+?\]\((\w+)\.png\)", text))


def test_report_of_a_run_with_everything(run, draw, light, tmp_path):
    names, out = draw(run, "--report")
    text = (tmp_path / "figures/report.md").read_text()
    assert links(text) == names == WITH_IMAGES and "report.md" in out
    linear = torch.load(run / "linear.pt", weights_only=True)["result"]
    rows = cells(text)
    row = [f"{linear['test_loss']:.4f}", *(f"{100 * linear[f'top{k}']:.2f} %" for k in (1, 3, 5))]
    assert rows["MoCo"] == row
    assert [row for name, row in rows.items() if "first course report" in name] == [
        ["67.3899", "40.99 %", "", "87.40 %"]
    ]
    for line in map(json.loads, (run / "knn.jsonl").read_text().splitlines()):
        what = {"pixels": "raw pixels", "random": "untrained encoder"}.get(line["what"])
        assert f"| {what or 'MoCo, epoch 2'} | {100 * line['top1']:.2f} % | 5 | 0.1 |" in text
    assert rows["batch_size"] == ["40"] and rows["queue_size"] == ["50"] and rows["seed"] == ["0"]
    assert "- `epochs`: 100 → 2\n" in text and "- `key_momentum`" not in text


def test_report_links_no_figure_that_was_not_made(craft, draw, light, tmp_path):
    run = craft(fast_moco, "fast", knn=None)
    names, _ = draw(run, "--report")
    text = (tmp_path / "figures/report.md").read_text()
    assert links(text) == names == {"pretraining", "diagram"}
    missing = re.search("Not drawn, .*: (.*)\\.", text)[1].split(", ")
    assert {*missing, *names} == {*plots.CAPTIONS}
    assert "weighted k-NN" not in text and "linear probe |" not in text  # what was not measured


def test_each_of_several_runs_has_its_report(craft, draw, light, few, tmp_path):
    draw(craft(simclr, "a"), craft(moco_cifar, "b"), "--report")
    for name, title in (("a", "# SimCLR: a"), ("b", "# MoCo: b")):
        assert (tmp_path / f"figures/{name}/report.md").read_text().startswith(title)


def test_report_of_an_unfinished_run_and_of_an_evaluation_alone(craft, draw, light, tmp_path):
    run = craft(simclr, "a")
    change(run, epoch=7)
    draw(run, "--report")
    assert "epoch 7 of 200 (unfinished)" in (tmp_path / "figures/report.md").read_text()
    evaluated(run, mode="supervised")
    draw(run / "linear.pt", "--report")
    assert "supervised, 100 % of the labels" in (tmp_path / "figures/report.md").read_text()


def differing(text):
    return set(re.findall(r"^- (.*)$", text, re.MULTILINE))


def test_what_differs_from_the_document(craft, table_1):
    report = lambda folder: differing(plots.report(plots.read_run(folder), {}))
    settings = moco_cifar.RECIPES["report"]
    run = craft(moco_cifar, "report", **settings)
    said = dict(epochs=100, batch_size=128, optimizer="sgd", weight_decay=0.0)
    evaluated(run, **said)
    assert report(run) == set()
    other = craft(moco_cifar, "other", **settings | dict(lr=0.06, blur=0.5))
    evaluated(other, **said | dict(batch_size=256))
    assert report(other) == {
        "`lr`: 0.015 → 0.06",
        "`blur`: 0 → 0.5",
        "`batch_size`: 128 → 256 (MoCo, frozen, 100 % of the labels)",
    }
    lines = report(table_1)
    assert {"`batch_size`: 200 → 64", "`head`: linear → mlp", "`lr`: 0.001 → 0.06"} <= lines
    assert "`lr`: 0.001 → 10 (SimCLR, fine-tuned, 10 % of the labels)" in lines
    assert not [line for line in lines if "gray" in line or "labels`" in line or "random" in line]
    run = craft(fast_moco, "paper", **fast_moco.RECIPES["paper-20"], arch="resnet50")
    assert report(run) == {"`data`: ImageNet → cifar10"}  # 20 epochs go with a rate of 0.15
    run = craft(fast_moco, "long", **fast_moco.RECIPES["paper"] | dict(epochs=300))
    assert "`epochs`: 100 or 200 or 400 → 300" in report(run)


def test_an_augmentation_that_is_not_used_differs(craft):
    run = craft(simclr, "a", **simclr.RECIPES["report"] | dict(batch_size=200, augment="crop"))
    assert differing(plots.report(plots.read_run(run), {})) == {
        "`flip`: 0.5 → 0",
        "`gray`: 0.2 → 0",
    }


def test_report_that_cannot_be_written(craft, few, tmp_path, refused):
    run = craft(simclr, "a")
    (tmp_path / "figures/report.md").mkdir(parents=True)
    refused(plots.main, [run, "--report", "--out", tmp_path / "figures"], "report.md")


# ---------------------------------------------------------------- ablations
def ablate(name, folders):
    groups = plots.group_runs(name, [plots.read_run(folder) for folder in folders])
    return groups, cells(plots.ablation_table(name, groups))


def test_mean_and_deviation_over_seeds(craft):
    folders = [craft(fast_moco, "1", 0.60, seed=0, combine_at="proj")]
    for seed, (knn, top1) in enumerate([(0.70, 0.80), (0.72, 0.84), (None, 0.91)]):
        folders.append(craft(fast_moco, f"final{seed}", knn, 20.0 * (1 + seed), seed=seed))
        evaluated(folders[-1], top1=top1)
    _, rows = ablate("stage", folders)
    # of 70 and 72: 71 ± sqrt(2); of 80, 84 and 91: 85 ± sqrt((25 + 1 + 36) / 2)
    assert rows["final"] == [
        "3",
        "71.00 ± 1.41 (n = 2)",
        "85.00 ± 5.57",
        "2.00 ± 1.00",
        "drawn only",
    ]
    assert rows["proj"] == ["1", "60.00", "", "3.00", "drawn only"]


ORDERS = {
    "stage": ("combine_at", "input stage1 stage2 stage3 final proj pred", "drawn only"),
    "encode": ("encode", "whole sample sample-combine montage divide divide-combine", "drawn only"),
    "parts": ("parts_combined", "1 2 3 4", ""),
    "batch": ("batch_size", "128 256 512 1024", {"256": "72.5", "512": "73.5", "1024": "73.6"}),
    "epochs": ("epochs", "20 100 200 400", {"100": "73.5", "200": "75.1", "400": "75.5"}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_ablation_has_the_order_and_the_figures_of_the_document(name, craft):
    field, values, document = ORDERS[name]
    values, kind = values.split(), type(getattr(fast_moco.Config(), field))
    folders = []
    for value in sorted(values):  # in another order
        folders.append(
            craft(fast_moco, value, 0.3 + 0.01 * values.index(value), **{field: kind(value)})
        )
        evaluated(folders[-1], top1=0.6)
    groups, rows = ablate(name, folders)
    assert [*rows][2 : 2 + len(values)] == values
    for value in values:
        expected = document if isinstance(document, str) else document.get(value, "")
        assert rows[value][-1] == expected
    panels = plots.draw_ablation(name, groups).axes
    assert len(panels) == 3
    expected = [30 + i for i in range(len(values))]
    if name in plots.CURVES:
        np.testing.assert_allclose(panels[0].lines[0].get_ydata().astype(float), expected)
        labels = panels[0].get_xticklabels()
    else:
        np.testing.assert_allclose([bar.get_width() for bar in panels[0].patches], expected)
        labels = panels[0].get_yticklabels()
    assert [label.get_text() for label in labels] == values


def test_ablation_of_frameworks_shows_the_gain(craft):
    folders = []
    for i, framework in enumerate(("moco", "simsiam", "byol", "nnclr")):
        for encode, knn in (("divide-combine", 0.55 + 0.01 * i), ("whole", 0.5)):
            settings = dict(framework=framework, encode=encode)
            folders.append(craft(fast_moco, f"{framework}-{encode}", knn, **settings))
    for encode in ("whole", "divide-combine"):
        settings = dict(fast_moco.RECIPES["adamw"], encode=encode)
        folders.append(craft(fast_moco, f"adamw-{encode}", 0.5, **settings))
    groups, rows = ablate("frameworks", folders)
    names = ["NNCLR", "BYOL", "SimSiam", "MoCo v3", "MoCo v3, AdamW"]
    patches = " + combinatorial patches"
    assert [*rows][2:12] == [text for name in names for text in (name, name + patches)]
    printed = ["69.4", "72.5 (+3.1)", "66.5", "73.6 (+7.1)", "68.1", "71.7 (+3.6)", "", "73.5"]
    printed += ["69.3", "71.7 (+2.4)"]
    assert [row[-1] for row in [*rows.values()][2:12]] == printed
    assert rows["NNCLR" + patches][1] == "58.00 (+8.00)" and rows["NNCLR"][1] == "50.00"
    assert "58.00 (+8.00)" in texts(plots.draw_ablation("frameworks", groups))
    about = plots.about_ablation("frameworks", groups)
    assert "differ also in lr (0.001; 0.1), weight_decay (0.0001; 0.05)" in about


def test_ablation_writes_one_figure_and_one_table(craft, draw, tmp_path):
    runs = [craft(simclr, f"b{n}", batch_size=n) for n in (64, 128)]
    names, out = draw(*runs, "--ablation", "batch")
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {f"ablation-batch.{kind}" for kind in ("png", "pdf", "md")}
    text = (tmp_path / "figures/ablation-batch.md").read_text()
    assert cells(text)["64"] == ["1", "50.00", "", "3.00", ""]  # no figure is of SimCLR
    assert "fast" not in text.lower() and "| 128 | 1 |" in out


def test_refused_ablations(craft, tmp_path, refused):
    runs = [craft(fast_moco, "a", seed=1), craft(fast_moco, "b", seed=2), craft(simclr, "c")]
    argv = ["--out", tmp_path / "figures", "--ablation"]
    refused(plots.main, [*runs[:2], *argv, "stage"], "differ in combine_at")
    refused(plots.main, [*runs, *argv, "encode"], "has no setting encode")
    refused(plots.main, [runs[0], craft(simclr, "d", epochs=3), *argv, "epochs"], "one method")
    refused(plots.main, [*runs, *argv, "seeds"], "--ablation")
    assert not (tmp_path / "figures").exists()
