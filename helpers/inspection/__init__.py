"""Look inside any model: what can be ticked, what it keeps, what is not safe."""

from helpers.inspection.inspect import inspect_model, kept_by_module
from helpers.inspection.tree import Inspection, Layer

__all__ = ["Inspection", "Layer", "inspect_model", "kept_by_module"]
