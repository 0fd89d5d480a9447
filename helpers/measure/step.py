"""One training step, as every number in this workbook means it."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from helpers.checkpointing import PlanFault
from helpers.timeline import tensors_in

Loss = Callable[..., torch.Tensor]


class Misfit(ValueError):
    """A model, its batch and its loss do not fit together; says where and why."""


def training_step(
    model: nn.Module,
    batch: object,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    autocast: torch.dtype | None = None,
) -> Callable[..., None]:
    """Make a training step: zero_grad, forward, loss, backward, optimizer's step.

    Args:
        batch: ``x`` or ``(x, target)``; an ``x`` that is a dict holds the keyword
            arguments of the model's forward.
        loss: called with the output, and the target where there is one; default:
            cross-entropy with a target, ``output.sum()`` without. Of several outputs
            these take the one called loss, the first, or the sum of all.
        autocast: the lower precision of forward and loss, if they run in one.

    Raises:
        ValueError: if the batch is no such pair; from the step, a Misfit.
    """
    x, targets = _parts(batch)
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"autocast is torch.bfloat16, torch.float16 or None, not {autocast!r}"
        )
    loss = loss or (_cross_entropy if targets else _total)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        for tensor in tensors_in([x, *targets]):
            if tensor.is_leaf:
                tensor.grad = None
        # The output stays until the step is over, as in a loop written by hand.
        output, value = _forward(model, x, targets, loss, autocast)
        torch.autograd.backward(value)
        if optimizer:
            optimizer.step()

    return step


def _parts(batch: object) -> tuple[object, tuple]:
    """Part the model's input from the target, which may be none."""
    if isinstance(batch, torch.Tensor | dict):
        return batch, ()
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], (batch[1],)
    raise ValueError("a batch is a tensor x or a pair (x, target)")


def _forward(
    model: nn.Module,
    x: object,
    targets: tuple,
    loss: Loss,
    autocast: torch.dtype | None,
) -> tuple[object, torch.Tensor]:
    """Run forward and loss; a failure of theirs says where it was."""
    try:
        with _precision([x, *targets], autocast):
            output = model(**x) if isinstance(x, dict) else model(x)
            value = loss(output, *targets)
    except (RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error) or isinstance(error, NotImplementedError):
            raise
        raise Misfit(_misfit(error, model, x, targets)) from None
    if not value.requires_grad:
        raise Misfit(
            "the loss does not depend on anything that requires a gradient, so "
            "there is no backward pass to look at"
        )
    return output, value


def _precision(
    batch: object, autocast: torch.dtype | None
) -> contextlib.AbstractContextManager:
    """Make the block that forward and loss run in; meta tensors are cast as a CPU's."""
    if autocast is None:
        return contextlib.nullcontext()
    on_gpu = any(tensor.is_cuda for tensor in tensors_in(batch))
    return torch.autocast("cuda" if on_gpu else "cpu", dtype=autocast)


def _total(output: object) -> torch.Tensor:
    """Sum an output; of several, what the model calls its loss, or all of them."""
    if isinstance(output, torch.Tensor):
        return torch.sum(output)
    if isinstance(output, dict) and output.get("loss") is not None:
        return output["loss"]
    tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if not tensors:
        raise ValueError("there is nothing in the output that requires a gradient")
    return torch.stack([torch.sum(tensor) for tensor in tensors]).sum()


def _cross_entropy(output: object, target: torch.Tensor) -> torch.Tensor:
    """Take cross-entropy of the first output; classes may come last, as words do."""
    output = next(tensors_in(output))
    classes_second = (output.shape[0], *output.shape[2:])
    if target.shape != classes_second and target.shape == output.shape[:-1]:
        output, target = output.flatten(0, -2), target.flatten()
    return nn.functional.cross_entropy(output, target)


def _misfit(error: Exception, model: nn.Module, x: object, targets: tuple) -> str:
    """Say which layer refused the batch, and why."""
    if isinstance(error, PlanFault):
        return str(error)
    where = failing_layer(error, model) or "the loss"
    shapes = " and target ".join(_shapes(part) for part in (x, *targets))
    reason = str(error).strip().splitlines()[0].rstrip(".")
    if "meta tensor" in reason:
        return (
            f"{where} looks at values, and a prediction has none ({reason}); measure it"
        )
    if "device meta" in reason:
        return (
            f"{where} refers to a real tensor, or to another model than the one it is "
            f"in, which a copy without data cannot use ({reason}); store "
            "types.MethodType(function, module) as its forward, or give a function "
            "that makes the model"
        )
    return f"a batch of shape {shapes} does not fit this model at {where}: {reason}"


def failing_layer(error: Exception, model: nn.Module) -> str:
    """Name the innermost module on an error's traceback; nothing if there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    where, trace = "", error.__traceback__
    while trace:
        name = names.get(id(trace.tb_frame.f_locals.get("self")))
        if name is not None:
            where = f"layer {name!r}" if name else "its own forward"
        trace = trace.tb_next
    return where


def _shapes(part: object) -> str:
    """Say the shape of a tensor; of a dict, each one with its name."""
    if isinstance(part, dict):
        return ", ".join(f"{name}: {_shapes(value)}" for name, value in part.items())
    return str(tuple(getattr(part, "shape", ())))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocator, CUDA's or the CPU's, refused."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
