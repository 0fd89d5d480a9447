"""Choose which layers to checkpoint, in which segments, for a budget of bytes."""

from helpers.planner.best import (
    InfeasibleBudget,
    best_plan,
    least_peak_bytes,
    pareto,
    plan_for,
)
from helpers.planner.chain import Chain, Stage
from helpers.planner.profiling import profile

__all__ = [
    "Chain",
    "InfeasibleBudget",
    "Stage",
    "best_plan",
    "least_peak_bytes",
    "pareto",
    "plan_for",
    "profile",
]
