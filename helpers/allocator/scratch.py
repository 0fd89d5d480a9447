"""The scratch memory that CUDA's kernels take for themselves, inside one operator.

It comes out of the same allocator as tensors and is given back when the operator is
done, so it is in ``max_memory_allocated``, and no tensor. The largest is a sum's: many
blocks of threads add up a part each, and leave it in a buffer which can be larger than
the tensor that is summed. Every bias's gradient is such a sum. A product copies a
matrix that cuBLAS cannot read as it lies, such as the gradient of ``output.sum()``.

Source: ``setReduceConfig`` in Reduce.cuh and ``prepare_matrix_for_cublas`` in
cuBlasCommonArgs.h, in ATen/native/cuda among the headers that PyTorch installs.
``rules`` has those of operators that a plain model does without.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from helpers.checkpointing import Undo
from helpers.timeline.operators import Requests, no_scratch


class Gpu(NamedTuple):
    """What the bytes of a step depend on, besides the step."""

    processors: int  # multiprocessors
    threads: int  # that each of them can hold
    capability: tuple[int, int] = (9, 0)


H100 = Gpu(132, 2048)  # also an H200
_chosen: contextvars.ContextVar[Gpu | None] = contextvars.ContextVar("gpu")
WORKSPACE = 0  # among what an operator requests: cuBLAS's, taken once and kept
APART = -1  # and: a sum needs a place of its own, even where an addend is not needed
_aten = torch.ops.aten


def this_gpu() -> Gpu:
    """Describe the GPU that predictions are for: this machine's, or else an H100."""
    if gpu := _chosen.get(None):
        return gpu
    if not torch.cuda.is_available():
        return H100
    found = torch.cuda.get_device_properties("cuda")
    sizes = found.multi_processor_count, found.max_threads_per_multi_processor
    return Gpu(*sizes, (found.major, found.minor))


@contextlib.contextmanager
def on_gpu(gpu: Gpu | str | None) -> Iterator[None]:
    """Predict for another GPU inside this block; None changes nothing.

    Raises:
        ValueError: for a name that is none of ``helpers.allocator.cards``.
    """
    if gpu is not None and not isinstance(gpu, Gpu):
        from helpers.allocator.cards import named

        gpu = named(gpu)
    with Undo() as undo:
        undo.callback(_chosen.reset, _chosen.set(gpu or _chosen.get(None)))
        yield


def scratch_on(device: str) -> Callable[[torch._ops.OpOverload, tuple], Requests]:
    """Choose what tells an operator's scratch; none is known of a CPU's kernels."""
    if device == "cuda":
        return functools.partial(requests_of, gpu=this_gpu())
    return no_scratch


def requests_of(func: torch._ops.OpOverload, args: tuple, gpu: Gpu) -> Requests:
    """Tell what an operator takes besides its output, in bytes.

    Args:
        args: what the operator is called with, on any device.
    """
    if func._op not in _RULES:  # its C handle, whose hash is faster
        from helpers.allocator.rules import rule_of  # of what others take

        _RULES[func._op] = rule_of(func)
    rule = _RULES[func._op]
    return rule(args, gpu) if rule else ()


def _of_product(args: tuple, gpu: Gpu) -> Requests:
    """Copy what cuBLAS cannot read."""
    factors = [x for x in args if isinstance(x, torch.Tensor)][-2:]
    unread = (factor for factor in factors if not _can_be_read(factor))
    return (*(x.nbytes for x in unread), WORKSPACE)


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
    address = x.storage_offset() * item_bytes if not copy else 0
    axes = _coalesced(_axes(x.shape, x.stride(), dims))
    kind = item_bytes, sum_bytes or max(item_bytes, 4)  # halves are added in float32
    return *copy, *_of_sum(axes, kind, address, gpu)


def _of_addition(args: tuple, gpu: Gpu) -> Requests:
    """Say that neither addend can hold the sum: a view keeps what it is a view of."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    can_hold = (not x._is_view() and _is_dense(x) for x in tensors)
    return () if len(tensors) < 2 or any(can_hold) else (APART,)


def _is_dense(x: torch.Tensor) -> bool:
    """Say whether a tensor has no gaps, and no number twice."""
    pairs = zip(x.shape, x.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs) == x.numel()


_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.mv, _aten.addmv)
_PRODUCTS += (_aten.dot, _aten.vdot, _aten.addbmm, _aten._addmm_activation)
_SUMS = _aten.sum.default, _aten.sum.dim_IntList, _aten.mean.default, _aten.mean.dim
_RULE_OF: dict[torch._ops.OpOverload, Callable] = {
    **dict.fromkeys((product.default for product in _PRODUCTS), _of_product),
    **dict.fromkeys(_SUMS, of_reduction),
    _aten.add.Tensor: _of_addition,
}
_RULES: dict[object, Callable | None] = {
    func._op: rule for func, rule in _RULE_OF.items()
}


def _can_be_read(matrix: torch.Tensor) -> bool:
    """Say whether cuBLAS can read a matrix as it lies, by rows or by columns."""
    if matrix.dim() == 1:
        return matrix.stride(0) > 0 or len(matrix) == 1
    (rows, columns), (down, along) = matrix.shape[-2:], matrix.stride()[-2:]
    if 1 in (rows, columns) and (along if rows == 1 else down) == 1:
        return True  # a vector
    by_rows = along == 1 and down >= max(1, columns)
    return by_rows or (down == 1 and along >= max(1, rows))


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
    axes: list[_Axis], kind: tuple[int, int], address: int, gpu: Gpu
) -> Requests:
    """Halve what 32 bits cannot index, as often as it takes; the larger half counts."""
    numel, item_bytes = math.prod(axis.size for axis in axes), kind[0]
    extents = [
        (axis.size - 1) * max(axis.stride, axis.output_stride) * item_bytes
        for axis in axes
    ]
    if max(numel, 1 + sum(extents)) < 2**31:
        return _of_kernel(axes, kind, address, gpu)
    longest = extents.index(max(extents))
    axis = axes[longest]
    half = axis.size // 2
    middle = address + half * axis.stride * item_bytes

    def part(size: int, start: int) -> Requests:
        parts = [*axes[:longest], axis._replace(size=size), *axes[longest + 1 :]]
        return _of_sum(parts, kind, start, gpu)

    return max(part(half, address), part(axis.size - half, middle), key=sum)


# One kernel -------------------------------------------------------------------------


def _of_kernel(
    axes: list[_Axis], kind: tuple[int, int], address: int, gpu: Gpu
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
        vector = _vector(kept[0], [*summed, *kept[1:]], address // kind[0])
        dim0 //= vector
    elif fastest.stride == 1 and dim0 >= 128 and len(summed) == 1:
        dim0 //= 4
    most = 512 // vector
    dim0, dim1 = (_power_of_two(min(dim, most)) for dim in (dim0, dim1))
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


def _power_of_two(number: int) -> int:
    """Round down to a power of two, from 1 up."""
    return 1 << (max(number, 1).bit_length() - 1)
