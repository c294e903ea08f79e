"""Write notebooks/*.ipynb: each script as a notebook that trains, evaluates and draws.

The docstring becomes text, each `# %%` cell of the lesson a heading and a code cell, and everything
below the plumbing banner one folded cell. What follows is in STEPS. Never edit a notebook by hand:
edit the script or this file, and run `make notebooks`.

    python tools/notebooks.py             # write them
    python tools/notebooks.py --check     # say which are out of date; exit code 1 if any are
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

MOCO = "moco", "--lr 0.03 --queue-size 1024 --bn-splits 1"
RUNS = {  # script -> the name of its run's folder, and more flags of the small run
    "moco_cifar": MOCO,
    "simclr": ("simclr", "--lr 0.12 --warmup-epochs 1"),
    "fast_moco": ("fast-moco", "--lr 0.12 --head-hidden 256 --dim 128 --predictor-hidden 64"),
    "linear_eval": MOCO,
    "knn_monitor": MOCO,
    "plots": MOCO,
}

INTRO = """
## How to use this notebook

Choose *Run all* (in Colab, first *Runtime > Change runtime type* and a GPU). The first code cell
chooses between a small run, which takes minutes even on two CPU cores, and the full one. To try
something, change the lesson's code or a default in `Config` and run all cells again, with another
`OUT`: a folder holds one run. An error stops *Run all* with one line that says what to do.

**Stopped or disconnected?** *Stop* saves the run first. Run the cell again and it resumes; after a
lost connection, run all cells again. Colab deletes its files when it disconnects. To keep them, run
`from google.colab import drive; drive.mount("/content/drive")` in a cell of its own, and set
`FOLDER` to `/content/drive/MyDrive/runs`.

**The other scripts** (OTHERS) are run at the end. They are found beside this notebook, in its
parent folder (as in a clone of the repository), or in a folder beside it: in Colab, `!git clone`
the repository that this notebook is from, or upload them with the folder icon on the left.

**A second way,** without this notebook: paste the whole of `SCRIPT.py` into one cell, edit `Config`
and run it. The next script that you paste replaces `Config`, `main` and `train`. To use several,
write each to a file, with `%%writefile SCRIPT.py` as the first line of the cell, and run it from
another cell: `%run SCRIPT.py FLAGS_OF_RUN`. (An error in `%run` doesn't stop *Run all*.)

```python
# What to run. Edit this cell first.
SIZE = "small"  # @param ["small", "shapes", "full"]
FOLDER = "runs"  # @param {type: "string"}

NARROW = "--arch resnet8 --width 16 --batch-size 128 --knn-every 2"
NARROW += " OWN"
FLAGS = {
    # 5,000 images of CIFAR-10 and a narrow ResNet-8: enough to see that it learns
    "small": f"{NARROW} --limit 5000 --epochs 8",
    # synthetic images, nothing to download
    "shapes": f"{NARROW} --data data/shapes.npz --crop-scale 0.5,1 --epochs 16",
    # Config's defaults: all of CIFAR-10, ResNet-18, 200 epochs. Needs a GPU, and hours
    "full": "",
}
OUT = f"{FOLDER}/NAME-{SIZE}"  # the run's folder
```
"""

HELPERS = '''


# ---- in notebooks only: run the cells above, run the other scripts, show figures ----
import runpy

from IPython.display import Image, display

UserError._render_traceback_ = lambda error: [f"stopped: {error}"]  # one line, no traceback
for folder in (Path(), Path(".."), *Path().glob("*/")):
    if (folder / "SCRIPT.py").exists():  # where the other scripts are, too
        os.chdir(folder)
        break


def run(*flags):
    """What the cells above define, with flags as on the command line"""
    global SOURCE
    SOURCE = "\\n\\n\\n".join(globals()["In"])  # all cells run so far: flags are made from Config's
    if code := main([str(flag) for flag in flags]):
        raise UserError("see the error above", code)


def script(name, *flags):
    """Another script, as `python name flags` runs it; its names don't replace those above."""
    if not Path(name).exists():
        raise UserError(f"{name} is not in {Path.cwd()}: upload it there, or clone the repository")
    before, sys.argv = sys.argv, [name, *map(str, flags)]
    print("$ python", *sys.argv)
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        raise UserError("see the error above", end.code) from None
    finally:
        sys.argv = before


def show(*names):
    """Figures that plots.py has drawn"""
    for path in [Path(OUT, "figures", f"{name}.png") for name in names]:
        if path.exists():
            display(Image(filename=str(path), retina=True))


if SIZE == "shapes" and not Path("data/shapes.npz").exists():
    script("tools/make_shapes.py", "data/shapes.npz")
'''

PRETRAIN = """
## Pretraining

No labels are used, except for the k-NN accuracy, which shows whether the features improve. The loss
alone doesn't show it.

```python
run(*FLAGS[SIZE].split(), "--out", OUT)
```
"""

ENCODER = """
## An encoder to measure

Set `OUT` to the folder of any run. If there is none, MoCo is pretrained first.

```python
if not Path(OUT, "pretrain.pt").exists():
    script("moco_cifar.py", *FLAGS[SIZE].split(), "--out", OUT)
```
"""

KNN = """
## k-NN accuracy

How good are the features, without any further training? Compare raw pixels, the encoder before
pretraining, and the encoder after it.

```python
for baseline in ("pixels", "random", "none"):
    script("knn_monitor.py", OUT, "--baseline", baseline)
```
"""

PROBE = """
## Linear probe

Now labels are used: a linear classifier learns from the features, and the encoder stays as it is.
Training images that are held out choose one of eight learning rates.

```python
script("linear_eval.py", OUT)
```

## The same for an untrained encoder

Even random features are better than guessing. What pretraining adds is its accuracy minus this one.

```python
script("linear_eval.py", OUT, "--init", "random")
```
"""

FIGURES = """
## Figures

The files are in the run's folder, in `figures/`.

```python
script("plots.py", OUT, "--out", f"{OUT}/figures")
show(NAMES)
```
"""


def figures(names):
    return FIGURES.replace("NAMES", ", ".join(f'"{name}"' for name in names.split()))


def in_place(text, script):
    """The steps of another script's notebook, for its own"""
    return text.replace(f'script("{script}.py", ', "run(")


SEEN = figures("pretraining diagram pairs neighbours map probe classes")
STEPS = {  # script -> what its notebook does after the lesson
    "moco_cifar": PRETRAIN + KNN + PROBE + SEEN,
    "simclr": PRETRAIN + KNN + PROBE + SEEN,
    "fast_moco": PRETRAIN + KNN + PROBE + SEEN,
    "linear_eval": ENCODER
    + in_place(PROBE, "linear_eval")
    + """
## Few labels

Fine-tuning starts from the pretrained weights, and all of them learn, here from a tenth of the
labels. It asks another question than the probe, so don't compare its accuracy with the probe's.

```python
run(OUT, "--mode", "finetune", "--labels", 0.1)
```

## Few labels, without pretraining

The same labels and the same network, from random weights.

```python
run(OUT, "--mode", "supervised", "--labels", 0.1)
```
"""
    + figures("probe classes"),
    "knn_monitor": ENCODER
    + in_place(KNN, "knn_monitor")
    + """
## How many neighbours?

k is a part of the protocol: accuracies with different k can't be compared.

```python
for k in (1, 20, 200):
    run(OUT, "--k", k)
```

## Backbone or head?

The loss sees the head's output, but the backbone's features are what is kept. Which are better?

```python
run(OUT, "--features", "head")
```
"""
    + figures("neighbours map"),
    "plots": ENCODER
    + KNN
    + PROBE
    + """
## Figures

All figures of this run. They are also saved in its folder, in `figures/`.

```python
run(OUT, "--out", f"{OUT}/figures")
```
""",
}


def blocks_of(text):
    """A docstring or a page -> (kind, lines) of each paragraph, list item and block of code"""
    blocks, kind = [], ""  # kind: of the block that goes on; "": none
    for line in text.strip("\n").split("\n"):
        fence, item = line.startswith("```"), re.match(r" (\d+\.|-) ", line)
        if kind == "fenced":
            blocks[-1][1].append(line)
            kind = "" if fence else kind
        elif not line.strip():
            if kind == "indented":  # an empty line may be inside
                blocks[-1][1].append(line)
            else:
                kind = ""
        else:
            before, kind = kind, "text"
            if fence or item:
                kind = "fenced" if fence else "item"
            elif line.startswith(" "):
                kind = "item" if before == "item" else "indented"
            if kind != before or item:
                blocks.append((kind, []))
            blocks[-1][1].append(line)
    return blocks


def markdown(text):
    """Prose -> Markdown, one line a paragraph; without what a docstring says of notebooks"""
    page, before = "", ""
    for kind, lines in blocks_of(text):
        if kind == "indented":
            lines = [line[4:] for line in "\n".join(lines).rstrip().split("\n")]
            part = "\n".join(["```", *lines, "```"])
            if lines[0].startswith("python "):
                part = f"On the command line:\n\n{part}"
        elif kind == "fenced":
            part = "\n".join(lines)
        else:
            part = " ".join(line.strip() for line in lines)
            part = re.sub(r" ?In a notebook, paste this file.*? edit Config\.", "", part)
        gap = "\n" if kind == before == "item" else "\n\n"
        page += gap * bool(page and part) + part
        before = kind
    return page


def heading(title):
    """The title of a cell -> a heading; what is too long for one becomes a sentence below it"""
    title, mark, more = title.partition(". ")
    if len(title) > 60:
        title, mark, more = title.partition(": ")
    more = f"\n\n{more[0].upper()}{more[1:].rstrip('.')}." if mark else ""
    return f"## {title[0].upper()}{title[1:]}{more}"


def parts_of(source):
    """The text of a script without its docstring -> the title and code of each part: the cells of
    the lesson, then what is below a banner. The last is the plumbing, without the call of main().
    """
    body, call, _ = source.partition('"""\n\n')[2].partition('\nif __name__ == "__main__"')
    lesson, banner, plumbing = body.partition("# ---- plumbing")
    assert banner and call  # or main() would run in the plumbing's cell
    parts = []
    for part in re.split(r"^(?=# %%|# ---- )", lesson, flags=re.MULTILINE)[1:]:
        title, _, code = part.partition("\n")
        while ". " in title and code.startswith("# "):  # a title of several lines
            more, _, code = code.partition("\n")
            title += more[1:]
        parts.append((title, code))
    banner, _, code = plumbing.partition("\n")
    return [*parts, ("# ---- plumbing" + banner.replace(" below this line", ""), code)]


def notebook(script, source):
    """A script's name and text -> its notebook, as nbformat 4.5 has it"""
    cells, names, steps = [], set(), STEPS[script]

    def add(name, text, kind="code", **metadata):
        name = re.sub(r"\W+", "-", f"{name} {kind}".lower()).strip("-")
        assert name not in names, name
        names.add(name)
        lines = text.strip("\n").splitlines(keepends=True)
        cell = dict(cell_type=kind, id=name, metadata=metadata, source=lines)
        cells.append(cell | (dict(execution_count=None, outputs=[]) if kind == "code" else {}))

    def add_page(page, **metadata):
        """Each section of it: text, then the code in its fence"""
        for section in re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]:
            text, _, code = section.partition("```python\n")
            name = section[3:].partition("\n")[0]
            add(name, markdown(text), "markdown")
            add(name, code.partition("```")[0], **metadata)

    title, _, prose = ast.get_docstring(ast.parse(source)).partition("\n")
    add("title", f"# {title.rstrip('.')}\n\n{markdown(prose)}", "markdown")
    name, own = RUNS[script]
    others = [f"`{other}.py`" for other in RUNS if f'"{other}.py"' in steps]
    words = dict(SCRIPT=script, OTHERS=", ".join(others), NAME=name, OWN=own)
    words["FLAGS_OF_RUN"] = "--epochs 1" if PRETRAIN in steps else "runs/moco"
    add_page(re.sub("|".join(words), lambda word: words[word[0]], INTRO), tags=["parameters"])

    *parts, (banner, plumbing) = parts_of(source)
    plumbing = plumbing.rstrip() + HELPERS.replace("SCRIPT", script)
    for title, code in (*parts, (banner, plumbing)):
        folded, title = title.startswith("# ----"), title.strip("#%- ") or "Imports"
        name = title.partition(":")[0].partition(". ")[0]
        note = "\n\nData, checkpoints, devices, flags. Run it and read on." * (code == plumbing)
        add(name, heading(title) + note, "markdown")
        if folded:
            form = re.split(r",| \(", title)[0]  # what is seen of the folded cell
            form = f'# @title {form[0].upper()}{form[1:]} {{ display-mode: "form" }}'
            folds = dict(cellView="form", jupyter={"source_hidden": True})  # in Colab, in Jupyter
            add(name, f"{form}\n{code.strip()}", **folds)
        else:
            add(name, code)
    add_page(steps)
    metadata = dict(accelerator="GPU", colab=dict(provenance=[], toc_visible=True))
    metadata |= dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"))
    metadata |= dict(language_info=dict(name="python"))
    return dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="say which are out of date")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    args, stale = parser.parse_args(argv), False
    for script in RUNS:
        made = notebook(script, (args.root / f"{script}.py").read_text())
        text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
        path = args.root / f"notebooks/{script}.ipynb"
        if path.exists() and path.read_text() == text:
            continue
        if args.check:
            stale = True
            print(f"notebooks/{script}.ipynb is out of date: run make notebooks")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
