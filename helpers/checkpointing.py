"""Which layers are checkpointed, in which segments, and how a plan is applied.

A segment is run once without saving what autograd needs inside it; backward runs it
again. Only the segment's input stays in memory in between.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from helpers import contexts, module_lists

# Whether checkpoint itself does so after a forward that failed.
CLEANS_UP = TorchVersion(torch.__version__) >= (2, 13)


@dataclass(frozen=True)
class Plan:
    """Which layers are checkpointed: a tuple of segments, each a tuple of names.

    A segment is a run of consecutive children of one ``nn.Sequential``, or of one
    ``nn.ModuleList`` whose owner feeds each into the next, or a single module by its
    dotted name. ``Plan()`` checkpoints nothing.
    """

    segments: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.segments, str) or any(
            isinstance(segment, str) for segment in self.segments
        ):
            raise ValueError(
                "a plan is a tuple of segments, each a tuple of names: "
                'Plan((("layer1", "layer2"), ("layer4",)))'
            )
        segments = tuple(tuple(segment) for segment in self.segments)
        if not all(segments):
            raise ValueError("a segment needs at least one layer; got an empty one")
        object.__setattr__(self, "segments", segments)

    @classmethod
    def alone(cls, names: Iterable[str]) -> "Plan":
        """Make each named layer a segment of its own, as the docs' snippet means."""
        return cls(tuple((name,) for name in names))

    @classmethod
    def grouped(cls, model: nn.Module, names: Iterable[str]) -> "Plan":
        """Join named layers that are neighbours in a Sequential into one segment."""
        names = list(names)
        _check(model, cls.alone(names))
        segments: list[tuple[str, ...]] = []
        for name in sorted(names, key=_all_names(model).index):
            if segments and follows(model, segments[-1][-1], name):
                segments[-1] += (name,)
            else:
                segments.append((name,))
        return cls(tuple(segments))

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
        _check(model, self)
        if not self.segments:
            return "# nothing is checkpointed"
        alone = [segment[0] for segment in self.segments if len(segment) == 1]
        listed = _listed(model, self)
        chains = _runs_by_parent(model, self)
        plain = all(_is_plain(model.get_submodule(name)) for name in chains)
        lines = ["from functools import partial"] * bool(alone or listed)
        lines += ["from types import MethodType"] * bool(chains)
        lines += [""] + ["from torch import nn"] * (not plain)
        lines += ["from torch.utils.checkpoint import checkpoint"]
        if alone:
            lines += [
                "",
                f"for name in {alone!r}:",
                "    layer = model.get_submodule(name)",
                "    layer.forward = partial(",
                "        checkpoint, layer.forward, use_reentrant=False",
                "    )",
            ]
        for parent, runs in chains.items():
            lines += _parent_code(model, parent, runs)
        if listed:
            lines += module_lists.code(listed)
        return "\n".join(lines)


@contextlib.contextmanager
def checkpointed(
    model: nn.Module,
    plan: Plan,
    *,
    use_reentrant: bool = False,
    preserve_rng_state: bool = True,
    early_stop: bool = True,
    context_fn: Callable | None = None,
) -> Iterator[nn.Module]:
    """Apply ``plan`` to ``model`` inside a ``with`` block, and undo it on the way out.

    Only the ``forward`` attribute of some modules changes: parameters, ``state_dict``
    keys, hooks, training mode and types stay as they are, whatever happens inside.

    Args:
        use_reentrant, preserve_rng_state, early_stop, context_fn: passed on to
            ``torch.utils.checkpoint.checkpoint``.

    Raises:
        ValueError: for a name that is not in the model, comes twice, lies inside
            another, or does not follow the one before it. Lists the names that exist.
            For a ``context_fn`` that is none, or from the model where it fails.
    """
    _check(model, plan)
    call = functools.partial(
        checkpoint if CLEANS_UP else _checkpoint_and_clean_up,
        use_reentrant=use_reentrant,
        preserve_rng_state=preserve_rng_state,
        early_stop=early_stop,
    )
    if context_fn is not None:  # torch.compile cannot look into one of Python's own
        checked = contexts.checked(context_fn, use_reentrant)
        call = functools.partial(call, context_fn=checked)
    forwards = {
        segment[0]: functools.partial(call, model.get_submodule(segment[0]).forward)
        for segment in plan.segments
        if len(segment) == 1
    }
    for segment in _listed(model, plan):
        modules = [model.get_submodule(name) for name in segment]
        forwards |= module_lists.joined_forwards(segment, modules, call)
    for parent, runs in _runs_by_parent(model, plan).items():
        sequential = model.get_submodule(parent)
        forwards[parent] = functools.partial(_run_in_pieces, sequential, runs, call)
    with contextlib.ExitStack() as undo:
        for name, forward in forwards.items():
            undo.enter_context(_replaced_forward(model.get_submodule(name), forward))
        yield model


def _checkpoint_and_clean_up(function: Callable, *args, **options) -> object:
    """Call ``checkpoint``, and end what it leaves behind if the function fails.

    PyTorch 2.11 has its hooks on saved tensors stay for as long as the error is kept,
    and every later operator would be recomputed by them.
    """
    try:
        return checkpoint(function, *args, **options)
    except BaseException as error:
        trace = error.__traceback__
        while trace:
            frame, trace = trace.tb_frame, trace.tb_next
            if frame.f_code is inspect.unwrap(checkpoint).__code__:
                if generator := frame.f_locals.get("gen"):
                    generator.close()
        raise


def layer_names(model: nn.Module) -> list[str]:
    """Name the layers that a reader can tick: the children that have parameters."""
    return [
        name
        for name, child in model.named_children()
        if any(True for _ in child.parameters())
    ]


def follows(model: nn.Module, before: str, after: str) -> bool:
    """Say whether ``after`` comes right after ``before`` in one ``nn.Sequential``."""
    parent = _parent_of(before)
    if parent != _parent_of(after) or not _is_chain(model.get_submodule(parent)):
        return False
    siblings = list(model.get_submodule(parent)._modules)
    place = siblings.index(before.rpartition(".")[2]) + 1
    return siblings[place : place + 1] == [after.rpartition(".")[2]]


def listed_after(model: nn.Module, before: str, after: str) -> bool:
    """Say whether ``after`` comes right after ``before`` in one ``nn.ModuleList``."""
    parent, _, place = before.rpartition(".")
    is_list = isinstance(model.get_submodule(parent), nn.ModuleList)
    return is_list and after == f"{parent}.{int(place) + 1}"


def _run_in_pieces(
    sequential: nn.Sequential, runs: dict[str, tuple[str, ...]], call: Callable, x
):
    """Run a Sequential's children in order, each segment by one ``call``."""
    children = sequential._modules  # named_children skips a module that comes twice
    inside: set[str] = set()
    for name, child in children.items():
        if name in runs:
            x = call(_chained([children[n] for n in runs[name]]), x)
            inside.update(runs[name])
        elif name not in inside:
            x = child(x)
    return x


def _chained(modules: list[nn.Module]) -> Callable:
    """Make one function of several modules, each run on the one before's output."""

    def run(x):
        for module in modules:
            x = module(x)
        return x

    return run


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Give one module another ``forward``; put back what was there, own or class's."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _parent_of(name: str) -> str:
    return name.rpartition(".")[0]


def _listed(model: nn.Module, plan: Plan) -> list[tuple[str, ...]]:
    """Find the segments of two or more that lie in an ``nn.ModuleList``."""
    return [
        segment
        for segment in plan.segments
        if len(segment) > 1 and listed_after(model, *segment[:2])
    ]


def _runs_by_parent(
    model: nn.Module, plan: Plan
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Map each Sequential to its segments of two or more: {first child: children}."""
    runs: dict[str, dict[str, tuple[str, ...]]] = {}
    listed = _listed(model, plan)
    for segment in plan.segments:
        if len(segment) > 1 and segment not in listed:
            children = tuple(name.rpartition(".")[2] for name in segment)
            runs.setdefault(_parent_of(segment[0]), {})[children[0]] = children
    return runs


def _all_names(model: nn.Module) -> list[str]:
    """Name every module, one that comes twice by both its names."""
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and (
        type(module).forward is nn.Sequential.forward
    )


def _is_plain(module: nn.Module) -> bool:
    """Say whether it can be sliced; a subclass's slice is made by its own __init__."""
    return type(module) is nn.Sequential


def _check(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError, with the names that exist, unless ``plan`` fits ``model``."""
    known = _all_names(model)
    layers = ", ".join(layer_names(model) or known) or "none"
    for name in plan.names:
        if name not in known:
            raise ValueError(f"no layer named {name!r}; this model has: {layers}")
        _check_is_called(name, model.get_submodule(name))
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
    for segment in plan.segments:
        for before, after in zip(segment, segment[1:], strict=False):
            if not (
                follows(model, before, after) or listed_after(model, before, after)
            ):
                raise ValueError(
                    f"{after!r} does not follow {before!r} in one nn.Sequential, so "
                    "they cannot share a segment; a segment is a run of neighbours "
                    f"among: {layers}"
                )
        parent = _parent_of(segment[0])
        if len(segment) > 1 and "forward" in vars(model.get_submodule(parent)):
            raise ValueError(
                f"the forward of {repr(parent) if parent else 'the model'} has been "
                f"replaced already, so {' and '.join(segment)} cannot share a segment; "
                f"undo the other plan first, or name single layers among: {layers}"
            )


def _check_is_called(name: str, module: nn.Module) -> None:
    """Raise ValueError for a ModuleList and its like: nothing would happen."""
    if type(module).forward is nn.Module.forward and "forward" not in vars(module):
        inside = ", ".join(f"{name}.{child}" for child in module._modules) or "none"
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, which has no forward of its own "
            f"to checkpoint; name the layers in it: {inside}"
        )


def _parent_code(
    model: nn.Module, parent: str, runs: dict[str, tuple[str, ...]]
) -> list[str]:
    """Write a Sequential's forward with its segments spelled out as slices."""
    sequential = model.get_submodule(parent)
    names = list(sequential._modules)
    lines = ["", "", "def forward(self, x):"]
    place = 0
    while place < len(names):
        run = runs.get(names[place])
        starts = [i for i in range(place, len(names)) if names[i] in runs]
        end = place + len(run) if run else min(starts, default=len(names))
        piece = f"[{place}:{end}]"
        if _is_plain(sequential):
            piece = f"self{piece}"
        else:
            piece = f"nn.Sequential(*list(self){piece})"
        if run:
            lines.append(f"    x = checkpoint({piece}, x, use_reentrant=False)")
        else:
            lines.append(f"    x = {piece}(x)")
        place = end
    lines += ["    return x", "", ""]
    if not parent:
        return lines + ["model.forward = MethodType(forward, model)"]
    return lines + [
        f"chain = model.get_submodule({parent!r})",
        "chain.forward = MethodType(forward, chain)",
    ]
