"""docs/add-a-method.md, followed to the letter: its edits make a method that runs as it says."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import knn_monitor
import linear_eval
import plots

PAGE = (ROOT / "docs" / "add-a-method.md").read_text()
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [match.groups() for match in BLOCK.finditer(PAGE)]  # language, file, text
EDITS = [(file, text) for language, file, text in BLOCKS if language == "diff"]
LINES = [row for language, _, text in BLOCKS if language == "bash" for row in text.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python")]
# what makes the commands of the page small: the flag given last counts
SMALL = {
    "alignment": "--image-size 16 --width 4 --epochs 2 --batch-size 40 --knn-k 5 --precision fp32",
    "linear_eval": "--epochs 2 --precision fp32",
    "knn_monitor": "--k 5",
    "plots": "",
}


def apply_edit(text, edit):
    """Replace what a block without its + lines shows by what it shows without its - lines."""
    lines = edit.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in " " + sign) for sign in "-+")
    assert text.count(old) == 1, f"docs/add-a-method.md no longer fits: {edit}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project in which the page's edits are made"""
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "experiments.mk"):
        shutil.copy(path, folder)
    (folder / "tools").mkdir()
    for path in (ROOT / "tools").glob("*.py"):
        shutil.copy(path, folder / "tools")
    first = LINES[0].split()
    assert first[0] == "cp"
    shutil.copy(folder / first[1], folder / first[2])
    for file, edit in EDITS:
        path = folder / file
        path.write_text(apply_edit(path.read_text(), edit))
    return folder


@pytest.fixture
def alignment(tree, monkeypatch):
    spec = importlib.util.spec_from_file_location("alignment", tree / "alignment.py")
    monkeypatch.setitem(sys.modules, "alignment", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def test_the_plumbing_is_still_the_same(tree):
    """And from now on it must be: the check knows the new script."""
    path, check = tree / "alignment.py", [sys.executable, "tools/copies.py", "--check"]
    process = subprocess.run(check, cwd=tree, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    right = path.read_text()
    path.write_text(right.replace("\nFORMAT = ", "\n# which?\nFORMAT = "))
    process = subprocess.run(check, cwd=tree, capture_output=True, text=True)
    path.write_text(right)
    assert process.returncode == 1 and process.stdout.startswith("FORMAT differs in alignment")


def test_ruff_has_nothing_to_say(tree):
    ruff = [sys.executable, "-m", "ruff"]
    settings = ["--config", str(ROOT / "pyproject.toml"), "alignment.py"]
    for what in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        process = subprocess.run(
            [*ruff, *what, *settings], cwd=tree, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stdout


def test_its_loss_is_the_equation(alignment):
    (test,) = [text for language, _, text in BLOCKS if language == "python"]
    exec(test, names := {})
    names["test_loss_is_the_equation"]()


def test_make_knows_it(tree):
    command = ["make", "-n", "cifar-alignment", "EPOCHS=3", "PYTHON=python"]
    process = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    chain = [line.split()[1] for line in process.stdout.splitlines() if line.startswith("python ")]
    assert chain[0] == "alignment.py" and chain[-1] == "plots.py"
    assert {"linear_eval.py", "knn_monitor.py"} < set(chain)


def test_its_checkpoint_goes_through_the_chain(alignment, tmp_path, monkeypatch, tiny_npz):
    scripts = dict(
        alignment=alignment, linear_eval=linear_eval, knn_monitor=knn_monitor, plots=plots
    )
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS:
        _, file, *flags = shlex.split(line)
        name = file.removesuffix(".py")
        flags += SMALL[name].split() + ["--data", str(tiny_npz)] * (name == "alignment")
        assert scripts.pop(name).main(flags) == 0, line
    assert not scripts  # the page has them all
    made = {path.name for path in Path("runs/alignment").iterdir()}
    assert {"pretrain.pt", "linear.pt", "knn.jsonl", "map.npz"} <= made
    drawn = " ".join(path.name for path in Path("figures").glob("*.png"))
    assert all(name in drawn for name in ("pretraining", "pairs", "neighbours", "probe")), drawn
    assert "alignment" in Path("figures/table.md").read_text()
    checkpoint = alignment.load_checkpoint("runs/alignment/pretrain.pt")
    assert checkpoint["method"] == "alignment" and len(checkpoint["history"]) == 2
