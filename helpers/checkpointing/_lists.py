"""One segment for neighbours in an ``nn.ModuleList``, which has no forward to change.

The model's own forward calls them one by one. So the first one runs them all, and the
others hand on its result, which only the last one returns. This is right only where
each is fed what the one before returned, and nobody else uses that: both are checked.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import nn
from torch._functorch.eager_transforms import grad_increment_nesting
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from helpers.checkpointing.plan import PlanFault

CODE = """

# Right where the model feeds each layer what the one before returns, and uses that
# for nothing else.
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
    names = [", ".join(map(_literal, segment)) for segment in segments]
    rows = "\n".join(f"    [{row}]," for row in names)
    return CODE.format(f"[\n{rows}\n]").splitlines()


def _literal(name: str) -> str:
    """Write a name so that Python reads it, whatever is in it."""
    is_plain = repr(name) == f"'{name}'" and '"' not in name
    return f'"{name}"' if is_plain else repr(name)


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
        self.own = [vars(module).get("forward") for module in modules]
        self.running = False  # whether the modules' forwards are to be their own
        self.links = None

    def __getstate__(self) -> dict:
        return vars(self) | {"links": None}

    def forward(self, place):
        module = self.modules[place]  # a method of it would not outlive a pickle
        return self.own[place] or types.MethodType(type(module).forward, module)

    def run_all(self, x, *args, **kwargs):
        if self.running:
            return self.forward(0)(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            raise PlanFault(
                f"torch.compile cannot look into a segment of {self.names[0]!r} and "
                "its neighbours in a ModuleList; checkpoint each alone"
            )
        made: list[_Made] = []
        out = self.call(functools.partial(self.in_turn, made), x, *args, **kwargs)
        return self.hand_on(x, out, made, marks(args, kwargs))

    def in_turn(self, made, x, *args, **kwargs):
        """Run them, the first time with notes on what each returns."""
        self.running, is_first = True, not made
        try:
            for name, module in zip(self.names, self.modules, strict=True):
                fed, x = x, module(x, *args, **kwargs)
                _check_is_tensor(name, x)
                if is_first:
                    made.append(_Made.of(x, x is fed))
        finally:
            self.running = False
        return x

    def hand_on(self, x, out, made, given):
        """Link what each is to return to what the next one is; return the first."""
        if self.links is None:
            self.links = WeakIdKeyDictionary()
        end, following = len(made), None
        while end:
            start = end - 1
            while start and made[start].is_what_was_fed:  # then it returns that here
                start -= 1
            if following is None:
                handed = out
            elif made[start].is_what_was_fed:
                handed = x
            else:
                handed = _stand_in(self.names[start], made[start], out)
            self.links[handed] = _Link(range(start, end), following, given)
            end, following = start, handed
        return following

    def give_back(self, place, x, *args, **kwargs):
        if self.running:
            return self.forward(place)(x, *args, **kwargs)
        before, name = self.names[place - 1 : place + 1]
        is_tensor = isinstance(x, torch.Tensor) and self.links
        link = self.links.get(x) if is_tensor else None
        fed = link and place - 1 in link.returned_by and _is_as_made(x)
        if not fed or link.given != marks(args, kwargs):
            raise PlanFault(
                f"{name!r} is not fed what {before!r} returns, and nothing else, so "
                "they cannot share a segment; checkpoint each alone"
            )
        if place in link.returned_by:
            return x
        del self.links[x]  # which may be the segment's input, that this keeps alive
        return link.following


class _Link(NamedTuple):
    returned_by: range  # places of the layers whose output it is
    following: torch.Tensor | None  # what the next layer returns
    given: list


class _Made(NamedTuple):
    """What a layer inside a segment returned, without keeping it alive."""

    is_what_was_fed: bool
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    has_graph: bool

    @classmethod
    def of(cls, x: torch.Tensor, is_what_was_fed: bool) -> "_Made":
        has_graph = x.requires_grad or not torch.is_grad_enabled()  # as when reentrant
        return cls(is_what_was_fed, x.shape, x.stride(), x.dtype, x.device, has_graph)


def _check_is_tensor(name: str, out: object) -> None:
    if type(out) is not torch.Tensor or out.layout is not torch.strided:
        raise PlanFault(
            f"{name!r} returns a {type(out).__name__} and not a tensor of the plain "
            "kind, so it cannot share a segment with its neighbours; checkpoint it "
            "alone"
        )


def _stand_in(name: str, made: _Made, out: torch.Tensor) -> torch.Tensor:
    """Make what a layer returns to hand it to the next one, and to nobody else.

    Its own output is inside the segment, and its caller cannot have it. This has no
    data and refuses every operator; else it answers as that would: to ``isinstance``,
    ``type`` and ``is``, with its shape, dtype, device, and that it has a ``grad_fn``.

    A subclass would be found out by ``type``. What ``torch.func`` wraps is of the plain
    type, and when its transform is over it passes operators on to what is inside.
    """
    inside = torch.Tensor._make_wrapper_subclass(
        _Refusing, made.shape, made.strides, dtype=made.dtype, device=made.device
    )
    inside.layer = name
    with grad_increment_nesting() as level:
        tensor = torch._C._functorch._wrap_for_grad(inside, level)
    if made.has_graph and not torch._C._are_functorch_transforms_active():
        tensor = _WithGraph.apply(out, [tensor])
    refuse = functools.partial(_refuse, name)
    for method in _WITHOUT_OPERATORS:
        setattr(tensor, method, refuse)
    return tensor


class _WithGraph(torch.autograd.Function):
    """Give a tensor a ``grad_fn`` if another one has one."""

    @staticmethod
    def forward(ctx, other: torch.Tensor, tensor: list[torch.Tensor]) -> torch.Tensor:
        return tensor.pop()


_WITHOUT_OPERATORS = (
    "backward register_hook retain_grad register_post_accumulate_grad_hook "
    "untyped_storage storage data_ptr tolist numpy __deepcopy__ __reduce_ex__"
).split()


def _is_as_made(tensor: torch.Tensor) -> bool:
    """Say whether nobody has given it an attribute that the layer would not see."""
    return not vars(tensor) or vars(tensor).keys() == set(_WITHOUT_OPERATORS)


class _Refusing(torch.Tensor):
    """A tensor without data that refuses every use."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> NoReturn:
        leaves = tree_leaves([args, kwargs])
        _refuse(next(one.layer for one in leaves if type(one) is cls))

    __torch_function__ = __torch_dispatch__


def _refuse(name: str, *args: object, **kwargs: object) -> NoReturn:
    raise PlanFault(
        f"the model uses what {name!r} returns for more than the next layer, so they "
        "cannot share a segment; checkpoint each alone"
    )


def marks(args: tuple, kwargs: dict) -> list:
    """Make what tells other arguments from these, and keeps none of them alive."""
    plain = (bool, int, float, str, type(None))
    return [
        (name, value if isinstance(value, plain) else id(value))
        for name, value in [*enumerate(args), *kwargs.items()]
    ]
