"""tools/bench.py: the baseline does the same work as the script, the numbers follow from one
another, and what is counted and timed is what it says.
"""

import contextlib
import io
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, close

sys.path.insert(0, str(ROOT / "tools"))
import bench
import count_kernels
import plain_moco
from fake_cuda import FakeCuda, Unsupported
from torch.utils.flop_counter import FlopCounterMode

import moco_cifar

TINY = "--arch resnet8 --width 8 --batch-size 16 --end-to-end-batch-size 24 --images 300".split()


# -- the baseline does the same work


def test_split_norm_is_the_scripts_with_other_groups():
    ours, plain = moco_cifar.SplitBatchNorm(6, 4), plain_moco.PlainSplitNorm(6, 4)
    for norm in (ours, plain):
        norm.weight.data, norm.bias.data = torch.linspace(1, 2, 6), torch.linspace(-1, 1, 6)
    x = (3 + 2 * torch.randn(20, 6, 5, 5)) * torch.rand(20, 1, 1, 1)
    order = torch.arange(20).view(5, 4).T.flatten()  # every fourth image: one group
    normed = plain(x)
    close(normed[order], ours(x[order]), 1e-5)
    close(plain.running_mean, ours.running_mean, 1e-5)
    close(plain.running_var, ours.running_var, 1e-5)
    assert (normed - ours(x)).abs().max() > 0.01  # the groups do matter


def test_three_steps_of_the_baseline_are_those_of_the_script():
    """From the same weights and views; the queue of 40 wraps around."""
    settings = dict(arch="resnet8", width=4, batch_size=16, queue_size=40, bn_splits=1)
    config = moco_cifar.Config(**settings, key_momentum=0.9)
    baseline = plain_moco.Baseline(moco_cifar, config, torch.device("cpu"))
    model = moco_cifar.MoCo(config, 0)
    sgd = torch.optim.SGD(model.encoder_q.parameters(), config.lr, 0.9, weight_decay=5e-4)
    pairs = [(model.encoder_q, baseline.encoder_q), (model.encoder_k, baseline.encoder_k)]
    pairs = [pair for nets in pairs for pair in zip(*(net.parameters() for net in nets))]
    for param, other in pairs:
        param.data.copy_(other)
    model.queue.keys.copy_(baseline.queue.T)
    before = [param.detach().clone() for param, _ in pairs]
    for im_q, im_k in torch.randn(3, 2, 16, 3, 16, 16):
        moco_cifar.momentum_update(model.encoder_q, model.encoder_k, 0.9)
        loss, keys = model(im_q, im_k, None)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        model.queue.enqueue(keys)
        assert baseline.step(im_q, im_k) == pytest.approx(loss.item(), abs=1e-4)
    for (param, other), old in zip(pairs, before):
        close(param.data, other.data, 1e-4)
        assert not torch.equal(param, old)
    close(model.queue.keys, baseline.queue.T, 1e-4)


def test_pairs_are_two_views_as_augment_makes_them():
    """The same mean and deviation, channel by channel; a loader takes the batches"""
    config = moco_cifar.Config(batch_size=100)
    column = np.linspace(0, 255, 32).astype(np.uint8)
    images = np.broadcast_to(column[None, :, None, None], (100, 32, 32, 3)).copy()
    images[..., 0] //= 2
    pairs = plain_moco.Pairs(images, config)
    pairs.batches = 2
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=pairs)
    (one, two), (three, _) = loader
    assert one.shape == two.shape == (100, 3, 32, 32)
    assert not torch.equal(one, two)
    ours = moco_cifar.augment(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), config)
    theirs = torch.cat([one, two, three])
    close(theirs.mean((0, 2, 3)), ours.mean((0, 2, 3)), 0.25)
    close(theirs.std((0, 2, 3)), ours.std((0, 2, 3)), 0.15)


# -- what is timed, and when


class Orders:
    """The far end of a pipe"""

    def __init__(self, *orders):
        self.orders, self.answers = iter([*orders, None]), []

    def recv(self):
        return next(self.orders)

    def send(self, answer):
        self.answers.append(answer)


def test_serve_does_the_steps_that_are_ordered(monkeypatch):
    monkeypatch.setattr(bench, "now", lambda device: clock.seconds)
    clock = SimpleNamespace(seconds=0.0, step=lambda: None)

    def fresh(n):
        clock.seconds += 10  # until the data is there
        yield from range(n)

    conn = Orders(("step", 2), ("end_to_end", 5), ("parts", 2), ("flops", 1))
    real, done = lambda: setattr(clock, "seconds", clock.seconds + 3), []
    clock.step = real
    where = torch.device("cpu"), "fixed", fresh, {"a step": (clock, "step")}
    for batch in bench.serve(conn, *where):
        done.append(batch)
        torch.ones(2, 3) @ torch.ones(3, 4)
        clock.seconds += 1
        clock.step()
    assert done == ["fixed"] * 2 + [0, 1, 2, 3, 4] + ["fixed"] * 3
    ready, step, end_to_end, parts, flops = conn.answers
    assert (ready, step["seconds"], end_to_end["seconds"]) == ({}, 4, (10 + 5 * 4) / 5)
    assert parts["parts"] == {"a step": 6, "forward and backward": 2}
    assert flops["flops"] == 2 * 2 * 3 * 4 and flops["bytes"] > 50e6
    assert clock.step is real  # the watch is off again


def take_turns(log, theirs, **options):
    """The answers of ours (a step, 0.1 s) and a baseline (end to end, so many seconds)"""

    def variant(name, seconds):
        return lambda task, n: log.append((name, task, n)) or {"seconds": seconds}

    some = dict(device="cpu", workers=0, repeats=2, seconds=1, deadline=math.inf)
    turns = {"ours": (variant("ours", 0.1), "step")}
    turns["baseline"] = variant("b", theirs), "end_to_end"
    answers = bench.take_turns(turns, SimpleNamespace(**some | options))
    return [len(rows) for rows in answers.values()]


def test_variants_take_turns_after_a_warm_up():
    log = []
    assert take_turns(log, 9, workers=3) == [2, 2]
    other = ("b", "end_to_end", 6)  # a short epoch, with three workers
    assert log == [("ours", "step", 1), other] + 2 * [("ours", "step", 10), other]
    assert take_turns(log := [], 9, device="cuda") == [2, 2]
    assert [name for name, *_ in log] == 5 * ["ours"] + 5 * ["b"] + 2 * ["ours", "b"]


def test_rounds_end_in_time_but_three_there_are(monkeypatch):
    for minutes, rounds in ((0, 3), (2, 5), (9, 8)):
        ticks = itertools.count(0, 10)  # a round takes 10 s
        monkeypatch.setattr(bench.time, "monotonic", lambda ticks=ticks: next(ticks))
        assert take_turns([], 9, repeats=8, deadline=60 * minutes) == [rounds, rounds]


# -- a whole run


def flops_of_forward(n):
    with FlopCounterMode(display=False) as counter:
        moco_cifar.build_encoder("resnet8", 8)(torch.zeros(n, 3, 32, 32))
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The JSON file's text, and what was printed"""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    argv = [*TINY, "--device", "cpu", "--repeats", "3", "--seconds", "0.02", "--json", str(path)]
    alone = mock.patch.dict(os.environ, OMP_NUM_THREADS="1")  # whatever else the machine does
    with alone, contextlib.redirect_stdout(io.StringIO()) as out:
        assert bench.main(argv) == 0
    return path.read_text(), out.getvalue()


def test_the_numbers_follow_from_one_another(whole):
    result, lines = json.loads(whole[0]), whole[1].splitlines()
    moco, ratios = result["methods"]["moco"], {}
    for what in ("step", "end_to_end"):
        ours, theirs = (moco[what][name]["rounds"] for name in ("ours", "baseline"))
        assert len(ours) == len(theirs) == 3 and min(ours + theirs) > 0
        ratios[what] = statistics.median(a / b for a, b in zip(ours, theirs))
    ratios["peak_bytes"] = moco["peak_bytes"]["ours"] / moco["peak_bytes"]["baseline"]
    assert {row["of"]: row["median"] for row in moco["ratios"]} == pytest.approx(ratios)
    assert all(50e6 < peak < 20e9 for peak in moco["peak_bytes"].values())

    rate, flops = moco["step"]["ours"]["median"], moco["flops_per_image"]
    peak = 1e12 * max(result["matrix_tflops"].values())
    assert rate == statistics.median(moco["step"]["ours"]["rounds"])
    assert moco["share_of_matrix_rate"] == pytest.approx(rate * flops / peak)
    shares = moco["share_of_step"]
    assert [*shares] == ["augment", "momentum update", "optimizer", "forward and backward"]
    for rounds in zip(*(share["rounds"] for share in shares.values())):
        assert sum(rounds) == pytest.approx(1) and min(rounds) > 0
    # MoCo: the query forward, its backward twice that (less, at the image), the key forward
    assert 3.5 < flops / flops_of_forward(1) < 4.5

    (line,) = [line for line in lines if "training step" in line]
    assert f"{rate:,.4g} images/s" in line
    (line,) = [line for line in lines if "ratio, end to end: baseline" in line]
    assert f" {ratios['end_to_end']:,.4g} (" in line
    assert max(map(len, lines)) <= 120


def test_the_file_names_no_place_and_no_host(whole):
    def strings(value):
        if isinstance(value, dict):
            value = [*value, *value.values()]
        if isinstance(value, list):
            return [text for item in value for text in strings(item)]
        return [value] if isinstance(value, str) else []

    found = strings(json.loads(whole[0]))
    assert found and not [text for text in found if re.search(r"(^|\s)[/~]", text)]
    host = re.compile(rf"\b{re.escape(platform.node())}\b")
    assert not [text for text in found if host.search(text)]


# -- counting


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    path = tmp_path_factory.mktemp("count") / "count.json"
    argv = "--count --arch resnet8 --width 8 --batch-size 16".split()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            with FakeCuda():
                pass
        except Unsupported as error:
            pytest.skip(str(error))
        assert bench.main([*argv, "--json", str(path)]) == 0
    return json.loads(path.read_text())["methods"], out.getvalue()


def test_a_kernel_costs_what_it_touches():
    costs = []
    with FakeCuda(lambda *kernel: costs.append(count_kernels.cost(*kernel))):
        costs.clear()
        x, w = (torch.empty(*shape, device="cuda") for shape in ((4, 8), (8, 2)))
        x.view(8, 4).T.unflatten(0, (2, 2)), x[1:], x.detach()  # of these, none is a kernel
        assert not costs
        x @ w
        x.add_(1)
        x + torch.empty(4, 1, device="cuda").expand(4, 8)
        x[torch.empty(2, dtype=torch.long, device="cuda")]
        torch._foreach_mul_([x, w], 2.0)
        torch.optim.SGD([w.requires_grad_()], 0.1, fused=True)
    launches, flops, touched = zip(*(cost.values() for cost in costs))
    assert launches == (1,) * 5 and flops == (2 * 4 * 8 * 2, 0, 0, 0, 0)
    assert touched == (4 * (32 + 16 + 8), 4 * 64, 4 * (32 + 4 + 32), 16 + 64 + 64, 4 * 2 * 48)


def test_the_count_is_of_the_work_that_is_known(counted):
    methods, text = counted
    forward = flops_of_forward(16)
    for name, parts in methods.items():
        query, key = (parts[part]["flop"] for part in (count_kernels.QUERY, count_kernels.KEY))
        views = 1 if name.startswith("MoCo") else 2
        if name.startswith(("MoCo", "SimCLR")):
            assert 1 < query / forward / views < 1.2  # the rest: head and loss
            assert key == 0 if name == "SimCLR" else 1 < key / forward < 1.01
        assert 1.8 < parts[count_kernels.BACKWARD]["flop"] / query <= 2
        assert all(part["launches"] < 1000 for part in parts.values())
        assert parts[count_kernels.REST]["launches"] < 20  # one for all parameters, not each
        total = sum(part["launches"] for part in parts.values())
        assert f"{total:,}" in [line for line in text.splitlines() if "all" in line][0]
    augmentation = [parts[count_kernels.AUGMENT] for parts in methods.values()]
    assert all(part["launches"] == augmentation[0]["launches"] for part in augmentation)


# -- errors for people


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--batch-size", "0"], "--batch-size: must be more than 0"),
        (["--method", "byol"], "invalid choice: 'byol'"),
        (["--repeats", "x"], "invalid int value"),
        (["--device", "cuda:77"], "--device cuda:77 is not available"),
        (["--json", "no/such/folder/x.json"], "there is no such folder"),
        ([*TINY, "--batch-size", "20"], "times --bn-splits"),
    ],
)
def test_what_a_person_can_mend_is_one_line(refused, argv, says):
    refused(bench.main, argv, says)
