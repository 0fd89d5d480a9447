"""Part a function's tensors, which have to be saved, from its other arguments."""

from collections.abc import Iterable

import torch

_TENSOR = object()  # says where a tensor was among the arguments


def apart(args: tuple) -> tuple[list, list[torch.Tensor]]:
    """Part tensors, which have to be saved, from other arguments."""
    others = [_TENSOR if isinstance(arg, torch.Tensor) else arg for arg in args]
    return others, [arg for arg in args if isinstance(arg, torch.Tensor)]


def together(others: list, tensors: Iterable[torch.Tensor]) -> list:
    tensors = iter(tensors)
    return [next(tensors) if arg is _TENSOR else arg for arg in others]
