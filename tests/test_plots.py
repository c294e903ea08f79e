"""Figures and tables: which are drawn, from what, and what they show."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import knn_monitor
import linear_eval
import plots

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
    monkeypatch.setattr(plots, "draw_all", lambda run, images: {})


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
    monkeypatch.setattr(plots, "draw_all", lambda run, _: {"a": lambda: plots.draw_classes(run)})
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
