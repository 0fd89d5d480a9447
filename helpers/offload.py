"""Keep in host memory what backward needs: what is left on the device, what travels.

``torch.autograd.graph.save_on_cpu`` copies every tensor that autograd saves to the host
in forward, and back in backward. Here the same is done, and counted, on any device. On
a CPU NumPy's memory plays the host, so that what PyTorch holds is the device's part;
meta tensors have no data, and nothing is copied.
"""

from typing import NamedTuple

import torch
from torch import nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _OnHost(NamedTuple):
    """A saved tensor in host memory, and what is needed to make it again."""

    data: object  # a CPU tensor, an array, or None where there is no data
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Count:
    """A number that stays when what a model holds is put back after a step."""

    __slots__ = ("n_bytes",)

    def __init__(self) -> None:
        self.n_bytes = 0


class Offloaded(nn.Module):
    """A model of which all that autograd saves waits for backward on the host.

    Checkpointed segments inside save their inputs only, so only these travel.
    ``moved_bytes`` went to the host in the last forward, and come back in backward.

    Args:
        model: is called as before; its layers' names have ``model.`` before them.
        parameters: whether saved parameters travel as well, as by ``save_on_cpu``.
    """

    def __init__(self, model: nn.Module, *, parameters: bool = True) -> None:
        super().__init__()
        self.model, self.parameters_too = model, parameters
        self._count = _Count()

    @property
    def moved_bytes(self) -> int:
        """Tell how many bytes went to the host in the last forward."""
        return self._count.n_bytes

    def forward(self, *args, **kwargs) -> object:
        """Run the model with its saved tensors on the host."""
        self._count.n_bytes = 0
        stay = () if self.parameters_too else self.model.parameters()
        staying = {parameter.untyped_storage()._cdata for parameter in stay}

        def pack(tensor: torch.Tensor) -> object:
            if tensor.untyped_storage()._cdata in staying:
                return tensor
            self._count.n_bytes += tensor.nbytes
            return _to_host(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, _to_device):
            return self.model(*args, **kwargs)


def _to_host(tensor: torch.Tensor) -> _OnHost:
    """Copy a tensor out of its device's memory.

    One with gaps is first put together on the device, as CUDA's copy does it.
    Source: ``copy_requires_temporaries`` in aten/src/ATen/native/cuda/Copy.cu.
    """
    tensor = tensor.detach()
    is_dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    dense = tensor if is_dense else tensor.contiguous()
    data = None
    if dense.device.type == "cpu":
        data = dense.view(_INTEGERS[dense.itemsize]).numpy().copy(order="K")
    elif not dense.is_meta:
        data = dense.cpu()
    return _OnHost(data, dense.shape, dense.stride(), dense.dtype, dense.device)


def _to_device(packed: object) -> torch.Tensor:
    """Make the tensor again on its device."""
    if not isinstance(packed, _OnHost):
        return packed
    data, size, stride, dtype, device = packed
    tensor = torch.empty_strided(size, stride, dtype=dtype, device=device)
    if isinstance(data, torch.Tensor):
        tensor.copy_(data)
    elif data is not None:
        tensor.view(_INTEGERS[dtype.itemsize]).numpy()[...] = data
    return tensor
