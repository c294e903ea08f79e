"""Honest reporting: the numbers in the README are those of the files in results/."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import results  # noqa: E402


def test_readme_table_is_made_from_results():
    readme = (ROOT / "README.md").read_text()
    assert results.replace_table(readme, results.published()) == readme


def test_results_name_no_place_on_a_machine():
    for path in (ROOT / "results").glob("*"):
        assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text()), path


def test_result_of_a_run(pretrained):
    result = results.collect(pretrained, "drawn colours")
    last = result["history"][-1]
    assert last["epoch"] == result["config"]["epochs"] == 2
    assert "out" not in result["config"] and "data" not in result["config"]
    assert {"device", "torch", "threads", "commit", "seed", "seconds"} <= set(result["machine"])
    assert all(len(result[key]) == 64 for key in ("data_sha256", "checkpoint_sha256"))
    json.dumps(result)


def row(seed, correct):
    machine = {"device": "cpu x", "precision": "torch.float32", "threads": 2, "seconds": 60}
    data = {"name": "A", "n_train": 5000}
    config = {"arch": "resnet8", "width": 16, "epochs": 2, "seed": seed}
    knn = [{"what": "moco", "correct": correct, "n_test": 1000}]
    return dict(method="moco", data=data, config=config, machine=machine, knn=knn, history=[])


def test_seeds_share_a_row():
    lines = results.table([row(0, 800), row(1, 820), row(2, 840)]).splitlines()
    assert len(lines) == 3 and "82.0 ± 2.0" in lines[2] and "| 3 |" in lines[2]


def test_one_seed_has_no_deviation():
    assert "±" not in results.table([row(0, 800)])


@pytest.mark.parametrize("key, value", [("epochs", 3), ("width", 32)])
def test_other_settings_are_another_row(key, value):
    other = row(1, 820)
    other["config"][key] = value
    assert len(results.table([row(0, 800), other]).splitlines()) == 4


def measured(started, rate, **changes):
    how = dict(arch="resnet18", width=64, batch_size=256, end_to_end_batch_size=512, compile=False)
    machine = {"name": "X", "threads": 2, "precision": "torch.bfloat16", "started": started}
    ratios = [{"of": "step", "to": "baseline", "median": rate / 10}]
    found = {"step": {"ours": {"median": rate}}, "share_of_matrix_rate": 0.5, "ratios": ratios}
    settings = how | changes
    return dict(kind="bench", machine=machine, settings=settings, methods={"moco": found})


def test_of_equal_measurements_the_latest_counts():
    runs = [measured("2026-02", 30), measured("2026-01", 20), measured("2026-01", 40, batch_size=8)]
    lines = results.table_of_speed([*runs, row(0, 800)]).splitlines()
    assert len(lines) == 4 and "40.0" in lines[2] and "30.0" in lines[3] and "3.00 ×" in lines[3]
