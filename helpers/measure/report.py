"""The numbers of one training step, measured or predicted, in one frozen record."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from helpers.checkpointing import Plan
from helpers.timeline import CATEGORIES, Timeline
from helpers.units import format_bytes, format_flops, format_ms


def plain_step_flops(report: "StepReport") -> int:
    """Count a step that recomputes nothing: backward multiplies twice as forward."""
    return 3 * report.forward_flops


class _Counted:
    """A number of the device's allocator, which a prediction counts when it is asked.

    A field's default; a report that was not told the number finds it by ``count``.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, report: "StepReport | None", owner: type) -> int | None:
        if report is None:
            return None  # the default
        known = vars(report)
        if known[self.name] is None:
            counts = report.count() if report.count else {}
            known |= {"allocator_peak_bytes": report.peak_bytes} | counts
        return known[self.name] or 0

    def __set__(self, report: "StepReport", value: int | None) -> None:
        vars(report)[self.name] = value


@dataclass(frozen=True)
class StepReport:
    """Memory, work and time of one training step under one plan."""

    peak_bytes: int  # the most bytes alive at once during the step
    after_forward_bytes: int  # alive between the loss and backward
    baseline_bytes: int  # alive before the forward pass: parameters, state, batch
    categories: dict[Literal[CATEGORIES], int]  # what is alive at the peak
    step_ms: float | None  # median; None when predicted
    step_ms_quartiles: tuple[float, float] | None
    forward_flops: int  # matrix products and convolutions alone
    recompute_flops: int  # forward work done a second time, during backward
    device: str
    source: Literal["measured", "predicted", "recorded"]
    plan: Plan = Plan()
    repeats: int = 0  # how many runs the median is of
    # Of the device's allocator; on a CPU, the first is peak_bytes and the others are 0.
    allocator_peak_bytes: int = _Counted()  # most that blocks and kernels' scratch take
    padding_bytes: int = 0  # measured: by how much blocks are larger than asked for
    workspace_bytes: int = _Counted()  # cuBLAS's own, in neither peak
    reserved_peak_bytes: int = _Counted()  # most that it took from the GPU, for all
    unknown: tuple[str, ...] = ()  # operators whose memory is a library's own choice
    timeline: Timeline | None = field(default=None, repr=False, compare=False)
    # Counts what a prediction's allocator says, by names of the fields above.
    count: Callable[[], dict] | None = field(default=None, repr=False, compare=False)

    @property
    def scratch_bytes(self) -> int:
        """By how much kernels' scratch and whole blocks make its peak higher."""
        return max(0, self.allocator_peak_bytes - self.peak_bytes)

    @property
    def needed_bytes(self) -> int:
        """What must be free for the step: all that the allocator takes for it."""
        return self.allocator_peak_bytes + self.workspace_bytes

    def to_dict(self) -> dict:
        """Make a dict that ``json`` can write; the timeline is left out."""
        from helpers.measure import kept  # which a prediction does without

        return kept.to_json(self)

    @classmethod
    def from_dict(cls, values: dict) -> "StepReport":
        """Rebuild a report from what ``to_dict`` made, also after a trip by JSON.

        Raises:
            ValueError: names the field that is missing, or of another kind.
        """
        from helpers.measure import kept

        return kept.from_json(cls, values, "a report")

    def rows(self) -> dict[str, str]:
        """Say everything in words, a row a quantity."""
        rows = {
            "plan": str(self.plan),
            "peak": f"{format_bytes(self.peak_bytes)} ({self.peak_bytes:,} B)",
            "after forward": format_bytes(self.after_forward_bytes),
            "before forward": format_bytes(self.baseline_bytes),
            "alive at the peak": ", ".join(
                f"{category.replace('_', ' ')} {format_bytes(n_bytes)}"
                for category, n_bytes in self.categories.items()
                if n_bytes
            ),
            "scratch of kernels": f"{format_bytes(self.scratch_bytes)} on top",
            "forward": format_flops(self.forward_flops),
            "recompute": format_flops(self.recompute_flops),
        }
        if self.source == "predicted" or not self.scratch_bytes:
            del rows["scratch of kernels"]  # it differs from one GPU to the next
        if self.unknown:
            from helpers.dry_run.libraries import told  # when there is any

            rows["not known"] = told(self.unknown, self.device)
        if self.step_ms is not None:
            low, high = self.step_ms_quartiles
            rows["step"] = (
                f"{format_ms(self.step_ms)} (half of {self.repeats} runs between "
                f"{format_ms(low)} and {format_ms(high)})"
            )
        return rows

    def __repr__(self) -> str:
        lines = [f"StepReport, {self.source} for {self.device}"]
        lines += [f"  {name:<18} {value}" for name, value in self.rows().items()]
        return "\n".join(lines)
