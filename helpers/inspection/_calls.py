"""Follow every module through one step: what it costs, and what it is fed."""

from collections.abc import Callable

import torch
from torch import nn

from helpers.checkpointing import Undo, segments_of
from helpers.timeline import Observer, Tracker, flops_of
from helpers.timeline.feeds import Feeds


class Calls(Observer):
    """What happens while a model's modules call each other.

    Attributes:
        feeds: calls of each module, by name; the model itself has no name.
        flops: forward FLOPs of each module, with all that lies in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.feeds = Feeds(model, [name for name, _ in model.named_modules()])
        self.flops: dict[str, int] = {}
        self.tracker: Tracker | None = None

    def watch(self, tracker: Tracker, undo: Undo) -> None:
        """Follow all calls; the modules' own hooks come first."""
        self.tracker = tracker
        undo.enter_context(self.feeds.watching())

    def after(self, func: Callable, args: tuple, kwargs: dict, out: object) -> None:
        """Note an operator's FLOPs."""
        if torch._C._current_graph_task_id() == -1:
            if flops := flops_of(func, args, kwargs, out):
                for name in dict.fromkeys(self.tracker.modules[1:]):
                    self.flops[name] = self.flops.get(name, 0) + flops

    def chains(self) -> tuple[list[tuple[str, ...]], dict[str, str]]:
        """Find chains, and say for each list of modules that is none where it breaks.

        Returns:
            Runs of names that can share a segment; sentences by the list's name.
        """
        chains, breaks, why = [], {}, self.feeds.break_between
        for parent, module in self.model.named_modules():
            names = [f"{parent}.{child}".lstrip(".") for child in module._modules]
            runs = segments_of(names, lambda one, other: not why(one, other)).segments
            chains += [run for run in runs if len(run) > 1]
            if isinstance(module, nn.ModuleList) and len(runs) > 1:
                breaks[parent] = why(runs[0][-1], runs[1][0])
        return chains, breaks
