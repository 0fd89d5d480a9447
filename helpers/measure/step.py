"""One training step, as every number in this workbook means it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from helpers.timeline import tensors_in

Loss = Callable[..., torch.Tensor]
Step = Callable[[nn.Module, object, torch.optim.Optimizer | None], object]


def training_step(
    model: nn.Module,
    batch: object,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    autocast: torch.dtype | None = None,
    step: Step | None = None,
) -> Callable[[], None]:
    """Make a training step: zero_grad, forward, loss, backward, optimizer's step.

    Args:
        batch: ``x`` or ``(x, target)``; an ``x`` that is a dict holds the keyword
            arguments of the model's forward.
        loss: called with the output, and the target where there is one; default:
            cross-entropy with a target, ``output.sum()`` without. Of several outputs
            these take the one called loss, the first, or the sum of all.
        autocast: the lower precision of forward and loss, if they run in one.
        step: another step instead, called with model, batch and optimizer; it has its
            own loss and autocast, and its batch may be anything.

    Raises:
        ValueError: if the batch is no such pair; from the step, a Misfit.
    """
    if step is not None:
        from helpers.measure.own_step import checked_step

        return checked_step(step, model, batch, optimizer, loss, autocast)
    x, targets = _parts(batch)
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"autocast is torch.bfloat16, torch.float16 or None, not {autocast!r}"
        )
    if not (loss is None or callable(loss)) or isinstance(loss, type):
        raise ValueError(f"loss is called with the output, and {loss!r} is no function")
    if getattr(type(model), "forward", None) is nn.Module.forward:
        raise ValueError(
            f"a {type(model).__name__} has no forward; give a step that calls its parts"
        )
    loss = loss or (_cross_entropy if targets else _total)
    return _usual_step(model, x, targets, loss, optimizer, autocast)


def _usual_step(
    model: nn.Module,
    x: object,
    targets: tuple,
    loss: Loss,
    optimizer: torch.optim.Optimizer | None,
    autocast: torch.dtype | None,
) -> Callable[[], None]:
    def usual_step() -> None:
        model.zero_grad(set_to_none=True)
        for tensor in tensors_in([x, *targets]):
            if tensor.is_leaf:
                tensor.grad = None
        # The output stays until the step is over, as in a loop written by hand.
        with told(model, (x, *targets), "the loss"):
            with _precision([x, *targets], autocast):
                output = model(**x) if isinstance(x, dict) else model(x)
                value = loss(output, *targets)
            _check_loss(value)
        with told(model, (x, *targets), "backward"):
            torch.autograd.backward(value)
        if optimizer:
            with told(model, (x, *targets), "the optimizer"):
                optimizer.step()

    return usual_step


def _parts(batch: object) -> tuple[object, tuple]:
    """Part the model's input from the target, which may be none."""
    if isinstance(batch, torch.Tensor):
        return batch, ()
    if isinstance(batch, Mapping):
        return dict(batch), ()
    if isinstance(batch, tuple | list) and len(batch) == 2 and batch[1] is not None:
        x, target = batch
        return dict(x) if isinstance(x, Mapping) else x, (target,)
    held = ""
    if isinstance(batch, tuple | list):
        held = f"({', '.join(type(part).__name__ for part in batch)})"
    raise ValueError(
        "a batch is a tensor x, a dict of the model's arguments, or a pair (x, target) "
        f"or (dict, target), not {held or type(batch).__name__}; give "
        "step=lambda model, batch, optimizer: … for one that is taken apart otherwise"
    )


@contextlib.contextmanager
def told(model: nn.Module, parts: tuple, doing: str) -> Iterator[None]:
    """Say in one sentence what fails inside a block, and where."""
    try:
        yield
    except Exception as error:
        from helpers.measure.faults import is_out_of_memory, misfit

        if is_out_of_memory(error):
            raise
        raise misfit(error, model, parts, doing) from None


def _check_loss(value: object) -> None:
    """Raise a Misfit unless backward can begin here."""
    wrong = ""
    if not isinstance(value, torch.Tensor):
        wrong = f"a loss is a tensor, and this one returned a {type(value).__name__}"
    elif value.numel() != 1:
        wrong = (
            f"a loss is one number, and this one has the shape {tuple(value.shape)}; "
            "take its mean or its sum"
        )
    elif not value.requires_grad:
        wrong = (
            "the loss does not depend on anything that requires a gradient, so "
            "there is no backward pass to look at"
        )
    if wrong:
        from helpers.measure.faults import Misfit

        raise Misfit(wrong)


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
    tensors = list(tensors_in(output))
    if not tensors:
        from helpers.measure.faults import unknown_output

        raise unknown_output(output)
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not tensors:
        raise ValueError("there is nothing in the output that requires a gradient")
    return torch.stack([torch.sum(tensor) for tensor in tensors]).sum()


def _cross_entropy(output: object, target: torch.Tensor) -> torch.Tensor:
    """Take cross-entropy of the first output; classes may come last, as words do."""
    output = next(tensors_in(output), output)
    if not isinstance(output, torch.Tensor):
        from helpers.measure.faults import unknown_output

        raise unknown_output(output)
    classes_second = (output.shape[0], *output.shape[2:])
    if target.shape != classes_second and target.shape == output.shape[:-1]:
        output, target = output.flatten(0, -2), target.flatten()
    return nn.functional.cross_entropy(output, target)
