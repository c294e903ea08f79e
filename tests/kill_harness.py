"""Runs a script's main() in forked children and kills them: import torch once, crash often.

    python tests/kill_harness.py SCRIPT RUNS FOLDER -- FLAGS...

One thread, so that a fork is safe. Prints one JSON line: how many kills, how many runs ended equal.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def run(main, argv, kill_after=None):
    """main(argv) in a child -> its exit code, None if it was killed first"""
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        os._exit(main(argv))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None


def digest(path):
    """Of everything in a checkpoint that doesn't depend on the time or the state of git."""
    checkpoint, sha = torch.load(path, weights_only=True), hashlib.sha256()

    def add(key, value):
        if isinstance(value, dict):
            for name, item in value.items():
                add(f"{key}.{name}", item)
        elif isinstance(value, list):
            add(key, dict(enumerate(value)))
        elif isinstance(value, torch.Tensor):
            sha.update(key.encode() + value.contiguous().numpy().tobytes())
        elif key.split(".")[-1] not in ("seconds", "started", "commit", "out"):
            sha.update(f"{key}={value}".encode())

    add("", checkpoint)
    return sha.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    script, runs, folder, _, *flags = sys.argv[1:]
    main, result = importlib.import_module(script).main, {"kills": 0, "equal": 0, "other": []}
    out = Path(folder)
    start = time.monotonic()
    assert run(main, [*flags, "--out", str(out / "whole")]) == 0
    seconds, name = (
        time.monotonic() - start,
        "linear.pt" if script == "linear_eval" else "pretrain.pt",
    )
    wanted, rng = digest(out / "whole" / name), random.Random(0)
    for i in range(int(runs)):
        argv = [*flags, "--out", str(out / f"killed{i}")]
        kills, share = 0, 0.6
        while kills < 4 + i % 2:
            if run(main, argv, rng.uniform(0, share * seconds)) is None:
                kills += 1
            else:  # it was done before: the machine has become faster, so from the start and sooner
                shutil.rmtree(out / f"killed{i}")
                share *= 0.7
        result["kills"] += kills
        code = run(main, argv)
        same = code == 0 and digest(out / f"killed{i}" / name) == wanted
        result["equal"] += same
        if not same:
            result["other"].append(code)
    print(json.dumps(result))
