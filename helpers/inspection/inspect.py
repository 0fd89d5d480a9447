"""Look inside any model: what can be ticked, what it keeps, what is not safe.

One dry run on meta tensors tells it all, so a model of any size will do, and nothing is
allocated. A module can be ticked if its forward is called.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

from helpers.allocator import scratch_on
from helpers.checkpointing import Plan
from helpers.dry_run import kernels_of, meta_batch, meta_model
from helpers.inspection._calls import Calls
from helpers.inspection._hazards import random_states, restore_random_states
from helpers.inspection.tree import Inspection, Layer
from helpers.measure import Loss, Misfit, failing_layer, report_of, training_step
from helpers.timeline import Timeline, record_timeline

__all__ = ["Inspection", "Layer", "inspect_model", "kept_by_module"]


def inspect_model(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    batch: object,
    *,
    loss: Loss | None = None,
    device: str = "cuda",
) -> Inspection:
    """Run one step on meta tensors, and tell what is inside the model.

    Args:
        model_or_factory, batch, loss, device: as in ``predict``. The model is left as
            it is, Python's and NumPy's random numbers too.

    Raises:
        ValueError: if the model has no parameters, fails, looks at values, or returns
            nothing that requires a gradient; names the module.
    """
    model = meta_model(model_or_factory)
    if model is model_or_factory:
        model = copy.deepcopy(model)  # a forward may change more than tensors
    name = type(model).__name__
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"{name} has no parameters, so there is nothing to train or to checkpoint"
        )
    batch, states = meta_batch(batch), random_states()
    calls = Calls(model)
    step = training_step(model, batch, loss)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), calls.watching():
            with kernels_of(device):
                how = {"run": calls.run, "scratch": scratch_on(device)}
                timeline = record_timeline(
                    step, model, batch=batch, devices=("meta",), **how
                )
    except Exception as error:
        raise ValueError(_failure(error, model, name)) from None
    finally:
        restore_random_states(states)
    chains, breaks = calls.links()
    kept, flops = kept_by_module(timeline), calls.flops
    layers = {
        module: Layer(
            module,
            type(model.get_submodule(module)).__name__,
            calls.counts[module],
            kept.get(module, 0),
            flops.get(module, 0),
        )
        for module, _ in model.named_modules()
        if module and module in calls.counts
    }
    return Inspection(
        model=name,
        layers=layers,
        chains=tuple(chains),
        breaks=breaks,
        hazards=tuple(calls.hazards.found),
        report=report_of(timeline, Plan(), device, "predicted"),
    )


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


def _failure(error: Exception, model: nn.Module, name: str) -> str:
    """Say in one sentence why a step could not be run."""
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
