"""Honest reporting: the numbers on the pages are those of the files in results/."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch

import simclr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import results  # noqa: E402


@pytest.mark.parametrize("page", results.PAGES)
def test_tables_are_made_from_results(page):
    text = (ROOT / page).read_text()
    assert results.rebuild(text, results.PAGES[page], results.published()) == text


@pytest.mark.parametrize("name", results.PICTURES)
def test_pictures_are_drawn_from_results(name):
    """If not: run tools/results.py."""
    mark = results.fingerprint(name, results.published())
    assert results.mark_in(ROOT / "docs" / name) == mark


def test_comparisons_are_made_from_results(tmp_path):
    """If not: run tools/results.py."""
    shutil.copy(ROOT / "docs/ablations.md", tmp_path)
    pictures = [ROOT / f"docs/ablation-{stem}.png" for stem in results.comparisons()]
    assert pictures
    for path in pictures:
        assert f"]({path.name})" in (tmp_path / "ablations.md").read_text()
        shutil.copy(path, tmp_path)
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    results.rebuild_comparisons(tmp_path)  # writes what is out of date
    assert before == [(path.name, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]


def test_a_comparison_grows_over_several_sittings(monkeypatch):
    """A run published anew takes the place of the older one of its name."""

    def run(name, epochs):
        config = dict(seed=0, out=name)
        more = dict(history=[dict(seconds=1.0)], evaluations={}, base=dict(machine=epochs))
        named = dict(name=name, method="moco", label="MoCo", dataset="x", epoch=epochs)
        return SimpleNamespace(**named, epochs=epochs, config=config, **more)

    monkeypatch.setattr(results.plots, "read_run", lambda run: run)
    monkeypatch.setattr(results.plots, "knn_of", lambda run: None)
    first = results.collect_comparison("momentum", [run("b", 1), run("c", 1)])
    both = results.collect_comparison("momentum", [run("c", 2), run("a", 2)], first["runs"])
    assert [(r["name"], r["machine"]) for r in both["runs"]] == [("a", 2), ("b", 1), ("c", 2)]


def test_a_comparison_of_nothing_is_one_line_and_writes_nothing(tmp_path):
    argv = [sys.executable, "tools/results.py", tmp_path / "ablate-x-y/a", "--ablation", "queue"]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "ablate-x-y/a: no such file" in process.stderr
    assert not (ROOT / "results/comparisons/x-y.json").exists()


def test_what_the_jpeg_copy_is_worth_is_as_measured():
    rows = json.loads((ROOT / "results/jpeg-copy.json").read_text())["knn"]
    original, copy = (f"{row['correct'] / row['n_test']:.2%}" for row in rows.values())
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    assert f"{original} k-NN accuracy on the originals and {copy} on the copy" in text


def effective(run):
    return results.without(run["config"], {*results.WITHOUT_EFFECT} - {"seed"})


def test_a_repetition_has_the_settings_and_images_of_its_run():
    found = [(run, run["again"]) for run in results.published() if "again" in run]
    assert len(found) == len(list((ROOT / "results/again").iterdir())) > 0
    for first, again in found:
        assert effective(first) == effective(again)
        assert all(first[key] == again[key] for key in ("method", "data", "data_sha256"))
        assert first["checkpoint_sha256"] != again["checkpoint_sha256"]
    low, middle, high = sorted(abs(results.mean_knn([a]) - results.mean_knn([b])) for a, b in found)
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"by {100 * low:.2f}, {100 * middle:.2f} and {100 * high:.2f} points" in text


def test_the_first_epochs_that_were_run_again_are_the_same_bit_for_bit():
    runs = json.loads((ROOT / "results/first-epochs.json").read_text())["runs"]
    assert len({run["name"] for run in runs}) == 4
    for run in runs:
        first = json.loads((ROOT / f"results/{run['name']}.json").read_text())
        assert effective(first) == effective(run)
        assert all(first[key] == run[key] for key in ("method", "data_sha256"))
        assert run["again"].items() <= first["history"][0].items()
        assert run["again"].keys() == {"epoch", "loss", "spread"}
        alike = "device", "precision", "threads", "torch"
        assert all(first["machine"][key] == run["machine"][key] for key in alike)
        assert first["machine"]["commit"] != run["machine"]["commit"]


def test_what_is_measured_of_a_repetition_only_is_shown(tmp_path):
    for name, top1 in (("again/x", {"a": 1, "b": 1}), ("x", {"a": 0})):
        (path := tmp_path / f"{name}.json").parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"evaluations": top1}))
    (tmp_path / "y.json").write_text("{}")
    x, y = results.published(tmp_path)
    assert x["evaluations"] == {"a": 0, "b": 1} and not y.keys() & {"again", "evaluations"}


def test_a_repetition_of_nothing_is_one_line_and_writes_nothing(tmp_path):
    argv = [sys.executable, "tools/results.py", tmp_path / "x", "--data", "CIFAR-10", "--again"]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "results/x.json is not there" in process.stderr
    assert not (ROOT / "results/again/x.json").exists()


def test_what_the_learning_rate_does_on_the_shapes_is_as_measured():
    text = (ROOT / "docs/ablations.md").read_text()
    header, _, *lines = text[text.index("| learning rate | 0.015") :].splitlines()[:6]
    rates = [cell.strip() for cell in header.split("|")]
    shown = {
        (line.split("|")[1].split(", temp")[0].strip(), rate): cell.strip()
        for line in lines
        for rate, cell in zip(rates[2:-1], line.split("|")[2:-1])
        if cell.strip() and "table below" not in cell
    }
    runs = json.loads((ROOT / "results/rates-shapes.json").read_text())["runs"]
    assert shown == {
        (run["name"], str(run["config"]["lr"])): f"{100 * run['last']['knn_top1']:.1f}"
        for run in runs
    }
    assert len(runs) == 11 and {run["last"]["epoch"] for run in runs} == {8}


def test_readme_shows_at_most_six_rows_with_their_commands():
    table = results.table_of_best(results.published())
    assert (
        1 <= table.count("python ") <= 6
        and len((ROOT / "README.md").read_text().splitlines()) <= 150
    )


@pytest.mark.parametrize("group", results.grouped(results.published()), ids=results.command_of)
def test_a_command_repeats_the_settings_of_its_row(group):
    _, script, *flags = results.command_of(group).split()
    config = vars(importlib.import_module(script.removesuffix(".py")).parse_config(flags))
    ran = {name: tuple(v) if isinstance(v, list) else v for name, v in group[0]["config"].items()}
    shared = (config.keys() & ran.keys()) - {*results.WITHOUT_EFFECT} | {"seed"}
    assert {name: config[name] for name in shared} == {name: ran[name] for name in shared}


def test_results_name_no_place_on_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text()), path


def test_result_of_a_run(pretrained):
    result = results.collect(pretrained, "synthetic colours")
    last = result["history"][-1]
    assert last["epoch"] == result["config"]["epochs"] == 2
    assert "out" not in result["config"] and "data" not in result["config"]
    assert {"device", "torch", "threads", "commit", "seed", "seconds"} <= set(result["machine"])
    assert all(len(result[key]) == 64 for key in ("data_sha256", "checkpoint_sha256"))
    json.dumps(result)
    assert "seconds" in json.dumps(result["history"])
    result = results.collect(pretrained, "synthetic colours", minutes=False)
    assert "seconds" not in json.dumps([result["history"], result["machine"]])
    assert results.cells_of([result])["minutes"] == "" and not results.curve_of([result], "minutes")


def row(seed, correct, method="moco", **more):
    machine = {"device": "cpu x", "precision": "torch.float32", "threads": 2, "seconds": 60}
    machine |= {"started": "2026-01-01T00:00:00Z", "commit": "abcdef0123"}
    data = {"name": "CIFAR-10", "n_train": 5000, "classes": 10}
    config = {"arch": "resnet8", "width": 16, "epochs": 2, "seed": seed}
    knn = [{"what": method, "correct": correct, "n_test": 1000, "epoch": 2}]
    made = dict(method=method, data=data, config=config, machine=machine, knn=knn, history=[])
    return made | more


def rows(table):
    return [line for line in table.splitlines()[2:] if line.startswith("|")]


def test_a_probe_of_something_else_is_not_published_as_the_runs(pretrained, tmp_path, capsys):
    run = shutil.copytree(pretrained, tmp_path / "run")
    own = torch.load(run / "pretrain.pt", weights_only=True)
    how = dict(mode="probe", init="pretrained", labels=1.0)
    linear = own | dict(kind="linear", config=how, machine={}, result={"correct": {}})
    linear |= dict(pretrain={key: own[key] for key in ("epoch", "config")})
    others = [
        dict(pretrain=linear["pretrain"] | {"epoch": 1}),
        dict(pretrain=linear["pretrain"] | {"config": {}}),
        dict(data=own["data"] | {"sha256": "other"}),
        dict(config=how | {"mode": "finetune"}),
        dict(config=how | {"labels": 0.1}),
    ]
    for other in ({}, *others):
        torch.save(linear | other, run / "linear.pt")
        assert ("probe" in results.collect(run, "x")) == (not other)
        assert ("left out" in capsys.readouterr().out) == bool(other)
    (run / "epoch0002").mkdir()
    torch.save(linear, run / "epoch0002/linear.pt")
    (run / "pretrain.pt").rename(run / "epoch0002.pt")
    assert "probe" in results.collect(run / "epoch0002.pt", "x")


def test_other_images_are_no_cifar10():
    """Their command names them, and they are in none of the tables of CIFAR-10."""
    own, other = (
        row(0, 1000 * top1, history=[dict(epoch=2, loss=1.0, knn_top1=top1, seconds=60)])
        for top1 in (0.6, 0.9)
    )
    for run, name in ((own, "CIFAR-10"), (other, "CIFAR-100")):
        run["data"] |= {"name": name, "n_train": 50_000}
    assert "moco_cifar.py --data cifar100 " in results.command_of([other])
    for table in (results.table_of_best, results.table_of_race):
        assert "60.0" in table([own, other]) and "90.0" not in table([own, other])


def test_a_run_can_be_published_up_to_a_checkpoint(pretrained):
    """Such as one of --keep-every."""
    whole, part = (results.collect(path, "x") for path in (pretrained, pretrained / "pretrain.pt"))
    assert whole == part
    with pytest.raises(SystemExit, match="epoch0009.pt is not there"):
        results.collect(pretrained / "epoch0009.pt", "x")


def test_seeds_share_a_row():
    runs = [row(1, 820), row(2, 840), row(0, 800)]
    runs[0]["config"] |= {"knn_every": 5}  # no accuracy depends on it
    (line,) = rows(table := results.table_of_runs(runs))
    assert "82.0 ± 2.0" in line and "| 3 |" in line and "--seed 0  # 1" in table


def test_a_row_names_all_machines_of_its_seeds():
    other = row(1, 820)
    other["machine"] |= {"device": "cpu y", "precision": "torch.bfloat16"}
    (line,) = rows(results.table_of_runs([row(0, 800), other, row(2, 840)]))
    assert "82.0 ± 2.0" in line and "| x, 2 threads, float32; y, 2 threads, bfloat16 |" in line
    other["machine"] |= {"device": "cuda y"}
    assert len(rows(results.table_of_runs([row(0, 800), other]))) == 2


def test_one_seed_has_no_deviation():
    assert "±" not in results.table_of_runs([row(0, 800)])


@pytest.mark.parametrize("key, value", [("epochs", 3), ("width", 32)])
def test_other_settings_are_another_row(key, value):
    other = row(1, 820)
    other["config"][key] = value
    table = results.table_of_runs([row(0, 800), other])
    assert len(rows(table)) == table.count("python moco_cifar.py") == 2


@pytest.mark.parametrize("loss, shown", [(2.2, "| 40.0 |"), (2.4, "|  |")])
def test_a_probe_worse_than_guessing_is_left_out(loss, shown):
    """With ten classes guessing has a loss of 2.303."""
    probe = {"correct": {"top1": 400}, "n_test": 1000, "test_loss": loss}
    table = results.markdown([results.cells_of([row(0, 800, probe=probe)])], ["probe %"])
    assert table.splitlines()[-1] == shown


@pytest.mark.parametrize(
    "name, method",
    [
        ("MoCo", "moco"),
        ("SimCLR", "simclr"),
        ("Fast-MoCo, --encode whole", "fast-moco"),
    ],
)
def test_work_is_what_bench_counts_in_a_whole_step(name, method):
    """But for the heads, which a row's PFLOP leave out"""
    count = json.loads((ROOT / "results/count.json").read_text())
    whole = sum(part["flop"] for part in count["methods"][name].values())
    run = row(0, 800, method)
    run["data"]["n_train"] = count["settings"]["batch_size"]
    run["config"] |= dict(arch="resnet18", width=64)
    assert 0.97 < results.training_flop([run]) / whole < 1.001


def test_the_race_counts_from_the_first_measurement_past_a_goal():
    run = row(
        0,
        800,
        history=[
            dict(epoch=e, loss=1.0, knn_top1=k, seconds=60 * e) for e, k in ((1, 0.59), (2, 0.68))
        ],
    )
    run["data"] |= {"n_train": 50_000}
    found = rows(results.table_of_race([run]))
    assert [line.split(" | ")[0] for line in found] == ["| 60 (68.0)", "| 65 (68.0)"]
    assert all(" | 2 | 2 | " in line for line in found)


def test_a_run_to_choose_settings_with_is_no_result():
    """Its accuracy is of held-out training images."""
    tuned = row(0, 900)
    tuned["data"] = tuned["data"] | {"holdout": 5000}
    for table in (results.table_of_runs, results.table_of_best):
        assert "80.0" in table([row(0, 800), tuned]) and "90.0" not in table([row(0, 800), tuned])
    tuned["config"] = tuned["config"] | {"symmetric": True}
    (line,) = rows(results.table_of_tuning([row(0, 800), tuned]))
    assert "90.0" in line and " --symmetric " in line


def test_what_gains_in_as_much_work_stands_beside_the_recipe():
    def tuned(correct, epochs=6, **more):
        run = row(0, correct, "simclr")
        recipe = dataclasses.asdict(simclr.parse_config(["--recipe", "cpu"]))
        run["config"] = recipe | dict(holdout=5000, epochs=epochs) | more
        run["data"] |= dict(holdout=5000, n_train=45_000)
        run["knn"][0]["epoch"] = epochs
        return run

    made = [tuned(500), tuned(520, seed=1), tuned(530, lr=0.06, batch_size=128)]
    made += [tuned(480, 4, idea="rotation"), row(0, 900, "simclr")]
    table = [line[2:-2].split(" | ") for line in rows(results.table_of_efficiency(made))]
    assert table == [
        ["--batch-size 128 --lr 0.06", "6", "0.11", "53.0", "1", "+2.0"],
        ["(the recipe)", "6", "0.11", "51.0 ± 1.4", "2", ""],
        ["tools/ideas.py rotation", "4", "0.11", "48.0", "1", "-3.0"],
    ]
    table = results.table_of_tuning(made)
    assert "| 0.06 | 32 | --batch-size 128 |" in table and "| tools/ideas.py rotation |" in table
    assert "python tools/ideas.py rotation --holdout 5000 --width 16 " in table


def test_a_number_of_the_head_is_not_shown_as_the_backbones():
    run = row(0, 800)
    run["knn"].append(run["knn"][0] | {"correct": 900, "features": "head"})
    assert results.knn([run]) == [0.8]


def test_moco_stands_beside_its_course_report():
    """Means over seeds, evaluation by evaluation; runs with other settings are left out."""

    def evaluated(top1, loss):
        return dict(correct={"top1": top1, "top5": 900}, n_test=1000, test_loss=loss, lr=10.0)

    runs = [row(seed, 500, probe=evaluated(400 + 20 * seed, 3 + seed)) for seed in (0, 1)]
    for run in runs:
        run["config"] |= dict(batch_size=128, lr=0.015, weight_decay=1e-6, key_momentum=0.99)
        run |= dict(evaluations={}, history=[dict(epoch=2)])
    runs[1]["evaluations"]["default"] = evaluated(500, 2) | {"lr": 0.3}
    high = [dict(epoch=e, lr=10.0, top1=e / 100, top5=0.9, test_loss=40.0) for e in range(1, 23)]
    runs[0]["probe"]["history"] = [*high, high[0] | dict(epoch=23, lr=1.0)]
    lines = rows(results.table_of_report_moco([*runs, row(0, 500, probe=evaluated(999, 1))]))
    lines = [[cell.strip() for cell in line.split("|")[4:-1]] for line in lines]
    before = "mean of epochs 21 to 22: before the rate falls"
    assert lines == [
        ["as in the report", "10", "41.0 ± 1.4", "90.0", "3.50"],
        [f"as in the report, {before}", "10", "21.5", "90.0", "40.00"],
        ["the rate chosen on held-out images", "0.3", "50.0", "90.0", "2.00"],
        ["the report", "10", "41.0", "87.4", "67.39"],
    ]


def demo(last, **more):
    """A run with the demo's settings, of 200 epochs but stopped after `last`"""
    run = row(0, 500)
    run["data"] |= {"n_train": 50_000}
    run["config"] = dict(arch="resnet18", width=64, epochs=200, seed=0) | more
    run["history"] = [dict(epoch=e, loss=7.0 + e / 10, knn_top1=0.5) for e in range(1, last + 1)]
    head = dict(what="moco", features="head", k=200, temperature=0.1, n_test=1000)
    run["knn"] = [head | dict(epoch=e, correct=300 + 10 * e) for e in (1, 2, 3)]
    run["knn"] += [head | dict(epoch=2, correct=999, features="backbone")]
    return run


def test_the_demo_stands_beside_its_own_log_at_the_epochs_known_of_both():
    runs = [demo(1), demo(3), demo(4, lr=0.1), demo(5, idea="any"), row(0, 800)]
    table = rows(results.table_of_demo(runs))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert lines == [
        ["1", "31.00", "31.98", "-0.98", "7.100", "6.957"],
        ["2", "32.00", "33.52", "-1.52", "7.200", "7.250"],
    ]
    (knn, loss) = results.draw_demo(results.demo_log(runs)).axes
    assert [line.get_xdata().tolist() for line in knn.lines] == [[1, 2, 3], [1, 2]]
    assert [line.get_ydata().tolist() for line in loss.lines] == [[7.1, 7.2, 7.3], [6.957, 7.25]]


def test_what_the_first_convolutions_weights_are_worth_is_as_measured():
    other, usual = (
        json.loads((ROOT / f"results/{name}.json").read_text())["history"][0]["loss"]
        for name in ("demo-stem-init-epoch0001", "cifar-moco-demo-epoch0010")
    )
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    assert f"the loss of epoch 1 is {other:.3f} with these and {usual:.3f} with ours" in text


def test_the_demos_first_epochs_at_width_16_stand_beside_what_differs():
    runs = [demo(5), demo(2, width=16), demo(2, width=16, seed=1), demo(6, width=16, idea="any")]
    runs[2]["knn"][0]["correct"] = 330
    runs[2]["history"][0]["loss"] = 7.3
    runs += [demo(200, width=16), demo(1, width=16, lr=0.1), demo(3, width=8)]
    table = [line.split(" | ")[:8] for line in rows(results.table_of_demo_small(runs))]
    assert table == [
        ["| (nothing)", "2", "32.0 ± 1.4", "32.0", "", "7.200 ± 0.141", "7.200", ""],
        ["| --lr 0.1", "1", "31.0", "", "", "7.100", "", ""],
        ["| tools/ideas.py any", "1", "31.0", "32.0", "", "7.100", "7.200", "7.500"],
    ]


def test_accuracy_along_the_pretraining_is_drawn_beside_supervised_networks():
    def evaluated(mode, labels, top1, *along):
        made = dict(config=dict(mode=mode, labels=labels), top1=top1)
        along = [dict(epoch=epoch, top1=y) for epoch, y in along]
        return made | (dict(along=along) if along else {})

    run = trained(0, 0.6, 1, probe=evaluated("probe", 1.0, 0.6, (1, 0.5), (2, 0.6)))
    run["evaluations"] = {
        "finetune-0.1": evaluated("finetune", 0.1, 0.5, (1, 0.4), (2, 0.5)),
        "probe-0.01": evaluated("probe", 0.01, 0.3),  # of the last epoch only
        "supervised-0.1": evaluated("supervised", 0.1, 0.2),
    }
    panels = results.along_of([run, trained(0, 0.5, 1, 8, probe=evaluated("probe", 1.0, 0.5))])
    (axes,) = results.draw_along(panels).axes
    drawn = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
    assert drawn == {
        "pretrained, frozen, 100% of labels": [50, 60],
        "pretrained, end to end, 10% of labels": [40, 50],
        "supervised, 10% of labels": [20, 20],
    }
    _, finetuned, supervised = (line.get_color() for line in axes.lines)
    assert finetuned == supervised, "a colour for each share of the labels"


def test_a_run_that_was_stopped_is_no_row():
    assert results.grouped([demo(3)]) == [] and len(results.grouped([demo(200)])) == 1


@pytest.mark.parametrize(
    "other", [dict(epoch=0), dict(epoch=1), dict(data_sha256="other"), dict(k=10)]
)
def test_a_number_of_another_epoch_of_other_images_or_of_another_k_is_not_the_runs(other):
    run = row(0, 800, data_sha256="own")
    run["knn"].append(run["knn"][0] | dict(correct=100) | other)
    assert results.knn([run]) == [0.8]


def test_the_best_rows_are_the_best_on_real_images_then_on_synthetic_ones():
    def other(correct, name="CIFAR-10", **more):
        run = row(0, correct, **more)
        run["data"] = run["data"] | {"name": name}
        run["config"] = run["config"] | {"epochs": correct}
        run["knn"][0]["epoch"] = correct
        return run

    shapes = other(990, name="synthetic shapes")
    runs = [shapes, other(500), other(600), other(700, method="simclr"), other(950, stale=True)]
    found = [line.split("|")[6].strip() for line in rows(results.table_of_best(runs))]
    assert found == ["70.0", "60.0", "99.0"]


def test_what_is_stale_says_so():
    assert "moco (stale)" in results.table_of_runs([row(0, 800, stale=True)])
    assert "(stale)" not in results.table_of_runs([row(0, 800)])
    assert all(list((ROOT / "results").glob(f"{pattern}.json")) for pattern in results.STALE)


def measured(started, rate, **changes):
    how = dict(arch="resnet18", width=64, batch_size=256, end_to_end_batch_size=512, compile=False)
    machine = {"name": "X", "threads": 2, "precision": "torch.bfloat16", "started": started}
    ratios = [{"of": "step", "to": "baseline", "median": rate / 10}]
    found = {"step": {"ours": {"median": rate}}, "share_of_matrix_rate": 0.5, "ratios": ratios}
    settings = how | changes
    return dict(
        kind="bench", stale=False, machine=machine, settings=settings, methods={"moco": found}
    )


def test_of_equal_measurements_the_latest_counts():
    runs = [measured("2026-02", 30), measured("2026-01", 20), measured("2026-01", 40, batch_size=8)]
    lines = results.table_of_speed([*runs, row(0, 800)]).splitlines()
    assert len(lines) == 4 and "40.0" in lines[2] and "30.0" in lines[3] and "3.00 ×" in lines[3]


def trained(seed, top1, minutes, width=16, method="moco", **more):
    run = row(seed, round(1000 * top1), method=method, **more)
    run["config"] |= {"width": width, "framework": "moco", "encode": "whole"}
    history = [dict(epoch=e, seconds=30 * e * minutes, knn_top1=top1 * e / 2) for e in (1, 2)]
    run["knn"] += [dict(what="pixels", correct=350, n_test=1000, epoch=0)]
    run["knn"] += [dict(what="random", correct=300 + width, n_test=1000, epoch=0)]
    return run | dict(history=history)


def test_the_picture_shows_means_bands_and_levels():
    runs = [trained(0, 0.6, 1), trained(1, 0.7, 9), trained(2, 0.8, 2)]
    supervised = {"correct": {"top1": 900}, "n_test": 1000}
    runs[1]["evaluations"] = {"supervised": supervised}
    (axes,) = results.draw_knn(results.panels_of_data(runs, "minutes"), "minutes", True).axes
    curve, *levels = axes.lines
    assert curve.get_xdata().tolist() == [1, 2] and curve.get_ydata()[-1] == pytest.approx(70)
    edges = [y for _, y in axes.collections[0].get_paths()[0].vertices]
    assert max(edges) == pytest.approx(80) and curve.get_label().endswith(": 70.0 ± 10.0")
    assert [line.get_ydata()[0] for line in levels] == pytest.approx([35, 31.6, 90])
    assert axes.get_xlabel() == "minutes" and "k-NN" in axes.get_ylabel()


def test_a_picture_of_many_runs_stays_readable():
    """A panel for each data set, of its most images; no empty panel, no legend over another."""
    runs = [
        trained(s, 0.5 + 0.02 * i, 3 + i, width=8 * i, method=m)
        for s in (0, 1)
        for i, m in enumerate(["moco", "moco", "moco", "simclr", "fast-moco", "simclr"], 1)
    ]
    few = trained(0, 0.4, 1)
    few["data"] |= {"n_train": 100}
    shapes = trained(0, 0.4, 1)
    shapes["data"] |= {"name": "synthetic shapes"}
    copy = trained(0, 0.9, 1)
    copy["data"] |= {"name": "CIFAR-10 (JPEG-compressed copy)"}
    stale = trained(0, 0.9, 1, 99, stale=True)
    panels = results.panels_of_data([*runs, few, shapes, copy, stale], "minutes")
    assert [len(groups) for groups in panels.values()] == [6, 1]
    with matplotlib.rc_context(results.plots.STYLE):
        figure = results.draw_knn(panels, "minutes", True)
        figure.draw_without_rendering()
    boxes = [axes.get_legend().get_window_extent() for axes in figure.axes]
    boxes += [axes.get_window_extent() for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)
    assert all(figure.bbox.y0 <= b.y0 for b in boxes) and all(axes.lines for axes in figure.axes)
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len({*names}) == len(names) == 6 + 1 + 6, "curves, raw pixels, untrained encoders"
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines[:6]]
    assert len({*looks}) == 6 and len({color for color, _ in looks}) == 3, "a colour per method"
    color = {line.get_label()[:4]: line.get_color() for line in figure.axes[0].lines}
    assert figure.axes[1].lines[0].get_color() == color["MoCo"]


def test_the_readmes_picture_shows_the_best_run_of_each_method():
    runs = [trained(0, 0.6, 1), trained(0, 0.5, 1, width=8), trained(0, 0.7, 1, method="simclr")]
    shapes = trained(0, 0.4, 1)
    shapes["data"] |= {"name": "synthetic shapes"}
    select, against, band = results.PICTURES["knn-epochs.png"]
    figure = results.draw_knn(select([*runs, shapes], against), against, band)
    labels = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    assert [text[-4:] for text in labels[0][:2]] == ["70.0", "60.0"] and "40.0" in labels[1][0]


def test_the_reports_figures_stand_beside_the_same_share_of_labels():
    """It fine-tuned and probed with 10% of them, and trained its supervised network with all."""
    runs = results.published()
    whole = next(run for run in runs if run.get("config", {}).get("optimizer") == "adam")
    some = next(iter(whole["evaluations"].values()))
    whole["evaluations"] |= {"finetune": some, "finetune-0.1": some, "supervised": some}
    seen = []
    for line in results.table_of_labels(runs).splitlines()[2:]:
        method, how, labels, printed = (line.split("|")[i].strip() for i in (1, 5, 6, -2))
        share = "100%" if how.startswith("supervised") else "10%"
        assert bool(printed) == (method == "simclr, as the report" and labels == share), line
        seen.append((method, labels, bool(printed)))
    assert {("simclr, as the report", "100%", said) for said in (False, True)} <= {*seen}
