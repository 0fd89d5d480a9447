"""Follow every module through one forward pass: what it costs, what it is fed."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from helpers.checkpointing import segments_of
from helpers.inspection._hazards import Frame, HazardWatch
from helpers.timeline import Observer, flops_of
from helpers.timeline.feeds import Feeds, hooked


class Calls(Observer):
    """What happens while a model's modules call each other.

    Attributes:
        feeds: calls of each module, by name; the model itself has no name.
        flops: forward FLOPs of each module, with all that lies in it.
        hazards: what was found on the way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.hazards = model, HazardWatch(model)
        self.feeds = Feeds(model, [name for name, _ in model.named_modules()])
        self.flops: dict[str, int] = {}
        self._frames: list[Frame] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow all calls inside the block; the modules' own hooks come first."""
        frames = hooked(self.model, self.feeds.names, self._enter, self._leave)
        with self.feeds.watching(), frames:
            yield

    def after(self, func: Callable, args: tuple, kwargs: dict, out: object) -> None:
        """Note an operator's FLOPs, and what it writes on."""
        if torch._C._current_graph_task_id() == -1 and self._frames:
            flops = flops_of(func, args, kwargs, out)
            for frame in self._frames:
                self.flops[frame.name] = self.flops.get(frame.name, 0) + flops
            self.hazards.operator(func, args, self._frames)

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._frames.append(Frame(name, module, [args, kwargs]))

    def _leave(self, *_: object) -> None:
        frame = self._frames.pop()
        self.hazards.leave(frame, self._frames[-1] if self._frames else None)

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
