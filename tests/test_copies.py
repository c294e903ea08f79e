"""tools/copies.py: the self-contained scripts repeat code, and this is what keeps it the same."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIX = "python tools/copies.py --fix"


@pytest.fixture
def copies():
    spec = importlib.util.spec_from_file_location("copies", ROOT / "tools" / "copies.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture
def tree(tmp_path, copies, capsys):
    """Real scripts in a folder of their own, simclr.py being moco_cifar.py once more."""

    class Tree:
        def path(self, script):
            return tmp_path / f"{script}.py"

        def edit(self, script, old, new):
            text = self.path(script).read_text()
            assert old in text
            self.path(script).write_bytes(text.replace(old, new, 1).encode())

        def run(self, flag):
            try:
                code = copies.main([flag, "--root", str(tmp_path)])
            except SystemExit as exit:
                code = exit.code
            return code, capsys.readouterr().out.splitlines()

    for script in ("moco_cifar", "linear_eval"):
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    tree = Tree()
    names = "|".join(name for _, name in copies.DIFFERS)
    own = rf"^(?=(def |class )?({names})\b)"
    text = re.sub(own, "# of SimCLR\n", tree.path("moco_cifar").read_text(), flags=re.MULTILINE)
    tree.path("simclr").write_text(text)
    assert tree.run("--fix")[0] == 0  # if the real ones have drifted, only the next test says so
    return tree


def test_the_real_scripts_agree(copies, capsys):
    assert copies.main(["--check"]) == 0, capsys.readouterr().out


CHANGES = {  # a name, and what happens to its copy
    "comment": ("seed_of", lambda text: text + "  # why?"),
    "docstring": ("UserError", lambda text: text.replace('"""', '"""Here: ', 1)),
    "constant": ("BUILTIN", lambda text: text.replace("cifar10", "cifar", 1)),
    "annotation": ("FORMAT", lambda text: text.replace("FORMAT =", "FORMAT: str =")),
    "decorator": ("extract_features", lambda text: text.replace("no_grad", "inference_mode")),
    "comment above": ("shard", lambda text: "# what for?\n" + text),
    "comment below": ("shard", lambda text: text + "\n    # so it is"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_drift_is_named_and_mended(tree, copies, change):
    right = tree.path("simclr").read_bytes()
    name, edit = CHANGES[change]
    text = copies.definitions(right.decode(), "simclr")[name][2]
    assert edit(text) != text
    tree.edit("simclr", text, edit(text))
    code, lines = tree.run("--check")
    assert code == 1 and len(lines) == 1
    assert re.match(rf"{name} differs in simclr from moco_cifar: {FIX}", lines[0])
    others = {p: p.read_bytes() for p in tree.path("").parent.iterdir() if p.stem != "simclr"}
    assert tree.run("--fix")[0] == 0
    assert tree.path("simclr").read_bytes() == right
    assert {p: p.read_bytes() for p in tree.path("").parent.iterdir() if p in others} == others
    assert tree.run("--check") == (0, [])


def test_fix_keeps_the_rest_byte_for_byte(tree):
    """Cells, banners, exempt names, odd bytes and a missing last newline are not the copy's."""
    first = b'"""One."""\n\n# %% A cell\n# why\n@staticmethod\ndef f():\n    return 1\n'
    tree.path("moco_cifar").write_bytes(first + b"\n\nMETHOD = 1\nRECIPES = {}\nA = B = 2  # two\n")
    before = '"""Two: \x0c \u2028 é."""\r\n\n\n# %% Another\n# -- banner\n'.encode()
    after = b"\n\n\n# its own\ndef g():\n    return 3\n\n\nMETHOD = 2\nRECIPES = 1"
    tree.path("linear_eval").unlink()
    tree.path("simclr").write_bytes(before + b"def f():\n    return 2" + after + b"\nA = B = 3")
    rest = "\n\n\nclass Config:\n    pass\n"  # what else DIFFERS names must be somewhere
    rest += "".join(f"\n\ndef {name}():\n    pass\n" for name in ("train", "check_method", "main"))
    with open(tree.path("moco_cifar"), "a") as file:
        file.write(rest)
    assert tree.run("--check")[0] == 1
    assert tree.run("--fix")[0] == 0
    copy = b"# why\n@staticmethod\ndef f():\n    return 1"
    assert tree.path("simclr").read_bytes() == before + copy + after + b"\nA = B = 2  # two"
    assert tree.run("--check") == (0, [])


def test_the_first_script_with_the_name_wins(tree):
    for script in ("simclr", "linear_eval"):
        with open(tree.path(script), "a") as file:
            file.write(f'\n\ndef only_here():\n    return "{script}"\n')
    code, lines = tree.run("--check")
    assert code == 1 and "only_here differs in linear_eval from simclr" in lines[0]
    assert lines[0].endswith("takes simclr's")


def test_exemptions(tree, copies):
    tree.edit("simclr", "class UserError(Exception):", "class UserError(Exception):  # mine")
    copies.DIFFERS["simclr", "UserError"] = "a reason"
    assert tree.run("--check") == (0, [])
    copies.DIFFERS["plots", "from_the_future"] = "plots.py does not exist yet"
    assert tree.run("--check") == (0, [])
    for stale in (("*", "shard"), ("simclr", "shard"), ("*", "no_such"), ("simclr", "no_such")):
        copies.DIFFERS[stale] = "no reason"
        for flag in ("--check", "--fix"):
            code, lines = tree.run(flag)
            assert code == 1 and len(lines) == 1 and stale[1] in lines[0] and "DIFFERS" in lines[0]
        del copies.DIFFERS[stale]


def test_what_cannot_be_compared_is_an_error(tree):
    right = tree.path("simclr").read_text()
    for text in ("def f(:\n", right + "\n\ndef shard():\n    pass\n"):
        tree.path("simclr").write_text(text)
        assert tree.run("--fix")[0] == 2
        assert tree.path("simclr").read_text() == text
    tree.path("simclr").write_text(right.replace("FORMAT =", "FORMAT, MORE ="))
    assert tree.run("--fix")[0] == 2  # would lose MORE
    assert "MORE" in tree.path("simclr").read_text()


def test_a_copy_is_one_statement(tree, capsys):
    """What is added to a constant later would not be compared: it has hidden a difference once."""
    with open(tree.path("simclr"), "a") as file:
        file.write('\nPOSITIVE += ["more"]\n')
    assert tree.run("--check") == (2, [])
