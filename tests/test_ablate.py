"""tools/ablate.py: what is run, what is run again, what happens to the rest when a run fails."""

import functools
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import ablate  # noqa: E402
import ablations  # noqa: E402
import mechanism_cost  # noqa: E402

# stands for each of the scripts: notes its start and its end, takes `seconds` for the work, writes
# what that script would write, stops at SIGTERM; settings that the file `fail` names fail
FAKE = r"""
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
def parse_config(argv):
    return SimpleNamespace(**{flag[2:]: value for flag, value in zip(argv[::2], argv[1::2])})
def main():
    name, argv = Path(sys.argv[0]).name, sys.argv[1:]
    out = Path(argv[argv.index("--out") + 1] if name == "moco_cifar.py" else argv[0])
    def note(what):
        with open("calls", "a") as file:
            file.write(f"{what} {name} {out.name} {os.environ.get('OMP_NUM_THREADS')}\n")
    def stop(*_):
        note("saved")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    note("start")
    fail = Path("fail")
    if name == "moco_cifar.py" and fail.exists() and fail.read_text() in " ".join(argv):
        sys.exit("error: out of luck")
    if name == "plots.py":
        Path("drawn").write_text(" ".join(argv))
        sys.exit()
    if name == "moco_cifar.py":
        time.sleep(0.3)
        (out / "pretrain.jsonl").touch()
    time.sleep(float(Path("seconds").read_text()))
    file = {"moco_cifar.py": "pretrain.pt", "knn_monitor.py": "knn.jsonl"}.get(name, "linear.pt")
    (out / file).touch()
    note("end")
if __name__ == "__main__":
    main()
"""
NAME, RUNS = "momentum", 4  # settings in its grid


@pytest.fixture
def tree(tmp_path):
    """A folder with the tool and stand-ins for the scripts"""
    (tmp_path / "tools").mkdir()
    for name in ("ablate.py", "ablations.py"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    for name in ("moco_cifar.py", "knn_monitor.py", "linear_eval.py", "plots.py"):
        (tmp_path / name).write_text(FAKE)
    (tmp_path / "seconds").write_text("0")
    return tmp_path


@pytest.fixture
def start(tree):
    """start(*flags) -> the tool's process, under way"""

    def run(*flags, jobs=2):
        argv = [sys.executable, "tools/ablate.py", NAME, "--data", "x.npz", "--jobs", str(jobs)]
        return subprocess.Popen(
            [*argv, *flags], cwd=tree, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return run


def calls(tree, what="start", script=""):
    """-> the notes of the stand-ins that begin so"""
    notes = (tree / "calls").read_text().splitlines() if (tree / "calls").exists() else []
    return [note for note in notes if note.startswith(f"{what} {script}")]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_every_setting_and_seed_is_run_evaluated_and_drawn(tree, start):
    process = start("--seeds", "0", "1")
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    for script in ("moco_cifar.py", "knn_monitor.py", "linear_eval.py"):
        assert len(set(calls(tree, "end", script))) == 2 * RUNS
    assert calls(tree)[-1].startswith("start plots.py")
    drawn = (tree / "drawn").read_text().split()
    assert len(set(drawn[: 2 * RUNS])) == 2 * RUNS
    assert drawn[2 * RUNS :] == ["--ablation", NAME, "--out", drawn[-1]]


def test_what_is_finished_is_not_run_again(tree, start):
    assert start().wait() == 0
    (tree / "calls").unlink()
    assert start().wait() == 0
    assert [note.split()[1] for note in calls(tree)] == ["plots.py"]
    assert start("--seeds", "0", "1").wait() == 0  # another seed needs only its own runs
    assert len(calls(tree, script="moco_cifar.py")) == RUNS


def running(tree):
    """Process ids of the stand-ins that are at work in this folder"""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    rows = [row.split(None, 1) for row in listed.splitlines()]
    return [int(pid) for pid, args in rows if str(tree) in args]


@pytest.mark.parametrize("orphans", [False, True])
def test_killed_in_the_middle_and_started_again(tree, start, orphans):
    """No finished run is repeated, also when the scripts of the killed tool are still at work."""
    (tree / "seconds").write_text("0.5")
    process = start()
    wait_for(lambda: len(calls(tree, "end", "linear_eval.py")) >= 1)
    wait_for(lambda: len(calls(tree, "start", "moco_cifar.py")) >= 3)
    process.kill()
    process.wait()
    for pid in [] if orphans else running(tree):
        os.kill(pid, signal.SIGKILL)
    done = calls(tree, "end")
    (tree / "seconds").write_text("0")
    assert start().wait() == 0
    ends = [note for note in calls(tree, "end") if "plots" not in note]
    assert len(ends) == len(set(ends)) == 3 * RUNS and set(done) <= set(ends)


def test_a_signal_stops_the_scripts_once_and_starts_nothing_more(tree, start):
    (tree / "seconds").write_text("60")
    process = start()
    wait_for(lambda: len(calls(tree, "start")) == 2)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command resumes" in err
    assert len(calls(tree, "saved")) == len(calls(tree, "start")) == 2
    assert not running(tree) and "failed" not in err


def test_a_failed_run_is_named_and_the_rest_done(tree, start):
    (tree / "fail").write_text("--key-momentum 0.9 ")
    process = start()
    out, err = process.communicate()
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert "key-momentum-0.9-seed0" in line and "error: out of luck" in line
    assert len(calls(tree, "end", "linear_eval.py")) == RUNS - 1
    assert (tree / "drawn").read_text().count("key-momentum-") == RUNS - 1
    (tree / "fail").unlink()
    assert start().wait() == 0
    assert len(calls(tree, "end", "moco_cifar.py")) == RUNS


def test_a_first_run_that_fails_holds_nobody_up(tree, start):
    (tree / "fail").write_text("--key-momentum 0.0 ")
    assert start().wait() == 1
    assert len(calls(tree, "end", "linear_eval.py")) == RUNS - 1


def test_two_side_by_side_share_the_cores_and_the_first_reads_the_images_alone(tree, start):
    (tree / "seconds").write_text("0.3")
    assert start().wait() == 0
    notes = [note for note in (tree / "calls").read_text().splitlines() if "plots" not in note]
    active = most = 0
    for note in notes:
        active += 1 if note.startswith("start") else -1
        most = max(most, active)
    assert most == 2
    share = str(os.cpu_count() // 2 or 1)
    assert all(note.endswith(f" {share}") for note in notes)
    # the second starts only when the first has its log, 0.3 s after its own start
    assert not notes[1].startswith("start moco_cifar.py") or len(list(tree.rglob("*.jsonl")))


def test_one_at_a_time_keeps_all_threads(tree, start, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert start(jobs=1).wait() == 0
    notes = (tree / "calls").read_text().splitlines()
    assert all(note.endswith(" None") for note in notes)
    assert [n.split()[0] for n in notes if "plots" not in n] == ["start", "end"] * 3 * RUNS


# the table
def commands(name, scale, data=None, epochs=None, args=""):
    """-> the commands of one seed, without what draws the figure"""
    args = SimpleNamespace(name=name, scale=scale, seeds=[0], data=data, epochs=epochs, args=args)
    return [argv for steps in ablate.plan(args)[0].values() for _, argv in steps]


def test_a_dry_run_lists_the_commands_and_does_nothing(tree, start):
    out, _ = start("--dry-run").communicate()
    *lines, drawing = [shlex.split(line) for line in out.splitlines()]
    expected = commands(NAME, "shapes", data="x.npz")
    assert lines == [["python", *argv] for argv in expected] and drawing[1] == "plots.py"
    assert not (tree / "calls").exists() and not (tree / "runs").exists()


def test_what_is_published_can_be_left_out(tree, start):
    """Of an earlier sitting, or of another machine: names and settings are known, no files. A run
    with other settings is no stand-in.
    """
    assert start().wait() == 0
    done = sorted(path.name for path in (tree / "runs").glob("*/*") if path.is_dir())
    shutil.rmtree(tree / "runs")
    (tree / "calls").unlink()
    file = tree / "results/comparisons" / f"{NAME}-shapes-x.npz.json"
    file.parent.mkdir(parents=True)

    def publish(rates):
        runs = [{"name": name, "config": {"lr": lr}} for name, lr in zip(done, rates)]
        file.write_text(json.dumps({"runs": runs}))

    publish(["0.12"] + ["0.03"] * (RUNS - 1))
    out, err = start("--missing").communicate()
    assert {note.split()[2] for note in calls(tree)} == {done[0]}, out + err
    assert f"results.py runs/ablate-{NAME}-shapes-x.npz/{done[0]} --ablation {NAME}" in out
    publish(["0.03"] * RUNS)
    process = start("--missing")
    assert "every run is in results/ already" in process.communicate()[0]
    assert process.returncode == 0 and len(calls(tree)) == 3


GETSOURCE = functools.cache(inspect.getsource)


@pytest.mark.parametrize("scale", ["shapes", "cpu", "full"])
@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_every_command_parses_and_differs_in_what_is_compared(name, scale, monkeypatch):
    monkeypatch.setattr(inspect, "getsource", GETSOURCE)  # the scripts look up Config's text
    entry, seen = ablations.ABLATIONS[name], []
    script = importlib.import_module(entry["script"].removesuffix(".py"))
    for script_name, *argv in commands(name, scale):
        module = importlib.import_module(script_name.removesuffix(".py"))
        config = module.parse_config(argv)
        if module is script:
            seen.append(config)
    assert len(seen) == len(entry["grid"])
    settings = [tuple(getattr(config, field) for field in entry["fields"]) for config in seen]
    assert len(set(settings)) == len(settings)
    common = {(config.arch, config.width, config.data, config.seed) for config in seen}
    assert len(common) == 1 and len({config.out for config in seen}) == len(seen)


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_printed_figures_belong_to_settings_of_the_grid(name):
    entry = ablations.ABLATIONS[name]
    grid = [tuple(setting.get(field) for field in entry["fields"]) for setting in entry["grid"]]
    assert set(entry["printed"]) <= set(grid) and len(set(grid)) == len(grid)
    for setting, printed in entry["printed"].items():
        assert 50 < printed < 90
        assert ablations.printed_for(name, setting) == printed


def test_epochs_are_compared_in_multiples_of_the_shortest_run():
    assert ablations.printed_for("epochs", (16,), shortest=8) == 75.1
    assert ablations.printed_for("mocov2", ("mlp", 0.5, "cosine", 32), shortest=8) == 71.1
    assert ablations.printed_for("epochs", (24,), shortest=8) is None


# from the papers: MoCo v2, Tables 1 and 2; MoCo, section 4.1; Fast-MoCo, supplementary, Tables 3, 4
PRINTED = [
    ("temperature", ("linear", 0.07), 60.6),
    ("temperature", ("linear", 0.5), 56.4),
    ("temperature", ("mlp", 0.07), 62.9),
    ("temperature", ("mlp", 0.2), 66.2),
    ("mocov2", ("linear", 0.0, "step", 1), 60.6),
    ("mocov2", ("mlp", 0.0, "step", 1), 66.2),
    ("mocov2", ("linear", 0.5, "step", 1), 63.4),
    ("mocov2", ("mlp", 0.5, "step", 1), 67.3),
    ("mocov2", ("mlp", 0.5, "cosine", 1), 67.5),
    ("momentum", (0.9,), 55.2),
    ("momentum", (0.999,), 59.0),
    ("augment", ("crop,blur",), 63.2),
    ("augment", ("crop,color,gray,blur",), 88.5),
    ("frameworks", ("byol", "sgd", "whole"), 66.5),
    ("frameworks", ("simsiam", "sgd", "divide-combine"), 71.7),
    ("frameworks", ("moco", "adamw", "whole"), 69.3),
    ("batch", (256,), 72.5),
    ("batch-simclr", (256,), 61.9),
]


@pytest.mark.parametrize("name, setting, figure", PRINTED)
def test_figures_of_the_papers(name, setting, figure):
    assert ablations.printed_for(name, setting) == figure


def test_yes_and_no_become_flags():
    assert ablate.flags(dict(shuffle=True, bn_splits=8)) == ["--shuffle", "--bn-splits", "8"]
    assert ablate.flags(dict(shuffle=False)) == ["--no-shuffle"]


def test_the_learning_rate_follows_the_batch_size():
    rates = {}
    for script, *argv in commands("batch-simclr", "shapes"):
        if script == "simclr.py":
            flags = dict(zip(argv[::2], argv[1::2]))
            rates[int(flags["--batch-size"])] = float(flags["--lr"])
    assert rates[32] * 16 == rates[128] * 4 == rates[512] and rates[128] == 0.12


def test_more_flags_and_other_images_have_a_folder_of_their_own():
    ways = [{}, dict(epochs=3), dict(data="x.npz"), dict(args="--width 8")]
    folders = [
        re.search(r"runs/[^/]+", " ".join(commands("queue", "shapes", **way)[0]))[0] for way in ways
    ]
    assert len(set(folders)) == len(ways)
    first = commands("queue", "shapes", args="--queue-size 7 --lr 1")[0]
    assert first.index("7") < first.index("64") and first.index("0.03") < first.index("1")


def test_an_unknown_name_is_refused_with_the_names():
    argv = [sys.executable, "tools/ablate.py", "nothing"]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and "temperature" in process.stderr


@pytest.mark.parametrize("epochs", ["0", "-1"])
def test_fewer_than_one_epoch_is_refused(epochs):
    argv = [sys.executable, "tools/ablate.py", NAME, "--dry-run", "--epochs", epochs]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and f"--epochs {epochs}: must be" in process.stderr


# what the mechanisms cost
TINY = "--arch resnet8 --width 4 --device cpu --steps 1 --batch-size 16 32 --cap".split()
SIZES = [(name, n, n - 1) for name in ("moco", "memory-bank", "end-to-end") for n in (16, 32)]


@pytest.fixture
def cost(tmp_path, capsys):
    """cost(cap) -> the rows of the tiniest table, and the Markdown"""

    def run(cap):
        mechanism_cost.main([*TINY, str(cap), "--json", str(tmp_path / "cost.json")])
        rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
        what = [(row["mechanism"], row["batch_size"], row["negatives"]) for row in rows]
        assert what == [*SIZES, ("moco", 16, 65_536)]
        return rows, capsys.readouterr().out

    return run


def test_the_cost_of_each_mechanism_at_each_batch_size(cost):
    rows, text = cost(8)
    assert all(row["measured"] and row["seconds_per_step"] > 0 for row in rows)
    *_, with_queue = rows
    keys = 4 * 128 * 65_536 / 1e9  # of the paper's queue; one more copy of them is made
    assert with_queue["memory_gb"] - rows[0]["memory_gb"] > 0.9 * keys
    assert f"| moco | 16 | 65536 | {with_queue['memory_gb']:.2f} |" in text and "93 GB" in text


def test_what_needs_too_much_memory_is_an_estimate(cost):
    rows, text = cost(1e-6)
    assert [row["measured"] for row in rows] == 3 * [True, False] + [True]
    for first, second in zip(rows[:-1:2], rows[1::2]):
        assert second["memory_gb"] == 2 * first["memory_gb"]
    assert text.count("stopped, an estimate") == 3
