"""What is not safe inside a checkpointed segment, found while a forward pass runs.

Backward runs a segment a second time. What a forward changes besides its output is
then changed twice, and numbers that ``torch`` does not draw are drawn anew.

Not found: numbers from a generator that no module holds, from the system or the clock,
or that a library draws in C; and state that is kept outside of the modules.
"""

import contextlib
import random
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from helpers.checkpointing import Undo
from helpers.timeline import tensors_in

Storages = weakref.WeakKeyDictionary


@dataclass(frozen=True)
class Hazard:
    """Why a module is not safe in a segment, or not what one expects there."""

    name: str
    kind: Literal[
        "statistics", "in place", "randomness", "hook", "state", "shared", "prediction"
    ]
    sentence: str = field(compare=False)

    def __str__(self) -> str:
        return self.sentence


def standing_hazards(model: nn.Module) -> list[Hazard]:
    """Find what can be seen without a run: hooks, generators, modules used twice.

    And the modules whose bytes no dry run knows.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return [
        Hazard(name, kind, sentence)
        for name, module in model.named_modules()
        for kind, sentence in _standing(name, module, names[id(module)])
    ]


def _standing(
    name: str, module: nn.Module, names: list[str]
) -> Iterator[tuple[str, str]]:
    who = _called(name)
    if name and (module._forward_hooks or module._forward_pre_hooks):
        yield "hook", f"{who} has a forward hook: a segment around it runs it twice"
    if isinstance(module, nn.RNNBase):
        yield (
            "prediction",
            f"{who} is recurrent: its kernels keep bytes of their own choice, so a "
            "prediction may be off; measure it",
        )
    for attribute, value in vars(module).items():
        if _is_generator(value):
            yield (
                "randomness",
                f"{who} has a random generator of its own ({attribute!r}): "
                "recomputation draws other numbers",
            )
    if len(names) > 1:
        listed = " and ".join(map(repr, names))
        yield "shared", f"{listed} are one module: a box on it checkpoints all its uses"


def _is_generator(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = (numpy.random.Generator, numpy.random.RandomState) if numpy else ()
    return isinstance(value, (torch.Generator, random.Random, *kinds))


def _called(name: str) -> str:
    return repr(name) if name else "the model"


class Frame:
    """One call of a module, and how things stood when it began."""

    def __init__(self, name: str, module: nn.Module, inputs: object) -> None:
        self.name, self.module = name, module
        self.inputs = weakref.WeakSet(x.untyped_storage() for x in tensors_in(inputs))
        self.random = random_states()
        self.attributes = _attributes(module)
        self.drawn_inside = False


class HazardWatch:
    """Notes what each module's forward does besides its output."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[Hazard, None] = dict.fromkeys(standing_hazards(model))
        # By storage: the modules that have read it, and the buffer that it holds.
        self.readers: Storages[list[str]] = Storages()
        self.buffers: Storages[tuple[str, str]] = Storages(
            (buffer.untyped_storage(), (owner, name))
            for owner, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
        )

    def add(self, name: str, kind: str, sentence: str) -> None:
        """Note a hazard; the sentence has a place for the module's name."""
        self.found.setdefault(Hazard(name, kind, sentence.format(_called(name))))

    def operator(self, func, args: tuple, frames: list[Frame]) -> None:
        """Look at one operator: whether it writes on an input, or on a buffer."""
        if not func._schema.is_mutable:
            return
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                for tensor in tensors_in(value):
                    self._written(func, tensor.untyped_storage(), frames)

    def _written(
        self, func, storage: torch.UntypedStorage, frames: list[Frame]
    ) -> None:
        op, so = func.overloadpacket.__name__, "no segment can start with it"
        for frame in frames:
            if storage in frame.inputs and frame.name:
                changes = f"{{}} changes its input in place ({op}): {so}"
                self.add(frame.name, "in place", changes)
        for name in self.readers.get(storage, ()):
            changed = f"the input of {{}} is changed in place later ({op}): {so}"
            self.add(name, "in place", changed)
        if storage in self.buffers:
            owner, buffer = self.buffers[storage]
            self.statistics(owner, frames[-1].module if frames else None, buffer)

    def statistics(self, name: str, module: nn.Module | None, buffer: str) -> None:
        """Note a buffer that forward changes; a norm's statistics go by one name."""
        is_norm = isinstance(module, _NormBase)
        what = "running statistics" if is_norm else f"buffer {buffer!r}"
        twice = f"{{}} updates its {what}: in a segment, every batch counts twice"
        self.add(name, "statistics", twice)

    def leave(self, frame: Frame, outer: Frame | None) -> None:
        """Compare how things stand after a module's call with how they stood."""
        module = frame.module
        if frame.name:
            for storage in frame.inputs:
                self.readers.setdefault(storage, []).append(frame.name)
        is_norm = isinstance(module, _NormBase) and module.training
        if is_norm and module.track_running_stats:
            self.statistics(frame.name, module, "running_mean")
        drawn = random_states() != frame.random
        if drawn and not frame.drawn_inside:
            others = "{} draws random numbers outside torch: recomputation draws others"
            self.add(frame.name, "randomness", others)
        if drawn and outer:
            outer.drawn_inside = True
        for key, value in _attributes(module).items():
            if frame.attributes.get(key) != value:
                twice = "{} changes its attribute %r: in a segment, it does so twice"
                self.add(frame.name, "state", twice % key)
                break


def random_states() -> tuple:
    """Read the generators of Python and, where it is loaded, of NumPy."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *rest = numpy.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest)


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the generators of Python and NumPy back at a block's end."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    with Undo() as undo:
        undo.callback(random.setstate, python)
        if numpy:
            undo.callback(numpy.random.set_state, numpy.random.get_state())
        yield


def _attributes(module: nn.Module) -> dict[str, object]:
    """Read a module's plain attributes; of a list or dict its length."""
    return {
        key: len(value) if isinstance(value, list | dict) else value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | list | dict)
        and not key.startswith("_")
    }
