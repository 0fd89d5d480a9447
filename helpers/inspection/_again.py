"""Run each module a second time where backward would, and see what is another then.

A checkpointed module runs its forward again in backward, on the same arguments. So that
is done here with every module, one after the other, when backward asks for its first
saved tensor: what it saves has to have the same numbers (see ``_numbers``), and what it
holds has to be as it was. It stops early, as checkpoint does. Backward does not follow.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from helpers.checkpointing import Undo
from helpers.dry_run import keep_attributes
from helpers.inspection._hazards import Findings, Hazard, around, random_states
from helpers.inspection._held import copies_in, put_back
from helpers.inspection._numbers import Numbers
from helpers.measure.faults import first_line
from helpers.timeline import tensors_in
from helpers.timeline.feeds import hooked

_MODULES_OWN = set(vars(nn.Module())) - {"training"}
_TORCHS_OWN = {one for one in vars(nn).values() if isinstance(one, type)}
_DEVICES = "cpu", "cuda"


class Over(BaseException):
    """All is known, and the rest of the step is not needed."""


class _Stop(BaseException):
    """What a module saves is complete: checkpoint stops here, too."""


@dataclass(eq=False)
class Call:
    """One call of a module, and how things stood when it began."""

    name: str
    module: nn.Module
    with_hooks: bool  # of its own, as it runs beside others in a segment
    args: tuple
    kwargs: dict
    given: Hashable  # its arguments
    versions: list[int]  # of its arguments that autograd keeps a count of
    own: dict[str, Hashable]  # what the module holds
    draws: int
    autocast: list[tuple]
    random: tuple | None
    saved: slice  # what it saves, among all that is saved
    turn: int  # how many calls began before
    turns: int = 0  # and before its end
    left: dict[str, Hashable] = field(default_factory=dict)  # what it holds then
    drawn_inside: bool = False

    @property
    def function(self) -> Callable:
        return self.module if self.with_hooks else self.module.forward

    @property
    def within(self) -> str:
        """Where it is run again: see ``Hazard``."""
        return "" if self.with_hooks else self.name

    @property
    def count(self) -> int:
        """How many tensors it saves; without one it is not run again."""
        return self.saved.stop - self.saved.start


def hazards_in(step: Callable, model: nn.Module, run: Callable) -> list[Hazard]:
    """Find what is not safe in a plan, by a step on meta tensors; all is put back.

    Args:
        run: runs an operator, as ``run(func, args, kwargs)``.
    """
    before = random_states()
    found = _found(step, Again(model, run))
    if random_states() != before:  # who draws is looked for only then
        found = _found(step, Again(model, run, random_states))
    return list(found.hazards.values())


def _found(step: Callable, again: "Again") -> Findings:
    with Undo() as undo:
        keep_attributes(undo, again.model)
        try:
            with again.watching():
                step()
        except Over:
            pass
        except Exception as error:  # of the step, or it cannot be looked at
            why = f"what a plan changes in {{}} is not known ({first_line(error)})"
            again.found.add("", "unknown", f"{why}; verify it", "", *again.modules)
    return again.found


class Again:
    """Follows a step's forward, then runs its modules again.

    Args:
        run: runs an operator, as ``run(func, args, kwargs)``.
        random: reads the generators that checkpoint does not put back.
    """

    def __init__(
        self, model: nn.Module, run: Callable, random: Callable = lambda: None
    ) -> None:
        self.model, self.found, self.random = model, Findings(model), random
        self.numbers = Numbers(run, self._written)
        self.modules = dict(model.named_modules())
        self.hooked = [name for name, one in self.modules.items() if _is_hooked(one)]
        self.plain = {name for name, one in self.modules.items() if _is_plain(one)}
        self.calls: list[Call] = []
        self.open: list[Call] = []
        self.given: dict[int, list[Call]] = {}  # by storage: who is given it
        self.saved: list[tuple[int, Hashable]] = []  # storage and number
        self.stop_at: int | None = None  # while a module runs again
        self.end: dict[str, dict[str, Hashable]] = {}  # what each holds, by name
        self.kept: dict[str, list[tuple]] = {}  # what it is put back to, by name
        self.inside: dict[str, list[str]] = {}  # a module and all in it, by name
        self.is_over = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow a step inside the block, as far as it is needed."""
        watch, leave = functools.partial(hooked, self.model), self._leave
        enter = functools.partial(self._enter, with_hooks=True)
        self.numbers.tell_apart([vars(module) for module in self.modules.values()])
        with Undo() as undo:
            undo.enter_context(torch.autograd.set_multithreading_enabled(False))
            undo.enter_context(watch(self.modules, self._enter, leave, (False, True)))
            undo.enter_context(watch(self.hooked, enter, leave, (True, False)))
            undo.enter_context(saved_tensors_hooks(self._save, self._unpack))
            undo.enter_context(self.numbers)
            yield

    # The step's own forward ----------------------------------------------------------

    def _enter(
        self,
        name: str,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        with_hooks: bool = False,
    ) -> None:
        if self.is_over:
            return
        here = len(self.saved)
        number = self.numbers.of if self.open else self.numbers.tell_apart
        who = name, module, with_hooks, args, kwargs, number((args, kwargs))
        how = _versions(args), self._holds(module), self.numbers.draws.get(0, 0)
        how += _autocast(), self.random(), slice(here, here), len(self.calls)
        call = Call(*who, *how)
        self.calls.append(call)
        self.open.append(call)
        for value in (*args, *kwargs.values()):
            for tensor in tensors_in(value):
                self.given.setdefault(tensor.untyped_storage()._cdata, []).append(call)

    def _leave(self, *_: object) -> None:
        if self.is_over:
            return
        call = self.open.pop()
        call.saved = slice(call.saved.start, len(self.saved))
        call.turns, call.left = len(self.calls), self._holds(call.module)
        if self.random() != call.random:
            if not call.drawn_inside and call.count:
                self.found.random(call.name)
            if self.open:
                self.open[-1].drawn_inside = True

    def _written(self, func: Callable, tensor: torch.Tensor) -> None:
        """Look at an operator's write: whether it is on a module's input."""
        if not self.is_over and func._schema.is_mutable:
            op = func.overloadpacket.__name__
            for call in self.given.get(tensor.untyped_storage()._cdata, ()):
                self.found.in_place(call.name, op, later=call not in self.open)

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        number = self.numbers.tensor(tensor)
        strided = tensor.layout is torch.strided
        storage = tensor.untyped_storage()._cdata if strided else 0
        self.saved.append((storage, number))
        if len(self.saved) == self.stop_at:
            raise _Stop
        return tensor

    def _unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Look at all modules when backward begins."""
        if not self.is_over:
            self.is_over = True
            self.look()
            raise Over
        return tensor

    # The second time -----------------------------------------------------------------

    def look(self) -> None:
        """Run again the first and the last call of each module, each from here."""
        self.end = {name: self._holds(one) for name, one in self.modules.items()}
        self.kept = {n: copies_in(vars(one)) for n, one in self.modules.items()}
        for name in self.modules:
            for outer in around(name):
                self.inside.setdefault(outer, []).append(name)
        first = {(call.name, call.with_hooks): call for call in reversed(self.calls)}
        last = {(call.name, call.with_hooks): call for call in self.calls}
        for call in dict.fromkeys([*last.values(), *first.values()]):
            if call.name and call.count and not self._is_same(call):
                self._look_at(call)
        self.found.drop_in_place({call.name for call in self.calls if call.count})

    def _is_same(self, call: Call) -> bool:
        """Say of a call of PyTorch's own modules that nothing they read has changed."""
        return (
            self.plain.issuperset(self.inside[call.name])
            and all(one.own == self.end[one.name] for one in self._within(call))
            and self.numbers.of((call.args, call.kwargs)) == call.given
        )

    def _within(self, call: Call) -> list[Call]:
        return self.calls[call.turn : call.turns]

    def _look_at(self, call: Call) -> None:
        saved, numbers = self.saved, self.numbers
        known, drawn = dict(numbers.known), dict(numbers.draws)
        given = copies_in([call.args, call.kwargs])
        self.saved, self.stop_at = [], call.count
        numbers.draws[0] = call.draws
        error = self._run(call)
        effect = "error" if error else self._compare(saved[call.saved], self.saved)
        put_back(given)
        if effect:
            self._explain(call, effect)
        self._look_for_changes(call)
        self.saved, self.stop_at = saved, None
        numbers.known, numbers.draws = known, drawn

    def _run(self, call: Call) -> Exception | None:
        with Undo() as undo:
            undo.enter_context(torch.enable_grad())
            undo.enter_context(saved_tensors_hooks(self._save, self._unpack))
            for device, enabled, dtype in call.autocast:
                if (device, enabled, dtype) not in _autocast():
                    undo.enter_context(torch.autocast(device, dtype, enabled))
            try:
                call.function(*call.args, **call.kwargs)
            except _Stop:
                pass
            except Exception as error:
                return error
        return None

    def _compare(self, first: list[tuple], again: list[tuple]) -> str:
        """Say what a segment does that saves other tensors the second time."""
        if len(first) != len(again):
            return "error"
        statistics = self.numbers.statistics
        for (one, number), (other, its_number) in zip(first, again, strict=True):
            if number != its_number and not {one, other} <= statistics:
                same = isinstance(number, int) or number[1] == its_number[1]
                return "gradients" if same else "error"
        return ""

    def _explain(self, call: Call, effect: str) -> None:
        """Find out why a module computes something else the second time."""
        if self.numbers.of((call.args, call.kwargs)) != call.given:
            if call.name in self.found.changed_in_place:
                is_seen = _versions(call.args) != call.versions
                self.found.changed_in_place[call.name] = "error" if is_seen else effect
            else:
                self.found.argument(call.name, effect)
            return
        if self.found.drawn.intersection(self.inside[call.name]):
            return
        for inner in self._within(call):
            end = self.end[inner.name]
            for key in end.keys() | inner.own.keys():
                if inner.own.get(key) != end.get(key):
                    itself = inner.left.get(key) != inner.own.get(key)
                    self.found.state(inner.name, key, effect, call.within, itself)
                    return
        self.found.other(call.name, effect, call.within)

    def _look_for_changes(self, call: Call) -> None:
        """Find what a module's second forward has changed, and put it back."""
        for name in self.inside[call.name]:
            now, end = self._holds(self.modules[name]), self.end[name]
            if now != end:
                keys = now.keys() | end.keys()
                key = min(key for key in keys if now.get(key) != end.get(key))
                self.found.state(name, key, "state", call.within, True)
            put_back(self.kept[name])

    def _holds(self, module: nn.Module) -> dict[str, Hashable]:
        """Number what a module itself holds, by name."""
        of, held = self.numbers.of, vars(module)
        holds = {k: of(v) for k, v in held.items() if k not in _MODULES_OWN}
        for name in "_buffers", "_parameters":
            for key, value in held[name].items():
                holds[key] = of(value)
        return holds


def _is_plain(module: nn.Module) -> bool:
    """Say whether a module is PyTorch's own, and nobody is told of its calls."""
    return type(module) in _TORCHS_OWN and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _versions(args: tuple) -> list[int]:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return [x._version for x in tensors if not x.is_inference()]


def _autocast() -> list[tuple]:
    on, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    return [(device, on(device), dtype(device)) for device in _DEVICES]
