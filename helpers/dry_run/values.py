"""Values where they are known: a step without data still has its batch's integers.

What is computed from ids, masks, lengths and constants alone keeps its value, beside
the meta tensor that stands for it, and is computed when somebody asks: ``tolist``, a
boolean index, ``if mask.all()``. Of what comes from floats nobody knows anything.
"""

import functools
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from helpers.dry_run.numbers import Unknown
from helpers.timeline import counting

_aten = torch.ops.aten
_DEEPEST = 50  # so many values wait for each other, at most
_NAMES = {"_local_scalar_dense": "item", "index": "a boolean index"}


# What a storage holds ---------------------------------------------------------------


class Call:
    """One call of an operator on known values, which is run when it is asked for.

    Args:
        written: the values that it changes in place; it changes copies of them.
    """

    def __init__(self, func: Callable, args: tuple, kwargs: dict, written: set) -> None:
        self.call = func, args, kwargs
        self.written = dict.fromkeys(written)
        self.out: list[Tensor] = []
        values = [view.value for view in leaves((args, kwargs), View)]
        self.depth = 1 + max((value.depth for value in values), default=0)

    def run(self) -> None:
        if self.call is None:
            return
        func, args, kwargs = self.call
        with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
            for value in self.written:
                self.written[value] = value.storage().clone()
            real = functools.partial(map_kind, View, self._real)
            out = func(*real(args), **real(kwargs))
        self.out, self.call = list(leaves(out)), None

    def _real(self, view: "View") -> Tensor:
        return view.on(self.written.get(view.value) or view.value.storage())


class Value:
    """What a storage holds: what it is known to, or what a call will tell."""

    of_floats = 0  # how many there have been

    def __init__(self, call: Call | None, which: object, like: Tensor) -> None:
        self.call, self.which, self.real = call, which, None
        self.like = like.shape, like.stride(), like.dtype
        self.depth = call.depth if call else 0
        Value.of_floats += like.is_floating_point()
        if self.depth > _DEEPEST:
            self.storage()

    @classmethod
    def of(cls, real: Tensor) -> "Value":
        """Make the value that a real tensor has."""
        value = cls(None, None, real)
        value.real = _laid_out(real, *value.like)
        return value

    @classmethod
    def in_place(cls, real: Tensor) -> "Value":
        """Make the value that a real tensor has now, and may have no longer later.

        What is computed of it is computed at once.
        """
        value = cls(None, None, real)
        value.real, value.depth = weakref.ref(real.untyped_storage()), _DEEPEST
        return value

    def storage(self) -> torch.UntypedStorage:
        """Tell what it is, on the CPU."""
        if self.real is None:
            call, which = self.call, self.which
            call.run()
            if isinstance(which, Value):
                self.real = call.written[which]
            else:
                self.real = _laid_out(call.out[which], *self.like)
                self.call, self.which, self.depth = None, None, 0
        if isinstance(self.real, weakref.ref):
            return self.real() or _raise("a constant")
        return self.real


def _laid_out(real: Tensor, shape, stride, dtype) -> torch.UntypedStorage:
    """Copy a tensor into a storage of its own, as its stand-in lies in its own."""
    with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
        made = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
        return made.copy_(real).untyped_storage()


class View:
    """A tensor's window on what its storage holds."""

    def __init__(self, tensor: Tensor, value: Value) -> None:
        self.value, self.dtype = value, tensor.dtype
        self.window = tensor.storage_offset(), tensor.shape, tensor.stride()

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        made = torch.empty(0, dtype=self.dtype, device="cpu")
        return made.set_(storage, *self.window)


def value_of(tensor: Tensor) -> Value | None:
    """Find what is known of a meta tensor's storage."""
    storage = tensor.untyped_storage()
    found = vars(storage).get("value")
    if isinstance(found, Tensor):  # as ``stand_in`` leaves it
        found = storage.value = Value.of(found)
    return found


def _raise(what: str) -> None:
    raise Unknown(what)


def known(tensor: Tensor) -> Tensor | None:
    """Give a tensor's value, on the CPU; None if it is not known."""
    if not tensor.is_meta:
        return None if "unknown" in vars(tensor.untyped_storage()) else tensor
    value = value_of(tensor)
    with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
        return None if value is None else View(tensor, value).on(value.storage())


def leaves(value: object, kind: type = Tensor) -> Iterator:
    """Yield the tensors in an operator's arguments."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item, kind)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()), kind)


def map_kind(kind: type, change: Callable, value: object) -> object:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([map_kind(kind, change, item) for item in value])
    if isinstance(value, dict):
        return {name: map_kind(kind, change, item) for name, item in value.items()}
    return value


def stand_in_of(real: Tensor) -> Tensor:
    """Make the meta tensor whose value is a real one, which nobody changes."""
    value = Value(None, None, real)
    value.real = real.untyped_storage()
    return _on_meta(real, value)


def twin(real: Tensor) -> Tensor:
    """Make a meta tensor that stands for one on the host: one storage for one."""
    storage = real.untyped_storage()
    if "twin" not in vars(storage):
        is_known = "unknown" not in vars(storage)
        value = Value.in_place(real) if is_known else None
        storage.twin = _on_meta(real, value).untyped_storage()
    return _window(real, storage.twin)


def _on_meta(real: Tensor, value: Value | None) -> Tensor:
    storage = torch.UntypedStorage(real.untyped_storage().nbytes(), device="meta")
    if value is not None:
        storage.value = value
    return _window(real, storage)


def _window(real: Tensor, storage: torch.UntypedStorage) -> Tensor:
    made = torch.empty(0, dtype=real.dtype, device="meta")
    return made.set_(storage, real.storage_offset(), real.shape, real.stride())


def look(values: tuple) -> tuple[bool, bool, bool]:
    """Say whether there are meta tensors, real ones, and whether all are known."""
    has_meta = has_real = False
    all_known = True
    for value in values:
        if isinstance(value, Tensor):
            if value.is_meta:
                has_meta = True
                all_known = all_known and "value" in vars(value.untyped_storage())
            else:
                has_real = True
                all_known = all_known and "unknown" not in vars(value.untyped_storage())
        elif isinstance(value, tuple | list):
            meta, real, known_too = look(value)
            has_meta, has_real = has_meta or meta, has_real or real
            all_known = all_known and known_too
    return has_meta, has_real, all_known


def may_be_known(tensor: Tensor) -> bool:
    if not Value.of_floats and tensor.is_floating_point():
        return False
    return "value" in vars(tensor.untyped_storage())


def answer(func: Callable, args: tuple, kwargs: dict) -> object:
    """Answer an operator that looks at values by those that are known.

    Raises:
        Unknown: if they are not.
    """

    def real(tensor: Tensor) -> Tensor:
        value = known(tensor)
        if value is None:
            raise Unknown(name_of(func))
        return value

    args, kwargs = map_kind(Tensor, real, (args, kwargs))
    return map_kind(Tensor, stand_in_of, func(*args, **kwargs))


def name_of(func: torch._ops.OpOverload) -> str:
    name = func.overloadpacket.__name__
    return _NAMES.get(name, name.strip("_"))


def asks(func: torch._ops.OpOverload) -> bool:
    """Say whether an operator looks at values; an index only does at those of masks."""
    packet = func.overloadpacket
    asking = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    does = not asking.isdisjoint(func.tags) or packet is _aten._assert_async
    return does and packet is not _aten.index


def run_real(
    func: Callable, args: tuple, kwargs: dict, all_known: bool | None = None
) -> object:
    """Run an operator on the host's tensors, some of which may have no values."""
    if all_known is None:
        all_known = look((*args, *kwargs.values()))[2]
    if not all_known and asks(func):
        raise Unknown(name_of(func))
    out = func(*args, **kwargs)
    for tensor in () if all_known else leaves(out):
        tensor.untyped_storage().unknown = True
    return out


def in_optimizer() -> bool:
    return any(tracker.in_optimizer for tracker in counting.get())
