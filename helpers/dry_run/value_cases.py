"""Operators that are each a case of their own where values are known."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from helpers.dry_run.numbers import Unknown
from helpers.dry_run.values import (
    answer,
    in_optimizer,
    known,
    look,
    name_of,
    run_real,
    stand_in_of,
    twin,
)

if TYPE_CHECKING:
    from helpers.dry_run.run_values import Values

_aten = torch.ops.aten


def _lifted(values: "Values", func: Callable, args: tuple, kwargs: dict) -> object:
    """Take what ``torch.tensor`` has made."""
    (tensor,) = args
    counts = tensor.is_floating_point() and not tensor.is_meta
    if not counts or values.device == "cuda" or in_optimizer():
        return values.run(func, args, kwargs)
    return stand_in_of(tensor)  # it may come to hold what has no values


def _copied(values: "Values", func: Callable, args: tuple, kwargs: dict) -> object:
    """Copy to another device or type; on a CPU, the host is no other device."""
    (tensor,) = args
    to = kwargs.get("device") or tensor.device
    if to.type == values.device == "cuda":
        to = torch.device("meta")
    if values.device == "cpu" and to != tensor.device:
        tensor, to = _twin_of_any(tensor), torch.device("meta")
        if kwargs.get("dtype", tensor.dtype) == tensor.dtype:
            return _aten.alias(tensor)
    kwargs = kwargs | {"device": to}
    if to.type == "meta":
        return values.run_known(func, (_twin_of_any(tensor),), kwargs)
    if not tensor.is_meta:
        return run_real(func, (tensor,), kwargs)
    real = known(tensor)
    if real is None:
        real = torch.empty_like(tensor, device="cpu", requires_grad=False)
        real.untyped_storage().unknown = True
    return run_real(func, (real,), kwargs)


def _twin_of_any(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else twin(tensor)


def _packed(values: "Values", func: Callable, args: tuple, kwargs: dict) -> object:
    """Pack sequences by their lengths, which lie on the host."""
    rows, lengths, *others = args
    real = known(lengths)
    if real is None:
        raise Unknown(name_of(func))
    return func(values.adopted(rows), real, *others, **kwargs)


def _indexed(values: "Values", func: Callable, args: tuple, kwargs: dict) -> object:
    """Index by masks as by the places where they are true."""
    tensor, indices = args
    masks = [
        i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)
    ]
    has_meta, _, all_known = look(args)
    if not has_meta and look(masks)[2]:
        return run_real(func, args, kwargs)
    if masks and all_known:
        return answer(func, args, kwargs)
    places: list[Tensor | None] = []
    for index in indices:
        if any(index is mask for mask in masks):
            places += answer(_aten.nonzero_numpy.default, (index,), {})
        else:
            places.append(index)
    return values.run_known(func, (tensor, places), kwargs)


def _selected(values: "Values", func: Callable, args: tuple, kwargs: dict) -> object:
    """Select by a mask that is known from what may not be."""
    tensor, mask = args
    has_meta, _, all_known = look(args)
    real = known(mask)
    if all_known or real is None:
        if not has_meta:
            return run_real(func, args, kwargs)
        return answer(func, args, kwargs)
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    rows = int(real.expand(shape).count_nonzero())
    return torch.empty(rows, dtype=tensor.dtype, device="meta")


def _grouped(values: "Values", func: Callable, args: tuple, kwargs: dict) -> object:
    """Multiply by groups, of any type; a row of the result is 16 bytes, or whole ones.

    Source: ``create_grouped_gemm_output_tensor`` in native/GroupedMMUtils.h.
    """
    given = dict(zip("a b offs bias out_dtype".split(), args, strict=False)) | kwargs
    a, b, offs = given["a"], given["b"], given.get("offs")
    if not (a.is_meta or b.is_meta):
        return run_real(func, args, kwargs)
    groups = [] if a.dim() != b.dim() else [a.shape[0] if a.dim() == 3 else len(offs)]
    dtype = given.get("out_dtype") or a.dtype
    shape, row = [*groups, a.shape[-2], b.shape[-1]], 16 // dtype.itemsize
    padded = -(-shape[-1] // row) * row
    strides = [shape[-2] * padded, padded, 1][-len(shape) :]
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


CASES = {
    _aten._grouped_mm: _grouped,
    _aten.lift_fresh: _lifted,
    _aten._to_copy: _copied,
    _aten._pack_padded_sequence: _packed,
    _aten.index: _indexed,
    _aten.masked_select: _selected,
}
