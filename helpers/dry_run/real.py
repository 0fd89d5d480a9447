"""What a CPU's own kernels make, asked of a few real numbers.

Meta kernels say the shape of a result, but not always its strides, nor that its storage
is larger than it is, and some operators have none. So the operator itself is run, once,
on zeros: as many as the step has, or on a few rows of them if these are too many.
"""

import math
from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_leaves, tree_map

from helpers.dry_run.kernels import AUTOCAST
from helpers.dry_run.meta import describe

_MOST = 2**19  # numbers that are run as they are
_MOST_OF_ALL, _FEW = 2**23, 4
_BY_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def answer_of_cpu(
    func: torch._ops.OpOverload, args: tuple, kwargs: dict, meta: object = None
) -> object:
    """Describe an operator's output on a CPU; None where only its values would tell.

    Args:
        meta: what the meta kernel says; None if there is none.
    """
    by_values = func.is_view or func._schema.is_mutable or _BY_VALUES & {*func.tags}
    if func.namespace != "aten" or by_values:
        return None
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    numbers = sum(map(torch.numel, tensors))
    if numbers <= _MOST or (meta is None and numbers <= _MOST_OF_ALL):
        return _real_answer(func, args, kwargs)
    rows = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1)
    few = tree_map(lambda value: _with_few_rows(value, rows), (args, kwargs))
    tensors = [x for x in tree_leaves(few) if isinstance(x, torch.Tensor)]
    if meta is None or rows <= _FEW or sum(map(torch.numel, tensors)) > _MOST_OF_ALL:
        return None
    return _with_all_rows(meta, _real_answer(func, *few), rows)


def _real_answer(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> object:
    """Run an operator on zeros, and describe what comes out."""

    def real(value: object) -> object:
        if isinstance(value, torch.Tensor) and value.is_meta:
            shape, stride, dtype = value.shape, value.stride(), value.dtype
            made = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
            return made.zero_()
        return torch.device("cpu") if isinstance(value, torch.device) else value

    try:
        with (
            torch._C._DisableTorchDispatch(),
            torch._C._ExcludeDispatchKeyGuard(AUTOCAST),
        ):
            args, kwargs = tree_map(real, (args, kwargs))
            out = func(*args, **kwargs)
            return describe(out, (*args, *kwargs.values()), "cpu")
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None  # zeros are not what it takes


def _with_few_rows(value: object, rows: int) -> object:
    """Leave only some of a tensor's rows, laid out as before."""
    if type(value) is int and value == rows:
        return _FEW
    if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != rows:
        return value
    shape, like = (_FEW, *value.shape[1:]), value.stride()
    empty = torch.empty(0, dtype=value.dtype, device="meta")
    return empty.new_empty_strided(shape, _strides(shape, like))


def _with_all_rows(meta: object, few: object, rows: int) -> object:
    """Describe the output for all rows: shapes as the meta kernel's, strides in the
    order that few rows have, and as many times larger a storage.
    """
    if few is None or isinstance(meta, int) or not meta or not few:
        return meta
    if isinstance(meta[0], type):
        pairs = zip(meta[1], few[1], strict=True)
        return meta[0], [_with_all_rows(*pair, rows) for pair in pairs]
    (shape, *_), (few_shape, like, dtype, n_bytes) = meta, few
    if math.prod(few_shape) == 0 or len(shape) != len(few_shape):
        return few if math.prod(few_shape) == 0 else meta
    is_larger = n_bytes > math.prod(few_shape) * dtype.itemsize
    whole = n_bytes * rows // _FEW if is_larger else math.prod(shape) * dtype.itemsize
    return shape, _strides(shape, like), dtype, whole


def _strides(shape: Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    """Make the strides of a tensor without gaps, its axes in the order of others."""
    strides, step = [0] * len(shape), 1
    for axis in sorted(range(len(shape)), key=lambda axis: (like[axis], -axis)):
        if like[axis]:  # or it is expanded
            strides[axis], step = step, step * shape[axis]
    return tuple(strides)
