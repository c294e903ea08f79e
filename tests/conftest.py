"""What several test files share: the path, the threads, a tiny data set, a pretrained run."""

import dataclasses
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs behind
torch.set_num_threads(1)  # for small tensors the fastest, whatever else the machine does

# the smallest network and the cheapest settings that every script takes
TINY = "--arch resnet8 --width 4 --batch-size 40 --bn-splits 2 --queue-size 50 --knn-k 5".split()


# what the default recipes of all three methods have (recipes.md)
USUAL = {
    "arch": "resnet18",
    "width": 64,
    "image_size": 32,
    "epochs": 200,
    "batch_size": 512,
    "sgd_momentum": 0.9,
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "knn_k": 200,
    "data": "cifar10",
    "limit": 0,
    "holdout": 0,
}


def check_recipe(script, recipe, expected):
    """The recipe's settings are those, of as many as are named."""
    config = dataclasses.asdict(script.parse_config(["--recipe", recipe]))
    assert {name: config[name] for name in expected} == expected


def write_npz(path, n_train=120, n_test=60, classes=10, size=16, seed=0):
    """Images of one colour a class under much noise, equally many of each class."""
    random = np.random.default_rng(seed)
    colours, arrays = random.integers(60, 196, (classes, 3)), {}
    for part, n in (("train", n_train), ("test", n_test)):
        labels = np.arange(n) % classes
        noise = random.normal(0, 40, (n, size, size, 3))
        images = (colours[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(path, **arrays)
    return path


def close(ours, theirs, tolerance):
    """Tensors of one type and shape, no element further off than tolerance"""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.fixture(autouse=True)
def undisturbed():
    """Each test draws the same numbers and is stopped by Ctrl-C, whichever tests ran before."""
    torch.manual_seed(0)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory):
    """120 training and 60 test images of 16x16, 10 classes"""
    return write_npz(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, tiny_npz):
    """The folder of a finished MoCo run of 2 epochs on these images. Read only: write elsewhere."""
    import moco_cifar

    out = tmp_path_factory.mktemp("runs") / "moco"
    where = ["--data", str(tiny_npz), "--image-size", "16", "--out", str(out)]
    assert moco_cifar.main([*TINY, *where, "--epochs", "2", "--precision", "fp32"]) == 0
    return out


@pytest.fixture
def refused(capsys):
    """refused(main, argv, says): the script ends with code 2 and one line that contains `says`."""

    def check(main, argv, says, code=2):
        capsys.readouterr()
        assert main([str(arg) for arg in argv]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert says in lines[0], lines
        return lines[0]

    return check


@pytest.fixture
def spy(monkeypatch):
    """spy(module, name) -> a list that gets (arguments, result) of each call of that function."""

    def watch(module, name):
        real, calls = getattr(module, name), []

        def wrapper(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append((args, result))
            return result

        monkeypatch.setattr(module, name, wrapper)
        return calls

    return watch
