"""Checkpointing built by hand: a drop-in for ``torch.utils.checkpoint.checkpoint``.

There are two mechanisms, and notebook 05 builds a toy of each.

- Reentrant: an ``autograd.Function`` keeps its inputs and runs the function without a
  graph. Its backward runs the function again, with one, and calls ``backward`` on it.
- Non-reentrant: autograd records the graph as always, but in the place of each tensor
  that it saves there is a placeholder. When backward asks for the first one, the
  function runs again, and what autograd saves this time fills all of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint as theirs
from torch.utils.checkpoint import noop_context_fn

from helpers.from_scratch._determinism import operator_logs
from helpers.from_scratch._surroundings import Surroundings
from helpers.from_scratch.reentrant import Reentrant
from helpers.from_scratch.segment import Segment


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

    Raises:
        CheckpointError: from backward, if the second run does not match the first.
    """
    if use_reentrant:
        _check_reentrant(kwargs, context_fn, debug)
        return Reentrant.apply(function, Surroundings(args, preserve_rng_state), *args)
    make_contexts = _context_fn(context_fn, determinism_check, debug)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    surroundings = Surroundings((args, kwargs), preserve_rng_state)
    stops_early = _overruled(early_stop, theirs._enable_checkpoint_early_stop)
    how = {"stops_early": stops_early, "compares": determinism_check == "default"}
    call = functools.partial(function, **kwargs)
    return Segment(call, args, surroundings, make_contexts(), **how).run(args)


def _check_reentrant(kwargs: dict, context_fn: Callable, debug: bool) -> None:
    """Raise ValueError on what the reentrant mechanism does not know."""
    if kwargs:
        raise ValueError(f"Unexpected keyword arguments: {', '.join(kwargs)}")
    if debug or context_fn is not noop_context_fn:
        raise ValueError(
            "context_fn and debug are only supported when use_reentrant=False"
        )


def _context_fn(context_fn: Callable, determinism_check: str, debug: bool) -> Callable:
    """Choose what makes the contexts, or say which options do not go together."""
    if determinism_check not in ("default", "none"):
        raise ValueError(
            f"determinism_check is 'default' or 'none', not {determinism_check!r}"
        )
    if not _overruled(debug, theirs._checkpoint_debug_enabled):
        return context_fn
    if context_fn is not noop_context_fn:
        raise ValueError("debug=True is incompatible with a context_fn")
    return operator_logs


def _overruled(option: bool, setting: bool | None) -> bool:
    """Let a block of ``set_checkpoint_early_stop`` or ``…_debug_enabled`` decide."""
    return option if setting is None else setting
