"""Time each layer of a chain on a device, run forward and run again in backward.

Every layer is checkpointed alone meanwhile, so that backward runs it again as it does
at the end of a segment, up to the last tensor that is needed, and the times are those
of real training steps.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from helpers.checkpointing import Plan, checkpointed
from helpers.measure import (
    Loss,
    left_as_found,
    placed,
    random_numbers_kept,
    training_step,
    usable_device,
)


def stage_times_ms(
    model: nn.Module,
    batch: object,
    names: Sequence[str],
    starting: Sequence[str],
    *,
    loss: Loss | None = None,
    device: str | None = None,
    repeats: int = 10,
) -> dict[str, tuple[float, float]]:
    """Measure each layer's forward, and its recompute as the last of its segment.

    Args:
        names: the layers. starting: those of them that can be checkpointed.
        repeats: training steps, of which the medians are taken, after two more.

    Returns:
        Milliseconds by name; the same twice for a layer that is not checkpointed.
    """
    device = usable_device(model, device)
    model, batch = placed(model, batch, device)
    forward_ms: dict[str, list[float]] = {name: [] for name in names}
    again_ms: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        stack.enter_context(left_as_found(model, trains=False))
        stack.enter_context(random_numbers_kept())
        stack.enter_context(torch.enable_grad())
        spans: list[tuple[str, bool, Callable[[], float]]] = []
        for name in names:
            stack.enter_context(_timed(model.get_submodule(name), name, device, spans))
        stack.enter_context(checkpointed(model, Plan.alone(starting)))
        step = training_step(model, batch, loss)
        for count in range(repeats + 2):
            spans.clear()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            for name, is_again, elapsed_ms in spans if count >= 2 else ():
                (again_ms if is_again else forward_ms)[name].append(elapsed_ms())
    medians = {name: statistics.median(times) for name, times in forward_ms.items()}
    return {
        name: (
            medians[name],
            statistics.median(again_ms[name])
            if again_ms[name]
            else medians[name] * (name not in starting),
        )
        for name in names
    }


@contextlib.contextmanager
def _timed(module: nn.Module, name: str, device: str, spans: list) -> Iterator[None]:
    """Note how long each call of a module's forward takes, also one that is stopped."""
    forward, own = module.forward, "forward" in vars(module)

    def run(*args, **kwargs):
        is_again = torch._C._current_graph_task_id() != -1
        start = _now(device)
        try:
            return forward(*args, **kwargs)
        finally:
            end = _now(device)
            spans.append((name, is_again, lambda: _elapsed_ms(start, end)))

    module.forward = run
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


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
