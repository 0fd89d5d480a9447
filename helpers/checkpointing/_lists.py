"""One segment for neighbours in an ``nn.ModuleList``, which has no forward to change.

The model's own forward calls them one by one. So the first one runs them all, and the
others hand on its result, which only the last one returns. This is right only where
each is fed what the one before returned, and nobody else uses that: both are checked.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from helpers.checkpointing.plan import PlanFault

CODE = """

def in_turn(forwards, x, *args, **kwargs):
    for forward in forwards:
        x = forward(x, *args, **kwargs)
    return x


def given_back(x, *args, **kwargs):
    return x


for names in {}:
    layers = [model.get_submodule(name) for name in names]
    run = partial(in_turn, [layer.forward for layer in layers])
    layers[0].forward = partial(checkpoint, run, use_reentrant=False)
    for layer in layers[1:]:
        layer.forward = given_back"""


def code(segments: Sequence[Sequence[str]]) -> list[str]:
    """Write the lines that join neighbours, after the imports that they need."""
    names = [", ".join(f'"{name}"' for name in segment) for segment in segments]
    rows = "\n".join(f"    [{row}]," for row in names)
    return CODE.format(f"[\n{rows}\n]").splitlines()


def joined_forwards(
    model: nn.Module, names: Sequence[str], call: Callable
) -> dict[str, Callable]:
    """Make a forward for each of several neighbours, by name.

    Args:
        call: runs a function of the first one's arguments as one segment.

    Raises:
        PlanFault: where one has hooks, which would run twice; from the forwards, if
            the model does not feed one into the next, or uses what one returns.
    """
    modules = [model.get_submodule(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        if module._forward_hooks or module._forward_pre_hooks:
            raise PlanFault(
                f"{name!r} has a forward hook, which would run twice if it shared a "
                "segment; checkpoint it alone"
            )
    joined = _Joined(names, modules, call)
    others = range(1, len(names))
    return {names[0]: joined.run_all} | {
        names[place]: functools.partial(joined.give_back, place) for place in others
    }


class _Joined:
    def __init__(self, names, modules, call) -> None:
        self.names, self.modules, self.call = names, modules, call
        self.forwards = [module.forward for module in modules]
        self.running = False  # whether the modules' forwards are to be their own

    def run_all(self, x, *args, **kwargs):
        if self.running:
            return self.forwards[0](x, *args, **kwargs)
        out = self.call(self.in_turn, x, *args, **kwargs)
        return _HandedOn(self.names[0], out, marks(args, kwargs))

    def check_is_tensor(self, name, out):
        if not isinstance(out, torch.Tensor):
            raise PlanFault(
                f"{name!r} returns a {type(out).__name__} and not a tensor, so it "
                f"cannot share a segment with its neighbours; checkpoint it alone"
            )

    def in_turn(self, x, *args, **kwargs):
        self.running = True
        try:
            for name, module in zip(self.names, self.modules, strict=True):
                x = module(x, *args, **kwargs)
                self.check_is_tensor(name, x)
        finally:
            self.running = False
        return x

    def give_back(self, place, x, *args, **kwargs):
        if self.running:
            return self.forwards[place](x, *args, **kwargs)
        before, name = self.names[place - 1 : place + 1]
        fed = type(x) is _HandedOn and x.name == before
        if not fed or x.given != marks(args, kwargs):
            raise PlanFault(
                f"{name!r} is not fed what {before!r} returns, and nothing else, so "
                "they cannot share a segment; checkpoint each alone"
            )
        is_last = place == len(self.names) - 1
        return x.out if is_last else _HandedOn(name, x.out, x.given)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class _HandedOn:
    """What a layer returns to hand it to the next one, and to nobody else.

    The layer's own output is inside the segment, and its caller cannot have it.
    """

    name: str
    out: torch.Tensor  # of the segment
    given: list

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise PlanFault(
            f"the model uses what {self.name!r} returns for more than the next layer, "
            "so they cannot share a segment; checkpoint each alone"
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = __neg__ = _refuse

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> NoReturn:
        refuse_handed_on(None, (), [args, kwargs or {}])


def refuse_handed_on(model: object, args: tuple, output: object) -> None:
    """Refuse, as a model's forward hook, an output that has a joined layer's in it.

    Raises:
        PlanFault: names the layer.
    """
    for item in tree_leaves(output):
        if type(item) is _HandedOn:
            item._refuse()


def marks(args: tuple, kwargs: dict) -> list:
    """Make what tells other arguments from these, and keeps none of them alive."""
    plain = (bool, int, float, str, type(None))
    return [
        (name, value if isinstance(value, plain) else id(value))
        for name, value in [*enumerate(args), *kwargs.items()]
    ]
