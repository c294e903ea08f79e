"""fast_moco.py's method: patches and their combinations, Algorithm 1 with each framework against a
reference written from the pseudocode, the other encodings and stages of the supplementary, its cost
and recipes, and what the other scripts make of its checkpoint. Oracles C9-C11, C14-C16, C29, C30.
"""

import contextlib
import copy
import dataclasses
import math
from itertools import combinations

import pytest
import torch
from conftest import USUAL, check_recipe, close
from test_moco import Recorded
from test_simclr import in_two_processes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fast_moco
import knn_monitor
from fast_moco import Config, FastMoCo, build_encoder, combine, ctr, divide

TINY = dict(arch="resnet8", width=3, head_hidden=7, dim=12, predictor_hidden=4, queue_size=9)
SMALL = Config(**TINY, image_size=8, batch_size=6, epochs=3, lr=0.3)
FRAMEWORKS = ["moco", "byol", "simsiam", "nnclr"]


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class ShortRun(Recorded, fast_moco.Run):
    pass


# -- divide and combine


def test_patches_come_column_by_column_each_of_all_images():
    images = torch.tensor([[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]])
    assert divide(images).flatten().tolist() == [1, 5, 3, 7, 2, 6, 4, 8]


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_divide_is_slicing(grid):
    x, s = doubles(5, 3, 12, 12), 12 // grid
    at = [
        (slice(i * s, i * s + s), slice(j * s, j * s + s)) for j in range(grid) for i in range(grid)
    ]
    assert torch.equal(divide(x, grid), torch.cat([x[:, :, rows, columns] for rows, columns in at]))


def test_combine_is_a_constant_matrix_of_rank_4():
    pairs = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    matrix = combine(torch.eye(4, dtype=torch.float64))
    assert torch.equal(matrix, torch.tensor(pairs, dtype=torch.float64) / 2)
    assert torch.linalg.matrix_rank(matrix) == 4


@pytest.mark.parametrize("parts, n", [(4, 1), (4, 2), (4, 3), (4, 4), (9, 2)])
def test_combine_keeps_images_apart(parts, n):
    v = doubles(parts * 5, 6)
    rows = [
        sum(v[part * 5 + image] for part in some) / n
        for some in combinations(range(parts), n)
        for image in range(5)
    ]
    close(combine(v, parts, n), torch.stack(rows), 1e-15)


# -- the loss


def cross_entropy(z, targets, i, temperature):
    """Of row i of z, whose own target is row i of the targets, with cosine similarities"""
    cosines = (z[i] * targets).sum(1) / z[i].norm() / targets.norm(dim=1)
    return -((cosines[i] / temperature).exp() / (cosines / temperature).exp().sum()).log()


def test_ctr_is_the_mean_over_combinations_and_images():
    z_c, z = doubles(3 * 5, 4).requires_grad_(), doubles(5, 4)
    terms = [cross_entropy(part, z, i, 0.3) for part in z_c.split(5) for i in range(5)]
    losses = ctr(z_c, z, 0.3), sum(terms) / 15
    close(*losses, 1e-12)
    close(*(torch.autograd.grad(loss, z_c)[0] for loss in losses), 1e-12)


def test_ctr_of_random_vectors_is_chance():
    """log N, and a little for the spread of the similarities"""
    chance = math.log(512) + 1 / (2 * 128 * 0.2**2)
    assert ctr(doubles(6 * 512, 128), doubles(512, 128), 0.2).item() == pytest.approx(
        chance, rel=0.01
    )


# -- the whole step


class Reference:
    """Algorithm 1, C.1 and Table 1 in loops over patches, combinations and images, in float64"""

    def __init__(self, config, start):
        self.c, backbone = config, build_encoder(config.arch, config.width)
        hidden, dim = config.head_hidden, config.dim
        projector = nn.Sequential(
            *[nn.Linear(backbone.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU()],
            *[nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()],
            *[nn.Linear(hidden, dim), nn.BatchNorm1d(dim)],
        )
        wide = config.predictor_hidden
        predictor = nn.Linear(dim, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, dim)
        self.f_o = nn.Sequential(backbone, projector, nn.Sequential(*predictor)).double()
        with torch.no_grad():
            theirs = start.online.parameters()
            for p, value in zip(self.f_o.parameters(), theirs, strict=True):
                p.copy_(value)
        self.f_t = copy.deepcopy(self.f_o[:2])
        self.velocity = {p: torch.zeros_like(p) for p in self.f_o.parameters()}
        self.queue = [*start.queue.keys] if config.framework == "nnclr" else []

    def online(self, x):
        """-> one z_c (N, C) for each combination"""
        encoder, projector, predictor = self.f_o
        if self.c.encode == "whole":
            return [predictor(projector(encoder(x)))]
        n, h = self.c.parts_combined, x.shape[2] // 2
        upper_left, upper_right = x[:, :, :h, :h], x[:, :, :h, h:]
        lower_left, lower_right = x[:, :, h:, :h], x[:, :, h:, h:]
        v = encoder(torch.cat([upper_left, lower_left, upper_right, lower_right])).split(len(x))
        masks = [mask for mask in range(16) if mask.bit_count() == n]
        c = [sum(v[i] for i in range(4) if mask >> i & 1) / n for mask in masks]
        return predictor(projector(torch.cat(c))).split(len(x))

    def compare(self, z_c, z):
        if self.c.framework in ("byol", "simsiam"):  # squared distance of vectors of length 1
            apart = [z_k / z_k.norm(dim=1, keepdim=True) - z for z_k in z_c]
            return sum((d * d).sum(1).mean() for d in apart) / len(z_c)
        if self.c.framework == "nnclr":
            z = torch.stack([max(self.queue, key=lambda key: float(row @ key)) for row in z])
        rows = range(len(z))
        terms = [cross_entropy(z_k, z, i, self.c.temperature) for z_k in z_c for i in rows]
        return sum(terms) / len(terms)

    def step(self, x1, x2, lr):
        with torch.no_grad():
            f_t = self.f_o[:2] if self.c.framework == "simsiam" else self.f_t
            z1, z2 = (z / z.norm(dim=1, keepdim=True) for z in (f_t(x1), f_t(x2)))
        loss = self.compare(self.online(x1), z2) + self.compare(self.online(x2), z1)
        gradients = dict(zip(self.velocity, torch.autograd.grad(loss, [*self.velocity])))
        norm = sum((g * g).sum() for g in gradients.values()).sqrt()
        scale = min(1, self.c.clip / (norm + 1e-6))  # as torch's clip_grad_norm_ has it
        gradients = {p: scale * g for p, g in gradients.items()}
        with torch.no_grad():
            predictor = {*self.f_o[2].parameters()}
            for p, v in self.velocity.items():
                v.copy_(self.c.sgd_momentum * v + gradients[p] + self.c.weight_decay * p)
                p.sub_((self.c.lr if p in predictor else lr) * v)
            a = self.c.key_momentum
            for slow, p in zip(self.f_t.parameters(), self.f_o[:2].parameters()):
                slow.copy_(a * slow + (1 - a) * p)
        self.queue = [*self.queue, *z1][-self.c.queue_size :]
        return loss.item(), gradients.values()


HOW = {f"{n} of 4": dict(parts_combined=n) for n in (1, 2, 3, 4)} | {"whole": dict(encode="whole")}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture(scope="module", params=HOW)
def both(request, framework):
    """Three steps of train() and of the reference, from the same weights and views"""
    torch.manual_seed(0)
    method = dict(framework=framework, key_momentum=0.8, temperature=0.3) | HOW[request.param]
    config = small(**method, weight_decay=0.01, warmup_epochs=1.0)
    views = [doubles(6, 3, 8, 8) for _ in range(6)]
    given = iter(views)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_moco, "augment", lambda images, recipe: next(given))
        fast_moco.train(config, run := ShortRun(config))
    reference, rates = Reference(config, run.initial), (0.25 * 0.3, 0.3, 0.15)
    return run, reference, [reference.step(*views[2 * i :][:2], rates[i]) for i in range(3)]


def test_steps_have_the_loss_of_algorithm_1(both):
    run, _, steps = both
    assert run.losses == pytest.approx([loss for loss, _ in steps], abs=1e-10)


def test_steps_have_the_gradients_of_algorithm_1(both):
    run, _, steps = both
    for ours, (_, theirs) in zip(run.gradients, steps, strict=True):
        assert max(g.abs().max() for g in ours.values()) > 1e-3
        for a, b in zip(ours.values(), theirs, strict=True):
            close(a, b, 1e-10)


def test_steps_leave_the_weights_of_algorithm_1(both):
    """Those of the slow copy begin as the online ones, and follow after the optimizer's step."""
    run, reference, _ = both
    pairs = [(run.model.online, reference.f_o)]
    if run.config.framework != "simsiam":
        pairs.append((run.model.target, reference.f_t))
    for ours, theirs in pairs:
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(a, b, 1e-10)


def test_steps_leave_the_targets_in_nnclrs_queue(both):
    run, reference, _ = both
    if run.config.framework == "nnclr":
        queue = run.model.queue
        close(queue.keys.roll(-int(queue.pointer), 0), torch.stack(reference.queue), 1e-10)
    else:
        assert not hasattr(run.model, "queue")


# -- the two branches


def test_target_is_a_copy_of_encoder_and_projector_at_the_start():
    model = FastMoCo(SMALL)
    ours, theirs = model.target.state_dict(), model.online[:2].state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert {*map(id, model.target.parameters())}.isdisjoint(map(id, model.online.parameters()))


def test_simsiam_has_no_target():
    assert [name for name, _ in FastMoCo(small(framework="simsiam")).named_children()] == ["online"]


def test_no_gradient_reaches_the_target(framework):
    model = FastMoCo(small(framework=framework)).double()
    loss, z = model(doubles(2, 6, 3, 8, 8))
    loss.backward()
    assert not z.requires_grad and all(p.grad is not None for p in model.online.parameters())
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {f"online.{name}" for name, _ in model.online.named_parameters()}


@pytest.mark.parametrize("arch", ["resnet8", "resnet50"])
def test_each_block_begins_as_the_identity(arch):
    encoder = FastMoCo(small(arch=arch)).online[0]
    blocks = [m for m in encoder.modules() if hasattr(m, "downsample")]
    assert len(blocks) == (3 if arch == "resnet8" else 16)
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 4, 4)
        close(block(x), (block.downsample(x) if block.downsample else x).relu(), 1e-6)


def test_nnclr_takes_the_nearest_under_autocast_too(spy):
    """Cosines of 0.995 and 0.998, which are one number in bfloat16"""
    model, target = FastMoCo(small(framework="nnclr", queue_size=2)), torch.eye(12)[:1]
    cosine = torch.tensor([0.995, 0.998])
    model.queue.keys.zero_()[:, :2] = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)
    calls = spy(fast_moco, "ctr")
    with torch.autocast("cpu", torch.bfloat16):
        fast_moco.compare(model, target, target)
    assert torch.equal(calls[0][0][1], model.queue.keys[1:])


def test_loss_in_bfloat16_is_near_that_in_float32(framework):
    sizes = dict(width=16, head_hidden=64, dim=32, predictor_hidden=32)
    model, views, losses = (
        FastMoCo(small(framework=framework, **sizes)),
        torch.randn(2, 8, 3, 16, 16),
        [],
    )
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(copy.deepcopy(model)(views)[0].item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)


# -- the optimizer


def steps_of(steps=1, **changes):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_moco, "augment", lambda *_: fast_moco.shard(doubles(6, 3, 8, 8)))
        fast_moco.train(config := small(**changes), run := ShortRun(config, steps=steps))
    return run


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_predictors_rate_stays(kind):
    """The others' changes with every step, here of two an epoch."""
    run = steps_of(optimizer=kind, steps=2, epochs=2, lr=0.01)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [1e-4, 1e-4]
    encoder, predictor = zip(*run.rates)
    assert predictor == (0.01,) * 4 and encoder == pytest.approx((0.0025, 0.00625, 0.01, 0.005))
    assert type(run.optimizer) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]


@pytest.mark.parametrize("clip", [0.0, 0.1, 1.0])
def test_the_gradients_norm_is_at_most_clip(clip):
    norms = [
        math.hypot(*map(float, (p.norm() for p in g.values())))
        for g in steps_of(clip=clip).gradients
    ]
    assert norms == pytest.approx([clip] * 3, rel=1e-4) if clip else min(norms) > 1


# -- several views


def compared(spy, views, small_views=0, **changes):
    """-> the loss, and of each comparison: is it with view 1, rows of z_c for an image, loss"""
    calls = spy(fast_moco, "compare")
    model = FastMoCo(small(full_crops=views, small_crops=small_views, **changes)).double()
    samples = [doubles(6, 3, 4, 4) for _ in range(small_views)]
    loss, z = model(doubles(views, 6, 3, 8, 8), samples)
    return loss, [(torch.equal(call[2], z), len(call[1]) // 6, term) for call, term in calls]


@pytest.mark.parametrize(
    "views, small_views, terms",
    [(2, 0, [(False, 6), (True, 6)]), (3, 0, [(False, 6), (True, 6), (True, 6), (False, 6)])]
    + [(2, 2, [(False, 6), (True, 6)] + 2 * [(True, 1), (False, 1)])],
    ids=["two", "three", "two and two small ones"],
)
def test_the_loss_is_twice_the_mean_over_what_predicts_and_other_views(
    spy, views, small_views, terms
):
    """The first two views are the targets, of all but themselves."""
    loss, calls = compared(spy, views, small_views)
    assert sorted(call[:2] for call in calls) == sorted(terms)
    close(loss, 2 * sum(term for *_, term in calls) / len(calls), 1e-12)


OUTPUTS = {
    "divide-combine": 6,
    "divide": 4,
    "sample": 4,
    "sample-combine": 6,
    "montage": 6,
    "whole": 1,
}


@pytest.mark.parametrize("encode", OUTPUTS)
def test_each_encoding_predicts_as_often_as_it_should(spy, encode):
    calls = spy(fast_moco, "compare")
    steps_of(encode=encode, epochs=2)
    assert {len(call[1]) for call, _ in calls} == {OUTPUTS[encode] * 6}
    assert len(calls) == 2 * 2


# -- samples in place of patches (D)


def test_a_small_view_is_a_crop_of_the_scale_and_size_of_a_patch(spy):
    calls, images = (
        spy(fast_moco, "augment"),
        torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8),
    )
    one, two = (fast_moco.small_view(images, SMALL) for _ in range(2))
    assert one.shape == (6, 3, 4, 4) and (one - two).abs().amax((1, 2, 3)).min() > 0.01
    assert [recipe for (_, recipe), _ in calls] == 2 * [small(crop_scale=(0.05, 0.25))]
    close(one, calls[0][1].unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), 1e-6)


def test_samples_are_dealt_out_to_the_views():
    samples = [torch.full((6, 3, 4, 4), float(i)) for i in range(8)]
    views = [torch.zeros(6, 3, 8, 8)] * 2
    seen, left = fast_moco.variant_inputs(small(encode="sample"), views, samples)
    assert [x.shape for x in seen] == [(24, 3, 4, 4)] * 2 and left == []
    assert sorted(torch.cat(seen)[::6, 0, 0, 0].tolist()) == [*range(8)]


# -- montages (D)


@pytest.fixture
def glass():
    """An encoder that changes nothing, and the images that it sees"""
    encoder, seen = build_encoder("resnet8"), []
    for name, _ in encoder.named_children():
        setattr(encoder, name, nn.Identity())
    encoder.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return encoder, seen


def test_montages_of_patches_that_stay_are_the_images(glass, monkeypatch):
    encoder, seen = glass
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n, device=device))
    fast_moco.montage(encoder, divide(x := doubles(5, 3, 8, 8)), 2)
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("grid", [2, 3])
def test_montages_are_of_different_images_each_patch_at_its_place(glass, grid):
    encoder, seen = glass
    number = torch.arange(32.0)[:, None, None, None].expand(32, 1, 6, 6)
    fast_moco.montage(encoder, divide(number, grid), grid)
    orders = divide(seen[0], grid)[:, 0, 0, 0].view(grid**2, 32).tolist()
    assert len({*map(tuple, orders), (*range(32),)}) == grid**2 + 1
    assert all(sorted(order) == [*range(32)] for order in orders)
    place = divide(torch.arange(36.0).view(1, 1, 6, 6).expand(32, 1, 6, 6), grid)
    fast_moco.montage(encoder, place, grid)
    assert (seen[1] == torch.arange(36.0).view(6, 6)).all()


@pytest.mark.parametrize("grid", [2, 3])
def test_montages_come_apart_in_order(glass, grid):
    patches = divide(doubles(7, 3, 6, 6), grid)
    close(fast_moco.montage(glass[0], patches, grid), patches.mean((2, 3)), 1e-12)


# -- other stages to combine at (C.5)


def test_stitching_all_patches_of_an_image_gives_its_halves():
    x = doubles(5, 3, 8, 6)
    upright, lying = fast_moco.stitch(divide(x))
    assert torch.equal(upright, torch.cat([x[..., :3], x[..., 3:]]))
    assert torch.equal(lying, torch.cat([x[:, :, :4], x[:, :, 4:]]))


STAGES = ["input", "stage1", "stage2", "stage3", "final", "proj", "pred"]


@pytest.mark.parametrize("stage", STAGES)
def test_combining_at_a_stage_is_what_the_supplementary_says(stage):
    """Up to stage 3 maps are put together, two upright and two lying pairs; then pairs averaged.
    Batch norm in eval mode, so that each image is on its own.
    """
    model, x = FastMoCo(small(combine_at=stage)).double().eval(), doubles(5, 3, 8, 8)
    encoder, projector, predictor = model.online
    modules = [nn.Sequential(encoder.conv1, encoder.bn1, nn.ReLU(), encoder.layer1)]
    modules += [encoder.layer2, encoder.layer3, lambda m: m.mean((2, 3)), projector, predictor]
    at, rows = STAGES.index(stage), []
    pieces = [x[:, :, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]  # line by line
    for module in modules[:at]:
        pieces = [module(piece) for piece in pieces]
    upper_left, upper_right, lower_left, lower_right = pieces
    if at < 4:
        pieces = [
            torch.cat(pair, 2) for pair in ((upper_left, lower_left), (upper_right, lower_right))
        ]
        pieces += [
            torch.cat(pair, 3) for pair in ((upper_left, upper_right), (lower_left, lower_right))
        ]
    else:
        order = upper_left, lower_left, upper_right, lower_right
        pieces = [(a + b) / 2 for a, b in combinations(order, 2)]
    for module in modules[at:]:
        pieces = [module(piece) for piece in pieces]
    rows = model.predict(divide(x), 4)
    assert len(rows) == 5 * (4 if at < 4 else 6)
    close(rows, torch.cat(pieces), 1e-12)


def test_where_nothing_lies_between_both_ways_to_predict_are_one():
    model, x = FastMoCo(SMALL).double(), divide(doubles(5, 3, 8, 8))
    model.online[1] = nn.Identity()
    right = model.predict(x, 4)
    model.config = small(combine_at="proj")
    close(model.predict(x, 4), right, 1e-12)


# -- settings that do not go together

REFUSED = {
    "--image-size 15": "--image-size 15 must be a multiple of --grid 2",
    "--image-size 16 --grid 3 --encode montage": "--image-size 16 must be a multiple of --grid 3",
    "--parts-combined 5": "--parts-combined 5: of 4 patches",
    "--full-crops 1": "--full-crops 1: two views at least",
    "--combine-at stage2 --encode whole": "--combine-at is for pairs of 2x2 patches",
    "--combine-at proj --parts-combined 3": "--combine-at is for pairs of 2x2 patches",
    "--combine-at input --grid 4": "--combine-at is for pairs of 2x2 patches",
    "--encode sample --small-crops 2": "--small-crops goes with views that are divided",
}

FLAGS = "--arch resnet8 --width 4 --head-hidden 8 --dim 6 --predictor-hidden 5 --batch-size 40"
FLAGS = f"{FLAGS} --image-size 16 --epochs 2 --knn-k 5 --precision fp32 --device cpu".split()


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_go_together_is_refused(flags, tiny_npz, tmp_path, refused):
    more = ["--data", tiny_npz, "--out", tmp_path / "run", *flags.split()]
    refused(fast_moco.main, [*FLAGS, *more], REFUSED[flags])
    assert not (tmp_path / "run").exists()


# -- its cost


def flops(**changes):
    """Of a forward and backward pass at full size, on a device that only knows shapes"""
    with torch.device("meta"):
        model, views = FastMoCo(Config(**changes)), torch.empty(2, 4, 3, 32, 32)
        with FlopCounterMode(display=False) as counter:
            model(views)[0].backward()
    return counter.get_total_flops()


def test_patches_cost_what_whole_views_cost(monkeypatch):
    """A few percent more: projector and predictor see six times as many rows."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # no meta
    assert flops() / flops(encode="whole") == pytest.approx(1.076, abs=5e-4)  # 4 images; 512: 1.081


# -- two processes


def two_steps_each():
    """Of train() with each framework, without batch norm, which normalises each process's share"""

    def encoder(arch, width):
        net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.dim = 12
        return net

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_moco, "build_encoder", encoder)
        patch.setattr(nn, "BatchNorm1d", lambda features: nn.Identity())
        runs = [steps_of(framework=name, epochs=2) for name in FRAMEWORKS]
        runs.append(steps_of(epochs=2, small_crops=1, full_crops=3))
    return [(run.losses, run.gradients) for run in runs]


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path, monkeypatch):
    one = two_steps_each()
    for two in in_two_processes(two_steps_each, tmp_path, monkeypatch):
        for (losses, gradients), (losses_2, gradients_2) in zip(one, two, strict=True):
            assert losses_2 == pytest.approx(losses, abs=1e-12)
            for a, b in zip(gradients, gradients_2, strict=True):
                for name in a:
                    close(a[name], b[name], 1e-12)


# -- does it learn?


def test_16_images_are_learned_by_heart_and_embeddings_do_not_collapse():
    """With little augmentation, and a temperature at which the loss can fall to 0"""
    config = small(width=8, head_hidden=32, dim=16, predictor_hidden=16, temperature=0.05)
    views = dict(crop_scale=(1.0, 1.0), flip=0.0, jitter=(0.1, 0.1, 0.1, 0.02), gray=0.0)
    how = dict(epochs=1, lr=0.1, warmup_epochs=0.0, schedule="constant", key_momentum=0.8)
    config = dataclasses.replace(config, **views, **how)
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    fast_moco.train(config, run := ShortRun(config, images, 50, torch.float32))
    assert sum(run.losses[-5:]) / 5 < 0.1 * run.losses[0]
    z = run.model.target_embed(fast_moco.augment(images, config))
    assert z.std(0).min() > 0.1 / math.sqrt(16)


# -- its checkpoint


@pytest.fixture(scope="module")
def run(tiny_npz, tmp_path_factory):
    """The folder of a finished run"""
    out = tmp_path_factory.mktemp("runs") / "fast-moco"
    assert fast_moco.main([*FLAGS, "--data", str(tiny_npz), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("features", ["backbone", "head"])
def test_knn_monitor_takes_the_checkpoint(run, features, tmp_path, capsys):
    flags = ["--features", features, "--k", "5", "--device", "cpu", "--out", str(tmp_path)]
    assert knn_monitor.main([str(run), *flags]) == 0, capsys.readouterr().err
    assert f"fast-moco      2  {features}" in capsys.readouterr().out


def test_the_checkpoint_holds_the_online_encoder_and_projector(run):
    checkpoint = torch.load(run / "pretrain.pt", weights_only=True)
    about = checkpoint["config"]
    model = FastMoCo(Config(**about | {name: tuple(about[name]) for name in ("mean", "std")}))
    for part, name in zip(model.online, ("encoder", "head")):
        part.load_state_dict(checkpoint[name])


# -- the recipes

CIFAR = (
    USUAL
    | {  # recipes.md, document 2: Table 1 and the authors' repository; T, blur, crops our own
        "framework": "moco",
        "encode": "divide-combine",
        "grid": 2,
        "parts_combined": 2,
        "combine_at": "final",
        "full_crops": 2,
        "small_crops": 0,
        "temperature": 0.2,
        "key_momentum": 0.99,
        "head_hidden": 2048,
        "dim": 2048,
        "predictor_hidden": 512,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "clip": 1.0,
        "schedule": "cosine",
        "warmup_epochs": 1.0,
        "warmup_start": 0.025 / 0.1,
        "crop_scale": (0.2, 1.0),
        "flip": 0.5,
        "gray": 0.2,
        "blur": 0.0,
    }
)

CHANGES = {
    "cifar": {},
    "cpu": dict(width=16, head_hidden=256, dim=128, predictor_hidden=64)
    | dict(epochs=40, batch_size=256, lr=0.4),
    "paper": dict(epochs=100, temperature=1.0, blur=0.5),  # Table 1
    "paper-20": dict(epochs=20, lr=0.15, temperature=1.0, blur=0.5),  # Table 1, second column
    "adamw": dict(optimizer="adamw", lr=1e-3, weight_decay=0.05),  # C.4 has no figures: ours
    "vit": dict(arch="vit-tiny", encode="whole", head_hidden=4096, dim=256, predictor_hidden=4096)
    | dict(epochs=300, optimizer="adamw", lr=1.5e-4 * 512 / 256, weight_decay=0.1, clip=0.0)
    | dict(warmup_epochs=40.0, warmup_start=0.0),  # MoCo v3, sec. 5, and its authors' code
}


@pytest.mark.parametrize("recipe", CHANGES)
def test_recipe(recipe):
    check_recipe(fast_moco, recipe, CIFAR | CHANGES[recipe])


def test_every_recipe_is_tested_and_cifar_is_the_default():
    assert CHANGES.keys() == fast_moco.RECIPES.keys() and fast_moco.parse_config([]) == Config()
