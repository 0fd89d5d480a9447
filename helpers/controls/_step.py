"""The reader's step and card: optimizer, precision, GPU, and how much memory it has."""

from collections.abc import Callable

import ipywidgets as widgets
import torch

from helpers.allocator.cards import CARDS
from helpers.controls._look import WIDE
from helpers.dry_run import GivenOptimizer
from helpers.measure import StepReport
from helpers.units import format_bytes

GIB = 2**30
OPTIMIZERS = {"none": None, "SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}


class StepFields(widgets.VBox):
    """Fields of the step.

    Args:
        device: a CPU has no card to choose.
        optimizer, autocast: what was given; it stays to be chosen.
        changed: called without arguments when the reader changes the step.
        limited: the same, for the card's memory.
    """

    def __init__(
        self,
        device: str,
        optimizer: GivenOptimizer,
        autocast: torch.dtype | None,
        changed: Callable[[], None],
        limited: Callable[[], None],
    ) -> None:
        default = "this one" if torch.cuda.is_available() else "H100"
        cards = {name: name for name in CARDS} | {default: None}
        self._meant: dict[widgets.Dropdown, dict[str, object]] = {}
        self.optimizer = self._choice("optimizer", OPTIMIZERS, optimizer)
        self.precision = self._choice("precision", PRECISIONS, autocast)
        self.card = self._choice("card", cards, None)
        look = {"description": "my GPU, GiB", "tooltip": "my GPU has so many GiB"}
        look |= {"min": 0, "max": 10**6, "step": 1, "layout": WIDE}
        self.memory = widgets.BoundedFloatText(0, **look)
        self._options = {"optimizer": self.optimizer, "autocast": self.precision}
        self._options["gpu"] = self.card
        fields = [*self._options.values(), self.memory]
        for field in fields:
            field.style.description_width = "86px"
            heard = limited if field is self.memory else changed
            field.observe(lambda _, heard=heard: heard(), "value")
        super().__init__(fields if device == "cuda" else fields[:2])

    def _choice(
        self, name: str, meant: dict[str, object], given: object
    ) -> widgets.Dropdown:
        if given not in meant.values():
            meant = {"as given": given} | meant
        first = next(word for word in meant if meant[word] is given)
        look = {"description": name, "tooltip": name, "layout": WIDE}
        made = widgets.Dropdown(options=list(meant), value=first, **look)
        self._meant[made] = meant
        return made

    @property
    def options(self) -> dict[str, object]:
        """What a step is predicted with, where it is not the default."""
        chosen = {n: self._meant[one][one.value] for n, one in self._options.items()}
        return {name: value for name, value in chosen.items() if value is not None}

    def write(self, options: dict[str, object]) -> None:
        """Show what the step is, where the reader's wish could not be granted."""
        for name, field in self._options.items():
            meant = self._meant[field]
            field.value = next(n for n in meant if meant[n] is options.get(name))

    def limit(self, report: StepReport) -> dict[str, object] | None:
        """Say whether a step fits into the card's memory; None if none is given.

        Counted as the allocator does, workspace included.
        """
        if not self.memory.value > 0:
            return None
        has_bytes = round(self.memory.value * GIB)
        spare = has_bytes - report.needed_bytes
        fits = (
            f"{format_bytes(abs(spare))} {'to spare' if spare >= 0 else 'too little'}"
        )
        label = f"my GPU, {format_bytes(has_bytes)}: {fits}"
        return {"bytes": has_bytes, "over": spare < 0, "label": label}
