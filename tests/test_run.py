"""Nothing lost, nothing wrong in silence: what happens to a run when things go wrong."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_harness import digest

import fast_moco
import linear_eval
import moco_cifar
import simclr

ROOT = Path(__file__).parents[1]
LONG = os.environ.get("LONG_TESTS") == "1"

# Most tests take MoCo for all: what saves, resumes and stops is the same text in each script
OWN = {
    moco_cifar: "--bn-splits 2 --queue-size 50 --dim 8",
    simclr: "--head-hidden 16 --dim 8",
    fast_moco: "--framework nnclr --queue-size 50 --head-hidden 16 --dim 8 --predictor-hidden 4",
}
every_script = pytest.mark.parametrize("script", OWN, ids=lambda script: script.__name__)


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """A run of 3 epochs of 6 steps that takes a second"""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 10
    x = rng.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    text = f"--data {path} --image-size 8 --arch resnet8 --width 4 --epochs 3 --batch-size 16"
    text += " --knn-k 5 --knn-every 1 --save-seconds 0 --precision fp32 --device cpu"
    return text.split()


@pytest.fixture(scope="module")
def flags(common):
    return [*common, *OWN[moco_cifar].split()]


@pytest.fixture
def whole(flags, tmp_path):
    """The digest of an uninterrupted run"""
    assert moco_cifar.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    return digest(tmp_path / "whole" / "pretrain.pt")


class Crash(BaseException):
    pass


@contextlib.contextmanager
def crash_after(monkeypatch, step, action=None, script=moco_cifar):
    """End the run in the middle, after so many steps, with its state saved"""
    descend = script.Run.descend

    def stop(self, *loss):
        descend(self, *loss)
        if self.step == step:
            (action or self.throw)(self)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "descend", stop)
        patch.setattr(script.Run, "throw", throw, raising=False)
        yield


def throw(self, *_):
    raise Crash


def interrupt(monkeypatch, flags, out, step=8, script=moco_cifar):
    with crash_after(monkeypatch, step, script=script), pytest.raises(Crash):
        script.main([*flags, "--out", str(out)])


# ---------------------------------------------------------------- kills
def harness(script, runs, folder, flags):
    command = [sys.executable, ROOT / "tests/kill_harness.py", script, str(runs), folder, "--"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    print(script, done.stdout)
    return json.loads(done.stdout)


@every_script
def test_killed_runs_end_bit_identical(script, common, tmp_path):  # R1
    runs = 20 if LONG else 3
    result = harness(script.__name__, runs, tmp_path, [*common, *OWN[script].split()])
    assert result["equal"] == runs and result["kills"] >= 4 * runs, result


def test_killed_probes_end_bit_identical(flags, tmp_path):  # R1
    """linear_eval keeps no state: it starts again, and nothing half-written is in its way."""
    assert moco_cifar.main([*flags, "--out", str(tmp_path / "run")]) == 0
    how = f"{tmp_path / 'run'} --epochs 40 --batch-size 8 --augment --precision fp32 --device cpu"
    runs = 20 if LONG else 2
    result = harness("linear_eval", runs, tmp_path, how.split())
    assert result["equal"] == runs and result["kills"] >= 4 * runs, result


@pytest.mark.parametrize(
    "item", ["model", "optimizer", "step", "loss", "history", "queue.keys", "queue.pointer"]
    + ["encoder_k.0.conv1.weight", "encoder_k.0.bn1.running_mean", "encoder_q.0.bn1.running_mean"]
)  # fmt: skip
def test_missing_items_are_refused(item, flags, tmp_path, monkeypatch):  # R2
    out = tmp_path / "run"
    interrupt(monkeypatch, flags, out)
    for name in ("last.pt", "prev.pt"):
        saved = torch.load(out / name, weights_only=True)
        state = saved["train_state"]
        holder = saved if item == "history" else state["model"] if "." in item else state
        del holder[item]
        torch.save(saved, out / name)
    assert moco_cifar.main([*flags, "--out", str(out)]) == 2


ITEMS = {
    moco_cifar: ["queue.keys", "queue.pointer", "encoder_k.0.conv1.weight", "optimizer"],
    simclr: ["0.bn1.running_mean", "1.2.weight", "optimizer"],
    fast_moco: ["queue.keys", "queue.pointer", "target.0.conv1.weight", "optimizer"],
}


@every_script
def test_resets_are_noticed(script, common, tmp_path, monkeypatch):  # R2
    """The comparison of digests can fail: an item that is not restored gives another result."""
    flags = [*common, *OWN[script].split()]
    assert script.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    for item in ITEMS[script]:
        out = tmp_path / item
        interrupt(monkeypatch, flags, out, script=script)
        saved = torch.load(out / "last.pt", weights_only=True)
        if item == "optimizer":
            saved["train_state"]["optimizer"]["state"] = {}
        else:
            saved["train_state"]["model"][item].zero_()
        torch.save(saved, out / "last.pt")
        assert script.main([*flags, "--out", str(out)]) == 0
        assert digest(out / "pretrain.pt") != digest(tmp_path / "whole/pretrain.pt"), item


def test_log_has_each_epoch_once(flags, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for step in (3, 8, 13):
        interrupt(monkeypatch, flags, out, step)
    assert moco_cifar.main([*flags, "--out", str(out)]) == 0
    head, *rows = map(json.loads, (out / "pretrain.jsonl").read_text().splitlines())
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert head["config"]["seed"] == 0 and head["machine"]["torch"] == torch.__version__


# ---------------------------------------------------------------- saving and loading
def test_crash_at_every_call_of_a_save(tmp_path, monkeypatch):  # R3
    """Whatever call of a save is the last, the old or the new state can be read."""
    path, previous = tmp_path / "last.pt", tmp_path / "prev.pt"
    calls = {"n": 0, "at": None}

    def counted(call):
        def wrapped(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == calls["at"]:
                raise Crash
            return call(*args, **kwargs)

        return wrapped

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(moco_cifar, "open", counted(open), raising=False)
    state = dict.fromkeys(moco_cifar.KEYS, {}) | {"format": moco_cifar.FORMAT}
    state["value"] = torch.zeros(3)
    moco_cifar.save_checkpoint(path, state, previous)
    calls["n"] = 0
    moco_cifar.save_checkpoint(path, state | {"value": torch.ones(3)}, previous)
    total = calls["n"]
    for at in range(1, total + 1):
        for file in tmp_path.iterdir():
            file.unlink()
        calls.update(n=0, at=None)
        moco_cifar.save_checkpoint(path, state, previous)
        calls.update(n=0, at=at)
        with pytest.raises(Crash):
            moco_cifar.save_checkpoint(path, state | {"value": torch.ones(3)}, previous)
        newest = path if path.exists() else previous
        assert moco_cifar.load_checkpoint(newest)["value"].tolist() in ([0.0] * 3, [1.0] * 3)
    assert total >= 4


def test_damaged_files_never_load_wrong(flags, tmp_path, monkeypatch):  # R4
    out = tmp_path / "run"
    interrupt(monkeypatch, flags, out)
    content, wanted = (out / "last.pt").read_bytes(), digest(out / "last.pt")
    rng, path, refused, n = random.Random(0), tmp_path / "x.pt", 0, 1000 if LONG else 200
    for i in range(n):
        damaged, at = bytearray(content), rng.randrange(len(content))
        if i % 4 == 0:
            damaged = damaged[:at]
        elif i % 4 == 1:
            damaged[at] ^= 1 << rng.randrange(8)
        elif i % 4 == 2:
            damaged[at : at + 4096] = bytes(len(damaged[at : at + 4096]))
        else:
            damaged[at : at + 64] = rng.randbytes(len(damaged[at : at + 64]))
        path.write_bytes(damaged)
        try:
            moco_cifar.load_checkpoint(path)
        except moco_cifar.Damaged as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert digest(path) == wanted
    print(f"{refused} of {n} damaged files refused, the others were unharmed")
    assert refused > 0.9 * n


def test_damaged_state_falls_back_to_the_one_before(flags, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    interrupt(monkeypatch, flags, out)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-100])
    capsys.readouterr()
    assert moco_cifar.main([*flags, "--out", str(out)]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "last.pt" in errors[0] and "prev.pt" in errors[0]
    assert digest(out / "pretrain.pt") == whole


def test_no_state_can_be_read(flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    interrupt(monkeypatch, flags, out)
    for name in ("last.pt", "prev.pt"):
        (out / name).write_bytes(b"<html>quota exceeded</html>")
    assert moco_cifar.main([*flags, "--out", str(out)]) == 2
    assert "--restart" in capsys.readouterr().err
    assert (out / "last.pt").exists()
    assert moco_cifar.main([*flags, "--out", str(out), "--restart"]) == 0


# ---------------------------------------------------------------- signals, locks, disks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(number, flags, whole, tmp_path, monkeypatch, capsys):  # R5
    out = tmp_path / "run"
    quiet = [*flags, "--save-seconds", "1000", "--out", str(out)]
    handler = signal.getsignal(number)
    with crash_after(monkeypatch, 8, lambda run: os.kill(os.getpid(), number)):
        assert moco_cifar.main(quiet) == 128 + number
    assert "the same command goes on" in capsys.readouterr().err
    assert torch.load(out / "last.pt", weights_only=True)["train_state"]["step"] == 9
    assert signal.getsignal(number) == handler
    assert moco_cifar.main(quiet) == 0
    assert digest(out / "pretrain.pt") != "" and not (out / "last.pt").exists()


def full_disk(times, names=("last.pt",)):
    """A write_atomic that fails so many times with ENOSPC, then works"""
    write, left = moco_cifar.write_atomic, [times]

    def fail(path, *args, **kwargs):
        if path.name in names and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args, **kwargs)

    return fail


def test_full_disk_is_retried(flags, whole, tmp_path, monkeypatch, capsys):  # R6
    out = tmp_path / "run"
    interrupt(monkeypatch, flags, out, 4)
    monkeypatch.setattr(moco_cifar, "write_atomic", full_disk(2))
    assert moco_cifar.main([*flags, "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("No space left on device") == 2
    assert digest(out / "pretrain.pt") == whole


def test_full_disk_for_good(flags, tmp_path, monkeypatch, capsys):  # R6
    out = tmp_path / "run"
    interrupt(monkeypatch, flags, out, 4)
    before = digest(out / "last.pt")
    monkeypatch.setattr(
        moco_cifar, "write_atomic", full_disk(1000, ("last.pt", "pretrain.jsonl", "pretrain.pt"))
    )
    assert moco_cifar.main([*flags, "--out", str(out)]) == 4
    assert "error: " in capsys.readouterr().err
    assert digest(out / "last.pt") == before and not list(out.glob("*.tmp"))


def test_second_run_is_refused(flags, tmp_path):  # R7
    """Within 2 s, naming the holder; after the holder's kill -9 the folder is free at once."""
    out = tmp_path / "run"
    code = (
        "import moco_cifar, os, time, sys\n"
        "lock = moco_cifar.lock_folder(moco_cifar.Path(sys.argv[1]))\n"
        "print('locked', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, out], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        start = time.monotonic()
        with pytest.raises(moco_cifar.Halt, match=f"process {holder.pid}"):
            moco_cifar.lock_folder(out)
        assert time.monotonic() - start < 2
    finally:
        holder.kill()
        holder.wait()
    moco_cifar.lock_folder(out).close()


# ---------------------------------------------------------------- divergence
@pytest.mark.parametrize("what", ["loss", "weights"])
def test_nan_stops_the_run(what, flags, tmp_path, monkeypatch, capsys):  # R9
    out = tmp_path / "run"

    def poison(run):
        (run.loss if what == "loss" else next(run.model.parameters()).data).fill_(float("nan"))

    with crash_after(monkeypatch, 8, poison):
        assert moco_cifar.main([*flags, "--out", str(out)]) == 3
    assert "lower --lr" in capsys.readouterr().err
    for path in out.glob("*.pt"):
        values = [torch.load(path, weights_only=True)]
        for value in values:
            values.extend(value.values() if isinstance(value, dict) else ())
            assert not isinstance(value, torch.Tensor) or value.isfinite().all()
    assert "NaN" not in (out / "pretrain.jsonl").read_text()


# ---------------------------------------------------------------- the same seed, the same weights
@pytest.mark.parametrize(
    "other", ["--knn-every 0", "--knn-every 2 --knn-k 7", "--save-seconds 1000", "--keep-every 1"]
)
@every_script
def test_monitors_do_not_disturb(script, other, common, tmp_path):  # R8
    weights = []
    for name, more in (("a", []), ("b", other.split())):
        flags = [*common, *OWN[script].split(), *more, "--out", str(tmp_path / name)]
        assert script.main(flags) == 0
        weights.append(torch.load(tmp_path / name / "pretrain.pt", weights_only=True)["encoder"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@every_script
def test_a_compiled_step_is_the_same_step(script, common, tmp_path, monkeypatch, capsys):
    """Traced as for torch.compile, but not translated, which would take minutes; stopped, too."""
    flags, real, calls = [*common, *OWN[script].split()], torch.compile, []

    def trace(function, **how):
        calls.append(how)
        return real(function, **how, backend=lambda graph, _: calls.append(graph) or graph)

    assert script.main([*flags, "--out", str(tmp_path / "a")]) == 0
    monkeypatch.setattr(torch, "compile", trace)
    torch.compiler.reset()
    interrupt(monkeypatch, [*flags, "--compile"], tmp_path / "b", script=script)
    assert calls and calls[0] == {"dynamic": False} and len(calls) > 1  # something was traced
    assert "compiled" in capsys.readouterr().out
    assert script.main([*flags, "--out", str(tmp_path / "b")]) == 0  # a compiler is not needed
    a, b = (torch.load(tmp_path / name / "pretrain.pt", weights_only=True) for name in "ab")
    for part in ("encoder", "head"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


def test_compile_without_a_compiler(flags, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(moco_cifar.main, [*flags, "--compile", "--out", tmp_path / "a"], "needs a C++ compiler")
    assert not (tmp_path / "a").exists()


def test_seed_matters(flags, tmp_path, whole):
    assert moco_cifar.main([*flags, "--seed", "1", "--out", str(tmp_path / "b")]) == 0
    assert digest(tmp_path / "b" / "pretrain.pt") != whole


def test_kept_checkpoints(flags, tmp_path):
    assert moco_cifar.main([*flags, "--keep-every", "1", "--out", str(tmp_path / "a")]) == 0
    names = sorted(path.name for path in (tmp_path / "a").glob("*.pt"))
    assert names == ["epoch0001.pt", "epoch0002.pt", "pretrain.pt"]
    epochs = [torch.load(tmp_path / "a" / name, weights_only=True)["epoch"] for name in names]
    assert epochs == [1, 2, 3]


# ---------------------------------------------------------------- files of earlier versions
@pytest.mark.parametrize("path", sorted((ROOT / "tests/golden").glob("*.pt")), ids=lambda p: p.name)
def test_old_checkpoints_still_load(path):  # R12
    """Each format's file is kept; its encoder must give the features that were stored with it."""
    checkpoint = moco_cifar.load_checkpoint(path)
    images = (torch.arange(2 * 3 * 8 * 8) % 256 / 255).view(2, 3, 8, 8)
    features = linear_eval.load_encoder(checkpoint)(images)
    torch.testing.assert_close(features, checkpoint["features"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_weights_of_a_wrapped_model_are_adopted_with_a_note(prefix, tmp_path, capsys):
    path = tmp_path / "wrapped.pt"
    plain = torch.load(ROOT / "tests/golden/pretrain-1.pt", weights_only=True)
    wrapped = {prefix + name: value for name, value in plain["encoder"].items()}
    torch.save(plain | {"encoder": wrapped}, path)
    assert moco_cifar.load_checkpoint(path)["encoder"].keys() == plain["encoder"].keys()
    assert prefix.split(".")[0] in capsys.readouterr().out
