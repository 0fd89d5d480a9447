"""One segment for neighbours in an ``nn.ModuleList``, which has no forward to change.

The model's own forward calls them one by one. So the first one runs them all, and the
others give back what they are given. This is right only where each is fed what the one
before returned, and nothing else in between; so that is checked at every call.
"""

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn

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
    names: Sequence[str], modules: Sequence[nn.Module], call: Callable
) -> dict[str, Callable]:
    """Make a forward for each of several neighbours, by name.

    Args:
        call: runs a function of the first one's arguments as one segment.

    Raises:
        ValueError: where one has hooks, which would run twice; from the forwards, if
            the model does not feed one into the next.
    """
    for name, module in zip(names, modules, strict=True):
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
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
        self.returned = self.given = None

    def run_all(self, x, *args, **kwargs):
        if self.running:
            return self.forwards[0](x, *args, **kwargs)
        out = self.call(self.in_turn, x, *args, **kwargs)
        self.returned, self.given = weakref.ref(out), marks(args, kwargs)
        return out

    def check_is_tensor(self, name, out):
        if not isinstance(out, torch.Tensor):
            raise ValueError(
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
        fed = self.returned is not None and x is self.returned()
        if not fed or self.given != marks(args, kwargs):
            raise ValueError(
                f"{self.names[place]!r} is not fed what {self.names[place - 1]!r} "
                "returns, and nothing else, so they cannot share a segment; "
                "checkpoint each alone"
            )
        return x


def marks(args: tuple, kwargs: dict) -> list:
    """Make what tells other arguments from these, and keeps none of them alive."""
    plain = (bool, int, float, str, type(None))
    return [
        (name, value if isinstance(value, plain) else id(value))
        for name, value in [*enumerate(args), *kwargs.items()]
    ]
