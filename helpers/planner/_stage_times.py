"""Time each layer of a chain on a device, run forward and run again in backward.

Every layer is checkpointed alone meanwhile, so that backward runs it again as it does
at the end of a segment, up to the last tensor that is needed, and the times are those
of real training steps.
"""

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from helpers.checkpointing import Plan, Undo, checkpointed
from helpers.measure import (
    Loss,
    Step,
    left_as_found,
    placed,
    random_numbers_kept,
    training_step,
    usable_device,
)
from helpers.planner._marks import BEFORE
from helpers.planner.chain import Chain, Stage

REPEATS, WARMUP = 10, 2  # training steps


def in_milliseconds(
    chain: Chain,
    model: nn.Module,
    batch: object,
    loss: Loss | None,
    autocast: torch.dtype | None,
    own_step: Step | None,
    device: str,
) -> Chain:
    """Make milliseconds, measured on a device, the costs of a chain's stages."""
    device = usable_device(model, device)
    model, batch, loss = placed(model, device, batch, loss)
    step = training_step(model, batch, loss, autocast=autocast, step=own_step)
    with left_as_found(model, trains=False), random_numbers_kept(), torch.enable_grad():
        medians_ms = _medians_ms(chain, model, step, device)

    def timed(stage: Stage) -> Stage:
        full = medians_ms.get((stage.name, False), 0.0)
        last = medians_ms.get((stage.name, True), 0.0 if stage.starts else full)
        costs = {"recompute_cost": full, "last_recompute_cost": min(full, last)}
        return dataclasses.replace(stage, **costs)

    stages = tuple(map(timed, chain.stages))
    return dataclasses.replace(chain, stages=stages, cost_unit="ms")


def _medians_ms(
    chain: Chain, model: nn.Module, step: Callable[[], object], device: str
) -> dict[tuple[str, bool], float]:
    """Take the median time of each stage: (name, whether it is run again)."""
    spans: list[tuple[str, bool, Callable[[], float]]] = []
    times_ms: dict[tuple[str, bool], list[float]] = defaultdict(list)
    with Undo() as undo:
        for name in chain.names:
            if name != BEFORE:
                _time_forward(undo, model.get_submodule(name), name, device, spans)
        plan = Plan.alone(stage.name for stage in chain.stages if stage.starts)
        undo.enter_context(checkpointed(model, plan))
        for count in range(WARMUP + REPEATS):
            spans.clear()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            for name, again, elapsed_ms in spans if count >= WARMUP else ():
                times_ms[name, again].append(elapsed_ms())
    return {key: statistics.median(times) for key, times in times_ms.items()}


def _time_forward(
    undo: Undo, module: nn.Module, name: str, device: str, spans: list
) -> None:
    """Note how long each call of a module's forward takes, also one that is stopped."""
    forward = module.forward

    def run(*args, **kwargs):
        again = torch._C._current_graph_task_id() != -1
        start = _now(device)
        try:
            return forward(*args, **kwargs)
        finally:
            end = _now(device)
            spans.append((name, again, lambda: _elapsed_ms(start, end)))

    if "forward" in vars(module):
        undo.callback(setattr, module, "forward", forward)
    else:
        undo.callback(vars(module).pop, "forward", None)
    module.forward = run


def _now(device: str) -> "float | torch.cuda.Event":
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start: "float | torch.cuda.Event", end: object) -> float:
    if isinstance(start, float):
        return (end - start) * 1000
    return start.elapsed_time(end)
