"""The labs: boxes to flip, and a picture of what each flip does."""

from helpers.controls.budget import BudgetLab
from helpers.controls.lab import LayerLab

__all__ = ["BudgetLab", "LayerLab"]
