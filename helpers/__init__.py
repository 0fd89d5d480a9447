"""The workbook's library: README.md beside this file is its map."""

import importlib
from collections.abc import Callable, Mapping


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """Make a package's ``__getattr__``, which imports a name when it is asked for.

    Args:
        homes: the module of each public name, beside or below ``package``.
    """

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return find


_HOMES = {
    "Plan": "checkpointing",
    "checkpointed": "checkpointing",
    "predict": "measure",
    "plan_for": "planner",
    "inspect_model": "inspection",
    "LayerLab": "controls",
    "BudgetLab": "controls",
}
__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
