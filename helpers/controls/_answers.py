"""What a lab has found out about a model of one size: a report for each plan tried."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from helpers.checkpointing import Plan
from helpers.controls._findings import describe, finding
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
        against: the plan that it is compared with.
    """

    tried: dict[Plan, StepReport] = field(default_factory=dict)
    measured: dict[Plan, Pair] = field(default_factory=dict)
    verified: dict[Plan, Verification] = field(default_factory=dict)
    shown: Plan = Plan()
    against: Plan = Plan()

    def take(
        self, plan: Plan, reports: list[StepReport], verified: Verification | None
    ) -> None:
        """Show a plan, and take what was measured beside it; no checkpointing last."""
        self.shown, base = plan, reports[-1]
        for report in reports:
            known = self.tried.get(report.plan)
            if known is None or known.source == "measured":
                self.tried[report.plan] = report
                self.measured[report.plan] = report, base
            if report is not base or plan == base.plan:
                self.measured[report.plan] = report, base
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
        """The two plans that are compared: predicted, or else both measured.

        A plan that could only be measured is compared with none, until it has been
        measured beside the other.
        """
        before, after = self.tried[self.against], self.tried[self.shown]
        if before.source == after.source == "predicted":
            return before, after
        if after.source == "measured":
            return self.together or self.measured[self.shown][::-1]
        return self.together or (self.tried[Plan()], after)

    @property
    def together(self) -> Pair | None:
        """What was measured of both in one run, if it was."""
        return of_one_run(self.measured, self.against, self.shown)

    @property
    def reports(self) -> Pair:
        """The pair, predictions with their measured times where there are some."""
        if self.together is None:
            return self.pair
        return tuple(map(_confirmed, self.pair, self.together))

    @property
    def predictions(self) -> list[StepReport]:
        """Every plan tried: no checkpointing first, and the one shown last."""
        order = {self.shown: 2, Plan(): 0}
        return sorted(self.tried.values(), key=lambda one: order.get(one.plan, 1))

    @property
    def names(self) -> dict[Plan, str]:
        """Short names of those plans that have one."""
        other, this = self.pair_names
        return {self.pair[0].plan: other, self.shown: this} | {Plan(): "none"}

    @property
    def pair_names(self) -> tuple[str, str]:
        """Short names of the two that are compared."""
        return "other" if self.pair[0].plan.segments else "none", "this plan"

    @property
    def title(self) -> str:
        """Name the plan that is compared with."""
        said = describe(self.pair[0].plan)
        return f"other plan: {said}" if self.pair[0].plan.segments else said

    @property
    def kept(self) -> tuple[dict[str, int], dict[str, int]]:
        """What each module keeps, by name: under this plan, and under the other."""
        before, after = self.pair
        return kept_by_module(after.timeline), kept_by_module(before.timeline)


def of_one_run(measured: Mapping[Plan, Pair], before: Plan, after: Plan) -> Pair | None:
    """Find two plans' reports of one run, for the times of two runs do not compare."""
    one, other = measured.get(before), measured.get(after)
    if not before.segments:
        return other and other[::-1]
    if not after.segments:
        return one
    return (one[0], other[0]) if one and other and one[1] is other[1] else None


def recorded_beside(
    recorded: Mapping[Plan, Pair], before: Plan, after: Plan
) -> tuple[StepReport | None, StepReport | None]:
    """Find the same, or the second one's report alone."""
    return of_one_run(recorded, before, after) or (None, recorded.get(after, [None])[0])


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
