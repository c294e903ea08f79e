"""Figures and tables: which are drawn, from what, and what they show."""

import dataclasses
import html.parser
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.text import Text
from PIL import Image

import fast_moco
import moco_cifar
import plots
import simclr

sys.path.insert(0, str(ROOT / "tools"))
import report
import webpage

ALL = {"pretraining", "diagram", "pairs", "map", "neighbours", "probe", "classes", "along"}
DATA = dict(name="cifar10", image_size=8, n_train=5000, n_test=1000, mean=[0.5] * 3, std=[0.2] * 3)
DATA |= dict(classes=list("abcdefghij"), holdout=0)


@pytest.fixture
def craft(tmp_path):
    """craft(script, name, knn, seconds, setting...) -> the folder of a run, its weights left out"""

    def make(script, name, knn=0.5, seconds=60.0, **settings):
        config = dataclasses.asdict(script.Config(**settings)) | dict(image_size=8)
        base = dict(format="contrastive-cifar/1", kind="pretrain", method=script.METHOD)
        base |= dict(arch=config["arch"], width=config["width"], dim=512, encoder={})
        base |= dict(config=config, data=DATA, epoch=config["epochs"], epochs=config["epochs"])
        base |= dict(chance=8.32)
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
    result |= dict(per_class=[0.5 + i / 100 for i in range(10)])
    linear = before | dict(kind="linear", config=config, result=result, history=history)
    (run / folder).mkdir(exist_ok=True)
    torch.save(linear | dict(pretrain=pretrain), run / folder / "linear.pt")
    for epoch, top1 in along:
        kept = dict(pretrain=pretrain | dict(epoch=epoch))
        kept["result"] = result | dict(top1=top1, top3=top1 + 0.1)
        (run / folder / f"epoch{epoch:04d}").mkdir()
        torch.save(linear | kept, run / folder / f"epoch{epoch:04d}" / "linear.pt")


def change(run, name="pretrain.pt", **values):
    torch.save(torch.load(run / name, weights_only=True) | values, run / name)


def measured(run, n=6, m=12):
    """What pretraining leaves for figures of pairs, and knn_monitor.py for the others"""
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 256, (3, n, 3, 8, 8), dtype=np.uint8))
    cosines = {key: torch.eye(m).half() - 0.25 for key in ("backbone", "head")}
    gallery = dict(images=images[0], views=images[1:], labels=torch.arange(m) % 4, cosines=cosines)
    change(run, gallery=gallery)
    epoch = torch.load(run / "pretrain.pt", weights_only=True)["epoch"]
    arrays = dict(test_images=draw.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), bank=5000)
    arrays |= dict(images=draw.integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8), epoch=epoch)
    arrays |= dict(test_labels=np.array([0, 1, 2]), labels=np.array([[0, 1], [1, 1], [3, 4]]))
    np.savez(run / "neighbours.npz", cosines=np.full((3, 2), 0.5, np.float32), **arrays)
    points, labels = draw.normal(size=(40, 2)).astype(np.float32), np.arange(40) % 10
    for name, at in (("map", epoch), ("map-random", 0)):
        shares = np.array([0.4, 0.2], np.float32)
        np.savez(run / f"{name}.npz", points=points, labels=labels, shares=shares, epoch=at)
    rows = dict(pixels=0.2, random=0.3, moco=0.6)
    rows = [dict(what=k, epoch=epoch, k=7, top1=v, features="backbone") for k, v in rows.items()]
    (run / "knn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def finished(craft):
    """A MoCo run with all that can be drawn"""
    run = craft(moco_cifar, "moco")
    measured(run)
    evaluated(run, top1=0.55, along=[(1, 0.2), (2, 0.3)])
    evaluated(run, "random", top1=0.35, init="random")
    return run


def test_a_probe_of_another_epoch_or_of_a_run_since_replaced_is_not_shown(finished, capsys):
    assert plots.read_run(finished).probe and plots.read_run(finished).untrained
    evaluated(finished, "probe-0.1", labels=0.1)
    linear = torch.load(finished / "linear.pt", weights_only=True)
    torch.save(linear | dict(pretrain=linear["pretrain"] | dict(epoch=1)), finished / "linear.pt")
    run = plots.read_run(finished)
    assert not run.probe and run.untrained and run.evaluations["probe-0.1"].result
    assert f"{finished / 'linear.pt'} is of another epoch, run or data" in capsys.readouterr().out
    change(finished, config=linear["pretrain"]["config"] | dict(seed=7))
    run = plots.read_run(finished)
    assert not run.probe and run.untrained and not run.evaluations["probe-0.1"].result


def test_what_was_measured_on_other_images_is_not_shown(finished, capsys):
    change(finished, data=DATA | dict(sha256="own"))
    for folder, images in (("", "own"), ("random", "other")):
        change(finished, f"{folder}/linear.pt".strip("/"), data=DATA | dict(sha256=images))
    row = dict(what="moco", epoch=200, k=7, top1=0.1, data_sha256="other")
    with open(finished / "knn.jsonl", "a") as log:
        log.write(json.dumps(row) + "\n")
    run = plots.read_run(finished)
    assert run.probe and not run.untrained and plots.knn_of(run)["top1"] == 0.6
    assert "random/linear.pt is of another epoch, run or data" in capsys.readouterr().out


def test_of_several_probes_tables_take_the_plain_one(finished):
    evaluated(finished, "fast-moco", top1=0.25)  # as make fast-moco-linear leaves one
    run = plots.read_run(finished)
    assert report.measured(run)["probe top-1 (%)"] == pytest.approx(55)
    assert "55.00%" in report.table_1(run) and "25.00%" not in report.table_1(run)


def test_a_class_without_a_test_image_has_no_accuracy(finished, draw, light, tmp_path):
    linear = torch.load(finished / "linear.pt", weights_only=True)
    linear["result"]["per_class"][3] = None
    torch.save(linear, finished / "linear.pt")
    assert "classes" in draw(finished, "--report")[0]
    assert "hardest: a (50.00%)" in (tmp_path / "figures/report.md").read_text()
    shown = texts(plots.draw_classes(plots.read_run(finished)))
    assert "no image" in shown and "nan" not in shown


def test_two_evaluations_are_compared(craft, draw, light):
    """Of files, which hold no epochs of the pretraining"""
    files = []
    for name, top1 in (("a", 0.3), ("b", 0.5)):
        evaluated(run := craft(simclr, name), top1=top1)
        files.append(run / "linear.pt")
    draw(*files)


def test_ctrl_c_is_one_line(finished, monkeypatch, capsys):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "read_run", interrupted)
    assert plots.main([str(finished)]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.fixture
def draw(tmp_path, capsys):
    """draw(argument...) -> the names of the figures, what was printed"""

    def call(*arguments):
        assert plots.main([*map(str, arguments), "--out", str(tmp_path / "figures")]) == 0
        return {p.stem for p in (tmp_path / "figures").rglob("*.png")}, capsys.readouterr().out

    return call


@pytest.fixture
def light(monkeypatch):
    """Figures are built, but only their names are written"""

    def save(figure, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 10)).save(f"{path}.png")

    monkeypatch.setattr(plots, "save_figure", save)


def texts(figure):
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def curves(axes):
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}


def cells(table):
    """{first cell: the others} of a Markdown table"""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


# ---------------------------------------------------------------- one run
def test_all_figures_and_the_table(finished, draw, tmp_path):
    names, out = draw(finished)
    assert names == ALL
    for name in names:
        assert np.asarray(Image.open(tmp_path / f"figures/{name}.png").convert("L")).std() > 5
        assert (tmp_path / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")
    rows = [line.split("|")[2:-1] for line in out.splitlines() if line.startswith("| moco")]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert rows["raw pixels"] == ["20.00%", "7", "", "", ""]
    assert rows["untrained encoder"] == ["30.00%", "7", "35.00%", "55.00%", "65.00%"]
    assert rows["MoCo, 200 epochs"] == ["60.00%", "7", "55.00%", "75.00%", "85.00%"]
    assert rows["guessing"] == ["10.00%", "", "10.00%", "30.00%", "50.00%"]


def test_what_is_missing_is_skipped_with_the_command(craft, draw, light):
    run = craft(moco_cifar, "moco", knn_k=33)
    assert "along" not in draw(run)[1]  # no checkpoint was kept for it
    (run / "epoch0100.pt").touch()
    names, out = draw(run)
    assert names == {"pretraining", "diagram"}
    for name in ALL - names:
        script = "linear_eval.py" if name in ("probe", "classes", "along") else "knn_monitor.py"
        expected = "finish a pretraining run" if name == "pairs" else f"run {script} {run}"
        assert f"no {name}: {expected}" in out
    assert re.search(r"50\.00% \| +33 \|", out)  # measured during training


def test_a_map_and_a_probe_of_another_epoch_are_not_drawn(finished, draw, light):
    change(finished, epoch=150)
    assert draw(finished)[0] == ALL - {"map", "neighbours", "probe", "classes"}


def test_a_checkpoint_file_is_drawn_like_its_folder_or_says_what_needs_one(finished, draw, light):
    (finished / "pretrain.pt").rename(finished / "last.pt")
    names, out = draw(finished / "last.pt")
    assert names == {"pretraining", "diagram", "pairs"}
    assert "last: no map: drawn only from a run's folder" in out
    (finished / "last.pt").rename(finished / "pretrain.pt")
    assert draw(finished / "pretrain.pt")[0] == ALL


WHOLE, PROBE = "Training all weights:", "Linear evaluation:"
EVALUATIONS = [  # settings, the checkpoint's method, the title and the row of the table
    (dict(mode="finetune", labels=0.1), "fast-moco", f"{WHOLE} MoCo v3, fine-tuned, 10% of"),
    (dict(mode="supervised", init="random"), "supervised", f"{WHOLE} supervised, 100% of"),
    (dict(init="random"), "random", f"{PROBE} untrained, frozen, 100% of"),
    (dict(), "fast-moco", f"{PROBE} MoCo v3, frozen, 100% of"),
]


@pytest.mark.parametrize("settings, method, title", EVALUATIONS)
def test_an_evaluation_alone_says_what_it_is(settings, method, title, craft, draw, light):
    run = craft(fast_moco, "a", encode="whole")
    evaluated(run, "b", epochs=5, **settings)
    change(run / "b", "linear.pt", method=method, epoch=5, epochs=5)
    epochs = {"fast-moco": 200, "supervised": 5, "random": 0}[method]
    shown = plots.read_run(run / "b")
    figure = texts(plots.draw_probe(shown)).replace("\n", " ")
    assert f"{title} the labels on CIFAR-10 (ResNet-18, {epochs} epochs)" in figure
    names, out = draw(run / "b")
    assert names >= {"probe", "classes"} and "pretraining" not in names
    assert ("probe top-1" in out) == (settings.get("mode") is None)
    row = f"{title.partition(': ')[2]} the labels, {epochs} epochs"
    assert re.search(rf"{row} +\| +\| +\| +50.00%", out)


@pytest.mark.parametrize("name", ["map.npz", "map-random.npz", "knn.jsonl"])
def test_damaged_measurements_are_skipped_with_a_note(finished, draw, light, name):
    (finished / name).write_text('{"what": "mo')
    names, out = draw(finished)
    assert (
        names == ALL - ({"map"} if name == "map.npz" else set())
        and f"note: {finished / name}" in out
    )


def test_a_run_under_way_or_damaged_at_its_end(finished, draw, light):
    (finished / "pretrain.pt").rename(finished / "prev.pt")
    change(finished, "prev.pt", epoch=7)
    (finished / "last.pt").write_bytes(b"half a file")
    _, out = draw(finished)
    assert "note: " in out and "last.pt" in out and "MoCo, 7 of 200 epochs" in out


def test_values_that_are_no_numbers_are_left_out(finished):
    rows = [dict(epoch=1, loss=math.nan, lr=0.1), dict(epoch=2, loss=1.5, lr=0.1)]
    change(finished, history=rows)
    figure = plots.draw_pretraining(plots.read_run(finished))
    assert curves(figure.axes[0])["MoCo"].tolist() == [1.5]


def test_table_replaces_what_is_between_the_markers(finished, draw, light, tmp_path, monkeypatch):
    page, seen, save = tmp_path / "page.md", [], plots.save_figure
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter")
    monkeypatch.setattr(plots, "save_figure", lambda *a: (seen.append(page.read_text()), save(*a)))
    draw(finished, "--table", page)
    text = page.read_text()
    assert text.startswith("before\n<!-- table -->\n|") and text.endswith("<!-- /table -->\nafter")
    assert "old" not in text and "| moco |" in text
    assert len(seen) == 8 and all("old" in then for then in seen), "make trusts the table"


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("page.md", b"no markers", "<!-- table -->"),
        ("page.md", b"<!-- /table --><!-- table -->", "in order"),
        ("x.pt", b"", "x.pt"),
        ("x.pt", b"<html>quota</html>", "x.pt"),
        ("x.pt", None, "no such file"),
    ],
)
def test_refused_files(name, content, says, finished, tmp_path, refused):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    argv = [finished, "--table", path] if name == "page.md" else [path]
    refused(plots.main, [*argv, "--out", tmp_path / "figures"], says)
    assert not (tmp_path / "figures").exists()


def test_refused_runs(finished, tmp_path, refused):
    refused(plots.main, [tmp_path], "pretrain.pt")
    refused(plots.main, [], "run")
    refused(plots.main, [finished, "--nonsense"], "--nonsense")
    refused(plots.main, [finished, "--out", finished / "knn.jsonl"], "knn.jsonl")
    for wrong in (dict(format="contrastive-cifar/2"), dict(history=[])):
        change(finished, **wrong)
        refused(plots.main, [finished / "pretrain.pt"], "pretrain.pt")


def test_alone_in_a_folder(finished, tmp_path, refused, capsys, monkeypatch):
    """Without tools/report.py all figures of single runs; what needs it says so in one line."""
    script = tmp_path / "alone.py"
    shutil.copy(ROOT / "plots.py", script)
    alone = importlib.util.module_from_spec(importlib.util.spec_from_file_location("a", script))
    alone.__spec__.loader.exec_module(alone)
    drawn, other = [], shutil.copytree(finished, tmp_path / "other")
    monkeypatch.setattr(alone, "save_figure", lambda figure, path: drawn.append(path.name))
    for flags in (["--report"], ["--ablation", "queue"]):
        refused(alone.main, [finished, *flags], "tools/report.py")
    assert not drawn and alone.main([str(finished), str(other)]) == 0
    assert len(drawn) == 16 and {*drawn} == ALL and "no comparison" in capsys.readouterr().out


def test_report_from_the_command_line(craft, tmp_path):
    argv = [sys.executable, ROOT / "plots.py", craft(simclr, "a"), "--report"]
    assert subprocess.run(argv, cwd=tmp_path).returncode == 0
    assert (tmp_path / "figures/report.html").exists()


def test_pairs_mark_false_negatives(finished):
    figure = plots.draw_pairs(plots.read_run(finished))
    shown = texts(figure)
    assert shown.count("head 0.75\nbackbone 0.75") == 4 == shown.count("positive\n")
    assert shown.count("\nfalse negative\n") == 2  # the labels are 0 1 2 3 0 1
    assert "positives: mean 0.75" in shown and "false negatives: mean -0.25" in shown


def test_neighbours_are_right_or_wrong(finished):
    shown = texts(plots.draw_neighbours(plots.read_run(finished)))
    assert [shown.count(sign) for sign in "\u2713\u2717"] == [3, 3] and "\u2717 d" in shown


def test_classes_are_sorted(finished):
    axes = plots.draw_classes(plots.read_run(finished)).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([*range(59, 49, -1)])
    assert [label.get_text() for label in axes.get_yticklabels()] == [*"jihgfedcba"]
    assert axes.get_xlim() == (0, 100)


def test_a_hundred_classes(finished):
    many = [f"class {i}" for i in range(100)]
    change(finished, data=DATA | dict(classes=many))
    result = torch.load(finished / "linear.pt", weights_only=True)["result"]
    for name in ("linear.pt", "random/linear.pt"):
        change(finished, name, result=result | dict(per_class=[0.5] * 100))
    run = plots.read_run(finished)
    assert len(plots.draw_classes(run).axes) == 4
    plots.draw_map(run).draw_without_rendering()


def test_probe_shows_the_test_loss_on_a_log_scale(finished):
    top1, top5, loss = plots.draw_probe(plots.read_run(finished)).axes
    assert loss.get_yscale() == "log" and curves(loss)["MoCo"].tolist() == [1.5]
    np.testing.assert_allclose(curves(top1)["MoCo"], 55)
    np.testing.assert_allclose(curves(top5)["untrained"], 65)
    assert curves(loss)["guessing"][0] == pytest.approx(math.log(10))


# ---------------------------------------------------------------- all methods
VARIANTS = [dict(framework=f) for f in ("moco", "byol", "simsiam", "nnclr")]
VARIANTS += [dict(encode=e) for e in ("divide", "sample", "sample-combine", "montage", "whole")]
VARIANTS += [dict(combine_at=stage) for stage in ("input", "stage3", "proj")] + [dict(grid=4)]
CASES = [(moco_cifar, {}), (simclr, {}), (simclr, {"head": "linear"})]
CASES += [(fast_moco, variant) for variant in VARIANTS]


@pytest.mark.parametrize("script, settings", CASES)
def test_each_method_has_its_diagram_and_its_level(script, settings, craft):
    run = plots.read_run(craft(script, "a", batch_size=128, **settings))
    shown = texts(run.diagram(run))
    assert "chance: 8.32" in shown
    assert ("no negatives" in shown) == (settings.get("framework") in ("byol", "simsiam"))
    if run.method == "fast-moco" and settings.keys() <= {"framework"}:
        assert "6 means" in shown and "of 4" in shown and "4N = 512 at once" in shown
        assert "4 x 4 x 4" in shown
    assert ("16 x 2 x 2" in shown) == ("grid" in settings)
    drawn = curves(plots.draw_pretraining(run).axes[0])
    assert "chance: 8.32" in drawn


def test_the_mechanisms_that_moco_is_compared_with_have_their_own_diagrams(craft):
    """MoCo, Figure 2. Their reports don't describe a queue either."""
    said = {}
    for mechanism in ("moco", "memory-bank", "end-to-end"):
        run = plots.read_run(craft(moco_cifar, mechanism, mechanism=mechanism))
        said[mechanism] = texts(run.diagram(run)), report.report(run, []), report.limits(run)
        assert ("queue: K" in said[mechanism][0]) == (mechanism == "moco")
        assert any("after [1]" in block for block in said[mechanism][1]) == (mechanism == "moco")
        assert ("K = 4,096" in said[mechanism][2]) == (mechanism == "moco")
    bank, end = said["memory-bank"], said["end-to-end"]
    assert "memory bank: 5000 keys" in bank[0] and "im_k" not in bank[0]
    assert "which of N keys" in end[0] and "no gradient" not in end[0]
    assert bank[1][0].startswith("# Memory bank on") and end[1][0].startswith("# End-to-end on")
    shown = ["\n".join(blocks) for _, blocks, _ in said.values()]
    assert ["`queue_size`" in text or "| queue_size" in text for text in shown] == [1, 1, 0]
    assert ["`key_momentum`" in text or "| key_momentum" in text for text in shown] == [1, 0, 0]


# ---------------------------------------------------------------- several runs
def test_comparison_in_equal_time(craft):
    runs = [plots.read_run(craft(simclr, name, 0.4, 60.0 * i)) for i, name in enumerate("ab", 1)]
    _, _, time = report.draw_comparison(runs).axes  # no empty bars
    assert time.get_xlabel() == "minutes"
    assert [line.get_xdata().tolist() for line in time.lines] == [[3.0], [6.0]]


def test_comparison_takes_the_mean_over_seeds(craft):
    """Of runs that differ in nothing else; one of another rate stays by itself."""
    how = (("a-seed0", 0.4, 60.0, {}), ("b", 0.5, 60.0, dict(lr=9.0)), ("a-seed1", 0.6, 120.0, {}))
    folders = [craft(simclr, *some, seed=i, **more) for i, (*some, more) in enumerate(how)]
    evaluated(folders[0], top1=0.3)
    evaluated(folders[2], top1=0.5)
    loss, knn, time, bars = report.draw_comparison([*map(plots.read_run, folders)]).axes
    assert {k: v.tolist() for k, v in curves(knn).items()} == {"a, 2 seeds": [50], "b": [50]}
    (band,) = knn.collections  # 50 and the standard deviation of 40 and 60 (n - 1)
    edges = sorted({y for _, y in band.get_paths()[0].vertices})
    np.testing.assert_allclose(edges, [50 - 200**0.5, 50 + 200**0.5])
    assert time.lines[0].get_xdata().tolist() == [4.5] and len(loss.collections) == 1
    assert [patch.get_width() for patch in bars.patches] == [pytest.approx(40)]


def test_data_sets_are_compared_apart(craft, draw, light):
    runs = [craft(simclr, name) for name in "abcde"]
    for run in runs[3:]:
        change(run, data=DATA | dict(name="/a/folder/of/shapes.npz"))
    assert draw(*runs)[0] >= {"comparison-CIFAR-10", "comparison-shapes"}
    assert "comparison" in draw(*runs[:2])[0]


@pytest.fixture
def table_1(craft):
    """A SimCLR run with all that its report's Table 1 and Figure 2 are made from"""
    run = craft(simclr, "simclr", batch_size=64, gray=0.2)
    tenth = dict(labels=0.1, optimizer="adam", weight_decay=1e-5)
    evaluated(run, "probe-0.1", "probe", 0.41, [(1, 0.31), (2, 0.36)], **tenth)
    evaluated(run, "finetune-0.1", "finetune", 0.52, [(1, 0.42)], **tenth)
    evaluated(run, "random-probe-0.1", "probe", 0.13, init="random", **tenth)
    evaluated(run, "random-finetune-0.1", "finetune", 0.24, init="random", **tenth)
    evaluated(run, "supervised", "supervised", 0.66, init="random")
    return run


def test_accuracy_along_the_pretraining(table_1):
    evaluated(table_1, "supervised-0.1", "supervised", 0.25, init="random", labels=0.1)
    run = plots.read_run(table_1)
    top1, top3 = map(curves, plots.draw_along(run).axes)
    frozen, tuned = (f"SimCLR, {mode}, 10% of the labels" for mode in ("frozen", "fine-tuned"))
    np.testing.assert_allclose(top1[frozen], [31, 36, 41])
    np.testing.assert_allclose(top1[tuned], [42, 52])
    np.testing.assert_allclose(top3[tuned], [52, 72])
    assert top1["supervised, 10% of the labels"].tolist() == [25, 25]
    assert top1["supervised, 100% of the labels"].tolist() == [66, 66]
    assert len(top1) == 5 and top1["guessing"][0] == 10
    assert {name for name in run.evaluations if "epoch" in name} == set()
    change(table_1, "probe-0.1/epoch0001/linear.pt", config=dict(mode="probe", lr=(1.0,)))
    tuned, probe = plots.read_run(table_1).along
    assert [row["epoch"] for row in tuned.along] == [1, 200]
    assert [row["epoch"] for row in probe.along] == [2, 200]  # the first: with other settings
    for path in table_1.glob("*/epoch*/linear.pt"):
        path.unlink()
    assert not plots.read_run(table_1).along


def test_table_1(table_1):
    rows = cells(report.table_1(plots.read_run(table_1)))
    assert rows["SimCLR, 10% of the labels"] == ["52.00%", "72.00%", "41.00%", "61.00%"]
    assert rows["Random init, 10% of the labels"] == ["24.00%", "44.00%", "13.00%", "33.00%"]
    assert rows["Alabdulrazzaq et al.: SimCLR"] == ["77.4%", "94.8%", "71.3%", "93.6%"]
    assert rows["Alabdulrazzaq et al.: random init"] == ["38.2%", "60.1%", "15.6%", "34.4%"]
    shutil.rmtree(table_1 / "finetune-0.1")
    shutil.rmtree(table_1 / "random-finetune-0.1")
    evaluated(table_1, "supervised-0.1", "supervised", 0.25, init="random", labels=0.1)
    rows = cells(report.table_1(plots.read_run(table_1)))
    assert rows["SimCLR, 10% of the labels"] == ["", "", "41.00%", "61.00%"]
    assert rows["Random init, 10% of the labels"][0] == "25.00%"  # the same experiment
    change(table_1, data=DATA | dict(name="cifar100"))
    assert "Alabdulrazzaq" not in report.table_1(plots.read_run(table_1))


# ---------------------------------------------------------------- reports
def test_report_of_a_run_with_everything(finished, draw, light, tmp_path):
    names, _ = draw(finished, "--report")
    text = (tmp_path / "figures/report.md").read_text()
    assert text.startswith("# MoCo on CIFAR-10 (ResNet-18, 200 epochs)\n")
    assert re.findall(r"!\[Figure (\d)\]\((\w+)\.png\)", text) == [
        (str(i), name) for i, name in enumerate(report.CAPTIONS, 1)
    ]
    assert len(set(re.findall(r"^\*\*Figure (\d)\.\*\* \w", text, re.MULTILINE))) == len(names)
    assert re.search(r"\| MoCo, 200 epochs +\| 60\.00% \| +7 \|", text)
    assert "67.3899, top-1 40.99%, top-5 87.40%" in text and "{queue" not in text
    assert "- Linear probe: 55.00%, 20.0 points above the untrained encoder (35.00%).\n" in text
    assert "- k-NN: 60.00%, 40.0 points above raw pixels (20.00%).\n" in text
    assert "Easiest class: j (59.00%), hardest: a (50.00%)." in text and "guessing (" not in text
    rows = cells(text)
    assert rows["batch_size"] == ["512"] and rows["seed"] == ["0"] and "head_hidden" not in rows
    assert "- `epochs`: 100 → 200\n" in text and "- `key_momentum`" not in text


class Page(html.parser.HTMLParser):
    """The text of an HTML page, its pictures, and the addresses that it names"""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.pictures, self.addresses = [], "", [], []
        self.feed(source)
        self.close()
        assert not self.open, "tags that are not closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [
            attributes[key] for key in ("src", "href", "srcset") if key in attributes
        ]
        self.pictures += [attributes] * (tag == "img")
        if tag not in ("img", "meta", "path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("path", "use", "rect")  # of a formula

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        hidden = {"style", "svg", "title"} & {*self.open}
        self.text += "" if hidden else data


def test_report_as_one_page_says_the_same_and_needs_no_network(finished, draw, light, tmp_path):
    change(finished, data=DATA | dict(classes=["<b> & *c*", *"bcdefghij"]))
    names, _ = draw(finished, "--report")
    source = (tmp_path / "figures/report.html").read_text()
    page = Page(source)
    assert len(page.pictures) == len(names) and {p["width"] for p in page.pictures} == {"20"}
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"@import|url\(|<script|<link", source)
    assert all(rule in source for rule in ("(prefers-color-scheme: dark)", "print", "viewport"))

    markdown = (tmp_path / "figures/report.md").read_text()
    markdown = re.sub(r"!\[.*\)|\$\$.*\$\$|^\|[-:| ]+$|^#+ |^- ", "", markdown, flags=re.MULTILINE)

    def words(text):
        return re.sub(r"[*`|\s]", "", text)

    assert words(page.text) == words(markdown)
    assert "<td>&lt;" not in source and source.count("</svg>") == 1  # InfoNCE


def test_a_table_as_html():
    rows = webpage.html_of(plots.as_table(["a", "b"], [["x|<y>", 1]]), None)
    assert '<tr><td>x|&lt;y&gt;</td><td class="number">1</td></tr>' in rows


def test_limits_of_a_run(craft, finished):
    run = plots.read_run(finished)
    run.data |= dict(n_train=2000)
    text = report.limits(run)
    assert "seed 0" in text and "±3.2 points" in text and "Not measured" not in text
    assert "K = 4,096 keys, but only 2,000 training images: on average 1.5 of" in text
    run.data |= dict(n_train=50_000)
    assert "K = " not in report.limits(run) and "built-in" not in report.limits(run)
    other = plots.read_run(craft(simclr, "other"))
    other.dataset, other.epoch = "shapes", 7
    text = report.limits(other)
    assert "compare with: k-NN on raw pixels, k-NN on untrained encoder." in text
    assert "not one of the built-in" in text and "not finished" in text


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("keys", [300, 820])
def test_a_query_meets_as_many_older_views_of_its_image_as_the_report_says(craft, keys, symmetric):
    """Counted in a queue that is filled in random orders without repeats, epoch after epoch"""
    draw, n, queue, met = np.random.default_rng(0), 400, [], []
    for image in np.concatenate([draw.permutation(n) for _ in range(20)]).tolist():
        met.append(queue[-keys:].count(image))
        queue += [image] * (1 + symmetric)
    run = plots.read_run(craft(moco_cifar, "a", queue_size=keys, symmetric=symmetric))
    run.data = run.data | dict(n_train=n)
    (said,) = re.findall(r"on average ([\d.]+) of", report.limits(run))
    assert float(said) == pytest.approx(np.mean(met[5 * n :]), abs=0.08)


def test_k_nn_with_another_k_than_during_training_says_so(finished):
    run = plots.read_run(finished)
    assert "end of pretraining: 50.00% with k = 200, not comparable" in report.conclusions(run)
    run.config["knn_k"] = 7
    assert "end of pretraining" not in report.conclusions(run)


def test_conclusions_say_when_nothing_was_learned(finished):
    evaluated(finished, top1=0.36)
    result = torch.load(finished / "linear.pt", weights_only=True)["result"]
    change(finished, "linear.pt", result=result | dict(test_loss=67.39))
    text = report.conclusions(plots.read_run(finished))
    error = 200 * (0.36 * 0.64 / 1000 + 0.35 * 0.65 / 1000) ** 0.5
    assert (
        f" 1.0 points above the untrained encoder (35.00%), within sampling error (±{error:.1f})"
        in text
    )
    assert "test loss of 67.39 is worse than guessing (2.30)" in text


def test_report_links_no_figure_that_was_not_made(craft, draw, light, tmp_path):
    names, _ = draw(craft(fast_moco, "fast", knn=None), "--report")
    text = (tmp_path / "figures/report.md").read_text()
    assert set(re.findall(r"\((\w+)\.png\)", text)) == names == {"pretraining", "diagram"}
    missing = re.search("Not drawn, .*: (.*)\\.", text)[1].split(", ")
    assert {*missing, *names} == {*report.CAPTIONS} == ALL
    assert "evaluation " not in text and "- k-NN" not in text  # what was not measured


def test_each_of_several_runs_has_its_report(craft, draw, light, tmp_path):
    draw(craft(simclr, "a"), craft(moco_cifar, "b"), "--report")
    for name, title in (("a", "# SimCLR on"), ("b", "# MoCo on")):
        assert (tmp_path / f"figures/{name}/report.md").read_text().startswith(title)


def test_report_of_an_unfinished_run_and_of_an_evaluation_alone(craft, draw, light, tmp_path):
    run = craft(simclr, "a")
    change(run, epoch=7)
    draw(run, "--report")
    assert "7 of 200 epochs" in (tmp_path / "figures/report.md").read_text()
    evaluated(run, mode="supervised")
    change(run, "linear.pt", method="supervised")
    draw(run / "linear.pt", "--report")
    assert "supervised, 100% of the labels" in (tmp_path / "figures/report.md").read_text()


def differing(folder):
    text = "\n".join(report.report(plots.read_run(folder), []))
    return set(re.findall(r"^- (`.*)$", text, re.MULTILINE))


def test_what_differs_from_the_document(craft, table_1):
    settings = moco_cifar.RECIPES["report"]
    run = craft(moco_cifar, "report", **settings)
    said = dict(epochs=100, batch_size=128, optimizer="sgd", weight_decay=0.0)
    evaluated(run, **said)
    assert differing(run) == set()
    other = craft(moco_cifar, "other", **settings | dict(lr=0.06, blur=0.5))
    evaluated(other, **said | dict(batch_size=256))
    assert differing(other) == {
        "`lr`: 0.015 → 0.06",
        "`blur`: 0 → 0.5",
        "`batch_size`: 128 → 256 (MoCo, frozen, 100% of the labels)",
    }
    lines = differing(table_1)
    assert {"`batch_size`: 200 → 64", "`head`: linear → mlp", "`lr`: 0.001 → 0.06"} <= lines
    assert "`lr`: 0.001 → 10 (SimCLR, fine-tuned, 10% of the labels)" in lines
    assert not [line for line in lines if "gray" in line or "labels`" in line or "untrain" in line]
    run = craft(fast_moco, "paper", **fast_moco.RECIPES["paper-20"], arch="resnet50")
    assert differing(run) == {"`data`: ImageNet → cifar10"}  # 20 epochs go with a rate of 0.15
    run = craft(fast_moco, "long", **fast_moco.RECIPES["paper"] | dict(epochs=300))
    assert "`epochs`: 100 or 200 or 400 → 300" in differing(run)


def test_an_augmentation_that_is_not_used_differs(craft):
    run = craft(simclr, "a", **simclr.RECIPES["report"] | dict(batch_size=200, augment="crop"))
    assert differing(run) == {"`flip`: 0.5 → 0", "`gray`: 0.2 → 0"}


def test_report_that_cannot_be_written(craft, tmp_path, refused, light):
    (tmp_path / "figures/report.md").mkdir(parents=True)
    argv = [craft(simclr, "a"), "--report", "--out", tmp_path / "figures"]
    refused(plots.main, argv, "report.md")


# ---------------------------------------------------------------- ablations
def ablate(name, folders):
    groups = report.group_runs(name, [plots.read_run(folder) for folder in folders])
    return groups, cells(report.ablation_table(name, groups))


def test_mean_and_deviation_over_seeds(craft):
    folders = [craft(fast_moco, "1", 0.60, seed=0, combine_at="proj")]
    for seed, (knn, top1) in enumerate([(0.70, 0.80), (0.72, 0.84), (None, 0.91)]):
        folders.append(craft(fast_moco, f"final{seed}", knn, 20.0 * (1 + seed), seed=seed))
        evaluated(folders[-1], top1=top1)
    _, rows = ablate("stage", folders)
    # of 70 and 72: 71 ± sqrt(2); of 80, 84 and 91: 85 ± sqrt((25 + 1 + 36) / 2)
    assert rows["final"] == ["3", "71.00 ± 1.41 (n = 2)", "85.00 ± 5.57", "2.00 ± 1.00", ""]
    assert rows["proj"] == ["1", "60.00", "", "3.00", ""]


def dots(axes):
    """Where the measured means stand: (value, row)"""
    lines = [line for line in axes.lines if line.get_marker() == "o"]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]


ORDERS = {
    "stage": ("combine_at", "input stage1 stage2 stage3 final proj pred", ""),
    "encode": ("encode", "whole divide divide-combine sample sample-combine montage", ""),
    "parts": ("parts_combined", "1 2 3 4", ""),
    "batch": ("batch_size", "128 256 512 1024", {"256": "72.5", "512": "73.5", "1024": "73.6"}),
    "epochs": ("epochs", "20 40 80", {"20": "73.5", "40": "75.1", "80": "75.5"}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_ablation_has_the_order_and_the_figures_of_the_paper(name, craft):
    field, values, paper = ORDERS[name]
    values, kind = values.split(), type(getattr(fast_moco.Config(), field))
    folders = []
    for value in sorted(values):  # in another order
        knn = 0.3 + 0.01 * values.index(value)
        folders.append(craft(fast_moco, value, knn, **{field: kind(value)}))
        evaluated(folders[-1], top1=0.6)
    groups, rows = ablate(name, folders)
    assert [*rows][2 : 2 + len(values)] == values
    for value in values:
        assert rows[value][-1] == (paper.get(value, "") if paper else "")
    panels = report.draw_ablation_figure(name, groups).axes
    expected = [30 + i for i in range(len(values))]
    np.testing.assert_allclose(dots(panels[0]), [*zip(expected, range(len(values)))])
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert len(panels) == 3 and labels == values
    printed = [line for line in panels[1].lines if line.get_marker() == "s"]
    assert len(printed) == (len(paper) if paper else 0)


@pytest.mark.parametrize("name", report.ABLATIONS)
def test_each_comparison_has_a_row_for_each_setting(name, craft):
    entry = report.ABLATIONS[name]
    script = importlib.import_module(entry["script"].removesuffix(".py"))
    folders = [craft(script, str(i), **setting) for i, setting in enumerate(entry["grid"])]
    groups, rows = ablate(name, folders)
    assert len(groups) == len(folders)
    labels = [label for label, row in rows.items() if row[:1] == ["1"]]
    assert len(labels) == len(folders) and report.draw_ablation_figure(name, groups).axes
    if name == "mechanism":
        assert "moco, 255 negatives" in labels and labels[-1] == "end-to-end, 1023 negatives"


def test_few_labels_have_a_column_of_their_own(craft):
    folders = [craft(fast_moco, str(n), epochs=n) for n in (20, 40)]
    for folder in folders:
        evaluated(folder, top1=0.6)
        evaluated(folder, "probe-0.1", top1=0.4, labels=0.1)
    _, rows = ablate("epochs", folders)
    assert rows["20"] == ["1", "50.00", "60.00", "40.00", "3.00", "73.5"]


def test_two_settings_make_rows(craft):
    how = [dict(head=head, temperature=t) for head in ("mlp", "linear") for t in (0.2, 0.07)]
    folders = [craft(moco_cifar, str(i), 0.1 * i, **settings) for i, settings in enumerate(how)]
    groups, rows = ablate("temperature", folders)
    assert [*rows][2:6] == ["linear, 0.07", "linear, 0.2", "mlp, 0.07", "mlp, 0.2"]
    panel = report.draw_ablation_figure("temperature", groups).axes[0]
    np.testing.assert_allclose(dots(panel), [(30, 0), (20, 1), (10, 2), (0, 3)], atol=1e-9)


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
    patches = " + patches"
    assert [*rows][2:12] == [text for name in names for text in (name, name + patches)]
    printed = ["69.4", "72.5 (+3.1)", "66.5", "73.6 (+7.1)", "68.1", "71.7 (+3.6)", "", "73.5"]
    printed += ["69.3", "71.7 (+2.4)"]
    assert [row[-1] for row in [*rows.values()][2:12]] == printed
    assert rows["NNCLR" + patches][1] == "58.00 (+8.00)" and rows["NNCLR"][1] == "50.00"
    assert "58.00 (+8.00)" in texts(report.draw_ablation_figure("frameworks", groups))
    table = report.ablation_table("frameworks", groups)
    assert "also differ in lr (0.001; 0.1), weight_decay (0.0001; 0.05)." in table


def test_ablation_writes_one_figure_and_one_table(craft, draw, tmp_path):
    runs = [craft(simclr, f"b{n}", batch_size=n) for n in (64, 128)]
    _, out = draw(*runs, "--ablation", "batch-simclr")
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {f"ablation-batch-simclr.{kind}" for kind in ("png", "pdf", "md")}
    text = (tmp_path / "figures/ablation-batch-simclr.md").read_text()
    assert cells(text)["64"] == ["1", "50.00", "3.00", ""] and "| 128 " in out


def test_refused_ablations(craft, tmp_path, refused):
    runs = [craft(fast_moco, "a", seed=1), craft(fast_moco, "b", seed=2), craft(simclr, "c")]
    argv = ["--out", tmp_path / "figures", "--ablation"]
    refused(plots.main, [*runs[:2], *argv, "stage"], "differ in combine_at")
    refused(plots.main, [*runs, *argv, "encode"], "has no setting encode")
    refused(plots.main, [runs[0], craft(simclr, "d", epochs=3), *argv, "epochs"], "one method")
    refused(plots.main, [*runs, *argv, "seeds"], "--ablation seeds: must be one of")
    assert not (tmp_path / "figures").exists()


def test_the_style_is_set_back(finished, draw, light):
    before = dict(matplotlib.rcParams)
    draw(finished)
    assert before == dict(matplotlib.rcParams)
