"""knn_monitor.py: the vote equals its definition, each result says how it was measured, a run under
way is followed, and bad input is refused. Oracle C18 of correctness.md.
"""

import contextlib
import copy
import functools
import json
import math
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_npz
from torch import nn

import knn_monitor
from knn_monitor import Config, build_encoder, count_correct, extract_features, knn_predict

ROW = """what checkpoint epoch features k temperature top1 correct n_test n_train data data_sha256
         evaluated_on seconds machine seed"""
FAST = "--k 5 --device cpu --precision fp32 --watch-seconds 0.01".split()
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def brute_force(features, bank, labels, classes, k, temperature):
    """Class scores (N, classes) by loops over Python's float64 numbers."""
    scores = torch.zeros(len(features), classes, dtype=torch.float64)
    for n, h in enumerate(features.double().tolist()):
        similar = []
        for v, label in zip(bank.double().tolist(), labels.tolist()):
            dot = math.fsum(a * b for a, b in zip(h, v))
            lengths = math.hypot(*h) * math.hypot(*v)
            similar.append((dot / lengths, label))
        for similarity, label in sorted(similar, reverse=True)[:k]:
            scores[n, label] += math.exp((similarity - 1) / temperature)
    return scores


@pytest.fixture
def vote():
    """h (60, 12), bank (140, 12), labels of both: four classes that overlap"""
    centres, labels = torch.randn(4, 12), torch.randint(4, (200,))
    h = centres[labels] + 1.5 * torch.randn(200, 12)
    return h[:60], h[60:], labels[:60], labels[60:]


@pytest.fixture
def data(tmp_path):
    return write_npz(tmp_path / "tiny.npz", n_train=60, n_test=30, classes=3, size=8)


@functools.cache
def weights(epoch):
    torch.manual_seed(epoch)
    encoder = build_encoder("resnet8", 4)
    return encoder.state_dict(), new_head().state_dict()


def new_head():
    layers = [nn.Linear(16, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 6)]
    return nn.Sequential(*layers)


def checkpoint(data, epoch=3, **changes):
    """As a pretraining script writes it, with random weights."""
    encoder, head = copy.deepcopy(weights(epoch))
    about = dict(name=str(data), image_size=8, mean=list(MEAN), std=list(STD))
    config = dict(data=str(data), data_dir=str(data.parent), limit=0, holdout=0)
    saved = dict(format=knn_monitor.FORMAT, kind="pretrain", method="moco", epoch=epoch, epochs=3)
    saved |= dict(config=config, data=about, arch="resnet8", width=4, dim=16)
    return saved | dict(encoder=encoder, head=head, machine=dict(seed=7)) | changes


def write(path, saved):
    """Atomically, as the scripts do."""
    path.parent.mkdir(exist_ok=True)
    torch.save(saved, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return path


@pytest.fixture
def run(data, tmp_path):
    """The folder of a finished run."""
    return write(tmp_path / "run" / "pretrain.pt", checkpoint(data)).parent


def measure(*args):
    assert knn_monitor.main([*FAST, *map(str, args)]) == 0


def rows(folder):
    path = folder / "knn.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# The vote


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (20, 0.07), (140, 0.5)])
def test_vote_equals_brute_force(vote, k, temperature):
    h, bank, _, labels = vote
    expected = brute_force(h, bank, labels, 4, k, temperature)
    scores = knn_predict(h.double(), bank.double(), labels, 4, k, temperature)
    torch.testing.assert_close(scores, expected, rtol=1e-11, atol=1e-14)
    scores = knn_predict(h, bank, labels, 4, k, temperature)
    assert torch.equal(scores.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_vote_equals_sklearn(dtype):
    neighbors = pytest.importorskip("sklearn.neighbors")
    labels = torch.randint(10, (1500,))
    x = torch.randn(10, 32)[labels] + 2 * torch.randn(1500, 32)
    x = x.to(dtype).double() if dtype != torch.float32 else x
    h, bank, labels = x[:500], x[500:], labels[500:]
    weigh = lambda distance: np.exp((1 - distance) / 0.1)
    oracle = neighbors.KNeighborsClassifier(50, metric="cosine", algorithm="brute", weights=weigh)
    expected = oracle.fit(bank.numpy(), labels.numpy()).predict(h.numpy())
    assert (knn_predict(h, bank, labels, 10, 50, 0.1).argmax(1).numpy() == expected).all()


def test_lengths_of_the_features_do_not_count(vote):
    h, bank, _, labels = vote
    scale = 100 * torch.rand(len(bank), 1) + 0.01
    scores = knn_predict(h, bank, labels, 4, 20, 0.1)
    scaled = knn_predict(3 * h, scale * bank, labels, 4, 20, 0.1)
    torch.testing.assert_close(scaled, scores, rtol=1e-4, atol=1e-7)


def test_correct_is_a_whole_number_whatever_the_chunks(vote):
    h, bank, y, labels = vote
    right = brute_force(h, bank, labels, 4, 20, 0.1).argmax(1) == y
    for chunk in (1, 7, 59, 1000):
        correct = count_correct(h, y, bank, labels, 4, Config(k=20), chunk)
        assert type(correct) is int and correct == int(right.sum())
    assert 0 < correct < len(y)


# The features


@pytest.mark.parametrize("training", [True, False])
def test_features_are_of_eval_mode_and_leave_no_trace(training):
    encoder = build_encoder("resnet8", 4).train()
    encoder(torch.randn(8, 3, 8, 8))  # statistics that are not those of the start
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    encoder.train(training)
    settings = SimpleNamespace(mean=MEAN, std=STD)
    h = extract_features(encoder, images, settings, contextlib.nullcontext, batch=7)
    assert all(module.training == training for module in encoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    expected = encoder.eval()((images / 255 - mean) / std)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
    assert not h.requires_grad


def test_head_is_rebuilt_with_any_layers():
    for affine in (True, False):
        head = nn.Sequential(*new_head(), nn.BatchNorm1d(6, affine=affine))
        head(torch.randn(9, 16))
        x = torch.randn(5, 16)
        rebuilt = knn_monitor.load_head({"head": head.state_dict()})
        assert torch.equal(rebuilt(x), head.eval()(x))


# A measurement


def count(saved, data, config):
    """What a measurement must find, computed the long way."""
    arrays, mean, std = np.load(data), torch.tensor(MEAN), torch.tensor(STD)
    x = [torch.tensor(arrays[name]).double() / 255 for name in ("x_train", "x_test")]
    x = [((part - mean) / std).permute(0, 3, 1, 2) for part in x]
    y = [torch.tensor(arrays[name]) for name in ("y_train", "y_test")]
    if config.baseline == "pixels":
        bank, h = (part.flatten(1) for part in x)
    else:
        encoder = build_encoder("resnet8", 4).double().eval()
        encoder.load_state_dict(saved["encoder"])
        bank, h = (encoder(part).detach() for part in x)
        if config.features == "head":
            head = new_head().double().eval()
            head.load_state_dict(saved["head"])
            bank, h = head(bank).detach(), head(h).detach()
    scores = brute_force(h, bank, y[0], 3, config.k, config.temperature)
    return int((scores.argmax(1) == y[1]).sum())


@pytest.mark.parametrize("kind", ["backbone", "head", "pixels"])
def test_result_equals_brute_force(run, data, kind):
    flags = ["--baseline", kind] if kind == "pixels" else ["--features", kind]
    measure(run, *flags)
    config = Config(k=5, **({"baseline": kind} if kind == "pixels" else {"features": kind}))
    (row,) = rows(run)
    assert row["correct"] == count(checkpoint(data), data, config)
    assert row["top1"] == row["correct"] / 30 and row["n_test"] == 30 and row["n_train"] == 60
    assert list(row) == ROW.split()
    assert row["what"] == ("pixels" if kind == "pixels" else "moco") and row["features"] == kind
    assert row["checkpoint"] == "pretrain.pt" and row["evaluated_on"] == "test"
    assert row["epoch"] == (0 if kind == "pixels" else 3)
    assert row["seed"] == (0 if kind == "pixels" else 7)


def test_agrees_with_the_run_itself(pretrained, tmp_path):
    """The same protocol in two scripts: the last epoch's k-NN accuracy is measured again."""
    measure(pretrained, "--out", tmp_path)
    history = torch.load(pretrained / "pretrain.pt", weights_only=True)["history"]
    (row,) = rows(tmp_path)
    assert row["top1"] == history[-1]["knn_top1"] and row["epoch"] == history[-1]["epoch"]


def test_random_encoder_comes_from_the_seed_alone(run, data):
    measure(run, "--baseline", "random")
    measure(run, "--baseline", "random", "--seed", "1")
    write(run / "pretrain.pt", checkpoint(data, epoch=2))
    measure(run, "--baseline", "random")
    one, zero = rows(run)
    assert (one["seed"], zero["seed"], zero["what"], zero["epoch"]) == (1, 0, "random", 0)
    torch.manual_seed(0)
    saved = {"encoder": build_encoder("resnet8", 4).state_dict()}
    assert zero["correct"] == count(saved, data, Config(k=5))


def test_baselines_without_a_checkpoint(data, tmp_path):
    flags = ["--data", data, "--image-size", "8", "--out", tmp_path / "new" / "out"]
    measure("--baseline", "pixels", *flags)
    measure("--baseline", "random", "--arch", "resnet8", "--width", "4", *flags)
    measure("--baseline", "pixels", *flags[:-2])  # goes nowhere but to the screen
    pixels, random = rows(tmp_path / "new" / "out")
    assert pixels["what"] == "pixels" and random["what"] == "random"
    assert pixels["checkpoint"] is random["checkpoint"] is None


def test_several_checkpoints_of_any_kind_make_one_table(run, data, tmp_path, capsys):
    kept = write(run / "epoch0001.pt", checkpoint(data, epoch=1))
    linear = write(tmp_path / "b" / "linear.pt", checkpoint(data, kind="linear", method="simclr"))
    last = write(tmp_path / "c" / "last.pt", checkpoint(data, epoch=2))
    measure(run, kept, linear, last.parent)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "method" and len(lines) == 4
    assert [line.split()[:2] for line in lines] == [
        ["moco", "3"],
        ["moco", "1"],
        ["simclr", "3"],
        ["moco", "2"],
    ]
    assert [line.split()[-1] for line in lines] == list(
        map(str, [run / "pretrain.pt", kept, linear, last])
    )
    assert [row["checkpoint"] for row in rows(run)] == ["pretrain.pt", "epoch0001.pt"]
    for line, row in zip(lines, rows(run)):
        assert f"{100 * row['top1']:.2f} %" in line and f"{row['correct']} of 30 test" in line
    assert len(rows(linear.parent)) == len(rows(last.parent)) == 1


def test_holdout_and_limit_are_the_checkpoints_unless_given(data, tmp_path):
    saved = checkpoint(data)
    saved["config"] |= dict(limit=30, holdout=12)
    path = write(tmp_path / "run" / "last.pt", saved)
    measure(path)
    measure(path, "--limit", "21", "--holdout", "9")
    theirs, ours = rows(path.parent)
    assert (theirs["n_train"], theirs["n_test"], theirs["evaluated_on"]) == (30, 12, "holdout")
    assert (ours["n_train"], ours["n_test"], ours["evaluated_on"]) == (21, 9, "holdout")
    assert theirs["data_sha256"] != ours["data_sha256"]


def test_data_that_moved_is_asked_for(run, data, refused, tmp_path):
    moved = data.rename(tmp_path / "moved.npz")
    refused(knn_monitor.main, [run, *FAST], "pass --data")
    assert not (run / "knn.jsonl").exists()
    measure(run, "--data", moved)


def test_a_row_replaces_the_one_of_the_same_measurement(run, data):
    measure(run)
    measure(run, "--temperature", "0.2")
    measure(run, "--k", "7")
    old = rows(run)
    with open(run / "knn.jsonl", "a") as file:
        file.write('{"torn": ')
    measure(run)
    lines = (run / "knn.jsonl").read_text().splitlines()
    assert lines[2] == '{"torn": ' and len(lines) == 4
    assert [json.loads(line) for line in lines[:2]] == old[1:]
    strip = lambda row: {k: v for k, v in row.items() if k not in ("seconds", "machine")}
    assert strip(json.loads(lines[3])) == strip(old[0])


def test_a_row_behind_a_torn_one_starts_a_line(run):
    (run / "knn.jsonl").write_text('{"torn": ')
    measure(run)
    assert json.loads((run / "knn.jsonl").read_text().splitlines()[1])["what"] == "moco"


# Beside a run


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def test_watch_follows_a_run_until_it_is_complete(data, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    done = []

    def train():
        for epoch in (1, 2):
            write(run / "last.pt", checkpoint(data, epoch))
            wait_for(lambda epoch=epoch: len(rows(run)) == epoch)
            (run / "last.pt").write_bytes(b"half a copy")
            time.sleep(0.05)
        (run / "last.pt").unlink()
        time.sleep(0.05)
        write(run / "pretrain.pt", checkpoint(data, 3))
        done.append(True)

    thread = threading.Thread(target=train)
    thread.start()
    measure(run, "--watch")
    assert done
    thread.join()
    found = [(row["epoch"], row["checkpoint"]) for row in rows(run)]
    assert found == [(1, "last.pt"), (2, "last.pt"), (3, "pretrain.pt")]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3  # an announcement, and a header
    assert sorted(path.name for path in run.iterdir()) == ["knn.jsonl", "pretrain.pt"]


def test_watch_stops_cleanly_on_ctrl_c(data, tmp_path, capsys):
    run = write(tmp_path / "run" / "last.pt", checkpoint(data, 1)).parent

    def interrupt():
        wait_for(lambda: rows(run))
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert knn_monitor.main([str(run), "--watch", *FAST]) == 130
    thread.join()
    assert len(capsys.readouterr().err.splitlines()) == 1 and len(rows(run)) == 1


# Bad input


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--k 0", "from 1 to 60"),
        ("--k 61", "--k 61: must be from 1 to 60"),
        ("--k 31 --limit 30", "--k 31: must be from 1 to 30"),
        ("--k 2.5", "--k"),
        ("--temperature 0", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--features neck", "--features"),
        ("--baseline pixels --watch", "--watch"),
        ("--baseline random --features head", "--features head"),
        ("--data /no/such.npz", "/no/such.npz"),
        ("--holdout 60", "--holdout"),
        ("--device cuda:99", "--device"),
        ("--out /dev/null/x", "--out"),
        ("--neighbours 5", "--neighbours"),
        ("/no/such/run", "/no/such/run"),
    ],
)
def test_refused_flags(run, refused, flags, says):
    refused(knn_monitor.main, [run, *FAST, *flags.split()], says)
    assert not rows(run)


def test_refused_paths(run, data, refused, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(knn_monitor.main, [], "runs/moco")
    refused(knn_monitor.main, [tmp_path / "empty"], "pretrain.pt")
    refused(knn_monitor.main, [run / "pretrain.pt", "--watch"], "--watch")
    refused(knn_monitor.main, [run, run, "--watch"], "--watch")
    refused(knn_monitor.main, [tmp_path / "none", "--watch"], "--watch")


def test_refused_checkpoints(data, refused, tmp_path):
    def check(content, says, *flags):
        path = tmp_path / "bad.pt"
        path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
        refused(knn_monitor.main, [path, *FAST, *flags], says)

    whole = write(tmp_path / "good.pt", checkpoint(data)).read_bytes()
    check(b"<html>", "not a readable checkpoint")
    check(whole[:-500], "not a readable checkpoint")
    check({"weights": 1}, "format")
    check(checkpoint(data, width=8), "resnet8 of width 8")
    check(checkpoint(data, arch="resnet18"), "resnet18")
    check(checkpoint(data, head=None), "no head", "--features", "head")
    broken = checkpoint(data)
    broken["encoder"]["conv1.weight"][:] = math.nan
    check(broken, "not finite")


def test_refused_data_of_one_class(run, refused, tmp_path):
    one = write_npz(tmp_path / "one.npz", classes=1, size=8)
    refused(knn_monitor.main, [run, *FAST, "--data", one], "one class")
