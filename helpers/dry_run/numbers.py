"""Numbers that a step reads off tensors, though a prediction has none.

A loop adds its loss up and prints it, which is the same for any number. So ``item``
gives one that can be added, kept and printed, and refuses to be looked at.
"""

import weakref
from collections.abc import Callable

import torch
from torch.utils import _device
from torch.utils._pytree import tree_leaves

from helpers.checkpointing import PlanFault
from helpers.dry_run.kernels import imagined_device
from helpers.timeline import counting

GUESS = 1 + 2.0**-40  # finite, and told apart from numbers that are known


class Unknown(NotImplementedError):
    """Somebody looks at values, and nobody knows them; named by what does it."""


class Guess(float):
    """A number that nobody knows."""

    def __new__(cls, *_: object) -> "Guess":
        return super().__new__(cls, GUESS)

    def __repr__(self) -> str:
        return "?"

    def __format__(self, spec: str) -> str:
        return "?"

    def __round__(self, digits: int | None = None) -> "Guess":
        return self if digits is not None else _refuse(self)


def _refuse(*_: object) -> None:
    raise Unknown("item")


def _another(self: Guess, *others: object) -> Guess:
    of_numbers = all(isinstance(other, int | float) for other in others)
    return Guess() if of_numbers else NotImplemented


for _name in "add sub mul truediv pow mod".split():
    setattr(Guess, f"__{_name}__", _another)
    setattr(Guess, f"__r{_name}__", _another)
for _name in "neg pos abs".split():
    setattr(Guess, f"__{_name}__", _another)
for _name in (
    "lt le gt ge eq ne bool int index hash floor ceil trunc floordiv rfloordiv".split()
):
    setattr(Guess, f"__{_name}__", _refuse)


# What is asked of tensors, as Python asks ---------------------------------------------


class Installed:
    """What reads numbers off tensors, or makes tensors of them, knows meta tensors.

    Where nothing is imagined it does what it always does. It ends with this object.
    """

    def __init__(self) -> None:
        _device._device_constructors()  # kept by torch: not with ours in it
        before = [(owner, name, vars(owner).get(name)) for owner, name, _ in _REPLACED]
        weakref.finalize(self, _put_back, before)
        for owner, name, replacement in _REPLACED:
            setattr(owner, name, _calling(replacement, getattr(owner, name)))


def _calling(replacement: Callable, original: Callable) -> Callable:
    """Make a function, which is a method in a class, that may call the original."""
    return lambda *args, **kwargs: replacement(original, *args, **kwargs)


def _put_back(before: list[tuple]) -> None:
    for owner, name, own in before:
        if own is None:  # it was a base class's
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _item(original: Callable, self: torch.Tensor) -> object:
    try:
        return original(self)
    except Unknown:
        if not self.is_floating_point() and _in_layer():
            raise
        return Guess()


def _float(original: Callable, self: torch.Tensor) -> float:
    """Give ``float`` a number; it has to be a plain one, which may be looked at.

    So there is one for a loop, which adds it up, and none for a layer.
    """
    try:
        return original(self)
    except Unknown:
        if _in_layer():
            raise
        return GUESS


def _in_layer() -> bool:
    return any(len(tracker.modules) > 1 for tracker in counting.get())


def _formatted(original: Callable, self: torch.Tensor, spec: str) -> str:
    if self.is_meta and not self.dim() and imagined_device.get():
        return format(self.item(), spec)
    return original(self, spec)


def _reads(original: Callable, self: torch.Tensor, *args, **kwargs) -> object:
    """Read all of a tensor."""
    if not imagined_device.get():
        return original(self, *args, **kwargs)
    from helpers.dry_run.values import known

    value = known(self)
    if value is None:
        raise Unknown(original.__name__)
    with torch._C._DisableTorchDispatch():
        return original(value.clone(), *args, **kwargs)


def _made(original: Callable, data, *, device=None, **how) -> torch.Tensor:
    """Make a tensor on the meta device of numbers, which it would lose at once."""
    if not imagined_device.get() or isinstance(data, torch.Tensor):
        return original(data, device=device, **how)
    if device is None or torch.device(device).type != "meta":
        made = original(data, device=device, **how)
    else:
        from helpers.dry_run.values import stand_in_of

        grad = how.pop("requires_grad", False)
        with torch._C._DisableTorchDispatch():
            made = stand_in_of(original(data, **how))
        made = torch.ops.aten.lift_fresh(made).requires_grad_(grad)
    if any(isinstance(number, Guess) for number in tree_leaves(data)):
        held = vars(made.untyped_storage())
        held.pop("value", None)
        held["unknown"] = True
    return made


def _cuda_begins(original: Callable) -> None:
    """Say what is wrong where a step names a GPU that is not there."""
    if imagined_device.get() and not torch.cuda.is_available():
        names = [name for tracker in counting.get() for name in tracker.modules[1:]]
        where = f"layer {names[-1]!r}" if any(names[-1:]) else "the step"
        raise PlanFault(
            f"{where} names the device 'cuda', which is not there; give the device of "
            "a tensor that is, as device=x.device"
        )
    original()


def _made_like(original: Callable, self: torch.Tensor, data, **how) -> torch.Tensor:
    given = {"dtype": self.dtype, "device": self.device, **how}
    if not self.is_meta or not imagined_device.get():
        return original(self, data, **how)
    return torch.tensor(data, **given)


_REPLACED = [
    (torch.Tensor, "item", _item),
    (torch.Tensor, "__float__", _float),
    (torch.Tensor, "__format__", _formatted),
    (torch.Tensor, "tolist", _reads),
    (torch.Tensor, "numpy", _reads),
    (torch.Tensor, "__array__", _reads),
    (torch.Tensor, "new_tensor", _made_like),
    (torch, "tensor", _made),
    (torch, "as_tensor", _made),
    (torch.cuda, "_lazy_init", _cuda_begins),
]
