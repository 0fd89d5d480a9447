"""The workbook's library. README.md beside this file is its map, with an example.

What is in it, a layer a line; each layer knows only those before it:

    units, models                 numbers as people read them; what is trained
    checkpointing, from_scratch   which layers, and how; ``checkpoint`` built by hand
    timeline                      what a step allocates and frees
    allocator, dry_run            what CUDA counts; a step without data
    measure                       one step's numbers, predicted or measured
    planner, inspection, sweep, recording, distributed, compiled, offload
    plots                         the pictures
    controls, checks              the labs, and the checks of the exercises

``measure`` is this package; the function is ``helpers.measure.measure``.
"""

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
    "verify": "measure",
    "plan_for": "planner",
    "inspect_model": "inspection",
    "LayerLab": "controls",
    "BudgetLab": "controls",
}
__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
