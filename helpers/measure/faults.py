"""What went wrong in a training step, in one sentence: where, and what would be right.

Not imported before something does.
"""

import dataclasses

import torch
from torch import nn
from torch.utils import checkpoint

from helpers.checkpointing import PlanFault


class Misfit(ValueError):
    """A model, its batch and its step do not fit together; says where and why."""


NO_BACKWARD = (
    "the step never calls backward, so there is nothing to recompute and nothing to "
    "compare; a step is a whole one, with loss.backward()"
)
NO_VALUES = "and a prediction has none"  # a Misfit with this is not of the model


def misfit(error: Exception, model: nn.Module, parts: tuple, doing: str) -> Misfit:
    """Make the sentence on what a step has raised.

    Args:
        parts: of the batch.
        doing: what was being done, if it was no layer that failed.
    """
    if isinstance(error, PlanFault | Misfit):
        return Misfit(str(error))
    where = failing_layer(error, model) or doing
    reason = first_line(error)
    imagined = any(parameter.is_meta for parameter in model.parameters())
    no_kernel = isinstance(error, NotImplementedError) and imagined
    if no_kernel and "storage of Sparse" in reason:
        return Misfit(
            f"{where} makes a sparse tensor, whose bytes depend on values, "
            f"{NO_VALUES}; measure it"
        )
    if no_kernel or "meta tensor" in reason:
        return Misfit(f"{where} looks at values, {NO_VALUES} ({reason}); measure it")
    if "device meta" in reason:
        return Misfit(
            f"{where} refers to a real tensor, or to another model than the one it is "
            f"in, which a copy without data cannot use ({reason}); store "
            "types.MethodType(function, module) as its forward, or give a function "
            "that makes the model"
        )
    if _is_run_again(error):
        who = "a segment" if where == doing else where
        return Misfit(
            f"{who} cannot be run again in backward: {reason}; what it reads has "
            "changed since forward, and inspect_model(…).hazards says what"
        )
    if doing != "the loss" and where == doing:
        more = "; give a step=… that calls it" * ("'closure'" in reason)
        return Misfit(f"{where} fails: {reason}{more}")
    shapes = " and target ".join(map(_shapes, parts))
    return Misfit(
        f"a batch of shape {shapes} does not fit this model at {where}: {reason}"
    )


def _is_run_again(error: Exception) -> bool:
    """Say whether a checkpoint was recomputing when it came, or has compared."""
    if isinstance(error, checkpoint.CheckpointError):
        return True
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_name != "recompute_fn":
        trace = trace.tb_next
    return trace is not None


def first_line(error: BaseException) -> str:
    """Take an error's first line, with its kind where that says what the line means."""
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else "no reason given"
    told = isinstance(error, RuntimeError | TypeError | ValueError) and lines
    return reason if told else f"{type(error).__name__}: {reason}"


def failing_layer(error: BaseException, model: nn.Module) -> str:
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


def unknown_output(output: object) -> ValueError:
    """Say that the losses taken by default cannot be taken of an output."""
    kind = type(output).__name__
    fields = [f.name for f in dataclasses.fields(output)] * bool(
        dataclasses.is_dataclass(output)
    )
    own = "loss" if "loss" in fields else (fields or ["…"])[0]
    return Misfit(
        f"give a loss, such as loss=lambda out: out.{own}: the model returns a {kind}, "
        "which is no tensor, tuple, list or dict of them"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocator, CUDA's or the CPU's, refused."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
