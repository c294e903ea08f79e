"""What a GPU would do in a training step, counted without one: bench.py --count.

The script's own train() runs on tensors that pretend to be on a GPU (fake_cuda.py), in bfloat16;
the second step is counted. Each operation of torch that isn't a view is one launch, two for the two
products of a convolution's backward pass; a list of tensors (torch._foreach_, fused optimizers) is
one. A GPU's libraries launch a few more. FLOP are those of convolutions and matrix products. Bytes
are those of the operands and results of each operation, as if no cache held them.
"""

import contextlib
import importlib
import io
import math
import sys
import tempfile
from collections import Counter
from types import SimpleNamespace

import torch
from fake_cuda import FakeCuda, tensors_in
from torch.utils.flop_counter import flop_registry

AUGMENT, QUERY, KEY = "augmentation, 2 views", "forward, query or online", "forward, key or target"
BACKWARD, REST = "backward", "optimizer and the rest"
COUNTED = {  # script, settings that differ from its defaults
    "MoCo": ("moco_cifar", {}),
    "MoCo, --bn-splits 1": ("moco_cifar", dict(bn_splits=1)),
    "SimCLR": ("simclr", {}),
    "Fast-MoCo": ("fast_moco", {}),
    "Fast-MoCo, --encode whole": ("fast_moco", dict(encode="whole")),
}
UNITS = {"launches": ("kernel launches", 1), "flop": ("GFLOP", 1e9), "bytes": ("GB", 1e9)}


def part_of_step():
    """Where in train() a kernel is launched, by the names of the functions that are running"""
    names, frame = set(), sys._getframe(1)
    while frame and frame.f_code.co_name != "train":
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    if "augment" in names:
        return AUGMENT
    if "backward" in names:
        return BACKWARD
    if names & {"forward", "nt_xent"}:  # nothing is learned from a key: no gradient
        return QUERY if torch.is_grad_enabled() else KEY
    return REST


def cost(func, args, kwargs, out):
    """What a kernel costs -> {"launches", "flop", "bytes"}"""
    given, made = tensors_in(args, kwargs), tensors_in(out)
    if not func._schema.returns:  # it writes to its arguments
        pairs = zip(func._schema.arguments, args)
        made = tensors_in([x for argument, x in pairs if argument.is_write])
    if func is torch.ops.aten.index.Tensor:  # reads only the rows that it takes
        given = given[1:] + made
    is_product = func is torch.ops.aten.convolution_backward.default
    flop = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
    return {
        "launches": sum(args[-1]) if is_product else 1,  # the gradients that are asked for
        "flop": flop(*args, **kwargs, out_val=out),
        "bytes": sum(map(size_of, given + made)),
    }


def size_of(x):
    """Bytes in memory; an expanded dimension has none of its own"""
    return x.itemsize * math.prod(n for n, step in zip(x.shape, x.stride()) if step)


def count(script, config):
    """A step of the script's train() -> {part: {"launches", "flop", "bytes"}}"""
    costs = {part: Counter() for part in (AUGMENT, QUERY, KEY, BACKWARD, REST)}

    class Counted(script.Run):
        def load(self):
            n, size = 3 * config.batch_size, config.image_size
            x = torch.zeros(n, 3, size, size, dtype=torch.uint8, device=self.device)
            self.images = x.to(memory_format=torch.channels_last)
            about = dict(name="none", n_train=n, sha256="")
            self.data = SimpleNamespace(x_train=self.images, about=about)

        def save(self, name):
            pass

        def batches(self):
            for i, batch in zip(range(2), super().batches()):
                yield batch
                if i == 0:  # this one made the optimizer's state, too
                    for part in costs.values():
                        part.clear()

    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        with FakeCuda(lambda *kernel: costs[part_of_step()].update(cost(*kernel))):
            script.train(config, Counted(config))
    return {name: {key: part[key] for key in UNITS} for name, part in costs.items()}


def count_all(arch, width, batch_size):
    """Of each method -> a plain dict for the JSON file"""
    settings = dict(arch=arch, width=width, batch_size=batch_size, knn_k=1)
    result = dict(schema=1, kind="count", torch=torch.__version__, settings=settings, methods={})
    for name, (script, changes) in COUNTED.items():
        script = importlib.import_module(script)
        with tempfile.TemporaryDirectory() as out:
            where = dict(device="cuda", out=out, precision="bf16")
            config = script.check_config(script.Config(**settings, **changes, **where))
            result["methods"][name] = count(script, config)
    return result


def table(result):
    """The same as Markdown"""
    methods, lines = result["methods"], []
    for key, (unit, scale) in UNITS.items():
        rows = {part: [m[part][key] for m in methods.values()] for part in (AUGMENT, QUERY, KEY)}
        rows |= {part: [m[part][key] for m in methods.values()] for part in (BACKWARD, REST)}
        rows["**all**"] = [sum(column) for column in zip(*rows.values())]
        lines += ["", f"| {unit} | {' | '.join(methods)} |", "| --- " * (1 + len(methods)) + "|"]
        for name, values in rows.items():
            cells = [f"{value / scale:,.{0 if scale == 1 else 1}f}" for value in values]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])
