"""Whether a plan leaves a training step as it is: both are run, and compared.

No look at a model can promise that. What a segment changes besides its output it
changes twice, and what it reads may be another by the time of backward; nothing in
``torch.utils.checkpoint`` notices either.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from helpers.checkpointing import Plan, Undo
from helpers.dry_run import GivenOptimizer
from helpers.measure.device import free_memory, too_large, usable_device
from helpers.measure.faults import NO_BACKWARD, Misfit, is_out_of_memory
from helpers.measure.measured import Run, Setting
from helpers.measure.step import Loss, Step
from helpers.timeline import local, tensors_in

Tensors = dict[str, torch.Tensor]
VERIFYING_STEPS = 3  # without the plan, with it, and once more without
ROOM = 4  # how many times its own spread a step may differ that never equals itself


@dataclass(frozen=True)
class Verification:
    """What differs under a plan: names, with the relative error of each.

    ``buffers`` are compared after the step, tensors in other attributes among them.
    """

    plan: Plan
    gradients: dict[str, float]
    buffers: dict[str, float]
    reproducible: bool  # whether the step without the plan equals itself, bit by bit
    device: str

    @property
    def same(self) -> bool:
        """Whether nothing differs; within the step's own spread if it has one."""
        return not self.gradients and not self.buffers

    def __str__(self) -> str:
        wrong = [
            f"{kind} differ: {_listed(found)}"
            for kind, found in (
                ("gradients", self.gradients),
                ("buffers", self.buffers),
            )
            if found
        ]
        exact = "bit by bit" if self.reproducible else "within the step's own spread"
        told = "; ".join(wrong) or f"gradients and buffers as without, {exact}"
        if self.reproducible:
            return told
        return f"{told} (without the plan, too, the step does not equal itself)"


def _listed(found: dict[str, float], most: int = 3) -> str:
    worst = sorted(found, key=found.get, reverse=True)
    listed = ", ".join(f"{name} (by {found[name]:.2g})" for name in worst[:most])
    return listed + (f" and {len(worst) - most} more" if len(worst) > most else "")


def verify(
    model: nn.Module,
    batch: object,
    plan: Plan,
    *,
    loss: Loss | None = None,
    optimizer: GivenOptimizer = None,
    autocast: torch.dtype | None = None,
    step: Step | None = None,
    device: str | None = None,
    **checkpoint_options,
) -> Verification:
    """Run a training step with and without a plan, and compare what comes of it.

    >>> from helpers.models import MLP
    >>> model, x = MLP([64, 64, 10], "gelu"), torch.randn(256, 64)
    >>> print(verify(model, x, Plan.alone(["layer1"])))
    gradients and buffers as without, bit by bit

    Both begin from the same state and the same random numbers, and all is put back. The
    relative error of a gradient is the norm of the difference, in norms of what it is
    without the plan.

    Args:
        model, batch, plan, loss, optimizer, autocast, step, device: as in ``measure``.
        checkpoint_options: see ``checkpointed``.

    Raises:
        ValueError: if the plan, the batch or the device does not fit.
        torch.OutOfMemoryError: if the step does not fit into the device's memory.
    """
    how = {"loss": loss, "optimizer": optimizer, "autocast": autocast, "step": step}
    how |= {"device": device, **checkpoint_options}
    verifying = verifying_plan(model, batch, plan, **how)
    while True:
        try:
            next(verifying)
        except StopIteration as finished:
            return finished.value


def verifying_plan(
    model: nn.Module, batch: object, plan: Plan, **options
) -> Generator[None, None, Verification]:
    """Verify as ``verify`` does, one training step for each ``next``."""
    setting = Setting.of(**options)
    device, outcomes = usable_device(model, setting.device), []
    try:
        for tried in (Plan(), plan, Plan()):
            yield
            outcomes.append(_outcome(model, batch, tried, device, setting))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        outcomes.clear()
    if not outcomes:  # the failed step's tensors hang on the error, which is gone here
        free_memory(device)
        raise torch.OutOfMemoryError(too_large(device, 0))
    (plain, with_plan, again) = outcomes
    found = [_differing(*kinds) for kinds in zip(plain, with_plan, again, strict=True)]
    own = [_differing(one, two) for one, two in zip(plain, again, strict=True)]
    return Verification(plan, *found, reproducible=not any(own), device=device)


def _outcome(
    model: nn.Module, batch: object, plan: Plan, device: str, setting: Setting
) -> tuple[Tensors, Tensors]:
    """Run one step: the gradients that parameters were given, and buffers after it."""
    with setting.placed(model, batch, device) as (model, batch, there):
        run, gradients = Run(model, batch, device, there), {}
        with Undo() as undo:
            for name, leaf in (*model.named_parameters(), *_inputs(batch)):
                if leaf.requires_grad:
                    note = _noting(gradients, name)
                    undo.callback(leaf.register_hook(note).remove)
            with run.applied(plan):
                run.step()
        for name, parameter in model.named_parameters():
            if name not in gradients and parameter.grad is not None:
                _noting(gradients, name)(local(parameter.grad))  # sharded: no hook ran
        if not gradients:
            raise Misfit(NO_BACKWARD)
        return gradients, _state(model)


def _inputs(batch: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Name the tensors of a batch, which may be what is trained."""
    for place, tensor in enumerate(tensors_in(batch)):
        yield f"batch[{place}]", tensor


def _noting(gradients: Tensors, name: str):
    """Make a hook that adds up a parameter's gradients, as they come, on the host."""

    def note(gradient: torch.Tensor) -> None:
        dense = gradient.detach().to_dense() if gradient.is_sparse else gradient
        copied = dense.detach().to("cpu", copy=True)
        before = gradients.get(name)
        gradients[name] = copied if before is None else before + copied

    return note


def _state(model: nn.Module) -> Tensors:
    """Copy the tensors that modules hold, except parameters, to the host."""
    held = {
        f"{owner}.{name}".lstrip("."): value
        for owner, module in model.named_modules()
        for name, value in {**vars(module), **module._buffers}.items()
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
    }
    return {name: value.detach().to("cpu", copy=True) for name, value in held.items()}


def _differing(
    plain: Tensors, other: Tensors, again: Tensors | None = None
) -> dict[str, float]:
    """Find what differs from a step without plan by more than that from itself."""
    errors = {name: _error(plain.get(name), other.get(name)) for name in plain | other}
    if again is not None:
        for name, error in errors.items():
            if error <= ROOM * _error(plain.get(name), again.get(name)):
                errors[name] = 0.0
    return {name: error for name, error in errors.items() if error}


def _error(right: torch.Tensor | None, other: torch.Tensor | None) -> float:
    """Take the relative error: 0 for equal bits, infinite where one is missing."""
    if right is None or other is None or right.shape != other.shape:
        return float("inf")
    if torch.allclose(right, other, rtol=0, atol=0, equal_nan=True):
        return 0.0
    difference = (right.double() - other.double()).norm()
    return (difference / right.double().norm()).nan_to_num(float("inf")).item()
