"""linear_eval.py: the counting, LARS, a probe that leaves the encoder alone bit for bit, the choice
of the learning rate, fine-tuning, few labels, what it writes, and what it refuses.
"""

import copy
import errno
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, write_npz
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import linear_eval
from linear_eval import LARS, Config, UserError, load_encoder, topk_accuracy

SHORT = "--epochs 3 --batch-size 50 --precision fp32".split()  # 120 images: two steps and a rest


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def probe(pretrained, tmp_path):
    """probe(*flags) -> linear.pt of the pretrained run, in a new folder; by default at rate 30"""
    count = iter(range(100))

    def run(*flags, folder=None):
        out = folder or tmp_path / f"probe{next(count)}"
        named = {"--lr", "--recipe", "--mode"}.isdisjoint(flags)
        flags = [*SHORT, *["--recipe", "demo"] * named, *flags]
        assert linear_eval.main([str(pretrained), "--out", str(out), *flags]) == 0
        return read(out / "linear.pt")

    return run


# -- top-k


@pytest.fixture
def scored():
    """Logits (1003, 10) and labels: a number that no batch divides"""
    return torch.randn(1003, 10), torch.randint(0, 10, (1003,))


def test_topk_counts_labels_with_fewer_than_k_better(scored):
    logits, labels = scored
    rank = [sum(score > row[y] for score in row) for row, y in zip(logits.tolist(), labels)]
    right = [sum(r < k for r in rank) / 1003 for k in (1, 3, 5)]
    assert topk_accuracy(logits, labels) == right


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_topk_of_fewer_than_five_classes(classes):
    logits, labels = torch.randn(50, classes), torch.randint(0, classes, (50,))
    top1, top3, top5 = topk_accuracy(logits, labels)
    assert top1 == (logits.argmax(1) == labels).sum().item() / 50 and top5 == 1.0
    assert (top3 == 1.0) == (classes <= 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_an_error(value, scored):
    scored[0][7, 3] = value
    with pytest.raises(UserError, match="not finite") as error:
        topk_accuracy(*scored)
    assert error.value.code == 3


# -- LARS


def make_weights():
    return [nn.Parameter(torch.randn(shape).double()) for shape in [(4, 6), (6,), (3, 4)]]


def walk(weights, optimizer, steps=10):
    """Steps along the same gradients for everyone, with a falling learning rate"""
    random, path = torch.Generator().manual_seed(1), []
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 0.8 * (1 - i / steps) if steps > 5 else 0.8
        for w in weights:
            w.grad = torch.randn(w.shape, generator=random, dtype=torch.float64)
        optimizer.step()
        path.append([w.detach().clone() for w in weights])
    return path


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lars_is_you_et_al(decay):
    weights = make_weights()
    mine, velocity = [w.detach().clone() for w in weights], [0.0, 0.0, 0.0]
    path = walk(weights, LARS(weights, lr=0.8, momentum=0.9, weight_decay=decay, trust=0.02))
    random = torch.Generator().manual_seed(1)
    for i, row in enumerate(path):
        for j, w in enumerate(mine):
            g = torch.randn(w.shape, generator=random, dtype=torch.float64)
            rate = 0.8 * (1 - i / 10)
            if w.ndim > 1:  # no vectors
                norms = w.square().sum().sqrt(), g.square().sum().sqrt()
                rate *= 0.02 * norms[0] / (norms[1] + decay * norms[0])
                g = g + decay * w
            velocity[j] = 0.9 * velocity[j] + rate * g
            mine[j] = w - velocity[j]
            close(row[j], mine[j], 1e-12)


def test_lars_starts_from_zero_weights():
    """Without weights there is no ratio: an ordinary step, or else zeros would never move."""
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.ones(2, 3)
    LARS([weight], lr=0.5, weight_decay=0.1).step()
    close(weight.detach(), torch.full((2, 3), -0.5), 0)


def test_lars_with_no_gradient_stands_still():
    moved, still, other = (nn.Parameter(torch.ones(2, 3)) for _ in range(3))
    moved.grad = torch.zeros(2, 3)
    LARS([{"params": [moved, still]}, {"params": [other]}], lr=0.5).step()
    assert all((w == 1).all() for w in (moved, still, other))


def test_lars_takes_as_many_calls_for_many_weights_as_for_few():
    """Each call is a kernel launch on a GPU: for every tensor its own, they take most of a step."""

    def count(n):
        calls, weights = [], [nn.Parameter(torch.ones(s)) for s in [(2, 3), (3,)] * n]
        optimizer = LARS(weights, lr=0.1)

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, call, types, args=(), kwargs=None):
                calls.append(call)
                return call(*args, **(kwargs or {}))

        for _ in range(2):  # the first step makes the momentum
            calls.clear()
            for w in weights:
                w.grad = torch.ones_like(w)
            with Count():
                optimizer.step()
        assert set(optimizer.state[weights[0]]) == {"momentum_buffer"}
        return len(calls)

    assert count(1) == count(30) < 25


# -- what the classifier learns


class Flat(nn.Module):
    """An encoder whose features are a fixed linear map of the pixels."""

    def __init__(self, pixels, dim):
        super().__init__()
        self.dim, self.linear = dim, nn.Linear(pixels, dim).requires_grad_(False)

    def forward(self, x):
        return self.linear(x.flatten(1))


@pytest.fixture(scope="module")
def problem():
    """probe()'s arguments, but the Config: an encoder, and data of 5 classes that overlap"""
    torch.manual_seed(0)
    centres = torch.rand(5, 12) * 90 + 83

    def images(n):
        y = torch.randint(0, 5, (n,))
        x = (centres[y] + 35 * torch.randn(n, 12)).clamp(0, 255)
        return x.byte().view(n, 3, 2, 2), y

    (x, y), (x_test, y_test) = images(1500), images(2000)
    about = {"classes": list("abcde")}
    data = SimpleNamespace(x_train=x, y_train=y, x_test=x_test, y_test=y_test, about=about)
    return Flat(12, 8), data


def settings(image_size=16, **changes):
    pixels = dict(image_size=image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return SimpleNamespace(**vars(Config(**changes)), **pixels)


def fp32():
    return torch.autocast("cpu", enabled=False)


UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


def train(encoder, data, **changes):
    """-> the layers, one for each rate, and the history"""
    config = settings(**changes)
    data = linear_eval.prepare(encoder, data, config, fp32)
    return linear_eval.train_linear(encoder, data, config, fp32, UNSCALED)


@pytest.mark.parametrize("flags", ["", "lr schedule", "optimizer lr schedule"])
def test_probe_finds_the_optimum_of_logistic_regression(problem, flags):
    """That is a convex problem: L-BFGS in float64 finds the classifier of the smallest loss."""
    encoder, data = problem
    parts = (data.x_train, data.x_test)
    h, h_test = (linear_eval.extract_features(encoder, x, settings(), fp32) for x in parts)
    best = nn.Linear(8, 5).double()
    lbfgs = torch.optim.LBFGS(best.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        lbfgs.zero_grad()
        value = F.cross_entropy(best(h.double()), data.y_train)
        value.backward()
        return value

    lbfgs.step(loss)
    right = (best(h_test.double()).argmax(1) == data.y_test).double().mean().item()
    assert 0.4 < right < 0.9  # a problem in which there is something to lose
    recipe = dict(lr=(30.0,), schedule="cosine", optimizer="lars")
    recipe = {"lr": (10.0,)} | {name: recipe[name] for name in flags.split()}
    _, history = train(*problem, **recipe)
    assert history[-1]["top1"] == pytest.approx(right, abs=0.005 + 1e-9)
    assert history[-1]["loss"] == pytest.approx(loss().item(), abs=0.01)


@pytest.mark.parametrize("batch_size", [7, 256, 1500])
def test_logged_loss_is_the_mean_over_images_whatever_the_batch(problem, batch_size):
    """With rate 0 the classifier stands still, and the mean over ragged batches is that of all."""
    (classifier,), (row,) = train(*problem, lr=(0.0,), epochs=1, batch_size=batch_size)
    encoder, data = problem
    logits = classifier(linear_eval.extract_features(encoder, data.x_train, settings(), fp32))
    assert row["loss"] == pytest.approx(F.cross_entropy(logits, data.y_train).item(), abs=1e-5)


def test_start_and_order_follow_from_the_seed_alone(problem):
    """So an untrained encoder, which draws weights before, is probed in the same way."""
    weights = []
    for drawn_before in (0, 7):
        torch.rand(drawn_before)
        weights.append(train(*problem, lr=(1.0,), epochs=1)[0][0].weight)
    assert torch.equal(*weights)


def test_report_is_of_the_last_epoch_not_of_the_best(probe, monkeypatch):
    ruin = {0: 1.0, 1: 0.1, 2: -1e4}  # the last epoch climbs the loss instead
    monkeypatch.setattr(linear_eval, "lr_factor", lambda config, epoch: ruin[epoch])
    saved = probe("--lr", "1")
    last, best = saved["history"][-1], max(row["top1"] for row in saved["history"])
    assert last["top1"] < best
    for name in ("top1", "top3", "top5", "test_loss"):
        assert saved["result"][name] == last[name]


def test_only_the_linear_layer_is_in_the_optimizer(probe, monkeypatch):
    optimizers = []

    class Spy(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    dim = probe()["dim"]
    (optimizer,) = optimizers
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    assert sum(sizes) == dim * 10 + 10


FROZEN = ["", "--augment", "--recipe fast-moco", "--optimizer adam --lr 0.01 --labels 0.5"]
FROZEN += ["--lr 1,10", "--recipe semi-1 --labels 0.1", "--recipe semi-10 --mode probe"]
FROZEN += ["--mode finetune --encoder-lr 0 --no-augment"]


@pytest.mark.parametrize("flags", FROZEN)
def test_encoder_is_bit_for_bit_the_pretrained_one(probe, pretrained, flags):
    before, after = read(pretrained / "pretrain.pt")["encoder"], probe(*flags.split())["encoder"]
    assert before.keys() == after.keys() and any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_that_changes_is_found_out(pretrained, tmp_path, monkeypatch, refused):
    real = linear_eval.train_linear

    def careless(encoder, *rest):
        encoder.bn1.running_mean[0] += 1e-6
        return real(encoder, *rest)

    monkeypatch.setattr(linear_eval, "train_linear", careless)
    flags = [pretrained, "--out", tmp_path, *SHORT, "--lr", "1"]
    refused(linear_eval.main, flags, "has changed", code=3)
    assert not (tmp_path / "linear.pt").exists()


def test_features_of_an_image_do_not_depend_on_its_neighbours(pretrained):
    """Eval mode: neither do the statistics move, nor does the mode stay changed."""
    encoder = load_encoder(pretrained / "pretrain.pt")[1].train()
    images, mark = torch.randint(0, 256, (9, 3, 16, 16)).byte(), linear_eval.fingerprint(encoder)
    together, alone = (
        linear_eval.extract_features(encoder, images, settings(), fp32, batch=n) for n in (9, 1)
    )
    close(together, alone, 1e-5)
    assert encoder.training and linear_eval.fingerprint(encoder) == mark


# -- which encoder


def test_load_encoder_takes_the_checkpoints_weights_frozen_in_eval_mode(pretrained):
    saved, encoder = load_encoder(pretrained / "pretrain.pt")
    assert all(torch.equal(encoder.state_dict()[k], saved["encoder"][k]) for k in saved["encoder"])
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_an_untrained_encoder_follows_the_seed(pretrained):
    file = pretrained / "pretrain.pt"
    marks = [linear_eval.fingerprint(load_encoder(file, seed)[1]) for seed in (0, 0, 2)]
    assert marks[0] == marks[1] != marks[2]
    assert marks[0] != linear_eval.fingerprint(load_encoder(file)[1])


def test_init_random_end_to_end(pretrained, tmp_path):
    """Of the same shape, untrained, and by default beside the pretrained one, not over it"""
    before = read(pretrained / "pretrain.pt")
    file = tmp_path / "pretrain.pt"
    file.write_bytes((pretrained / "pretrain.pt").read_bytes())
    assert linear_eval.main([str(file), "--init", "random", *SHORT]) == 0
    saved = read(tmp_path / "random" / "linear.pt")
    assert not (tmp_path / "linear.pt").exists() and saved["method"] == "random"
    assert not torch.equal(saved["encoder"]["conv1.weight"], before["encoder"]["conv1.weight"])
    assert (saved["encoder"]["bn1.running_mean"] == 0).all()
    assert {k: v.shape for k, v in saved["encoder"].items()} == {
        k: v.shape for k, v in before["encoder"].items()
    }


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.5), (1.0, 0.2)])
def test_a_view_is_a_random_part_of_the_image_and_half_of_them_are_flipped(scale):
    """Of images whose pixels hold their own coordinates, a view tells which part it shows."""
    size, n = 32, 4000
    at = (torch.arange(size) + 0.5) / size  # of the pixels' centres; the image is from 0 to 1
    image = torch.stack([at.expand(size, size), at[:, None].expand(size, size)])
    x, y = linear_eval.random_crop(image.expand(n, 2, size, size), scale).unbind(1)
    flipped = x[:, 0, -1] < x[:, 0, 0]
    assert flipped.double().mean() == pytest.approx(0.5, abs=0.03)
    x = torch.where(flipped[:, None, None], x.flip(2), x)
    # pixels in the middle, for at the image's border a pixel repeats half of itself
    width, height = (size * (v[:, 16, 16] - v[:, 15, 15]) for v in (x, y))
    left, top = x.mean((1, 2)) - width / 2, y.mean((1, 2)) - height / 2
    columns, rows = (v[:, None] + w[:, None] * at for v, w in ((left, width), (top, height)))
    inside = slice(1, -1)  # a view is bilinear: the same row of coordinates everywhere
    close(x[:, inside, inside], columns[:, None, inside].expand(n, 30, 30), 0.01)
    close(y[:, inside, inside], rows[:, inside, None].expand(n, 30, 30), 0.01)
    for start, length in ((left, width), (top, height)):
        assert (start > -0.01).all() and (start + length < 1.01).all()
        place = (start / (1 - length))[length < 0.9]  # anywhere, from one border to the other
        assert place.mean() == pytest.approx(0.5, abs=0.03) and place.std() > 0.27
    area, free = width * height, torch.maximum(width, height) < 0.99
    low, high = sorted(scale)
    assert (area < high + 0.01).all() and (area[free] > low - 0.01).all()
    ratio = (width / height).log()
    assert ratio.abs().max() < math.log(4 / 3) + 0.01 and abs(ratio.mean()) < 0.02
    if high < 1:
        assert ratio.std() == pytest.approx(math.log(16 / 9) / 12**0.5, rel=0.05)
    else:
        assert area.mean() == pytest.approx((low + high) / 2, abs=0.03)


def test_a_view_of_a_white_image_is_white_up_to_its_borders():
    close(
        linear_eval.random_crop(torch.ones(200, 3, 8, 8), (0.5, 1)), torch.ones(200, 3, 8, 8), 1e-5
    )


def test_images_of_a_batch_get_different_views_that_follow_from_the_seed():
    images = torch.rand(1, 3, 8, 8).expand(9, 3, 8, 8)
    one, two, again = (
        torch.manual_seed(s) and linear_eval.random_crop(images, (0.2, 0.5)) for s in (1, 2, 1)
    )
    assert len({view.numpy().tobytes() for view in one}) == 9
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_the_encoder_sees_the_views_normalised(spy):
    crops, seen = spy(linear_eval, "random_crop"), []
    images = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8)
    config = settings(augment=True, crop_scale=(0.3, 0.9))
    linear_eval.features_of(lambda x: seen.append(x) or x, images, config, fp32)
    ((pixels, scale), views) = crops[0]
    close(pixels, images / 255, 0)
    assert scale == (0.3, 0.9)
    close(seen[0], (views - 0.5) / 0.5, 1e-6)


# -- what it writes

KEYS = """format kind method epoch epochs config data arch width dim encoder classifier history
    source machine""".split()


@pytest.fixture(scope="module")
def written(pretrained, tmp_path_factory):
    """A folder with linear.pt and linear.jsonl"""
    out = tmp_path_factory.mktemp("linear")
    flags = [str(pretrained), "--out", str(out), *SHORT, "--recipe", "demo"]
    assert linear_eval.main(flags) == 0
    return out


@pytest.fixture
def linear(written):
    return read(written / "linear.pt")


def test_linear_pt_has_what_the_contract_says(linear):
    assert linear.keys() >= set(KEYS) and linear["epoch"] == linear["epochs"] == 3
    first = [linear[key] for key in ("format", "kind", "method")]
    assert first == ["contrastive-cifar/1", "linear", "moco"]
    shapes = {name: tuple(value.shape) for name, value in linear["classifier"].items()}
    assert shapes == {"weight": (10, linear["dim"]), "bias": (10,)}


@pytest.mark.parametrize("flags", [[], ["--mode", "finetune"]], ids=["probe", "finetune"])
def test_result_follows_from_the_saved_weights(probe, flags, tiny_npz, tmp_path):
    """Recomputed from the file alone: counts are whole numbers of the 60 test images"""
    linear, arrays = probe(*flags, folder=tmp_path), np.load(tiny_npz)
    x = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(linear["data"][name]).view(3, 1, 1) for name in ("mean", "std"))
    weight, bias = linear["classifier"].values()
    logits = load_encoder(tmp_path / "linear.pt")[1]((x - mean) / std) @ weight.T + bias
    y, result = torch.from_numpy(arrays["y_test"]), linear["result"]
    rank = (logits > logits.gather(1, y[:, None])).sum(1)
    counts = {f"top{k}": int((rank < k).sum()) for k in (1, 3, 5)}
    assert result["correct"] == counts and all(type(n) is int for n in result["correct"].values())
    assert result["n_test"] == 60 and result["top1"] == counts["top1"] / 60
    per_class = [(rank[y == c] == 0).double().mean().item() for c in range(10)]
    assert result["per_class"] == pytest.approx(per_class)
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)


def test_log_has_a_head_a_line_an_epoch_and_the_result(written, linear):
    head, *rows, end = [json.loads(row) for row in open(written / "linear.jsonl")]
    assert {"config", "machine"} <= head.keys() and head["config"]["batch_size"] == 50
    assert rows == linear["history"] and [row["epoch"] for row in rows] == [1, 2, 3]
    assert {"loss", "lr", "top1", "top3", "top5", "test_loss", "seconds"} <= rows[0].keys()
    assert end["result"] == linear["result"]


def test_again_gives_the_same_to_the_last_bit_but_another_seed_does_not(probe, linear):
    again, other = probe(), probe("--seed", "1")
    assert again["result"] == linear["result"]
    for name, value in linear["classifier"].items():
        assert torch.equal(again["classifier"][name], value)
        assert not torch.equal(other["classifier"][name], value)
    one, two = (probe("--mode", "finetune", "--labels", "0.5") for _ in range(2))
    assert one["encoder_sha256"] == two["encoder_sha256"] and one["result"] == two["result"]


def test_no_epochs_measure_the_untrained_classifier(probe):
    saved = probe("--epochs", "0")
    assert saved["history"] == [] and (saved["classifier"]["bias"] == 0).all()
    assert saved["result"]["test_loss"] == pytest.approx(math.log(10), abs=0.2)


def test_a_class_that_no_test_image_is_of_leaves_the_log_readable(probe, tmp_path):
    """json has no NaN: an accuracy of nothing must be null"""
    arrays = dict(np.load(write_npz(tmp_path / "all.npz")))
    some = arrays["y_test"] != 3
    arrays |= {"x_test": arrays["x_test"][some], "y_test": arrays["y_test"][some]}
    np.savez(tmp_path / "some.npz", **arrays)

    def no_constant(name):
        pytest.fail(f"{name} in linear.jsonl")

    probe("--data", str(tmp_path / "some.npz"), folder=tmp_path)
    for row in open(tmp_path / "linear.jsonl"):
        json.loads(row, parse_constant=no_constant)


# -- with the encoder


def by_hand(encoder, data, kind, settings, epochs, batch):
    """What fine-tuning is, written down once more: all learn, batch norm in training mode"""
    torch.manual_seed(0)
    classifier = nn.Linear(encoder.dim, 10)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    encoder.requires_grad_(True).train()
    groups = [{"params": classifier.parameters()}, {"params": encoder.parameters()}]
    groups[1]["lr"] = 0.2 * settings["lr"]
    optimizer = kind(groups, **settings)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.y_train)).split(batch):
            h = encoder((data.x_train[rows] / 255 - 0.5) / 0.5)
            optimizer.zero_grad()
            F.cross_entropy(classifier(h), data.y_train[rows]).backward()
            optimizer.step()
    return {**encoder.state_dict(), **classifier.state_dict()}


SGD = dict(weight_decay=1e-3, momentum=0.8)
FINE = {
    "sgd": (torch.optim.SGD, dict(lr=0.1, **SGD)),
    "nesterov": (torch.optim.SGD, dict(lr=0.1, nesterov=True, **SGD)),
    "adam": (torch.optim.Adam, dict(lr=1e-3, weight_decay=1e-3)),
    "lars": (LARS, dict(lr=3.0, **SGD)),
}


@pytest.fixture
def images(tiny_npz):
    arrays = np.load(tiny_npz)
    data = {name: torch.from_numpy(arrays[name]) for name in arrays}
    data |= {name: data[name].permute(0, 3, 1, 2) for name in ("x_train", "x_test")}
    return SimpleNamespace(**data, about={"classes": list("abcdefghij")})


@pytest.mark.parametrize("kind", FINE)
def test_finetuning_is_training_everything_each_part_at_its_rate(pretrained, images, kind):
    _, encoder = load_encoder(pretrained / "pretrain.pt")
    right = by_hand(copy.deepcopy(encoder), images, *FINE[kind], epochs=2, batch=50)
    more = dict(mode="finetune", epochs=2, batch_size=50, encoder_lr=0.2, schedule="step")
    more |= dict(weight_decay=1e-3, sgd_momentum=0.8, lr_decay=1.0, lr=(FINE[kind][1]["lr"],))
    more |= dict(optimizer="sgd", nesterov=True) if kind == "nesterov" else dict(optimizer=kind)
    (classifier,), _ = train(encoder, images, **more)
    for name, value in {**encoder.state_dict(), **classifier.state_dict()}.items():
        assert torch.allclose(value, right[name], atol=2e-5), name


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_an_overflow_in_the_first_fp16_step_changes_nothing(pretrained, kind):
    """fused=True spares fp16 a wait in each step. torch's fused SGD then leaves the momentum
    uninitialised if the first step is skipped; here such memory is filled with NaN.
    """
    _, encoder = load_encoder(pretrained / "pretrain.pt")
    layer, torch_is = nn.Linear(encoder.dim, 10), torch.utils.deterministic
    config = settings(mode="finetune", optimizer=kind, lr=(0.1,))
    optimizer = linear_eval.make_optimizer([layer], encoder, config)
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    scaler, before = torch.amp.GradScaler("cpu"), [p.detach().clone() for p in learned]

    def step():
        optimizer.zero_grad()
        scaler.scale(layer(encoder(torch.rand(4, 3, 16, 16))).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    assert torch_is.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        scaler.scale(torch.zeros(()))  # makes the scale, which overflows in the first step
        scaler._scale.fill_(math.inf)
        step()
        assert all(torch.equal(p, old) for p, old in zip(learned, before))
        scaler._scale.fill_(1.0)
        step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isfinite().all() for p in learned)
    assert not any(torch.equal(p, old) for p, old in zip(learned[:2], before))


def test_finetuning_changes_every_tensor_of_the_encoder(probe, pretrained, tmp_path):
    before = read(pretrained / "pretrain.pt")["encoder"]
    saved = probe("--mode", "finetune", folder=tmp_path)
    assert saved["encoder"].keys() == before.keys() and saved["method"] == "moco"
    assert not any(torch.equal(saved["encoder"][name], before[name]) for name in before)
    _, encoder = load_encoder(tmp_path / "linear.pt")
    assert linear_eval.fingerprint(encoder) == saved["encoder_sha256"]


@pytest.mark.parametrize(
    "mode, init", [("finetune", ""), ("finetune", "random"), ("supervised", "")]
)
def test_what_the_encoder_starts_from(probe, pretrained, mode, init):
    """At rate 0 the weights show where they came from, and batch norm that it is in training."""
    flags = ["--mode", mode, "--lr", "0", *(["--init", init] if init else [])]
    saved, seed = probe(*flags, "--seed", "3"), 3 if init or mode == "supervised" else None
    start = load_encoder(pretrained / "pretrain.pt", seed)[1].state_dict()
    for name, value in saved["encoder"].items():
        moved = "running" in name or "batches" in name
        assert torch.equal(value, start[name]) != moved, name
    methods = {("finetune", ""): "moco", ("finetune", "random"): "random"}
    assert saved["method"] == methods.get((mode, init), "supervised")


@pytest.mark.parametrize("mode", ["finetune", "supervised"])
def test_each_mode_learns_with_the_recipe_of_its_name(probe, mode):
    flags = ["--mode", mode, "--epochs", "20", "--batch-size", "20"]
    assert probe(*flags)["result"]["top1"] > 0.3  # of 10 classes


@pytest.mark.parametrize("flags", [["--mode", "finetune"], ["--augment"]])  # one by its recipe
def test_the_augmentation_is_drawn_anew_for_each_batch(probe, spy, flags):
    views = spy(linear_eval, "random_crop")
    probe(*flags, "--crop-scale", "0.3,0.9")
    assert [len(x) for (x, _), _ in views] == [50, 50, 20] * 3
    assert views[0][0][1] == (0.3, 0.9)
    views.clear()
    probe(*flags, "--no-augment")
    assert not views


# -- few labels


def sha(rows):
    return hashlib.sha256(json.dumps(rows.tolist()).encode()).hexdigest()


@pytest.mark.parametrize("share, each", [(0.1, 50), (0.01, 5), (0.5, 250), (0.999, 500)])
def test_labels_are_equally_many_of_each_class(share, each):
    labels = torch.arange(5000) % 10
    rows = linear_eval.choose_labels(labels, share, 0)
    assert labels[rows].bincount().tolist() == [each] * 10
    assert (rows.diff() > 0).all()  # sorted, each once


def test_labels_of_unequal_classes():
    """All of them; or equally many, of a small class as many as there are"""
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert linear_eval.choose_labels(labels, 1.0, 5).tolist() == list(range(100))
    assert labels[linear_eval.choose_labels(labels, 0.5, 0)].bincount().tolist() == [40, 10]


def test_labels_follow_from_the_seed_alone():
    """Pinned: no generator, device or version has a say. 1 % is a part of 10 %."""
    labels = torch.arange(5000) % 10
    rows = linear_eval.choose_labels(labels, 0.1, 0)
    assert sha(rows) == "84a7adbedade3f6a31a6a66ef4f0dcbb13b4bf568de6fac2eed921c94e857cec"
    other = linear_eval.choose_labels(labels, 0.1, 1)
    assert 20 < len(set(rows.tolist()) & set(other.tolist())) < 100  # of 500, by chance 50
    assert set(linear_eval.choose_labels(labels, 0.01, 0).tolist()) < set(rows.tolist())


@pytest.mark.parametrize("mode", ["probe", "finetune", "supervised"])
def test_every_mode_learns_from_the_same_labels(probe, images, spy, mode):
    used = spy(linear_eval, "prepare")
    saved = probe("--mode", mode, "--labels", "0.5", "--seed", "2")
    rows = linear_eval.choose_labels(images.y_train, 0.5, 2)
    assert saved["result"]["n_labels"] == 60 and saved["result"]["labels_sha256"] == sha(rows)
    (_, data, *_), _ = used[0]
    assert torch.equal(data.x_train, images.x_train[rows])
    assert torch.equal(data.y_train, images.y_train[rows])
    assert saved["result"]["n_test"] == 60 and saved["config"]["labels"] == 0.5


def test_labels_are_a_share_of_what_holdout_and_limit_leave(probe):
    saved = probe("--labels", "0.5", "--holdout", "40", "--limit", "60")
    assert (saved["result"]["n_labels"], saved["result"]["n_test"]) == (30, 40)
    data = saved["data"]
    assert (data["n_train"], data["n_test"], data["holdout"]) == (60, 40, 40)


# -- several learning rates


def test_several_rates_are_as_many_trainings_of_their_own(problem):
    rates = (30.0, 0.1, 3.0)
    for more in (dict(), dict(optimizer="lars"), dict(optimizer="adam", lr_decay=0.5)):
        layers, history = train(*problem, lr=rates, epochs=5, **more)
        assert len(layers) == 3 and history == []
        for rate, layer in zip(rates, layers):
            (alone,), _ = train(*problem, lr=(rate,), epochs=5, **more)
            close(layer.weight, alone.weight, 1e-6)
            close(layer.bias, alone.bias, 1e-6)


def scaled(source, folder, factor):
    """A run with an untrained encoder whose features are so many times as large"""
    encoder = load_encoder(source / "pretrain.pt", 1)[1].state_dict()
    for name in ("layer3.0.bn2", "layer3.0.downsample.1"):
        encoder[f"{name}.weight"] *= factor
        encoder[f"{name}.bias"] *= factor
    return place(source, folder, encoder=encoder)


def test_by_default_the_rate_is_chosen_where_30_fails(pretrained, tmp_path, capsys):
    """On held-out training images, of several: neither the largest nor the smallest"""
    run, data = scaled(pretrained, tmp_path / "run", 10), tmp_path / "more.npz"
    write_npz(data, n_train=400, n_test=200, size=8)
    flags = [str(run), "--data", str(data), "--precision", "fp32", "--epochs", "40"]
    assert linear_eval.main(flags) == 0
    said, saved = capsys.readouterr(), read(run / "probe/linear.pt")
    chosen, rates = saved["result"]["lr"], saved["result"]["rates"]
    assert [row["lr"] for row in rates] == list(Config().lr) and max(Config().lr) == 30
    best = max(row["top1"] for row in rates)
    assert chosen == next(row["lr"] for row in rates if row["top1"] == best)
    assert 0.01 < chosen < 30 and f"lr {chosen:g} is best on the 100" in said.out and not said.err
    assert linear_eval.main([*flags, "--recipe", "demo", "--out", str(run / "30")]) == 0
    at_30, said = read(run / "30" / "linear.pt")["result"], capsys.readouterr()
    assert "rates" not in at_30 and at_30["lr"] == 30
    assert saved["result"]["test_loss"] < math.log(10) < at_30["test_loss"]
    assert saved["result"]["top1"] > at_30["top1"]
    (line,) = said.err.splitlines()  # the exit code stays 0
    assert line.startswith("warning: ") and "ln(10) = 2.30" in line and "--lr 0.03,0.3,3" in line


def test_the_warning_is_for_a_trained_classifier_only(pretrained, tmp_path, capsys):
    """Untrained weights are about as good as guessing, and sometimes a little worse."""
    run = scaled(pretrained, tmp_path / "run", 100)
    assert linear_eval.main([str(run), "--lr", "1", "--epochs", "0"]) == 0
    assert read(run / "linear.pt")["result"]["test_loss"] > math.log(10)
    assert not capsys.readouterr().err
    flags = [str(run), "--mode", "finetune", "--lr", "1", "--epochs", "1", "--encoder-lr", "0"]
    assert linear_eval.main(flags) == 0
    assert "lower --lr" in capsys.readouterr().err


def test_the_best_rate_is_taken_and_trains_on_all_images(probe, capsys, tmp_path):
    saved = probe("--lr", "0.0001,0.3,3", folder=tmp_path)
    rates, result = saved["result"]["rates"], saved["result"]
    assert [row["lr"] for row in rates] == [0.0001, 0.3, 3.0]
    assert result["lr"] == max(rates, key=lambda row: row["top1"])["lr"] != 0.0001
    for row in rates:  # the same as probes of that rate that are evaluated on these images
        alone = probe("--lr", str(row["lr"]), "--holdout", "60")["result"]
        assert row["top1"] == alone["top1"] and alone["n_test"] == 60
    # then anew on all images, and on the test set
    anew = probe("--lr", str(result["lr"]))
    assert torch.equal(saved["classifier"]["weight"], anew["classifier"]["weight"])
    assert result["top1"] == anew["result"]["top1"] and result["n_test"] == 60
    *_, end = map(json.loads, open(tmp_path / "linear.jsonl"))
    assert end["result"] == result
    text = capsys.readouterr().out
    assert all(f"lr {row['lr']:g}: top-1 {row['top1']:.2%}" in text for row in rates)


@pytest.mark.parametrize(
    "top1, best", [([3, 5, 4], 1), ([5, 4, 3], 0), ([3, 4, 5], 2), ([5, 3, 5], 0)]
)
def test_neither_the_largest_nor_the_last_but_the_best_is_taken(monkeypatch, top1, best):
    """Layers that get so many of 6 images right; of equally good ones the first is taken."""
    y, layers = torch.zeros(6).long(), []
    for n in top1:
        layer = nn.Linear(6, 2, bias=False)
        layer.weight.data = torch.stack([(torch.arange(6) < n).float(), torch.full((6,), 0.5)])
        layers.append(layer)
    monkeypatch.setattr(linear_eval, "train_linear", lambda *args: (layers, []))
    data = SimpleNamespace(x_train=torch.eye(6), y_train=y, held=torch.arange(6), about={})
    data.rest = torch.arange(0)
    for lrs in ((0.1, 1.0, 10.0), (10.0, 1.0, 0.1)):
        lr, rates = linear_eval.choose_lr(None, data, settings(lr=lrs), fp32, UNSCALED)
        assert lr == lrs[best] and [row["top1"] for row in rates] == [n / 6 for n in top1]


def test_the_choice_does_not_see_the_test_set(probe, tiny_npz, tmp_path):
    arrays = dict(np.load(tiny_npz))
    arrays |= {"y_test": (arrays["y_test"] + 1) % 10, "x_test": 255 - arrays["x_test"]}
    np.savez(tmp_path / "other.npz", **arrays)
    flags = ["--lr", "0.0001,0.1,1,10"]
    one, two = probe(*flags), probe(*flags, "--data", str(tmp_path / "other.npz"))
    assert one["result"]["rates"] == two["result"]["rates"]
    assert torch.equal(one["classifier"]["weight"], two["classifier"]["weight"])
    assert one["result"]["test_loss"] != two["result"]["test_loss"]


def test_a_rate_that_diverges_loses_and_ends_the_run_if_all_do(
    pretrained, tmp_path, capsys, refused
):
    run = scaled(pretrained, tmp_path / "run", 1e18)
    flags = [str(run), *SHORT, "--lr"]
    assert linear_eval.main([*flags, "1e9,1e-30"]) == 0
    result = read(run / "linear.pt")["result"]
    assert result["lr"] == 1e-30 and result["rates"][0] == {"lr": 1e9, "top1": None}
    assert "lr 1e+09: diverged" in capsys.readouterr().out
    (run / "linear.pt").unlink()
    refused(linear_eval.main, [*flags, "1e9,2e9"], "at each learning rate", code=3)
    refused(linear_eval.main, [*flags, "1e9"], "lower --lr", code=3)
    assert not (run / "linear.pt").exists()


@pytest.mark.parametrize(
    "flags, sizes, n_test",
    [("--labels 0.5", [30, 60], 60), ("--holdout 40", [40, 80], 40), ("--augment", [60, 120], 60)],
)
def test_the_choice_is_made_on_labelled_images_outside_the_holdout(
    probe, spy, flags, sizes, n_test
):
    parts = spy(linear_eval, "train_linear")
    saved = probe("--lr", "1,3", *flags.split())
    assert [len(data.y_train) for (_, data, *_), _ in parts] == sizes
    assert saved["result"]["n_test"] == n_test and len(saved["result"]["rates"]) == 2


@pytest.mark.parametrize("n, held", [(2000, 200), (600, 100), (60, 30)])
def test_a_tenth_is_held_out_but_ten_images_of_each_class_if_there_are_few(tmp_path, n, held):
    data = str(write_npz(tmp_path / "n.npz", n_train=n, size=2))
    data = linear_eval.read_data(data, settings(image_size=2), None)
    assert (len(data.held), len(data.rest)) == (held, n - held)
    assert data.y_train[data.held].bincount().tolist() == [held // 10] * 10
    assert sorted([*data.held.tolist(), *data.rest.tolist()]) == list(range(n))


# -- recipes

DEFAULT = dict(mode="probe", labels=1.0, epochs=100, batch_size=256, weight_decay=0.0)
DEFAULT |= dict(lr=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0))
DEFAULT |= dict(optimizer="sgd", nesterov=False, sgd_momentum=0.9, encoder_lr=1.0, augment=False)
DEFAULT |= dict(schedule="step", lr_decay=0.1, crop_scale=(0.08, 1.0), holdout=0, init="pretrained")
SEMI = dict(mode="finetune", lr=(0.05,), nesterov=True, lr_decay=0.2, augment=True)
RESNET = dict(crop_scale=(0.2, 1.0), batch_size=128, weight_decay=5e-4, nesterov=True)
RESNET |= dict(schedule="cosine", augment=True)
SIMCLR = dict(labels=0.1, epochs=50, batch_size=200, optimizer="adam", lr=(1e-3,), lr_decay=1.0)
SIMCLR |= dict(weight_decay=1e-5, augment=True)
RECIPES = {
    "": {},
    "--recipe default": {},
    "--recipe demo": dict(lr=(30.0,)),
    "--recipe report": dict(lr=(10.0,), batch_size=128),
    "--recipe fast-moco": dict(
        optimizer="lars", lr=(0.8,), batch_size=4096, epochs=90, schedule="cosine"
    ),
    "--recipe simclr-report": SIMCLR,
    "--recipe simclr-report --mode finetune": SIMCLR | dict(mode="finetune"),
    "--recipe semi-1": SEMI | dict(labels=0.01, epochs=60, encoder_lr=0.0),
    "--recipe semi-10": SEMI | dict(labels=0.1, epochs=20, encoder_lr=pytest.approx(1e-6 / 0.05)),
    "--recipe semi-1 --mode probe --lr 1,2": SEMI
    | dict(labels=0.01, epochs=60, encoder_lr=0.0, mode="probe", lr=(1.0, 2.0)),
    "--mode finetune": RESNET | dict(mode="finetune", lr=(0.05,), epochs=50),
    "--mode supervised": RESNET | dict(mode="supervised", lr=(0.1,), epochs=100),
    "--mode finetune --epochs 7 --no-augment": RESNET
    | dict(mode="finetune", lr=(0.05,), epochs=7, augment=False),
}


@pytest.mark.parametrize("flags", RECIPES)
def test_recipes(flags):
    """Each number, those that a recipe leaves alone included"""
    config = vars(linear_eval.parse_config(["runs/a", *flags.split()]))
    assert {name: config[name] for name in DEFAULT} == DEFAULT | RECIPES[flags]
    linear_eval.check_together(SimpleNamespace(**config))


@pytest.mark.parametrize(
    "schedule, right",
    [
        (dict(schedule="step"), [1, 1, 1, 0.1, 0.01]),
        (dict(schedule="step", lr_decay=0.2), [1, 1, 1, 0.2, 0.04]),
        (dict(schedule="step", lr_decay=1.0), [1] * 5),
        (dict(schedule="cosine"), [1, 0.9045085, 0.6545085, 0.3454915, 0.0954915]),
    ],
)
def test_the_rate_in_each_epoch(problem, schedule, right):
    _, history = train(*problem, epochs=5, lr=(2.0,), **schedule)
    assert [row["lr"] for row in history] == pytest.approx([2 * share for share in right])


def test_the_schedule_reaches_every_group(pretrained, images, monkeypatch):
    rates = []

    class Spy(torch.optim.SGD):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    _, encoder = load_encoder(pretrained / "pretrain.pt")
    more = dict(mode="finetune", encoder_lr=0.01, lr_decay=0.2, epochs=5, batch_size=120)
    train(encoder, images, lr=(5.0,), **more)
    right = [[5 * share, 0.05 * share] for share in (1, 1, 1, 0.2, 0.04)]
    assert torch.allclose(torch.tensor(rates), torch.tensor(right))


# -- where it writes, and what it takes


def place(source, folder, **changes):
    """A run's folder with a pretrain.pt, its entries changed"""
    folder.mkdir(exist_ok=True)
    torch.save(read(source / "pretrain.pt") | changes, folder / "pretrain.pt")
    return folder


FOLDERS = {
    "": "",
    "--init random": "random",
    "--mode finetune": "finetune",
    "--mode finetune --labels 0.1": "finetune-0.1",
    "--labels 0.1": "probe-0.1",
    "--labels 0.5 --init random": "random-probe-0.5",
    "--mode finetune --init random": "random-finetune",
    "--mode finetune --init random --labels 0.1": "random-finetune-0.1",
    "--mode supervised": "supervised",
    "--mode supervised --init random --labels 0.1": "supervised-0.1",
    "--recipe demo --holdout 20": "probe",
}


@pytest.mark.parametrize("flags", FOLDERS)
def test_default_folders(pretrained, tmp_path, flags):
    run = place(pretrained, tmp_path / "run")
    assert linear_eval.main([str(run), *flags.split(), "--epochs", "0"]) == 0
    files = [path.relative_to(run) for path in run.rglob("linear.*")]
    assert {str(path.parent) for path in files} == {FOLDERS[flags] or "."} and len(files) == 2


@pytest.mark.parametrize("mode", ["probe", "finetune", "supervised"])
def test_every_mode_takes_a_linear_pt_too(pretrained, tmp_path, mode):
    run, out = place(pretrained, tmp_path / "run", method="simclr"), tmp_path / "tuned"
    flags = ["--mode", mode, "--epochs", "0"]
    assert linear_eval.main([str(run), "--out", str(out), *flags]) == 0
    first = read(out / "linear.pt")
    assert first["method"] == ("simclr" if mode != "supervised" else "supervised")
    assert linear_eval.main([str(out / "linear.pt"), *flags]) == 0
    again = read(out / mode / "linear.pt")
    assert again["method"] == first["method"] and again["pretrain"]["config"] == first["config"]
    assert read(out / "linear.pt")["encoder_sha256"] == first["encoder_sha256"]


def test_a_checkpoint_is_not_replaced_by_its_own_probe(written, tmp_path, refused):
    shutil.copy(written / "linear.pt", tmp_path)
    before = (tmp_path / "linear.pt").read_bytes()
    refused(linear_eval.main, [tmp_path / "linear.pt", "--out", tmp_path, *SHORT], "--out")
    assert (tmp_path / "linear.pt").read_bytes() == before


# -- along the epochs


@pytest.fixture
def kept(pretrained, tmp_path):
    """A run of 6 epochs that kept each one, the last too; the encoders differ"""
    run = place(pretrained, tmp_path / "kept", epoch=6, epochs=6)
    last = read(run / "pretrain.pt")
    for epoch in range(1, 7):
        encoder = load_encoder(run / "pretrain.pt", epoch)[1].state_dict()
        torch.save(last | dict(epoch=epoch, encoder=encoder), run / f"epoch{epoch:04d}.pt")
    return run


def measure_kept(run, *flags):
    """Epochs 2, 4 and the last of a run -> exit code, the files made, encoders trained on"""
    calls, real = [], linear_eval.learn
    kept = [str(run / name) for name in ("epoch0002.pt", "epoch0004.pt", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_eval, "learn", lambda *args: calls.append(1) or real(*args))
        code = linear_eval.main([*kept, *SHORT, *flags])
    files = [run / name / "linear.pt" for name in ("epoch0002", "epoch0004", "")]
    return code, [read(file) for file in files if file.exists()], len(calls)


def test_each_kept_epoch_has_a_folder_of_its_own(kept, tmp_path, capsys):
    code, results, trained = measure_kept(kept)
    assert (code, trained) == (0, 3) and [e["pretrain"]["epoch"] for e in results] == [2, 4, 6]
    assert len({e["result"]["test_loss"] for e in results}) == 3
    assert f"next: python plots.py {kept}\n" in capsys.readouterr().out
    out = tmp_path / "alone"
    assert linear_eval.main([str(kept / "epoch0004.pt"), "--out", str(out), *SHORT]) == 0
    assert read(out / "linear.pt")["result"] == results[1]["result"]
    assert measure_kept(kept)[2] == 0  # all are measured already
    assert linear_eval.main([str(kept), *SHORT]) == 0  # also if it is asked for alone
    assert "already measured" in capsys.readouterr().out


def test_kept_epochs_after_an_interruption(kept, monkeypatch):
    real, calls = linear_eval.learn, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(linear_eval, "learn", interrupted)
        assert measure_kept(kept)[0] == 130
    code, results, trained = measure_kept(kept)
    assert (code, len(results), trained) == (0, 3, 2)


def test_kept_epochs_are_measured_anew_if_something_has_changed(kept):
    _, before, _ = measure_kept(kept)
    _, results, trained = measure_kept(kept, "--lr", "1")  # other settings
    assert trained == 3 and results != before
    other = read(kept / "epoch0004.pt") | {"encoder": read(kept / "epoch0003.pt")["encoder"]}
    torch.save(other, kept / "epoch0004.pt")
    _, again, trained = measure_kept(kept, "--lr", "1")
    pairs = zip(results, again)
    assert trained == 1 and [a["result"] == b["result"] for a, b in pairs] == [True, False, True]


def test_kept_epochs_with_finetuning_go_into_its_folder(kept):
    files = [str(kept / "epoch0004.pt"), str(kept)]
    assert linear_eval.main([*files, "--mode", "finetune", *SHORT]) == 0
    assert (kept / "finetune/epoch0004/linear.pt").exists() and not (kept / "linear.pt").exists()
    assert (kept / "finetune/linear.pt").exists()


def test_a_kept_checkpoint_that_is_damaged_costs_nothing_measured(kept, capsys):
    whole = (kept / "epoch0004.pt").read_bytes()
    (kept / "epoch0004.pt").write_bytes(whole[:9000])
    assert measure_kept(kept)[0] == 2
    assert "epoch0004.pt: not a readable checkpoint" in capsys.readouterr().err
    assert not (kept / "linear.pt").exists()
    (kept / "epoch0004.pt").write_bytes(whole)
    code, results, trained = measure_kept(kept)
    assert (code, len(results), trained) == (0, 3, 2)


# -- what it refuses: one line, code 2


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--labels", "0"], "--labels 0:"),
        (["--labels", "1.5"], "--labels"),
        (["--labels", "1e-9"], "--labels 1e-09:"),
        (["--labels", "0.04"], "less than one of each class"),
        (["--lr", "abc"], "--lr"),
        (["--lr", "1,nan"], "--lr"),
        (["--lr", "1,3", "--mode", "finetune"], "--mode probe"),
        (["--lr", "1e39"], "--lr"),
        (["--mode", "finetune", "--encoder-lr", "1e40"], "--encoder-lr"),
        (["--encoder-lr", "-1"], "--encoder-lr"),
        (["--mode", "supervised", "--encoder-lr", "0"], "--encoder-lr 0"),
        (["--lr-decay", "2"], "--lr-decay"),
        (["--nesterov", "--sgd-momentum", "0"], "--nesterov"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(pretrained, tmp_path, refused, flags, says):
    refused(linear_eval.main, [pretrained, "--out", tmp_path / "out", *SHORT, *flags], says)
    assert not (tmp_path / "out").exists()


def test_data_of_one_class(pretrained, tmp_path, refused):
    data = write_npz(tmp_path / "one.npz", classes=1)
    refused(linear_eval.main, [pretrained, "--out", tmp_path, "--data", data], "only one class")


# -- the images are those of the pretraining


def described(source, folder, **changes):
    """A run's folder whose checkpoint says something else about its data; None: nothing"""
    data = read(source / "pretrain.pt")["data"] | changes
    return place(source, folder, data={k: v for k, v in data.items() if v is not None})


def test_data_that_the_checkpoint_names_and_that_is_gone(pretrained, tmp_path, refused):
    run = described(pretrained, tmp_path / "run", file=str(tmp_path / "gone.npz"))
    refused(linear_eval.main, [run, *SHORT], "gone.npz")


def test_the_file_that_the_checkpoint_names_is_read_whatever_data_said(pretrained, tmp_path):
    """A folder of images becomes an .npz file in pretraining; its name is in `file`."""
    run = described(pretrained, tmp_path / "run", name="photos/")
    assert linear_eval.main([str(run), *SHORT]) == 0
    saved = read(run / "linear.pt")
    assert saved["config"]["data"] == saved["data"]["name"] == "photos/"
    assert saved["data"]["file"] == read(pretrained / "pretrain.pt")["data"]["file"]
    assert linear_eval.main([str(run / "linear.pt"), *SHORT]) == 0


def test_a_folder_is_not_read_but_an_npz_is_asked_for(pretrained, tmp_path, refused):
    """By --data, and from a checkpoint so old that it doesn't name the file"""
    run = described(pretrained, tmp_path / "run", name=str(tmp_path), file=None)
    refused(linear_eval.main, [run, *SHORT], "an .npz file")
    line = refused(linear_eval.main, [pretrained, "--data", tmp_path, *SHORT], "an .npz file")
    assert "Is a directory" in line


def test_an_older_checkpoint_names_its_file_in_name(pretrained, tiny_npz, tmp_path):
    older = dict(name=str(tiny_npz), file=None, sha256=None)
    run = described(pretrained, tmp_path / "run", **older)
    assert linear_eval.main([str(run), *SHORT]) == 0


def test_holdout_and_limit_of_the_pretraining_hold_here_too(pretrained, tmp_path, spy):
    """What was held out there is evaluated on, and has no part in the choice of the rate."""
    config = read(pretrained / "pretrain.pt")["config"] | {"limit": 60, "holdout": 40}
    run = described(pretrained, tmp_path / "run", holdout=40, sha256=None)
    run, parts = place(run, tmp_path / "limited", config=config), spy(linear_eval, "train_linear")
    assert linear_eval.main([str(run), *SHORT]) == 0
    assert [len(data.y_train) for (_, data, *_), _ in parts] == [30, 60]
    saved = read(run / "linear.pt")
    assert saved["result"]["n_test"] == saved["data"]["holdout"] == 40
    assert (saved["config"]["limit"], saved["config"]["holdout"]) == (60, 40)


def test_other_images_than_those_of_the_pretraining_are_refused(pretrained, tmp_path, refused):
    run = described(pretrained, tmp_path / "run", sha256="0" * 64)
    refused(linear_eval.main, [run, *SHORT], "not the images of the pretraining")
    assert not (run / "linear.pt").exists()
    other = str(write_npz(tmp_path / "other.npz", seed=1))  # asked for, as are fewer images
    for flags in (["--data", other], ["--limit", "50"], ["--holdout", "20"]):
        assert linear_eval.main([str(run), *SHORT, *flags]) == 0
    assert (run / "probe/linear.pt").exists() and not (run / "linear.pt").exists(), "not the run's"


# -- what it says


@pytest.mark.parametrize("name, says", [("pretrain.pt", False), ("last.pt", True)])
def test_it_says_that_pretraining_is_not_finished(pretrained, tmp_path, capsys, name, says):
    run = place(pretrained, tmp_path / "run", epochs=9, **{"train_state": {}} if says else {})
    (run / "pretrain.pt").rename(run / name)
    assert linear_eval.main([str(run), *SHORT]) == 0
    text = capsys.readouterr()
    assert "epoch 2 of 9" in text.out and ("epoch 2 of 9" in text.err) == says
    assert ("pretrain first" in text.err) == says


def test_a_folder_without_a_run_says_to_pretrain_first(tmp_path, refused):
    refused(linear_eval.main, [tmp_path], "pretrain first")


def test_without_a_run_the_newest_is_taken(pretrained, tmp_path, capsys, monkeypatch, refused):
    """As when the script is pasted into a notebook, unedited"""
    monkeypatch.chdir(tmp_path)
    refused(linear_eval.main, [], "pretrain first")
    Path("runs").mkdir()
    for i, name in enumerate(("new", "old", "unfinished")):
        file = place(pretrained, Path("runs") / name) / "pretrain.pt"
        os.utime(file, (1e9 - i, 1e9 - i))
    file.rename("runs/unfinished/last.pt")
    assert linear_eval.main(SHORT) == 0
    assert capsys.readouterr().out.startswith("no run is named: taking the newest one, runs/new\n")
    assert [str(file) for file in Path().rglob("linear.pt")] == ["runs/new/linear.pt"]


@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_the_same_command_again_repeats_the_result(pretrained, tmp_path, capsys, spy, mode):
    """Without training; with another setting, seed, encoder or script it measures anew."""
    run, trainings = place(pretrained, tmp_path / "run"), spy(linear_eval, "learn")
    out = run if mode == "probe" else run / mode

    def measure(*flags):
        trainings.clear()
        assert linear_eval.main([str(run), "--mode", mode, *SHORT, *flags]) == 0
        return len(trainings), capsys.readouterr().out.splitlines()

    once, first = measure("--lr", "1")
    before = (out / "linear.pt").read_bytes()
    again, second = measure("--lr", "1")
    assert (once, again) == (1, 0) and (out / "linear.pt").read_bytes() == before
    said = [line for line in first if line.startswith("top-1")]
    assert said == second[:1] and "already measured" in second[1] and len(second) == 3
    assert first[-1] == second[-1]  # what to run next
    assert measure("--lr", "2")[0] == measure("--lr", "2", "--seed", "1")[0] == 1
    assert measure("--lr", "2", "--seed", "1")[0] == 0
    saved = read(out / "linear.pt")
    torch.save(saved | {"source": "older"}, out / "linear.pt")
    assert measure("--lr", "2", "--seed", "1")[0] == 1
    (out / "linear.pt").write_bytes(b"damaged")
    assert measure("--lr", "2", "--seed", "1")[0] == 1
    place(pretrained, run, encoder=load_encoder(run / "pretrain.pt", 5)[1].state_dict())
    assert measure("--lr", "2", "--seed", "1")[0] == 1


def test_without_a_terminal_a_line_every_ten_epochs_tells_the_time_left(probe, capsys):
    capsys.readouterr()
    probe("--lr", "0.1,1", "--epochs", "25")
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in lines] == ["epoch 10/25", "epoch 20/25"] * 2
    assert all(re.search(r", \d+ s left$", line) for line in lines)
    assert ["loss" in line for line in lines] == [False, False, True, True] and not said.err


def test_a_misspelt_checkpoint_is_noticed_before_any_is_measured(pretrained, tmp_path, refused):
    run = place(pretrained, tmp_path / "run")
    refused(linear_eval.main, [run, tmp_path / "nowhere", *SHORT], "nowhere")
    assert [path.name for path in run.iterdir()] == ["pretrain.pt"]


def test_it_says_what_to_run_next(pretrained, tmp_path, capsys):
    runs = [str(place(pretrained, tmp_path / name)) for name in ("a", "b c")]
    assert linear_eval.main([*runs, "--mode", "finetune", "--epochs", "0"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: python plots.py {runs[0]} '{runs[1]}'"
    assert linear_eval.main([runs[0], "--out", str(tmp_path / "out"), "--epochs", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"plots.py {tmp_path / 'out'}")


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()]
OUT_OF_MEMORY += [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line(pretrained, tmp_path, refused, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(linear_eval, "train_linear", fail)
    refused(linear_eval.main, [pretrained, "--out", tmp_path, *SHORT], "--batch-size")


def test_a_full_disk_is_one_line(pretrained, tmp_path, refused, monkeypatch):
    def fail(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    argv = [pretrained, "--out", tmp_path, *SHORT]
    says = f"No space left on device: '{tmp_path / 'linear.jsonl'}'"
    refused(linear_eval.main, argv, says, code=4)
    assert not list(tmp_path.iterdir())


def test_another_error_with_memory_in_its_text_is_not_hidden(pretrained, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(linear_eval, "train_linear", fail)
    with pytest.raises(RuntimeError, match="illegal memory"):
        linear_eval.main([str(pretrained), "--out", str(tmp_path), *SHORT])
