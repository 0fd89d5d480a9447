"""Stand-ins on the meta device: a model, a batch, and operators' answers.

They have shapes and lifetimes, but no data. PyTorch's meta kernels are Python and ten
times slower than a lookup, so that each combination of shapes is asked for only once.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from helpers.checkpointing import refuse_opaque
from helpers.dry_run.kernels import AUTOCAST, OTHERWISE, on_host

if TYPE_CHECKING:
    from helpers.dry_run.copies import Copies


def meta_model(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    copies: "Copies | None" = None,
) -> nn.Module:
    """Copy a model, or make one by a factory, without allocating its parameters.

    Shared parameters stay shared, the training mode and hooks are kept, gradients are
    not. A model that is on the meta device already is returned as it is.

    Raises:
        ValueError: if it is neither, or the factory makes something else.
    """
    model = model_or_factory
    if callable(model) and not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model_or_factory()
    if not isinstance(model, nn.Module):
        raise ValueError(
            "a model is an nn.Module, or a function that makes one, not "
            f"a {type(model).__name__}"
        )
    refuse_opaque(model)
    if all(map(_has_no_data, model.modules())):
        return model
    return (copies or meta_copies()).of(model)


def _has_no_data(module: nn.Module) -> bool:
    own = *module._parameters.values(), *module._buffers.values()
    return all(tensor is None or tensor.is_meta for tensor in own)


def meta_batch(batch: object) -> object:
    """Copy a batch, anything with tensors in it, to the meta device.

    A view of a larger tensor takes only its own bytes, as in a copy to a device; a
    tensor that comes twice is copied once.
    """
    return stand_in(batch) if type(batch) is torch.Tensor else meta_copies().of(batch)


def meta_copies() -> "Copies":
    """Make copies of anything on the meta device."""
    from helpers.dry_run.copies import Copies  # which a factory does without

    return Copies(stand_in)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Make a meta tensor like another one.

    Raises:
        ValueError: for a sparse, nested or quantized one.
    """
    if tensor.is_nested or tensor.is_quantized:
        raise ValueError(
            "what a nested or quantized tensor takes is not known to a prediction; "
            "measure it, or give a plain tensor"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(
            "a sparse tensor takes as many bytes as it has numbers, which a prediction "
            "does not know; measure it"
        )
    if tensor.is_inference() and not tensor.is_meta:
        raise ValueError(
            "a tensor that was made in torch.inference_mode cannot be saved for "
            "backward; make it outside"
        )
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    if not (tensor.is_meta or tensor.is_floating_point() or tensor.is_complex()):
        empty.untyped_storage().value = tensor  # which values.py knows
    return empty.requires_grad_(tensor.requires_grad)


# By ``_op``, whose hash is C's: that of an operator in Python takes as long as a key's.
_FUSED_STEPS = {
    getattr(getattr(torch.ops.aten, f"_fused_{name}_"), overload)._op
    for name in ("adam", "adamw", "sgd", "adagrad")
    for overload in ("default", "tensor_lr")
}


class RememberedShapes:
    """Run operators on meta tensors, each combination of shapes only once.

    Called as ``run(func, args, kwargs)``. An operator that returns new tensors or its
    own arguments is answered from memory the next time; views always run. A
    fused optimizer's step, which not every one has for meta tensors, makes nothing.
    Called with ``otherwise``, it leaves to that what is not known to be plain.

    Args:
        on_cpu: whether to answer as a CPU's kernels do, where these differ.
    """

    def __init__(self, most: int = 20_000, on_cpu: bool = False) -> None:
        self._answers: dict[tuple, object] = {}
        self._plain: dict[tuple, object] = {}  # of them, where values are nothing
        self._most, self._on_cpu = most, on_cpu

    def __len__(self) -> int:
        return len(self._answers)

    def plain(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """Run an operator to which only shapes matter, where no values are known."""
        out, key = self(func, args, kwargs), (func._op, _signature(args), ())
        with contextlib.suppress(TypeError, KeyError):
            self._plain[key] = self._answers[key]
        return out

    def __call__(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        otherwise: Callable | None = None,
    ) -> object:
        if func._op in _FUSED_STEPS:
            return None
        named = _signature(tuple(kwargs.items())) if kwargs else ()
        key = (func._op, _signature(args), named)
        try:
            answer = (self._plain if otherwise else self._answers).get(key)
        except TypeError:  # an argument that cannot be hashed
            return (otherwise or _run)(func, args, kwargs)
        if otherwise and answer is None:
            return otherwise(func, args, kwargs)
        if answer is _VIEW:
            return func(*args, **kwargs)
        if answer is _ASK_AGAIN:
            return on_host(func, _run(func, args, kwargs))
        if answer is not None:
            return make(answer, (*args, *kwargs.values()))
        _check_types(func, args)
        out, answer = self._first(func, args, kwargs)
        if len(self) > self._most:
            self._answers.clear()
            self._plain.clear()
        if answer is None:
            answer = _VIEW if func.is_view else _ASK_AGAIN
        self._answers[key] = answer
        return out

    def _first(self, func: Callable, args: tuple, kwargs: dict) -> tuple:
        """Run an operator, and describe its output if it can be made again."""
        values = (*args, *kwargs.values())
        try:
            out = on_host(func, _run(func, args, kwargs))
            answer = describe(out, values)
            if isinstance(answer, int) and torch.Tag.inplace_view in func.tags:
                answer = None  # transpose_ and its like change their argument
        except NotImplementedError:  # there is no meta kernel
            if not (answer := _ask_cpu(func, args, kwargs)):
                raise
            return make(answer, values), answer
        is_new = isinstance(answer, tuple) and not self._on_cpu
        if is_new and func.overloadpacket.__name__ in OTHERWISE:
            from helpers.dry_run.fused import as_cuda_makes  # for few

            answer = as_cuda_makes(func, args, answer)
            return make(answer, values), answer
        if self._on_cpu and answer is not None and not is_trusted(func, values):
            if differs := _ask_cpu(func, args, kwargs, answer):
                return make(differs, values), differs
        return out, answer


def _run(func: Callable, args: tuple, kwargs: dict) -> object:
    """Run an operator; what it calls itself is not cast by autocast again."""
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return func(*args, **kwargs)


def _ask_cpu(*asked: object) -> object:
    from helpers.dry_run.real import answer_of_cpu

    return answer_of_cpu(*asked)


_VIEW, _ASK_AGAIN = object(), object()
_PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution")
}
_PLAIN = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "ones_like", "zeros_like", "clone", "_to_copy")
}
_DENSE = _PRODUCTS - {torch.ops.aten.convolution}


def is_trusted(func: Callable, values: tuple) -> bool:
    """Say whether meta kernels are known to answer as a CPU's: products, and what works
    element by element or makes new tensors, where nothing is strided.
    """
    if func.overloadpacket in _DENSE:
        return True
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not all(tensor.is_contiguous() for tensor in tensors):
        return False
    return (
        not tensors or torch.Tag.pointwise in func.tags or func.overloadpacket in _PLAIN
    )


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


def describe(out: object, args: tuple, device: str = "meta") -> object:
    """Describe an operator's output so that it can be made again; None if it cannot."""
    if isinstance(out, tuple | list):
        parts = [() if x is None else describe(x, args, device) for x in out]
        return None if None in parts else (type(out), parts)
    if not isinstance(out, torch.Tensor) or out.device.type != device:
        return None
    for place, arg in enumerate(args):
        if arg is out:
            return place
    storage = out.untyped_storage()
    inputs = {
        arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)
    }
    if storage._cdata in inputs or out.storage_offset():
        return None
    n_bytes = storage.nbytes()  # none where it holds nothing else
    n_bytes = None if n_bytes == out.numel() * out.itemsize else n_bytes
    return out.shape, out.stride(), out.dtype, n_bytes


def make(answer: object, args: tuple) -> object:
    """Make an output that was described, on the meta device."""
    if isinstance(answer, int):
        return args[answer]
    if not answer:
        return None
    if isinstance(answer[0], type):
        kind, parts = answer
        return kind(make(part, args) for part in parts)
    shape, stride, dtype, n_bytes = answer
    out = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if n_bytes is None or out.untyped_storage().nbytes() == n_bytes:
        return out
    whole = torch.empty(n_bytes // dtype.itemsize, dtype=dtype, device="meta")
    return whole.as_strided(shape, stride)


# One memory for all who run operators on meta tensors, and one for those who do as on
# a CPU.
SHAPES, SHAPES_ON_CPU = RememberedShapes(), RememberedShapes(on_cpu=True)
