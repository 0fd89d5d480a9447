"""The labs: boxes to flip, and a picture of what each flip does."""

from helpers import lazily

_HOMES = {"BudgetLab": "budget", "LabState": "state", "LayerLab": "lab"}
__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
