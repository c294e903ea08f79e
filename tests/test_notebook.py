"""Each script pasted whole into one cell of a real notebook, as people do in Colab."""

import shutil

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient

TINY_RUN = {  # a pretraining script's defaults -> what they are changed to in the text
    'data: str = "cifar10"': 'data: str = "data.npz"',
    "image_size: int = 32": "image_size: int = 16",
    '= "resnet18"  # the': '= "resnet8"  # the',
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
SCRIPTS = [name for name in EDITS if (ROOT / f"{name}.py").exists()]


class Notebook:
    """A kernel in a folder of its own; each call is a cell -> what it printed"""

    def __init__(self, folder):
        self.notebook = nbformat.v4.new_notebook()
        where = {"metadata": {"path": str(folder)}}
        self.client = NotebookClient(self.notebook, timeout=120, resources=where)

    def __call__(self, source, stream="stdout"):
        self.notebook.cells.append(cell := nbformat.v4.new_code_cell(source))
        self.client.execute_cell(cell, len(self.notebook.cells) - 1)  # raises what the cell raises
        outputs = [out for out in cell.outputs if out.output_type == "stream"]
        return "".join(out.text for out in outputs if out.name == stream)


@pytest.fixture(scope="module", params=SCRIPTS)
def pasted(request, tmp_path_factory, tiny_npz, pretrained):
    """A notebook into which the script was pasted, with only Config's defaults changed"""
    folder, script = tmp_path_factory.mktemp("notebook"), request.param
    shutil.copy(tiny_npz, folder / "data.npz")
    shutil.copytree(pretrained, folder / "run")
    text = (ROOT / f"{script}.py").read_text()
    for old, new in EDITS[script][0].items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    notebook = Notebook(folder)
    with notebook.client.setup_kernel():
        notebook.script, notebook.folder, notebook.text = script, folder, text
        notebook.output = notebook(text)
        yield notebook


def test_the_cell_runs_with_the_values_in_config(pasted):
    written = {"linear_eval": "run/linear.pt", "knn_monitor": "run/knn.jsonl", "plots": "figures"}
    written = written.get(pasted.script, "new/*/pretrain.pt")
    assert list(pasted.folder.glob(written)), pasted.output
    assert pasted.output


@pytest.mark.parametrize("pasted", ["moco_cifar", "linear_eval"], indirect=True)
def test_the_checkpoint_holds_the_text_of_the_cell(pasted):
    path = {"moco_cifar": "new/moco/pretrain.pt", "linear_eval": "run/linear.pt"}[pasted.script]
    saved = torch.load(pasted.folder / path, weights_only=True)
    assert saved["source"].strip() == pasted.text.strip()
    assert saved["config"]["epochs"] == 1


def test_a_second_cell_takes_flags(pasted):
    _, flags, written = EDITS[pasted.script]
    assert pasted(f"print('code', main({flags}))").endswith("code 0\n")
    assert all((pasted.folder / name).exists() for name in written)


def test_help_in_a_cell(pasted):
    text = pasted("try:\n    main(['--help'])\nexcept SystemExit as exit:\n    print(exit.code)")
    assert "usage: " in text and text.endswith(("0\n", "None\n"))


@pytest.mark.parametrize("flags", [["--nonsense"], ["--seed", "-1"], ["--device", "cuda:7"]])
def test_an_error_is_one_line_and_the_kernel_lives(pasted, flags):
    first = ["run"] if pasted.script in ("linear_eval", "knn_monitor", "plots") else []
    lines = pasted(f"code = main({first + flags})", "stderr").splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert pasted("print(code, 6 * 7)") == "2 42\n"


STOP = """
import os, signal
finish = Run.finish_epoch
Run.finish_epoch = lambda run, epoch: (finish(run, epoch), os.kill(os.getpid(), signal.SIGINT))
print("code", main(["--epochs", "2", "--out", "stopped"]))
Run.finish_epoch = finish
"""


@pytest.mark.parametrize("pasted", ["moco_cifar"], indirect=True)
def test_an_interrupted_cell_can_be_run_again(pasted):
    """The stop button: the state is saved, the lock is free, the kernel's own handler is back."""
    assert pasted(STOP).endswith("code 130\n")
    again = 'print("code", main(["--epochs", "2", "--out", "stopped"]))'
    assert pasted(again).endswith("code 0\n")
    assert (pasted.folder / "stopped" / "pretrain.pt").exists()
    assert pasted("print(signal.getsignal(signal.SIGINT).__name__)") == "default_int_handler\n"


@pytest.mark.parametrize("pasted", ["moco_cifar"], indirect=True)
def test_a_refused_cell_can_be_run_again(pasted):
    """A damaged state is refused, --restart starts over: the first call keeps no lock."""
    (pasted.folder / "broken").mkdir()
    (pasted.folder / "broken" / "last.pt").write_text("no checkpoint")
    refused = 'import gc; gc.disable(); print("code", main(["--out", "broken"]))'
    assert pasted(refused).endswith("code 2\n")
    again = pasted('print("code", main(["--out", "broken", "--restart"])); gc.enable()')
    assert again.endswith("code 0\n")


@pytest.mark.parametrize("pasted", [name for name in SCRIPTS if name != "plots"], indirect=True)
def test_an_error_of_the_pasted_cell_leaves_the_kernel_alive(pasted):
    """The whole script again, and what it is asked for cannot be: no SystemExit, no traceback. This
    test is the last one here, for Config stays like that.
    """
    data = next(line for line in pasted.text.splitlines() if line.startswith("    data: str = "))
    start = data.index('"')
    text = pasted.text.replace(data, data[:start] + '"nowhere.npz"' + data[data.rindex('"') + 1 :])
    error = pasted(text, "stderr")
    assert error.startswith("error: --data nowhere.npz") and len(error.splitlines()) == 1
    assert pasted("print(6 * 7)") == "42\n"
