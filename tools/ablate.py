"""Run one comparison of the papers: every setting with every seed, then one figure and one table.

    python tools/ablate.py temperature --seeds 0 1 2           # synthetic shapes, a minute per run
    python tools/ablate.py temperature --scale cpu             # all of CIFAR-10, a narrow ResNet-18
    python tools/ablate.py temperature --scale full --dry-run  # the paper's encoder, commands only

Each run is an ordinary command in a folder of its own. The same command resumes: finished runs are
not repeated, interrupted ones continue. A failed run is named, the others still run, exit code 1.
The names and what they stand for are in tools/ablations.py.
"""

import argparse
import fcntl
import importlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ablations import ABLATIONS, SCALES

ROOT = Path(__file__).parents[1]


def flags(settings):
    """{"bn_splits": 8, "shuffle": False} -> ["--bn-splits", "8", "--no-shuffle"]"""
    words = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def slug(*words):
    """A name for a folder, of whatever is not empty"""
    return re.sub(r"([^\w.]|_)+", "-", "-".join(map(str, filter(None, words)))).strip("-")


def plan(args):
    """-> {folder of a run: [(file, command that makes it), ...]}, command that draws the figure"""
    entry, given = ABLATIONS[args.name], dict(data=args.data, epochs=args.epochs)
    base = SCALES[args.scale] | SCALES.get(f"{args.scale} {entry['script']}", {})
    base |= entry["full"] if args.scale == "full" else {}
    base |= {name: value for name, value in given.items() if value}
    title, runs = slug("ablate", args.name, args.scale, *given.values(), args.args), {}
    for seed, setting in itertools.product(args.seeds, entry["grid"]):
        own = dict(setting)
        if "epochs" in own:
            own["epochs"] *= base["epochs"]
        run = Path("runs", title, slug(*(f"{k}-{v}" for k, v in own.items()), f"seed{seed}"))
        if "batch_size" in own:
            own["lr"] = base["lr"] * own["batch_size"] / base["batch_size"]
        own |= dict(seed=seed, out=run)
        common = {name: value for name, value in base.items() if name not in own}
        # what is compared comes last, so that --args cannot change it
        pretrain = [entry["script"], *flags(common), *shlex.split(args.args), *flags(own)]
        steps = [(run / "pretrain.pt", pretrain), (run / "knn.jsonl", ["knn_monitor.py", str(run)])]
        for share in entry["labels"]:
            few = {} if share == 1 else dict(labels=share)
            probe = ["linear_eval.py", str(run), *flags(few | dict(seed=seed))]
            steps.append((run / (f"probe-{share}" if few else "") / "linear.pt", probe))
        runs[run] = steps
    return runs, ["plots.py", *map(str, runs), "--ablation", args.name, "--out", f"figures/{title}"]


def published(title):
    """{name: settings} of the runs that are in results/, from this sitting or an earlier one"""
    file = ROOT / "results" / "comparisons" / f"{title.removeprefix('ablate-')}.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    return {run["name"]: run["config"] for run in runs}


def asks_for(pretrain, found):
    """Does this command ask for these settings? Files and folders don't count."""
    script = importlib.import_module(pretrain[0].removesuffix(".py"))
    config = json.loads(json.dumps(vars(script.parse_config(pretrain[1:]))))  # tuples become lists
    return all(config[key] == found[key] for key in config.keys() & found.keys() - {"data"})


def python(argv, **options):
    """Start one of the scripts."""
    return subprocess.Popen([sys.executable, str(ROOT / argv[0]), *argv[1:]], **options)


def execute(runs, jobs):
    """Make what is missing, `jobs` runs at a time -> {failed run: why}, the signals received"""
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count() // jobs or 1)}
    options = dict(env=environment if jobs > 1 else None, start_new_session=True)
    active, signals, failed, (first, *_) = {}, [], {}, runs

    def stop(number, frame):
        signals.append(number)
        for process in list(active.values()):  # other threads add to it
            process.terminate()  # it saves its state

    def reading():
        """Is the first run still alone? It reads the images first: a download is made only once."""
        alone = first not in active or active[first].poll() is None
        return alone and not any((run / "pretrain.jsonl").exists() for run in runs)

    def work(run):
        while run != first and not signals and reading():
            time.sleep(0.2)
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "output.log", "a+") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # also held by a script that outlived its ablate.py
            for file, argv in runs[run]:
                if file.exists() or signals or run in failed:
                    continue
                print(f"{run}: {argv[0]}", flush=True)
                active[run] = python(argv, stdout=log, stderr=log, **options)
                if signals:
                    active[run].terminate()
                if (code := active[run].wait()) and not signals:
                    last = (run / "output.log").read_text().strip().splitlines()[-1:]
                    failed[run] = f"{argv[0]} ended with {code}: {''.join(last)}"

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, runs))
    return failed, signals


def default_jobs():
    """On a GPU one run; on a CPU one per core, because narrow networks gain little from threads."""
    import torch

    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return 1 if gpu else os.cpu_count()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=ABLATIONS)
    parser.add_argument("--scale", choices=["shapes", "cpu", "full"], default="shapes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", help="other images than the scale's")
    parser.add_argument("--epochs", type=int, help="other than the scale's")
    parser.add_argument("--args", default="", help="more flags for pretraining: --args='--lr 0.1'")
    parser.add_argument("--jobs", type=int, help="runs at a time [one per core; 1 on a GPU]")
    parser.add_argument(
        "--missing", action="store_true", help="skip runs that are in results/ with these settings"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    args = parser.parse_args()
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: must be at least 1")
    runs, figure = plan(args)
    if args.missing:
        done = published(next(iter(runs)).parent.name)
        sys.path.insert(0, str(ROOT))
        runs = {
            run: steps
            for run, steps in runs.items()
            if run.name not in done or not asks_for(steps[0][1], done[run.name])
        }
        figure = ["tools/results.py", *map(str, runs), "--ablation", args.name]  # of all runs
    if not runs:
        print("every run is in results/ already")
        sys.exit()
    if args.dry_run:
        for argv in [*(argv for steps in runs.values() for _, argv in steps), figure]:
            print(shlex.join(["python", *argv]))
        sys.exit()
    shapes = Path(SCALES["shapes"]["data"])
    if args.scale == "shapes" and not args.data and not shapes.exists():
        python(["tools/make_shapes.py", str(shapes)]).wait()
    failed, signals = execute(runs, min(args.jobs or default_jobs(), len(runs)))
    for run, why in failed.items():
        print(f"failed: {run}: {why}", file=sys.stderr)
    if signals:
        print("stopped: the same command resumes", file=sys.stderr)
        sys.exit(128 + signals[0])
    figure = [word for word in figure if Path(word) not in failed]
    if args.missing:  # to publish is for the user to decide
        print("next:", shlex.join(["python", *figure]))
        sys.exit(bool(failed))
    sys.exit(python(figure).wait() or bool(failed))
