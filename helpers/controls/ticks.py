"""What can be ticked in a model, what is ticked and joined, and the plan it makes."""

from collections.abc import Sequence

from torch import nn

from helpers.checkpointing import (
    Plan,
    follows,
    layer_names,
    listed_after,
    segments_of,
)
from helpers.inspection import Inspection, Layer, inspect_model


class Children(Inspection):
    """A model's own layers as a tree of depth one; no step is run to find them."""

    def repeats(self, names: Sequence[str]) -> list[list[str]]:
        return [[name] for name in names]


def children_of(model: nn.Module) -> Children:
    """List the children that have parameters, and which of them are neighbours."""
    names = layer_names(model)
    if not names:
        raise ValueError(
            "this model has no layers to tick: none of its children has parameters"
        )
    return _seen(model, names, Children)


def inspected(
    model: nn.Module, batch: object, before: Inspection, deep: bool, **options
) -> Inspection:
    """Find what can be ticked: the model's own layers, or modules at any depth.

    By a look alone where no step can be imagined, nor could be ``before``.
    """
    if not deep:
        return children_of(model)
    try:
        return inspect_model(model, batch, **options)
    except Exception:
        found = modules_of(model)
        if before.report is not None or not found.layers:
            raise
        return found


def modules_of(model: nn.Module) -> Inspection:
    """List all modules that have parameters and a forward, at any depth."""
    names = [
        name
        for name, module in model.named_modules()
        if name and _has_forward(module) and next(module.parameters(), None) is not None
    ]
    return _seen(model, names, Inspection)


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _seen(model: nn.Module, names: Sequence[str], kind: type[Inspection]) -> Inspection:
    """Say what can be told of modules by a look: their classes and neighbours."""

    def joins(before: str, name: str) -> bool:
        return follows(model, before, name) or listed_after(model, before, name)

    levels: dict[str, list[str]] = {}
    for name in names:
        levels.setdefault(name.rpartition(".")[0], []).append(name)
    classes = {name: type(model.get_submodule(name)).__name__ for name in names}
    return kind(
        model=type(model).__name__,
        layers={name: Layer(name, one, 1, 0, 0) for name, one in classes.items()},
        chains=sum((segments_of(one, joins).segments for one in levels.values()), ()),
        breaks={},
        hazards=(),
        report=None,
    )


def is_flat(model: nn.Module) -> bool:
    """Say whether a model's children are all the layers that there are to tick.

    So it is with a chain of layers, or of layers with what belongs to them.
    """
    children = [list(child.children()) for child in model.children()]
    grand = [child for inner in children for child in inner]
    return not grand or (
        isinstance(model, nn.Sequential)
        and not any(list(child.children()) for child in grand)
    )


class Ticks:
    """Ticked modules, no one of them inside another, and joins along the chains.

    Clicks come on other threads, so each change of a set is one operation.
    """

    def __init__(self) -> None:
        self.inspection: Inspection = Children("", {}, (), {}, (), None)
        self.before: dict[str, str] = {}  # who comes before in a chain
        self.ticked: set[str] = set()
        self.joined: set[str] = set()

    def fit(self, inspection: Inspection) -> None:
        """Take another model; what exists there as well stays ticked and joined."""
        if not inspection.layers:
            raise ValueError(f"{inspection.model} calls no module that could be ticked")
        before = {
            name: one
            for chain in inspection.chains
            for one, name in zip(chain, chain[1:], strict=False)
        }
        self.inspection, self.before = inspection, before
        self.ticked.intersection_update(inspection.layers)
        self.joined.intersection_update(before)

    @property
    def plan(self) -> Plan:
        """The plan; may be set."""

        def joins(before: str, name: str) -> bool:
            return name in self.joined and self._linked(before, name)

        ticked = (name for name in self.inspection.layers if name in self.ticked)
        return segments_of(ticked, joins)

    @plan.setter
    def plan(self, plan: Plan) -> None:
        layers = self.inspection.layers
        if unknown := [name for name in plan.names if name not in layers]:
            raise ValueError(
                f"the lab has no box for {', '.join(map(repr, unknown))}; it has: "
                f"{', '.join(layers)}"
            )
        for segment in plan.segments:
            for before, name in zip(segment, segment[1:], strict=False):
                if not self._linked(before, name):
                    raise ValueError(
                        f"the lab does not join {name!r} to {before!r}: in this step, "
                        "one does not just feed the other"
                    )
        self.ticked = set(plan.names)
        self.joined = {name for segment in plan.segments for name in segment[1:]}

    def pieces(self, size: int | None) -> Plan:
        """Cut the units into segments of ``size``, as far as they are a chain.

        Each alone, those are left out that could then not be run again.
        """
        bad = self._in_place if size == 1 else ()
        units = (name for name in self.inspection.units if name not in bad)
        return segments_of(units, self._linked, longest=size)

    def left_out(self, plan: Plan) -> str:
        """Say what is not ticked where all are that can be, each alone."""
        if not self._in_place or plan != self.pieces(1):
            return ""
        first, *others = self._in_place.values()
        more = f" (and {len(others)} more)" if others else ""
        return f"; left out: {first}{more}"

    @property
    def _in_place(self) -> dict[str, str]:
        """Say of each unit that no segment can start with why that is so."""
        alone = {name: Plan.alone([name]) for name in self.inspection.units}
        found = self.inspection.hazards_of
        return {
            name: str(hazard)
            for name, plan in alone.items()
            for hazard in found(plan)
            if hazard.kind == "in place"
        }

    def tick(self, names: Sequence[str], ticked: bool) -> None:
        """Tick or untick modules; a tick takes the place of those around and inside.

        Of several, each is alone.
        """
        around_or_inside = {
            other
            for other in list(self.ticked)
            for name in names
            if other.startswith(f"{name}.") or name.startswith(f"{other}.")
        }
        self.ticked.difference_update(around_or_inside if ticked else names)
        if ticked:
            self.ticked.update(names)
        if len(names) > 1:
            self.joined.difference_update(names)

    def _linked(self, before: str, name: str) -> bool:
        return self.before.get(name) == before
