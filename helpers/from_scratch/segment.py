"""The mechanism of ``use_reentrant=False``: placeholders that recomputation fills.

Autograd records the graph as always, but in the place of each tensor that it saves
there is a placeholder. When backward asks for the first one, the function runs again,
and what autograd saves this time fills all of them.
"""

import contextlib
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

from helpers.from_scratch._arguments import apart, together
from helpers.from_scratch._determinism import (
    Description,
    check_same,
    description,
    saves_more,
)


class _Placeholder:
    """Stands in the graph for a tensor that was dropped.

    ``recomputed`` holds the tensor between its recomputation and its use, by backward
    pass. The graph owns the placeholder, so that what is never used goes with it.
    """

    __slots__ = ("recomputed", "__weakref__")

    def __init__(self) -> None:
        self.recomputed: dict[Hashable, torch.Tensor] = {}


class _EverythingIsBack(Exception):
    """Ends the second run early."""


class Segment:
    """One call with ``use_reentrant=False``: its hooks, and how to run it again."""

    def __init__(
        self, function, args, surroundings, contexts, *, stops_early, compares
    ) -> None:
        self.function, self.surroundings = function, surroundings
        self.contexts, self.stops_early, self.compares = contexts, stops_early, compares
        self.others, tensors = apart(args)
        self.inputs = lambda: tensors  # where a transform of torch.func has no graph
        if not torch._C._are_functorch_transforms_active():
            kept = _Keep.apply(_ANCHOR, *tensors)
            self.inputs = lambda: kept.grad_fn.saved_tensors
        self.dropped: list[weakref.ref[_Placeholder]] = []
        self.descriptions: list[Description] = []
        self.passes: set[Hashable] = set()  # backward passes that have recomputed it
        self.forward_is_over = False

    def run(self, args: tuple) -> Any:
        """Run the function the first time."""
        with saved_tensors_hooks(self.pack, self.unpack), self.contexts[0]:
            output = self.function(*args)
            self.forward_is_over = True
            return output
        raise RuntimeError("context_fn's first context suppressed an exception")

    def pack(self, tensor: torch.Tensor) -> _Placeholder:
        """Drop a tensor that autograd wants to save, and give it a placeholder."""
        placeholder = _Placeholder()
        self.dropped.append(weakref.ref(placeholder))
        self.descriptions.append(description(tensor))
        return placeholder

    def unpack(self, placeholder: _Placeholder) -> torch.Tensor:
        """Give backward the tensor, and forget it; recompute once in a pass."""
        this_pass = _backward_pass()
        if this_pass not in self.passes:
            after = self.recompute(this_pass)
            self.passes.add(this_pass)
            check_same(self.descriptions, after, self.compares, self.contexts)
        if this_pass not in placeholder.recomputed:
            raise CheckpointError(
                "Unpack is being triggered for a tensor that was already unpacked once "
                "in this pass: read ctx.saved_tensors only once. Performing two "
                "backward calls that overlap in one GraphExecGroup has the same effect."
            )
        return placeholder.recomputed.pop(this_pass)

    def recompute(self, this_pass: Hashable) -> list[Description | None]:
        """Run the function again to fill the placeholders; describe what it saves."""
        after: list[Description | None] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.detach() if tensor.requires_grad else tensor
            if len(after) < len(self.dropped):
                placeholder = self.dropped[len(after)]()
                if placeholder is not None:  # else a backward inside has used it up
                    placeholder.recomputed[this_pass] = tensor
                after.append(placeholder and description(tensor))
                if self.stops_early and len(after) == len(self.dropped):
                    raise _EverythingIsBack
            elif self.forward_is_over:
                raise saves_more(len(self.dropped), self.contexts)
            return tensor  # for a backward inside the function

        args = together(self.others, self.inputs())
        with (
            contextlib.suppress(_EverythingIsBack),
            saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.enable_grad(),
            self.surroundings.restored(),
            self.contexts[1],
        ):
            self.function(*args)
        return after


def _backward_pass() -> Hashable:
    """Tell which backward pass is running, by a key that no other has."""
    group = torch._C._get_graph_exec_group()
    task = torch._C._current_graph_task_id()
    return group or (object() if task == -1 else task)


class _Keep(torch.autograd.Function):
    """Save tensors as an operator does, so that hooks around it see them.

    By this an outer segment drops and recomputes the inputs of an inner one.
    """

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0, device="cpu")

    @staticmethod
    def jvp(ctx, *tangents: torch.Tensor | None) -> torch.Tensor:
        return torch.empty(0, device="cpu")  # for tensors with a tangent


_ANCHOR = torch.empty(0, device="cpu", requires_grad=True)  # for a graph in any case
