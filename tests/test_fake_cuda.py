"""What the scripts do on a GPU, found out without one (tools/fake_cuda.py). In no step of any
variant is there an operand on another device, a copy from the host, or a wait for the GPU.
"""

import contextlib
import functools
import shlex
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT
from test_run import LONG

sys.path.insert(0, str(ROOT / "tools"))
import fake_cuda

import fast_moco
import knn_monitor
import linear_eval
import moco_cifar
import simclr

SMALL = "--arch resnet8 --width 8 --image-size 16 --batch-size 64 --epochs 1 --knn-k 9"
FAST = "--head-hidden 32 --dim 16 --predictor-hidden 8"
VARIANTS = {
    moco_cifar: ["", "--bn-splits 1", "--symmetric --head mlp --blur 0.5"],
    simclr: ["", "--optimizer adam", "--optimizer lars"],
    fast_moco: [
        *("", "--encode sample", "--encode montage", "--encode whole --framework byol"),
        *("--combine-at stage2", "--combine-at proj --framework simsiam --clip 0"),
        *("--recipe adamw", "--framework nnclr --queue-size 100"),
    ],
}
MORE = {  # with LONG_TESTS=1
    moco_cifar: [
        *("--recipe v1", "--recipe v2", "--symmetric --bn-splits 1 --queue-size 50"),
        *("--mechanism memory-bank", "--mechanism end-to-end"),
    ],
    simclr: [
        "--augment crop,blur --head linear",
        "--recipe paper --batch-size 64 --blur 0.5 --warmup-epochs 0",
    ],
    fast_moco: [
        *("--encode divide", "--encode sample-combine", "--encode whole", "--clip 0"),
        *(f"--combine-at {stage}" for stage in "input stage1 stage3 pred".split()),
        *(
            "--full-crops 3 --small-crops 2",
            "--grid 4",
            "--recipe paper",
            "--recipe adamw --clip 0",
        ),
        *("--framework byol", "--framework simsiam", "--encode whole --framework nnclr"),
    ],
}
# GradScaler looks at the gradients once a step, but for torch's fused optimizers
LOOKS_AT_FP16 = ["--optimizer lars", "--recipe paper --batch-size 64 --blur 0.5 --warmup-epochs 0"]


@pytest.fixture(autouse=True, scope="module")
def can_pretend():
    try:
        with fake_cuda.FakeCuda():
            pass
    except fake_cuda.Unsupported as error:
        pytest.skip(str(error))


def data(n, n_test=30):
    """What load_data() returns, for images of 16x16"""
    about = dict(name="none", file="none", sha256="", classes=list("0123456789"), image_size=16)
    about |= dict(n_train=n, n_test=n_test, holdout=0, mean=[0.5] * 3, std=[0.2] * 3)
    parts = dict(about=about)
    for part, size in (("train", n), ("test", n_test)):
        parts[f"x_{part}"] = torch.zeros(size, 3, 16, 16, dtype=torch.uint8)
        parts[f"y_{part}"] = torch.zeros(size, dtype=torch.long)
    return SimpleNamespace(**parts)


def run_training(script, flags, out, whole=False):
    """Two steps of the script's own train() -> where they waited. whole: k-NN and saves, too."""
    flags = f"--device cuda {SMALL} {FAST if script is fast_moco else ''} {flags} --out '{out}'"
    config, patches = script.parse_config(shlex.split(flags)), contextlib.ExitStack()
    with patches, fake_cuda.FakeCuda() as gpu:
        gpu.watching(False)

        class Watched(script.Run):
            def batches(self):
                for batch in super().batches():
                    gpu.watching(True)
                    yield batch

            def finish_epoch(self, epoch):  # what is behind it, may wait
                gpu.watching(False)
                assert self.step == 2
                if whole:
                    super().finish_epoch(epoch)

            def save(self, name):
                if whole:
                    super().save(name)

        images, some = data(2 * config.batch_size + 5), lambda y, n, flag: (torch.arange(n), None)
        for name, value in (("load_data", lambda *_: images), ("stratified", some)):
            patches.enter_context(mock.patch.object(script, name, value))
        write = lambda checkpoint, file: file.write(b"there are no values")
        patches.enter_context(mock.patch.object(torch, "save", write))
        script.train(config, Watched(config))
    return gpu.waits


def cases(variants, *precisions):
    return [
        pytest.param(script, flags, precision, id=f"{script.METHOD} {precision} {flags}")
        for script in variants
        for flags in variants[script]
        for precision in precisions
    ]


def check_no_step_waits(script, flags, precision, tmp_path):
    waits = run_training(script, f"{flags} --precision {precision}", tmp_path)
    if script is simclr and flags in LOOKS_AT_FP16 and precision == "fp16":
        assert len(waits) == 2 and all(wait.startswith("a value is read") for wait in waits)
    else:
        assert not waits


@pytest.mark.parametrize("script, flags, precision", cases(VARIANTS, "bf16", "fp16"))
def test_no_step_waits(script, flags, precision, tmp_path):
    check_no_step_waits(script, flags, precision, tmp_path)


@pytest.mark.skipif(not LONG, reason="LONG_TESTS=1 runs these variants too")
@pytest.mark.parametrize("script, flags, precision", cases(MORE, "bf16", "fp16"))
def test_no_step_of_the_other_variants_waits(script, flags, precision, tmp_path):
    check_no_step_waits(script, flags, precision, tmp_path)


@pytest.mark.parametrize("script", VARIANTS)
def test_a_whole_run_mixes_no_devices(script, tmp_path):
    """With k-NN, gallery and checkpoints"""
    assert not run_training(script, "--precision fp16", tmp_path, whole=True)
    assert (tmp_path / "pretrain.pt").exists()


PROBES = ["", "--augment", "--lr 0.3", "--optimizer adam --lr 0.1", "--optimizer lars --lr 1"]
TUNED = ["--mode finetune", "--recipe simclr-report --mode supervised"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("flags", PROBES + TUNED)
def test_no_step_of_the_probe_waits(flags, precision):
    """An epoch of two steps waits as often as one of four, also if fp16 scales the gradients."""
    flags_of_all = f"x --device cuda {flags} --epochs 1 --batch-size 64 --precision {precision}"
    config = linear_eval.parse_config(shlex.split(flags_of_all))
    config.mean, config.std, config.image_size = [0.5] * 3, [0.2] * 3, 16
    counts, scaled = [], flags in TUNED and precision == "fp16"
    for n in (128, 256):
        with fake_cuda.FakeCuda() as gpu:
            device, dtype = linear_eval.start_device(config)
            autocast = functools.partial(torch.autocast, "cuda", dtype)
            encoder = linear_eval.build_encoder("resnet8", 8).to(device).requires_grad_(False)
            scaler = torch.amp.GradScaler("cuda", enabled=scaled)
            images = linear_eval.prepare(encoder, data(n), config, autocast)
            images.held, images.rest = torch.arange(n, device="cuda").split([8, n - 8])
            linear_eval.train_linear(encoder, images, config, autocast, scaler)
            counts.append(len(gpu.waits))
            if len(config.lr) > 1:
                linear_eval.choose_lr(encoder, images, config, autocast, scaler)
    assert counts[1] == counts[0]


def test_no_vote_waits():
    with fake_cuda.FakeCuda() as gpu:
        images, device = data(100), torch.device("cuda")
        encoder = knn_monitor.build_encoder("resnet8", 8).to(device).eval()
        sets = images.x_train.to(device), images.x_test.to(device)
        labels, how = images.y_train.to(device), (images.about, device, torch.float16)
        before = len(gpu.waits)
        bank, h = (knn_monitor.embed(encoder, x, *how, batch=10) for x in sets)
        assert len(gpu.waits) == before + 4  # mean and std, twice
        knn_monitor.knn_predict(h, bank, labels, 10, k=9, temperature=0.1)
        assert len(gpu.waits) == before + 4
        with mock.patch.object(knn_monitor, "choose_images", lambda y, n: torch.arange(6)):
            knn_monitor.find_neighbours(h, bank, images)
            knn_monitor.map_features(h, images.y_test)


# -- the pretence itself

WAITING = {
    "item": lambda x, cpu: x.sum().item(),
    "bool": lambda x, cpu: bool(x.isfinite().all()),
    "float": lambda x, cpu: float(x[0]),
    "to the host": lambda x, cpu: x.cpu(),
    "from the host": lambda x, cpu: cpu.to("cuda"),
    "copied into": lambda x, cpu: x.copy_(cpu),
    "a list on the device": lambda x, cpu: torch.tensor([1, 2], device="cuda"),
    "a list as an index": lambda x, cpu: x[[0, 2]],
    "assigned by a list": lambda x, cpu: x.__setitem__([0, 2], 1.0),
    "an index of the host": lambda x, cpu: x[torch.arange(2)],
    "a number of the host": lambda x, cpu: x * torch.ones(()),
}
REFUSED = {
    "sum of two devices": lambda x, cpu: x + cpu,
    "nonzero": lambda x, cpu: x.nonzero(),
    "a mask as an index": lambda x, cpu: x[x > 0],
    "masked_select": lambda x, cpu: x.masked_select(x > 0),
    "unique": lambda x, cpu: x.unique(),
    "equal": lambda x, cpu: x.equal(x),
    "a layer on the host": lambda x, cpu: torch.nn.Linear(4, 4)(x),
}
FREE = {
    "arithmetic": lambda x, cpu: (2 * x + 1).clamp(0, 1).sum(),
    "index on the device": lambda x, cpu: x[torch.arange(2, device="cuda")],
    "where": lambda x, cpu: torch.where(x > 0, x, 1.0),
    "sort": lambda x, cpu: x.argsort() + x.topk(2).indices.sum(),
    "randperm": lambda x, cpu: torch.randperm(4, device="cuda"),
}


@pytest.mark.parametrize("what", [*WAITING, *REFUSED, *FREE])
def test_it_notices(what):
    with fake_cuda.FakeCuda() as gpu:
        x, cpu = torch.ones(4, device="cuda"), torch.ones(4)
        if what in REFUSED:
            with pytest.raises(RuntimeError, match="device|aten"):
                REFUSED[what](x, cpu)
        else:
            (WAITING | FREE)[what](x, cpu)
            assert bool(gpu.waits) == (what in WAITING), gpu.waits


def test_its_gradients_are_those_of_the_engine():
    """On real tensors"""
    how = dict(arch="resnet8", width=8, head_hidden=32, dim=16)
    sizes = how | dict(batch_size=16, predictor_hidden=8)
    models = [fast_moco.FastMoCo(fast_moco.Config(**sizes, combine_at="stage2"))]
    norm = lambda channels: moco_cifar.SplitBatchNorm(channels, 4)
    models += [moco_cifar.build_encoder("resnet8", 8, norm)]
    for model in models:
        views, grads = torch.randn(2, 16, 3, 16, 16), []
        for backward in (torch.Tensor.backward, fake_cuda.backward):
            model.zero_grad()
            output = model(views) if model is models[0] else model(views[0])
            backward(output[0] if model is models[0] else output.square().mean())
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(grads[0]) == len(grads[1]) > 20
        torch.testing.assert_close(*grads)
