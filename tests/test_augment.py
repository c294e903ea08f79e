"""augment() is torchvision's transforms, one image at a time: the same pixels from the same
parameters, and parameters of the same distribution. Oracles C21-C24 of correctness.md.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from conftest import close
from torchvision.transforms import RandomResizedCrop

import moco_cifar as moco
from moco_cifar import Config, augment

ADJUST = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation]
PLAIN = dict(jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0, blur=0.0)  # nothing but crop and flip


def noise(n, size):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


@pytest.fixture
def pixels():
    """Images in [0, 1] with the awkward colours: greys, black, white, ties between channels."""
    images = noise(24, 16) / 255
    images[0], images[1], images[2] = 0.0, 1.0, 0.5
    images[3] = images[3, :1]  # grey
    images[4, 1] = images[4, 0]  # red == green
    images[5, 2] = images[5, 1]
    images[6] = images[6].round()  # only pure colours
    return images


@pytest.fixture
def no_crop(monkeypatch):
    """Every crop is the whole image."""

    def whole(n, size, scale, device="cpu"):
        zero, full = torch.zeros(n), torch.full((n,), float(size))
        return zero, zero, full, full

    monkeypatch.setattr(moco, "sample_crops", whole)


def pixels_of(views, config):
    """Undo the normalisation."""
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    return views * std.view(3, 1, 1) + mean.view(3, 1, 1)


def near_rate(hits, p):
    """A share of n tries within four standard deviations of p."""
    n = hits.numel()
    assert abs(hits.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / n)


# -- the same pixels, given the same parameters


def check_crops(x, boxes, flip, tolerance):
    size = x.shape[-1]
    top, left, height, width = (b.to(x.dtype) for b in boxes)
    rows = moco.interpolation(top, height, size, torch.zeros_like(flip))
    ours = moco.separable(x, rows, moco.interpolation(left, width, size, flip))
    for i, box in enumerate(torch.stack(list(boxes), dim=1).int().tolist()):
        view = tv.resized_crop(x[i], *box, [size, size], antialias=True)
        close(ours[i], tv.horizontal_flip(view) if flip[i] else view, tolerance)


# in float32 at odd sizes the coordinates themselves are rounded, torchvision's as well as ours
@pytest.mark.parametrize(
    "size, dtype, tolerance",
    [(8, torch.float32, 1e-6), (32, torch.float32, 1e-6), (33, torch.float64, 1e-12)],
)
def test_crop_and_flip_are_torchvisions(size, dtype, tolerance):
    x = (noise(60, size) / 255).to(dtype)
    check_crops(x, moco.sample_crops(60, size, (0.08, 1.0)), torch.rand(60) < 0.5, tolerance)


def test_crops_of_one_pixel_and_of_everything():
    boxes = [(0, 0, 1, 1), (15, 15, 1, 1), (0, 3, 16, 1), (7, 0, 1, 16), (0, 0, 16, 16)]
    x, boxes = noise(5, 16) / 255, torch.tensor(boxes).float().T
    check_crops(x, boxes, torch.zeros(5, dtype=torch.bool), 1e-6)


OPERATIONS = [f.__name__ for f in ADJUST] + ["adjust_hue"]


@pytest.mark.parametrize("operation", range(4), ids=OPERATIONS)
def test_each_color_operation_is_torchvisions(pixels, operation):
    n = len(pixels)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1)
    factors[:, operation] += torch.linspace(-1, 1, n) * (0.8 if operation < 3 else 0.5)
    nobody, order = torch.arange(0), torch.arange(3).repeat(n, 1)
    turns = [torch.arange(n), nobody, nobody, nobody]
    ours = moco.color_jitter(pixels.clone(), factors, order, turns)
    for i in range(n):
        theirs = [*ADJUST, tv.adjust_hue][operation](pixels[i], float(factors[i, operation]))
        close(ours[i], theirs, 2e-6)


def test_color_jitter_in_each_of_the_24_orders(pixels):
    orders = list(itertools.permutations(range(4)))  # 3 is the hue
    assert len(pixels) == len(orders)
    factors = torch.tensor([1, 1, 1, 0]) + (torch.rand(24, 4) - 0.5)
    order = torch.tensor([[o for o in order if o < 3] for order in orders])
    place = torch.tensor([order.index(3) for order in orders])
    turns = [(place == i).nonzero()[:, 0] for i in range(4)]
    ours = moco.color_jitter(pixels.clone(), factors, order, turns)
    for i, theirs in enumerate(pixels):
        for operation in orders[i]:
            theirs = [*ADJUST, tv.adjust_hue][operation](theirs, float(factors[i, operation]))
        close(ours[i], theirs, 2e-6)


def test_grayscale_is_torchvisions(pixels):
    close(moco.grayscale(pixels), tv.rgb_to_grayscale(pixels), 2e-6)


@pytest.mark.parametrize("size", [8, 32])
def test_blur_is_torchvisions(size):
    x, sigma = noise(20, size) / 255, torch.linspace(0.1, 2.0, 20)
    blur = moco.gaussian(sigma, size)
    ours = moco.separable(x, blur, blur)
    for i in range(20):
        close(ours[i], tv.gaussian_blur(x[i], [13, 13], [float(sigma[i])] * 2), 2e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 40])
def test_whole_view_is_torchvisions(n, spy):
    """Crop, flip, jitter, gray, blur, normalise: in this order, each operation on every image."""
    config, images = Config(gray=0.5, blur=1.0), noise(n, 32)
    crops, matrices = spy(moco, "sample_crops"), spy(moco, "interpolation")
    jitters, blurs = spy(moco, "color_jitter"), spy(moco, "gaussian")
    views = augment(images, config)
    boxes, flips = crops[0][1], matrices[1][0][3]
    _, factors, order, turns = jitters[0][0]
    sigmas = blurs[0][0][0]
    assert sorted(torch.cat(list(turns)).tolist()) == list(range(n))
    for i in range(n):
        box = [int(b[i]) for b in boxes]
        x = tv.resized_crop(images[i] / 255, *box, [32, 32], antialias=True)
        x = tv.horizontal_flip(x) if flips[i] else x
        place = [i in turn.tolist() for turn in turns].index(True)
        operations = order[i].tolist()
        for operation in [*operations[:place], 3, *operations[place:]]:
            x = [*ADJUST, tv.adjust_hue][operation](x, float(factors[i, operation]))
        either = []
        for y in (x, tv.rgb_to_grayscale(x, 3)):
            y = tv.gaussian_blur(y, [13, 13], [float(sigmas[i])] * 2)
            either.append((tv.normalize(y, config.mean, config.std) - views[i]).abs().max())
        assert min(either) < 2e-5  # a pixel's 5e-6, divided by std


# -- parameters of the same distribution


def ks_distance(a, b):
    """The two-sample Kolmogorov-Smirnov statistic: the largest gap between the shares below t."""
    t = torch.cat([a, b])
    below = [torch.searchsorted(x.sort().values, t, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max()


@pytest.fixture(scope="module", params=[(0.08, 1.0), (0.2, 1.0)], ids=str)
def crops(request):
    """20000 crops of ours and of torchvision's: quantities (n,) by name"""
    torch.manual_seed(1)
    n, size, blank = 20000, 32, torch.zeros(3, 32, 32)
    theirs = [RandomResizedCrop.get_params(blank, request.param, (3 / 4, 4 / 3)) for _ in range(n)]
    theirs = torch.tensor(theirs).double().T
    ours = [side.double() for side in moco.sample_crops(n, size, request.param)]

    def quantities(top, left, height, width):
        room = height < size
        where = dict(top=top, left=left, share=top[room] / (size - height[room]))
        room = width < size
        where |= dict(share_across=left[room] / (size - width[room]))
        return where | dict(height=height, width=width, area=height * width, ratio=width / height)

    return quantities(*ours), quantities(*theirs)


QUANTITIES = "top left share share_across height width area ratio".split()


@pytest.mark.parametrize("name", QUANTITIES)
def test_crops_are_drawn_as_torchvision_draws_them(crops, name):
    ours, theirs = (side[name] for side in crops)
    n = min(len(ours), len(theirs))
    assert n > 15000
    assert ks_distance(ours, theirs) <= 1.95 * math.sqrt(2 / n)  # alpha = 0.001


@pytest.mark.parametrize("size", [8, 33, 64])
def test_crops_lie_within_the_image_in_whole_pixels(size):
    top, left, height, width = moco.sample_crops(5000, size, (0.01, 1.0))
    for start, length in ((top, height), (left, width)):
        assert (start == start.round()).all() and (length == length.round()).all()
        assert start.min() >= 0 and length.min() >= 1 and (start + length).max() <= size


def test_an_impossible_crop_is_the_whole_image():
    for part, value in zip(moco.sample_crops(50, 16, (1.3, 1.4)), (0, 0, 16, 16)):
        assert (part == value).all()


def test_half_of_the_views_are_mirrored(no_crop):
    config, images = Config(**PLAIN), noise(2000, 4)
    x, views = images / 255, pixels_of(augment(images, config), config)
    upright = (views - x).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (views - x.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (upright ^ mirrored).all()
    near_rate(mirrored, 0.5)


@pytest.fixture
def jitter(spy):
    """What color_jitter was called with for 6000 images"""
    calls = spy(moco, "color_jitter")
    augment(noise(6000, 4), Config(jitter=(0.4, 0.3, 0.2, 0.1)))
    _, factors, order, turns = calls[0][0]
    place = torch.empty(6000, dtype=torch.long)
    for i, turn in enumerate(turns):
        place[turn] = i
    jittered = (factors != torch.tensor([1, 1, 1, 0])).any(1)
    return SimpleNamespace(factors=factors, order=order, place=place, jittered=jittered)


def test_four_of_five_views_are_jittered(jitter):
    near_rate(jitter.jittered, 0.8)


def test_jitter_is_all_four_factors_or_none(jitter):
    changed = jitter.factors[jitter.jittered] != torch.tensor([1, 1, 1, 0])
    assert changed.double().mean() > 0.999  # a factor may come out as exactly 1


@pytest.mark.parametrize("i, strength", [(0, 0.4), (1, 0.3), (2, 0.2), (3, 0.1)], ids=OPERATIONS)
def test_jitter_factors_are_uniform_in_their_range(jitter, i, strength):
    """ColorJitter(0.4): from 0.6 to 1.4; hue 0.1: from -0.1 to 0.1"""
    factor, middle = jitter.factors[jitter.jittered, i], float(i < 3)
    assert factor.min() >= middle - strength - 1e-6 and factor.max() <= middle + strength + 1e-6
    uniform = torch.linspace(middle - strength, middle + strength, len(factor))
    assert ks_distance(factor, uniform) <= 1.95 / math.sqrt(len(factor))


def test_jitter_factors_are_independent(jitter):
    correlation = torch.corrcoef(jitter.factors[jitter.jittered].T) - torch.eye(4)
    assert correlation.abs().max() < 4 / math.sqrt(jitter.jittered.sum())


def test_the_24_orders_of_the_jitter_are_equally_likely(jitter):
    base = torch.tensor([27, 9, 3])
    counts = ((jitter.order * base).sum(1) + jitter.place).unique(return_counts=True)[1]
    assert len(counts) == 24
    expected = 6000 / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-squared, 23 d.f., alpha 0.001


@pytest.mark.parametrize("n", [1, 6])
def test_hue_has_each_place_in_small_batches_too(n, spy):
    calls, images, config = spy(moco, "color_jitter"), noise(n, 4), Config()
    for _ in range(400):
        augment(images, config)
    place = [next(i for i, turn in enumerate(args[3]) if 0 in turn) for args, _ in calls]
    for i in range(4):
        near_rate(torch.tensor(place) == i, 0.25)


def test_one_of_five_views_is_gray():
    config, images = Config(jitter=(0.0, 0.0, 0.0, 0.0)), noise(3000, 4)
    views = pixels_of(augment(images, config), config)
    near_rate((views - views[:, :1]).abs().amax((1, 2, 3)) < 1e-5, 0.2)


def test_half_of_the_views_are_blurred_by_sigma_up_to_two(no_crop, spy):
    blurs, config, images = spy(moco, "gaussian"), Config(**PLAIN | {"blur": 0.5}), noise(2000, 8)
    x, views = images / 255, pixels_of(augment(images, config), config)
    off = torch.minimum(
        (views - x).abs().mean((1, 2, 3)), (views - x.flip(3)).abs().mean((1, 2, 3))
    )
    sigma = blurs[0][0][0]
    visible = sigma > 0.3  # below, a blur by less than a pixel changes nothing
    near_rate(off[visible] > 1e-4, 0.5)
    assert ks_distance(sigma, torch.linspace(0.1, 2.0, 2000)) <= 1.95 / math.sqrt(2000)


# -- independence and repetition


def drawn(spy, images, config, times):
    """What every call of augment draws: (times, N, parameters)"""
    crops, matrices = spy(moco, "sample_crops"), spy(moco, "interpolation")
    jitters = spy(moco, "color_jitter")
    for _ in range(times):
        augment(images, config)
    columns = [
        [*crops[i][1], matrices[2 * i + 1][0][3].float(), *jitters[i][0][1].T] for i in range(times)
    ]
    return torch.stack([torch.stack(column, dim=1) for column in columns])


def test_two_views_are_independent(spy):
    first, second = drawn(spy, noise(4000, 4), Config(), 2)
    correlation = torch.corrcoef(torch.cat([first, second], dim=1).T)[:9, 9:]
    assert correlation.abs().max() < 4.5 / math.sqrt(4000)  # 4.5: of 81 pairs


def test_neighbours_in_a_batch_are_independent(spy):
    rows = drawn(spy, noise(4001, 4), Config(), 1)[0]
    correlation = torch.corrcoef(torch.cat([rows[1:], rows[:-1]], dim=1).T)[:9, 9:]
    assert correlation.abs().max() < 4.5 / math.sqrt(4000)


def test_every_copy_of_an_image_gets_a_view_of_its_own():
    views = augment(noise(1, 32).expand(50, -1, -1, -1), Config())
    assert len(views.flatten(1).unique(dim=0)) == 50


def test_the_seed_decides_the_views():
    images, views = noise(6, 16), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(augment(images, Config(blur=0.5)))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


# -- what comes out


@pytest.mark.parametrize("n, size", [(1, 32), (2, 32), (7, 8), (5, 33), (3, 64)])
def test_shape_and_type(n, size):
    views = augment(noise(n, size), Config(blur=0.5))
    assert views.shape == (n, 3, size, size) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_the_images_stay_as_they_are():
    images = noise(9, 16)
    before = images.clone()
    augment(images, Config(blur=0.5))
    assert torch.equal(images, before)


def test_views_are_normalised_by_the_configs_mean_and_std(no_crop):
    config = Config(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), **PLAIN)
    column = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    views = augment(column.expand(2, 3, 8, 8), config)
    right = torch.tensor([(0 - 0.1) / 0.5, (0.2 - 0.2) / 0.6, (1 - 0.3) / 0.7])
    close(views, right.view(1, 3, 1, 1).expand(2, 3, 8, 8), 1e-6)


def test_pixels_stay_in_range():
    config = Config(jitter=(0.9, 0.9, 0.9, 0.5), blur=0.5)
    views = pixels_of(augment(noise(200, 16), config), config)
    assert views.min() > -1e-5 and views.max() < 1 + 1e-5


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_grey_image_has_no_hue_and_gives_no_nan(value):
    images = torch.full((20, 3, 8, 8), value, dtype=torch.uint8)
    assert augment(images, Config(blur=0.5)).isfinite().all()
