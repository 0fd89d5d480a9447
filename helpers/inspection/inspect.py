"""Look inside any model: what can be ticked, what it keeps, what is not safe.

One dry run on meta tensors tells it all, so a model of any size will do, and nothing is
allocated. A module can be ticked if its forward is called.
"""

import copy
from collections.abc import Callable

from torch import nn

from helpers.checkpointing import Plan
from helpers.dry_run import as_on, meta_batch, meta_model
from helpers.inspection._calls import Calls
from helpers.inspection._hazards import random_states_kept
from helpers.inspection.tree import Inspection, Layer
from helpers.measure import Loss, Misfit, failing_layer, report_of, training_step
from helpers.timeline import Timeline


def inspect_model(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    batch: object,
    *,
    loss: Loss | None = None,
    device: str = "cuda",
) -> Inspection:
    """Run one step on meta tensors, and tell what is inside the model.

    >>> import torch
    >>> from helpers.models import MLP
    >>> print(inspect_model(MLP([1024, 1024, 10], "gelu"), torch.empty(8192, 1024)))
    module  class            kept      forward
    layer1  Sequential   64.0 MiB   17.2 GFLOP
    layer2  Linear      320.0 KiB  167.8 MFLOP

    The arguments are those of ``predict``. The model is left as it is, Python's and
    NumPy's random numbers too.

    Raises:
        ValueError: if the model has no parameters, fails, looks at values, or returns
            nothing that requires a gradient; names the module.
    """
    with as_on(device) as imagined, random_states_kept():
        model, batch = _copied(model_or_factory), meta_batch(batch)
        step, calls = training_step(model, batch, loss), Calls(model)
        try:
            with calls.watching():
                timeline = imagined.record(step, model, batch, observers=[calls])
        except Exception as error:
            raise ValueError(_failure(error, model)) from None
    chains, breaks = calls.chains()
    return Inspection(
        model=type(model).__name__,
        layers=_layers(calls, timeline),
        chains=tuple(chains),
        breaks=breaks,
        hazards=tuple(calls.hazards.found),
        report=report_of(timeline, Plan(), imagined.device, "predicted"),
    )


def _copied(model_or_factory: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Copy a model that has something to train to the meta device."""
    model = meta_model(model_or_factory)
    if model is model_or_factory:
        model = copy.deepcopy(model)  # a forward may change more than tensors
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"{type(model).__name__} has no parameters, so there is nothing to train "
            "or to checkpoint"
        )
    return model


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


def _failure(error: Exception, model: nn.Module) -> str:
    """Say in one sentence why a step could not be run."""
    name = type(model).__name__
    reason = str(error).strip().splitlines()[0] if str(error) else "no reason given"
    if "requires a grad" in reason or "require a grad" in reason:
        return f"{name} returns nothing that requires a gradient: {reason}"
    if isinstance(error, Misfit):
        return reason
    where = failing_layer(error, model) or "its backward"
    if isinstance(error, NotImplementedError):
        return (
            f"{name} cannot be run without data: {where} uses an operator whose "
            "result depends on values; measure it"
        )
    return f"{name} fails at {where}: {type(error).__name__}: {reason}"
