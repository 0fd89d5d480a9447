"""Stand-ins on the meta device: a model, a batch, and operators' answers.

They have shapes and lifetimes, but no data. PyTorch's meta kernels are Python and ten
times slower than a lookup, so that each combination of shapes is asked for only once.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

from helpers.dry_run.kernels import on_host
from helpers.timeline import map_tensors, same_for_same


def meta_model(model_or_factory: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Copy a model, or make one by a factory, without allocating its parameters.

    Shared parameters stay shared, the training mode and hooks are kept, gradients are
    not. A model that is on the meta device already is returned as it is.
    """
    if not isinstance(model_or_factory, nn.Module):
        with torch.device("meta"):
            return model_or_factory()
    model = model_or_factory
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.is_meta for tensor in tensors):
        return model
    copies = {id(tensor): _meta_parameter(tensor) for tensor in tensors}
    return copy.deepcopy(model, copies)


def _meta_parameter(tensor: torch.Tensor) -> torch.Tensor:
    empty = meta_batch(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


def meta_batch(batch: object) -> object:
    """Copy a batch, a tensor or tuples, lists and dicts of them, to the meta device.

    A view of a larger tensor takes only its own bytes, as in a copy to a device; a
    tensor that comes twice is copied once.
    """

    @same_for_same
    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        return empty.requires_grad_(tensor.requires_grad)

    return map_tensors(on_meta, batch)


_FUSED_STEPS = {
    getattr(torch.ops.aten, name)
    for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_")
}


class RememberedShapes:
    """Run operators on meta tensors, each combination of shapes only once.

    Called as ``run(func, args, kwargs)``. An operator that returns new tensors or its
    own arguments is answered from memory the next time; views always run. A
    fused optimizer's step, which not every one has for meta tensors, makes nothing.
    """

    def __init__(self, most: int = 20_000) -> None:
        self._answers: dict[tuple, object] = {}
        self._most = most

    def __len__(self) -> int:
        return len(self._answers)

    def __call__(self, func: Callable, args: tuple, kwargs: dict) -> object:
        if func.overloadpacket in _FUSED_STEPS:
            return None
        key = (func, _signature(args), _signature(tuple(kwargs.items())))
        try:
            answer = self._answers.get(key)
        except TypeError:  # an argument that cannot be hashed
            return func(*args, **kwargs)
        if answer is None:
            _check_types(func, args)
            out = on_host(func, func(*args, **kwargs))
            if len(self) > self._most:
                self._answers.clear()
            described = _describe(out, (*args, *kwargs.values()))
            if isinstance(described, int) and torch.Tag.inplace_view in func.tags:
                described = None  # transpose_ and its like change their argument
            self._answers[key] = _ASK_AGAIN if described is None else described
            return out
        if answer is _ASK_AGAIN:
            return on_host(func, func(*args, **kwargs))
        return _make(answer, (*args, *kwargs.values()))


_ASK_AGAIN = object()
_PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution")
}


def _check_types(func: torch._ops.OpOverload, args: tuple) -> None:
    """Refuse to multiply numbers of two types, which meta kernels let pass."""
    types = {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
    if len(types) > 1 and func.overloadpacket in _PRODUCTS:
        names = " and ".join(
            sorted(str(dtype).removeprefix("torch.") for dtype in types)
        )
        raise RuntimeError(f"it multiplies {names}, which have to be of one type")


def _signature(value: object) -> object:
    """Make a key of an argument: all that an operator's output shape depends on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple([_signature(item) for item in value])
    return type(value), value


def _describe(out: object, args: tuple) -> object:
    """Describe an operator's output so that it can be made again; None if it cannot."""
    if isinstance(out, tuple | list):
        parts = [_describe(item, args) for item in out]
        return None if None in parts else (type(out), parts)
    if not isinstance(out, torch.Tensor) or not out.is_meta:
        return None
    for place, arg in enumerate(args):
        if arg is out:
            return place
    storage = out.untyped_storage()
    inputs = {
        arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)
    }
    is_new = storage._cdata not in inputs and out.storage_offset() == 0
    if is_new and storage.nbytes() == out.numel() * out.element_size():
        return out.shape, out.stride(), out.dtype
    return None


def _make(answer: object, args: tuple) -> object:
    if isinstance(answer, int):
        return args[answer]
    if isinstance(answer[0], type):
        kind, parts = answer
        return kind(_make(part, args) for part in parts)
    shape, stride, dtype = answer
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


SHAPES = RememberedShapes()  # one memory for all who run operators on meta tensors
