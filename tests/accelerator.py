"""An accelerator that computes on the CPU: for torch it is a device of its own.

It shows what goes wrong on any accelerator, and without one: tensors of two devices in one
operation, and results that are left there. A tensor on it has an empty storage, to which belongs a
tensor of the CPU behind it; that one is what operations are given.

A process that has this device keeps it, so tests use it in one of their own.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from functools import partial

import torch
from torch import nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

from filterpress import processes

NAME = "pretended"
aten = torch.ops.aten
#: Operations that torch has no way to do on a device that it does not know, or does by the strides
#: of the tensor in front, which are not those of the tensor behind.
INSTEAD = {
    aten.convolution_overrideable.default: aten.convolution.default,
    aten.convolution_backward_overrideable.default: lambda gradient, inputs, weight, *rest: (
        aten.convolution_backward(gradient, inputs, weight, [weight.shape[0]], *rest)
    ),
    aten.view.default: aten.reshape.default,
}
AS_THEY_ARE = (
    *(aten.diagonal.default, aten.expand.default, aten.permute.default, aten.select.int),
    *(aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.t.default, aten.transpose.int, aten.unbind.int),
    aten.unsqueeze.default,
)
#: Where a tensor of the CPU may meet one of an accelerator.
MEETING = {"aten::copy_", "aten::_copy_from", "aten::index", "aten::index_put_"}

_behind: dict[int, torch.Tensor] = {}
_libraries: list[torch.library.Library] = []  # what they register goes with them


class _Driver(backend_registration._DummyBackendModule):
    """What torch asks of a device, beyond what it assumes: it has no random numbers of its own."""

    def get_rng_state(self, device=None):
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def plug_in():
    """Give this process the accelerator; before its first backward pass, or torch misses it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Driver())
    others, named = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    others.fallback(_run, "PrivateUse1")
    for operation in (*INSTEAD, *AS_THEY_ARE):
        named.impl(operation, partial(_run, operation), "PrivateUse1")
    _libraries.extend([others, named])
    copy, move = torch.Tensor.__deepcopy__, nn.Module.to
    torch.Tensor.__deepcopy__ = lambda tensor, memo: _deepcopy(copy, tensor, memo)
    nn.Module.to = lambda module, *given, **more: _move(move, module, *given, **more)
    nn.Module.cpu = lambda module: module.to("cpu")


@contextlib.contextmanager
def used():
    """Let filterpress take it for the best device."""
    usual = processes.best_device
    modules = [m for m in list(sys.modules.values()) if getattr(m, "best_device", None) is usual]
    for module in modules:
        module.best_device = lambda: torch.device(NAME, 0)
    try:
        yield
    finally:
        for module in modules:
            module.best_device = usual


def is_on_it(value):
    """Say whether a value is a tensor on the accelerator."""
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _run(operation, *given, **more):
    """Run an operation on what is behind the tensors that it is given."""
    with torch.inference_mode(False), torch._C._AutoDispatchBelowAutograd():
        before = tree_leaves((given, more))
        _check(operation, before)
        to_cpu = torch.device(more.get("device") or NAME).type == "cpu"
        given_there, more_there = tree_map(_to_behind, (given, more))
        after = tree_leaves((given_there, more_there))
        if operation._schema.name == "aten::_copy_from":
            after[1].copy_(after[0])
            return given[1]
        made = INSTEAD.get(operation, operation)(*given_there, **more_there)
        known = {}
        for front, behind in zip(before, after, strict=True):
            if is_on_it(front):
                known[id(behind)] = front
                if front.shape != behind.shape:  # an output that was made larger
                    front.data = _front(behind)

        def to_front(value):
            if not isinstance(value, torch.Tensor) or to_cpu:
                return value
            return known[id(value)] if id(value) in known else _front(value)

        return tree_map(to_front, made)


def _check(operation, values):
    strangers = [t for t in values if isinstance(t, torch.Tensor) and t.ndim and not is_on_it(t)]
    if strangers and any(map(is_on_it, values)) and operation._schema.name not in MEETING:
        raise RuntimeError(f"{operation}: Expected all tensors to be on the same device")


def _to_behind(value):
    if is_on_it(value):
        return _behind[value.untyped_storage()._cdata]
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _front(behind):
    """Make the tensor on the accelerator that has this one behind it."""
    front = torch._C._acc.create_empty_tensor(list(behind.shape), behind.dtype)
    storage = front.untyped_storage()
    _behind[storage._cdata] = behind
    weakref.finalize(storage, _behind.pop, storage._cdata, None)
    return front


def _deepcopy(usual, tensor, memo):
    """Copy what is behind: torch would copy a storage that is empty."""
    if not is_on_it(tensor):
        return usual(tensor, memo)
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


def _move(usual, module, *given, **more):
    """Move what a module has and keep the objects, as torch does with a GPU: hooks are on them."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    if torch.device(NAME, 0) not in given and not any(map(is_on_it, tensors)):
        return usual(module, *given, **more)
    for tensor in tensors:
        moved = tensor.detach().to(*given, **more).requires_grad_(tensor.requires_grad)
        hooks = tensor._backward_hooks
        torch._C._swap_tensor_impl(tensor, moved)
        tensor._backward_hooks = hooks
    return module
