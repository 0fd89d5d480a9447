"""Follow the calls of every module through one forward pass: who is fed by whom."""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

from helpers.checkpointing import follows, listed_after, marks
from helpers.dry_run import RememberedShapes
from helpers.inspection._hazards import Frame, HazardWatch
from helpers.timeline.tracker import flops_of

_shapes = RememberedShapes()


class Calls:
    """What happens while a model's modules call each other.

    Attributes:
        counts: calls of each module, by name; the model itself has no name.
        flops: forward FLOPs of each module, with all that lies in it.
        hazards: what was found on the way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.hazards = model, HazardWatch(model)
        self.counts: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self._frames: list[Frame] = []
        self._fed: dict[str, tuple] = {}  # the first input, and marks of all others
        self._returned: dict[str, Callable] = {}  # by name, a weak reference

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow all calls inside the block; the modules' own hooks come first."""
        removable = []
        for name, module in self.model.named_modules():
            enter, leave = self._enterer(name), self._leaver()
            removable += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, always_call=True),
            ]
        try:
            yield
        finally:
            for hook in removable:
                hook.remove()

    def run(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """Run an operator on meta tensors, and note its FLOPs and what it writes on."""
        out = _shapes(func, args, kwargs)
        if torch._C._current_graph_task_id() == -1 and self._frames:
            flops = flops_of(func, args, kwargs, out)
            for frame in self._frames:
                self.flops[frame.name] = self.flops.get(frame.name, 0) + flops
            self.hazards.operator(func, args, self._frames)
        return out

    def _enterer(self, name: str) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._frames.append(Frame(name, module, [args, kwargs]))
            self.counts[name] = self.counts.get(name, 0) + 1
            first, *others = args or (None,)
            first = _reference(first)
            self._fed[name] = first, marks(tuple(others), kwargs)

        return enter

    def _leaver(self) -> Callable:
        def leave(module: nn.Module, args: tuple, output: object) -> None:
            frame = self._frames.pop()
            self.hazards.leave(frame, self._frames[-1] if self._frames else None)
            self._returned[frame.name] = _reference(output)

        return leave

    def links(self) -> tuple[list[tuple[str, ...]], dict[str, str]]:
        """Find chains, and say for each list of modules that is none where it breaks.

        Returns:
            Runs of names that can share a segment; sentences by the list's name.
        """
        chains, breaks = [], {}
        for parent, module in self.model.named_modules():
            prefix = f"{parent}." if parent else ""
            names = [f"{prefix}{child}" for child in module._modules]
            runs: list[list[str]] = []
            for name in names:
                reason = self._break(runs[-1][-1], name) if runs else "first"
                if not reason:
                    runs[-1].append(name)
                    continue
                runs.append([name])
                if isinstance(module, nn.ModuleList) and reason != "first":
                    breaks.setdefault(parent, reason)
            chains += [tuple(run) for run in runs if len(run) > 1]
        return chains, breaks

    def _break(self, before: str, after: str) -> str:
        """Say why two neighbours cannot share a segment; nothing if they can."""
        if self.counts.get(before) != 1 or self.counts.get(after) != 1:
            return f"{before!r} and {after!r} are not called once each"
        if follows(self.model, before, after):
            return ""
        if not listed_after(self.model, before, after):
            return f"{before!r} and {after!r} are not in one list"
        (fed, others), (_, others_before) = self._fed[after], self._fed[before]
        if not isinstance(self._returned[before], weakref.ref):
            return f"{before!r} does not return a tensor"
        if fed is not self._returned[before]:
            return f"{after!r} is not fed what {before!r} returns"
        if others != others_before:
            return f"{after!r} is given other arguments than {before!r}"
        return ""


def _reference(value: object) -> object:
    """Refer to a tensor without keeping it alive: one tensor, one reference."""
    return weakref.ref(value) if isinstance(value, torch.Tensor) else type(value)
