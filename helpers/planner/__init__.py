"""Choose which layers to checkpoint, in which segments, for a budget of bytes."""

from helpers.planner.best import (
    InfeasibleBudget,
    best_plan,
    least_peak_bytes,
    pareto,
)
from helpers.planner.chain import Chain, Stage
from helpers.planner.profiling import profile
from helpers.planner.tree import Planner, front_for, plan_for

__all__ = [
    "Chain",
    "InfeasibleBudget",
    "Planner",
    "Stage",
    "best_plan",
    "front_for",
    "least_peak_bytes",
    "pareto",
    "plan_for",
    "profile",
]
