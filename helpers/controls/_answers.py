"""What a lab has found out about a model of one size: a report for each plan tried."""

import dataclasses
from dataclasses import dataclass, field

from helpers.checkpointing import Plan
from helpers.controls._findings import finding
from helpers.inspection import kept_by_module
from helpers.measure import StepReport, Verification

Pair = tuple[StepReport, StepReport]  # of a plan, and of no checkpointing


@dataclass
class Answers:
    """Predictions, measurements, and which of them is shown.

    Attributes:
        tried: a prediction for each plan tried; where there is none, what was measured.
        measured: for each plan measured its report, and that of no checkpointing.
        verified: whether its gradients and buffers are as without.
        shown: the plan that was answered last, which ``finding`` is about.
    """

    tried: dict[Plan, StepReport] = field(default_factory=dict)
    measured: dict[Plan, Pair] = field(default_factory=dict)
    verified: dict[Plan, Verification] = field(default_factory=dict)
    shown: Plan = Plan()

    def take(self, reports: list[StepReport], verified: Verification | None) -> None:
        """Take what was measured, no checkpointing last, and show the first."""
        plan = self.shown = reports[0].plan
        for report in reports:
            known = self.tried.get(report.plan)
            if known is None or known.source == "measured":
                self.tried[report.plan] = report
                self.measured[report.plan] = report, reports[-1]
        self.measured[plan] = reports[0], reports[-1]
        if verified is not None:
            self.verified[plan] = verified

    @property
    def finding(self) -> str:
        """What the plan shown does, in a sentence; empty if nothing is shown."""
        return finding(*self.pair) if self.shown in self.tried else ""

    @property
    def history(self) -> list[StepReport]:
        """A report for every plan tried, measured where it was."""
        return [self.measured.get(plan, [one])[0] for plan, one in self.tried.items()]

    @property
    def pair(self) -> Pair:
        """No checkpointing and the plan shown: predicted, or else both measured."""
        after = self.tried[self.shown]
        if after.source == "measured":
            return self.measured[self.shown][::-1]
        return self.tried[Plan()], after

    @property
    def reports(self) -> Pair:
        """The same, predictions with their measured times where there are some."""
        if self.shown not in self.measured:
            return self.pair
        return tuple(map(_confirmed, self.pair, self.measured[self.shown][::-1]))

    @property
    def predictions(self) -> list[StepReport]:
        """Every plan tried: no checkpointing first, and the one shown last."""
        order = {self.shown: 2, Plan(): 0}
        return sorted(self.tried.values(), key=lambda one: order.get(one.plan, 1))

    @property
    def kept(self) -> tuple[dict[str, int], dict[str, int]]:
        """What each module keeps, by name: under the plan shown, and without one."""
        before, after = self.pair
        return kept_by_module(after.timeline), kept_by_module(before.timeline)


def _confirmed(prediction: StepReport, report: StepReport) -> StepReport:
    """Give a prediction the measured time, and the measurement's word for its bytes."""
    same = prediction.peak_bytes == report.peak_bytes
    return dataclasses.replace(
        prediction,
        source="measured" if same else "predicted",
        step_ms=report.step_ms,
        step_ms_quartiles=report.step_ms_quartiles,
        repeats=report.repeats,
    )
