"""A memory limit on any machine, and the largest batch that fits into it."""

import contextlib
import functools
import math
import numbers
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from helpers.checkpointing import Undo
from helpers.measure._cpu_limit import CpuLimit, living_optimizers
from helpers.measure.device import free_memory, usable_device
from helpers.measure.faults import is_out_of_memory
from helpers.timeline import counting
from helpers.units import format_bytes


class memory_limit:
    """Hold the training steps inside a ``with`` block to a memory limit.

    On CUDA it is the allocator's own limit, on what this process *reserves*: a little
    more than its tensors take, the cuBLAS workspace and other cells' tensors included.
    On a CPU every tensor counts that a step makes or reads, in blocks of 512 B, as in
    ``predict``: what is predicted to peak at ``limit_bytes`` fits, to the byte.

    A refusal that leaves the block lets go of the failed step: of the tensors that its
    traceback holds, and of gradients that were not there before. Parameters are as
    they were, unless it was the optimizer that failed. As long as the refusal is inside
    the block, nothing is changed.

    Args:
        limit_bytes: how much may be held at any moment.
        device: "cpu" or "cuda".

    Raises:
        torch.OutOfMemoryError: where the limit would be passed, before it is.
        ValueError: if this is no number of bytes, or no such device.
    """

    def __init__(self, limit_bytes: int, device: str | torch.device) -> None:
        is_number = isinstance(limit_bytes, numbers.Real)
        if not is_number or not 1 <= limit_bytes < math.inf:
            raise ValueError(
                "a limit is a number of bytes, from 1 up, such as 2**30; got "
                f"{limit_bytes!r}"
            )
        self.limit_bytes = int(limit_bytes)
        self.device = usable_device(nn.Module(), device)
        self._block = Undo()
        self._without_gradient: set[nn.Parameter] = set()  # when their forward began

    def __enter__(self) -> None:
        held_to = _cuda_limit if self.device == "cuda" else _cpu_limit
        self._without_gradient.clear()
        with Undo() as block:
            mark = object()  # the hook may not hold what ends it
            note = functools.partial(_note, mark, self._without_gradient)
            block.callback(counting.reset, counting.set((*counting.get(), mark)))
            block.callback(register_module_forward_pre_hook(note).remove)
            block.enter_context(held_to(self.limit_bytes))
            self._block = block.pop_all()

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        self._block.__exit__(kind, error, trace)
        if error is None or not is_out_of_memory(error):
            return
        for parameter in self._without_gradient:
            parameter.grad = None
        # The calls on a traceback keep their tensors for as long as it is kept.
        del trace
        failed = error
        while failed is not None and is_out_of_memory(failed):
            failed.__traceback__ = None
            failed = failed.__context__
        free_memory(self.device)
        raise torch.OutOfMemoryError(str(error)) from None


def _note(
    mark: object, without_gradient: set[nn.Parameter], module: nn.Module, args: tuple
) -> None:
    """Note a module's parameters that have no gradient when its forward begins."""
    if mark in counting.get() and torch._C._current_graph_task_id() == -1:
        for parameter in module.parameters(recurse=False):
            if parameter.grad is None:
                without_gradient.add(parameter)
            else:
                without_gradient.discard(parameter)


def _cpu_limit(limit_bytes: int) -> contextlib.AbstractContextManager:
    return CpuLimit(limit_bytes, living_optimizers()).holding()


@contextlib.contextmanager
def _cuda_limit(limit_bytes: int) -> Iterator[None]:
    free_memory("cuda")
    total_bytes = torch.cuda.get_device_properties("cuda").total_memory
    reserved_bytes = torch.cuda.memory_reserved()
    if reserved_bytes > limit_bytes:
        raise torch.OutOfMemoryError(
            f"this process holds {format_bytes(reserved_bytes)} of CUDA memory already "
            f"and the limit is {format_bytes(limit_bytes)}; a limit must be above what "
            "models and tensors that are still there take, so delete some or raise it"
        )
    before = torch.cuda.get_per_process_memory_fraction()
    limit = torch.cuda.set_per_process_memory_fraction
    with Undo() as undo:
        undo.callback(limit, before)
        limit(min(before, limit_bytes / total_bytes))
        yield


def largest_batch(fits: Callable[[int], bool], at_most: int = 2**24) -> int:
    """Find the most rows that fit, by doubling and then by bisection.

    Args:
        fits: called with a number of rows. If a batch fits, a smaller one must fit,
            too: that is what the search relies on, and it does not check it.
        at_most: where to stop.

    Returns:
        The largest number of rows that fits, 0 if not even one row does.
    """
    if not isinstance(at_most, int) or at_most < 1:
        raise ValueError(f"at_most is a whole number of rows from 1 up, not {at_most}")
    good, bad = 0, 1
    while good < at_most and fits(bad):
        good, bad = bad, min(2 * bad, at_most)
    if good == at_most:
        return at_most
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
