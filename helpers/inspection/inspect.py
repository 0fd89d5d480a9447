"""Look inside any model: what can be ticked, what it keeps, what is not safe.

One dry run on meta tensors tells it all, so a model of any size will do, and nothing is
allocated. A module can be ticked if its forward is called.
"""

from collections.abc import Callable

import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.dry_run import GivenOptimizer, as_on
from helpers.inspection._again import hazards_in
from helpers.inspection._calls import Calls
from helpers.inspection._hazards import Hazard
from helpers.inspection.tree import Inspection, Layer
from helpers.measure import Loss, Step, StepReport, report_of, training_step
from helpers.timeline import Timeline


def inspect_model(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    batch: object,
    *,
    loss: Loss | None = None,
    optimizer: GivenOptimizer = None,
    autocast: torch.dtype | None = None,
    step: Step | None = None,
    device: str = "cuda",
    gpu: str | None = None,
) -> Inspection:
    """Run one step on meta tensors, and tell what is inside the model.

    >>> import torch
    >>> from helpers.models import MLP
    >>> print(inspect_model(MLP([1024, 1024, 10], "gelu"), torch.empty(8192, 1024)))
    module  class            kept      forward
    layer1  Sequential   64.0 MiB   17.2 GFLOP
    layer2  Linear      320.0 KiB  167.8 MFLOP

    The arguments are those of ``predict``. The model is left as it is.

    Raises:
        ValueError: if the model has no parameters, fails, looks at values, or returns
            nothing that requires a gradient; names the module.
    """
    with as_on(device, autocast, gpu) as imagined:
        given = model_or_factory, batch, loss, step
        model, batch, loss, step = imagined.stand_ins(*given)
        _check_trains(model)
        made = imagined.optimizer(optimizer, model)
        run = training_step(model, batch, loss, made, autocast, step)
        hazards, calls = hazards_in(run, model, imagined.run), Calls(model)
        if made or step:  # the first makes what stays
            imagined.record(run, model, batch, made)
        timeline = imagined.record(run, model, batch, made, [calls])
    report = report_of(timeline, Plan(), imagined.device, "predicted")
    return _inspection(calls, hazards, report)


def _inspection(calls: Calls, hazards: list[Hazard], report: StepReport) -> Inspection:
    chains, breaks = calls.chains()
    return Inspection(
        model=type(calls.model).__name__,
        layers=_layers(calls, report.timeline),
        chains=tuple(chains),
        breaks=breaks,
        hazards=tuple(hazards),
        report=report,
    )


def _check_trains(model: nn.Module) -> None:
    """Refuse a model without anything to train."""
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"{type(model).__name__} has no parameters, so there is nothing to train "
            "or to checkpoint"
        )


def _layers(calls: Calls, timeline: Timeline) -> dict[str, Layer]:
    """Say of every module that was called what it is, keeps and costs."""
    kept = kept_by_module(timeline)
    return {
        name: Layer(
            name,
            type(module).__name__,
            len(calls.feeds.calls[name]),
            kept.get(name, 0),
            calls.flops.get(name, 0),
        )
        for name, module in calls.model.named_modules()
        if name and name in calls.feeds.calls
    }


def kept_by_module(timeline: Timeline) -> dict[str, int]:
    """Bytes that each module, with all that lies in it, leaves alive for backward."""
    kept: dict[str, int] = {}
    for kind, allocation, _, _ in timeline.events:
        if kind == "alloc" and allocation.category == "activation":
            name = allocation.module
            while name:
                kept[name] = kept.get(name, 0) + allocation.bytes
                name = name.rpartition(".")[0]
    return kept
