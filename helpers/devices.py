"""The device that a step runs on: what it has, what it refuses, what it counts."""

import contextlib
import copy
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from helpers.tracker import tensors_in
from helpers.units import format_bytes, round_to_block


def usable_device(model: nn.Module, device: str | None) -> str:
    """Resolve the device to run on, or say what is missing."""
    if device is None:
        first = next(model.parameters(), torch.empty(0))
        device = first.device
    device = torch.device(device).type
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "CUDA was asked for, but this PyTorch sees no CUDA device; measure on "
            "device='cpu', or predict(..., device='cuda') the bytes of a CUDA step"
        )
    if device not in ("cpu", "cuda"):
        raise ValueError(f"measure runs on 'cpu' or 'cuda', not on {device!r}")
    return device


def placed(model: nn.Module, batch: object, device: str) -> tuple[nn.Module, object]:
    """Move the batch, and a copy of the model if it lives elsewhere, to the device.

    The batch's data is shared where it is there already; its gradient is not.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    if isinstance(batch, tuple | list):
        batch = type(batch)(moved(tensor) for tensor in batch)
    else:
        batch = moved(batch)
    if all(parameter.device.type == device for parameter in model.parameters()):
        return model, batch
    return copy.deepcopy(model).to(device), batch


@contextlib.contextmanager
def left_as_found(model: nn.Module, trains: bool) -> Iterator[None]:
    """Put back what training steps change: parameters, buffers, gradients.

    The copies lie in host memory, where they do not count on a GPU.
    """
    changing = [*model.buffers(), *(model.parameters() if trains else ())]
    saved = [tensor.detach().to("cpu", copy=True) for tensor in changing]
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(changing, saved, strict=True):
                tensor.copy_(value)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient


def allocator_bytes(
    step: Callable, model: nn.Module, batch: object, state: object
) -> dict[str, int]:
    """Count an unwatched step's bytes by CUDA's own allocator, as a report's fields.

    What other tenants of the process hold, the cuBLAS workspace among them, is what is
    allocated before the step less the tensors that belong to it.

    Args:
        state: tensors of the optimizer's state, nested in any way.
    """
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.synchronize()
    without_workspace = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    start_bytes = torch.cuda.memory_allocated()
    lasting = list(tensors_in([*model.parameters(), *model.buffers(), batch]))
    gradients = [tensor.grad for tensor in lasting if tensor.grad is not None]
    own = tensors_in([lasting, gradients, state])
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in own
        if tensor.is_cuda
    }
    others = start_bytes - sum(map(round_to_block, storages.values()))
    torch.cuda.reset_peak_memory_stats()
    levels: list[int] = []
    step(lambda: levels.append(torch.cuda.memory_allocated() - others))
    torch.cuda.synchronize()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() - others,
        "after_forward_bytes": levels[0],
        "workspace_bytes": start_bytes - without_workspace,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocator, CUDA's or the CPU's, refused."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def memory_bytes(device: str) -> int:
    """Tell how much memory a step can have: the GPU's, or what the machine has left."""
    if device == "cuda":
        return torch.cuda.get_device_properties("cuda").total_memory
    with contextlib.suppress(OSError):  # there is no such file on macOS
        lines = Path("/proc/meminfo").read_text().splitlines()
        (kib,) = (line.split()[1] for line in lines if "MemAvailable" in line)
        return int(kib) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: str) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def too_large(device: str, needed_bytes: int) -> str:
    """Say that a step does not fit, and what it needs where that is known."""
    needs = (
        f"needs {format_bytes(needed_bytes)} at its peak and " if needed_bytes else ""
    )
    return (
        f"the step {needs}does not fit "
        f"into the {format_bytes(memory_bytes(device))} that there are on this "
        f"{device.upper()}; take a smaller batch, or checkpoint more layers"
    )
