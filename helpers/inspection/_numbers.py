"""Numbers for values that a dry run does not have: equal values have equal numbers.

What an operator makes is numbered by the operator and the numbers of its arguments. So
the same computation, run again, gives the same numbers if it reads the same values,
wherever these are kept; only what is random in itself takes its turn's number as well.
"""

import ctypes
import itertools
from collections import deque
from collections.abc import Callable, Hashable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.dry_run.values import known
from helpers.inspection._held import is_whole, vars_of
from helpers.timeline import tensors_in

_PLAIN = {bool, int, str, bytes, type(None), torch.dtype, torch.device}
_MANY = (list, tuple, set, frozenset, deque)
_DEEP = 7  # a cache's keys: arguments, a tuple, the cache, its list, a layer, its own
_READ_BYTES = 512  # of a real tensor, whose values are read


class Numbers(TorchDispatchMode):
    """Runs operators and numbers what they make.

    Args:
        run: runs an operator, as ``run(func, args, kwargs)``.
        written: told of each tensor that an operator writes on, with the operator.
    """

    def __init__(self, run: Callable, written: Callable) -> None:
        super().__init__()
        self.run, self.written = run, written
        # By address; the storage is kept, so that no other one takes its place.
        self.known: dict[int, tuple[torch.UntypedStorage, Hashable]] = {}
        self.statistics: set[int] = set()  # a norm's, which it does not compute with
        self.draws: dict[int, int] = {}  # by generator; 0 is torch's own
        self._fresh, self._apart = itertools.count(1), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        writes = _writes(func, args, kwargs)
        read = args
        if func in _NORMS and writes:
            self.statistics.update(x.untyped_storage()._cdata for x in writes)
            read = args[:3] + args[5:]
        number = hash(
            (func, self.of(read), self.of(kwargs), self._turn(func, args, kwargs))
        )
        out = self.run(func, args, kwargs)
        for place, tensor in enumerate(writes):
            self._set(tensor.untyped_storage(), (number, -place))
            self.written(func, tensor)
        made = (out,) if isinstance(out, torch.Tensor) else tensors_in(out)
        for place, tensor in enumerate(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self._set(storage, (number, place))
        return out

    def _turn(self, func: Callable, args: tuple, kwargs: dict) -> int | None:
        """Count what is drawn; a recomputation draws torch's own numbers again."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        values = [*args, *kwargs.values()]
        given = [id(one) for one in values if isinstance(one, torch.Generator)]
        key = given[0] if given else 0
        self.draws[key] = self.draws.get(key, 0) + 1
        return self.draws[key]

    def _set(self, storage: torch.UntypedStorage, number: Hashable) -> None:
        self.known[storage._cdata] = storage, hash(number)

    def tensor(self, tensor: torch.Tensor) -> Hashable:
        """Number a tensor: what its storage holds, and which part of it this is."""
        if tensor.layout is not torch.strided:
            return id(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self._set(storage, self._first(tensor))
        number = self.known[storage._cdata][1]
        return number, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _first(self, tensor: torch.Tensor) -> Hashable:
        """Number what no operator has made: a constant's bytes, or another one each."""
        value = known(tensor)
        storage = (tensor if value is None else value).untyped_storage()
        if value is not None and storage.nbytes() <= _READ_BYTES:
            return ctypes.string_at(storage.data_ptr(), storage.nbytes())
        return storage.nbytes(), next(self._fresh) if self._apart else 0

    def tell_apart(self, value: object) -> Hashable:
        """Number what is there before a forward: each tensor has a value of its own."""
        self._apart = True
        number = self.of(value)
        self._apart = False
        return number

    def of(self, value: object, deep: int = _DEEP) -> Hashable:
        """Number a value of any kind, with all that it holds."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if kind is float:
            return value if value == value else "nan"
        if is_whole(value) or not deep:
            return id(value)
        if isinstance(value, _MANY):
            return kind, *[self.of(item, deep - 1) for item in value]
        if not isinstance(value, dict):
            value = vars_of(value)
        if value is None:
            return id(value)
        items = [(self.of(k, deep - 1), self.of(v, deep - 1)) for k, v in value.items()]
        return kind, *items


_aten = torch.ops.aten
_NORMS = (
    _aten.native_batch_norm.default,
    _aten.cudnn_batch_norm.default,
    _aten.miopen_batch_norm.default,
    _aten._native_batch_norm_legit.default,
    _aten._batch_norm_with_update.default,
)


def _writes(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """List the tensors that an operator writes on; not every norm says so itself."""
    if func in _NORMS:
        updates = func is _NORMS[-1] or args[5]
        return [x for x in args[3:5] if updates and x is not None]
    if not func._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    given |= kwargs
    written = [
        given.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
    ]
    return list(tensors_in(written))
