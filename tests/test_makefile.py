"""make: the chain, its order and its folders, what is run again, and what README.md shows."""

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

RUN = "cifar-moco-3ep-seed1-images"
CHAIN = ["cifar-moco", "DATA=images", "EPOCHS=3", "SEED=1"]

# stands for python: notes each call in `calls`, writes what that script would write; with a file
# `fail`, the scripts that it names fail
FAKE = r"""#!/bin/bash
echo "$*" >> calls
if [ -f fail ] && grep -q "$1" fail; then exit 2; fi
while [ "$1" ]; do
    case $1 in
        linear_eval.py) file=linear.pt; out=$2 ;;
        knn_monitor.py) file=knn.jsonl; out=$2 ;;
        moco_cifar.py | simclr.py | fast_moco.py) file=pretrain.pt ;;
        --report) file=report.html ;;
        plots.py) file=table.md ;;
        random) if [ "$file" = linear.pt ]; then out=$out/random; else file=map-random.npz; fi ;;
        --out) out=$2 ;;
        tools/ablate.py) exit 0 ;;
        tools/make_shapes.py) file=$(basename $2); out=$(dirname $2) ;;
    esac
    shift
done
mkdir -p "$out"
echo "$file" > "$out/$file"
if [ -f slow ]; then sleep 60; fi
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what make needs, with empty scripts"""
    for name in ("Makefile", "experiments.mk", "requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tools").mkdir()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")):
        (tmp_path / path.relative_to(ROOT)).touch()
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


@pytest.fixture
def make(tree):
    """make(*arguments) -> the ended process; PYTHON is the fake one unless told otherwise"""
    own = "MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES PYTHON DATA RECIPE EPOCHS SEED SEEDS".split()
    own += "ARGS EVAL METHOD NAME VENV SCALE".split()

    def run(*argv, python="./python", **more):
        environment = {key: value for key, value in os.environ.items() if key not in own} | more
        argv = ["make", *argv, *([f"PYTHON={python}"] if python else [])]
        return subprocess.run(argv, cwd=tree, capture_output=True, text=True, env=environment)

    return run


@pytest.fixture
def calls(tree, make):
    """calls(*arguments): what a make that goes well asks of python, line by line"""

    def run(*argv):
        (tree / "calls").write_text("")
        process = make(*argv)
        assert process.returncode == 0, process.stderr
        return (tree / "calls").read_text().splitlines()

    return run


def planned(process):
    """The commands that make -n shows"""
    assert process.returncode == 0, process.stderr
    return [line for line in process.stdout.splitlines() if line.startswith("./python ")]


def age(path, seconds):
    """Date a file so many seconds back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


def age_all(tree):
    """Date everything back, each file by as much as the others"""
    for path in [*tree.rglob("*")]:
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns - 10**11, stat.st_mtime_ns - 10**11))


# help
def test_make_alone_lists_the_targets(make):
    text = make().stdout
    for target in "help demo cifar-moco figures test check sync clean distclean".split():
        assert re.search(rf"^  make {target} +\S", text, re.MULTILINE), target


def test_every_target_of_the_list_exists(make):
    for target in re.findall(r"^  make (\S+)", make().stdout, re.MULTILINE):
        assert make("-n", target).returncode == 0, target


def test_the_list_needs_no_python(make):
    assert make(python=None).returncode == 0


# the chain
def test_the_chain_is_in_order(make):
    lines = planned(make("-n", *CHAIN, "ARGS=--lr 0.1"))
    scripts = [line.split()[1] for line in lines]
    assert scripts[0] == "moco_cifar.py" and scripts[-1] == "plots.py"
    assert sorted(scripts[1:-1]) == ["knn_monitor.py"] * 3 + ["linear_eval.py"] * 2


def test_the_parameters_reach_pretraining_and_stand_in_the_path(make):
    first, *others = planned(make("-n", *CHAIN, "ARGS=--lr 0.1 --symmetric"))
    flags = shlex.split(first)[2:]
    run = f"{RUN}-lr-0.1-symmetric"
    assert flags == (
        f"--data images --epochs 3 --seed 1 --out runs/{run} --lr 0.1 --symmetric".split()
    )
    assert all(f"runs/{run}" in line for line in others)
    assert f"--out figures/{run} --table figures/{run}/table.md" in others[-1]


def test_all_of_the_baselines_are_measured(make):
    lines = planned(make("-n", *CHAIN))
    for end in ("--init random --seed 1", "--baseline pixels", "--baseline random --seed 1"):
        assert sum(line.rstrip().endswith(f"runs/{RUN} {end}") for line in lines) == 1, end


def test_the_defaults(make):
    lines = planned(make("-n", "cifar-moco"))
    assert "--data 'cifar10' --epochs 200 --seed 0 --out runs/cifar-moco-200ep-seed0" in lines[0]


OTHER = ["EPOCHS=4", "SEED=2", "DATA=others", "ARGS=--lr 1", "ARGS=--lr 10", "DATA=cifar100"]
OTHER += ["DATA=cifar10", "DATA=images/cifar10", "ARGS=--symmetric", "ARGS=--no-symmetric"]


def folder_of(make, *settings):
    return re.search(r"--out (\S+)", planned(make("-n", *CHAIN, *settings))[0])[1]


def test_other_settings_have_another_folder(make):
    folders = [folder_of(make, setting) for setting in ["SEED=1", *OTHER]]
    assert len(set(folders)) == len(folders), folders


@pytest.mark.parametrize("data", ["my images", "/abs/images", "../images", "a.npz"])
def test_any_name_of_data_makes_a_plain_folder(make, data):
    first = planned(make("-n", *CHAIN, f"DATA={data}"))[0]
    assert re.search(r"--out runs/cifar-moco-3ep-seed1-[A-Za-z0-9._-]+ ?$", first)
    assert shlex.split(first)[2:4] == ["--data", data]


@pytest.mark.parametrize("data", ["é", "数据"])
def test_a_name_of_other_letters_has_a_folder_of_its_own(make, data):
    assert folder_of(make, f"DATA={data}") != folder_of(make, "DATA=cifar10")


def test_the_seed_and_the_data_do_not_run_together(make):
    folders = [folder_of(make, "SEED=1", "DATA=0"), folder_of(make, "SEED=10", "DATA=cifar10")]
    assert folders[0] != folders[1]


def test_the_same_settings_have_the_same_folder_with_a_venv(make):
    text = make("-n", *CHAIN, python=None).stdout
    flags = f"--data 'images' --epochs 3 --seed 1 --out runs/{RUN}"
    assert f".venv/bin/python moco_cifar.py {flags}" in text


def test_without_python_the_venv_comes_first(make):
    text = make("-n", *CHAIN, python=None).stdout
    assert text.index("-m venv .venv") < text.index("pip install") < text.index("moco_cifar.py")


def test_the_chain_runs(tree, calls):
    scripts = [line.split()[0] for line in calls(*CHAIN)]
    assert len(scripts) == 7 and scripts[0] == "moco_cifar.py" and scripts[-1] == "plots.py"
    assert (tree / "figures" / RUN / "table.md").exists()


def test_a_finished_chain_is_not_run_again(calls):
    calls(*CHAIN)
    assert calls(*CHAIN) == []


def test_a_changed_script_does_not_run_anything_again(tree, calls):
    calls(*CHAIN)
    age_all(tree)
    for path in (*tree.glob("*.py"), *tree.glob("tools/*.py"), tree / "requirements.txt"):
        path.touch()
    assert calls(*CHAIN) == []


def test_stand_ins_of_a_finished_run_are_enough(tree, make):
    run = tree / "runs" / RUN
    age(run / "pretrain.pt", 100)
    for path in (run / "linear.pt", run / "random/linear.pt", run / "map-random.npz"):
        age(path, 50)
    age(tree / "figures" / RUN / "table.md", 20)
    assert planned(make("-n", *CHAIN)) == []


def test_a_newer_pretraining_is_evaluated_again(tree, calls):
    calls(*CHAIN)
    age_all(tree)
    (tree / "runs" / RUN / "pretrain.pt").touch()
    scripts = sorted(line.split()[0] for line in calls(*CHAIN))
    assert scripts == ["knn_monitor.py"] * 3 + ["linear_eval.py"] * 2 + ["plots.py"]


def test_a_newer_probe_makes_new_figures_only(tree, calls):
    calls(*CHAIN)
    age_all(tree)
    (tree / "runs" / RUN / "linear.pt").touch()
    assert [line.split()[0] for line in calls(*CHAIN)] == ["plots.py"]


@pytest.mark.parametrize("script", ["moco_cifar.py", "linear_eval.py", "knn_monitor.py"])
def test_a_broken_chain_goes_on_where_it_stopped(tree, make, calls, script):
    (tree / "fail").write_text(script)
    assert make(*CHAIN).returncode == 2
    done = (tree / "calls").read_text().splitlines()
    assert done[-1].startswith(script) and "plots.py" not in " ".join(done)
    (tree / "fail").unlink()
    rest = calls(*CHAIN)
    assert rest[-1].startswith("plots.py") and rest[0].startswith(script)
    assert not {*done[:-1]} & {*rest} or script == "knn_monitor.py"  # whose target is one file


def test_a_measurement_that_is_missing_is_made_up_for(tree, calls):
    """After a kill in the middle of the three, or if one had been made by hand before"""
    calls(*CHAIN)
    age_all(tree)
    (tree / "runs" / RUN / "map-random.npz").unlink()
    (tree / "figures" / RUN / "table.md").unlink()
    assert [line.split()[0] for line in calls(*CHAIN)] == ["knn_monitor.py"] * 3 + ["plots.py"]


@pytest.mark.parametrize("target", ["cifar-simclr", "demo", "race", "report-moco"])
def test_a_signal_after_training_does_not_cost_the_checkpoint(tree, target):
    """make deletes the file of a rule that a signal stops, unless it is told not to."""
    (tree / "slow").touch()
    age(tree / "data/shapes.npz", 10)
    argv, how = ["make", target, "PYTHON=./python"], dict(cwd=tree, stderr=subprocess.PIPE)
    with subprocess.Popen(argv, start_new_session=True, **how) as process:
        while not (found := [*tree.glob("runs/*/pretrain.pt")]):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode and found[0].exists()


def test_a_name_in_the_environment_is_not_a_runs(make):
    """WSL sets it to the machine's."""
    lines = planned(make("-n", *CHAIN, NAME="TOWER"))
    assert f"--out runs/{RUN} " in lines[0] + " "


@pytest.mark.parametrize("target", [CHAIN, ["demo"]])
def test_two_jobs_do_the_same_work(tree, make, calls, target):
    assert sorted(planned(make("-n", "-j2", *target))) == sorted(planned(make("-n", *target)))
    lines = calls("-j2", *target)
    scripts = [line.split()[0] for line in lines]
    assert len(set(lines)) == len(lines) and scripts[-1] == "plots.py"
    assert scripts.index("moco_cifar.py") < min(map(scripts.index, scripts[-6:]))


def test_a_run_goes_on_under_the_folder_of_the_run(make):
    """The target is what is written last, never the state of a run under way."""
    for name in ("Makefile", "experiments.mk"):
        assert "last.pt" not in (ROOT / name).read_text()


# the other methods, and the documents' experiments
SCRIPT = {"moco": "moco_cifar.py", "simclr": "simclr.py", "fast-moco": "fast_moco.py"}


@pytest.mark.parametrize("method", SCRIPT)
def test_every_method_has_its_chain_and_its_demo(make, method):
    for target, run in (
        [[f"cifar-{method}", "EPOCHS=3"], f"cifar-{method}-3ep-seed0"],
        [["demo", f"METHOD={method}"], f"demo-{method}-seed0"],
    ):
        lines = planned(make("-n", *target))
        (pretrain,) = (line for line in lines if f" {SCRIPT[method]} " in line)
        assert f"--out runs/{run} " in pretrain + " "
        assert lines[-1].startswith(f"./python plots.py runs/{run} ")


def test_the_report_on_simclr_has_all_of_table_1(make):
    lines = planned(make("-n", "report-simclr", "EPOCHS=10", "ARGS=--arch resnet8"))
    run = "report-simclr-10ep-seed0-arch-resnet8"
    assert "simclr.py --recipe report " in lines[0] and "--keep-every 2 " in lines[0]
    evaluations = {line.split(f"runs/{run} ")[1].rstrip() for line in lines if "linear_" in line}
    how = "--recipe simclr-report --mode"
    assert evaluations == {
        f"{how} probe --seed 0",
        f"{how} finetune --seed 0",
        f"{how} probe --init random --seed 0",
        f"{how} supervised --seed 0",
        f"{how} supervised --labels 1 --seed 0",
    }
    assert lines[-1] == f"./python plots.py runs/{run} --out figures/{run} --report"


def test_the_report_on_moco_uses_its_recipes_and_epochs(make):
    lines = planned(make("-n", "report-moco"))
    assert "--recipe report --data 'cifar10' --epochs 100 " in lines[0]
    probes = [line for line in lines if "linear_eval.py" in line]
    assert len(probes) == 2 and all("--recipe report" in line for line in probes)


@pytest.mark.parametrize("recipe, name", [("fast-moco", "linear"), ("semi-1", "semi-1")])
def test_fast_mocos_own_evaluations(make, recipe, name):
    run = "runs/cifar-fast-moco-200ep-seed0"
    last = planned(make("-n", f"fast-moco-{name}"))[-1]
    assert (
        last.rstrip()
        == f"./python linear_eval.py {run} --recipe {recipe} --out {run}/{recipe} --seed 0"
    )


def test_two_of_them_at_once_are_both_made(calls):
    lines = calls("fast-moco-semi-1", "fast-moco-semi-10")
    assert sum("--recipe semi-1 " in line for line in lines) == 1
    assert sum("--recipe semi-10 " in line for line in lines) == 1


def test_an_ablation_is_one_call_of_its_tool(make):
    def options(*settings):
        (line,) = planned(make("-n", *settings))
        return shlex.split(line)[2:]

    # an empty DATA, EPOCHS or ARGS leaves what --scale brings
    default = ["temperature", "--scale", "shapes", "--seeds", "0", "--args="]
    assert options("ablate-temperature") == default
    given = ["SCALE=cpu", "SEEDS=0 1", "DATA=my images", "EPOCHS=2", "ARGS=--width 4 --lr 1"]
    expected = "stage --scale cpu --seeds 0 1 --data".split() + ["my images", "--epochs", "2"]
    assert options("ablate-stage", *given) == [*expected, "--args=--width 4 --lr 1"]


def test_a_recipe_brings_its_own_epochs_and_has_its_own_folder(make):
    first = planned(make("-n", "cifar-moco", "RECIPE=v2"))[0]
    assert "--epochs" not in first and "--recipe v2" in first
    assert "--out runs/cifar-moco-v2-seed0 " in first
    assert folder_of(make, "RECIPE=v2") not in (folder_of(make), folder_of(make, "NAME=v2"))


# demo and figures
def test_the_demo_draws_its_data_first(calls):
    lines = calls("demo")
    assert lines[0] == "tools/make_shapes.py data/shapes.npz"
    assert lines[1].startswith("moco_cifar.py --data data/shapes.npz ")
    assert lines[-1].startswith("plots.py runs/demo-moco-seed0 ")
    assert calls("demo") == []


def test_the_demo_takes_a_seed(calls):
    assert any("--seed 7 --out runs/demo-moco-seed7" in line for line in calls("demo", "SEED=7"))


def test_figures_are_of_all_finished_runs(tree, calls):
    for name in ("a", "b"):
        age(tree / "runs" / name / "pretrain.pt", 10)
    age(tree / "runs" / "c" / "last.pt", 10)
    drawn = [line.split()[1] for line in calls("figures") if line.startswith("plots.py")]
    assert sorted(drawn) == ["runs/a", "runs/b"]


# what is removed
@pytest.mark.parametrize("target", ["clean", "distclean"])
def test_cleaning_leaves_the_runs(tree, make, target):
    age(tree / "runs" / RUN / "pretrain.pt", 10)
    age(tree / "figures" / RUN / "table.md", 10)
    assert "runs" not in make("-n", target).stdout
    assert make(target).returncode == 0
    assert (tree / "runs" / RUN / "pretrain.pt").exists() and not (tree / "figures").exists()


def test_clean_leaves_the_data(tree, make):
    age(tree / "data" / "shapes.npz", 10)
    assert make("clean").returncode == 0 and (tree / "data" / "shapes.npz").exists()


# errors
def test_an_error_of_a_script_comes_through(tree, make):
    """With the real script: exit code 2, one line of its own, and nothing half-made is left."""
    shutil.copy(ROOT / "moco_cifar.py", tree)
    before = sorted(tree.iterdir())
    process = make("cifar-moco", "DATA=/nonexistent", python=sys.executable)
    lines = process.stderr.splitlines()
    assert process.returncode == 2
    assert [line for line in lines if line.startswith("error:")] == lines[:1]
    assert "--data /nonexistent" in lines[0] and "Traceback" not in process.stderr
    assert [path for path in sorted(tree.iterdir()) if path.name != "__pycache__"] == before


# what README.md shows
README = ROOT / "README.md"


def shown(pattern):
    """The lines in README.md's blocks of code that begin so, without comment and prompt"""
    text = README.read_text() if README.exists() else ""
    lines = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.sub(r"\\\n\s*", "", lines).splitlines()
    lines = [re.sub(r"\s+#.*", "", line.strip().removeprefix("$ ").lstrip("!%")) for line in lines]
    return sorted({line for line in lines if re.match(pattern, line)}) or ["no README.md yet"]


@pytest.mark.parametrize("line", shown(r"make\b"))
def test_make_command_of_the_readme(make, tree, line):
    if not README.exists():
        pytest.skip("README.md does not exist yet")
    process = make("-n", *shlex.split(line)[1:])
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("line", shown(r"(python3?|torchrun)\b.*\.py\b"))
def test_python_command_of_the_readme(line):
    if not README.exists():
        pytest.skip("README.md does not exist yet")
    words = shlex.split(line)
    place = [word.endswith(".py") for word in words].index(True)
    script, flags = ROOT / words[place], words[place + 1 :]
    assert script.exists()
    if script.parent == ROOT and "--help" not in flags:
        module = importlib.import_module(script.stem)
        parse = getattr(module, "parse_config", None) or module.parse_flags
        parse(flags)
