"""What is predicted today, held against what was recorded: every case, in bytes.

Held against each other are the peaks of the device's own allocator, which has kernels'
scratch in it, and the peaks of the tensors alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from helpers.allocator import on_gpu
from helpers.measure import StepReport, predict
from helpers.recording.file import RecordedCase, RecordedSearch, Recording
from helpers.units import format_bytes

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Comparison:
    """One recorded case, and its prediction today."""

    case: RecordedCase
    predicted: StepReport

    @property
    def predicted_bytes(self) -> int:
        """What the allocator was predicted to count at its peak."""
        return self.predicted.allocator_peak_bytes

    @property
    def measured_bytes(self) -> int:
        return self.case.measured.allocator_peak_bytes

    @property
    def error_bytes(self) -> int:
        """The allocator's peak: the predicted one less the measured one."""
        return self.predicted_bytes - self.measured_bytes

    @property
    def tensors_error_bytes(self) -> int:
        """The same of the tensors alone, without kernels' scratch."""
        return self.predicted.peak_bytes - self.case.measured.peak_bytes

    @property
    def after_forward_error_bytes(self) -> int:
        measured = self.case.measured
        return self.predicted.after_forward_bytes - measured.after_forward_bytes

    @property
    def error(self) -> float:
        """The error as a share of what was measured."""
        return self.error_bytes / self.measured_bytes

    @property
    def must_be_exact(self) -> bool:
        """Say whether not one byte may be wrong: in float32, without an optimizer."""
        step = self.case.step
        return (step.optimizer, step.precision) == ("none", "float32")

    def row(self) -> dict[str, object]:
        """Make a row of a table."""
        step, measured = self.case.step, self.case.measured
        return {
            "model": step.model,
            **step.settings,
            "rows": step.rows,
            "optimizer": step.optimizer,
            "precision": step.precision,
            "plan": str(self.case.plan),
            "predicted_bytes": self.predicted_bytes,
            "measured_bytes": self.measured_bytes,
            "error_bytes": self.error_bytes,
            "tensors_error_bytes": self.tensors_error_bytes,
            "after_forward_error_bytes": self.after_forward_error_bytes,
            "scratch_bytes": measured.scratch_bytes,
            "padding_bytes": measured.padding_bytes,
            "workspace_bytes": measured.workspace_bytes,
            "reserved_bytes": measured.reserved_bytes,
        }


def compare(recording: Recording) -> list[Comparison]:
    """Predict every measured case anew, for the GPU that it was measured on."""
    with on_gpu(recording.kind):
        return [
            Comparison(case, predicted_today(case))
            for case in recording.cases
            if case.measured
        ]


def predicted_today(case: RecordedCase) -> StepReport:
    """Predict a case for the kind of device that it was measured on."""
    with torch.device("meta"):
        batch = case.step.make_batch()
    device = case.predicted.device
    return predict(
        case.step.make_model, batch, case.plan, device=device, **case.step.options
    )


def lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Write a line for each step, one for each plan whose error is not 0, and a sum."""
    written = []
    for step, found in groupby(comparisons, key=lambda found: str(found.case.step)):
        found = list(found)
        wrong = [one for one in found if one.error_bytes]
        written.append(f"{step}: {len(found) - len(wrong)} of {len(found)} exact")
        for one in wrong:
            written.append(
                f"  {one.case.plan}: predicted {one.predicted_bytes:,} B, "
                f"measured {one.measured_bytes:,} B, error {one.error_bytes:+,} B "
                f"({100 * one.error:+.3f} %); {_causes(one)}"
            )
    exact = sum(not one.error_bytes for one in comparisons)
    largest = max((abs(one.error) for one in comparisons), default=0.0)
    written.append(
        f"{exact} of {len(comparisons)} cases as predicted to the byte; "
        f"the largest error is {100 * largest:.3f} %"
    )
    return written


def _causes(one: Comparison) -> str:
    """Say how an error divides, and how much larger blocks were than need be."""
    return (
        f"tensors {one.tensors_error_bytes:+,} B, kernels' scratch "
        f"{one.error_bytes - one.tensors_error_bytes:+,} B; blocks were "
        f"{one.case.measured.padding_bytes:,} B larger than what was asked for"
    )


def table(comparisons: Sequence[Comparison]) -> "pd.DataFrame":
    """Sum up a comparison, a row for each model, batch, optimizer and precision."""
    import pandas as pd  # here, since a bare machine with a GPU has none

    rows = pd.DataFrame([one.row() for one in comparisons])
    errors = rows.error_bytes.abs()
    rows["exact"], rows["error"] = errors == 0, errors
    alike = rows.groupby(["model", "rows", "optimizer", "precision"], sort=False)
    return alike.agg(
        cases=("exact", "size"),
        exact=("exact", "sum"),
        largest_error_bytes=("error", "max"),
    ).reset_index()


def describe_search(found: RecordedSearch) -> str:
    """Say how large a batch was predicted to fit, and how large a one did."""
    search = found.search
    return (
        f"{search.step.model}, {search.plan}, under {format_bytes(search.limit_bytes)}:"
        f" {found.predicted_rows:,} rows predicted, {found.measured_rows:,} run"
    )
