"""simclr.py's method: NT-Xent, in one process and in two, compositions of augmentations, projector,
optimizers, schedule, recipes, the whole step against a reference written from the paper, and what
the other scripts make of its checkpoint. Oracles C1-C4, C25, C26, C29, C30; D2 of section 6.
"""

import copy
import dataclasses
import math
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, USUAL, check_recipe, close
from test_moco import Recorded
from torch import nn

import knn_monitor
import simclr
from simclr import Config, build_encoder, nt_xent, warmup_cosine

SMALL = Config(arch="resnet8", width=4, batch_size=6, head_hidden=7, dim=5, epochs=3)
FLAGS = "--arch resnet8 --width 4 --image-size 16 --knn-k 5 --precision fp32 --device cpu".split()


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def vectors(n=6, dim=7):
    return torch.randn(2, n, dim, dtype=torch.float64, requires_grad=True)


# -- the loss


def equation_1(z1, z2, temperature):
    """As it stands there: 2N views, 2k - 1 and 2k of one image, l(i, j) and l(j, i) of a pair"""
    z = [row / row.square().sum().sqrt() for pair in zip(z1, z2) for row in pair]

    def s(i, j):
        return (z[i] * z[j]).sum() / temperature

    def l(i, j):  # noqa: E743
        others = [s(i, k).exp() for k in range(len(z)) if k != i]
        return -(s(i, j).exp() / sum(others)).log()

    pairs = [(k, k + 1) for k in range(0, len(z), 2)]
    return sum(l(i, j) + l(j, i) for i, j in pairs) / len(z)


def lightlys(temperature):
    return pytest.importorskip("lightly.loss").NTXentLoss(temperature=temperature)


def metric_learnings(temperature):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    return losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=temperature))


PEERS = {
    "equation 1": lambda temperature: lambda *z: equation_1(*z, temperature),
    "lightly": lightlys,
    "pytorch-metric-learning": metric_learnings,
}


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("peer", PEERS)
def test_nt_xent_and_its_gradient_are(peer, temperature):
    z, theirs = vectors(), PEERS[peer](temperature)
    losses = nt_xent(*z, temperature), theirs(*z)
    close(*losses, 1e-12)
    close(*(torch.autograd.grad(loss, z)[0] for loss in losses), 1e-12)


def test_nt_xent_does_not_see_order_length_or_which_view_is_first():
    z1, z2 = vectors().detach()
    right, order, length = nt_xent(z1, z2, 0.5), torch.randperm(6), torch.rand(6, 1) * 1000
    for other in ((z2, z1), (z1[order], z2[order]), (z1 * length, z2)):
        close(nt_xent(*other, 0.5), right, 1e-12)


def test_nt_xent_has_no_term_of_a_view_with_itself():
    """Of identical views, orthogonal to all others, 2N - 2 negatives with cosine 0 are left."""
    z, right = torch.eye(6, dtype=torch.float64), math.log(1 + 10 * math.exp(-1 / 0.3))
    assert nt_xent(z, z, 0.3).item() == pytest.approx(right, abs=1e-12)


def test_nt_xent_of_random_vectors_is_chance():
    """log(2N - 1), and a little for the spread of the similarities"""
    chance = math.log(2 * 512 - 1) + 1 / (2 * 128 * 0.5**2)
    assert nt_xent(*vectors(512, 128), 0.5).item() == pytest.approx(chance, rel=0.01)


def test_nt_xent_is_finite_at_small_temperatures():
    z = vectors().float()
    loss = nt_xent(*z, 0.005)
    assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()


def test_nt_xent_is_computed_in_float32_under_autocast():
    z = vectors().detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(*z, 0.1)
    close(loss.double(), nt_xent(*z.double(), 0.1), 1e-5)


def test_loss_in_bfloat16_is_near_that_in_float32():
    encoder, losses = build_encoder("resnet8", 16), []
    model = nn.Sequential(encoder, simclr.build_projector(encoder.dim, SMALL))
    views = torch.randn(16, 3, 16, 16)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(nt_xent(*model(views).chunk(2), 0.5).item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)


# -- steps of the real training loop


class ShortRun(Recorded, simclr.Run):
    pass


class Reference:
    """Algorithm 1 with SGD, momentum and decay as in its definition, in float64"""

    def __init__(self, config, start):
        self.c, backbone = config, build_encoder(config.arch, config.width)
        sizes = [backbone.dim, config.dim]
        if config.head == "mlp":
            sizes.insert(1, config.head_hidden)
        head = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
        if config.head == "mlp":
            head.insert(1, nn.ReLU())
        self.net = nn.Sequential(backbone, *head).double()
        with torch.no_grad():
            for mine, theirs in zip(self.net.parameters(), start.parameters(), strict=True):
                mine.copy_(theirs)
        self.velocity = [torch.zeros_like(p) for p in self.net.parameters()]

    def step(self, view_1, view_2, lr):
        weights = list(self.net.parameters())
        z = self.net(torch.cat([view_1, view_2]))
        loss = equation_1(z[: len(view_1)], z[len(view_1) :], self.c.temperature)
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, v, gradient in zip(weights, self.velocity, gradients):
                v.copy_(self.c.sgd_momentum * v + gradient + self.c.weight_decay * w)
                w.copy_(w - lr * v)
        return loss.item(), gradients


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_three_steps_are_the_papers(head, monkeypatch):
    """Losses, gradients and weights of train(), with warm-up, decay and momentum"""
    config = small(head=head, lr=0.3, weight_decay=0.01, warmup_epochs=1.25, warmup_start=0.25)
    views = [torch.randn(6, 3, 8, 8, dtype=torch.float64) for _ in range(6)]
    given = iter(views)
    monkeypatch.setattr(simclr, "augment", lambda images, recipe: next(given))
    simclr.train(config, run := ShortRun(config))
    reference = Reference(config, run.initial)
    rates = 0.3 * 0.25, 0.3 * (0.25 + 0.75 * 0.8), 0.3 * (1 + math.cos(math.pi * 3 / 7)) / 2
    for i, lr in enumerate(rates):
        loss, gradients = reference.step(*views[2 * i : 2 * i + 2], lr)
        assert run.losses[i] == pytest.approx(loss, abs=1e-10)
        for ours, theirs in zip(run.gradients[i].values(), gradients, strict=True):
            close(ours, theirs, 1e-10)
    for ours, theirs in zip(run.model.parameters(), reference.net.parameters()):
        close(ours, theirs, 1e-10)


# -- two processes


def two_steps():
    """Of train(), its encoder without batch norm, which would normalise each process's share"""

    def encoder(arch, width):
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Tanh())
        net.dim = 10
        return net

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, "build_encoder", encoder)
        every = lambda *_: torch.randn(6, 3, 8, 8, dtype=torch.float64)
        patch.setattr(simclr, "augment", lambda *_: simclr.shard(every()))
        simclr.train(config := small(epochs=2, lr=0.3), run := ShortRun(config))
    return run.losses, [torch.cat([g.flatten() for g in all_.values()]) for all_ in run.gradients]


def in_process(rank, function, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(function(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_two_processes(function, folder, monkeypatch):
    """What a function returns in each of two processes, forked from one that has torch already"""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    multiprocessing.get_context("forkserver").set_forkserver_preload([function.__module__])
    how = dict(nprocs=2, start_method="forkserver")
    torch.multiprocessing.start_processes(in_process, (function, folder), **how)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path, monkeypatch):
    losses, gradients = two_steps()
    for losses_2, gradients_2 in in_two_processes(two_steps, tmp_path, monkeypatch):
        assert losses_2 == pytest.approx(losses, abs=1e-12)
        for one, two in zip(gradients, gradients_2, strict=True):
            assert F.cosine_similarity(one, two, dim=0).item() == pytest.approx(1, abs=1e-12)
            assert (two.norm() / one.norm()).item() == pytest.approx(1, abs=1e-12)


# -- compositions of augmentations

OFF = dict(crop_scale=(1.0, 1.0), flip=0.0, jitter=(0.0,) * 4, gray=0.0, blur=0.0)
SETTING = dict(crop="crop_scale", flip="flip", color="jitter", gray="gray", blur="blur")


def composed(names):
    return simclr.composition(Config(augment=names, blur=0.5))


@pytest.mark.parametrize("names", ["", *SETTING, "crop,color", "crop,flip,color,gray,blur"])
def test_what_is_not_named_is_off(names):
    own = dataclasses.asdict(Config(augment=names, blur=0.5))
    kept = {SETTING[name]: own[SETTING[name]] for name in filter(None, names.split(","))}
    assert dataclasses.asdict(composed(names)) == own | OFF | kept


@pytest.fixture
def images():
    return torch.randint(0, 256, (40, 3, 9, 9), dtype=torch.uint8)


def views_of(images, names):
    """Views with a composition, and the images themselves, both as pixels in [0, 1]"""
    recipe = dataclasses.replace(composed(names), mean=(0, 0, 0), std=(1, 1, 1))
    return simclr.augment(images, recipe), images / 255


def among(views, *choices):
    """Each view is one of these (of its image), and each of these is the view of some image."""
    off = torch.stack([(views - choice).abs().flatten(1).amax(1) for choice in choices])
    return off.amin(0).max() < 1e-5 and (off.amin(1) < 1e-5).all()


def test_no_augmentation_leaves_the_image(images):
    assert among(*views_of(images, ""))


def test_flip_alone_gives_the_image_or_its_mirror(images):
    views, x = views_of(images, "flip")
    assert among(views, x, x.flip(3))


def test_gray_alone_gives_the_image_or_its_luma(images):
    views, x = views_of(images, "gray")
    luma = (x * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert among(views, x, luma.expand_as(x))


def test_crop_alone_changes_places_and_no_colour(images):
    views, x = views_of(images, "crop")
    plain, same = views_of(images[:, :, :1, :1].expand_as(images), "crop")
    close(plain, same, 1e-5)
    assert (views - x).abs().flatten(1).amax(1).min() > 0.1
    assert views.amax((2, 3)).le(x.amax((2, 3)) + 1e-5).all()


def test_color_alone_changes_colours_and_no_place(images):
    """Two halves of one colour each stay that."""
    halves = images[:, :, :1, :1].expand_as(images).clone()
    halves[:, :, :, 4:] = images[:, :, 1:2, 1:2]
    views, x = views_of(halves, "color")
    for half in (views[..., :4], views[..., 4:]):
        close(half, half[:, :, :1, :1].expand_as(half), 1e-5)
    assert (views - x).abs().amax((1, 2, 3)).gt(0.01).float().mean() > 0.5  # probability 0.8


def test_blur_alone_gives_the_image_or_a_smoother_one(images):
    views, x = views_of(images, "blur")
    same = (views - x).abs().flatten(1).amax(1) < 1e-5
    ratio = views[~same].flatten(1).std(1) / x[~same].flatten(1).std(1)
    assert same.any() and 5 < len(ratio) < 35 and ratio.max() < 1 and ratio.min() < 0.5
    close(views.mean(), x.mean(), 0.01)


def test_unknown_augmentation_is_refused(tiny_npz, tmp_path, refused):
    flags = ["--augment", "crop,rotate", "--epochs", "1", "--batch-size", "40", "--out", tmp_path]
    says = "--augment rotate: takes crop,flip,color,gray,blur"
    refused(simclr.main, [*FLAGS, "--data", tiny_npz, *flags], says)


# -- projector and optimizers


@pytest.mark.parametrize("head, layers", [("linear", [(16, 5)]), ("mlp", [(16, 7), (7, 5)])])
def test_projector(head, layers):
    parts = [
        m for m in simclr.build_projector(16, small(head=head)).modules() if not [*m.children()]
    ]
    linear = [m for m in parts if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == layers
    assert [type(m) for m in parts] == [nn.Linear, nn.ReLU, nn.Linear][: 2 * len(layers) - 1]


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "lars": simclr.LARS}


def optimizer_of(kind, **changes):
    layer = nn.Linear(3, 2).double()
    config = small(optimizer=kind, lr=0.001, weight_decay=0.01, **changes)
    return layer, simclr.build_optimizer(config, layer.parameters())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_has_the_settings(kind):
    _, optimizer = optimizer_of(kind, sgd_momentum=0.8)
    (group,) = optimizer.param_groups
    assert type(optimizer) is OPTIMIZERS[kind]
    assert (group["lr"], group["weight_decay"], group.get("momentum", 0.8)) == (0.001, 0.01, 0.8)
    assert not group.get("nesterov") and not group.get("dampening")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_is_on_all_parameters_but_lars_biases(kind):
    """A gradient that is next to nothing: what moves is moved by the decay."""
    layer, optimizer = optimizer_of(kind)
    before = copy.deepcopy(layer)
    for p in layer.parameters():
        p.grad = torch.full_like(p, 1e-12)
    optimizer.step()
    assert (layer.weight.abs() < before.weight.abs()).all()
    moved = (layer.bias - before.bias).abs().max().item()
    assert moved < 1e-12 if kind == "lars" else moved > 1e-7


# -- the schedule


def test_schedule_is_torchs():
    """A line up for 2 epochs of 7 steps, then half a cosine down, a rate for each step"""
    config = Config(lr=0.06, epochs=10, warmup_epochs=2, warmup_start=0.25)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.06)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, total_iters=14)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 56)
    peer = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [14])
    for step in range(70):
        ours = warmup_cosine(config, step / 7)
        assert ours == pytest.approx(peer.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        peer.step()
    assert 0 < ours < 1e-4


def test_the_rate_changes_with_every_step():
    config = small(epochs=2, warmup_epochs=1)
    simclr.train(config, run := ShortRun(config, torch.zeros(6, 3, 8, 8), 3, torch.float32))
    assert run.rates == [[warmup_cosine(config, step / 3)] for step in range(6)]


def test_schedule_at_its_corners():
    config = Config(lr=0.4, epochs=10, warmup_epochs=2)
    at = {0: 0, 1: 0.2, 2: 0.4, 6: 0.2, 10: 0}
    assert {t: warmup_cosine(config, t) for t in at} == pytest.approx(at, abs=1e-15)
    constant = dataclasses.replace(config, schedule="constant")
    assert [warmup_cosine(constant, t) for t in (1, 2, 9.9)] == [0.2, 0.4, 0.4]
    longer = dataclasses.replace(config, warmup_epochs=20)
    assert warmup_cosine(longer, 9.9) == pytest.approx(0.4 * 9.9 / 20)
    without = Config(lr=0.4, epochs=10)
    assert warmup_cosine(without, 0) == 0.4 and warmup_cosine(without, 9.999) > 0


# -- whole runs


def pretrain(npz, out, *flags):
    more = f"--data {npz} --out {out} --epochs 1 --batch-size 40 --head-hidden 8 --dim 6"
    assert simclr.main([*FLAGS, *more.split(), *flags]) == 0
    return torch.load(out / "pretrain.pt", weights_only=True)


@pytest.fixture(scope="module", params=["", "--head linear"], ids=["mlp", "linear"])
def run(request, tiny_npz, tmp_path_factory):
    """The folder of a finished run, with either projector"""
    out = tmp_path_factory.mktemp("runs") / "simclr"
    pretrain(tiny_npz, out, *request.param.split())
    return out


@pytest.mark.parametrize("features", ["backbone", "head"])
def test_knn_monitor_takes_the_checkpoint(run, features, tmp_path, capsys):
    flags = ["--features", features, "--k", "5", "--device", "cpu", "--out", str(tmp_path)]
    assert knn_monitor.main([str(run), *flags]) == 0, capsys.readouterr().err
    assert f"simclr         1  {features}" in capsys.readouterr().out


def test_the_gallery_has_views_of_the_composition(tiny_npz, tmp_path):
    """Without augmentations, a view is the image."""
    gallery = pretrain(tiny_npz, tmp_path, "--augment", "")["gallery"]
    assert (gallery["views"].int() - gallery["images"].int()).abs().max() <= 1


# -- does it learn?


def learn(augment=simclr.augment, steps=80):
    """Steps on 32 random images with a temperature at which the loss can fall to 0"""
    torch.manual_seed(0)
    changes = dict(width=8, head_hidden=32, dim=16, temperature=0.1, epochs=1, lr=0.1)
    config = small(**changes, augment="flip,color", jitter=(0.1, 0.1, 0.1, 0.02))
    images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    run = ShortRun(config, images, steps, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, "augment", augment)
        simclr.train(config, run)
    return run


@pytest.fixture(scope="module")
def learned():
    return learn()


def test_32_images_are_learned_by_heart(learned):
    assert sum(learned.losses[-5:]) / 5 < 0.1 * learned.losses[0]


def test_embeddings_do_not_collapse(learned):
    z = simclr.unit(learned.model(learned.images / 255 - 0.5))
    assert z.std(0).min() > 0.1 / math.sqrt(16)


def test_nothing_is_learned_from_pairs_of_different_images():
    def mixed(images, recipe, augment=simclr.augment):
        return augment(images, recipe)[torch.randperm(len(images))]

    losses = learn(mixed).losses
    assert sum(losses) / len(losses) > math.log(63) - 0.1


# -- the recipes

CIFAR = USUAL | {  # recipes.md, SimCLR at its best on CIFAR (dkobak); 200 epochs as lightly's table
    "temperature": 0.5,
    "head": "mlp",
    "head_hidden": 1024,
    "dim": 128,
    "optimizer": "sgd",
    "lr": 0.03 * 512 / 256,
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "warmup_epochs": 0.0,
    "warmup_start": 0.0,
    "augment": "crop,flip,color,gray,blur",
    "crop_scale": (0.2, 1.0),
    "flip": 0.5,
    "gray": 0.1,
    "blur": 0.0,
}

REPORT = {  # recipes.md, document 3; crops as in torchvision, weight decay only for the classifier
    "arch": "resnet50",
    "head": "linear",
    "dim": 1024,
    "epochs": 50,
    "batch_size": 200,
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 0.0,
    "schedule": "constant",
    "crop_scale": (0.08, 1.0),
    "gray": 0.2,
}

PAPER = {  # arXiv:2002.05709: sec. 2.1, appendix A and B.9
    "optimizer": "lars",
    "lr": 0.3 * 512 / 256,
    "weight_decay": 1e-6,
    "warmup_epochs": 10.0,
    "crop_scale": (0.08, 1.0),
    "gray": 0.2,
}

CPU = dict(width=16, temperature=0.2, epochs=55, batch_size=256, lr=0.12, warmup_epochs=1.0)
CHANGES = {"cifar": {}, "cpu": CPU, "report": REPORT, "paper": PAPER}


@pytest.mark.parametrize("recipe", CHANGES)
def test_recipe(recipe):
    check_recipe(simclr, recipe, CIFAR | CHANGES[recipe])


def test_every_recipe_is_tested_and_cifar_is_the_default():
    assert CHANGES.keys() == simclr.RECIPES.keys() and simclr.parse_config([]) == Config()
