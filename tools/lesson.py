"""Write notebooks/lesson.ipynb from docs/lesson.md. Edit that page, never the notebook.

A ```python block becomes a code cell, everything between two of them a text cell: expected outputs
(```text blocks) and the solutions, which stay folded in <details>.

    python tools/lesson.py             # write the notebook
    python tools/lesson.py --check     # exit code 1 if it is out of date
    python tools/lesson.py --solved    # print the lesson as one Python script, exercises solved
    python tools/lesson.py --handout FILE.ipynb    # for a class: without solutions and answers
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ROOT / "docs/lesson.md", ROOT / "notebooks/lesson.ipynb"
CODE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
FOLDED = re.compile(r"(^<details>\n.*?^</details>\n)", re.MULTILINE | re.DOTALL)


def read_cells(page):
    """The text of docs/lesson.md -> [("markdown" or "code", text), ...]"""
    cells = []
    for i, part in enumerate(FOLDED.split(page)):
        if i % 2:  # a solution or an answer
            cells.append(("markdown", part.strip()))
            continue
        for j, text in enumerate(CODE.split(part)):
            if text.strip():
                cells.append(("code" if j % 2 else "markdown", text.strip()))
    joined = []  # a solution belongs to the text around it
    for kind, text in cells:
        if kind == "markdown" and joined and joined[-1][0] == "markdown":
            text = f"{joined.pop()[1]}\n\n{text}"
        joined.append((kind, text))
    return joined


def solve(cells):
    """The code cells, each exercise replaced by its solution, which follows in a folded block"""
    code, open_exercise = [], None
    for kind, text in cells:
        if kind == "code":
            if "raise NotImplementedError" in text:
                open_exercise = len(code)
            code.append(text)
            continue
        for folded in FOLDED.findall(text + "\n"):
            for solution in CODE.findall(folded):
                code[open_exercise], open_exercise = solution.strip(), None
    return code


def make_notebook(cells):
    """The text of an .ipynb file, the same on every machine"""
    made = []
    for i, (kind, text) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"lesson-{i:03d}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell | {"source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    meta = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": made, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="say whether it is out of date")
    what.add_argument("--solved", action="store_true", help="print a script with the solutions")
    what.add_argument("--handout", type=Path, metavar="FILE", help="write it without solutions")
    args = parser.parse_args(argv)
    cells = read_cells(PAGE.read_text())
    if args.handout:
        args.handout.write_text(make_notebook(read_cells(FOLDED.sub("", PAGE.read_text()))))
        return 0
    if args.solved:
        print("\n\n".join(solve(cells)))
        return 0
    text = make_notebook(cells)
    if args.check:
        current = NOTEBOOK.exists() and NOTEBOOK.read_text() == text
        if not current:
            print("notebooks/lesson.ipynb is out of date: python tools/lesson.py", file=sys.stderr)
        return int(not current)
    NOTEBOOK.parent.mkdir(exist_ok=True)
    NOTEBOOK.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
