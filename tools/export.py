"""Export a pretrained encoder: the same weights under the names that other libraries expect.

    python tools/export.py runs/moco/pretrain.pt --to torchvision encoder.pth
    python tools/export.py runs/moco/pretrain.pt --to detectron2 encoder.pkl

torchvision   a state dict for torchvision.models.resnet18 (or 34, 50), without fc; of vit-tiny for
              torchvision.models.VisionTransformer(32, 4, 6, 3, 192, 768), without heads
detectron2    {"model": {name: array}, ...}, for MODEL.WEIGHTS of a ResNet of as many layers

The first convolution of their ResNets is 7x7, ours 3x3. `--stem pad` (the default for detectron2)
pads ours with zeros, so that it fits an unmodified model; `--stem keep` leaves it as it is, for a
model whose conv1 is replaced by nn.Conv2d(3, width, 3, padding=1, bias=False): docs/transfer.md.
"""

import argparse
import io
import pickle
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moco_cifar import UserError, load_checkpoint, write_atomic

# torchvision's names -> detectron2's: stages start at 2, a norm belongs to its convolution
DETECTRON2 = [
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
]


WITH_COUNTERPART = [(f"resnet{layers}", 64) for layers in (18, 34, 50)]


def rename(name):
    """'layer1.0.bn2.weight' -> 'res2.0.conv2.norm.weight'"""
    for pattern, new in DETECTRON2:
        name = re.sub(pattern, new, name)
    return name


def export(checkpoint, layout, stem):
    """A checkpoint's encoder -> the content of the exported file, as bytes"""
    weights = dict(checkpoint["encoder"])
    if stem == "pad":
        weights["conv1.weight"] = F.pad(weights["conv1.weight"], (2, 2, 2, 2))  # 3x3 in 7x7
    if layout == "torchvision":
        torch.save(weights, buffer := io.BytesIO())
        return buffer.getvalue()
    model = {
        rename(name): value.numpy()
        for name, value in weights.items()
        if not name.endswith("num_batches_tracked")
    }
    about = {
        "__author__": f"contrastive-cifar, {checkpoint['method']}",
        "matching_heuristics": True,
    }
    return pickle.dumps({"model": model} | about)


def main(argv=None):
    """-> exit code"""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="pretrain.pt or linear.pt, of any method")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--to", required=True, choices=["torchvision", "detectron2"])
    parser.add_argument("--stem", choices=["keep", "pad"], help="of a ResNet's first convolution")
    args = parser.parse_args(argv)
    stem = args.stem or ("pad" if args.to == "detectron2" else "keep")
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        shape = checkpoint["arch"], checkpoint["width"]
        if shape[0] != "vit-tiny" and shape not in WITH_COUNTERPART:
            fits = "only a resnet18, 34 or 50 of width 64 (or a vit-tiny) has a counterpart there"
            raise UserError(f"{args.checkpoint}: {fits}, not a {shape[0]} of width {shape[1]}")
        if checkpoint["arch"] == "vit-tiny" and (args.to, stem) != ("torchvision", "keep"):
            raise UserError(
                f"{args.checkpoint}: a vit-tiny goes --to torchvision, with --stem keep"
            )
        write_atomic(args.out, export(checkpoint, args.to, stem))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"error: {args.out}: cannot be written, {error.strerror}", file=sys.stderr)
        return 2
    size = f"{checkpoint['arch']} of width {checkpoint['width']}, stem: {stem}"
    print(f"{args.out}: {size}, {checkpoint['method']}, epoch {checkpoint['epoch']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
