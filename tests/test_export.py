"""tools/export.py: other libraries load the exported weights and can train them."""

import importlib.util
import pickle
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image, ImageDraw
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import moco_cifar

spec = importlib.util.spec_from_file_location("export", ROOT / "tools/export.py")
export = importlib.util.module_from_spec(spec)
spec.loader.exec_module(export)


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def checkpoint(request, tmp_path_factory):
    """A file with an untrained encoder of full width, and its weights"""
    encoder = moco_cifar.build_encoder(request.param)
    for module in encoder.modules():  # statistics that are not those of a new model
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
    path = tmp_path_factory.mktemp("export") / "pretrain.pt"
    about = dict(format=moco_cifar.FORMAT, method="moco", epoch=3, epochs=3, config={}, data={})
    about |= dict(arch=request.param, width=64, dim=encoder.dim, encoder=encoder.state_dict())
    torch.save(about, path)
    return path, encoder.state_dict(), request.param


def small_stem(model):
    """A torchvision ResNet with the first convolution of the encoder"""
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def test_torchvision_takes_it_with_only_fc_missing(checkpoint, tmp_path):
    path, weights, arch = checkpoint
    assert export.main([str(path), str(tmp_path / "e.pth"), "--to", "torchvision"]) == 0
    model = small_stem(getattr(torchvision.models, arch)())
    exported = torch.load(tmp_path / "e.pth", weights_only=True)
    missing, unexpected = model.load_state_dict(exported, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_an_unchanged_torchvision_model_takes_the_padded_stem(checkpoint, tmp_path):
    path, weights, arch = checkpoint
    assert (
        export.main([str(path), str(tmp_path / "e.pth"), "--to", "torchvision", "--stem", "pad"])
        == 0
    )
    model = getattr(torchvision.models, arch)()
    model.load_state_dict(torch.load(tmp_path / "e.pth", weights_only=True), strict=False)
    image = torch.randn(1, 3, 12, 12)
    ours = nn.functional.conv2d(image, weights["conv1.weight"], padding=1)
    torch.testing.assert_close(model.conv1(image), ours[..., ::2, ::2])  # at each second pixel


# as detectron2's documentation and its own models have them (modeling/backbone/resnet.py)
DETECTRON2 = {
    "conv1.weight": "stem.conv1.weight",
    "bn1.running_var": "stem.conv1.norm.running_var",
    "layer1.0.conv1.weight": "res2.0.conv1.weight",
    "layer1.1.bn2.bias": "res2.1.conv2.norm.bias",
    "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
    "layer2.0.downsample.1.weight": "res3.0.shortcut.norm.weight",
    "layer3.1.bn1.running_mean": "res4.1.conv1.norm.running_mean",
    "layer4.1.conv2.weight": "res5.1.conv2.weight",
}


def test_detectron2_finds_its_own_names(checkpoint, tmp_path):
    path, weights, _ = checkpoint
    assert export.main([str(path), str(tmp_path / "e.pkl"), "--to", "detectron2"]) == 0
    exported = pickle.loads((tmp_path / "e.pkl").read_bytes())
    model = exported["model"]
    assert exported["matching_heuristics"] is True
    assert model["stem.conv1.weight"].shape == (64, 3, 7, 7)
    for ours, theirs in DETECTRON2.items():
        if theirs != "stem.conv1.weight":
            np.testing.assert_array_equal(model[theirs], weights[ours].numpy())
    kept = [name for name in weights if not name.endswith("num_batches_tracked")]
    assert len(model) == len(kept)
    assert {name.split(".")[0] for name in model} == {"stem", "res2", "res3", "res4", "res5"}


def draw_voc(root, n=2, size=64):
    """A folder as PASCAL VOC has it: n images of one rectangle each"""
    voc = root / "VOCdevkit/VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    for i in range(n):
        box = (8 + 4 * i, 12, 40 + 4 * i, 52)
        image = Image.new("RGB", (size, size), (40, 90, 60))
        ImageDraw.Draw(image).rectangle(box, fill=(220, 60, 40))
        image.save(voc / f"JPEGImages/{i}.jpg")
        note = ET.Element("annotation")
        ET.SubElement(thing := ET.SubElement(note, "object"), "name").text = "box"
        place = ET.SubElement(thing, "bndbox")
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), box):
            ET.SubElement(place, name).text = str(value)
        ET.ElementTree(note).write(voc / f"Annotations/{i}.xml")
    (voc / "ImageSets/Main/train.txt").write_text("\n".join(map(str, range(n))))
    return root


def test_faster_rcnn_learns_on_it(checkpoint, tmp_path):
    """B.4 in small: a detector around the exported backbone does a step, and its loss falls."""
    path, weights, arch = checkpoint
    if arch != "resnet18":
        pytest.skip("one architecture is enough for the step")
    assert export.main([str(path), str(tmp_path / "e.pth"), "--to", "torchvision"]) == 0
    body = small_stem(torchvision.models.resnet18())
    body.load_state_dict(torch.load(tmp_path / "e.pth", weights_only=True), strict=False)
    stages, channels = {f"layer{i}": str(i - 1) for i in range(1, 5)}, [64, 128, 256, 512]
    backbone = BackboneWithFPN(body, stages, channels, 32)
    assert torch.equal(backbone.body.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])
    detector = FasterRCNN(backbone, num_classes=2, min_size=64, max_size=64)

    data = torchvision.datasets.VOCDetection(draw_voc(tmp_path / "voc"), "2007", "train")
    images, targets = [], []
    for image, note in data:
        images.append(torchvision.transforms.functional.to_tensor(image))
        (thing,) = note["annotation"]["object"]
        place = [float(thing["bndbox"][name]) for name in ("xmin", "ymin", "xmax", "ymax")]
        targets.append({"boxes": torch.tensor([place]), "labels": torch.tensor([1])})
    optimizer, losses = torch.optim.SGD(detector.parameters(), lr=0.005), []
    for _ in range(3):
        torch.manual_seed(0)  # the proposals that are sampled
        losses.append(sum(detector(images, targets).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and losses[-1].isfinite()
    assert not torch.equal(backbone.body.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])


@pytest.fixture
def vit(tmp_path):
    """A file with an untrained vit-tiny, and its weights"""
    encoder = moco_cifar.build_encoder("vit-tiny")
    about = dict(format=moco_cifar.FORMAT, method="moco", epoch=3, epochs=3, config={}, data={})
    about |= dict(arch="vit-tiny", width=64, dim=encoder.dim, encoder=encoder.state_dict())
    torch.save(about, tmp_path / "vit.pt")
    return tmp_path / "vit.pt", encoder.state_dict()


def test_torchvisions_vit_takes_it_with_only_the_heads_missing(vit, tmp_path):
    path, weights = vit
    assert export.main([str(path), str(tmp_path / "e.pth"), "--to", "torchvision"]) == 0
    model = torchvision.models.VisionTransformer(32, 4, 6, 3, 192, 768)  # as the help says
    exported = torch.load(tmp_path / "e.pth", weights_only=True)
    missing, unexpected = model.load_state_dict(exported, strict=False)
    assert missing == ["heads.head.weight", "heads.head.bias"] and not unexpected
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize("flags", ["--to detectron2", "--to torchvision --stem pad"])
def test_a_vit_has_no_stem_to_pad_and_no_place_in_detectron2(vit, tmp_path, refused, flags):
    where = [vit[0], tmp_path / "e", *flags.split()]
    refused(export.main, where, "a vit-tiny goes --to torchvision, with --stem keep")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("shape", [dict(width=16), dict(arch="resnet8")])
def test_a_resnet_without_a_counterpart_is_refused(checkpoint, tmp_path, refused, shape):
    """With strict=False a part of its weights would load, and the rest stay random."""
    torch.save(torch.load(checkpoint[0], weights_only=True) | shape, tmp_path / "a.pt")
    for to in ("torchvision", "detectron2"):
        refused(export.main, [tmp_path / "a.pt", tmp_path / "b", "--to", to], "of width 64")
    assert not (tmp_path / "b").exists()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, refused):
    (tmp_path / "a").write_text("nothing")
    refused(export.main, [tmp_path / "a", tmp_path / "b", "--to", "torchvision"], "not a readable")
    refused(export.main, [tmp_path / "c", tmp_path / "b", "--to", "detectron2"], "No such file")
    assert not (tmp_path / "b").exists()


def test_a_place_that_cannot_be_written_is_named(checkpoint, tmp_path, refused):
    refused(export.main, [checkpoint[0], tmp_path / "no/b", "--to", "torchvision"], "no/b: cannot")
