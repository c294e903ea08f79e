"""tools/bench.py: the baseline does the same work as the script, the numbers follow from one
another, and what is counted and timed is what it says.
"""

import contextlib
import io
import itertools
import json
import math
import platform
import re
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, close

sys.path.insert(0, str(ROOT / "tools"))
import bench

import moco_cifar

TINY = "--arch resnet8 --width 8 --batch-size 16 --end-to-end-batch-size 24 --images 300".split()


# -- the baseline does the same work


def test_split_norm_is_the_scripts_with_other_groups():
    ours, plain = moco_cifar.SplitBatchNorm(6, 4), bench.PlainSplitNorm(6, 4)
    for norm in (ours, plain):
        norm.weight.data, norm.bias.data = torch.linspace(1, 2, 6), torch.linspace(-1, 1, 6)
    x = (3 + 2 * torch.randn(20, 6, 5, 5)) * torch.rand(20, 1, 1, 1)
    order = torch.arange(20).view(5, 4).T.flatten()  # every fourth image: one group
    normed = plain(x)
    close(normed[order], ours(x[order]), 1e-5)
    close(plain.running_mean, ours.running_mean, 1e-5)
    close(plain.running_var, ours.running_var, 1e-5)
    assert (normed - ours(x)).abs().max() > 0.01  # the groups do matter


class Steps:
    """What train() needs of a Run, and no more. It starts from the baseline's weights."""

    def __init__(self, baseline, views):
        self.baseline, self.views, self.losses = baseline, views, []

    def resume(self, model, online, optimizer):
        self.model, self.optimizer = model, optimizer
        for param, other in self.pairs_of_parameters():
            param.data.copy_(other)
        model.queue.keys.copy_(self.baseline.queue.T)

    def pairs_of_parameters(self):
        for name in ("encoder_q", "encoder_k"):
            encoders = getattr(self.model, name), getattr(self.baseline, name)
            yield from zip(*(encoder.parameters() for encoder in encoders))

    def batches(self):
        for views in self.views:
            self.turn = iter(views)
            yield 0, None

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def descend(self, loss):
        self.losses.append(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def test_three_steps_of_the_baseline_are_those_of_the_script(monkeypatch):
    settings = dict(arch="resnet8", width=4, batch_size=16, queue_size=40, bn_splits=1)
    config = moco_cifar.Config(**settings, key_momentum=0.9)
    baseline = bench.Baseline(moco_cifar, config, torch.device("cpu"))
    views = torch.randn(3, 2, 16, 3, 16, 16)  # 48 keys: the queue of 40 wraps around
    run = Steps(baseline, views)
    monkeypatch.setattr(moco_cifar, "augment", lambda images, config: next(run.turn))
    moco_cifar.train(config, run)
    losses = [baseline.step(im_q, im_k) for im_q, im_k in views]

    assert losses == pytest.approx(run.losses, abs=1e-4)
    assert len(set(losses)) == 3
    for param, other in run.pairs_of_parameters():
        close(param.data, other.data, 1e-4)
    close(run.model.queue.keys, baseline.queue.T, 1e-4)


def test_the_loop_over_parameters_is_momentum_update():
    config = moco_cifar.Config(arch="resnet8", width=4, key_momentum=0.7)
    baseline = bench.Baseline(moco_cifar, config, torch.device("cpu"))
    for param in baseline.encoder_q.parameters():
        param.data.normal_()
    keys = [param.detach().clone() for param in baseline.encoder_k.parameters()]
    other = SimpleNamespace(parameters=lambda: keys)
    before = [key.clone() for key in keys]
    baseline.update_keys()
    moco_cifar.momentum_update(baseline.encoder_q, other, 0.7)
    for param, key, old in zip(baseline.encoder_k.parameters(), keys, before):
        close(param.data, key, 1e-6)
        assert not torch.equal(key, old)


def test_pairs_are_two_views_as_augment_makes_them():
    """The same mean and deviation, channel by channel; a loader takes the batches"""
    config = moco_cifar.Config(batch_size=100)
    column = np.linspace(0, 255, 32).astype(np.uint8)
    images = np.broadcast_to(column[None, :, None, None], (100, 32, 32, 3)).copy()
    images[..., 0] //= 2
    pairs = bench.Pairs(images, config)
    pairs.batches = 2
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=pairs)
    (one, two), (three, _) = loader
    assert one.shape == two.shape == (100, 3, 32, 32)
    assert not torch.equal(one, two)
    ours = moco_cifar.augment(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), config)
    theirs = torch.cat([one, two, three])
    close(theirs.mean((0, 2, 3)), ours.mean((0, 2, 3)), 0.25)
    close(theirs.std((0, 2, 3)), ours.std((0, 2, 3)), 0.15)


# -- what is counted, and when


def test_flops_of_a_resnet18():
    encoder = moco_cifar.build_encoder("resnet18")
    with bench.count_flops(moco_cifar) as notes:  # no zeros between maps
        moco_cifar.place(encoder, torch.device("cpu"))(torch.zeros(2, 3, 32, 32))
    assert notes["flops"] / 2 == pytest.approx(2 * 0.557e9, rel=0.01)


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

    watch = lambda: bench.stopwatch("cpu", {"a step": (clock, "step")})
    conn = Orders(("step", 2), ("end_to_end", 5), ("parts", 2), ("parts", 0))
    real, done = lambda: setattr(clock, "seconds", clock.seconds + 3), []
    clock.step = real
    for batch in bench.serve(conn, "cpu", "fixed", fresh, {"parts": watch}):
        done.append(batch)
        clock.seconds += 1
        clock.step()
    assert done == ["fixed"] * 2 + [0, 1, 2, 3, 4] + ["fixed"] * 2
    ready, step, end_to_end, parts, _ = conn.answers
    assert (ready, step, end_to_end) == ({}, {"seconds": 4}, {"seconds": (10 + 5 * 4) / 5})
    assert parts == {"seconds": 4, "parts": {"a step": 6, "forward and backward": 2}}
    assert clock.step is real  # the watch is off again


def take_turns(log, theirs, **options):
    """The answers of ours (a step, 0.1 s) and a baseline (end to end, so many seconds)"""

    def variant(name, seconds):
        return lambda task, n: log.append((name, task, n)) or {"seconds": seconds}

    some = dict(device="cpu", compile=False, workers=0, repeats=2, seconds=1, deadline=math.inf)
    turns = {"ours": (variant("ours", 0.1), "step")}
    turns["baseline"] = variant("b", theirs), "end_to_end"
    answers = bench.take_turns(turns, SimpleNamespace(**some | options))
    return [len(rows) for rows in answers.values()]


def test_variants_take_turns_after_a_warm_up():
    log = []
    assert take_turns(log, 9, workers=3) == [2, 2]
    other = ("b", "end_to_end", 6)  # a short epoch, with three workers
    assert log == [("ours", "step", 1), other] + 2 * [("ours", "step", 10), other]


def test_the_first_round_counts_where_the_others_are_like_it():
    for options, warm_up in (({}, 0), ({"compile": True}, 1), ({"device": "cuda"}, 5)):
        assert take_turns(log := [], 9, seconds=0.1, repeats=4, **options) == [4, 4]
        order = warm_up * ["ours"] + warm_up * ["b"] + 4 * ["ours", "b"]
        assert [name for name, *_ in log] == order


def test_rounds_end_in_time_but_three_there_are(monkeypatch):
    ticks = itertools.count(0, 10)  # a round takes 10 s
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(ticks))
    for minutes, rounds in ((0, 3), (1, 3), (2, 5), (9, 8)):
        ticks = itertools.count(0, 10)
        assert take_turns([], 9, repeats=8, deadline=60 * minutes) == [rounds, rounds]


def test_matrix_rate_is_of_the_fastest(monkeypatch):
    ticks = iter([0, 0.001, 1, 4, 4, 6, 6, 9])  # the first, a warm-up, does not count
    monkeypatch.setattr(bench, "now", lambda device: next(ticks))
    rate = bench.matrix_rate(torch.device("cpu"), torch.bfloat16, tries=3)
    assert rate == pytest.approx(2 * 2048**3 / 2 / 1e12)


# -- a whole run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The JSON file's text, and what was printed"""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    argv = [*TINY, "--device", "cpu", "--repeats", "3", "--seconds", "0.02", "--json", str(path)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert bench.main([*argv, "--same-allocator"]) == 0
    return path.read_text(), out.getvalue()


def test_the_numbers_follow_from_one_another(whole):
    result = json.loads(whole[0])
    moco, machine = result["methods"]["moco"], result["machine"]
    for what, names in (
        ("step", {"ours", "baseline", "baseline, same allocator"}),
        ("end_to_end", {"ours", "baseline"}),
    ):
        assert names <= moco[what].keys()
        for rates in moco[what].values():
            assert len(rates["rounds"]) == 3 and min(rates["rounds"]) > 0
            assert rates["median"] == statistics.median(rates["rounds"])
    for ratio in moco["ratios"]:
        if ratio["of"] != "peak_bytes":
            ours, theirs = (moco[ratio["of"]][name]["rounds"] for name in ("ours", ratio["to"]))
            assert ratio["rounds"] == pytest.approx([a / b for a, b in zip(ours, theirs)])
            assert ratio["median"] == statistics.median(ratio["rounds"])
        else:
            peaks = moco["peak_bytes"]
            assert ratio["median"] == pytest.approx(peaks["ours"] / peaks[ratio["to"]])
    of = [(ratio["of"], ratio["to"]) for ratio in moco["ratios"]]
    assert {("step", "baseline"), ("end_to_end", "baseline"), ("peak_bytes", "baseline")} <= {*of}
    assert all(50e6 < peak < 20e9 for peak in moco["peak_bytes"].values())

    rate, flops = moco["step"]["ours"]["median"], moco["flops_per_image"]
    peak = 1e12 * max(result["matrix_tflops"].values())
    assert {"bfloat16", "float32"} <= result["matrix_tflops"].keys()
    assert moco["share_of_matrix_rate"] == pytest.approx(rate * flops / peak)
    shares = moco["share_of_step"]
    names = {"augment", "momentum update", "optimizer", "forward and backward"}
    assert shares.keys() == names
    for i in range(3):
        assert sum(share["rounds"][i] for share in shares.values()) == pytest.approx(1)
        assert all(share["rounds"][i] > 0 for share in shares.values())

    with bench.count_flops(moco_cifar) as notes:
        moco_cifar.build_encoder("resnet8", 8)(torch.zeros(1, 3, 32, 32))
    # MoCo: the query forward, its backward twice that (less, at the image), the key forward
    assert 3.5 < flops / notes["flops"] < 4.5
    assert len(result["probe"]["epoch_seconds"]["rounds"]) == 3
    assert min(result["probe"]["epoch_seconds"]["rounds"]) > 0
    assert len(moco["knn"]) == 3 and moco["knn"][0]["images"] == 250
    assert machine["torch"] == torch.__version__ and machine["threads"] >= 1
    assert result["settings"]["batch_size"] == 16


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


def test_the_table_says_the_same(whole):
    result, lines = json.loads(whole[0]), whole[1].splitlines()
    moco = result["methods"]["moco"]
    (line,) = [line for line in lines if "training step" in line]
    assert f"{moco['step']['ours']['median']:,.4g} images/s" in line
    (line,) = [line for line in lines if re.search("ratio, end to end, 24: baseline", line)]
    (ratio,) = [r for r in moco["ratios"] if r["of"] == "end_to_end" and r["to"] == "baseline"]
    assert f" {ratio['median']:,.4g} (" in line
    assert max(map(len, lines)) <= 120


# -- errors for people


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--batch-size", "0"], "--batch-size: must be more than 0"),
        (["--method", "byol"], "invalid choice: 'byol'"),
        (["--repeats", "x"], "invalid int value"),
        (["--device", "cuda:77"], "--device cuda:77 is not here"),
        (["--json", "no/such/folder/x.json"], "there is no such folder"),
        ([*TINY, "--batch-size", "20"], "multiple of --bn-splits"),
    ],
)
def test_what_a_person_can_mend_is_one_line(refused, argv, says):
    refused(bench.main, argv, says)
