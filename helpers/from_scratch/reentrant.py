"""The mechanism of ``use_reentrant=True``: a backward within backward.

An ``autograd.Function`` keeps its inputs and runs the function without a graph. Its
backward runs the function again, with one, and calls ``backward`` on that.
"""

import warnings
from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointError

from helpers.from_scratch._arguments import apart, together
from helpers.from_scratch._surroundings import Surroundings


class Reentrant(torch.autograd.Function):
    """The mechanism of ``use_reentrant=True``: a backward within backward."""

    @staticmethod
    def forward(ctx, function: Callable, surroundings: Surroundings, *args):
        ctx.others, tensors = apart(args)
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
        args = together(ctx.others, leaves)
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
