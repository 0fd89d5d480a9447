"""Whether this machine can be asked to measure a step: unasked, on a button, or not."""

import torch
from torch import nn

from helpers.measure import StepReport, memory_bytes, plain_step_flops, too_large
from helpers.timeline import tensors_in
from helpers.units import format_flops

AUTO_FLOPS = 4 * 10**9  # a CPU step of some 100 ms or less: measured unasked
CPU_FLOPS = 60 * 10**9  # … of some seconds: measured on the button; not above


def step_flops(report: StepReport) -> int:
    return plain_step_flops(report) + report.recompute_flops


def bearable(report: StepReport, flops: int) -> bool:
    """Say whether a step is run here; a CPU is asked for so many FLOPs at most."""
    return torch.cuda.is_available() or step_flops(report) <= flops


def check_bearable(report: StepReport, base: StepReport, device: str) -> None:
    """Raise ValueError or MemoryError where a step is too large to be measured here."""
    if not bearable(report, CPU_FLOPS):
        raise ValueError(
            f"one step of this size is {format_flops(step_flops(report))}, too "
            "much for this CPU: take a batch or a width that needs at most "
            f"{format_flops(CPU_FLOPS)}, or a GPU; the prediction holds without it"
        )
    if base.allocator_peak_bytes > memory_bytes(device):
        raise MemoryError(too_large(device, base.allocator_peak_bytes))


def without_data(model: object, batch: object) -> str:
    """Say that a model or a batch is on the meta device; nothing if neither is."""
    own = model.parameters() if isinstance(model, nn.Module) else ()
    for name, tensors in (("model", own), ("batch", tensors_in(batch))):
        if any(tensor.is_meta for tensor in tensors):
            return f"this {name} has no data, so it cannot be measured"
    return ""


def what_follows(report: StepReport) -> str:
    """Say what becomes of a step's measurement."""
    if bearable(report, AUTO_FLOPS):
        return "the measurement follows"
    if bearable(report, CPU_FLOPS):
        return "Measure runs it on this CPU"
    return f"{format_flops(step_flops(report))} are too much to measure on this CPU"
