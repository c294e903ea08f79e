"""As in Colab, in a real kernel: a whole script pasted into one cell, and notebooks/*.ipynb."""

import asyncio
import json
import os
import shutil
import threading
import time
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import ROOT, TINY, write_npz
from nbclient import NotebookClient

import moco_cifar
from tools import notebooks

TINY_RUN = {  # a pretraining script's defaults -> what they are changed to in the text
    'data: str = "cifar10"': 'data: str = "data.npz"',
    "image_size: int = 32": "image_size: int = 16",
    '] = "resnet18"': '] = "resnet8"',
    "width: int = 64": "width: int = 4",
    "epochs: int = 200": "epochs: int = 1",
    "batch_size: int = 512": "batch_size: int = 40",
    'out: str = "runs/': 'out: str = "new/',
    "knn_k: int = 200": "knn_k: int = 5",
}
QUEUE = {"queue_size: int = 4096": "queue_size: int = 50"}
MORE = ["--epochs", "2", "--out", "more"]
RUN = 'dataclasses.field(default_factory=lambda: ["run"])'
FINISHED_RUN = {"dataclasses.field(default_factory=list)": RUN}
EDITS = {  # script -> changes to Config, flags of a second cell, and what lies there afterwards
    "moco_cifar": (
        {**TINY_RUN, **QUEUE, "bn_splits: int = 8": "bn_splits: int = 2"},
        MORE,
        ["more/pretrain.pt"],
    ),
    "simclr": (TINY_RUN, MORE, ["more/pretrain.pt"]),
    "fast_moco": ({**TINY_RUN, **QUEUE}, MORE, ["more/pretrain.pt"]),
    "linear_eval": (
        {**FINISHED_RUN, "epochs: int = 100": "epochs: int = 1"},
        ["run", *MORE],
        ["run/linear.pt", "more/linear.pt"],
    ),
    "knn_monitor": ({**FINISHED_RUN, "k: int = 200": "k: int = 5"}, ["run", "--k", "4"], []),
    "plots": (FINISHED_RUN, ["run", "--out", "more"], ["more"]),
}
SCRIPTS = list(EDITS)
STOPPED = ["see the error above"]  # all that is seen of an exception in a pasted cell


class Kernel:
    """A notebook's kernel; each call runs a cell -> what is seen below it"""

    def __init__(self, client):
        self.client = client

    def restart(self, folder):
        """As a new kernel in that folder, but for the time that importing torch takes"""
        self("get_ipython().reset()")
        self(f"import os; os.chdir({str(folder)!r})")

    def __call__(self, source, fails=False, while_it_runs=None):
        self.client.nb.cells.append(cell := nbformat.v4.new_code_cell(source))
        if while_it_runs:
            threading.Thread(target=while_it_runs).start()
        self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        seen = SimpleNamespace(stdout="", stderr="", error=None, figures=0)
        for out in cell.outputs:
            if out.output_type == "stream":
                setattr(seen, out.name, getattr(seen, out.name) + out.text)
            elif out.output_type == "error":
                seen.error = out.traceback
            else:
                seen.figures += "image/png" in out.data
        assert bool(seen.error) == fails, seen
        # after "\r" the next line takes the place of this one
        lines = (seen.stdout + seen.stderr).splitlines(keepends=True)
        seen.lines = [line for line in lines if not line.endswith("\r")]
        return seen

    def stop(self):
        """Press the stop button."""
        asyncio.run(self.client.km.interrupt_kernel())


@pytest.fixture(scope="module")
def kernel():
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=120, allow_errors=True)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torch.set_num_threads(1) here
    with client.setup_kernel(env=one_thread):
        yield Kernel(client)


# ---------------------------------------------------------------- a script in one cell
@pytest.fixture(scope="module", params=SCRIPTS)
def pasted(request, kernel, tmp_path_factory, tiny_npz, pretrained):
    """A kernel into which the script was pasted, with only Config's defaults changed"""
    folder, script = tmp_path_factory.mktemp("notebook"), request.param
    shutil.copy(tiny_npz, folder / "data.npz")
    shutil.copytree(pretrained, folder / "run")
    text = (ROOT / f"{script}.py").read_text()
    for old, new in EDITS[script][0].items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    kernel.restart(folder)
    kernel.script, kernel.folder, kernel.text = script, folder, text
    kernel.seen = kernel(text)
    return kernel


def test_the_cell_runs_with_the_values_in_config(pasted):
    written = {"linear_eval": "run/linear.pt", "knn_monitor": "run/knn.jsonl", "plots": "figures"}
    written = written.get(pasted.script, "new/*/pretrain.pt")
    assert list(pasted.folder.glob(written)), pasted.seen
    assert 0 < len(pasted.seen.lines) < 40
    assert bool(pasted.seen.figures) == (pasted.script == "plots")


@pytest.mark.parametrize("pasted", ["moco_cifar", "linear_eval"], indirect=True)
def test_the_checkpoint_holds_the_text_of_the_cell(pasted):
    path = {"moco_cifar": "new/moco/pretrain.pt", "linear_eval": "run/linear.pt"}[pasted.script]
    saved = torch.load(pasted.folder / path, weights_only=True)
    assert saved["source"].strip() == pasted.text.strip()
    assert saved["config"]["epochs"] == 1


def test_a_second_cell_takes_flags(pasted):
    _, flags, written = EDITS[pasted.script]
    assert pasted(f"print('code', main({flags}))").stdout.endswith("code 0\n")
    assert all((pasted.folder / name).exists() for name in written)


def test_help_in_a_cell(pasted):
    text = "try:\n    main(['--help'])\nexcept SystemExit as exit:\n    print(exit.code)"
    text = pasted(text).stdout
    assert "usage: " in text and text.endswith(("0\n", "None\n"))


@pytest.mark.parametrize("flags", [["--nonsense"], ["--seed", "-1"], ["--device", "cuda:7"]])
def test_an_error_is_one_line_and_the_kernel_lives(pasted, flags):
    first = ["run"] if pasted.script in ("linear_eval", "knn_monitor", "plots") else []
    lines = pasted(f"code = main({first + flags})").stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert pasted("print(code, 6 * 7)").stdout == "2 42\n"


STOP = """
import signal
finish = Run.finish_epoch
def finish_and_stop(run, epoch):
    finish(run, epoch)
    for _ in range({times}):
        os.kill(os.getpid(), signal.SIGINT)
Run.finish_epoch = finish_and_stop
print("code", main(["--epochs", "2", "--out", "stopped-{times}"]))
"""


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("pasted", ["moco_cifar"], indirect=True)
def test_an_interrupted_cell_can_be_run_again(pasted, times):
    """The stop button, once or twice: the run is saved, the lock is free, the kernel lives and has
    its own handler back.
    """
    seen = pasted(STOP.format(times=times))
    assert seen.stdout.count("stopping soon") == 1
    assert seen.stdout.endswith("code 130\n") and "resume" in seen.stderr
    again = STOP.format(times=times).splitlines()[-1]
    assert pasted(f"Run.finish_epoch = finish\n{again}").stdout.endswith("code 0\n")
    assert (pasted.folder / f"stopped-{times}/pretrain.pt").exists()
    handler = pasted("print(signal.getsignal(signal.SIGINT).__name__)").stdout
    assert handler == "default_int_handler\n"


@pytest.mark.parametrize("pasted", ["moco_cifar"], indirect=True)
def test_the_stop_button_while_images_are_read_says_a_word(pasted):
    stop = "load, load_data = load_data, lambda *_: os.kill(os.getpid(), signal.SIGINT)"
    seen = pasted(f'{stop}\nprint("code", main(["--out", "never"]))\nload_data = load')
    assert seen.stdout == "code 130\n" and "stopped before the first step" in seen.stderr


@pytest.mark.parametrize("pasted", ["moco_cifar"], indirect=True)
def test_a_refused_cell_can_be_run_again(pasted):
    """A damaged state is refused, --restart starts over: the first call keeps no lock."""
    (pasted.folder / "broken").mkdir()
    (pasted.folder / "broken" / "last.pt").write_text("no checkpoint")
    refused = 'import gc; gc.disable(); print("code", main(["--out", "broken"]))'
    assert pasted(refused).stdout.endswith("code 2\n")
    again = pasted('print("code", main(["--out", "broken", "--restart"])); gc.enable()')
    assert again.stdout.endswith("code 0\n")


@pytest.mark.parametrize("pasted", ["moco_cifar"], indirect=True)
def test_a_long_run_leaves_few_lines_below_the_cell(pasted):
    """The current epoch is always seen; those with a k-NN accuracy stay."""
    seen = pasted('main("--epochs 45 --knn-every 10 --limit 40 --out long".split())')
    assert seen.stdout.count("epoch ") == 45
    kept = [line.split("/")[0] for line in seen.lines if line.startswith("epoch ")]
    assert kept == [f"epoch {n}" for n in (10, 20, 30, 40, 45)]


@pytest.mark.parametrize("pasted", ["simclr"], indirect=True)
def test_the_second_way_is_a_file_and_run(pasted):
    """As the notebooks say: %%writefile, then %run with flags"""
    pasted(f"%%writefile simclr.py\n{pasted.text}")
    pasted("%run simclr.py --epochs 2 --out second")
    assert (pasted.folder / "second/pretrain.pt").exists()


@pytest.mark.parametrize("pasted", [name for name in SCRIPTS if name != "plots"], indirect=True)
def test_an_error_of_the_pasted_cell_ends_run_all(pasted):
    """The whole script again, and what it is asked for cannot be: an exception, or the next cell
    would take an old checkpoint for the new one; but no traceback, and the kernel lives. This test
    is the last one of a script, for Config stays like that.
    """
    data = next(line for line in pasted.text.splitlines() if line.startswith("    data: str = "))
    start = data.index('"')
    text = pasted.text.replace(data, data[:start] + '"nowhere.npz"' + data[data.rindex('"') + 1 :])
    seen = pasted(text, fails=True)
    assert seen.stderr.startswith("error: Config.data nowhere.npz")
    assert len(seen.stderr.splitlines()) == 1 and seen.error == STOPPED
    assert pasted("print(6 * 7)").stdout == "42\n"


# ---------------------------------------------------------------- notebooks/
def cells_of(script, kind="code"):
    """A notebook's cells of a kind: {id: text}"""
    found = json.loads((ROOT / f"notebooks/{script}.ipynb").read_text())["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in found if cell["cell_type"] == kind}


def test_the_notebooks_are_up_to_date(capsys):
    assert notebooks.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_notebook_is_named_and_written_anew(tmp_path, capsys):
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    assert notebooks.main(["--root", str(tmp_path)]) == 0
    (tmp_path / "notebooks/lesson.ipynb").write_text("not from here")
    text = (tmp_path / "simclr.py").read_text()
    (tmp_path / "simclr.py").write_text(text.replace("z1", "z_1"))
    assert notebooks.main(["--root", str(tmp_path), "--check"]) == 1
    out = capsys.readouterr().out
    assert out == "notebooks/simclr.ipynb is out of date: run make notebooks\n"
    assert notebooks.main(["--root", str(tmp_path)]) == 0
    assert notebooks.main(["--root", str(tmp_path), "--check"]) == 0
    for script in set(SCRIPTS) - {"simclr"}:
        path = f"notebooks/{script}.ipynb"
        assert (tmp_path / path).read_text() == (ROOT / path).read_text()
    assert (tmp_path / "notebooks/lesson.ipynb").read_text() == "not from here"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_notebook_holds_the_script_the_plumbing_in_one_folded_cell(script):
    made = nbformat.read(ROOT / f"notebooks/{script}.ipynb", 4)
    nbformat.validate(made)
    source = (ROOT / f"{script}.py").read_text()
    for cell in [cell for cell in made.cells if cell.cell_type == "code"]:
        assert not cell.outputs and cell.execution_count is None
        folded = cell.id in ("plumbing-code", "variants-code")
        assert cell.source.startswith("# @title ") == folded
        assert (cell.metadata.get("cellView") == "form") == folded
        assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == folded
    lesson, call, _ = source.partition('\nif __name__ == "__main__"')
    _, doc, lesson = lesson.split('"""', 2)
    marks = [line for line in lesson.splitlines() if line.startswith(("# %%", "# ----"))]
    code, prose = cells_of(script), cells_of(script, "markdown")
    headings = [text.partition("\n")[0] for text in list(prose.values())[2:]]
    for mark in marks[: next(i for i, mark in enumerate(marks) if "- plumbing" in mark) + 1]:
        title = (mark.strip("#%- ").partition(". ")[0] or "Imports").lower()
        assert call and any(title.startswith(heading[3:].lower()) for heading in headings), mark
    shown, folded = "\n".join(code.values()), code["plumbing-code"]
    for line in [line for line in lesson.splitlines() if line.strip() and line not in marks]:
        if line[:2] != "# " or line[2:] not in "".join(prose.values()):  # the rest of a title
            assert line in shown
            shown = shown[shown.index(line) :]  # in the script's order
    assert lesson.partition("# ---- plumbing")[2].partition("\n")[2].strip("\n") in folded
    for word in doc.split("In a notebook")[0].split():
        assert word.rstrip(".") in prose["title-markdown"]


TINY_FLAGS = "--data ../data.npz --image-size 16 --arch resnet8 --width 4 --batch-size 40 "
TINY_FLAGS += "--knn-every 10 --epochs "


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a clone of the repository, with notebooks/ in it"""
    folder = tmp_path_factory.mktemp("clone") / "here"
    (folder / "notebooks").mkdir(parents=True)
    write_npz(folder.parent / "data.npz", n_train=400, n_test=40)
    for path in (*ROOT.glob("*.py"), ROOT / "tools"):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def opened(request, kernel, clone):
    """A notebook: its code cells {id: text}, of which the first is run with tiny settings"""
    kernel.restart(clone / "notebooks")
    script, epochs = request.param
    own = {"simclr": "", "fast_moco": " --head-hidden 16 --dim 16 --predictor-hidden 8"}
    flags = TINY_FLAGS + str(epochs) + own.get(script, " --queue-size 50 --bn-splits 2")
    first, *rest = cells_of(script).items()
    settings = f'SIZE = "small"\nFLAGS = {{"small": "{flags}"}}\nOUT = "runs/{epochs}-{script}"'
    if script in ("linear_eval", "knn_monitor", "plots"):
        settings = settings.replace(script, "shared")
    kernel(settings)
    return SimpleNamespace(cells=dict(rest), out=clone / f"runs/{epochs}-{script}")


def run_all(kernel, cells):
    """Run cells one after the other -> {id: what is seen}"""
    seen = {name: kernel(text) for name, text in cells.items()}
    for name, below in seen.items():
        assert len(below.lines) < 40, name
    return seen


def up_to(cells, last):
    names = list(cells)
    return {name: cells[name] for name in names[: names.index(last) + 1]}


@pytest.mark.parametrize("opened", [("moco_cifar", 2)], indirect=True)
def test_a_notebook_trains_evaluates_and_draws(kernel, opened):
    seen = run_all(kernel, opened.cells)
    for name in ("pretrain.pt", "linear.pt", "random/linear.pt", "knn.jsonl"):
        assert (opened.out / name).exists()
    assert seen["figures-code"].figures == 7 and seen["pretraining-code"].figures == 0
    saved = torch.load(opened.out / "pretrain.pt", weights_only=True)
    for part in ("class Config:\n", "class MoCo(", "class Run:\n", "--data ../data.npz"):
        assert part in saved["source"]
    assert "complete" in kernel(opened.cells["pretraining-code"]).stdout  # nothing is done twice


@pytest.mark.parametrize("opened", [("simclr", 1), ("fast_moco", 1)], indirect=True)
def test_the_other_methods_notebooks_go_on_in_the_same_way(kernel, opened):
    run_all(kernel, up_to(opened.cells, "pretraining-code"))
    assert (opened.out / "pretrain.pt").exists()
    rest = list(opened.cells.values())[list(opened.cells).index("pretraining-code") :]
    same = list(cells_of("moco_cifar").values())[-len(rest) :]
    assert rest == same and len(rest) == 5  # the test above has run these


@pytest.mark.parametrize("opened", [("linear_eval", 1)], indirect=True)
def test_linear_evals_notebook(kernel, opened):
    cells = {
        name: text.replace("0.1)", '0.1, "--epochs", 2)') for name, text in opened.cells.items()
    }
    seen = run_all(kernel, cells)
    assert "moco on 400 images" in seen["an-encoder-to-measure-code"].stdout
    for name in ("few-labels-code", "few-labels-without-pretraining-code", "linear-probe-code"):
        assert "saved " in seen[name].stdout
    assert seen["figures-code"].figures == 2


@pytest.mark.parametrize("opened", [("knn_monitor", 1)], indirect=True)
def test_knn_monitors_notebook(kernel, opened):
    seen = run_all(kernel, opened.cells)
    table = seen["how-many-neighbours-code"].lines
    ks = [line.split()[3] for line in table if line.startswith("moco ")]
    assert ks == ["1", "20", "200"]
    assert seen["figures-code"].figures == 2


@pytest.mark.parametrize("opened", [("plots", 1)], indirect=True)
def test_plots_notebook(kernel, opened):
    cells = {name: text for name, text in opened.cells.items() if "probe" not in name}
    seen = run_all(kernel, cells)
    assert seen["figures-code"].figures >= 5


@pytest.mark.parametrize("opened", [("moco_cifar", 15)], indirect=True)
def test_an_interrupted_notebook_resumes(kernel, opened):
    """The stop button in the middle; run all, and the run goes on from there."""
    log = opened.out / "pretrain.jsonl"

    def stop():
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            time.sleep(0.01)
        kernel.stop()

    *cells, _ = up_to(opened.cells, "pretraining-code").values()
    for text in cells:
        kernel(text)
    seen = kernel(opened.cells["pretraining-code"], fails=True, while_it_runs=stop)
    assert seen.error == ["stopped: see the error above"]
    assert "saved; to resume" in seen.stderr and not (opened.out / "pretrain.pt").exists()
    done = torch.load(opened.out / "last.pt", weights_only=True)["train_state"]["step"]
    seen = kernel(opened.cells["pretraining-code"])
    assert f"steps {done} to 150" in seen.stdout and done >= 20
    saved = torch.load(opened.out / "pretrain.pt", weights_only=True)
    assert [row["epoch"] for row in saved["history"]] == list(range(1, 16))


@pytest.mark.parametrize("opened", [("moco_cifar", 1)], indirect=True)
def test_an_error_ends_run_all_and_is_short(kernel, opened, tmp_path):
    run_all(kernel, up_to(opened.cells, "plumbing-code"))
    seen = kernel('run("--data", "nowhere.npz")', fails=True)
    assert seen.error == ["stopped: see the error above"] and "nowhere.npz" in seen.stderr
    seen = kernel('script("linear_eval.py", "nowhere")', fails=True)
    assert seen.error == ["stopped: see the error above"] and "nowhere" in seen.stderr
    kernel(f"os.chdir({str(tmp_path)!r})")
    seen = kernel('script("plots.py", OUT)', fails=True)
    assert len(seen.error) == 1 and "plots.py is not in" in seen.error[0]


def test_a_drive_may_vanish_for_a_moment(tiny_npz, tmp_path, monkeypatch, capsys):
    """--out on a mounted drive: its folder is gone while the run wants to save, twice."""
    out, away, waits = tmp_path / "drive/run", tmp_path / "away", []
    check = moco_cifar.Run.check_clock

    def vanish(run):
        if run.step == 4:
            (tmp_path / "drive").rename(away)
        return check(run)

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            away.rename(tmp_path / "drive")

    monkeypatch.setattr(moco_cifar.Run, "check_clock", vanish)
    monkeypatch.setattr(time, "sleep", wait)
    where = ["--data", str(tiny_npz), "--image-size", "16", "--out", str(out)]
    assert moco_cifar.main([*TINY, *where, "--epochs", "3", "--save-seconds", "0"]) == 0
    assert waits == [10, 100] and capsys.readouterr().err.count("can't be written") == 2
    saved = torch.load(out / "pretrain.pt", weights_only=True)
    assert len(saved["history"]) == 3 and not (out / "last.pt").exists()
