"""moco_cifar.py's method: loss, queue, moving average, batch norm in groups, encoder, schedule, and
the whole step against a reference written from the paper. Oracles C5-C13, C25, C29, C30. What the
tests of the other methods need too, the recorded training loop, is here as well.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import USUAL, check_recipe, close
from torch import nn

import moco_cifar as moco
from moco_cifar import Config, MoCo, Queue, SplitBatchNorm, build_encoder, info_nce, momentum_update

SMALL = Config(arch="resnet8", width=4, batch_size=8, bn_splits=2, queue_size=20, dim=6)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def build(**changes):
    """A model for 8 images, and in its forward pass no need to say which they are"""
    model = MoCo(small(**changes), 8)
    model.forward = functools.partial(model.forward, rows=torch.arange(8))
    return model


def unit_rows(n, dim):
    return F.normalize(torch.randn(n, dim, dtype=torch.float64), dim=1)


def views(n=8, size=8):
    return torch.randn(2, n, 3, size, size, dtype=torch.float64)


# -- the loss


@pytest.fixture
def qkn():
    """Queries and keys (5, 7), a queue of 11"""
    return unit_rows(5, 7), unit_rows(5, 7), unit_rows(11, 7)


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist()))


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_info_nce_is_equation_1(qkn, temperature):
    q, k, queue = qkn
    losses = []
    for i in range(5):
        positive = math.exp(dot(q[i], k[i]) / temperature)
        negatives = sum(math.exp(dot(q[i], row) / temperature) for row in queue)
        losses.append(-math.log(positive / (positive + negatives)))
    assert info_nce(q, k, queue, temperature).item() == pytest.approx(sum(losses) / 5, abs=1e-12)


def test_info_nce_is_lightlys(qkn):
    ntxent = pytest.importorskip("lightly.loss.ntx_ent_loss").NTXentLoss
    q, k, queue = qkn
    peer = ntxent(temperature=0.2, memory_bank_size=(11, 7))
    peer.memory_bank.bank = queue
    close(info_nce(q, k, queue, 0.2), peer(q, k), 1e-12)


def test_info_nce_has_the_gradient_of_the_equation(qkn):
    q, k, queue = qkn
    q.requires_grad_()
    (ours,) = torch.autograd.grad(info_nce(q, k, queue, 0.1), q)
    share = (torch.cat([(q * k).sum(1)[:, None], q @ queue.T], dim=1) / 0.1).softmax(1)
    theirs = ((share[:, :1] - 1) * k + share[:, 1:] @ queue) / 0.1 / len(q)
    close(ours, theirs.detach(), 1e-12)


def test_info_nce_of_random_vectors_is_chance():
    """log(1 + K), and a little for the spread of the similarities"""
    q, k, queue = (unit_rows(n, 128) for n in (8192, 8192, 4096))
    chance = math.log(1 + 4096) + 1 / (2 * 128 * 0.1**2)
    assert info_nce(q, k, queue, 0.1).item() == pytest.approx(chance, rel=0.01)


def test_info_nce_is_finite_at_small_temperatures(qkn):
    assert info_nce(*(x.float() for x in qkn), 0.005).isfinite()


def test_info_nce_is_computed_in_float32_under_autocast(qkn):
    q, k, queue = (x.float() for x in qkn)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(q, k, queue, 0.1)
    close(loss, info_nce(q, k, queue, 0.1), 1e-6)


# -- the queue


@pytest.mark.parametrize("seed", range(8))
def test_queue_is_first_in_first_out(seed):
    """Batches that don't divide K, of K keys, and of more: the oldest leave, the order stays."""
    torch.manual_seed(seed)
    queue, right = Queue(10, 2), collections.deque(maxlen=10)
    right.extend(queue.keys.tolist())
    sizes = [*torch.randint(1, 10, (12,)).tolist(), 10, 3, 11, 25, 30, 7]
    for i in torch.randperm(len(sizes)):
        keys = torch.randn(sizes[i], 2)
        queue.enqueue(keys)
        right.extend(keys.tolist())
        assert queue.keys.roll(-int(queue.pointer), 0).tolist() == list(right)


def test_queue_starts_as_random_unit_vectors():
    keys = Queue(500, 16).keys
    close(keys.norm(dim=1), torch.ones(500), 1e-6)
    assert keys.mean(0).abs().max() < 5 / math.sqrt(500 * 16)


def test_queue_is_part_of_the_state():
    assert set(Queue(4, 2).state_dict()) == {"keys", "pointer"}


# -- the moving average


@pytest.fixture
def encoders():
    """Two different nets with parameters and buffers, in float64"""
    return [build_encoder("resnet8", 4).double() for _ in range(2)]


def test_momentum_update_in_closed_form(encoders):
    """After n updates toward a constant q:  k_n = m^n k_0 + (1 - m^n) q"""
    q, k = encoders
    start = [p.clone() for p in k.parameters()]
    for _ in range(7):
        momentum_update(q, k, 0.9)
    for now, k_0, q_0 in zip(k.parameters(), start, q.parameters()):
        close(now, 0.9**7 * k_0 + (1 - 0.9**7) * q_0, 1e-14)


def test_momentum_update_is_torchs(encoders):
    q, k = encoders
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    peer = torch.optim.swa_utils.AveragedModel(k, multi_avg_fn=ema, use_buffers=False)
    peer.n_averaged += 1  # or else its first update copies
    for _ in range(3):
        for p in q.parameters():
            p.data += 0.1
        momentum_update(q, k, 0.99)
        peer.update_parameters(q)
    for ours, theirs in zip(k.parameters(), peer.module.parameters()):
        close(ours, theirs, 1e-14)


def test_momentum_update_leaves_the_buffers_and_the_query_encoder(encoders):
    q, k = encoders
    for encoder in encoders:
        encoder(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    right = copy.deepcopy(dict(k.named_buffers())) | copy.deepcopy(q.state_dict())
    before = copy.deepcopy(dict(k.named_buffers())), copy.deepcopy(q.state_dict())
    assert right and not torch.equal(k.bn1.running_mean, q.bn1.running_mean)
    momentum_update(q, k, 0.5)
    for then, now in zip(before, (dict(k.named_buffers()), q.state_dict())):
        assert all(torch.equal(then[name], now[name]) for name in then)


def test_key_encoder_starts_as_the_query_encoder():
    model = build()
    q, k = model.encoder_q.state_dict(), model.encoder_k.state_dict()
    assert q.keys() == k.keys() and all(torch.equal(q[name], k[name]) for name in q)
    assert not {p.data_ptr() for p in model.encoder_q.parameters()} & {
        p.data_ptr() for p in model.encoder_k.parameters()
    }


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_gradient_reaches_keys_or_queue(symmetric):
    model = build(symmetric=symmetric).double()
    loss, keys = model(*views())
    loss.backward()
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert not keys.requires_grad and not model.queue.keys.requires_grad


def test_loss_in_bfloat16_is_near_that_in_float32():
    model, (im_q, im_k), losses = build(width=16), views(8, 16).float(), []
    for enabled in (False, True):
        torch.manual_seed(0)  # the same shuffle
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(copy.deepcopy(model)(im_q, im_k)[0].item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], abs=0.01)  # C30


def test_keys_are_float32_unit_vectors_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        keys = build()(*views().float())[1]
    close(keys.norm(dim=1), torch.ones(8), 1e-6)  # fails in bfloat16, by its type too


# -- batch norm in groups


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def norms(request, monkeypatch):
    """SplitBatchNorm(6, 4), a BatchNorm2d for each of its groups, and what makes images for them"""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param)
    split = SplitBatchNorm(6, 4).double()
    nn.init.normal_(split.weight)
    nn.init.normal_(split.bias)
    plain = [nn.BatchNorm2d(6).double() for _ in range(4)]
    for norm in plain:
        norm.load_state_dict(split.state_dict())

    def images(n=12):
        x = 3 * torch.randn(n, 6, 5, 5, dtype=torch.float64) + torch.arange(n).view(n, 1, 1, 1)
        return x.to(memory_format=torch.channels_last)

    return split, plain, images


def test_split_batch_norm_is_a_batch_norm_for_each_group(norms, spy):
    """Output and gradients; its running statistics are the mean of the groups'."""
    split, plain, images = norms
    for _ in range(3):
        x, calls = images().requires_grad_(), spy(F, "batch_norm")  # which branch is it?
        ours, channels = split(x), calls[0][0][0].shape[1]
        theirs = torch.cat([norm(part) for norm, part in zip(plain, x.split(3))])
        close(ours, theirs, 1e-12)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert channels == (4 * 6 if torch.compiler.is_compiling() else 6)
    weights, of_plain = torch.randn_like(ours), [p for norm in plain for p in norm.parameters()]
    found = torch.autograd.grad((ours * weights).sum(), [x, *split.parameters()])
    dx, *rest = torch.autograd.grad((theirs * weights).sum(), [x, *of_plain])
    for ours, theirs in zip(found, (dx, sum(rest[::2]), sum(rest[1::2])), strict=True):
        close(ours, theirs, 1e-12)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in plain]).mean(0)
        close(getattr(split, name), mean, 1e-12)
    assert split.num_batches_tracked == 3


def test_split_batch_norm_in_eval_mode_is_ordinary(norms):
    split, (plain, *_), images = norms
    split(images())
    plain.load_state_dict(split.state_dict())
    x = images(5)  # any number of images
    assert torch.equal(split.eval()(x), plain.eval()(x))


def test_one_split_is_ordinary_batch_norm(norms):
    one, plain, x = SplitBatchNorm(6, 1).double(), nn.BatchNorm2d(6).double(), norms[2]()
    assert torch.equal(one(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), plain.buffers()))


def test_split_batch_norm_is_the_view_trick_of_the_official_demo(norms):
    """There the groups are x[s::splits]; here they are contiguous, as a GPU's share would be."""
    split, _, images = norms
    x, (mean, var) = (
        images().contiguous(),
        (b.repeat(4) for b in (split.running_mean, split.running_var)),
    )
    rest = split.weight.repeat(4), split.bias.repeat(4), True, 0.1, 1e-5
    official = F.batch_norm(x.view(3, 24, 5, 5), mean, var, *rest).view(12, 6, 5, 5)
    order = torch.arange(12).view(3, 4).T.flatten()
    close(split(x[order]), official[order], 1e-12)
    close(split.running_var, var.view(4, 6).mean(0), 1e-12)


@pytest.fixture
def shuffled(monkeypatch):
    """shuffled(model, permutation, im_q, im_k) -> loss and keys of a copy that shuffles so"""

    def forward(model, permutation, im_q, im_k):
        monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: torch.tensor(permutation))
        with torch.no_grad():
            return copy.deepcopy(model)(im_q, im_k)

    return forward


ORDERS = [0, 1, 2, 3, 4, 5, 6, 7], [3, 6, 0, 5, 1, 7, 4, 2]


def test_every_key_is_of_its_own_image(shuffled):
    """In eval mode no image meets another, so shuffling back must restore every row."""
    model, (im_q, im_k) = build().double().eval(), views()
    right = F.normalize(model.encoder_k(im_k), dim=1)
    close(shuffled(model, ORDERS[1], im_q, im_k)[1], right, 1e-12)


def test_with_one_group_the_shuffle_changes_nothing(shuffled):
    model, images = build(bn_splits=1).double(), views()
    (loss, keys), (loss_2, keys_2) = (shuffled(model, order, *images) for order in ORDERS)
    close(loss, loss_2, 1e-12)
    close(keys, keys_2, 1e-12)


def test_with_two_groups_a_key_meets_other_images(shuffled):
    model, images = build(bn_splits=2).double(), views()
    (_, keys), (_, keys_2) = (shuffled(model, order, *images) for order in ORDERS)
    assert (keys - keys_2).norm(dim=1).min() > 1e-3


def test_without_the_shuffle_a_key_meets_the_images_of_its_query(spy):
    calls, model, (im_q, im_k) = spy(torch, "randperm"), build(shuffle=False).double(), views()
    right = F.normalize(copy.deepcopy(model.encoder_k)(im_k), dim=1)  # groups as they come
    close(model(im_q, im_k)[1], right, 1e-12)
    assert not calls


def test_the_shuffle_is_another_each_time(spy):
    calls, model = spy(torch, "randperm"), build(batch_size=32).double()
    for _ in range(3):
        model(*views(32))
    assert len({tuple(order.tolist()) for _, order in calls}) == 3


@pytest.mark.parametrize("batch_size, bn_splits, near", [(10, 4, 8), (6, 8, 16), (4, 4, 8)])
def test_a_batch_that_the_groups_do_not_divide_is_refused(batch_size, bn_splits, near):
    """Of one image alone there is no batch norm."""
    with pytest.raises(moco.UserError, match=rf"{bn_splits}: .*\b{near}\b"):
        moco.check_method(small(batch_size=batch_size, bn_splits=bn_splits))


@pytest.mark.parametrize("mechanism", moco.MECHANISMS)
def test_a_mechanism_without_a_second_loss_refuses_symmetric(mechanism):
    with pytest.raises(moco.UserError, match=f"--symmetric: --mechanism {mechanism} has no"):
        moco.check_method(small(mechanism=mechanism, symmetric=True))


# -- the encoder


def torchvision_twin(encoder, arch):
    """torchvision's own network with our weights: only the stem is replaced, only fc is missing."""
    twin = getattr(torchvision.models, arch)()
    twin.conv1, twin.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    missing, unexpected = twin.load_state_dict(encoder.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    twin.fc = nn.Identity()
    return twin


@pytest.mark.parametrize("arch, dim", [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_encoder_is_torchvisions(arch, dim):
    encoder, x = build_encoder(arch).eval(), torch.randn(2, 3, 16, 16)
    twin = torchvision_twin(encoder, arch).eval()
    with torch.no_grad():
        features = encoder(x)
        assert torch.equal(features, twin(x))
    assert features.shape == (2, dim) and encoder.dim == dim


@pytest.mark.parametrize("arch, factor", [("resnet8", 4), ("resnet18", 8), ("resnet50", 32)])
def test_width_scales_the_encoder(arch, factor):
    encoder = build_encoder(arch, 6).eval()
    assert encoder.dim == 6 * factor and encoder(torch.randn(1, 3, 8, 8)).shape == (1, 6 * factor)


def test_resnet8_is_three_stages_of_one_block():
    convolutions = [m for m in build_encoder("resnet8", 4).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 3 * 2 + 2  # stem, blocks, two shortcuts that change the width
    assert [m.stride[0] for m in convolutions] == [1, 1, 1, 2, 1, 2, 2, 1, 2]


def test_encoder_starts_as_torchvisions_does():
    for module in build_encoder("resnet18").modules():
        if isinstance(module, nn.Conv2d):
            deviation = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


@pytest.mark.parametrize("head, layers", [("linear", [(16, 6)]), ("mlp", [(16, 9), (9, 6)])])
def test_head(head, layers):
    head = build(head=head, head_hidden=9).encoder_q[1]
    linear = [m for m in head if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == layers
    assert [type(m) for m in head] == [nn.Linear, nn.ReLU, nn.Linear][: 2 * len(layers) - 1]


# -- the schedule


@pytest.mark.parametrize("epochs", [5, 35, 45, 100, 200])
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_learning_rate_is_torchs(schedule, epochs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.06)
    peer, milestones = torch.optim.lr_scheduler, [epochs * 3 // 5, epochs * 4 // 5]
    if schedule == "cosine":
        peer = peer.CosineAnnealingLR(optimizer, epochs)
    else:
        peer = peer.MultiStepLR(optimizer, milestones)
    config = Config(lr=0.06, epochs=epochs, schedule=schedule)
    for epoch in range(epochs):
        ours, (theirs,) = moco.learning_rate(config, epoch), peer.get_last_lr()
        assert ours == pytest.approx(theirs, rel=1e-11) and ours > 0
        optimizer.step()
        peer.step()


# -- the whole step


class Reference:
    """Algorithm 1 as in the paper: `gpus` devices, each with a plain batch norm of its own on its
    share of the batch; the queue a list, oldest key first; the moving average and the optimizer
    parameter by parameter. Weights live in dicts, the network is only their form. And the two
    other mechanisms of Figure 2: the queue is the memory bank; end-to-end, queries make the keys.
    """

    def __init__(self, config, weights, queue, rows):
        self.c, self.gpus, self.queue, self.rows = config, config.bn_splits, [*queue], rows.tolist()
        hidden = config.head_hidden if config.head == "mlp" else None
        backbone = build_encoder(config.arch, config.width)
        head = [nn.Linear(backbone.dim, hidden or config.dim)]
        head += [nn.ReLU(), nn.Linear(hidden, config.dim)] if hidden else []
        self.net = nn.Sequential(backbone, nn.Sequential(*head)).double().train()
        names = dict(self.net.named_parameters())
        self.q = {name: weights[name].clone().requires_grad_() for name in names}
        self.k = {name: weights[name].clone() for name in names}
        self.velocity = {name: torch.zeros_like(weights[name]) for name in names}
        statistics = {name: b for name, b in weights.items() if name not in names}
        self.statistics = {
            which: [copy.deepcopy(statistics) for _ in range(self.gpus)] for which in "qk"
        }

    def embed(self, which, x):
        parameters, shares = getattr(self, which), x.split(len(x) // self.gpus)
        rows = []
        for own, share in zip(self.statistics[which], shares):
            rows.append(torch.func.functional_call(self.net, parameters | own, share))
        rows = torch.cat(rows)
        return rows / rows.square().sum(1, keepdim=True).sqrt()

    def loss(self, im_q, im_k, draw):
        """draw: the shuffle, or the images whose keys in the bank are the negatives"""
        q, k, end_to_end = self.embed("q", im_q), {}, self.c.mechanism == "end-to-end"
        if self.c.mechanism == "memory-bank":
            k = dict(enumerate(self.queue[row] for row in self.rows))
        else:
            with torch.set_grad_enabled(end_to_end):
                shuffled = self.embed("q" if end_to_end else "k", im_k[draw])
            k = dict(zip(draw.tolist(), shuffled))
        total = 0
        for i in range(len(q)):
            negatives = self.queue
            if end_to_end:
                negatives = [k[j] for j in k if j != i]
            elif self.c.mechanism == "memory-bank":
                negatives = [self.queue[j] for j in draw.tolist()]
            similarity = torch.stack([q[i] @ other for other in (k[i], *negatives)])
            total -= (similarity / self.c.temperature).log_softmax(0)[0]
        keys = q if self.c.mechanism == "memory-bank" else [k[i] for i in range(len(q))]
        return total / len(q), [key.detach() for key in keys]

    def step(self, im_q, im_k, draws, lr):
        for name, k in self.k.items():
            k.copy_(self.c.key_momentum * k + (1 - self.c.key_momentum) * self.q[name].detach())
        loss, keys = self.loss(im_q, im_k, draws[0])
        if self.c.symmetric:
            loss_2, keys_2 = self.loss(im_k, im_q, draws[1])
            loss, keys = loss + loss_2, keys + keys_2
        gradients = dict(zip(self.q, torch.autograd.grad(loss, [*self.q.values()])))
        for name, q in self.q.items():
            v, g = self.velocity[name], gradients[name] + self.c.weight_decay * q.detach()
            v.copy_(self.c.sgd_momentum * v + g)
            q.data -= lr * v
        if self.c.mechanism == "memory-bank":
            for row, key in zip(self.rows, keys):
                self.queue[row] = key
        else:
            self.queue = [*self.queue, *keys][-self.c.queue_size :]
        return loss.item(), gradients


class Recorded:
    """Goes before a script's Run: the real one without data set and folder. Each epoch is so many
    times the same batch; losses, gradients, rates, and the model at the start are kept.
    """

    def __init__(self, config, images=None, steps=1, dtype=torch.float64):
        self.config, self.steps, self.step, self.dtype = config, steps, 0, dtype
        self.images = torch.zeros(config.batch_size, 3, 8, 8) if images is None else images
        self.rows = torch.arange(len(self.images))  # those of the batch
        self.scaler, self.loss = torch.amp.GradScaler("cpu", enabled=False), torch.zeros(())
        self.losses, self.gradients, self.rates = [], [], []

    def start(self, model, online, optimizer, chance, clip=0.0):
        self.model, self.online, self.optimizer = model.to(self.dtype), online, optimizer
        self.initial = copy.deepcopy(model)
        optimizer.register_step_pre_hook(self.before_step)
        return moco.SharedOptimizer(optimizer, self.scaler, clip)

    def batches(self):
        while self.step < self.config.epochs * self.steps:
            yield self.step // self.steps, moco.shard(self.images[self.rows])
            self.step += 1

    def autocast(self):
        return contextlib.nullcontext()

    def record(self, loss):
        self.losses.append(loss.item())
        return super().record(loss)

    def before_step(self, *_):
        learned = self.online.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in learned})
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])


class ShortRun(Recorded, moco.Run):
    pass


CASES = {
    "asymmetric": {},
    "symmetric": dict(symmetric=True),
    "mlp": dict(head="mlp", head_hidden=7),
    "symmetric mlp": dict(symmetric=True, head="mlp", head_hidden=7),
    "queue smaller than a step": dict(symmetric=True, queue_size=13),
    "ordinary batch norm": dict(bn_splits=1),
    "four groups": dict(bn_splits=4, schedule="step"),
    "memory bank": dict(mechanism="memory-bank"),
    "end to end": dict(mechanism="end-to-end"),
    "end to end mlp": dict(mechanism="end-to-end", head="mlp", head_hidden=7),
}


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """Three steps of train() and of the reference, from the same weights, views and shuffles"""
    torch.manual_seed(0)
    settings = dict(lr=0.3, epochs=3, weight_decay=0.01, key_momentum=0.8, temperature=0.3)
    run = ShortRun(config := small(**settings | CASES[request.param]), torch.zeros(30, 3, 8, 8))
    run.rows = torch.randperm(30)[:8]
    images, draws = [views() for _ in range(3)], []
    augmented = (view for pair in images for view in pair)

    def recorded(draw):
        return lambda *args, **kwargs: draws.append(draw(*args, **kwargs)) or draws[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "augment", lambda images, recipe: next(augmented))
        patch.setattr(torch, "randperm", recorded(torch.randperm))
        patch.setattr(torch, "randint", recorded(torch.randint))
        moco.train(config, run)
    weights = run.initial.encoder_q.state_dict()
    reference = Reference(config, weights, run.initial.queue.keys, run.rows)
    steps, directions = [], 1 + config.symmetric
    for i in range(3):
        lr = 0.3 * (1 + math.cos(math.pi * i / 3)) / 2
        if config.schedule == "step":
            lr = (0.3, 0.3, 0.03)[i]  # 2 of 3 epochs are more than 60 %
        steps.append(reference.step(*images[i], draws[directions * i :], lr))
    assert len(draws) == 3 * directions
    if config.mechanism == "memory-bank":
        assert len(torch.cat(draws).unique()) > 20  # of all 30 images
    return run, reference, steps


def test_step_has_the_papers_loss(both):
    run, _, steps = both
    assert run.losses == pytest.approx([loss for loss, _ in steps], abs=1e-10)


def test_step_has_the_papers_gradient(both):
    run, _, steps = both
    for ours, (_, theirs) in zip(run.gradients, steps, strict=True):
        assert ours.keys() == theirs.keys() and max(g.abs().max() for g in ours.values()) > 1e-3
        for name in theirs:
            close(ours[name], theirs[name], 1e-10)


def test_step_has_the_papers_queue(both):
    run, reference, _ = both
    queue = run.model.queue
    close(queue.keys.roll(-int(queue.pointer), 0), torch.stack(reference.queue), 1e-10)


@pytest.mark.parametrize("which", ["q", "k"])
def test_step_has_the_papers_encoders(both, which):
    """Weights, and the batch statistics of the images that each has seen"""
    run, reference, _ = both
    if which == "k" and run.config.mechanism != "moco":
        assert not hasattr(run.model, "encoder_k")
        return
    encoder = getattr(run.model, f"encoder_{which}")
    for name, ours in encoder.named_parameters():
        close(ours.detach(), getattr(reference, which)[name].detach(), 1e-10)
    for name, ours in encoder.named_buffers():
        if "running" in name:
            theirs = torch.stack([own[name] for own in reference.statistics[which]]).mean(0)
            close(ours, theirs, 1e-10)


# -- the recipes

DEMO = USUAL | {  # recipes.md, [demo]
    "lr": 0.06,
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "key_momentum": 0.99,
    "queue_size": 4096,
    "temperature": 0.1,
    "head": "linear",
    "dim": 128,
    "bn_splits": 8,
    "symmetric": False,
    "crop_scale": (0.08, 1.0),
    "gray": 0.2,
    "blur": 0.0,
}

CHANGES = {  # what each recipe changes in the official demo's
    "demo": {},
    "cpu": dict(width=16, epochs=70, batch_size=256, crop_scale=(0.2, 1.0)),
    "report": dict(batch_size=128, epochs=100, lr=0.015, weight_decay=1e-6),  # m 0.99 as in demo
    "v1": dict(temperature=0.07, schedule="step"),
    "v2": dict(head="mlp", temperature=0.2, blur=0.5),
}


@pytest.mark.parametrize("recipe", CHANGES)
def test_recipe(recipe):
    check_recipe(moco, recipe, DEMO | CHANGES[recipe])


def test_every_recipe_is_tested_and_demo_is_the_default():
    assert CHANGES.keys() == moco.RECIPES.keys() and moco.parse_config([]) == Config()
