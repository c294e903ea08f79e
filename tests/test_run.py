"""Nothing lost, nothing wrong in silence: what happens to a run when things go wrong."""

import contextlib
import errno
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The digest of an uninterrupted run"""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert moco_cifar.main([*flags, "--out", str(out)]) == 0
    return digest(out / "pretrain.pt")


class Crash(BaseException):
    pass


def throw(run):
    raise Crash


@contextlib.contextmanager
def at_step(step, action=throw, script=moco_cifar):
    """Act in the middle of a step, after so many others, which are all saved in the runs here."""
    record = script.Run.record

    def act(self, loss):
        if self.step == step:
            action(self)
        return record(self, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Run, "record", act)
        yield


def interrupt(flags, out, step=8, script=moco_cifar):
    with at_step(step, script=script), pytest.raises(Crash):
        script.main([*flags, "--out", str(out)])


@pytest.fixture(scope="module")
def begun(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "begun"
    interrupt(flags, out)
    return out


@pytest.fixture
def interrupted(begun, tmp_path):
    """The folder of a run that was interrupted after 8 of its 18 steps"""
    return shutil.copytree(begun, tmp_path / "run")


def test_a_crash_loses_at_most_a_minute(flags, tmp_path, monkeypatch):
    """With the default --save-seconds, on a clock that says that a step takes 7 s"""
    clock, lost = [1000.0], []
    names = {name: getattr(time, name) for name in ("sleep", "strftime", "gmtime")}
    monkeypatch.setattr(moco_cifar, "time", SimpleNamespace(monotonic=lambda: clock[0], **names))
    record = moco_cifar.Run.record

    def slow(run, loss):
        clock[0] += 7
        state = torch.load(run.out / "last.pt", weights_only=True)
        lost.append(7 * (run.step + 1 - state["train_state"]["step"]))
        return record(run, loss)

    monkeypatch.setattr(moco_cifar.Run, "record", slow)
    flags = [*flags, "--save-seconds", str(moco_cifar.Config.save_seconds)]
    assert moco_cifar.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert len(lost) == 18 and 56 <= max(lost) <= 60 + 7  # the check comes between steps


# ---------------------------------------------------------------- kills
def harness(script, runs, folder, flags):
    command = [sys.executable, ROOT / "tests/kill_harness.py", script, str(runs), folder, "--"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    print(script, done.stdout)
    return json.loads(done.stdout)


@every_script
def test_killed_runs_end_bit_identical(script, common, tmp_path):  # R1
    runs = 20 if LONG else 2
    result = harness(script.__name__, runs, tmp_path, [*common, *OWN[script].split()])
    assert result["equal"] == runs and result["kills"] >= 4 * runs, result


def test_killed_probes_end_bit_identical(flags, tmp_path):  # R1
    """linear_eval keeps no state: it starts again, and nothing half-written is in its way."""
    assert moco_cifar.main([*flags, "--out", str(tmp_path / "run")]) == 0
    how = f"{tmp_path / 'run'} --lr 1 --epochs 20 --batch-size 8 --augment --precision fp32"
    runs = 20 if LONG else 1
    result = harness("linear_eval", runs, tmp_path, how.split())
    assert result["equal"] == runs and result["kills"] >= 4 * runs, result


@pytest.mark.parametrize(
    "item", ["model", "optimizer", "step", "loss", "history", "queue.keys", "queue.pointer"]
    + ["encoder_k.0.conv1.weight", "encoder_k.0.bn1.running_mean", "encoder_q.0.bn1.running_mean"]
)  # fmt: skip
def test_missing_items_are_refused(item, flags, interrupted, refused):  # R2
    out = interrupted
    for name in ("last.pt", "prev.pt"):
        saved = torch.load(out / name, weights_only=True)
        state = saved["train_state"]
        holder = saved if item == "history" else state["model"] if "." in item else state
        del holder[item]
        torch.save(saved, out / name)
    refused(moco_cifar.main, [*flags, "--out", out], "last.pt: not a state of this run")


ITEMS = {
    moco_cifar: ["queue.keys", "queue.pointer", "encoder_k.0.conv1.weight", "optimizer"],
    simclr: ["0.bn1.running_mean", "1.2.weight", "optimizer"],
    fast_moco: ["queue.keys", "queue.pointer", "target.0.conv1.weight", "optimizer"],
}


@every_script
def test_resets_are_noticed(script, common, tmp_path):  # R2
    """The comparison of digests can fail: an item that is not restored gives another result."""
    flags = [*common, *OWN[script].split()]
    assert script.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    interrupt(flags, tmp_path / "begun", script=script)
    for item in ITEMS[script]:
        out = shutil.copytree(tmp_path / "begun", tmp_path / item)
        saved = torch.load(out / "last.pt", weights_only=True)
        if item == "optimizer":
            saved["train_state"]["optimizer"]["state"] = {}
        else:
            saved["train_state"]["model"][item].zero_()
        torch.save(saved, out / "last.pt")
        assert script.main([*flags, "--out", str(out)]) == 0
        assert digest(out / "pretrain.pt") != digest(tmp_path / "whole/pretrain.pt"), item


def test_log_has_each_epoch_once(flags, tmp_path):
    out = tmp_path / "run"
    for step in (3, 8, 13):
        interrupt(flags, out, step)
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
    needed = "method epoch epochs config data arch width dim encoder".split()
    state = {**dict.fromkeys(needed), "format": moco_cifar.FORMAT, "value": torch.zeros(3)}
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


def test_damaged_files_never_load_wrong(interrupted, tmp_path):  # R4
    out = interrupted
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
        except moco_cifar.UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert digest(path) == wanted
    print(f"{refused} of {n} damaged files refused, the others were unharmed")
    assert refused > 0.9 * n


def test_damaged_state_falls_back_to_the_one_before(flags, whole, interrupted, capsys):
    out = interrupted
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-100])
    capsys.readouterr()
    assert moco_cifar.main([*flags, "--out", str(out)]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "last.pt" in errors[0] and "prev.pt" in errors[0]
    assert digest(out / "pretrain.pt") == whole


def test_a_crash_after_that_leaves_a_whole_state(flags, whole, interrupted, monkeypatch):
    """At the worst moment: the next save has renamed last.pt, and not yet put the new one there."""
    rename = os.replace

    def replace(source, target):
        if str(source).endswith(".tmp"):
            raise Crash
        rename(source, target)

    (interrupted / "last.pt").write_bytes(b"damaged")
    argv = [*flags, "--out", str(interrupted)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Crash):
            moco_cifar.main(argv)
    assert moco_cifar.main(argv) == 0
    assert digest(interrupted / "pretrain.pt") == whole


def test_no_state_can_be_read(flags, interrupted, refused):
    out = interrupted
    for name in ("last.pt", "prev.pt"):
        (out / name).write_bytes(b"<html>quota exceeded</html>")
    refused(moco_cifar.main, [*flags, "--out", out], "--restart")
    assert (out / "last.pt").exists()
    of_it = "linear.pt", "linear.jsonl", "knn.jsonl", "map-random.npz", "epoch0002/linear.pt"
    of_it += "random/linear.pt", "supervised-0.1/linear.jsonl", "finetune-0.1/linear.pt"
    of_it += "probe/linear.pt", "probe-0.1/epoch0002/linear.pt", "last.pt.1234.tmp"
    others = "mine.pt", "mine.npz", "mine/linear.pt", "mine.tmp"
    for name in (*of_it, *others):
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).touch()
    assert moco_cifar.main([*flags, "--out", str(out), "--restart"]) == 0
    left = {name for name in (*of_it, *others) if (out / name).exists()}
    assert left == set(others)  # what was measured of the encoder that is gone has gone too


@pytest.mark.parametrize("more", [[], ["--restart"]])
def test_the_advice_after_a_stop_does_not_start_over(flags, tmp_path, capsys, more):
    argv = [*flags, *more, "--out", str(tmp_path)]
    with at_step(8, lambda run: run.on_signal(signal.SIGTERM, None)):
        assert moco_cifar.main(argv) == 128 + signal.SIGTERM
    advice = ", without --restart" if more else ""
    assert capsys.readouterr().err.endswith(f"saved; to resume, run it again{advice}\n")


@pytest.mark.parametrize("count, first", [("1", 8), ("0", 0)])
def test_torchrun_repeats_a_command_and_resumes(
    flags, interrupted, monkeypatch, capsys, count, first
):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert moco_cifar.main([*flags, "--restart", "--out", str(interrupted)]) == 0
    assert f"steps {first} to 18" in capsys.readouterr().out


def test_a_log_file_shows_an_epoch_as_soon_as_it_ends(flags, tmp_path, monkeypatch):
    """Lines for a file are kept back by default, until 8 KB have come together."""
    seen = []

    def look(run):
        seen.append((tmp_path / "log").read_text())
        throw(run)

    with open(tmp_path / "log", "w") as log, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", log)
        with at_step(7, look), pytest.raises(Crash):
            moco_cifar.main([*flags, "--out", str(tmp_path / "run")])
    assert "epoch 1/3: loss" in seen[0]


def test_other_images_are_refused(common, flags, interrupted, tmp_path, refused):
    """One pixel has changed: not the images that the run began with."""
    out, copy = interrupted, tmp_path / "tiny.npz"
    arrays = dict(np.load(common[1]))
    arrays["x_train"][0, 0, 0, 0] ^= 1
    np.savez(copy, **arrays)
    refused(moco_cifar.main, [*flags, "--data", copy, "--out", out], "other settings (images ")
    assert (out / "last.pt").exists()


def test_another_machine_is_noted(flags, whole, interrupted, capsys):
    out = interrupted
    saved = torch.load(out / "last.pt", weights_only=True)
    saved["machine"] |= {"threads": 99, "torch": "1.0"}
    torch.save(saved, out / "last.pt")
    assert moco_cifar.main([*flags, "--out", str(out)]) == 0
    assert "threads, torch changed: resuming, but not bit for bit" in capsys.readouterr().out
    assert digest(out / "pretrain.pt") == whole


def test_a_run_goes_on_where_precision_is_fp16(flags, tmp_path, monkeypatch, capsys):
    """Begun without a scaler, as on an A100, and resumed with one, as on a T4."""
    interrupt(flags, tmp_path)
    half = moco_cifar.start_device(moco_cifar.Config(device="cpu"))[0], torch.float16
    monkeypatch.setattr(moco_cifar, "start_device", lambda config: half)
    assert moco_cifar.main([*flags, "--out", str(tmp_path)]) == 0
    assert "precision changed: resuming, but not bit for bit" in capsys.readouterr().out


def test_the_scale_of_fp16_is_resumed(flags, tmp_path):
    """It doubles after 4 good steps here: a scale that starts anew gives another state."""
    scaler = functools.partial(torch.amp.GradScaler, growth_interval=4)
    states, half = [], [*flags, "--precision", "fp16"]
    for name in ("whole", "resumed"):
        out = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.amp, "GradScaler", scaler)
            if name == "resumed":
                interrupt(half, out, 10)
            interrupt(half, out, 17)
        states.append(torch.load(out / "last.pt", weights_only=True)["train_state"]["scaler"])
    assert states[0] == states[1] and states[0]["scale"] > 2**16


# ---------------------------------------------------------------- signals, locks, disks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(number, flags, whole, tmp_path, capsys):  # R5
    out, handler = tmp_path / "run", signal.getsignal(number)
    quiet = [*flags, "--save-seconds", "1000", "--out", str(out)]
    with at_step(8, lambda run: os.kill(os.getpid(), number)):
        assert moco_cifar.main(quiet) == 128 + number
    (line,) = capsys.readouterr().err.splitlines()
    assert f"stopped by signal {int(number)}, saved" in line and "resume" in line
    assert torch.load(out / "last.pt", weights_only=True)["train_state"]["step"] == 9
    assert signal.getsignal(number) == handler
    assert moco_cifar.main([*flags, "--out", str(out)]) == 0
    assert digest(out / "pretrain.pt") == whole and not (out / "last.pt").exists()


def test_a_second_signal_stops_at_once(flags, whole, tmp_path):
    out = tmp_path / "run"
    with at_step(8, lambda run: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]):
        assert moco_cifar.main([*flags, "--out", str(out)]) == 130
    assert torch.load(out / "last.pt", weights_only=True)["train_state"]["step"] == 8
    assert moco_cifar.main([*flags, "--out", str(out)]) == 0
    assert digest(out / "pretrain.pt") == whole


def test_ctrl_c_while_the_images_are_read(flags, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(
        moco_cifar, "load_data", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(9)
    )
    refused(moco_cifar.main, [*flags, "--out", tmp_path], "stopped", code=130)


def full_disk(times, names=("last.pt",)):
    """A write_atomic that fails so many times with ENOSPC, then works"""
    write, left = moco_cifar.write_atomic, [times]

    def fail(path, *args, **kwargs):
        if path.name in names and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args, **kwargs)

    return fail


@pytest.fixture
def waits(monkeypatch):
    """The seconds for which the script would have slept"""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("names", ["last.pt", "pretrain.jsonl", "pretrain.pt"])
def test_full_disk_is_retried(names, flags, whole, interrupted, monkeypatch, capsys, waits):  # R6
    out = interrupted
    monkeypatch.setattr(moco_cifar, "write_atomic", full_disk(2, names))
    assert moco_cifar.main([*flags, "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("No space left on device") == 2
    assert waits == [10, 100] and digest(out / "pretrain.pt") == whole


def test_full_disk_for_good(flags, interrupted, monkeypatch, capsys, waits):  # R6
    out = interrupted
    before = digest(out / "last.pt")
    every = ("last.pt", "pretrain.jsonl", "pretrain.pt")
    monkeypatch.setattr(moco_cifar, "write_atomic", full_disk(1000, every))
    assert moco_cifar.main([*flags, "--out", str(out)]) == 4
    *warnings, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and len(warnings) == 3 and waits == [10, 100, 800]
    assert digest(out / "last.pt") == before and not list(out.glob("*.tmp"))


def test_full_disk_at_the_start(flags, tmp_path, monkeypatch, refused, waits):
    """Nothing is lost yet, so the user should know at once."""
    monkeypatch.setattr(moco_cifar, "write_atomic", full_disk(1000))
    refused(moco_cifar.main, [*flags, "--out", tmp_path / "run"], "last.pt can't be written")
    assert not waits


def test_a_drive_that_cannot_be_locked(flags, tmp_path, monkeypatch, capsys, whole):
    """Some network drives can't"""

    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert moco_cifar.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert "run can't be locked: start no second run there" in capsys.readouterr().out
    assert digest(tmp_path / "run/pretrain.pt") == whole


def test_second_run_is_refused(flags, tmp_path, refused):  # R7
    """Within 2 s, naming the holder; after the holder's kill -9 the folder is free at once."""
    argv = [*flags, "--out", str(tmp_path / "run")]
    code = (
        "import moco_cifar, sys, time\n"
        "moco_cifar.Run.record = lambda *_: print('holds', flush=True) or time.sleep(600)\n"
        "moco_cifar.main(sys.argv[1:])"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert "holds\n" in holder.stdout  # reads until then
        start = time.monotonic()
        refused(moco_cifar.main, argv, f"in use by process {holder.pid} ")
        refused(moco_cifar.main, [*argv, "--restart"], f"in use by process {holder.pid} ")
        assert time.monotonic() - start < 2
    finally:
        holder.kill()
        holder.wait()
    assert moco_cifar.main(argv) == 0


# ---------------------------------------------------------------- divergence
@pytest.mark.parametrize("what", ["loss", "weights"])
def test_nan_stops_the_run(what, flags, tmp_path, capsys):  # R9
    out = tmp_path / "run"

    def poison(run):
        (run.loss if what == "loss" else next(run.model.parameters()).data).fill_(float("nan"))

    with at_step(8, poison):
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


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6: its tracing changes some bits")
@every_script
def test_a_compiled_step_is_the_same_step(script, common, tmp_path, monkeypatch, capsys):
    """Traced as for torch.compile, but not translated, which would take minutes; stopped, too."""
    flags, real, calls = [*common, *OWN[script].split()], torch.compile, []
    if script is moco_cifar:
        flags += ["--bn-splits", "1"]  # in groups it is another call when compiled

    def trace(function, **how):
        calls.append(how)
        return real(function, **how, backend=lambda graph, _: calls.append(graph) or graph)

    assert script.main([*flags, "--out", str(tmp_path / "a")]) == 0
    monkeypatch.setattr(torch, "compile", trace)
    torch.compiler.reset()
    interrupt([*flags, "--compile"], tmp_path / "b", script=script)
    assert calls[:2] == [{"dynamic": False}] * 2 and len(calls) >= 4  # model and augmentation
    capsys.readouterr()
    assert script.main([*flags, "--out", str(tmp_path / "b")]) == 0  # a compiler is not needed
    assert "compile changed: resuming, but not bit for bit" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / name / "pretrain.pt", weights_only=True) for name in "ab")
    for part in ("encoder", "head"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


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
    checkpoint, encoder = linear_eval.load_encoder(path)
    images = (torch.arange(2 * 3 * 8 * 8) % 256 / 255).view(2, 3, 8, 8)
    torch.testing.assert_close(encoder(images), checkpoint["features"], rtol=1e-4, atol=1e-5)


@pytest.fixture
def short(tiny_npz, tmp_path):
    """Flags of 10 epochs of 3 steps on images that can be told apart, without k-NN"""
    small = "--image-size 16 --arch resnet8 --width 4 --batch-size 40 --head-hidden 16 --dim 8"
    how = "--knn-k 5 --knn-every 0 --epochs 10 --lr 0.3 --crop-scale 0.5,1 --device cpu"
    return f"--data {tiny_npz} {small} {how} --out {tmp_path / 'run'} --restart".split()


def warnings_of(script, argv, capsys):
    """What the run warned of"""
    assert script.main(argv) == 0
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


def test_a_run_tells_what_goes_on_and_what_is_next(flags, tmp_path, capsys):
    out = tmp_path / "my run"
    argv = [*flags, "--out", str(out), "--epochs", "7", "--symmetric"]  # 42 steps
    assert moco_cifar.main(argv) == 0
    text = capsys.readouterr().out
    assert "steps 0 to 42, 6 per epoch; a loss of 7.86 is chance\n" in text  # 2 ln 51
    assert text.count(" min to go\n") == 1 and text.count(" min left\n") == 6
    assert text.endswith(f"next: python linear_eval.py '{out}'\n")
    last = [line for line in text.splitlines() if line.startswith("epoch 7/7: loss ")]
    assert moco_cifar.main(argv) == 0  # finished: its result once more
    assert capsys.readouterr().out == f"{out}/pretrain.pt is complete: {last[0]}\n"


def test_warning_of_a_loss_at_chance(short, capsys):
    assert not warnings_of(simclr, short, capsys)
    stuck = warnings_of(simclr, [*short, "--temperature", "1000"], capsys)
    assert stuck == ["warning: the loss is still at chance: try another --lr"]


def test_warning_of_a_collapse(short, monkeypatch, capsys):
    """SimSiam without what keeps it from collapsing: gradients reach the targets, no predictor."""
    simsiam = "--framework simsiam --encode whole --predictor-hidden 4 --epochs 30".split()
    assert not warnings_of(fast_moco, [*short, *simsiam], capsys)
    with_gradient = fast_moco.FastMoCo.target_embed.__wrapped__
    monkeypatch.setattr(fast_moco.FastMoCo, "target_embed", with_gradient)
    monkeypatch.setattr(fast_moco.FastMoCo, "predict", lambda self, x, _: self.online[:2](x))
    collapsed = warnings_of(fast_moco, [*short, *simsiam], capsys)
    assert collapsed == ["warning: the features have collapsed: all images get nearly the same"]


@pytest.mark.parametrize("values, warned", [("5432", 1), ("5434", 0), ("5444", 0), ("4325", 0)])
def test_warning_of_a_falling_knn(values, warned, short, monkeypatch, capsys):
    curve = iter(int(value) / 10 for value in values)
    monkeypatch.setattr(simclr, "knn_accuracy", lambda *_: next(curve))
    found = warnings_of(simclr, [*short, "--epochs", "4", "--knn-every", "1"], capsys)
    assert found == ["warning: the k-NN accuracy has fallen three times in a row"] * warned


LEVELS = {  # of batches of 16
    (moco_cifar, "--symmetric"): 2 * math.log(51),  # the queue has 50 keys
    (moco_cifar, "--mechanism memory-bank"): math.log(51),
    (moco_cifar, "--mechanism end-to-end"): math.log(16),
    (simclr, ""): math.log(31),
    (fast_moco, ""): 2 * math.log(16),  # its flags here say nnclr
    (fast_moco, "--framework simsiam"): 4,  # 2 (2 - 2 cos) at right angles
}


@pytest.mark.parametrize("script, more", LEVELS, ids=lambda x: getattr(x, "__name__", x))
def test_the_loss_of_guessing_is_known(script, more, common, tmp_path, monkeypatch):
    def start(run, model, online, optimizer, chance, clip=0.0):
        assert chance == pytest.approx(LEVELS[script, more])
        raise Crash

    monkeypatch.setattr(script.Run, "start", start)
    with pytest.raises(Crash):
        script.main([*common, *OWN[script].split(), *more.split(), "--out", str(tmp_path / "run")])
