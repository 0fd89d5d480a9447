"""Follow every storage that a training step allocates, from its making to its end.

A ``TorchDispatchMode`` sees every operator on its way to the device, under autograd.
It notes the storage of each output once, and a weak reference on that storage tells
when it is freed. Real tensors and meta tensors (shapes without data) look alike from
here, so the same code measures a CPU step and predicts a CUDA one.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.checkpointing import Undo
from helpers.timeline.operators import (
    PHASES,
    Allocation,
    Observer,
    Requests,
    call,
    dense_parts,
    flops_of,
    is_sharded,
    linears,
    local,
    name_of,
    no_scratch,
    outputs_in_order,
    state_tensors,
)
from helpers.units import round_to_block

# Who counts: not what is around a step that somebody else watches.
counting: ContextVar[tuple] = ContextVar("counting", default=())
ONES_LIKE = torch.ops.aten.ones_like.default
LIFT_FRESH = torch.ops.aten.lift_fresh.default
_MADE = (torch.Tensor, tuple, list)


class Tracker(TorchDispatchMode):
    """Notes storages as operators make them and as they are freed.

    Args:
        run: runs an operator, as ``run(func, args, kwargs)``.
        scratch: tells what an operator takes besides tensors, in bytes.
        observers: are told of operators and storages.
    """

    # Without torch.compile's guard, which takes a third of each call.
    _should_skip_dynamo = classmethod(lambda cls: False)

    def __init__(
        self,
        model: nn.Module,
        devices: frozenset[str],
        run: Callable = call,
        scratch: Callable = no_scratch,
        observers: Iterable[Observer] = (),
    ) -> None:
        super().__init__()
        self.run, self.scratch_of, self.observers = run, scratch, tuple(observers)
        self.parameters, self.devices = list(model.parameters()), devices
        named = dict(model.named_modules())
        self.names, self.linears = {id(m): n for n, m in named.items()}, linears(named)
        self.thread = threading.get_ident()
        self.modules = [""]  # the stack of modules whose forward is running
        self.module_of_node: dict[int, str] = {}  # by autograd sequence number
        self.in_optimizer = False
        self.last_phase = "forward"  # of the last operator
        self.watchers: dict[int, weakref.ref] = {}  # by address of the storage
        self.alive: dict[int, Allocation] = {}  # by address of the storage
        self.before: list[Allocation] = []
        self.log: list[tuple[str, Allocation, str]] = []
        self.scratch: list[tuple[int, int, bool, Requests]] = []  # see Timeline
        self.flops = dict.fromkeys(PHASES, 0)
        self.expect("parameter", [*self.parameters, *model.buffers()])
        self.expect("gradient", self._gradients())

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def expect(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were there before the step."""
        for tensor in chain.from_iterable(map(dense_parts, map(local, tensors))):
            storage = tensor.untyped_storage()
            if self._counts(tensor, storage):
                made = self.follow(storage, tuple(tensor.shape), "before", "", "")
                made.category = category
                self.before.append(made)

    def _counts(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
        """Say whether a storage is to be followed, and is not yet."""
        is_new = storage._cdata not in self.alive and storage.nbytes()
        return is_new and tensor.device.type in self.devices

    def follow(
        self, storage: torch.UntypedStorage, shape: tuple[int, ...], *made: str
    ) -> Allocation:
        """Follow a storage, made in a phase by an operator in a module, to its end."""
        allocation = Allocation(round_to_block(storage.nbytes()), shape, *made)
        for observer in self.observers:
            observer.allocating(allocation)
        self.alive[address := storage._cdata] = allocation
        forget = functools.partial(self.forget, address)
        self.watchers[address] = weakref.ref(storage, forget)
        return allocation

    def forget(self, address: int, _: weakref.ref | None = None) -> None:
        """Note that a storage is freed."""
        allocation = self.alive.pop(address)
        del self.watchers[address]
        self.log.append(("free", allocation, self.last_phase))
        for observer in self.observers:
            observer.freed(allocation)

    @property
    def phase(self) -> str:
        """The phase, by autograd's own state: recomputation turns grad on."""
        if torch._C._current_graph_task_id() != -1:
            return "recompute" if torch.is_grad_enabled() else "backward"
        return "optimizer" if self.in_optimizer else "forward"

    @property
    def module(self) -> str:
        """The name of the module that is running, or whose backward is."""
        if len(self.modules) == 1 and torch._C._current_graph_task_id() != -1:
            node = torch._C._current_autograd_node()
            return self.module_of_node.get(node._sequence_nr(), "") if node else ""
        return self.modules[-1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if types and any(map(is_sharded, types)):
            return NotImplemented  # it is run on the shards, and that comes here
        if self not in counting.get():
            return func(*args, **kwargs)
        for observer in self.observers:
            observer.before(func, args, kwargs)
        out = self.run(func, args, kwargs)
        # The profiler's only mark ranges, for optimizers. Few make none of these.
        if isinstance(out, _MADE) or func.namespace != "profiler":
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Callable, args: tuple, kwargs: dict, out: object) -> None:
        """Note what an operator has read and made, in which phase and module."""
        phase = self.phase
        if phase == "forward" or phase == "recompute":
            node = torch.autograd._get_sequence_nr() - 1
            # Only the first operator after a node was made is that node's own.
            self.module_of_node.setdefault(node, self.modules[-1])
            if func is ONES_LIKE and args[0].requires_grad:
                phase = "backward"  # the gradient that backward() starts from
        self.last_phase = phase
        if func is not LIFT_FRESH:
            self.notice(args, phase)
        for observer in self.observers:
            observer.after(func, args, kwargs, out)
        self.flops[phase] += flops_of(func, args, kwargs, out)
        before = len(self.log)
        dense = isinstance(out, torch.Tensor) and out.layout is torch.strided
        for tensor in (out,) if dense else outputs_in_order(func, out):
            storage = tensor.untyped_storage()
            if self._counts(tensor, storage):
                op = name_of(func, args, self.modules[-1] in self.linears)
                made = self.follow(storage, tuple(tensor.shape), phase, op, self.module)
                self.log.append(("alloc", made, phase))
        if requests := self.scratch_of(func, args, kwargs):
            in_engine = phase in ("backward", "recompute")
            self.scratch.append((before, len(self.log), in_engine, requests))

    def notice(self, args: tuple, phase: str) -> None:
        """Count what an operator reads and nobody made: it was there before."""
        category = {"optimizer": "optimizer_state", "backward": "gradient"}.get(phase)
        for arg in args:
            if isinstance(arg, torch.Tensor):
                if arg.layout is not torch.strided:
                    self.expect(category or "input", (arg,))
                elif arg.untyped_storage()._cdata not in self.alive and arg.dim():
                    self.expect(category or "input", (arg,))  # a number has no dim
            elif isinstance(arg, tuple | list):
                self.notice(arg, phase)

    @contextlib.contextmanager
    def watching(self, alone: bool = True) -> Iterator[None]:
        """Record what happens inside the block, then let go of every storage.

        Args:
            alone: whether those who are counting already do not, meanwhile.
        """
        with Undo() as undo:
            undo.callback(self.watchers.clear)
            undo.callback(register_module_forward_pre_hook(self.enter_module).remove)
            leave = self._leave_module
            undo.callback(register_module_forward_hook(leave, always_call=True).remove)
            enter, leave = self._enter_optimizer, self._leave_optimizer
            undo.callback(register_optimizer_step_pre_hook(enter).remove)
            undo.callback(register_optimizer_step_post_hook(leave).remove)
            others = () if alone else counting.get()
            undo.callback(counting.reset, counting.set((*others, self)))
            for observer in self.observers:
                observer.watch(self, undo)
            undo.enter_context(self)
            yield
            self._label("gradient", self._gradients())

    def _label(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in chain.from_iterable(map(dense_parts, map(local, tensors))):
            allocation = self.alive.get(tensor.untyped_storage()._cdata)
            if allocation is not None:
                allocation.category = category

    def enter_module(self, module: nn.Module, args: tuple) -> None:
        """Note that a module's forward begins."""
        if threading.get_ident() == self.thread:
            in_forward = torch._C._current_graph_task_id() == -1
            if len(self.modules) == 1 and in_forward and self in counting.get():
                for observer in self.observers:
                    observer.entered(module)
            self.modules.append(self.names.get(id(module), self.modules[-1]))

    def _leave_module(self, module: nn.Module, args: tuple, output: object) -> None:
        if threading.get_ident() == self.thread:
            self.modules.pop()

    def _enter_optimizer(self, optimizer, args, kwargs) -> None:
        if threading.get_ident() == self.thread:
            self.in_optimizer = True
            self.expect("optimizer_state", state_tensors(optimizer))

    def _leave_optimizer(self, optimizer, args, kwargs) -> None:
        if threading.get_ident() == self.thread:
            self.in_optimizer = False
            self._label("optimizer_state", state_tensors(optimizer))
