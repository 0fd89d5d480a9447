"""The scratch memory that CUDA's kernels take for themselves, inside one operator.

It comes out of the same allocator as tensors and is given back when the operator is
done, so it is in ``max_memory_allocated``, and no tensor. The largest is a sum's, as
every bias's gradient is one (``reductions``). A product copies a matrix that cuBLAS
cannot read as it lies, such as the gradient of ``output.sum()``. ``rules`` has those of
other operators.

Source: ``prepare_matrix_for_cublas`` in cuBlasCommonArgs.h, in ATen/native/cuda among
the headers that PyTorch installs.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
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
# Among what an operator requests, beside sizes:
WORKSPACE = 0  # cuBLAS's, taken once and kept
OUTPUT = -(2**62)  # here its outputs are made; without it, before all else
APART = -(2**63)  # a sum needs a place of its own, even where an addend is not needed
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


def scratch_on(device: str) -> Callable[..., Requests]:
    """Choose what tells an operator's scratch; none is known of a CPU's kernels."""
    if device == "cuda":
        return functools.partial(requests_of, gpu=this_gpu())
    return no_scratch


def requests_of(
    func: torch._ops.OpOverload, args: tuple, kwargs: dict, gpu: Gpu
) -> Requests:
    """Tell what an operator takes besides its output, in bytes.

    Args:
        args, kwargs: what the operator is called with, on any device.
    """
    if func._op not in _RULES:  # its C handle, whose hash is faster
        from helpers.allocator.rules import rule_of  # of what others take

        _RULES[func._op] = rule_of(func)
    rule = _RULES[func._op]
    if rule and kwargs:
        args = _in_order(func, args, kwargs)
    return rule(args, gpu) if rule else ()


def _in_order(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> tuple:
    """Put arguments that are given by name where a rule looks for them."""
    rest = func._schema.arguments[len(args) :]
    return *args, *(kwargs.get(one.name, one.default_value) for one in rest)


def _of_product(args: tuple, gpu: Gpu) -> Requests:
    """Copy what cuBLAS cannot read."""
    factors = [x for x in args if isinstance(x, torch.Tensor)][-2:]
    unread = (factor for factor in factors if not _can_be_read(factor))
    return (*(x.nbytes for x in unread), WORKSPACE)


def _of_addition(args: tuple, gpu: Gpu) -> Requests:
    """Say that neither addend can hold the sum: a view keeps what it is a view of.

    Nor does one where an operator's own backward adds, and not the engine.
    """
    node = torch._C._current_autograd_node()
    if node is not None and node.name() in _ADD:
        return (APART,)
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    can_hold = (not x._is_view() and _is_dense(x) for x in tensors)
    return () if len(tensors) < 2 or any(can_hold) else (APART,)


def _is_dense(x: torch.Tensor) -> bool:
    """Say whether a tensor has no gaps, and no number twice."""
    pairs = zip(x.shape, x.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs) == x.numel()


_ADD = {"StdMeanBackward0", "VarMeanBackward0"}
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.mv, _aten.addmv)
_PRODUCTS += (_aten.dot, _aten.vdot, _aten.addbmm, _aten._addmm_activation)
_RULE_OF: dict[torch._ops.OpOverload, Callable] = {
    **dict.fromkeys((product.default for product in _PRODUCTS), _of_product),
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
