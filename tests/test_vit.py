"""--arch vit-tiny, a Vision Transformer as in MoCo v3: it is torchvision's, its patch projection
stays random while everything else learns, and every script takes it or says in a line why not.
"""

import copy
import dataclasses
import json

import pytest
import torch
from conftest import close
from kill_harness import digest
from test_fast_moco import ShortRun
from test_run import interrupt
from torch import nn
from torchvision.models import VisionTransformer

import fast_moco
import knn_monitor
import linear_eval
import moco_cifar
import plots
import simclr
from moco_cifar import build_encoder

COMMON = "--arch vit-tiny --width 4 --epochs 2 --batch-size 40 --knn-k 5 --dim 6 --head-hidden 8"
COMMON = f"{COMMON} --weight-decay 0.1 --save-seconds 0 --precision fp32 --device cpu".split()
MOCO = "--bn-splits 1 --queue-size 50".split()
WHOLE = "--encode whole --predictor-hidden 5".split()
RUNS = {  # every script with every optimizer
    "moco": (moco_cifar, MOCO),
    "simclr": (simclr, []),
    "simclr adam": (simclr, ["--optimizer", "adam"]),
    "simclr lars": (simclr, ["--optimizer", "lars", "--lr", "1"]),
    "fast_moco": (fast_moco, WHOLE),
    "fast_moco adamw": (fast_moco, [*WHOLE, "--optimizer", "adamw"]),
}
each_script = pytest.mark.parametrize("name", ["moco", "simclr", "fast_moco"])


# -- the encoder


def test_the_encoder_is_torchvisions_without_its_classifier():
    encoder, x = build_encoder("vit-tiny").eval(), torch.randn(2, 3, 32, 32)
    size = dict(num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768)
    twin = VisionTransformer(image_size=32, patch_size=4, **size).eval()
    missing, unexpected = twin.load_state_dict(encoder.state_dict(), strict=False)
    assert set(missing) == {"heads.head.weight", "heads.head.bias"} and not unexpected
    twin.heads = nn.Identity()
    with torch.no_grad():
        features = encoder(x)
        assert torch.equal(features, twin(x))
    assert features.shape == (2, 192) and encoder.dim == 192


def test_the_feature_is_the_class_token_behind_the_last_norm():
    encoder, tokens = build_encoder("vit-tiny", 4), []
    encoder.encoder.ln.register_forward_hook(lambda *args: tokens.append(args[2]))
    features = encoder(torch.randn(2, 3, 32, 32))
    assert tokens[0].shape == (2, 1 + 8 * 8, 12) and torch.equal(features, tokens[0][:, 0])


def test_width_is_that_of_a_head():
    encoder = build_encoder("vit-tiny", 5)
    assert encoder.dim == 15 and encoder(torch.randn(1, 3, 32, 32)).shape == (1, 15)
    heads = [m for m in encoder.modules() if isinstance(m, nn.MultiheadAttention)]
    assert [m.head_dim for m in heads] == [5] * 6


def test_only_the_patch_projection_is_frozen_and_random():
    encoder = build_encoder("vit-tiny")
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"conv_proj.weight", "conv_proj.bias"}
    assert encoder.conv_proj.weight.std() > 0.1 and not encoder.conv_proj.bias.any()


# -- training


@pytest.fixture(scope="module")
def trained(tiny_npz, tmp_path_factory):
    """trained(name) -> the folder of a run, its encoder before, and its model afterwards"""
    done = {}

    def run(name):
        if name not in done:
            (script, flags), seen = RUNS[name], []
            build, start = script.build_encoder, script.Run.start

            def watched_build(*args):
                encoder = build(*args)
                seen.append(copy.deepcopy(encoder))
                return encoder

            def watched_start(self, model, *args):
                seen.append(model)
                return start(self, model, *args)

            out = tmp_path_factory.mktemp("vit") / name.replace(" ", "-")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(script, "build_encoder", watched_build)
                patch.setattr(script.Run, "start", watched_start)
                where = ["--data", str(tiny_npz), "--out", str(out)]
                assert script.main([*COMMON, *flags, *where]) == 0
            done[name] = out, *seen
        return done[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_all_but_the_patch_projection_learns(trained, name):
    """Neither gradient nor weight decay changes it, whatever the optimizer."""
    out, before, _ = trained(name)
    before, after = before.state_dict(), torch.load(out / "pretrain.pt", weights_only=True)
    same = {key for key, value in after["encoder"].items() if torch.equal(value, before[key])}
    assert same == {"conv_proj.weight", "conv_proj.bias"} and len(before) > 70
    assert (after["arch"], after["width"], after["dim"]) == ("vit-tiny", 4, 12)
    assert 0 <= after["history"][-1]["knn_top1"] <= 1


@pytest.mark.parametrize("name, key", [("moco", "encoder_k"), ("fast_moco adamw", "target")])
def test_the_moving_average_has_the_same_projection_and_follows_with_the_rest(trained, name, key):
    _, before, model = trained(name)
    for value, start in zip(getattr(model, key)[0].parameters(), before.parameters()):
        assert torch.equal(value, start) == (not start.requires_grad)


def test_in_bfloat16_it_trains_too(tiny_npz, tmp_path):
    where = ["--data", str(tiny_npz), "--out", str(tmp_path), "--precision", "bf16"]
    assert fast_moco.main([*COMMON, *WHOLE, *where, "--optimizer", "adamw"]) == 0


@each_script
def test_an_interrupted_run_ends_bit_identical(trained, name, tiny_npz, tmp_path):
    script, flags = RUNS[name]
    flags = [*COMMON, *flags, "--data", str(tiny_npz)]
    interrupt(flags, tmp_path, step=4, script=script)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["train_state"]["step"] == 4
    assert script.main([*flags, "--out", str(tmp_path)]) == 0
    assert digest(tmp_path / "pretrain.pt") == digest(trained(name)[0] / "pretrain.pt")


def test_a_projection_that_is_not_restored_is_noticed(trained, tiny_npz, tmp_path):
    """The comparison of digests can fail."""
    script, flags = RUNS["moco"]
    flags = [*COMMON, *flags, "--data", str(tiny_npz)]
    interrupt(flags, tmp_path, step=4, script=script)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    saved["train_state"]["model"]["encoder_q.0.conv_proj.weight"] *= 1.01
    torch.save(saved, tmp_path / "last.pt")
    assert script.main([*flags, "--out", str(tmp_path)]) == 0
    assert digest(tmp_path / "pretrain.pt") != digest(trained("moco")[0] / "pretrain.pt")


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6: its tracing changes some bits")
def test_a_compiled_step_is_the_same_step(trained, tiny_npz, tmp_path, monkeypatch):
    """Traced as for torch.compile, but not translated, which would take minutes"""
    graphs, real = [], torch.compile

    def trace(function, **how):
        return real(function, **how, backend=lambda graph, _: graphs.append(graph) or graph)

    script, flags = RUNS["fast_moco adamw"]
    monkeypatch.setattr(torch, "compile", trace)
    torch.compiler.reset()
    where = ["--data", str(tiny_npz), "--out", str(tmp_path)]
    assert script.main([*COMMON, *flags, *where, "--compile"]) == 0
    eager, compiled = (trained("fast_moco adamw")[0], tmp_path)
    a, b = (torch.load(path / "pretrain.pt", weights_only=True) for path in (eager, compiled))
    assert len(graphs) >= 2  # model and augmentation
    for name, value in a["encoder"].items():
        close(b["encoder"][name], value, 1e-5)


class VitRun(ShortRun):
    def before_step(self, *_):
        """Keeps no gradients: those of frozen weights are None."""


def test_16_images_are_learned_by_heart_and_embeddings_do_not_collapse():
    """As in test_fast_moco.py: little augmentation, and a temperature at which the loss can be 0"""
    config = fast_moco.parse_config([*COMMON, *WHOLE, "--width", "8", "--batch-size", "16"])
    how = dict(epochs=1, optimizer="adamw", lr=3e-3, clip=0.0, warmup_epochs=0.0, key_momentum=0.8)
    how |= dict(head_hidden=32, dim=16, predictor_hidden=16, temperature=0.05, schedule="constant")
    how |= dict(crop_scale=(1.0, 1.0), flip=0.0, jitter=(0.1, 0.1, 0.1, 0.02), gray=0.0)
    config = dataclasses.replace(config, **how)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    fast_moco.train(config, run := VitRun(config, images, 40, torch.float32))
    assert sum(run.losses[-5:]) / 5 < 0.2 * run.losses[0], run.losses
    z = run.model.target_embed(fast_moco.augment(images, config))
    assert z.std(0).min() > 0.1 / 16**0.5


# -- what takes its checkpoint


@pytest.mark.parametrize("mode", ["probe", "finetune", "supervised"])
def test_linear_eval_takes_it(trained, tmp_path, mode):
    """In a probe nothing of it learns; in the other modes all does, the patch projection too."""
    folder, before = trained("moco")[0], torch.load(trained("moco")[0] / "pretrain.pt")["encoder"]
    flags = f"--mode {mode} --epochs 1 --precision fp32 --device cpu --out {tmp_path}"
    assert linear_eval.main([str(folder), *flags.split()]) == 0
    after = torch.load(tmp_path / "linear.pt", weights_only=True)
    same = [torch.equal(before[name], value) for name, value in after["encoder"].items()]
    assert all(same) if mode == "probe" else not any(same)
    assert after["classifier"]["weight"].shape == (10, 12) and after["arch"] == "vit-tiny"


def test_the_features_are_those_of_the_encoder(trained):
    checkpoint, encoder = linear_eval.load_encoder(trained("simclr")[0] / "pretrain.pt")
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    x = torch.rand(5, 3, 32, 32)
    twin = build_encoder("vit-tiny", 4)  # in training mode: attention is computed another way
    twin.load_state_dict(checkpoint["encoder"])
    close(encoder(x), twin(x), 1e-5)


@pytest.mark.parametrize("flags", ["", "--features head", "--baseline random"])
@each_script
def test_knn_monitor_takes_it(trained, tmp_path, capsys, name, flags):
    how = ["--k", "5", "--device", "cpu", "--out", str(tmp_path), *flags.split()]
    assert knn_monitor.main([str(trained(name)[0]), *how]) == 0, capsys.readouterr().err
    row = json.loads((tmp_path / "knn.jsonl").read_text().splitlines()[-1])
    assert row["n_test"] == 60 and 0 <= row["top1"] <= 1


@each_script
def test_figures_are_drawn(trained, tmp_path, capsys, name):
    assert plots.main([str(trained(name)[0]), "--out", str(tmp_path)]) == 0, capsys.readouterr()
    assert {"pretraining", "diagram", "pairs"} <= {path.stem for path in tmp_path.rglob("*.png")}


# -- what it is not for

NEEDS = "--arch vit-tiny needs --encode whole --image-size 32 --small-crops 0"
REFUSED = {
    "moco_cifar --bn-splits 2": "needs --image-size 32 --bn-splits 1: no batch norm",
    "moco_cifar --bn-splits 1 --image-size 16": "needs --image-size 32 --bn-splits 1",
    "simclr --image-size 16": "--image-size 16: --arch vit-tiny needs 32",
    "simclr --augment crop,blurr": "--augment blurr",
    "fast_moco": NEEDS,
    "fast_moco --encode divide": NEEDS,
    "fast_moco --encode sample": NEEDS,
    "fast_moco --encode sample-combine": NEEDS,
    "fast_moco --encode montage": NEEDS,
    "fast_moco --combine-at stage2": NEEDS,
    "fast_moco --encode whole --combine-at stage2": "--combine-at is for pairs of 2x2 patches",
    "fast_moco --encode whole --combine-at proj": "--combine-at is for pairs of 2x2 patches",
    "fast_moco --encode whole --small-crops 2": NEEDS,
    "fast_moco --encode whole --image-size 64": NEEDS,
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_it_is_not_for_is_refused(line, tiny_npz, tmp_path, refused):
    script, *flags = line.split()
    script = {"moco_cifar": moco_cifar, "simclr": simclr, "fast_moco": fast_moco}[script]
    where = ["--data", tiny_npz, "--out", tmp_path / "run"]
    refused(script.main, [*COMMON, *where, *flags], REFUSED[line])
    assert not (tmp_path / "run").exists()


def test_the_weights_of_a_resnet_are_refused(pretrained, tmp_path, refused):
    saved = torch.load(pretrained / "pretrain.pt", weights_only=True) | dict(arch="vit-tiny")
    torch.save(saved, tmp_path / "pretrain.pt")
    refused(linear_eval.main, [tmp_path], "its weights are not those of a vit-tiny of width 4")
    refused(knn_monitor.main, [tmp_path, "--k", "5"], "no backbone of a vit-tiny of width 4")
