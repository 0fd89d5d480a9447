"""What is not safe inside a checkpointed segment, or not what one expects there.

Backward runs a segment a second time. What a forward changes besides its output is
then changed twice, what it reads may have changed meanwhile, and numbers that ``torch``
does not draw are drawn anew.
"""

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

Effect = Literal["gradients", "state", "error", ""]
_WORSE = ["", "state", "error", "gradients"]


@dataclass(frozen=True)
class Hazard:
    """Why a module is not safe in a segment, or not what one expects there.

    Attributes:
        name: of the module that it is about.
        effect: what a plan with it does: other gradients, without an error; another
            state of the model after the step; an error in backward; or neither.
        within: the modules that suffer, if they are checkpointed; "" is the model,
            where it is right alone and wrong in a segment with neighbours.
    """

    name: str
    kind: Literal[
        "statistics",
        "in place",
        "randomness",
        "hook",
        "state",
        "argument",
        "values",
        "shared",
        "prediction",
        "unknown",
    ]
    sentence: str = field(compare=False)
    effect: Effect = field(default="", compare=False)
    within: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def is_wrong(self) -> bool:
        """Whether a plan with it gives other gradients or leaves another state."""
        return self.effect in ("gradients", "state")

    def __str__(self) -> str:
        return self.sentence


class Findings:
    """What is found in a model, each thing once."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.hazards: dict[tuple[str, str], Hazard] = {}
        self.changed_in_place: dict[str, Effect] = {}  # by name
        self.drawn: set[str] = set()  # whose random numbers are others, by name
        for name, kind, sentence in _standing(model):
            within = around(name)
            if kind in ("hook", "prediction"):
                within = within[1:] * (kind == "hook")
            effect = "gradients" if kind == "randomness" else ""
            self.add(name, kind, sentence, effect, *within)

    def add(
        self, name: str, kind: str, sentence: str, effect: Effect, *within: str
    ) -> None:
        """Note something, or that more modules suffer, or suffer worse."""
        old = self.hazards.get((name, kind))
        if old and _WORSE.index(old.effect) >= _WORSE.index(effect):
            sentence, effect = old.sentence, old.effect
        suffer = frozenset(within) | (old.within if old else frozenset())
        sentence = sentence.replace("{}", _called(name), 1)
        made = Hazard(name, kind, sentence, effect, suffer)
        self.hazards[name, kind] = made

    def random(self, name: str) -> None:
        """Note that a module draws numbers that checkpoint does not put back."""
        self.drawn.add(name)
        others = "{} draws random numbers outside torch: recomputation draws others"
        self.add(name, "randomness", others, "gradients", *around(name))

    def in_place(self, name: str, op: str, later: bool) -> None:
        """Note that a module's input is changed, by itself or later."""
        if name:
            what = f"{{}} changes its input in place ({op})"
            if later:
                what = f"the input of {{}} is changed in place later ({op})"
            sentence = f"{what}: no segment can start with it"
            self.add(name, "in place", sentence, "", name)
            self.changed_in_place.setdefault(name, "error")

    def drop_in_place(self, names: set[str]) -> None:
        """Keep of the changed inputs those of modules that are run again."""
        for name, effect in self.changed_in_place.items():
            old = self.hazards.pop((name, "in place"))
            if name in names:
                self.add(name, "in place", old.sentence, effect, name)

    def argument(self, name: str, effect: Effect) -> None:
        """Note that what a module was given holds something else in backward."""
        changed = (
            "what {} is given is changed during forward: a segment that starts with it "
            "computes with what is in it by then; give it a copy, or return a new one"
        )
        self.add(name, "argument", changed, effect, name)

    def state(
        self, name: str, key: str, effect: Effect, within: str, itself: bool
    ) -> None:
        """Note that what a module holds is another in backward, or after it."""
        module = self.modules[name]
        kind, what = "state", f"changes its attribute {key!r}"
        end = "in a segment, it does so twice"
        if not itself:
            kind, what = "values", f"has another {key!r} by the time of backward"
            end = "a segment computes with that; hand it over as an argument"
        elif key in module._buffers:
            is_norm = isinstance(module, _NormBase)
            changed = "running statistics" if is_norm else f"buffer {key!r}"
            kind, what = "statistics", f"updates its {changed}"
            end = "in a segment, every batch counts twice"
        if itself and effect != "state":
            end += ", and gradients are wrong"
        self.add(name, kind, f"{{}} {what}: {end}", effect, within)

    def other(self, name: str, effect: Effect, within: str) -> None:
        """Note that a module computes something else the second time."""
        differs = (
            "{} does not compute the same when backward runs it again: it reads what "
            "changes meanwhile outside of it; hand that over as an argument"
        )
        self.add(name, "values", differs, effect, within)


def around(name: str) -> list[str]:
    """List a module's name and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _standing(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Find what can be seen without a run: hooks, generators, modules used twice.

    And the modules whose bytes no dry run knows.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name, module in model.named_modules():
        if name and (module._forward_hooks or module._forward_pre_hooks):
            twice = "{} has a forward hook: a segment around it runs it twice"
            yield name, "hook", twice
        if isinstance(module, nn.RNNBase):
            own = (
                "{} is recurrent: its kernels keep bytes of their own choice, so a "
                "prediction may be off; measure it"
            )
            yield name, "prediction", own
        for attribute, value in vars(module).items():
            if _is_generator(value):
                others = (
                    f"{{}} has a random generator of its own ({attribute!r}): "
                    "recomputation draws other numbers"
                )
                yield name, "randomness", others
        if len(names[id(module)]) > 1:
            listed = " and ".join(map(repr, names[id(module)]))
            one = f"{listed} are one module: a box on it checkpoints all its uses"
            yield name, "shared", one


def _is_generator(value: object) -> bool:
    if type(value) in (bool, int, float, OrderedDict, dict):  # most are
        return False
    numpy = sys.modules.get("numpy")
    kinds = (numpy.random.Generator, numpy.random.RandomState) if numpy else ()
    return isinstance(value, (torch.Generator, random.Random, *kinds))


def _called(name: str) -> str:
    return repr(name) if name else "the model"


def random_states() -> tuple:
    """Read the generators of Python and, where it is loaded, of NumPy."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *rest = numpy.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest)
