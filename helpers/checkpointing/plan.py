"""Which layers are checkpointed, in which segments, and whether a model fits that.

A segment is run once without saving what autograd needs inside it; backward runs it
again. Only the segment's input stays in memory in between.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn


class PlanFault(ValueError):
    """A plan, or what it is applied with, is wrong for a model; says why."""


_FORM = (
    "a plan is a tuple of segments, each a tuple of names: "
    'Plan((("layer1", "layer2"), ("layer4",)))'
)


def _items(several: object) -> tuple:
    """Make a tuple of an iterable, but not of a word's letters."""
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise ValueError(f"{_FORM}; not {several!r}")
    return tuple(several)


@dataclass(frozen=True)
class Plan:
    """Which layers are checkpointed: a tuple of segments, each a tuple of names.

    >>> print(Plan((("layer1", "layer2"), ("layer4",))))
    layer1+layer2, layer4

    A segment is a run of consecutive children of one ``nn.Sequential``, or of one
    ``nn.ModuleList`` whose owner feeds each into the next, or a single module by its
    dotted name. ``Plan()`` checkpoints nothing.
    """

    segments: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        segments = tuple(map(_items, _items(self.segments)))
        if not all(isinstance(name, str) for segment in segments for name in segment):
            raise ValueError(_FORM)
        if not all(segments):
            raise ValueError("a segment needs at least one layer; got an empty one")
        object.__setattr__(self, "segments", segments)

    @classmethod
    def alone(cls, names: Iterable[str]) -> "Plan":
        """Make each named layer a segment of its own, as the docs' snippet means."""
        return cls(tuple((name,) for name in _items(names)))

    @classmethod
    def grouped(cls, model: nn.Module, names: Iterable[str]) -> "Plan":
        """Join named layers that are neighbours in a Sequential into one segment."""
        names = _items(names)
        check_fits(model, cls.alone(names))
        in_order = sorted(names, key=_all_names(model).index)
        return segments_of(in_order, lambda before, name: follows(model, before, name))

    @property
    def names(self) -> tuple[str, ...]:
        """All checkpointed layers, in the plan's order."""
        return tuple(name for segment in self.segments for name in segment)

    def __str__(self) -> str:
        if not self.segments:
            return "no checkpointing"
        return ", ".join("+".join(segment) for segment in self.segments)

    def code(self, model: nn.Module) -> str:
        """Write the snippet that applies this plan to ``model`` with torch alone."""
        from helpers.checkpointing import _code  # which needs this module

        check_fits(model, self)
        return _code.snippet(model, self)


def segments_of(
    names: Iterable[str],
    joins: Callable[[str, str], bool],
    longest: int | None = None,
) -> Plan:
    """Cut names, in order, into segments: neighbours share one as long as they may.

    Args:
        joins: says of a name and the next one whether they may share a segment.
        longest: how many names a segment may have; default: any number.
    """
    segments: list[tuple[str, ...]] = []
    for name in names:
        has_room = segments and (longest is None or len(segments[-1]) < longest)
        if has_room and joins(segments[-1][-1], name):
            segments[-1] += (name,)
        else:
            segments.append((name,))
    return Plan(tuple(segments))


def layer_names(model: nn.Module) -> list[str]:
    """Name the layers that a reader can tick: the children that have parameters."""
    children = model.named_children()
    return [n for n, child in children if next(child.parameters(), None) is not None]


def follows(model: nn.Module, before: str, after: str) -> bool:
    """Say whether ``after`` comes right after ``before`` in one ``nn.Sequential``."""
    parent = parent_of(before)
    if parent != parent_of(after) or not _is_chain(model.get_submodule(parent)):
        return False
    siblings = list(model.get_submodule(parent)._modules)
    place = siblings.index(before.rpartition(".")[2]) + 1
    return siblings[place : place + 1] == [after.rpartition(".")[2]]


def listed_after(model: nn.Module, before: str, after: str) -> bool:
    """Say whether ``after`` comes right after ``before`` in one ``nn.ModuleList``."""
    parent, _, place = before.rpartition(".")
    is_list = isinstance(model.get_submodule(parent), nn.ModuleList)
    return is_list and after == f"{parent}.{int(place) + 1}"


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]


def listed_segments(model: nn.Module, plan: Plan) -> list[tuple[str, ...]]:
    """Find the segments of two or more that lie in an ``nn.ModuleList``."""
    return [
        segment
        for segment in plan.segments
        if len(segment) > 1 and listed_after(model, *segment[:2])
    ]


def runs_by_parent(
    model: nn.Module, plan: Plan
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Map each Sequential to its segments of two or more: {first child: children}."""
    runs: dict[str, dict[str, tuple[str, ...]]] = {}
    listed = listed_segments(model, plan)
    for segment in plan.segments:
        if len(segment) > 1 and segment not in listed:
            children = tuple(name.rpartition(".")[2] for name in segment)
            runs.setdefault(parent_of(segment[0]), {})[children[0]] = children
    return runs


def _all_names(model: nn.Module) -> list[str]:
    """Name every module, one that comes twice by both its names."""
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and (
        type(module).forward is nn.Sequential.forward
    )


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError, with the names that exist, unless ``plan`` fits ``model``."""
    if not isinstance(plan, Plan):
        raise PlanFault(f"plan={plan!r} is no plan; Plan() checkpoints nothing")
    if not isinstance(model, nn.Module):
        raise PlanFault(f"a plan is for an nn.Module, not for {model!r}")
    if not plan.segments:
        return
    known = _all_names(model)
    layers = ", ".join(layer_names(model) or known) or "none"
    for name in plan.names:
        if name not in known:
            raise ValueError(f"no layer named {name!r}; this model has: {layers}")
        _check_is_called(model, name)
    _check_names(plan)
    for segment in plan.segments:
        _check_segment(model, segment, layers)


def _check_names(plan: Plan) -> None:
    """Raise ValueError for a layer that is in two segments, or inside another."""
    for name in plan.names:
        if plan.names.count(name) > 1:
            raise ValueError(
                f"{name!r} is named twice; a layer belongs to one segment at most"
            )
        for other in plan.names:
            if name.startswith(other + "."):
                raise ValueError(
                    f"{name!r} lies inside {other!r}, which is checkpointed as well; "
                    "name one of the two"
                )


def _check_segment(model: nn.Module, segment: tuple[str, ...], layers: str) -> None:
    """Raise ValueError for one that is no run of neighbours, or cannot be put there."""
    for before, after in zip(segment, segment[1:], strict=False):
        if not (follows(model, before, after) or listed_after(model, before, after)):
            raise ValueError(
                f"{after!r} does not follow {before!r} in one nn.Sequential, so they "
                "cannot share a segment; a segment is a run of neighbours among: "
                f"{layers}"
            )
    parent = parent_of(segment[0])
    if len(segment) > 1 and "forward" in vars(model.get_submodule(parent)):
        raise ValueError(
            f"the forward of {repr(parent) if parent else 'the model'} has been "
            f"replaced already, so {' and '.join(segment)} cannot share a segment; "
            f"undo the other plan first, or name single layers among: {layers}"
        )


def _check_is_called(model: nn.Module, name: str) -> None:
    """Raise ValueError for a ModuleList and its like: nothing would happen."""
    module = model
    for part in ["", *name.split(".")]:
        module = module._modules[part] if part else module
        if isinstance(module, torch.jit.ScriptModule):
            raise PlanFault(
                f"{name!r} is compiled by TorchScript, which looks at no other forward;"
                " apply the plan to the model before it is scripted or traced"
            )
    if type(module).forward is nn.Module.forward and "forward" not in vars(module):
        inside = ", ".join(f"{name}.{child}" for child in module._modules) or "none"
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, which has no forward of its own "
            f"to checkpoint; name the layers in it: {inside}"
        )
