"""A training step of the reader's own: ``step(model, batch, optimizer)``, checked."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from helpers.checkpointing import Undo
from helpers.measure.faults import Misfit
from helpers.measure.step import Loss, Step, told


def checked_step(
    step: Step,
    model: nn.Module,
    batch: object,
    optimizer: torch.optim.Optimizer | None,
    loss: Loss | None,
    autocast: torch.dtype | None,
) -> Callable[[], None]:
    """Make one run of it, which says in a sentence what is wrong with it.

    Raises:
        ValueError: if there is a loss or an autocast beside it; from the step, a
            Misfit, also if it changes the model's structure, or updates twice.
    """
    if not callable(step):
        raise ValueError(
            "step is a function that is called with model, batch and optimizer, not "
            f"a {type(step).__name__}"
        )
    if loss is not None or autocast is not None:
        raise ValueError(
            "a step of your own has its loss and its autocast inside: leave out loss= "
            "and autocast="
        )
    parts = batch if isinstance(batch, tuple) else (batch,)

    def run() -> None:
        updates: list[object] = []
        before = _structure(model)
        with Undo() as undo:
            if optimizer is not None:
                count = functools.partial(_count, updates)
                undo.callback(optimizer.register_step_post_hook(count).remove)
            with told(model, parts, "the step"):
                step(model, batch, optimizer)
        _check(len(updates), before, _structure(model))

    return run


def _check(n_updates: int, before: list, after: list) -> None:
    """Raise a Misfit if a step was more than one, or changed the model's structure."""
    if n_updates > 1:
        raise Misfit(
            f"the step calls optimizer.step() {n_updates} times; a step ends with one "
            "update, so give what lies between two of them"
        )
    if after != before:
        raise Misfit(
            "the step changes which modules or parameters the model has; make the "
            "model as it is to be first, and give that"
        )


def _count(updates: list[object], *_: object) -> None:
    updates.append(None)


def _structure(model: nn.Module) -> list[tuple[str, int]]:
    """List the model's modules and parameters."""
    named = [*model.named_modules(), *model.named_parameters()]
    return [(name, id(value)) for name, value in named]
