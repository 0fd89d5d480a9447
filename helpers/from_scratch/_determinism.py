"""How the second run of a function is held against the first, and what is said then."""

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

Description = tuple[torch.Size, torch.dtype, torch.device]


def description(tensor: torch.Tensor) -> Description:
    """Return what is compared of a tensor; its values, not: it would take too long."""
    return tensor.shape, tensor.dtype, tensor.device


def check_same(
    before: Sequence[Description],
    after: Sequence[Description | None],
    compares: bool,
    contexts: Sequence[object],
) -> None:
    """Raise CheckpointError unless the second run saved what the first did.

    Args:
        before, after: descriptions of the saved tensors; None for one that nothing
            needs any more.
        compares: whether more than their number counts.
        contexts: of the two runs; an ``OperatorLog`` is written into the error.
    """
    if len(after) < len(before):
        raise _error(
            "A different number of tensors was saved during the original forward and "
            f"recomputation: {len(before)} and {len(after)}",
            contexts,
        )
    differing = [
        f"number {number} was {_words(*first)} and came back as {_words(*second)}"
        for number, (first, second) in enumerate(zip(before, after, strict=True), 1)
        if second is not None and first != second
    ]
    if compares and differing:
        raise _error(
            "Recomputed values for the following tensors have different metadata than "
            f"during the forward pass: {'; '.join(differing)}",
            contexts,
        )


def saves_more(n_saved: int, contexts: Sequence[object]) -> CheckpointError:
    """Make the error for a second run that goes on to save more than the first."""
    return _error(
        f"trying to save more tensors during recomputation than the {n_saved} of the "
        "original forward pass",
        contexts,
    )


def _words(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)} on {device}"


def _error(sentence: str, contexts: Sequence[object]) -> CheckpointError:
    lines = [f"torch.utils.checkpoint: {sentence}"]
    for run, log in zip(("forward", "recomputation"), contexts, strict=True):
        if isinstance(log, OperatorLog):
            lines.append(f"operators in {run}: {', '.join(log.names)}")
    if len(lines) > 1:
        reason = "because you passed `debug=True` to checkpoint"
        lines.append(f"You are seeing this error {reason}.")
    return CheckpointError("\n".join(lines))


class OperatorLog(TorchDispatchMode):
    """Notes the name of every operator that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operator_logs() -> tuple[OperatorLog, OperatorLog]:
    """Make a log for each run, as a ``context_fn``."""
    return OperatorLog(), OperatorLog()
