"""A GPU that is not there: what a script does on one, found out on any machine.

    with FakeCuda() as gpu:     # tensors on "cuda" have a shape, a type and a device, but no values
        train(config, run)
    gpu.waits                   # where the host waited for the GPU, or copied something to it

torch's FakeTensorMode makes such tensors; operands on two devices are refused as on a real GPU, and
so is what depends on values (nonzero, a mask as an index). Autocast, GradScaler and the optimizers
work. What torch lacks for it without a driver is patched here. All of that is internal to torch and
may be missing in another version: then entering FakeCuda raises Unsupported.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._foreach_copy_.default, aten._to_copy.default)
# what launches no kernel, beside the views
METADATA = "_unsafe_view set_ empty empty_like empty_strided new_empty new_empty_strided".split()


class Unsupported(Exception):
    """This version of torch can't pretend."""


def tensors_in(*values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def is_kernel(func):
    return func.namespace == "aten" and not func.is_view and func._opname not in METADATA


def place():
    """The innermost line of the project's scripts that is being executed"""
    frame = sys._getframe(1)
    while frame and Path(frame.f_code.co_filename).parent != ROOT:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"


class Watch(TorchDispatchMode):
    """Sees every operation before FakeTensorMode does."""

    def __init__(self, on_kernel):
        super().__init__()
        self.on_kernel, self.watching, self.waits = on_kernel, True, []

    def note(self, what):
        if self.watching:
            self.waits.append(f"{what} at {place()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, given = kwargs or {}, tensors_in(args, kwargs)
        devices = {x.device.type for x in given}
        if func is aten._local_scalar_dense.default:  # .item(), bool(), int(): there is no value
            if "cuda" in devices:
                self.note("a value is read")
            return True if given[0].dtype == torch.bool else 1
        if func._schema.name.startswith("aten::_fused_") and not func._schema.returns:
            assert devices == {"cuda"}, f"{func} of two devices"
            out = None  # a fused optimizer works in place; FakeTensorMode doesn't know it
        else:
            out = func(*args, **kwargs)
        if (
            func in COPIES
            and len(devices := devices | {x.device.type for x in tensors_in(out)}) > 1
        ):
            target = out if func is aten._to_copy.default else args[0]
            self.note(f"copied to {tensors_in(target)[0].device.type}")
        elif {"cpu", "cuda"} <= devices:  # an index, or a tensor of no dimensions
            self.note(f"{func} of a tensor on the host")
        if self.on_kernel and is_kernel(func) and any(x.is_cuda for x in tensors_in(given, out)):
            self.on_kernel(func, args, kwargs, out)
        return out


def backward(loss, *_, **__):
    """loss.backward(): autograd's nodes one after the other, for its engine needs a driver"""
    order, seen, stack = [], {loss.grad_fn}, [loss.grad_fn]
    while stack:  # a node goes into the order after all that its gradients flow to
        following = [node for node, _ in stack[-1].next_functions if node and node not in seen]
        if following:
            seen.add(following[0])
            stack.append(following[0])
        else:
            order.append(stack.pop())
    grads = {node: [None] * len(node._input_metadata) for node in order}
    with torch.no_grad():
        grads[loss.grad_fn] = [torch.ones_like(loss)]
        for node in reversed(order):
            given = grads.pop(node)
            if all(grad is None for grad in given):
                continue
            if hasattr(node, "variable"):  # a leaf
                accumulate(node.variable, *given)
                continue
            given = node(*given)
            given = given if isinstance(given, tuple) else (given,)
            for (following, i), grad in zip(node.next_functions, given):
                if following and grad is not None:
                    meta, there = following._input_metadata[i], grads[following]
                    if grad.device != meta.device:
                        raise RuntimeError(f"{node.name()}: a gradient on {grad.device}")
                    grad = grad if grad.shape == meta.shape else grad.sum_to_size(meta.shape)
                    grad = grad.to(meta.dtype)
                    there[i] = grad if there[i] is None else there[i] + grad


def accumulate(leaf, grad):
    """Keep the gradient itself, as the engine does: called from Python, the node would copy it."""
    leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def swap(one, other):
    """torch.utils.swap_tensors(), for module.to(): FakeTensorMode keeps weak references"""
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


def deepcopy(tensor, memo):
    copied = tensor.detach().clone()  # torch's own copies the values
    if isinstance(tensor, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied, tensor.requires_grad)
    return memo.setdefault(id(tensor), copied)


class FakeCuda(contextlib.ExitStack):
    """on_kernel(func, args, kwargs, out) is called for each kernel that a GPU would launch."""

    def __init__(self, on_kernel=None):
        super().__init__()
        self.watch = Watch(on_kernel)

    @property
    def waits(self):
        return self.watch.waits

    def watching(self, on):
        """Off where the host may wait"""
        self.watch.watching = on

    def __enter__(self):
        types = [torch.Tensor, torch.nn.Parameter, FakeTensor]  # those that may go in lists
        patches = {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.get_device_capability": lambda *_: (9, 0),
            "torch.cuda.get_device_name": lambda *_: "a GPU that is not there",
            "torch.cuda.set_device": lambda *_: None,
            "torch.utils._foreach_utils._foreach_supported_types": types,
            "torch.optim.optimizer._foreach_supported_types": types,
            "torch.autograd.backward": backward,
            "torch.utils.swap_tensors": swap,
        }
        try:
            for name, value in patches.items():
                self.enter_context(mock.patch(name, value))
            self.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", deepcopy, create=True))
            self.enter_context(FakeTensorMode())
            self.enter_context(self.watch)
            learn_something()
        except Exception as error:
            self.close()
            raise Unsupported(f"torch {torch.__version__} can't pretend: {error}") from error
        self.waits.clear()
        return self


def learn_something():
    """One step of a small network: does all that is patched work in this version of torch?"""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", torch.float16):
        loss = model(torch.ones(2, 3, 8, 8, device="cuda")).float().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(p.grad is not None and p.device.type == "cuda" for p in model.parameters())
