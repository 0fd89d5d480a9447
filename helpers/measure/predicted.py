"""Predict what a training step needs, on meta tensors, which have no data.

The same step is run as a device runs it, so that shapes and lifetimes, and with them
the bytes, are the same.
"""

from collections.abc import Callable

import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.dry_run import as_on, meta_batch, meta_model
from helpers.measure.report import StepReport
from helpers.measure.step import Loss, training_step
from helpers.timeline import Timeline

OptimizerFactory = Callable[..., torch.optim.Optimizer]


def predict(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    batch: object,
    plan: Plan = Plan(),
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    autocast: torch.dtype | None = None,
    device: str = "cuda",
    **checkpoint_options,
) -> StepReport:
    """Predict the bytes and FLOPs of one training step; allocates nothing.

    >>> from helpers.models import uniform_mlp
    >>> x = torch.empty(8192, 1024, device="meta")  # a shape without data
    >>> predict(uniform_mlp, x, Plan.alone(["layer4"])).peak_bytes
    604424192

    Args:
        model_or_factory: a model on any device, left as it is, or what makes one.
        batch: ``x`` or ``(x, target)`` on any device; ``x`` may be a dict of keywords.
        loss: called with the output, and the target where there is one; default:
            cross-entropy with a target, ``output.sum()`` without.
        optimizer: called with the parameters, e.g. ``torch.optim.AdamW``.
        autocast: the lower precision in which autocast runs forward and loss, if any.
        device: "cpu" or "cuda", whose kernels and defaults are assumed.
        checkpoint_options: see ``checkpointed``.

    Raises:
        ValueError: if the plan, the batch or the device does not fit.
    """
    with as_on(device, autocast) as imagined:
        model, batch = meta_model(model_or_factory), meta_batch(batch)
        made = imagined.optimizer(optimizer, model)
        step = training_step(model, batch, loss, made, autocast)
        with checkpointed(model, plan, **checkpoint_options):
            for _ in range(2 if made else 1):  # the first makes the optimizer's state
                timeline = imagined.record(step, model, batch, made)
        model.zero_grad(set_to_none=True)
    return report_of(timeline, plan, imagined.device, "predicted")


def report_of(timeline: Timeline, plan: Plan, device: str, source: str) -> StepReport:
    """Read a report off a timeline; it has no time in it."""
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
        allocator_peak_bytes=timeline.allocator_peak_bytes,
        timeline=timeline,
    )
