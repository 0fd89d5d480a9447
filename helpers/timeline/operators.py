"""What operators read, make and multiply, and who is told of it."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from helpers.checkpointing import Undo
from helpers.units import format_bytes

if TYPE_CHECKING:
    from helpers.timeline.tracker import Tracker

PHASES = ("forward", "backward", "recompute", "optimizer")
CATEGORIES = (
    "parameter",
    "optimizer_state",
    "input",
    "gradient",
    "activation",
    "recomputed",
    "temporary",
)

# PyTorch counts CUDA's fused attention, but not the CPU's, which multiplies as much.
_aten = torch.ops.aten
_MASK_FIRST = _aten.native_dropout.default
_FLASH = "_scaled_dot_product_flash_attention"
_ALIKE = [
    (getattr(_aten, f"{_FLASH}_for_cpu{end}"), getattr(_aten, f"{_FLASH}{end}"))
    for end in ("", "_backward")
]


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage: what made it, and for what. ``bytes`` are whole 512 B blocks."""

    bytes: int
    shape: tuple[int, ...]
    phase: str  # in which it was allocated; "before" the step for what was there
    op: str
    module: str
    category: str = ""

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        made = f"{self.op}{where}, {self.phase}" if self.op else "before the step"
        return f"{format_bytes(self.bytes):>10}  {self.category:<15}  {made}"


class Observer:
    """Watches a tracker; what it does not care about it leaves as it is here."""

    def watch(self, tracker: "Tracker", undo: Undo) -> None:
        """Watching begins; what is changed for its length goes into ``undo``."""

    def entered(self, module: nn.Module) -> None:
        """A forward begins, inside no other module's."""

    def before(self, func: Callable, args: tuple, kwargs: dict) -> None:
        """An operator is about to run; may raise to prevent it."""

    def after(self, func: Callable, args: tuple, kwargs: dict, out: object) -> None:
        """It has run, and nothing of its output is counted yet."""

    def allocating(self, allocation: Allocation) -> None:
        """A storage is about to be counted; may raise to prevent it."""

    def freed(self, allocation: Allocation) -> None:
        """A storage is gone."""


def categorise(log: Iterable[tuple[str, Allocation, str]]) -> None:
    """Tell what each storage was for, which shows only when the step is over."""
    backward_events, born_at = 0, {}
    kept = {"forward": "activation", "recompute": "recomputed"}
    for kind, allocation, phase in log:
        backward_events += phase == "backward"
        if kind == "alloc":
            born_at[allocation] = backward_events
            if not allocation.category:
                allocation.category = kept.get(phase, "temporary")
        elif born_at.get(allocation) == backward_events and phase in kept:
            allocation.category = "temporary"  # no backward has seen it


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value, nested in tuples, lists or dicts.

    Of a sparse one those that hold its numbers.
    """
    for leaf in (value,) if isinstance(value, torch.Tensor) else tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield from dense_parts(leaf)
        elif (plain := _plain(leaf)) is not leaf:
            yield from tensors_in(plain)


def outputs_in_order(func: torch._ops.OpOverload, out: object) -> Iterator:
    """Yield an operator's tensors in the order in which it makes them."""
    return tensors_in(out[::-1] if func is _MASK_FIRST else out)


def linears(named: dict[str, nn.Module]) -> set[str]:
    """Name the modules that add nothing but biases: by ``F.linear``.

    Not a whole model: what a step adds beside it has no other name.
    """
    forwards = nn.Linear.forward, nn.MultiheadAttention.forward
    found = {name for name, one in named.items() if type(one).forward in forwards}
    return found - {""}


def name_of(func: torch._ops.OpOverload, args: tuple, in_linear: bool) -> str:
    """Name an operator as where nobody watches: ``F.linear`` adds a bias in place."""
    if in_linear and func is _aten.add.Tensor and args[1].dim() == 1:
        return "add_"
    return func.overloadpacket.__name__


def dense_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """List the tensors that hold a sparse one's numbers; a dense one is its own."""
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    names = ("crow", "col") if by_row else ("ccol", "row")
    places = [getattr(tensor, f"{name}_indices")() for name in names]
    return (*places, tensor.values())


def map_tensors(change: Callable, value: object) -> object:
    """Change each tensor in a value, nested in tuples, lists or dicts."""

    def on_leaf(leaf: object) -> object:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        plain = _plain(leaf)
        return leaf if plain is leaf else map_tensors(change, plain)

    return tree_map(on_leaf, value)


def _plain(leaf: object) -> object:
    """Make a dict or list of one of a class that PyTorch's trees do not know."""
    if isinstance(leaf, dict):
        return dict(leaf)
    return list(leaf) if isinstance(leaf, tuple | list) else leaf


def same_for_same(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """Let a function be called once for each tensor, and give its answer again."""
    made: dict[int, torch.Tensor] = {}

    def find(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = make(tensor)
        return made[id(tensor)]

    return find


def is_sharded(kind: type) -> bool:
    """Say whether such tensors say a whole shape and hold a shard, as a DTensor."""
    return hasattr(kind, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Take this rank's shard of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if is_sharded(type(tensor)) else tensor


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """List what an optimizer keeps between steps."""
    return list(tensors_in(list(optimizer.state.values())))


def call(func: Callable, args: tuple, kwargs: dict) -> object:
    return func(*args, **kwargs)


# What an operator requests beside its outputs, in order, and gives back at its end; a
# number below 0 gives back the last of that size before.
Requests = tuple[int, ...]


def no_scratch(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Requests:
    return ()


def flops_of(func: torch._ops.OpOverload, args: tuple, kwargs: dict, out) -> int:
    """Count the FLOPs of one call: matrix products, convolutions and attention."""
    packet = func.overloadpacket
    for uncounted, like in _ALIKE:  # by identity, as hashing takes longer
        packet = like if packet is uncounted else packet
    if packet not in flop_registry:
        return 0
    shapes = _shapes((args, tuple(kwargs.items()), out))
    return _of_shapes(flop_registry[packet], *shapes)


@functools.cache
def _of_shapes(count: Callable, args: tuple, kwargs: tuple, out: tuple) -> int:
    return count(*args, **dict(kwargs), out_val=out)


def _shapes(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.shape
    if isinstance(value, tuple | list):
        return tuple([_shapes(item) for item in value])
    return value
