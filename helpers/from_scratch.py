"""Checkpointing built by hand: a drop-in for ``torch.utils.checkpoint.checkpoint``.

There are two mechanisms, and notebook 05 builds a toy of each.

- Reentrant: an ``autograd.Function`` keeps its inputs and runs the function without a
  graph. Its backward runs the function again, with one, and calls ``backward`` on it.
- Non-reentrant: autograd records the graph as always, but in the place of each tensor
  that it saves there is a placeholder. When backward asks for the first one, the
  function runs again, and what autograd saves this time fills all of them.
"""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
import torch.utils.checkpoint as theirs
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError, noop_context_fn

from helpers.determinism import (
    Description,
    check_same,
    description,
    operator_logs,
    saves_more,
)
from helpers.surroundings import Surroundings


@torch._disable_dynamo  # torch.compile traces around it, as around torch's own
def checkpoint(
    function: Callable,
    *args: Any,
    use_reentrant: bool = False,
    preserve_rng_state: bool = True,
    context_fn: Callable = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    **kwargs: Any,
) -> Any:
    """Call ``function`` now, keep its inputs, and run it again in backward.

    Args:
        args, kwargs: for ``function``; reentrant takes no ``kwargs``.
        use_reentrant: which mechanism. The options after ``preserve_rng_state`` are for
            the non-reentrant one.
        preserve_rng_state: draw the same random numbers again.
        context_fn: makes two context managers, one for each run of ``function``.
        determinism_check: "default" holds the shape, dtype and device of what comes
            back against what was dropped; "none" does not.
        debug: list the operators of both runs if they do not match.
        early_stop: end the second run as soon as everything is back.

    Returns:
        What ``function`` returns.

    Raises:
        CheckpointError: from backward, if the second run does not match the first.
    """
    if use_reentrant:
        if kwargs:
            raise ValueError(f"Unexpected keyword arguments: {', '.join(kwargs)}")
        if debug or context_fn is not noop_context_fn:
            raise ValueError(
                "context_fn and debug are only supported when use_reentrant=False"
            )
        return _Reentrant.apply(function, Surroundings(args, preserve_rng_state), *args)
    if determinism_check not in ("default", "none"):
        raise ValueError(
            f"determinism_check is 'default' or 'none', not {determinism_check!r}"
        )
    if _overruled(debug, theirs._checkpoint_debug_enabled):
        if context_fn is not noop_context_fn:
            raise ValueError("debug=True is incompatible with a context_fn")
        context_fn = operator_logs
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    segment = _Segment(
        functools.partial(function, **kwargs),
        args,
        Surroundings((args, kwargs), preserve_rng_state),
        context_fn(),
        stops_early=_overruled(early_stop, theirs._enable_checkpoint_early_stop),
        compares=determinism_check == "default",
    )
    return segment.run(args)


def _overruled(option: bool, setting: bool | None) -> bool:
    """Let a block of ``set_checkpoint_early_stop`` or ``…_debug_enabled`` decide."""
    return option if setting is None else setting


_TENSOR = object()  # says where a tensor was among the arguments


def _apart(args: tuple) -> tuple[list, list[torch.Tensor]]:
    """Part tensors, which have to be saved, from other arguments."""
    others = [_TENSOR if isinstance(arg, torch.Tensor) else arg for arg in args]
    return others, [arg for arg in args if isinstance(arg, torch.Tensor)]


def _together(others: list, tensors: Iterable[torch.Tensor]) -> list:
    tensors = iter(tensors)
    return [next(tensors) if arg is _TENSOR else arg for arg in others]


class _Reentrant(torch.autograd.Function):
    """The mechanism of ``use_reentrant=True``: a backward within backward."""

    @staticmethod
    def forward(ctx, function: Callable, surroundings: Surroundings, *args):
        ctx.others, tensors = _apart(args)
        if not any(tensor.requires_grad for tensor in tensors):
            warnings.warn(
                "None of the inputs have requires_grad=True. Gradients will be None",
                stacklevel=3,
            )
        ctx.function, ctx.surroundings = function, surroundings
        ctx.save_for_backward(*tensors)
        return function(*args)  # without a graph, as in any Function's forward

    @staticmethod
    def backward(ctx, *gradients):
        # Parameters get their gradients from the backward in here, as attributes;
        # autograd.grad would not return them.
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "torch.utils.checkpoint is incompatible with .grad() and with `inputs` "
                "of .backward() when use_reentrant=True; use False"
            )
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        args = _together(ctx.others, leaves)
        with ctx.surroundings.restored(), torch.enable_grad():
            outputs = ctx.function(*args)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        if len(outputs) != len(gradients):
            raise CheckpointError(
                f"torch.utils.checkpoint: {len(gradients)} outputs in the original "
                f"forward and {len(outputs)} in recomputation"
            )
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if isinstance(output, torch.Tensor) and output.requires_grad
        ]
        if not pairs:
            raise RuntimeError(
                "none of output has requires_grad=True, this checkpoint() is not "
                "necessary"
            )
        torch.autograd.backward(*zip(*pairs, strict=True))
        return None, None, *(getattr(arg, "grad", None) for arg in args)


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


class _Segment:
    """One call with ``use_reentrant=False``: its hooks, and how to run it again."""

    def __init__(
        self, function, args, surroundings, contexts, *, stops_early, compares
    ) -> None:
        self.function, self.surroundings = function, surroundings
        self.contexts, self.stops_early, self.compares = contexts, stops_early, compares
        self.others, tensors = _apart(args)
        self.inputs = _Keep.apply(_ANCHOR, *tensors)
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

        args = _together(self.others, self.inputs.grad_fn.saved_tensors)
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


_ANCHOR = torch.empty(0, device="cpu", requires_grad=True)  # for a graph in any case
