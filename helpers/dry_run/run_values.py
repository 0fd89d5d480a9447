"""Run operators on meta tensors, and keep the values that are known."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from helpers.checkpointing import Undo
from helpers.dry_run.kernels import shared
from helpers.dry_run.numbers import GUESS, Installed, Unknown
from helpers.dry_run.value_cases import CASES
from helpers.dry_run.values import (
    Call,
    Value,
    View,
    answer,
    asks,
    in_optimizer,
    leaves,
    look,
    map_kind,
    may_be_known,
    run_real,
    twin,
    value_of,
)
from helpers.timeline import counting

_aten = torch.ops.aten
# What they make depends on no tensor's values; the place of the number that fills it.
_CONSTANTS = {_aten.full_like: 1, _aten.new_full: 2} | dict.fromkeys(
    [_aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.new_empty]
    + [_aten.new_empty_strided, _aten.new_zeros, _aten.new_ones]
)
_ONES = {_aten.ones_like, _aten.new_ones}
_WHOLE = {_aten.copy_, _aten.fill_, _aten.zero_}  # of what was, they leave nothing
_FINITE = {_aten.isnan, _aten.isinf, _aten._is_any_true, _aten.eq, _aten.ne}


class _Kind:
    """What matters of an operator here."""

    def __init__(self, func: torch._ops.OpOverload) -> None:
        self.func = func  # its address stays its own
        packet = func.overloadpacket
        self.writes = [
            argument.name if argument.kwarg_only else place
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info and argument.alias_info.is_write
        ]
        if packet is _aten._amp_foreach_non_finite_check_and_unscale_:
            self.writes = [0]  # and found_inf stays 0: numbers are taken to be finite
        self.is_random = torch.Tag.nondeterministic_seeded in func.tags
        self.asks = asks(func)
        self.handler = CASES.get(packet)
        special = self.writes or self.asks or self.handler
        self.is_plain = not special and packet not in {*_CONSTANTS, *_FINITE}


_KINDS: dict[int, _Kind] = {}  # by the operator's address: its hash takes longer


def _kind(func: torch._ops.OpOverload) -> _Kind:
    if id(func) not in _KINDS:
        _KINDS[id(func)] = _Kind(func)
    return _KINDS[id(func)]


class Values:
    """Runs operators on meta tensors, and keeps the values that are known.

    Args:
        run: runs an operator on meta tensors alone.
        device: the one that is imagined. Its tensors are on the meta device; so are
            those that a step makes on the CPU, where that is the one.
    """

    def __init__(self, run: Callable, device: str) -> None:
        self.run, self.device = run, device
        self.of_floats = Value.of_floats  # before

    def __call__(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """Run an operator; most are on floats, of which no value is known."""
        if Value.of_floats != self.of_floats:
            return self.look_at(func, args, kwargs)
        return self.run(func, args, kwargs, self.look_at)

    def look_at(self, func: Callable, args: tuple, kwargs: dict) -> object:
        kind = _KINDS.get(id(func)) or _kind(func)
        if kind.is_plain and not kwargs and args:  # as most, and of these none is known
            floats = True
            for arg in args:
                if isinstance(arg, Tensor):
                    if not arg.is_meta or may_be_known(arg):
                        break
                    floats = floats and arg.is_floating_point()
                elif arg is args[0] or isinstance(arg, list) and [*leaves(arg)]:
                    break
            else:
                run = self.run.plain if floats else self.run
                return run(func, args, kwargs)
        if kind.handler:
            return kind.handler(self, func, args, kwargs)
        if "device" in kwargs:
            kwargs = self._on_meta(kind, kwargs)
        has_meta, has_real, all_known = look((*args, *kwargs.values()))
        if kind.is_plain and not all_known and not has_real:
            return self.run(func, args, kwargs)
        has_guess = _has_guess((*args, *kwargs.values()))
        if has_guess and func.overloadpacket is _aten.arange:
            raise Unknown("arange")
        if not has_meta and not _goes_to_meta(kwargs):
            return run_real(func, args, kwargs, all_known and not has_guess)
        return self.run_known(func, args, kwargs)

    def _on_meta(self, kind: _Kind, kwargs: dict) -> dict:
        """Have what is made on the device that is imagined made on the meta device.

        On a CPU, random numbers are real ones; so is what an optimizer keeps there,
        and what C++ asks for, as it may write into it: Python tells of pinned memory.
        """
        stays = kind.is_random or in_optimizer() or "pin_memory" not in kwargs
        stays = self.device == "cpu" and stays
        if kwargs["device"] is None or kwargs["device"].type != self.device or stays:
            return kwargs
        return kwargs | {"device": torch.device("meta")}

    def run_known(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """Run an operator on meta tensors, and keep its outputs' values."""
        kind, given = _kind(func), args
        args, kwargs = map_kind(Tensor, self.adopted, (args, kwargs))
        all_known = look((*args, *kwargs.values()))[2] and not kind.is_random
        if _has_guess((*args, *kwargs.values())):
            all_known = False
        if kind.asks:
            return answer(func, args, kwargs)
        out = self.run(func, args, kwargs)
        if all_known:
            _keep(kind, func, args, kwargs, out)
        elif func.overloadpacket in _CONSTANTS:
            _keep_constant(func, args, out)
        elif func.overloadpacket in _WHOLE and _fills(args):
            _keep_whole(kind, func, args, kwargs, out)
        elif kind.writes:
            for tensor in _written(kind, args, kwargs):
                vars(tensor.untyped_storage()).pop("value", None)
        elif (number := _finite(func, args, out)) is not None:
            real = torch.full(out.shape, number, dtype=out.dtype, device="cpu")
            out.untyped_storage().value = Value.of(real)
        return _given_back(kind, given, args, out)

    def adopted(self, tensor: Tensor) -> Tensor:
        """Make a meta tensor that stands for a real one; a number may stay real."""
        is_number = not tensor.dim() and (self.device == "cuda" or in_optimizer())
        if tensor.is_meta or is_number:
            return tensor
        if tensor.requires_grad:  # its gradient would be none
            raise RuntimeError("a real parameter meets tensors on device meta")
        made = twin(tensor)
        if self.device == "cuda":
            for tracker in counting.get():
                tracker.expect("input", [made])
        return made


def with_values(undo: Undo, run: Callable, device: str) -> Values:
    """Know values, as far as they are known, until a block's end."""
    shared(undo, "numbers", Installed)
    return Values(run, device)


def _goes_to_meta(kwargs: dict) -> bool:
    return "device" in kwargs and kwargs["device"].type == "meta"


def _has_guess(values: tuple) -> bool:
    return any(type(value) is float and value == GUESS for value in values)


def _written(kind: _Kind, args: tuple, kwargs: dict) -> list[Tensor]:
    """List the tensors that an operator changes in place."""
    places = [w for w in kind.writes if isinstance(w, str) or w < len(args)]
    held = [kwargs.get(w) if isinstance(w, str) else args[w] for w in places]
    return list(leaves(held))


def _keep(kind: _Kind, func: Callable, args: tuple, kwargs: dict, out: object) -> None:
    """Keep what an operator's outputs are, and what it has changed."""

    def view(tensor: Tensor) -> object:
        return View(tensor, value_of(tensor)) if tensor.is_meta else tensor.clone()

    written = [t for t in _written(kind, args, kwargs) if t.is_meta]
    before = [value_of(tensor) for tensor in written]
    options = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if "device" in options:
        options["device"] = torch.device("cpu")
    call = Call(func, *map_kind(Tensor, view, (args, options)), before)
    for tensor, value in zip(written, before, strict=True):
        tensor.untyped_storage().value = Value(call, value, tensor)
    for place, tensor in enumerate(leaves(out)):
        if tensor.is_meta and "value" not in vars(tensor.untyped_storage()):
            tensor.untyped_storage().value = Value(call, place, tensor)


def _keep_constant(func: Callable, args: tuple, out: Tensor) -> None:
    place = _CONSTANTS[func.overloadpacket]
    number = args[place] if place else int(func.overloadpacket in _ONES)
    begins_backward = func.overloadpacket is _aten.ones_like and not out.dim()
    aside = begins_backward or in_optimizer()  # which nobody looks at
    if out.is_meta and not aside and not _has_guess((number,)):
        how = {"dtype": out.dtype, "device": torch.device("cpu")}
        call = Call(_aten.full.default, (out.shape, number), how, [])
        out.untyped_storage().value = Value(call, 0, out)


def _fills(args: tuple) -> bool:
    """Say whether a known value is written over all of a storage."""
    to, *values = args
    whole = to.is_meta and to.numel() * to.itemsize == to.untyped_storage().nbytes()
    return whole and look(values)[2] and not _has_guess(values)


def _keep_whole(kind: _Kind, func: Callable, args: tuple, kwargs: dict, out) -> None:
    to = args[0]
    how = {"dtype": to.dtype, "device": torch.device("cpu")}
    call = Call(_aten.empty_strided.default, (to.shape, to.stride()), how, [])
    to.untyped_storage().value = Value(call, 0, to)
    _keep(kind, func, args, kwargs, out)


def _finite(func: Callable, args: tuple, out: object) -> int | None:
    """Say what tests for NaN and infinity give of one number: it is taken as finite.

    ``isfinite`` is ``x == x`` and ``abs(x) != inf``.
    """
    packet = func.overloadpacket
    if packet not in _FINITE or out.numel() != 1:
        return None
    if packet in (_aten.eq, _aten.ne):
        same = args[0] is args[1]
        infinite = isinstance(args[1], float) and math.isinf(args[1])
        if not args[0].is_floating_point() or not (same or infinite):
            return None
        return int(same == (packet is _aten.eq))
    return 0


def _given_back(kind: _Kind, given: tuple, args: tuple, out: object) -> object:
    """Give back a real tensor that an operator has changed, not its stand-in."""
    for place in kind.writes:
        if isinstance(place, str) or place >= len(args) or args[place] is given[place]:
            continue
        for tensor in leaves(given[place]):
            if not tensor.is_meta:
                tensor.untyped_storage().unknown = True  # the stand-in may know
        out = given[place] if out is args[place] else out
    return out
