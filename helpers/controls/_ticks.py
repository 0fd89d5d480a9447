"""What is ticked and joined in a tree of modules, and the plan that it makes."""

from collections.abc import Iterable

from helpers.checkpointing import Plan
from helpers.inspection import Inspection


class Ticks:
    """Ticked modules, no one of them inside another, and joins along the chains."""

    def __init__(self, inspection: Inspection, before: "Ticks | None" = None) -> None:
        """Start with what another model's ticks have in common with this one's."""
        self.inspection = inspection
        self.before = {  # who comes before in a chain
            after: name
            for chain in inspection.chains
            for name, after in zip(chain, chain[1:], strict=False)
        }
        self.ticked = (before.ticked if before else set()) & set(inspection.layers)
        self.joined = (before.joined if before else set()) & set(self.before)

    @property
    def plan(self) -> Plan:
        """The plan; may be set."""
        segments: list[tuple[str, ...]] = []
        for name in self.inspection.layers if self.ticked else ():
            if name in self.ticked:
                joins = name in self.joined and segments
                if joins and segments[-1][-1] == self.before[name]:
                    segments[-1] += (name,)
                else:
                    segments.append((name,))
        return Plan(tuple(segments))

    @plan.setter
    def plan(self, plan: Plan) -> None:
        layers = self.inspection.layers
        if unknown := [name for name in plan.names if name not in layers]:
            raise ValueError(
                f"the lab has no box for {', '.join(map(repr, unknown))}; it has: "
                f"{', '.join(layers)}"
            )
        self.ticked = set(plan.names)
        self.joined = {name for segment in plan.segments for name in segment[1:]}

    def pieces(self, size: int) -> Plan:
        """Cut the units into segments of ``size``, as far as they are a chain."""
        segments: list[tuple[str, ...]] = []
        for name in self.inspection.units:
            fits = segments and len(segments[-1]) < size
            if fits and self.before.get(name) == segments[-1][-1]:
                segments[-1] += (name,)
            else:
                segments.append((name,))
        return Plan(tuple(segments))

    def tick(self, name: str, ticked: bool) -> None:
        """Tick or untick a module; a tick takes the place of those around and inside.

        The set is exchanged at once, since clicks come on other threads.
        """
        if not ticked:
            self.ticked = self.ticked - {name}
            return
        inside = f"{name}."
        self.ticked = {
            other
            for other in self.ticked
            if not other.startswith(inside) and not name.startswith(f"{other}.")
        } | {name}

    def holds(self, names: Iterable[str]) -> bool:
        """Say whether all of them are ticked."""
        return self.ticked.issuperset(names)
