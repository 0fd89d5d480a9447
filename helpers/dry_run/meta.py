"""Run a training step on meta tensors: shapes and lifetimes, but no data.

Autograd, checkpointing and the optimizer run as they do on a device, so the storages
come and go as they do there. Three things make the result that of a real step: a meta
copy of the model, the device's own choice of kernels, and remembered shapes, because
PyTorch's meta kernels are Python and ten times slower than the lookup.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import optimizer as optimizers


def meta_model(model_or_factory: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Copy a model, or make one by a factory, without allocating its parameters.

    Shared parameters stay shared, the training mode and hooks are kept, gradients are
    not. A model that is on the meta device already is returned as it is.
    """
    if not isinstance(model_or_factory, nn.Module):
        with torch.device("meta"):
            return model_or_factory()
    model = model_or_factory
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.is_meta for tensor in tensors):
        return model
    copies = {id(tensor): _meta_parameter(tensor) for tensor in tensors}
    return copy.deepcopy(model, copies)


def _meta_parameter(tensor: torch.Tensor) -> torch.Tensor:
    empty = meta_batch(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


def meta_batch(batch: object, made: dict[int, torch.Tensor] | None = None) -> object:
    """Copy a batch, a tensor or tuples, lists and dicts of them, to the meta device.

    A view of a larger tensor takes only its own bytes, as in a copy to a device.

    Args:
        made: copies by their tensor's id; a tensor that comes twice is copied once.
    """
    made = {} if made is None else made
    if isinstance(batch, torch.Tensor):
        if id(batch) not in made:
            empty = torch.empty_like(batch, device="meta", requires_grad=False)
            made[id(batch)] = empty.requires_grad_(batch.requires_grad)
        return made[id(batch)]
    if isinstance(batch, dict):
        return {key: meta_batch(value, made) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(meta_batch(item, made) for item in batch)
    return batch


def like_cuda(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let an optimizer work on lists of tensors, which is its default on CUDA alone.

    Source: ``_default_to_fused_or_foreach`` in torch/optim/optimizer.py.
    """
    for group in optimizer.param_groups:
        chosen = group.get("foreach") is not None or group.get("fused")
        if "foreach" in group and not chosen and not group.get("differentiable"):
            group["foreach"] = True
    return optimizer


_fused_devices = optimizers._get_fused_kernels_supported_devices
# Fused optimizers refuse parameters on any device that is not in this list.
optimizers._get_fused_kernels_supported_devices = lambda: [*_fused_devices(), "meta"]
