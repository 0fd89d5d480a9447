"""One training step, as every number in this workbook means it."""

import time
from collections.abc import Callable

import torch
from torch import nn

from helpers.devices import is_out_of_memory

Loss = Callable[..., torch.Tensor]


def training_step(
    model: nn.Module,
    batch: object,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[..., None]:
    """Make a training step: zero_grad, forward, loss, backward, optimizer's step.

    Args:
        batch: ``x`` or ``(x, target)``.
        loss: called with the output, and the target where there is one; default:
            cross-entropy with a target, ``output.sum()`` without.

    Returns:
        A function; its argument ``before_backward``, if given, is called in between.

    Raises:
        ValueError: if the batch is no such pair; from the step, if it does not fit.
    """
    if isinstance(batch, torch.Tensor):
        x, targets = batch, ()
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        x, targets = batch[0], (batch[1],)
    else:
        raise ValueError("a batch is a tensor x or a pair (x, target)")
    if loss is None:
        loss = nn.functional.cross_entropy if targets else torch.sum

    def step(before_backward: Callable[[], None] | None = None) -> None:
        model.zero_grad(set_to_none=True)
        for tensor in (x, *targets):
            if isinstance(tensor, torch.Tensor) and tensor.is_leaf:
                tensor.grad = None
        try:
            output = model(x)
            value = loss(output, *targets)
        except (RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error) or isinstance(error, NotImplementedError):
                raise
            raise ValueError(_misfit(error, model, x, targets)) from None
        if not value.requires_grad:
            raise ValueError(
                "the loss does not depend on anything that requires a gradient, so "
                "there is no backward pass to look at"
            )
        if before_backward:
            before_backward()
        torch.autograd.backward(value)
        if optimizer:
            optimizer.step()

    return step


def time_step_ms(step: Callable[[], object], device: str) -> float:
    """Time one step: by CUDA events on a GPU, by the clock on a CPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1000


def _misfit(error: Exception, model: nn.Module, x: object, targets: tuple) -> str:
    """Say which layer refused the batch; the innermost module on the traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    where, trace = "the loss", error.__traceback__
    while trace:
        name = names.get(id(trace.tb_frame.f_locals.get("self")))
        if name is not None:
            where = f"layer {name!r}" if name else "its own forward"
        trace = trace.tb_next
    shapes = " and target ".join(
        str(tuple(getattr(tensor, "shape", ()))) for tensor in (x, *targets)
    )
    reason = str(error).strip().splitlines()[0].rstrip(".")
    if "meta tensor" in reason:
        return (
            f"{where} looks at values, and a prediction has none ({reason}); measure it"
        )
    return f"a batch of shape {shapes} does not fit this model at {where}: {reason}"
