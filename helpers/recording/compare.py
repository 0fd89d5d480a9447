"""What is predicted today, held against what was recorded: every report, in bytes.

Held against each other are the peaks of the device's own allocator, which has kernels'
scratch in it, and the peaks of the tensors alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.allocator import Gpu, on_gpu
from helpers.measure import StepReport
from helpers.recording.recorded import Recording, Step

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Comparison:
    """One recorded report, and its prediction today."""

    step: Step
    measured: StepReport
    predicted: StepReport

    @property
    def error_bytes(self) -> int:
        """The allocator's peak: the predicted one less the measured one."""
        return self.predicted.allocator_peak_bytes - self.measured.allocator_peak_bytes

    @property
    def error(self) -> float:
        """The error as a share of what was measured."""
        return self.error_bytes / self.measured.allocator_peak_bytes

    def __str__(self) -> str:
        """Say how an error divides, and how much larger blocks were than need be."""
        tensors_bytes = self.predicted.peak_bytes - self.measured.peak_bytes
        return (
            f"{self.step}, {self.measured.plan}: predicted "
            f"{self.predicted.allocator_peak_bytes:,} B, measured "
            f"{self.measured.allocator_peak_bytes:,} B, error {self.error_bytes:+,} B "
            f"({100 * self.error:+.3f} %); tensors {tensors_bytes:+,} B, kernels' "
            f"scratch {self.error_bytes - tensors_bytes:+,} B; blocks were "
            f"{self.measured.padding_bytes:,} B larger than what was asked for"
        )


def compared(recording: Recording) -> list[Comparison]:
    """Predict anew all that was measured, for the GPU that it was measured on."""
    gpu = Gpu(recording.processors, recording.threads, recording.capability)
    with on_gpu(gpu):
        return [
            Comparison(group.step, one, group.step.predicted(one.plan, one.device))
            for group in recording.groups
            for one in group.measured
        ]


def summed_up(comparisons: Sequence[Comparison]) -> str:
    """Say how many cases are as predicted, and how wrong the others are at most."""
    exact = sum(not one.error_bytes for one in comparisons)
    largest = max((abs(one.error) for one in comparisons), default=0.0)
    return (
        f"{exact} of {len(comparisons)} cases as predicted to the byte; "
        f"the largest error is {100 * largest:.3f} %"
    )


def error_table(comparisons: Sequence[Comparison]) -> "pd.DataFrame":
    """Sum up a comparison, a row for each model, batch, optimizer and precision."""
    import pandas as pd  # here, since a bare machine with a GPU has none

    names = ["model", "rows", "optimizer", "precision"]
    steps = pd.DataFrame([vars(one.step) for one in comparisons])[names]
    errors = pd.Series([abs(one.error_bytes) for one in comparisons])
    table = steps.assign(cases=1, exact=errors == 0, largest_error_bytes=errors)
    sums = {"cases": "sum", "exact": "sum", "largest_error_bytes": "max"}
    return table.groupby(names, sort=False).agg(sums).reset_index()
