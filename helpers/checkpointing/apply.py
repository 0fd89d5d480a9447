"""Apply a plan to a model inside a ``with`` block, by other forwards of its modules."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import NoReturn

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from helpers import checkpointing
from helpers.checkpointing.plan import (
    Plan,
    PlanFault,
    check_fits,
    listed_segments,
    runs_by_parent,
)


class Undo(contextlib.ExitStack):
    """An ExitStack that is closed, at the latest, when nothing refers to it any more.

    An interrupt can come between a block's last line and its end, and skip that. What
    is undone is noted in the line that does it, so that nothing is left out.
    """

    def replace(self, owner: object, name: str, value: object) -> None:
        """Give an object another attribute; then its own is back, or its class's."""
        own = vars(owner)
        if name in own:
            self.callback(setattr, owner, name, own[name])
        else:
            self.callback(own.pop, name, None)
        setattr(owner, name, value)

    def __del__(self) -> None:
        self.close()


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

    >>> import torch
    >>> from helpers.models import DocsMLP
    >>> model = DocsMLP()
    >>> with checkpointed(model, Plan.alone(["layer2"])):
    ...     model(torch.randn(32, 1024)).sum().backward()

    Only modules' ``forward`` changes: parameters, ``state_dict`` keys, hooks, training
    mode and types stay. The options are those of ``torch.utils.checkpoint.checkpoint``:
    without ``preserve_rng_state`` dropout drops others in backward.

    Raises:
        ValueError: for a name that is not in the model (lists those that are), comes
            twice, lies inside another, or does not follow the one before it; for an
            option that is none, or from the model where ``context_fn`` fails.
    """
    check_fits(model, plan)
    call = _call_with(
        context_fn,
        use_reentrant=use_reentrant,
        preserve_rng_state=preserve_rng_state,
        early_stop=early_stop,
    )
    shared = {name for segment in listed_segments(model, plan) for name in segment}
    with Undo() as undo:
        for name, run in _forwards(model, plan, call).items():
            forward = Forward(model.get_submodule(name), run, name in shared)
            undo.callback(forward.remove)
            vars(forward.module)["forward"] = forward
        yield model


def _call_with(context_fn: Callable | None, **options: bool) -> Callable:
    """Make what runs a function as one segment, with these options."""
    for name, option in options.items():
        if not isinstance(option, bool):
            raise PlanFault(f"{name} is True or False, not {option!r}")
    # Looked up here: another may be put in its place.
    call = functools.partial(checkpointing.checkpoint, **options)
    if context_fn is None:  # torch.compile cannot look into one of Python's own
        return call
    from helpers.checkpointing._contexts import checked

    context_fn = checked(context_fn, options["use_reentrant"])
    return functools.partial(call, context_fn=context_fn)


def refuse_opaque(model: nn.Module, has_data: bool = False) -> None:
    """Refuse a model with a part that no step here can look into.

    Args:
        has_data: whether it runs as it is; else it is copied, without data.

    Raises:
        PlanFault: names the part, and says what to give instead.
    """
    for name, module in model.named_modules():
        why = "" if has_data else _without_data(type(module))
        if "_orig_mod" in module._modules or module._compiled_call_impl:
            why = "is compiled, and would run uncompiled while it is watched: give the "
            why += "model before that, here or to helpers.compiled"
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            why = "has no parameters yet: run one forward first"
        if why:
            raise PlanFault(f"{repr(name) if name else 'the model'} {why}")


@functools.cache
def _without_data(kind: type) -> str:
    """Say why a module of some kind cannot be copied and run without data."""
    if issubclass(kind, torch.jit.ScriptModule):
        why = "is compiled by TorchScript, which runs nothing without data: give "
        return why + "the model that was scripted or traced"
    if "quantized" in kind.__module__ and kind.__module__.startswith("torch.ao.nn"):
        return "is quantised, and has no gradient: give the model before that"
    if issubclass(kind, nn.parallel.DistributedDataParallel):
        return "is shared with other processes: give its .module"
    if any(cls.__name__.startswith("FSDPModule") for cls in kind.__mro__):
        return "is sharded by fully_shard: give the model before that"
    return ""


class Forward:
    """What ``forward`` is in a block: it runs something else, for one module only."""

    def __init__(self, module: nn.Module, run: Callable, is_shared: bool) -> None:
        self.module, self.run, self.is_shared = module, run, is_shared
        self.before = vars(module).get("forward")
        self.is_over = False
        if type(self.before) is Forward and self.before.is_shared:
            raise PlanFault(
                "a layer of this plan shares a segment of a ModuleList already: undo "
                "the other plan first, or checkpoint a layer that comes twice alone"
            )

    def __call__(self, *args: object, **kwargs: object) -> object:
        if not torch.compiler.is_compiling():
            # A shallow copy of the module has this too, and nothing else tells it.
            caller = sys._getframe(1).f_locals.get("self")
            has_this = getattr(caller, "__dict__", {}).get("forward") is self
            if has_this and caller is not self.module:
                raise PlanFault(
                    "nn.DataParallel's replicas, or other shallow copies of a module, "
                    "would run the layers of the one that the plan is applied to; use "
                    "DistributedDataParallel, or copy.deepcopy"
                )
        return self.run(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was before, also where blocks end in another order."""
        self.is_over, own = True, vars(self.module)
        while type(last := own.get("forward")) is Forward and last.is_over:
            if last.before is None:
                del own["forward"]
            else:
                own["forward"] = last.before

    @property
    def __code__(self) -> CodeType:  # by which torch.export says where a model is from
        return type(self.module).forward.__code__

    @property
    def _torchscript_modifier(self) -> NoReturn:  # what torch.jit.script asks for first
        raise PlanFault(
            "TorchScript cannot compile a model that a plan is applied to; script or "
            "trace it outside of the block"
        )


def _forwards(model: nn.Module, plan: Plan, call: Callable) -> dict[str, Callable]:
    """Make what runs a plan's segments, by the names of the modules that begin them."""
    forwards = {
        segment[0]: functools.partial(call, _run_of(model.get_submodule(segment[0])))
        for segment in plan.segments
        if len(segment) == 1
    }
    for parent, runs in runs_by_parent(model, plan).items():
        sequential = model.get_submodule(parent)
        forwards[parent] = functools.partial(_run_in_pieces, sequential, runs, call)
    if listed := listed_segments(model, plan):
        from helpers.checkpointing import _lists  # which most plans do not need

        for segment in listed:
            forwards |= _lists.joined_forwards(model, segment, call)
    return forwards


def _run_of(module: nn.Module) -> Callable:
    """Return a module's forward; of another block's, what it runs."""
    forward = module.forward
    return forward.run if type(forward) is Forward else forward


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
