"""Apply a plan to a model inside a ``with`` block, by other forwards of its modules."""

import contextlib
import functools
from collections.abc import Callable, Iterator

from torch import nn

from helpers import checkpointing
from helpers.checkpointing import _contexts, _lists
from helpers.checkpointing.plan import Plan, check_fits, listed_segments, runs_by_parent


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
    check_fits(model, plan)
    call = functools.partial(
        checkpointing.checkpoint,  # looked up here: another may be put in its place
        use_reentrant=use_reentrant,
        preserve_rng_state=preserve_rng_state,
        early_stop=early_stop,
    )
    if context_fn is not None:  # torch.compile cannot look into one of Python's own
        checked = _contexts.checked(context_fn, use_reentrant)
        call = functools.partial(call, context_fn=checked)
    forwards = {
        segment[0]: functools.partial(call, model.get_submodule(segment[0]).forward)
        for segment in plan.segments
        if len(segment) == 1
    }
    for segment in listed_segments(model, plan):
        modules = [model.get_submodule(name) for name in segment]
        forwards |= _lists.joined_forwards(segment, modules, call)
    for parent, runs in runs_by_parent(model, plan).items():
        sequential = model.get_submodule(parent)
        forwards[parent] = functools.partial(_run_in_pieces, sequential, runs, call)
    with contextlib.ExitStack() as undo:
        for name, forward in forwards.items():
            undo.enter_context(_replaced_forward(model.get_submodule(name), forward))
        yield model


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
