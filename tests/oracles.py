"""Counts of a step's bytes and FLOPs that share no code with the helpers."""

import gc
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

RNG_STATE_BYTES = 5056  # torch.get_rng_state(), which preserve_rng_state keeps


def memtracker_peak_bytes(
    step: Callable, model: nn.Module, x: torch.Tensor, optimizer=None
) -> int:
    """Count a step's peak by PyTorch's MemTracker, which does not round on a CPU."""
    tracker = MemTracker()
    tracker.track_external(model, optimizer, x)
    with tracker:
        step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def profiled_bytes(step: Callable) -> list[int]:
    """List what the CPU's allocator hands out (+) and takes back (−) in one step.

    Blocks from before the step are not seen when they are freed.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    found: list[tuple[int, int, int]] = []
    trees = list(profiler.profiler.kineto_results.experimental_event_tree())
    while trees:
        event = trees.pop()
        trees += event.children
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    seen, changes = set(), []
    for _, address, n_bytes in sorted(found):
        if n_bytes > 0:
            seen.add(address)
        if address in seen:
            changes.append(n_bytes)
    return changes


def counted_flops(step: Callable) -> int:
    """Count a whole step's FLOPs by PyTorch's own counter."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
