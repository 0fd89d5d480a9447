"""What else would help where no plan fits: each with the number of a dry run."""

from collections.abc import Callable

import torch
from torch import nn

from helpers.measure import StepReport, predict
from helpers.timeline import map_tensors, tensors_in
from helpers.units import format_bytes


def what_would_help(
    model: nn.Module,
    batch: object,
    least: StepReport,
    settings: dict,
    size_of: Callable[[StepReport], int],
) -> str:
    """Say what the lowest plan would need with half the batch, SGD, or bf16.

    Args:
        least: of the plan that needs least, by ``size_of``.
    """
    ways = {}
    if (smaller := half(batch)) is not None:
        ways["half the batch"] = smaller, settings
    if settings.get("optimizer") is not None:
        ways["plain SGD"] = batch, settings | {"optimizer": torch.optim.SGD}
    if settings.get("autocast") is None and settings.get("step") is None:
        ways["autocast to bfloat16"] = batch, settings | {"autocast": torch.bfloat16}
    needs = []
    for name, (batch, changed) in ways.items():
        try:
            n_bytes = size_of(predict(model, batch, least.plan, **changed))
        except ValueError:
            continue
        if n_bytes < 0.99 * size_of(least):
            needs.append(f"{format_bytes(n_bytes)} with {name}")
    return f"its plan needs {', '.join(needs)}" if needs else ""


def half(batch: object) -> object | None:
    """Halve a batch in its first dimension; None where tensors differ in that."""
    sizes = {tensor.shape[:1] for tensor in tensors_in(batch)}
    if len(sizes) != 1 or not (size := sizes.pop()) or size[0] < 2:
        return None
    return map_tensors(lambda tensor: tensor.detach()[: size[0] // 2].clone(), batch)
