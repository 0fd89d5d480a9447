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
_WEIGHTS = {torch.ops.aten.convolution.default: 1}
_WEIGHTS[torch.ops.aten.convolution_backward.default] = 2
# What shapes do not tell is asked for as it is: workspaces, and which bag a word is in.
_WHOLE = {
    getattr(torch.ops.aten, name).default
    for name in ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "_embedding_bag")
}
_READS_WORKSPACE = torch.ops.aten.mkldnn_rnn_layer_backward.default
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
    if func is _READS_WORKSPACE and not args[-1].numel():
        return None  # it was not asked for
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    numbers = sum(map(torch.numel, tensors))
    few = None
    if numbers > _MOST and meta is not None and func not in _WHOLE:
        few = _of_few_rows(func, args, kwargs, meta, tensors)
    if few is None and numbers <= _MOST_OF_ALL:
        return _real_answer(func, args, kwargs)
    return few


def _of_few_rows(
    func: torch._ops.OpOverload, args: tuple, kwargs: dict, meta: object, tensors: list
) -> object:
    """Describe an output by that of a few rows, if all that has rows has as many.

    Or kernels, which trust their callers, might read what is not there.
    """
    weight = args[_WEIGHTS[func]] if func in _WEIGHTS else None
    tables = [tensor for tensor in tensors if tensor.dim() > 1 and tensor is not weight]
    rows = {len(tensor) for tensor in tables}
    if len(rows) != 1 or max(rows) <= _FEW:
        return None
    (rows,) = rows
    shrunk = {id(table) for table in tables}

    def few(name: str, value: object) -> object:
        if id(value) in shrunk:
            return _with_few_rows(value)
        if isinstance(value, list) and len(value) == tables[0].dim():
            return [_FEW, *value[1:]] if value[0] == rows else value
        return _FEW if name == "N" else value  # as group norm's functions call it

    names = [argument.name for argument in func._schema.arguments]
    args = [few(name, value) for name, value in zip(names, args, strict=False)]
    kwargs = {name: few(name, value) for name, value in kwargs.items()}
    numbers = sum(x.numel() for x in tree_leaves(args) if isinstance(x, torch.Tensor))
    if numbers > _MOST_OF_ALL:
        return None
    return _with_all_rows(meta, _real_answer(func, tuple(args), kwargs), rows)


def _real_answer(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> object:
    """Run an operator on zeros, and describe what comes out."""

    def real(value: object) -> object:
        if isinstance(value, torch.Tensor) and value.is_meta:
            shape, stride, dtype = value.shape, value.stride(), value.dtype
            return torch.empty_strided(shape, stride, dtype=dtype, device="cpu").zero_()
        return torch.device("cpu") if isinstance(value, torch.device) else value

    try:
        with (
            torch._C._DisableTorchDispatch(),
            torch._C._ExcludeDispatchKeyGuard(AUTOCAST),
        ):
            args, kwargs = tree_map(real, (args, kwargs))
            return describe(func(*args, **kwargs), (*args, *kwargs.values()), "cpu")
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None  # zeros are not what it takes


def _with_few_rows(value: torch.Tensor) -> torch.Tensor:
    """Leave only some rows, laid out as before."""
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
    whole = n_bytes and n_bytes * rows // _FEW
    return shape, _strides(shape, like), dtype, whole


def _strides(shape: Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    """Make the strides of a tensor without gaps, its axes in the order of others."""
    strides, step = [0] * len(shape), 1
    for axis in sorted(range(len(shape)), key=lambda axis: (like[axis], -axis)):
        if like[axis]:  # or it is expanded
            strides[axis], step = step, step * shape[axis]
    return tuple(strides)
