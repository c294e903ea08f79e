"""A checkpoint of any method goes through every mode, with no flag that names the method."""

import pytest
import torch
from conftest import TINY

import fast_moco
import linear_eval
import simclr

ANY = [*TINY[:6], *"--knn-k 5 --image-size 16 --epochs 1 --precision fp32 --dim 6".split()]


@pytest.fixture(scope="module", params=["moco", "simclr", "fast-moco"])
def run(request, pretrained, tiny_npz, tmp_path_factory):
    """The folder of a finished run of each method, and its checkpoint"""
    out = pretrained
    if request.param != "moco":
        out = tmp_path_factory.mktemp("runs") / request.param
        script = {"simclr": simclr, "fast-moco": fast_moco}[request.param]
        flags = [*ANY, "--head-hidden", "8", "--data", str(tiny_npz), "--out", str(out)]
        assert script.main(flags) == 0
    return out, torch.load(out / "pretrain.pt", weights_only=True)


@pytest.mark.parametrize("mode", ["probe", "finetune", "supervised"])
def test_every_mode_takes_the_checkpoint(run, mode, tmp_path):
    """Frozen means frozen: only a probe leaves each tensor of the encoder as it was."""
    folder, before = run
    flags = f"--mode {mode} --epochs 1 --labels 0.5 --precision fp32 --device cpu --batch-size 30"
    assert linear_eval.main([str(folder), *flags.split(), "--out", str(tmp_path)]) == 0
    after = torch.load(tmp_path / "linear.pt", weights_only=True)
    same = [
        torch.equal(before["encoder"][name], after["encoder"][name]) for name in after["encoder"]
    ]
    assert all(same) if mode == "probe" else not any(same[:1])
    assert after["method"] == ("supervised" if mode == "supervised" else before["method"])
    assert after["result"]["n_labels"] == 60 and after["pretrain"]["method"] == before["method"]
