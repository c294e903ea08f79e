"""tools/ideas.py: each idea does what its name says, in a run like any other."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from conftest import close
from torch import nn

import knn_monitor
import moco_cifar
import simclr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import ideas  # noqa: E402


@pytest.fixture
def run_idea(tiny_npz, tmp_path, monkeypatch):
    """run_idea(name, flag...) -> the checkpoint; afterwards the scripts are as before"""
    for script in (simclr, moco_cifar):
        for name in ("Config", "SOURCE", "train", "color_jitter", "build_encoder"):
            monkeypatch.setattr(script, name, getattr(script, name))

    def call(name, *flags):
        text = f"{name} --data {tiny_npz} --image-size 16 --arch resnet8 --width 4 --batch-size 40"
        text += f" --knn-k 5 --precision fp32 --out {tmp_path / name}"
        assert ideas.main([*text.split(), *flags]) == 0
        return torch.load(tmp_path / name / "pretrain.pt", weights_only=True)

    return call


@pytest.mark.parametrize("name", ideas.IDEAS)
def test_an_idea_is_a_run_whose_checkpoint_names_it(run_idea, tmp_path, name):
    checkpoint = run_idea(name, "--epochs", "2")
    assert checkpoint["config"]["idea"] == name and checkpoint["epoch"] == 2
    assert "jitter_in_random_order" in checkpoint["source"]
    assert knn_monitor.main([str(tmp_path / name), "--k", "5"]) == 0
    with pytest.raises(AssertionError):  # other settings: 2 epochs more
        run_idea(name, "--epochs", "4")


@pytest.mark.parametrize("name, sides", [
    ("rotation", [(80, 32), (160, 16)] * 8),
    ("small-crops", [(80, 32), (160, 16)] * 8),
    ("small-first", [(80, 24)] * 5 + [(80, 32)] * 3),
])  # fmt: skip
def test_what_the_encoder_sees_and_what_it_costs(run_idea, monkeypatch, name, sides):
    seen, build = [], simclr.build_encoder

    def look(encoder, given):
        if encoder.training:
            seen.append((len(given[0]), given[0].shape[-1]))

    def watched(arch, width):
        encoder = build(arch, width)
        encoder.register_forward_pre_hook(look)
        return encoder

    monkeypatch.setattr(simclr, "build_encoder", watched)
    run_idea(name, *"--image-size 32 --limit 40 --epochs 8".split())
    assert seen == sides
    work = sum(n * side**2 for n, side in seen) / (8 * 80 * 32**2)
    assert work == pytest.approx(ideas.WORK[name])


def test_rotation_asks_for_the_turn():
    """A model that sees which corner is bright answers all four; one that doesn't, guesses."""
    images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    images[:, :, :16, :16] = 255
    plain = dict(crop_scale=(1.0, 1.0), flip=0.0, jitter=(0.0,) * 4, gray=0.0)
    run = SimpleNamespace(recipe=simclr.Config(**plain), autocast=torch.no_grad)
    corners = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(2))
    # rot90 turns counterclockwise: upper left, lower left, lower right, upper right
    model = [corners, None, lambda x: 100 * x.mean(1)[:, [0, 2, 3, 1]]]
    assert ideas.rotation_loss(model, images, run) < 1e-3
    model[2] = lambda x: 0 * x.mean(1)
    assert float(ideas.rotation_loss(model, images, run)) == pytest.approx(0.4 * math.log(4))


def test_each_small_crop_meets_both_full_views():
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    run = SimpleNamespace(recipe=simclr.Config(), autocast=torch.no_grad)
    model = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Identity())
    full = torch.randn(2, 6, 768)
    torch.manual_seed(1)
    loss = ideas.small_crops_loss(model, images, run, full, 0.5)
    torch.manual_seed(1)
    recipe = simclr.Config(crop_scale=(0.1, 0.5))
    views = [simclr.augment(images, recipe) for _ in range(4)]
    small = [tv.resize(view, [16, 16], antialias=True).flatten(1) for view in views]
    pairs = [simclr.nt_xent(s, z, 0.5) for s in small for z in full]
    assert len(pairs) == 8
    close(loss, sum(pairs), 1e-4)


def test_jitter_in_random_order_is_torchvisions(monkeypatch):
    """Image by image, in the order that was drawn"""
    dealt, n = [], 30
    x = torch.rand(n, 3, 16, 16)
    draw = moco_cifar.uniform
    monkeypatch.setattr(moco_cifar, "uniform", lambda *how: dealt.append(draw(*how)) or dealt[-1])
    ours = ideas.jitter_in_random_order(x, (0.4, 0.4, 0.4, 0.1))
    *strengths, places = dealt
    steps = tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue
    orders = places.argsort(1)
    assert len({tuple(order.tolist()) for order in orders}) > 10
    for i in range(n):
        image = x[i]
        for step in orders[i]:
            image = steps[step](image, float(strengths[step][i]))
        close(ours[i], image, 1e-4)


def test_default_stem_is_that_of_a_new_convolution():
    """Uniform within ±1/sqrt(27), so that their deviation is 1/9; only there"""
    ours, usual = ideas.with_default_stem("resnet8", 64), moco_cifar.build_encoder("resnet8", 64)
    weight = ours.conv1.weight.detach()
    assert weight.abs().max() <= 27**-0.5 and float(weight.std()) == pytest.approx(1 / 9, rel=0.1)
    assert float(weight.std() / usual.conv1.weight.detach().std()) == pytest.approx(1.9, rel=0.15)
    deeper = [net.layer2[0].conv1.weight.detach().std() for net in (ours, usual)]
    assert float(deeper[0] / deeper[1]) == pytest.approx(1, rel=0.1)
