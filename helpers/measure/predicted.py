"""Predict what a training step needs, on meta tensors, which have no data.

The same step is run as a device runs it, so that shapes and lifetimes, and with them
the bytes, are the same.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from helpers.allocator import scratch_on
from helpers.checkpointing import Plan, checkpointed
from helpers.dry_run import (
    RememberedShapes,
    kernels_of,
    like_cuda,
    meta_batch,
    meta_model,
)
from helpers.dry_run.autocast import autocast_on_meta, without_autocast
from helpers.measure._cpu_limit import uncounted
from helpers.measure.report import StepReport
from helpers.measure.step import Loss, training_step
from helpers.timeline import Timeline, record_timeline

OptimizerFactory = Callable[..., torch.optim.Optimizer]
_shapes = RememberedShapes()


@uncounted()
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

    Args:
        model_or_factory: a model on any device, left as it is, or a function that
            makes one.
        batch: ``x`` or ``(x, target)``, where ``x`` may be a dict of keyword
            arguments; tensors on any device, the meta one included.
        plan: which layers are checkpointed.
        loss: called with the output, and the target where there is one; default:
            cross-entropy with a target, ``output.sum()`` without.
        optimizer: called with the parameters, e.g. ``torch.optim.AdamW``.
        autocast: the lower precision in which autocast runs forward and loss, if any.
        device: "cpu" or "cuda", whose kernels and defaults are assumed.
        checkpoint_options: see ``checkpointed``.

    Raises:
        ValueError: if the plan, the batch or the device does not fit.
    """
    device = torch.device(device).type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"predict knows 'cpu' and 'cuda', not {device!r}")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model, batch = meta_model(model_or_factory), meta_batch(batch)
        made = optimizer(model.parameters()) if optimizer else None
        if made and device == "cuda":
            like_cuda(made)
        step = training_step(model, batch, loss, made, autocast)
        # What the host keeps, an optimizer's step count say, is no GPU memory.
        devices = ("meta",) if device == "cuda" else ("meta", "cpu")
        record = {"batch": batch, "optimizer": made, "devices": devices}
        record |= {"run": _shapes, "scratch": scratch_on(device)}
        cast = contextlib.nullcontext()
        if autocast:
            cast, record["run"] = autocast_on_meta(device), without_autocast(_shapes)
        with checkpointed(model, plan, **checkpoint_options), kernels_of(device), cast:
            if made:
                record_timeline(step, model, **record)  # makes the optimizer's state
            timeline = record_timeline(step, model, **record)
        model.zero_grad(set_to_none=True)
    return report_of(timeline, plan, device, "predicted")


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
