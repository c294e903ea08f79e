"""Keep equal what the self-contained scripts repeat.

A top-level function, class or UPPER_CASE constant that has the same name in two scripts is the
same text in both: docstring, comments and decorators included, and the comment lines directly
above it. A reader who knows `knn_predict` from one script knows it in all of them.

    python tools/copies.py --check     # say which names have drifted; exit code 1 if any have
    python tools/copies.py --fix       # copy each from the first script below that has it
"""

import argparse
import ast
import sys
from pathlib import Path

SCRIPTS = ["moco_cifar", "fast_moco", "simclr", "linear_eval", "knn_monitor", "plots"]
CELLS = "# %%", "# --"  # these lines begin a cell or a part, and belong to no definition

# What has to differ: (script, or "*" for all of them, and the name) -> why. Prefer another name.
DIFFERS = {
    ("*", "Config"): "each script has settings of its own",
    ("*", "METHOD"): "the name of the method",
    ("*", "RECIPES"): "each script has recipes of its own",
    ("*", "train"): "each method has a loop of its own",
    ("*", "check_method"): "each method has settings that must go together",
    ("*", "main"): "each script has a task of its own",
}


def names_of(node):
    """What a top-level statement defines: functions, classes and UPPER_CASE constants."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
    leaves = [leaf for target in targets for leaf in ast.walk(target)]
    return [leaf.id for leaf in leaves if isinstance(leaf, ast.Name) and leaf.id.isupper()]


def definitions(source, script):
    """The text of a script -> {name: (its first line, the line after its last, its text)}"""
    lines, found = source.split("\n"), {}  # not splitlines(): ast does not count form feeds
    for node in ast.parse(source, f"{script}.py").body:
        first = min(n.lineno for n in (node, *getattr(node, "decorator_list", []))) - 1
        while first and lines[first - 1][:1] == "#" and lines[first - 1][:4] not in CELLS:
            first -= 1
        last = node.end_lineno
        while lines[last : last + 1] and lines[last].startswith((" ", "\t")):
            last += 1  # indented behind the last statement: a comment
        for name in names_of(node):
            if name in found:
                raise SyntaxError(f"{script}.py: {name} is defined twice")
            found[name] = first, last, "\n".join(lines[first:last])
    return found


def compare(scripts):
    """{script: its text} -> {name: the first script with it and those that differ}, stale ones"""
    texts, drifted, stale = {}, {}, []  # texts: {name: {script: text}}
    changed = []  # names to which something is added later: that would not be compared
    for script, source in scripts.items():
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.AugAssign)]
        changed += [(script, node.target.id) for node in nodes if hasattr(node.target, "id")]
        for name, (_, _, text) in definitions(source, script).items():
            texts.setdefault(name, {})[script] = text
    for script, name in changed:
        if len(texts.get(name, {})) > 1:
            raise SyntaxError(f"{script}.py: {name} is a copy, so it has to be one statement")
    for name, found in texts.items():
        held = [script for script in found if not {(script, name), ("*", name)} & DIFFERS.keys()]
        if others := [script for script in held if found[script] != found[held[0]]]:
            drifted[name] = [held[0], *others]
    for script, name in DIFFERS:
        found = texts.get(name, {})
        gone = not found if script == "*" else script not in found
        equal = len(found) > 1 and len(set(found.values())) == 1
        stale += [(script, name)] if (gone or equal) and script in ("*", *scripts) else []
    return drifted, stale


def copy(name, source, target, scripts):
    """Replace the text of one definition in target by that in source; the rest stays as it is."""
    lines, before = scripts[target].split("\n"), definitions(scripts[target], target)
    lines[slice(*before[name][:2])] = [definitions(scripts[source], source)[name][2]]
    scripts[target] = "\n".join(lines)
    if definitions(scripts[target], target).keys() != before.keys():
        raise SyntaxError(f"{target}.py: {name} is defined along with others, mend it by hand")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="say which names have drifted")
    what.add_argument("--fix", action="store_true", help="copy each from the first script")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    args = parser.parse_args(argv)
    paths = {name: args.root / f"{name}.py" for name in SCRIPTS}
    scripts = {name: path.read_bytes().decode() for name, path in paths.items() if path.exists()}
    original = dict(scripts)
    try:
        drifted, stale = compare(scripts)
        for name, (source, *others) in drifted.items():
            where = f"{' and '.join(others)} from {source}"
            print(f"{name} differs in {where}: python tools/copies.py --fix takes {source}'s")
            for target in others if args.fix else ():
                copy(name, source, target, scripts)
    except SyntaxError as error:
        parser.exit(2, f"error: {error}\n")
    for script, name in stale:
        print(f"{name} ({script}): this exemption in DIFFERS is not needed, remove it")
    for script in (script for script in scripts if scripts[script] != original[script]):
        temporary = paths[script].with_suffix(".tmp")
        temporary.write_bytes(scripts[script].encode())
        temporary.replace(paths[script])
    return int(bool(stale or drifted and not args.fix))


if __name__ == "__main__":
    sys.exit(main())
