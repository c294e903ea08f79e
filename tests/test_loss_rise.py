"""docs/loss.md stands on results/loss-rise.json, and tools/loss_rise.py looks at the right keys."""

import sys
from pathlib import Path

import pytest
import torch

import moco_cifar

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import loss_rise  # noqa: E402

import results  # noqa: E402


def test_the_page_is_made_from_the_results():
    """If not: run tools/loss_rise.py --draw."""
    text = (ROOT / "docs/loss.md").read_text()
    assert loss_rise.rebuild(text, loss_rise.published()) == text
    assert results.mark_in(ROOT / "docs/loss-rise.png") == loss_rise.fingerprint()


@pytest.fixture
def watched(tiny_npz, tmp_path):
    """watched(flag...) -> a finished run of 4 epochs of 7 steps, with 5 steps in its queue"""

    def call(*flags, freeze_after=9):
        text = f"--data {tiny_npz} --image-size 16 --arch resnet8 --width 4 --batch-size 16 --dim 8"
        text += " --bn-splits 1 --queue-size 80 --knn-k 5 --knn-every 0 --epochs 4"
        text += f" --keep-every 1 --precision fp32 --out {tmp_path}"
        config = moco_cifar.parse_config([*text.split(), *flags])
        run = loss_rise.Watched(config)
        run.freeze_after = freeze_after
        moco_cifar.train(config, run)
        run.ends.close()
        return run

    return call


def test_keys_of_an_encoder_that_stands_still_are_as_good_as_fresh_ones(watched, monkeypatch):
    """Without random views and without learning the two are the same keys, in the same order."""
    plain = lambda images, config: moco_cifar.normalise(images / 255, config)
    for module in (moco_cifar, loss_rise):
        monkeypatch.setattr(module, "augment", plain)
    (look,) = watched("--lr", "0", "--key-momentum", "1").looks
    assert look["epoch"] == 4 and len(look["along_stored"]) == 5
    assert look["along_stored"] == pytest.approx(look["along_fresh"], abs=1e-5)
    assert look["loss_stored"] == pytest.approx(look["loss_fresh"], abs=1e-4)
    assert 0.3 < look["own_keys"] < 0.9  # 80 keys of 120 images
    assert look["loss_without_own"] < look["loss_stored"] - 0.01  # own keys are as near as the key


def test_a_frozen_query_encoder_stays_as_it_is(watched, tmp_path):
    watched(freeze_after=2)
    names = "epoch0001.pt", "epoch0002.pt", "pretrain.pt"
    one, two, last = (torch.load(tmp_path / name)["encoder"] for name in names)
    weights = [name for name in last if name.endswith("weight")]
    assert not any(torch.equal(one[name], two[name]) for name in weights)
    assert all(torch.equal(two[name], last[name]) for name in weights)
