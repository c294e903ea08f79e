"""The pages: their links lead to the line that they quote, their commands are accepted.

python tests/test_docs.py    # after an edit: write the line numbers of the links anew
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import ideas  # noqa: E402
from ablations import ABLATIONS  # noqa: E402

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
LINE_LINK = re.compile(r'\(([\w./-]+)#L\d+ "([^"]+)"\)')  # its title is a part of the line
MADE_BY_A_PAGE = ("alignment.py",)  # docs/add-a-method.md has a test of its own


def renumbered(name, text):
    """The page with the numbers of the lines as they are now"""

    def renumber(link):
        lines = ((ROOT / name).parent / link[1]).read_text().splitlines()
        found = [number for number, line in enumerate(lines, 1) if link[2] in line]
        assert len(found) == 1, f"{name}: {len(found)} lines of {link[1]} contain: {link[2]}"
        return f'({link[1]}#L{found[0]} "{link[2]}")'

    return LINE_LINK.sub(renumber, text)


def commands(text):
    """Each command of a page, in blocks and within sentences, without its comment"""
    blocks = re.findall(r"^```(.*?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in blocks if language in ("", "bash")]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + spans
    lines = [re.sub(r"\s+#.*", "", line.strip()).removeprefix("!") for line in lines]
    return sorted({line for line in lines if re.match(r"(make|python3?|torchrun) .*\w", line)})


COMMANDS = [(name, command) for name, text in TEXTS.items() for command in commands(text)]


@pytest.mark.parametrize("name", TEXTS)
def test_links_to_lines(name):
    assert "#L" not in LINE_LINK.sub("", TEXTS[name]), "such a link quotes its line as its title"
    right = renumbered(name, TEXTS[name])
    assert right == TEXTS[name], "line numbers have changed: python tests/test_docs.py"


def test_a_line_that_moved_or_went_is_noticed():
    stale = '[why](../moco_cifar.py#L1 "def info_nce(")'
    assert re.search(r"#L\d\d+ ", renumbered("docs/faq.md", stale))
    for words in ("no line says so", "return"):  # none, and many
        with pytest.raises(AssertionError, match="lines of"):
            renumbered("docs/faq.md", f'[why](../moco_cifar.py#L1 "{words}")')


@pytest.mark.parametrize("name", TEXTS)
def test_links_to_files(name):
    for link in re.findall(r"\]\(([^)#\s]+)", TEXTS[name]):
        assert "://" in link or ((ROOT / name).parent / link).exists(), link


def test_pages_that_are_to_be_one_screen():
    for name, lines in {"docs/faq.md": 66, "CONTRIBUTING.md": 50, "docs/reading.md": 80}.items():
        assert len(TEXTS[name].splitlines()) <= lines, name


def test_names_in_the_reading_path_exist():
    """A function that has another name by now is not in any script."""
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in ROOT.glob("*.py"))))
    names = re.findall(r"`(?:\w+\.)?([A-Za-z_]+)`", TEXTS["docs/reading.md"])
    assert len(names) > 20 and not [name for name in names if name not in words]


@pytest.mark.parametrize("name, command", COMMANDS)
def test_command(name, command):
    first, *words = shlex.split(command)
    if first == "make":
        outer = ("MAKE", "MFLAGS", "PYTHON", "DATA", "EPOCHS", "ARGS", "VENV")  # of make check
        environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
        if not any(word.startswith("PYTHON=") for word in words):
            words.append("PYTHON=python")
        make = ["make", "-n", *words]
        process = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert process.returncode == 0, process.stderr
        compared = re.findall(r"ablate-([a-z\d-]+)", command)  # make takes any name
        assert {*compared} <= ABLATIONS.keys()
        return
    place = [word.endswith(".py") for word in words].index(True)
    script, flags = words[place], words[place + 1 :]
    if script in MADE_BY_A_PAGE:
        return
    if script == "tools/ideas.py":  # takes the flags of the idea's script
        ideas.IDEAS[flags[0]][0].parse_config(flags[1:])
        return
    text = (ROOT / script).read_text()
    if "/" not in script:
        module = importlib.import_module(script.removesuffix(".py"))
        (getattr(module, "parse_config", None) or module.parse_flags)(flags)
    for flag in [flag.split("=")[0] for flag in flags if "/" in script and flag.startswith("--")]:
        assert f'"{flag}"' in text, flag


def test_diff_shows_the_methods_and_no_plumbing():
    quiet = dict(cwd=ROOT, capture_output=True, text=True)

    def diff(*names):
        make = subprocess.run(["make", "--no-print-directory", "diff", *names], **quiet)
        return make.returncode, make.stdout

    code, text = diff("A=moco_cifar", "B=simclr")
    assert code == 0 and "-def info_nce(" in text and "+def nt_xent(" in text
    assert " def train(config, run):" in text  # in both
    assert not re.search(r"^[-+ ](class Run|def load_data|\"\"\")", text, re.MULTILINE)
    assert diff("A=simclr", "B=simclr") == (0, "")
    assert diff("A=nothing")[0] == 2


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renumbered(page.relative_to(ROOT), page.read_text()))
