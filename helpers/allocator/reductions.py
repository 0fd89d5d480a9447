"""The scratch of sums, means and all that makes one number of many.

Many blocks of threads add up a part each, and leave it in a buffer which can be larger
than the tensor that is summed. Source: ``setReduceConfig`` in Reduce.cuh, in
ATen/native/cuda among the headers that PyTorch installs, and ``TensorIterator``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from helpers.allocator.scratch import Gpu
from helpers.timeline.operators import Requests


def of_reduction(args: tuple, gpu: Gpu, sum_bytes: int = 0) -> Requests:
    """Give each block of threads a place for the part that it adds up.

    Args:
        sum_bytes: of such a part, for each output; default: as of a sum, 4 or more.
    """
    x, dims = args[0], args[1] if len(args) > 1 else None
    if not x.numel():
        return ()
    item_bytes, copy = x.element_size(), ()
    if not sum_bytes and item_bytes < 8 and not x.is_floating_point():
        copy, item_bytes = (x.numel() * 8,), 8  # they are counted in a wider type
    dims = range(x.dim()) if not dims else [dim % x.dim() for dim in dims]
    offset = 0 if copy else x.storage_offset()
    axes = _coalesced(_axes(x.shape, x.stride(), dims))
    kind = item_bytes, sum_bytes or max(item_bytes, 4)  # halves are added in float32
    return *copy, *_of_sum(axes, kind, offset, gpu)


def of_total(args: tuple, gpu: Gpu) -> Requests:
    return of_reduction(args[:1], gpu)


# The order of axes ------------------------------------------------------------------


class _Axis(NamedTuple):
    size: int
    stride: int  # in the input, in elements
    output_stride: int  # 0 for what is summed over


def _axes(
    shape: Sequence[int], strides: Sequence[int], dims: Sequence[int]
) -> list[_Axis]:
    """Order axes as TensorIterator does: those summed over first, the fastest first."""
    axes, output_stride = [], 1
    for dim in reversed(range(len(shape))):
        is_summed = dim in dims
        if shape[dim] > 1:
            stride = 0 if is_summed else output_stride
            axes.append(_Axis(shape[dim], strides[dim], stride))
        output_stride *= 1 if is_summed else shape[dim]
    axes.sort(key=lambda axis: (axis.output_stride, axis.stride))
    return axes


def _coalesced(axes: list[_Axis]) -> list[_Axis]:
    """Join axes that lie in memory like a single one."""
    joined = axes[:1]
    for axis in axes[1:]:
        last = joined[-1]
        ends = last.size * last.stride, last.size * last.output_stride
        if ends == (axis.stride, axis.output_stride):
            joined[-1] = last._replace(size=last.size * axis.size)
        else:
            joined.append(axis)
    return joined


def _of_sum(
    axes: list[_Axis], kind: tuple[int, int], offset: int, gpu: Gpu
) -> Requests:
    """Halve what 32 bits cannot index, as often as it takes; the largest part counts.

    Parts are alike, but for one more or less, and where they begin: few are looked at.
    """
    made: dict[Requests, None] = {}
    left = [(tuple(axes), offset % 4)]
    seen = set(left)
    while left:
        axes, offset = left.pop()
        extents = [
            (axis.size - 1) * max(axis.stride, axis.output_stride) * kind[0]
            for axis in axes
        ]
        if max(math.prod(axis.size for axis in axes), 1 + sum(extents)) < 2**31:
            made[_of_kernel(axes, kind, offset, gpu)] = None
            continue
        longest = max(range(len(axes)), key=lambda i: (extents[i], axes[i].size))
        size, stride, _ = axes[longest]
        for start, end in ((0, size // 2), (size // 2, size)):
            axis = axes[longest]._replace(size=end - start)
            part = (*axes[:longest], axis, *axes[longest + 1 :])
            state = part, (offset + start * stride) % 4
            if state not in seen:
                seen.add(state)
                left.append(state)
    return max(made, key=sum)


# One kernel -------------------------------------------------------------------------


def _of_kernel(
    axes: Sequence[_Axis], kind: tuple[int, int], offset: int, gpu: Gpu
) -> Requests:
    """Size a kernel's buffer for partial sums, and its semaphores."""
    summed = [axis for axis in axes if not axis.output_stride]
    kept = [axis for axis in axes if axis.output_stride]
    n_inputs = math.prod(axis.size for axis in summed)
    n_outputs = math.prod(axis.size for axis in kept)
    if n_inputs == 1:
        return ()
    along_rows = not kept or summed[0].stride < kept[0].stride
    dim0, dim1 = (n_inputs, n_outputs) if along_rows else (n_outputs, n_inputs)
    fastest = summed[0] if along_rows else kept[0]
    vector = 1  # outputs that a thread sums at once
    if fastest.stride == 1 and not along_rows:
        vector = _vector(kept[0], [*summed, *kept[1:]], offset)
        dim0 //= vector
    elif fastest.stride == 1 and dim0 >= 128 and len(summed) == 1:
        dim0 //= 4
    most = 512 // vector
    dim0, dim1 = (power_of_two(min(dim, most)) for dim in (dim0, dim1))
    height = min(dim1, most // min(dim0, 32))
    width = min(dim0, most // height)
    step_input, step_output = (width, 1) if along_rows else (1, width)
    is_split = -(-n_inputs // step_input) >= min(16 * height, 256)
    step_input *= height if is_split else 1
    step_output *= 1 if is_split else height
    values = -(-n_inputs // step_input)  # that a thread sums
    grid = -(-(n_outputs // vector) // step_output)
    target = gpu.processors * (gpu.threads // (width * height))
    if not is_split or values < 256 or grid > target:
        return ()
    blocks = max(min(-(-target // grid), -(-values // 16)), -(-values // 256))
    if blocks == 1:
        return ()
    buffer = kind[1] * n_outputs * blocks
    buffer *= 1 if along_rows else width * vector
    return buffer, 4 * grid


def _vector(first: _Axis, others: list[_Axis], offset: int) -> int:
    """Say how many outputs a thread can load at once: 4, 2 or 1."""
    sizes = [offset, first.size, *(axis.stride for axis in others)]
    return next(n for n in (4, 2, 1) if all(size % n == 0 for size in sizes))


def power_of_two(number: int) -> int:
    """Round down to a power of two, from 1 up."""
    return 1 << (max(number, 1).bit_length() - 1)
