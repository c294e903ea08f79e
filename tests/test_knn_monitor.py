"""knn_monitor.py: the vote equals its definition, each result records how it was measured, a run
under way is followed, the figures' files hold what they say, and bad input is refused.
"""

import copy
import errno
import functools
import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_npz
from torch import nn

import knn_monitor
from knn_monitor import Config, build_encoder, embed, knn_predict

ROW = """what checkpoint epoch features k temperature top1 correct n_test n_train data data_sha256
         evaluated_on seconds device precision torch seed"""
FAST = "--k 5 --device cpu --precision fp32".split()
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """--watch looks into the folder 500 times as often."""
    ours = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(seconds / 500)})
    monkeypatch.setattr(knn_monitor, "time", ours)


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
            scores[n, label] += math.exp((similarity - max(similar)[0]) / temperature)
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
    """What a pretraining script writes, with random weights."""
    encoder, head = copy.deepcopy(weights(epoch))
    about = dict(name="tiny", file=str(data), image_size=8, mean=list(MEAN), std=list(STD))
    config = dict(data="tiny", data_dir=str(data.parent), limit=0, holdout=0)
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


def test_feature_lengths_do_not_matter(vote):
    h, bank, _, labels = vote
    scale = 100 * torch.rand(len(bank), 1) + 0.01
    scores = knn_predict(h, bank, labels, 4, 20, 0.1)
    scaled = knn_predict(3 * h, scale * bank, labels, 4, 20, 0.1)
    torch.testing.assert_close(scaled, scores, rtol=1e-4, atol=1e-7)


def test_a_low_temperature_leaves_the_vote_to_the_nearest(vote):
    """It used to underflow, which made every vote one for class 0."""
    h, bank, _, labels = vote
    nearest = knn_predict(h, bank, labels, 4, 1, 0.1).argmax(1)
    for temperature in (1e-4, 1e-8):
        assert torch.equal(knn_predict(h, bank, labels, 4, 20, temperature).argmax(1), nearest)


# The features


def test_features_are_of_eval_mode_and_leave_no_trace(tmp_path):
    encoder = build_encoder("resnet8", 4).train()
    encoder(torch.randn(8, 3, 8, 8))  # statistics other than the initial ones
    saved = dict(encoder=encoder.state_dict(), arch="resnet8", width=4)
    model = knn_monitor.build_model(None, saved, Config())
    before = copy.deepcopy(model.state_dict())
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    about = {"mean": MEAN, "std": STD}
    h = embed(model, images, about, torch.device("cpu"), torch.float32, batch=7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    expected = encoder.eval()((images / 255 - mean) / std)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
    assert not h.requires_grad


def test_head_is_rebuilt_with_any_layers():
    for affine in (True, False):
        head = nn.Sequential(*new_head(), nn.BatchNorm1d(6, affine=affine))
        head(torch.randn(9, 16))
        x = torch.randn(5, 16)
        rebuilt = knn_monitor.load_head(head.state_dict())
        assert torch.equal(rebuilt.eval()(x), head.eval()(x))


# A measurement


def features(saved, data, config):
    """Bank, h and the labels of both, computed the long way in float64."""
    arrays, mean, std = np.load(data), torch.tensor(MEAN), torch.tensor(STD)
    x = [torch.tensor(arrays[name]).double() / 255 for name in ("x_train", "x_test")]
    x = [((part - mean) / std).permute(0, 3, 1, 2) for part in x]
    y = [torch.tensor(arrays[name]) for name in ("y_train", "y_test")]
    if config.baseline == "pixels":
        return *(part.flatten(1) for part in x), *y
    encoder = build_encoder("resnet8", 4).double().eval()
    encoder.load_state_dict(saved["encoder"])
    x = [encoder(part).detach() for part in x]
    if config.features == "head":
        head = new_head().double().eval()
        head.load_state_dict(saved["head"])
        x = [head(part).detach() for part in x]
    return *x, *y


def count(saved, data, config):
    """How many test images a measurement must get right."""
    bank, h, labels, y = features(saved, data, config)
    scores = brute_force(h, bank, labels, 3, config.k, config.temperature)
    return int((scores.argmax(1) == y).sum())


@pytest.mark.parametrize("kind", ["backbone", "head", "pixels"])
def test_result_equals_brute_force(run, data, kind):
    flags = ["--baseline", kind] if kind == "pixels" else ["--features", kind]
    measure(run, *flags)
    config = Config(k=5, **({"baseline": kind} if kind == "pixels" else {"features": kind}))
    (row,) = rows(run)
    assert row["correct"] == count(checkpoint(data), data, config)
    assert row["data"] == "tiny" and 0 < row["correct"] < 30
    assert row["top1"] == row["correct"] / 30 and row["n_test"] == 30 and row["n_train"] == 60
    assert sorted(row) == sorted(ROW.split())
    assert row["what"] == ("pixels" if kind == "pixels" else "moco") and row["features"] == kind
    assert row["checkpoint"] == "pretrain.pt" and row["evaluated_on"] == "test"
    assert row["epoch"] == (0 if kind == "pixels" else 3)
    assert row["seed"] == (0 if kind == "pixels" else 7)


def test_many_test_images_are_counted_in_parts(tmp_path):
    """More than fit into one similarity matrix, and a last part that is smaller."""
    data = write_npz(tmp_path / "more.npz", n_train=30, n_test=2100, classes=3, size=8)
    run = write(tmp_path / "run" / "pretrain.pt", checkpoint(data)).parent
    measure(run)
    (row,) = rows(run)
    assert row["correct"] == count(checkpoint(data), data, Config(k=5)) and row["n_test"] == 2100
    assert len(np.load(run / "map.npz")["points"]) == 2000


def test_agrees_with_the_run_itself(pretrained, tmp_path):
    """The same protocol in two scripts: the last epoch's k-NN accuracy is measured again."""
    measure(pretrained, "--out", tmp_path)
    history = torch.load(pretrained / "pretrain.pt", weights_only=True)["history"]
    (row,) = rows(tmp_path)
    assert row["top1"] == history[-1]["knn_top1"] and row["epoch"] == history[-1]["epoch"]


def test_figures_keep_showing_the_runs_own_images(run, data, tmp_path):
    """Measured on others, a row is added, but map and neighbours stay, unless --out is another."""
    sha256 = knn_monitor.find_data(checkpoint(data), Config(k=5)).about["sha256"]
    saved = checkpoint(data)
    write(run / "pretrain.pt", saved | dict(data=saved["data"] | dict(sha256=sha256)))
    other = write_npz(tmp_path / "other.npz", n_train=60, n_test=12, classes=3, size=8)
    measure(run)
    for out in ((), ("--out", tmp_path / "out")):
        measure(run, "--data", other, *out)
    assert [row["n_test"] for row in rows(run)] == [30, 12]
    assert len(np.load(run / "map.npz")["points"]) == 30
    assert len(np.load(tmp_path / "out/map.npz")["points"]) == 12


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


def test_without_a_run_the_newest_is_taken(data, tmp_path, capsys, monkeypatch, refused):
    """As when the script is pasted into a notebook, unedited"""
    monkeypatch.chdir(tmp_path)
    refused(knn_monitor.main, [], "pretrain first")
    for i, name in enumerate(("new", "old")):
        Path("runs").mkdir(exist_ok=True)
        file = write(Path("runs") / name / "pretrain.pt", checkpoint(data))
        os.utime(file, (1e9 - i, 1e9 - i))
    write(Path("runs/unfinished/last.pt"), checkpoint(data))
    measure("--baseline", "pixels")
    assert capsys.readouterr().out.startswith("no run is named: taking the newest one, runs/new\n")
    assert [str(path) for path in Path().rglob("knn.jsonl")] == ["runs/new/knn.jsonl"]


def test_it_says_if_pretraining_counted_other_neighbours(data, tmp_path, capsys):
    saved = checkpoint(data)
    for k, says in ((5, False), (20, True)):
        saved["config"]["knn_k"] = k
        measure(write(tmp_path / "run" / "pretrain.pt", saved))
        text = capsys.readouterr().out
        assert ("k = 5; the log of pretraining has k = 20\n" in text) == says


def test_several_checkpoints_of_any_kind_make_one_table(run, data, tmp_path, capsys):
    kept = write(run / "epoch0001.pt", checkpoint(data, epoch=1))
    linear = write(tmp_path / "b" / "linear.pt", checkpoint(data, kind="linear", method="simclr"))
    last = write(tmp_path / "c" / "last.pt", checkpoint(data, epoch=2))
    measure(run, kept, linear, last.parent)
    header, *lines, next_step = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["method", "epoch", "features", "k"] and len(lines) == 4
    assert next_step == f"next: python plots.py {run} {linear.parent} {last.parent}"
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
        assert f"{100 * row['top1']:.2f}%" in line and f"{row['correct']} of 30 test" in line
        assert line.split()[2:4] == ["backbone", "5"]
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
    refused(knn_monitor.main, [run, *FAST], f"--data {data}: ")
    assert not (run / "knn.jsonl").exists()
    measure(run, "--data", moved)


def test_images_that_were_replaced_are_refused(run, data, refused, tmp_path):
    measure(run)
    saved, row = torch.load(run / "pretrain.pt", weights_only=True), rows(run)[-1]
    write(run / "pretrain.pt", saved | {"data": saved["data"] | {"sha256": row["data_sha256"]}})
    measure(run)
    arrays = dict(np.load(data))
    np.savez(data, **arrays | {"x_test": arrays["x_test"] ^ 1})
    refused(knn_monitor.main, [*FAST, run], "these are not the images of the pretraining")
    measure(run, "--data", data)  # named, they are meant


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no memory")])
def test_too_little_memory_is_one_line(run, refused, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(knn_monitor, "embed", fail)
    refused(knn_monitor.main, [*FAST, run], "out of memory: set --limit")


def test_a_full_disk_is_one_line(run, refused, monkeypatch):
    def fail(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    says = refused(knn_monitor.main, [*FAST, run], "No space left on device", code=4)
    assert "knn.jsonl': name another folder with --out" in says and not [*run.glob("*.tmp")]


def test_older_checkpoints_name_their_data_as_the_flag_did(data, refused, tmp_path):
    """They have no data["file"], and what they name can be a folder: only its cache can be read."""
    old = checkpoint(data)
    del old["data"]["file"]
    (tmp_path / "photos").mkdir()
    run = write(tmp_path / "run" / "pretrain.pt", copy.deepcopy(old)).parent
    for name in (str(data), str(tmp_path / "photos")):
        old["data"]["name"] = name
        write(run / "pretrain.pt", old)
        if name == str(data):
            measure(run)
        else:
            refused(knn_monitor.main, [run, *FAST], "an .npz file")
    measure(run, "--data", data)
    assert [row["data"] for row in rows(run)] == [str(data)]


def test_a_row_replaces_the_one_of_the_same_measurement(run, data):
    measure(run)
    measure(run, "--temperature", "0.2")
    measure(run, "--k", "7")
    old = rows(run)
    measure(run)
    *others, again = rows(run)
    assert others == old[1:]
    assert again | {"seconds": 0} == old[0] | {"seconds": 0}


# What the figures show


def test_neighbours_equal_brute_force(run, data):
    measure(run)
    found, arrays = np.load(run / "neighbours.npz"), np.load(data)
    bank, h, labels, y = (x.numpy() for x in features(checkpoint(data), data, Config()))
    bank, h = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, h))
    assert (found["bank"], found["epoch"]) == (60, 3)
    assert found["images"].shape == (6, 5, 8, 8, 3) and found["images"].dtype == np.uint8
    assert found["cosines"].dtype == np.float32
    assert sorted(found["test_labels"]) == [0, 0, 1, 1, 2, 2]  # 3 classes; of 6, one image each
    seen = set()
    for i, image in enumerate(found["test_images"]):
        (test,) = np.flatnonzero((arrays["x_test"] == image).all((1, 2, 3)))
        seen.add(test)
        nearest = (-bank @ h[test]).argsort()[:5]
        np.testing.assert_array_equal(found["images"][i], arrays["x_train"][nearest])
        np.testing.assert_array_equal(found["labels"][i], labels[nearest])
        np.testing.assert_allclose(found["cosines"][i], (bank @ h[test])[nearest], atol=1e-5)
        assert found["test_labels"][i] == y[test]
    assert len(seen) == 6


def test_map_equals_the_singular_value_decomposition(run, data):
    measure(run, "--baseline", "random")
    measure(run)
    torch.manual_seed(0)
    random = {"encoder": build_encoder("resnet8", 4).state_dict()}
    for name, saved, epoch in (("map", checkpoint(data), 3), ("map-random", random, 0)):
        found = np.load(run / f"{name}.npz")
        _, h, _, y = (x.numpy() for x in features(saved, data, Config()))
        h = h / np.linalg.norm(h, axis=1, keepdims=True)
        u, s, directions = np.linalg.svd(h - h.mean(0), full_matrices=False)
        signs = [np.sign(row[abs(row).argmax()]) for row in directions[:2]]
        points = np.column_stack([u[:, :2] * s[:2] * signs, y])
        theirs = np.column_stack([found["points"], found["labels"]])
        order = lambda rows: rows[rows[:, 0].argsort()]
        np.testing.assert_allclose(order(theirs), order(points), atol=1e-5)
        np.testing.assert_allclose(found["shares"], (s**2 / (s**2).sum())[:2], rtol=1e-4)
        assert found["epoch"] == epoch and found["points"].dtype == np.float32


def test_the_same_images_are_chosen_for_every_run(run, data):
    """Figures of two runs, or of two epochs, show the same images; each class has equally many."""
    measure(run)
    one = dict(np.load(run / "neighbours.npz"))
    write(run / "pretrain.pt", checkpoint(data, epoch=2))
    measure(run, "--seed", "5")
    two = dict(np.load(run / "neighbours.npz"))
    assert np.array_equal(one["test_images"], two["test_images"]) and two["epoch"] == 2
    assert not np.array_equal(one["cosines"], two["cosines"])
    labels = torch.arange(10).repeat_interleave(300)
    chosen = knn_monitor.choose_images(labels, 2000)
    assert labels[chosen].bincount().tolist() == [200] * 10 and len(set(chosen.tolist())) == 2000
    assert len(set(labels[knn_monitor.choose_images(labels, 6)].tolist())) == 6
    assert (chosen % 300).max() > 250  # not simply the first 200 of each class


@pytest.mark.parametrize("flags", ["--features head", "--baseline pixels"])
def test_only_backbone_features_leave_figures(run, flags):
    measure(run, *flags.split())
    assert sorted(path.name for path in run.iterdir()) == ["knn.jsonl", "pretrain.pt"]


def test_a_kept_checkpoint_does_not_replace_the_figures_of_its_run(run, data, tmp_path):
    kept = write(run / "epoch0001.pt", checkpoint(data, epoch=1))
    measure(run, kept)
    measure(kept, "--out", tmp_path / "other")
    assert np.load(run / "map.npz")["epoch"] == 3 == np.load(run / "neighbours.npz")["epoch"]
    assert np.load(tmp_path / "other" / "map.npz")["epoch"] == 1


def test_fewer_images_than_the_figures_want(tmp_path):
    data = write_npz(tmp_path / "few.npz", n_train=4, n_test=3, classes=2, size=8)
    run = write(tmp_path / "run" / "pretrain.pt", checkpoint(data)).parent
    measure(run, "--k", "4")
    assert np.load(run / "neighbours.npz")["labels"].shape == (3, 4)
    assert len(np.load(run / "map.npz")["points"]) == 3


# While a run is under way


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
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 + 1  # an announcement, a header, three states, the next step
    assert lines[-1] == f"next: python plots.py {run}"
    names = ["knn.jsonl", "map.npz", "neighbours.npz", "pretrain.pt"]
    assert sorted(path.name for path in run.iterdir()) == names
    assert np.load(run / "map.npz")["epoch"] == 3


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
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and len(rows(run)) == 1
    assert len(printed.out.splitlines()) == 3  # the state did not change: it is measured once


def test_watch_refuses_a_damaged_result(run, refused):
    (run / "pretrain.pt").write_bytes(b"half a copy")
    refused(knn_monitor.main, [run, "--watch", *FAST], "not a readable checkpoint")


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
    check({"weights": 1}, "not a readable checkpoint")
    check(checkpoint(data, width=8), "resnet8 of width 8")
    check(checkpoint(data, arch="resnet18"), "resnet18")
    check(checkpoint(data, head=None), "no head", "--features", "head")
    broken = checkpoint(data)
    broken["encoder"]["conv1.weight"][:] = math.nan
    check(broken, "not finite")


def test_refused_data_of_one_class(run, refused, tmp_path):
    one = write_npz(tmp_path / "one.npz", classes=1, size=8)
    refused(knn_monitor.main, [run, *FAST, "--data", one], "one class")
