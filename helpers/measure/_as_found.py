"""Training steps are run for good; then all that they may have changed is put back."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from helpers.checkpointing import Undo
from helpers.dry_run.parts import of_classes, parts_of
from helpers.dry_run.put_back import put_back, ways_back
from helpers.measure._cpu_limit import uncounted
from helpers.timeline import local, tensors_in


@contextlib.contextmanager
def left_as_found(model: nn.Module, trains: bool, *others: object) -> Iterator[None]:
    """Put back what training steps change: parameters, buffers, gradients, attributes.

    The copies lie in host memory, and count neither on a GPU nor under a limit.

    Args:
        trains: whether parameters change, too.
        others: what else the steps are made of: a batch, an optimizer, a loss, a step.
            What these refer to is put back as well.
    """
    parameters = list(model.parameters())
    unchanged = [parameter.grad for parameter in parameters]  # they are taken away
    if not trains:
        unchanged += parameters
    with Undo() as undo:
        parts = parts_of(model, *of_classes(model), *others)
        ways = ways_back(parts) + _saved(parts, set(map(id, unchanged)))
        for _ in range(2):  # an interrupt may end the first
            undo.callback(uncounted()(put_back), ways)
        for parameter in parameters:
            parameter.grad = None
        yield


@uncounted()
def _saved(parts: list[object], unchanged: set[int]) -> list[Callable]:
    """Copy the storages of tensors to the host; of sparse ones, their parts'."""
    found = {}
    for part in parts:
        if isinstance(part, torch.Tensor) and id(part) not in unchanged:
            for tensor in tensors_in(local(part)):
                if not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage
    return [
        partial(one.copy_, one.cpu() if one.is_cuda else one.clone())
        for one in found.values()
    ]
