"""What this machine is asked to do: unasked, on a button, when asked twice, or not."""

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import nn

from helpers.measure import StepReport, memory_bytes, plain_step_flops, too_large
from helpers.timeline import tensors_in
from helpers.units import format_bytes, format_flops

AUTO_FLOPS = 4 * 10**9  # a CPU step of some 100 ms or less: measured unasked
CPU_FLOPS = 60 * 10**9  # … of some seconds: measured on the button; not above
# Modules that are answered for in a second, on a slow machine.
PREDICTED_A_SECOND, PLANNED_A_SECOND = 2000, 25
MOST_SECONDS = 2  # for an answer, unless the reader insists
MOST_MODULES = 100_000  # some 1 GiB of this machine's memory
MOST_BYTES = 2**40  # of a tensor: no GPU holds more, and larger ones take long


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
    if base.needed_bytes > memory_bytes(device):
        raise MemoryError(too_large(device, base.needed_bytes))


def without_data(model: object, batch: object) -> str:
    """Say that a model or a batch is on the meta device; nothing if neither is."""
    own = model.parameters() if isinstance(model, nn.Module) else ()
    for name, tensors in (("model", own), ("batch", tensors_in(batch))):
        if any(tensor.is_meta for tensor in tensors):
            return f"this {name} has no data, so it cannot be measured"
    return ""


def random_rows(model: nn.Module, rows: int, device: str) -> torch.Tensor:
    """Make as many rows as the model's first Linear layer takes."""
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if linear is None:
        raise ValueError("give a tensor as batch: this model has no Linear layer")
    return torch.randn(rows, linear.in_features, device=device)


def what_follows(report: StepReport) -> str:
    """Say what becomes of a step's measurement."""
    if bearable(report, AUTO_FLOPS):
        return "the measurement follows"
    if bearable(report, CPU_FLOPS):
        return "Measure runs it on this CPU"
    return f"{format_flops(step_flops(report))} are too much to measure on this CPU"


def check_sizes(values: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise ValueError where a size is no number of layers, rows and so on."""
    for name, value in values.items():
        if isinstance(now[name], int):
            if not isinstance(value, int) or not 1 <= value < 2**31:
                words = f"{name} must be a whole number from 1 up, not {value:,}"
                raise ValueError(words)


def check_tensors(things: object) -> None:
    """Raise ValueError where a tensor among things is larger than any GPU."""
    sizes = (t.numel() * t.element_size() for t in tensors_in(things))
    most = max(sizes, default=0)
    if most > MOST_BYTES:
        raise ValueError(
            f"one tensor of this size takes {format_bytes(most)}, and a lab takes "
            f"{format_bytes(MOST_BYTES)} at most"
        )


class SizeGuard:
    """Asks before a model is made that is answered for slowly."""

    def __init__(self) -> None:
        self.modules_a_second = PREDICTED_A_SECOND
        self._asked: dict[str, object] = {}

    def check(
        self,
        make: Callable[[dict[str, object]], nn.Module],
        model: nn.Module | None,
        now: dict[str, object],
        wanted: dict[str, object],
    ) -> None:
        """Raise ValueError for too many modules, and once for what takes long.

        How many there will be is foreseen from models that are one step larger.
        """
        if model is None:
            return
        count = present = _modules(model)
        grown = {n: v for n, v in wanted.items() if type(v) is int and v > now[n]}
        for name, value in grown.items():
            with contextlib.suppress(Exception):  # as width + 1 may be no width
                larger = _modules(make(now | {name: now[name] + 1}))
                count += (larger - present) * (value - now[name])
        said = ", ".join(f"{name} {value:,}" for name, value in grown.items())
        if count > max(present, MOST_MODULES):
            raise ValueError(
                f"{said} makes some {count:,} modules, and a lab takes "
                f"{MOST_MODULES:,} at most"
            )
        seconds = count / self.modules_a_second
        if count > present and seconds > MOST_SECONDS and wanted != self._asked:
            self._asked = wanted
            raise ValueError(
                f"{said} makes some {count:,} modules, and an answer then takes some "
                f"{seconds:.0f} s; set it once more to go on"
            )


def _modules(model: nn.Module) -> int:
    return sum(1 for _ in model.modules())
