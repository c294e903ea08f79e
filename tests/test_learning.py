"""Does it learn? A network learns 64 images by heart, learns nothing from wrong keys, and does not
collapse. And what training is given: orders, views, rates, an optimizer, the k-NN accuracy.
Oracles C18, C20, C24-C26, C29 of correctness.md.
"""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from test_moco import ShortRun, small

import moco_cifar as moco

LEARN = small(width=8, batch_size=16, queue_size=48, dim=16, lr=0.05, weight_decay=0.0, epochs=1)
LEARN = dataclasses.replace(
    LEARN, bn_splits=1, crop_scale=(1, 1), jitter=(0.1, 0.1, 0.1, 0.02), gray=0.0
)
CHANCE = math.log(1 + 48)  # of the loss; at first it is less, for the queue starts with noise


class Few(ShortRun):
    """200 steps on 64 images in four batches, always the same. So the queue holds the keys of the
    48 others, no image meets its own old key as a negative, and the loss can fall to zero.
    """

    def resume(self, model, online, optimizer):
        super().resume(model, online, optimizer)
        model.float()

    def batches(self):
        pool = F.interpolate(torch.rand(64, 3, 4, 4) * 255, (8, 8), mode="bilinear")
        self.pool = pool.byte()
        for step in range(200):
            self.rows = torch.arange(16) + step % 4 * 16
            yield 0, self.pool[self.rows]


def learn(keys_of=lambda run, images: images):
    """A run in which the keys are of other images, if they are to be"""
    run, augment, calls = Few(LEARN), moco.augment, []

    def pair(images, recipe):
        calls.append(images)
        return augment(images if len(calls) % 2 else keys_of(run, images), recipe)

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "augment", pair)
        moco.train(LEARN, run)
    return run


@pytest.fixture(scope="module")
def learned():
    return learn()


def last(run, steps):
    return torch.stack(run.losses)[-steps:].mean().item()


# -- learning


def test_it_learns_64_images_by_heart(learned):
    assert last(learned, 20) < 0.1 * CHANCE


def test_there_is_nothing_to_learn_from_the_keys_of_other_images():
    others = learn(lambda run, _: run.pool[(run.rows + torch.randint(1, 64, (16,))) % 64])
    assert last(others, 100) > CHANCE - 0.1


@torch.no_grad()
def test_queries_spread_over_all_dimensions(learned):
    """The least that one dimension varies from image to image; all would be 1 / sqrt(dim)."""
    encoder = learned.model.encoder_q.eval()
    q = moco.unit(encoder(moco.normalise(learned.pool / 255, LEARN)))
    assert q.std(0).min() > 0.1 / math.sqrt(LEARN.dim)


def test_the_optimizer_holds_the_query_encoder_in_one_group(learned):
    (group,) = learned.optimizer.param_groups
    right = list(learned.model.encoder_q.parameters())
    assert len(right) == len(group["params"])
    assert all(a is b for a, b in zip(right, group["params"]))


# -- the rates, by the peers


@pytest.mark.parametrize("epochs", [5, 35, 45, 100, 200])
def test_step_is_torchs_multi_step(epochs):
    config = moco.Config(lr=0.06, epochs=epochs, schedule="step")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.06)
    milestones = [epochs * 3 // 5, epochs * 4 // 5]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for epoch in range(epochs):
        theirs = schedule.get_last_lr()[0]
        assert moco.learning_rate(config, epoch) == pytest.approx(theirs, rel=1e-12)
        optimizer.step()
        schedule.step()


def test_cosine_is_timms():
    scheduler = pytest.importorskip("timm.scheduler").CosineLRScheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.06)
    peer = scheduler(optimizer, t_initial=200)
    for epoch in range(200):
        peer.step(epoch)
        ours = moco.learning_rate(moco.Config(lr=0.06, epochs=200), epoch)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)


# -- the images of a run


@pytest.fixture
def two_epochs(tiny_npz, tmp_path, spy):
    """A run of 2 epochs of 3 batches -> [(numbers of the images, first view, second view), ...]"""
    calls = spy(moco, "augment")
    flags = [*TINY, "--data", str(tiny_npz), "--image-size", "16", "--epochs", "2"]
    assert moco.main([*flags, "--knn-every", "0", "--out", str(tmp_path)]) == 0
    every, steps = list(moco.load_data(moco.parse_config(flags)).x_train), []
    for (first, view), (second, other) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(first[0], second[0])
        images = first[0].cpu()
        numbers = [
            next(i for i, x in enumerate(every) if torch.equal(x, image)) for image in images
        ]
        steps.append((numbers, view, other))
    return steps


def test_each_epoch_has_every_image_once_in_an_order_of_its_own(two_epochs):
    order = [number for numbers, _, _ in two_epochs for number in numbers]
    one, two = order[:120], order[120:]
    assert sorted(one) == sorted(two) == list(range(120))
    assert one != two and list(range(120)) not in (one, two)


def test_no_view_comes_twice(two_epochs):
    views = torch.cat([torch.cat([view, other]) for _, view, other in two_epochs])
    assert len(views.flatten(1).unique(dim=0)) == len(views) == 480


# -- the k-NN accuracy of a run


def test_knn_accuracy_over_a_ragged_last_batch_is_sklearns():
    """2003 test images are measured in batches of 1000, 1000 and 3."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    y, y_test = torch.randint(0, 5, (1001,)), torch.randint(0, 5, (2003,))
    colours = torch.randint(60, 196, (5, 3, 2, 2))
    x, x_test = (
        (colours[labels] + 60 * torch.randn(len(labels), 3, 2, 2)).clamp(0, 255).byte()
        for labels in (y, y_test)
    )
    data = SimpleNamespace(x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    data.about = {"classes": list("abcde")}
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 12))
    config, fp32 = moco.Config(), lambda: torch.autocast("cpu", enabled=False)
    bank, h = (moco.extract_features(encoder, part, config, fp32) for part in (x, x_test))
    votes = lambda distance: torch.from_numpy((1 - distance) / 0.1).exp().numpy()
    peer = neighbors.KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=votes)
    right = peer.fit(bank.numpy(), y.numpy()).score(h.numpy(), y_test.numpy())
    assert 0.3 < right < 0.95
    assert moco.knn_accuracy(encoder, data, config, fp32, 20) == pytest.approx(right, abs=1e-9)
