"""Predict what a training step needs, on meta tensors, which have no data.

The same step is run as a device runs it, so that shapes and lifetimes, and with them
the bytes, are the same.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

from helpers.allocator import Gpu, this_gpu
from helpers.checkpointing import Plan, checkpointed
from helpers.dry_run import GivenOptimizer, Imagined, as_on
from helpers.measure.report import StepReport
from helpers.measure.step import Loss, Step, training_step
from helpers.timeline import Timeline


def predict(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    batch: object,
    plan: Plan = Plan(),
    *,
    loss: Loss | None = None,
    optimizer: GivenOptimizer = None,
    autocast: torch.dtype | None = None,
    step: Step | None = None,
    device: str = "cuda",
    gpu: str | None = None,
    **checkpoint_options,
) -> StepReport:
    """Predict the bytes and FLOPs of one training step; allocates nothing.

    >>> from helpers.models import uniform_mlp
    >>> x = torch.empty(8192, 1024, device="meta")  # a shape without data
    >>> predict(uniform_mlp, x, Plan.alone(["layer4"])).peak_bytes
    604424192

    Args:
        model_or_factory: a model on any device, left as it is, or what makes one.
        batch, loss, autocast, step: as in ``training_step``, on any device.
        optimizer: called with the parameters, as ``torch.optim.AdamW``; or the model's.
        device: "cpu" or "cuda", whose kernels and defaults are assumed.
        gpu: for which CUDA card, as "A100"; default: this machine's, or else an H100.
        checkpoint_options: see ``checkpointed``.

    Raises:
        ValueError: if the plan, the batch or the device does not fit.
    """
    with as_on(device, autocast, gpu) as imagined:
        given = model_or_factory, batch, loss, step
        model, batch, loss, step = imagined.stand_ins(*given)
        made = imagined.optimizer(optimizer, model)
        run = training_step(model, batch, loss, made, autocast, step)
        with checkpointed(model, plan, **checkpoint_options):
            first, timeline = _recorded(imagined, run, model, batch, made, step)
        unknown = imagined.unknown(timeline)
        return report_of(timeline, plan, imagined.device, "predicted", unknown, first)


def _recorded(
    imagined: Imagined, run: Callable, model: nn.Module, batch, made, step
) -> tuple[Timeline, Timeline]:
    """Record the first step, and one that is like all that follow."""
    first = imagined.record(run, model, batch, made)
    if made or step or _leaves(first):
        return first, imagined.record(run, model, batch, made)
    return first, first


def _leaves(timeline: Timeline) -> bool:
    """Say whether a step leaves anything but gradients, such as what a model caches."""
    gone = {event.allocation for event in timeline.events if event.kind == "free"}
    left = {event.allocation for event in timeline.events} - gone
    return any(allocation.category != "gradient" for allocation in left)


def report_of(
    timeline: Timeline,
    plan: Plan,
    device: str,
    source: str,
    unknown: tuple[str, ...] = (),
    first: Timeline | None = None,
) -> StepReport:
    """Read a report off a timeline; it has no time in it.

    Args:
        unknown: operators whose memory is a library's own choice.
        first: the first step of all, if that is another.

    Raises:
        ValueError: if there is no backward in it.
    """
    if timeline.forward_end == len(timeline.events):
        from helpers.measure.faults import NO_BACKWARD, Misfit

        raise Misfit(NO_BACKWARD)
    count = None
    if (device, source) == ("cuda", "predicted"):
        count = functools.partial(_counted, (first or timeline, timeline), this_gpu())
    return StepReport(
        peak_bytes=timeline.peak_bytes,
        after_forward_bytes=timeline.after_forward_bytes,
        baseline_bytes=timeline.baseline_bytes,
        categories=timeline.at_peak().categories,
        step_ms=None,
        step_ms_quartiles=None,
        forward_flops=timeline.flops["forward"],
        recompute_flops=timeline.flops["recompute"],
        device=device,
        source=source,
        plan=plan,
        timeline=timeline,
        count=count,
        unknown=unknown,
    )


def _counted(steps: tuple[Timeline, Timeline], gpu: Gpu) -> dict[str, int]:
    from helpers.allocator.replay import counted  # when it is asked for

    return counted(steps, gpu)
