"""What was found in a model: a tree of modules, the chains in it, and the hazards."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from helpers.checkpointing import Plan
from helpers.inspection._hazards import Hazard
from helpers.measure import StepReport
from helpers.units import format_bytes, format_flops


@dataclass(frozen=True)
class Layer:
    """A module whose forward was called, with all that lies in it."""

    name: str
    kind: str  # its class
    calls: int
    kept_bytes: int  # made in it, and alive until backward
    forward_flops: int


@dataclass(frozen=True)
class Inspection:
    """What ``inspect_model`` has found."""

    model: str  # its class
    layers: dict[str, Layer]  # what can be ticked, by dotted name
    chains: tuple[tuple[str, ...], ...]  # neighbours that can share a segment
    breaks: dict[str, str]  # why a module list's children are no chain, by name
    hazards: tuple[Hazard, ...]
    report: StepReport = field(repr=False)  # the step without checkpointing

    @property
    def chain(self) -> tuple[str, ...]:
        """The chain that keeps most.

        Raises:
            ValueError: if there is none; says where the first one breaks.
        """
        if not self.chains:
            reasons = [*self.breaks.values(), "it has no nn.Sequential that it calls"]
            raise ValueError(
                f"{self.model} is not a chain, and there is none in it: {reasons[0]}; "
                "its modules can still be checkpointed each alone"
            )
        return max(self.chains, key=self._kept)

    def hazards_of(self, plan: Plan) -> list[Hazard]:
        """List what is not safe in a plan's segments."""
        return [hazard for hazard in self.hazards if _touches(hazard, plan)]

    def warnings(self) -> list[str]:
        """Say each kind of hazard once for modules of one class, and how many more."""
        found: dict[tuple[str, str], list[Hazard]] = {}
        for hazard in self.hazards:
            layer = self.layers.get(hazard.name)
            kind = layer.kind if layer else hazard.name
            found.setdefault((hazard.kind, kind), []).append(hazard)
        return [
            str(first) + (f" (and {len(others)} more like it)" if others else "")
            for first, *others in found.values()
        ]

    def children(self, name: str = "") -> list[str]:
        """List what can be ticked right inside a module; a module list is no level."""
        return self._inside.get(name, [])

    @functools.cached_property
    def _inside(self) -> dict[str, list[str]]:
        inside: dict[str, list[str]] = {}
        for name in self.layers:
            inside.setdefault(self.parent(name), []).append(name)
        return inside

    @functools.cached_property
    def units(self) -> tuple[str, ...]:
        """What to tick where all is to be ticked: the chain, if it keeps most of all.

        Else the modules right inside the model.
        """
        top = tuple(self.children())
        chain = self.chain if self.chains else ()
        return chain if 2 * self._kept(chain) > self._kept(top) else top

    def _kept(self, names: Sequence[str]) -> int:
        return sum(self.layers[name].kept_bytes for name in names)

    def parent(self, name: str) -> str:
        """Name the module around this one that can be ticked; "" is the model."""
        name = name.rpartition(".")[0]
        while name and name not in self.layers:
            name = name.rpartition(".")[0]
        return name

    def repeats(self, names: Sequence[str]) -> list[list[str]]:
        """Cut names into runs of numbered modules that are alike, inside and out."""
        runs: list[list[str]] = []
        for name in names:
            before = runs[-1][-1] if runs else ""
            follows = _next_number(before) == name
            if follows and self._shape(before) == self._shape(name):
                runs[-1].append(name)
            else:
                runs.append([name])
        return runs

    def _shape(self, name: str) -> tuple:
        """Describe a module and all in it; alike modules have equal shapes."""
        own = dataclasses.replace(self.layers[name], name="")
        return own, *map(self._shape, self.children(name))

    def tree(self, levels: int = 1) -> str:
        """Write the modules as an indented table; those that repeat take one row.

        Args:
            levels: how deep to go.
        """
        rows = [("module", "class", "kept", "forward")]
        rows += self._rows("", levels, "")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  "
            f"{row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}"
            for row in rows
        )

    def _rows(self, parent: str, levels: int, indent: str) -> list[tuple[str, ...]]:
        rows = []
        for first, *others in self.repeats(self.children(parent)):
            layer, shown, kind = self.layers[first], first, self.layers[first].kind
            if parent:
                shown = first.removeprefix(f"{parent}.")
            if others:
                shown += f" … {others[-1].rpartition('.')[2]}"
                kind = f"{len(others) + 1} × {kind}"
            kept, flops = layer.kept_bytes, layer.forward_flops
            words = format_bytes(kept), format_flops(flops)
            rows.append((indent + shown, kind, *words))
            if levels > 1:
                rows += self._rows(first, levels - 1, indent + "  ")
        return rows

    def __str__(self) -> str:
        return self.tree()


def _next_number(name: str) -> str:
    """Name the module after this one in a numbered list; nothing if it is in none."""
    parent, _, number = name.rpartition(".")
    if not number.isdigit():
        return ""
    return f"{parent}." * bool(parent) + str(int(number) + 1)


def _touches(hazard: Hazard, plan: Plan) -> bool:
    """Say whether a hazard is one of a plan's segments, or of their starts."""
    if hazard.kind == "in place":
        return any(segment[0] in hazard.within for segment in plan.segments)
    return any(
        not hazard.within.isdisjoint(segment)
        or (len(segment) > 1 and hazard.within and hazard.name in segment)
        for segment in plan.segments
    )
