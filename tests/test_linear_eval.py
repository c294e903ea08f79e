"""linear_eval.py: the counting, the optimizer, a probe that is one (the encoder stays, bit by bit),
what it writes, and what it refuses. Oracles C17, C19, C20, C27, C28 of correctness.md.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from conftest import close, write_npz
from torch import nn

import linear_eval
from linear_eval import LARS, Config, Halt, crop_and_flip, load_encoder, topk_accuracy

SHORT = "--epochs 3 --batch-size 50 --precision fp32".split()  # 120 images: two steps and a rest


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def probe(pretrained, tmp_path):
    """probe(*flags) -> linear.pt of the pretrained run, in a new folder"""
    count = iter(range(100))

    def run(*flags, folder=None):
        out = folder or tmp_path / f"probe{next(count)}"
        assert linear_eval.main([str(pretrained), "--out", str(out), *SHORT, *flags]) == 0
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


def test_topk_is_sklearns(scored):
    metrics = pytest.importorskip("sklearn.metrics")
    right = [metrics.top_k_accuracy_score(scored[1], scored[0], k=k) for k in (1, 3, 5)]
    assert topk_accuracy(*scored) == pytest.approx(right, abs=1e-9)


def test_topk_is_torchmetrics(scored):
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    settings = dict(num_classes=10, average="micro")
    right = [float(metrics.multiclass_accuracy(*scored, top_k=k, **settings)) for k in (1, 3, 5)]
    assert topk_accuracy(*scored) == pytest.approx(right, abs=1e-6)  # it counts in float32


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_topk_of_fewer_than_five_classes(classes):
    logits, labels = torch.randn(50, classes), torch.randint(0, classes, (50,))
    top1, top3, top5 = topk_accuracy(logits, labels)
    assert top1 == (logits.argmax(1) == labels).sum().item() / 50 and top5 == 1.0
    assert (top3 == 1.0) == (classes <= 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_an_error(value, scored):
    scored[0][7, 3] = value
    with pytest.raises(Halt, match="not finite") as error:
        topk_accuracy(*scored)
    assert error.value.code == 3


# -- LARS


def make_weights():
    return [nn.Parameter(torch.randn(shape).double()) for shape in [(4, 6), (6,), (3, 4)]]


def walk(weights, optimizer, steps=10):
    """Steps along the same gradients for everyone, the rate falling"""
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
            g, rate = (
                torch.randn(w.shape, generator=random, dtype=torch.float64),
                0.8 * (1 - i / 10),
            )
            if w.ndim > 1:  # no vectors
                norms = w.square().sum().sqrt(), g.square().sum().sqrt()
                rate *= 0.02 * norms[0] / (norms[1] + decay * norms[0])
                g = g + decay * w
            velocity[j] = 0.9 * velocity[j] + rate * g
            mine[j] = w - velocity[j]
            close(row[j], mine[j], 1e-12)


@pytest.mark.parametrize("peer", ["timm.optim.lars.Lars", "lightly.utils.lars.LARS"])
def test_lars_is_the_peers_on_matrices_at_a_constant_rate(peer):
    module, name = peer.rsplit(".", 1)
    settings = dict(lr=0.8, momentum=0.9, weight_decay=0.01)
    ours = make_weights()[::2]
    theirs = [nn.Parameter(w.detach().clone()) for w in ours]
    peers = getattr(pytest.importorskip(module), name)(theirs, **settings)
    for a, b in zip(walk(ours, LARS(ours, **settings), 5), walk(theirs, peers, 5)):
        for x, y in zip(a, b):
            close(x, y, 2e-8)  # their epsilon


def test_lars_starts_from_zero_weights():
    """No weight, no ratio: an ordinary step, or else zeros would never move."""
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.ones(2, 3)
    LARS([weight], lr=0.5, weight_decay=0.1).step()
    close(weight.detach(), torch.full((2, 3), -0.5), 0)


def test_lars_with_no_gradient_stands_still():
    moved, still = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    moved.grad = torch.zeros(2, 3)
    LARS([moved, still], lr=0.5).step()
    assert (moved == 1).all() and (still == 1).all()


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


def settings(**changes):
    return SimpleNamespace(**vars(Config(**changes)), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def fp32():
    return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize(
    "recipe",
    [
        dict(),
        dict(lr=10.0, schedule="cosine"),
        dict(optimizer="lars", lr=30.0, schedule="cosine"),
    ],
    ids=["sgd step", "sgd cosine", "lars"],
)
def test_probe_finds_the_optimum_of_logistic_regression(problem, recipe):
    linear_model = pytest.importorskip("sklearn.linear_model")
    encoder, data = problem
    h, h_test = (
        linear_eval.extract_features(encoder, x, settings(), fp32).numpy()
        for x in (data.x_train, data.x_test)
    )
    peer = linear_model.LogisticRegression(C=1e6, max_iter=5000).fit(h, data.y_train)
    right = peer.score(h_test, data.y_test)
    assert 0.4 < right < 0.9  # a problem in which there is something to lose
    _, history = linear_eval.probe(*problem, settings(**recipe), fp32)
    assert history[-1]["top1"] == pytest.approx(right, abs=0.005 + 1e-9)


@pytest.mark.parametrize("batch_size", [7, 256, 1500])
def test_logged_loss_is_the_mean_over_images_whatever_the_batch(problem, batch_size):
    """With rate 0 the classifier stands still, and the mean over ragged batches is that of all."""
    config = settings(lr=0.0, epochs=1, batch_size=batch_size)
    classifier, (row,) = linear_eval.probe(*problem, config, fp32)
    encoder, data = problem
    logits = classifier(linear_eval.extract_features(encoder, data.x_train, config, fp32))
    assert row["loss"] == pytest.approx(F.cross_entropy(logits, data.y_train).item(), abs=1e-5)


def test_start_and_order_follow_from_the_seed_alone(problem):
    """So an untrained encoder, which draws weights before, is probed in the same way."""
    weights = []
    for drawn_before in (0, 7):
        torch.rand(drawn_before)
        weights.append(linear_eval.probe(*problem, settings(epochs=1), fp32)[0].weight)
    assert torch.equal(*weights)


def test_report_is_of_the_last_epoch_not_of_the_best(probe, monkeypatch):
    real = linear_eval.learning_rate
    ruin = {0: 1.0, 1: 0.1, 2: -1e4}  # the last epoch climbs the loss instead
    monkeypatch.setattr(linear_eval, "learning_rate", lambda c, epoch: real(c, 0) * ruin[epoch])
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


@pytest.mark.parametrize("flags", [[], ["--augment"], ["--recipe", "fast-moco"]], ids=str)
def test_encoder_is_bit_for_bit_the_pretrained_one(probe, pretrained, flags):
    before, after = read(pretrained / "pretrain.pt")["encoder"], probe(*flags)["encoder"]
    assert before.keys() == after.keys() and any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_that_changes_is_found_out(pretrained, tmp_path, monkeypatch, refused):
    real = linear_eval.evaluate

    def careless(encoder, *rest):
        encoder.bn1.running_mean[0] += 1e-6
        return real(encoder, *rest)

    monkeypatch.setattr(linear_eval, "evaluate", careless)
    refused(linear_eval.main, [pretrained, "--out", tmp_path, *SHORT], "has changed", code=3)
    assert not (tmp_path / "linear.pt").exists()


def test_features_of_an_image_do_not_depend_on_its_neighbours(pretrained):
    """Eval mode: neither do the statistics move, nor does the mode stay changed."""
    encoder = linear_eval.load_encoder(read(pretrained / "pretrain.pt")).train()
    images, mark = torch.randint(0, 256, (9, 3, 16, 16)).byte(), linear_eval.fingerprint(encoder)
    together, alone = (
        linear_eval.extract_features(encoder, images, settings(), fp32, batch=n) for n in (9, 1)
    )
    close(together, alone, 1e-5)
    assert encoder.training and linear_eval.fingerprint(encoder) == mark


# -- which encoder


def test_load_encoder_takes_the_checkpoints_weights_frozen_in_eval_mode(pretrained):
    saved = read(pretrained / "pretrain.pt")
    encoder = load_encoder(saved)
    assert all(torch.equal(encoder.state_dict()[k], saved["encoder"][k]) for k in saved["encoder"])
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_load_encoder_random_follows_the_seed(pretrained):
    saved, marks = read(pretrained / "pretrain.pt"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        marks.append(linear_eval.fingerprint(load_encoder(saved, random=True)))
    assert marks[0] == marks[1] != marks[2]
    assert marks[0] != linear_eval.fingerprint(load_encoder(saved))


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


def test_crop_and_flip_is_torchvisions(spy):
    crops, matrices = spy(linear_eval, "sample_crops"), spy(linear_eval, "interpolation")
    images = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8)
    ours = crop_and_flip(images, Config())
    flips, boxes = matrices[1][0][3], torch.stack(crops[0][1], dim=1).int().tolist()
    assert flips.any() and not flips.all() and crops[0][0][2] == (0.08, 1.0)
    for i, box in enumerate(boxes):
        view = tv.resized_crop(images[i] / 255, *box, [16, 16], antialias=True)
        close(ours[i], tv.horizontal_flip(view) if flips[i] else view, 1e-6)


# -- what it writes

KEYS = "format kind method epoch epochs config data arch width dim encoder classifier history"
KEYS = set(f"{KEYS} source machine".split())


@pytest.fixture(scope="module")
def written(pretrained, tmp_path_factory):
    """A folder with linear.pt and linear.jsonl"""
    out = tmp_path_factory.mktemp("linear")
    assert linear_eval.main([str(pretrained), "--out", str(out), *SHORT]) == 0
    return out


@pytest.fixture
def linear(written):
    return read(written / "linear.pt")


def test_linear_pt_has_what_the_contract_says(linear):
    assert linear.keys() >= KEYS
    assert (linear["format"], linear["kind"], linear["method"]) == (
        "contrastive-cifar/1",
        "linear",
        "moco",
    )
    assert linear["epoch"] == linear["epochs"] == 3


def test_classifier_is_a_linear_layer_from_features_to_classes(linear):
    shapes = {name: tuple(value.shape) for name, value in linear["classifier"].items()}
    assert shapes == {"weight": (10, linear["dim"]), "bias": (10,)}


def test_result_follows_from_the_saved_weights(linear, tiny_npz):
    """Recomputed from the file alone: counts are whole numbers of the 60 test images"""
    arrays = np.load(tiny_npz)
    x = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(linear["data"][name]).view(3, 1, 1) for name in ("mean", "std"))
    weight, bias = linear["classifier"].values()
    logits = load_encoder(linear)((x - mean) / std) @ weight.T + bias
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


def test_again_gives_the_same_to_the_last_bit(probe, linear):
    again = probe()
    assert again["result"] == linear["result"]
    for name, value in linear["classifier"].items():
        assert torch.equal(again["classifier"][name], value)


def test_another_seed_gives_another_classifier(probe, linear):
    other = probe("--seed", "1")["classifier"]["weight"]
    assert not torch.equal(other, linear["classifier"]["weight"])


def test_no_epochs_measure_the_untrained_classifier(probe):
    saved = probe("--epochs", "0")
    assert saved["history"] == [] and (saved["classifier"]["bias"] == 0).all()
    assert saved["result"]["test_loss"] == pytest.approx(math.log(10), abs=0.2)


def test_limit_and_holdout_are_taken_over_or_given(probe):
    data = probe("--limit", "50", "--holdout", "20")["data"]
    assert (data["n_train"], data["n_test"], data["holdout"]) == (50, 20, 20)


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


def test_recipes():
    demo = dict(optimizer="sgd", lr=30.0, weight_decay=0.0, epochs=100, schedule="step")
    report = demo | dict(lr=10.0, batch_size=128)
    lars = dict(optimizer="lars", lr=0.8, batch_size=4096, epochs=90, schedule="cosine")
    for recipe, right in {"demo": demo, "report": report, "fast-moco": lars}.items():
        config = linear_eval.parse_config(["runs/a", "--recipe", recipe])
        assert {name: getattr(config, name) for name in right} == right
        assert config.sgd_momentum == 0.9 and config.mode == "probe" and not config.augment


# -- what it refuses: one line, code 2


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--recipe", "v3"], "v3"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "abc"], "--lr"),
        (["--batch-size", "0"], "--batch-size"),
        (["--epochs", "-1"], "--epochs"),
        (["--epochs", "2.5"], "--epochs"),
        (["--sgd-momentum", "2"], "--sgd-momentum"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--crop-scale", "1,0.5"], "--crop-scale"),
        (["--optimizer", "adam"], "adam"),
        (["--mode", "magic"], "magic"),
        (["--init", "imagenet"], "imagenet"),
        (["--epoch", "3"], "--epoch"),  # no abbreviations
        (["--device", "cuda:99"], "cuda:99"),
        (["--data", "/no/such/data"], "/no/such/data"),
        (["--limit", "1000"], "1000"),
        (["--holdout", "120"], "120"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(pretrained, tmp_path, refused, flags, says):
    refused(linear_eval.main, [pretrained, "--out", tmp_path / "out", *SHORT, *flags], says)
    assert not (tmp_path / "out" / "linear.pt").exists()


def test_no_checkpoint_named(refused):
    refused(linear_eval.main, [], "name at least one")


def test_one_folder_for_two_checkpoints(refused, pretrained, tmp_path):
    refused(linear_eval.main, [pretrained, pretrained, "--out", tmp_path], "--out")


def test_data_of_one_class(pretrained, tmp_path, refused):
    data = write_npz(tmp_path / "one.npz", classes=1)
    refused(linear_eval.main, [pretrained, "--out", tmp_path, "--data", data], "only one class")


@pytest.mark.parametrize("below", ["", "sub"])
def test_out_that_is_a_file(pretrained, tmp_path, refused, below):
    (tmp_path / "file").touch()
    refused(linear_eval.main, [pretrained, "--out", tmp_path / "file" / below, *SHORT], "--out")


def cut(good, path):
    path.write_bytes(good[: len(good) // 2])


def flipped(good, path):
    """One bit, in the middle of the weights: torch.load alone would take it"""
    damaged = bytearray(good)
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)


def foreign(good, path):
    torch.save({"state_dict": {}, "arch": "resnet50"}, path)


def without_encoder(good, path):
    torch.save({"format": "contrastive-cifar/1", "kind": "pretrain"}, path)


class Touch:
    """Pickled code that would leave a file behind"""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def malicious(good, path):
    torch.save({"format": "contrastive-cifar/1", "encoder": Touch(str(path) + ".touched")}, path)


BAD_FILES = {
    "missing": lambda good, path: None,
    "empty": lambda good, path: path.touch(),
    "html": lambda good, path: path.write_text("<!DOCTYPE html><title>Quota exceeded</title>"),
    "folder without a run": lambda good, path: path.mkdir(),
    "cut": cut,
    "one bit flipped": flipped,
    "of another program": foreign,
    "without encoder": without_encoder,
    "malicious": malicious,
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_checkpoints(pretrained, tmp_path, refused, monkeypatch, kind):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not matter
    path = tmp_path / "pretrain.pt"
    BAD_FILES[kind]((pretrained / "pretrain.pt").read_bytes(), path)
    refused(linear_eval.main, [path, "--out", tmp_path / "out", *SHORT], str(path))
    assert not (tmp_path / "pretrain.pt.touched").exists()


def test_weights_of_another_shape(pretrained, tmp_path, refused):
    saved, path = read(pretrained / "pretrain.pt"), tmp_path / "pretrain.pt"
    torch.save(saved | {"arch": "resnet18"}, path)
    refused(linear_eval.main, [path, *SHORT], str(path))


def test_data_that_the_checkpoint_names_and_that_is_gone(pretrained, tmp_path, refused):
    saved, path = read(pretrained / "pretrain.pt"), tmp_path / "pretrain.pt"
    saved["config"]["data"] = saved["data"]["name"] = str(tmp_path / "gone.npz")
    torch.save(saved, path)
    refused(linear_eval.main, [path, *SHORT], "gone.npz")


def test_a_rate_that_makes_it_diverge_is_code_3(pretrained, tmp_path, refused):
    flags = [pretrained, "--out", tmp_path, *SHORT, "--lr", "1e38"]
    refused(linear_eval.main, flags, "lower --lr", code=3)
    assert not (tmp_path / "linear.pt").exists()
