"""augment() is torchvision's transforms, one image at a time: the same pixels from the same random
numbers, and random numbers of the same distribution. Oracles C21-C24 of correctness.md.
"""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from conftest import close
from torchvision.transforms import RandomResizedCrop

import moco_cifar as moco
from moco_cifar import Config, augment

JITTER = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
NAMES = [f.__name__ for f in JITTER]
KEEP = 1.0, 1.0, 1.0, 0.0  # the factors that change nothing


def noise(n, size):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


@pytest.fixture
def pixels():
    """Images in [0, 1] with the awkward colours: grays, black, white, ties between channels."""
    images = noise(24, 16) / 255
    images[0], images[1], images[2] = 0.0, 1.0, 0.5
    images[3] = images[3, :1]  # gray
    images[4, 1] = images[4, 0]  # red == green
    images[5, 2] = images[5, 1]
    images[6] = images[6].round()  # only pure colours
    return images


@pytest.fixture
def deal(monkeypatch):
    """deal(a, b, ...): the next calls of uniform() return these instead of random numbers."""

    def hand_out(*numbers):
        numbers = iter(numbers)
        monkeypatch.setattr(moco, "uniform", lambda *_: next(numbers))

    return hand_out


@pytest.fixture
def drawn(spy):
    """drawn(images, config) -> the views, and what each call of uniform() returned for them"""
    calls = spy(moco, "uniform")

    def run(images, config):
        calls.clear()
        return augment(images, config), [numbers for _, numbers in calls]

    return run


def near_rate(hits, p):
    """A share of n tries within four standard deviations of p"""
    n = hits.numel()
    assert abs(hits.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / n)


def ks_distance(a, b):
    """The two-sample Kolmogorov-Smirnov statistic: the largest gap between the shares below t"""
    t = torch.cat([a, b])
    below = [torch.searchsorted(x.sort().values, t, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max()


def is_uniform(sample, low, high):
    assert low <= sample.min() and sample.max() <= high
    even = torch.linspace(low, high, len(sample), dtype=sample.dtype)
    assert ks_distance(sample, even) <= 1.95 / math.sqrt(len(sample))  # alpha = 0.001


# -- the same pixels, given the same numbers


def check_crops(deal, x, boxes, tolerance):
    """boxes (N, 4): top, left, height, width"""
    size, (start, side) = x.shape[-1], boxes.to(x.dtype).split(2, dim=1)
    area, ratio = side.prod(1) / size**2, side[:, 1] / side[:, 0]
    ten = (numbers[:, None].expand(-1, 10) for numbers in (area, ratio.log()))
    deal(*ten, (start + 0.5) / (size + 1 - side))
    ours = moco.random_resized_crop(x, (0.08, 1.0))
    for i, box in enumerate(boxes.tolist()):
        close(ours[i], tv.resized_crop(x[i], *box, [size, size], antialias=True), tolerance)


# in float32 at odd sizes the coordinates themselves are rounded, torchvision's as well as ours
@pytest.mark.parametrize(
    "size, dtype, tolerance",
    [(8, torch.float32, 1e-6), (32, torch.float32, 1e-6), (33, torch.float64, 1e-12)],
)
def test_crop_is_torchvisions(deal, size, dtype, tolerance):
    sides = torch.randint(1, size + 1, (60, 2))
    boxes = torch.cat([((size + 1 - sides) * torch.rand(60, 2)).long(), sides], dim=1)
    check_crops(deal, (noise(60, size) / 255).to(dtype), boxes, tolerance)


def test_crops_of_one_pixel_and_of_everything(deal):
    boxes = [(0, 0, 1, 1), (15, 15, 1, 1), (0, 3, 16, 1), (7, 0, 1, 16), (0, 0, 16, 16)]
    check_crops(deal, noise(5, 16) / 255, torch.tensor(boxes), 1e-6)


@pytest.mark.parametrize("operation", range(4), ids=NAMES)
def test_each_color_operation_is_torchvisions(pixels, deal, operation):
    n = len(pixels)
    factors = torch.tensor(KEEP).repeat(n, 1)
    factors[:, operation] = torch.linspace(*((0, 2.5) if operation < 3 else (-0.5, 0.5)), n)
    deal(*factors[:, :3].T.view(3, n, 1, 1, 1), factors[:, 3].view(n, 1, 1))
    ours = moco.color_jitter(pixels, (2, 2, 2, 0.5))
    for i in range(n):
        close(ours[i], JITTER[operation](pixels[i], float(factors[i, operation])), 2e-6)


def test_grayscale_is_torchvisions(pixels):
    close(moco.grayscale(pixels), tv.rgb_to_grayscale(pixels), 2e-6)


@pytest.mark.parametrize("size, kernel", [(32, 13), (8, 13), (7, 13), (4, 7)])
def test_blur_is_torchvisions(deal, size, kernel):
    """The kernel is cut where an image has nothing more to reflect."""
    x, sigma = noise(20, size) / 255, torch.linspace(0.1, 2.0, 20)
    deal(sigma.view(20, 1, 1))
    ours = moco.gaussian_blur(x)
    for i in range(20):
        close(ours[i], tv.gaussian_blur(x[i], [kernel] * 2, [float(sigma[i])] * 2), 2e-6)


def torchvisions_view(image, numbers, config):
    """The view of one image (3, S, S), given the numbers that augment() drew for it"""
    numbers, size, box = iter(numbers), image.shape[-1], (0, 0, *image.shape[1:])
    shares, logs, place = (next(numbers).tolist() for _ in range(3))
    for share, log in zip(shares, logs):
        sides = [round(math.sqrt(share * size**2 * math.exp(sign * log))) for sign in (-1, 1)]
        if 0 < min(sides) and max(sides) <= size:
            box = *(int(u * (size + 1 - side)) for u, side in zip(place, sides)), *sides
            break
    x = tv.resized_crop(image / 255, *box, [size, size], antialias=True)
    x = tv.horizontal_flip(x) if next(numbers) < config.flip else x
    jittered, factors = next(numbers) < 0.8, [float(next(numbers)) for _ in range(4)]
    for adjust, factor in zip(JITTER, factors):
        x = adjust(x, factor) if jittered else x
    x = tv.rgb_to_grayscale(x, 3) if next(numbers) < config.gray else x
    if config.blur and next(numbers) < config.blur:
        x = tv.gaussian_blur(x, [13, 13], [float(next(numbers))] * 2)
    return tv.normalize(x, config.mean, config.std)


@pytest.mark.parametrize("n, size", [(1, 32), (60, 32), (5, 9)])
@pytest.mark.parametrize("recipe", [{}, dict(gray=0.5, blur=0.5, flip=0.3)], ids=["demo", "v2"])
def test_whole_view_is_torchvisions(n, size, recipe, drawn):
    """Crop, flip, jitter, gray, blur, normalise: in this order, each with its probability, or else
    other numbers would decide.
    """
    config, images = Config(crop_scale=(0.3, 1.2), **recipe), noise(n, size)
    views, numbers = drawn(images, config)
    for i in range(n):
        right = torchvisions_view(images[i], [u[i].squeeze() for u in numbers], config)
        close(views[i], right, 2e-5)  # a pixel's 5e-6, divided by std


# -- numbers of the same distribution


@pytest.fixture(scope="module", params=[(0.08, 1.0), (0.2, 1.0)], ids=str)
def crops(request):
    """20000 crops of ours and of torchvision's: quantities (n,) by name"""
    torch.manual_seed(1)
    n, size, blank, ours = 20000, 32, torch.zeros(3, 32, 32), []
    theirs = [RandomResizedCrop.get_params(blank, request.param, (3 / 4, 4 / 3)) for _ in range(n)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "interpolation", lambda *box: ours.extend(box[:2]))
        patch.setattr(moco, "separable", lambda *_: None)
        moco.random_resized_crop(torch.empty(1).expand(n, 1, size, size), request.param)

    def quantities(top, height, left, width):
        room, room_across = height < size, width < size
        where = dict(top=top, left=left, share=top[room] / (size - height[room]))
        where |= dict(share_across=left[room_across] / (size - width[room_across]))
        return where | dict(height=height, width=width, area=height * width, ratio=width / height)

    top, left, height, width = torch.tensor(theirs).double().T
    return quantities(*(side.double() for side in ours)), quantities(top, height, left, width)


@pytest.mark.parametrize("name", "top left share share_across height width area ratio".split())
def test_crops_are_drawn_as_torchvision_draws_them(crops, name):
    ours, theirs = (side[name] for side in crops)
    n = min(len(ours), len(theirs))
    assert n > 15000
    assert ks_distance(ours, theirs) <= 1.95 * math.sqrt(2 / n)  # alpha = 0.001


@pytest.mark.parametrize("size", [8, 33, 64])
def test_crops_lie_within_the_image_in_whole_pixels(size, spy):
    calls = spy(moco, "interpolation")
    moco.random_resized_crop(torch.zeros(5000, 1, size, size), (1.0, 0.01))  # in either order
    for (start, length, _), _ in calls:
        assert (start == start.round()).all() and (length == length.round()).all()
        assert start.min() >= 0 and length.min() >= 1 and (start + length).max() <= size


def test_an_impossible_crop_is_the_whole_image():
    x = noise(50, 16) / 255
    close(moco.random_resized_crop(x, (1.3, 1.4)), x, 1e-6)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.8, 1.0])
def test_sometimes_is_as_often_as_it_says(p):
    changed = moco.sometimes(p, lambda x: x + 1, torch.zeros(5000, 3, 2, 2)).flatten(1)
    assert (changed == changed[:, :1]).all()  # an image as a whole
    near_rate(changed[:, 0], p)


# strengths above 1 start at 0, as torchvision's: a negative factor would invert the image
@pytest.mark.parametrize("strength", [(0.4, 0.3, 0.2, 0.1), (0.8, 0.8, 1.0, 0.5), (1.5, 2, 3, 0.2)])
def test_jitter_factors_are_uniform_in_their_range(strength, spy):
    calls = spy(moco, "uniform")
    moco.color_jitter(torch.zeros(6000, 3, 1, 1), strength)
    ranges = [(max(0, 1 - most), 1 + most) for most in strength[:3]]
    ranges.append((-strength[3], strength[3]))
    for (_, factor), (low, high) in zip(calls, ranges, strict=True):
        is_uniform(factor.flatten(), low, high)


def test_blur_is_by_up_to_two_pixels(spy):
    calls = spy(moco, "uniform")
    moco.gaussian_blur(torch.zeros(6000, 1, 2, 2))
    is_uniform(calls[0][1].flatten(), 0.1, 2.0)


# -- independence and repetition


def test_all_numbers_are_independent(drawn):
    """Those of a view, of the next image's, and of the image's other view"""
    images, config = noise(4001, 4), Config(gray=0.5, blur=0.5)
    rows = [torch.cat([u.flatten(1) for u in drawn(images, config)[1]], dim=1) for _ in range(2)]
    together = torch.cat([rows[0][1:], rows[0][:-1], rows[1][1:]], dim=1)  # (4000, 93)
    correlation = torch.corrcoef(together.T) - torch.eye(3 * 31)
    assert correlation.abs().max() < 5.5 / math.sqrt(4000)  # 5.5: of 4278 pairs


def test_every_copy_of_an_image_gets_a_view_of_its_own():
    views = augment(noise(1, 32).expand(50, -1, -1, -1), Config())
    assert len(views.flatten(1).unique(dim=0)) == 50


def test_the_seed_decides_the_views():
    images, views = noise(6, 16), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(augment(images, Config(blur=0.5)))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


@pytest.mark.parametrize("processes", [2, 3])
def test_the_views_do_not_depend_on_the_number_of_processes(processes, monkeypatch):
    images, config, views = noise(12, 16), Config(blur=0.5), []
    torch.manual_seed(1)
    right, after = augment(images, config), torch.rand(1)
    monkeypatch.setattr(moco, "process_count", lambda: processes)
    for part in range(processes):
        shard = lambda batch, part=part: batch.chunk(processes)[part]
        monkeypatch.setattr(moco, "shard", shard)
        torch.manual_seed(1)
        views.append(augment(moco.shard(images), config))
        assert torch.rand(1) == after  # each process goes on with the same numbers
    close(torch.cat(views), right, 1e-6)


# -- what comes out


@pytest.mark.parametrize("n, size", [(1, 32), (2, 1), (7, 8), (5, 33), (3, 64)])
def test_shape_and_type(n, size):
    images = noise(n, size)
    before, views = images.clone(), augment(images, Config(blur=0.5))
    assert views.shape == (n, 3, size, size) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_pixels_stay_in_range():
    config = Config(jitter=(1.5, 0.9, 0.9, 0.5), blur=0.5, mean=(0, 0, 0), std=(1, 1, 1))
    views = augment(noise(200, 16), config)
    assert views.min() > -1e-5 and views.max() < 1 + 1e-5


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_gray_image_has_no_hue_and_gives_no_nan(value):
    images = torch.full((20, 3, 8, 8), value, dtype=torch.uint8)
    assert augment(images, Config(blur=0.5)).isfinite().all()
