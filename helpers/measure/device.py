"""The device that a step runs on: what it has, what it refuses, what it counts."""

import contextlib
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from helpers.checkpointing import Undo, refuse_opaque
from helpers.dry_run import Copies
from helpers.measure._cpu_limit import limit_in_force, uncounted, way_out
from helpers.timeline import tensors_in
from helpers.units import format_bytes, round_to_block

NO_DATA = "what is on the meta device has no data to run; predict it"


def usable_device(model: nn.Module, device: str | None) -> str:
    """Resolve the device to run on, or say what is missing."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"measure runs an nn.Module, and this is a {type(model).__name__}; call "
            "what makes a model first"
        )
    refuse_opaque(model, has_data=True)
    if device is None:
        first = next(model.parameters(), torch.empty(0, device="cpu"))
        device = first.device
    device = str(device).partition(":")[0]
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "CUDA was asked for, but this PyTorch sees no CUDA device; measure on "
            "device='cpu', or predict(..., device='cuda') the bytes of a CUDA step"
        )
    if device not in ("cpu", "cuda"):
        more = f": {NO_DATA}" if device == "meta" else ""
        raise ValueError(f"measure runs on 'cpu' or 'cuda', not on {device!r}{more}")
    return device


@uncounted()
def placed(model: nn.Module, device: str, batch: object, *others: object) -> list:
    """Move the batch, and copies of all else if the model lives elsewhere, to a device.

    The batch's data is shared where it is there already, unless it is a view of a
    larger tensor: then that tensor would count. Its gradient is not.

    Args:
        others: what else the step is made of: a loss, an optimizer, a step.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            raise ValueError(NO_DATA)
        data = tensor.detach().to(device)
        dense = data.layout is torch.strided
        if dense and data.untyped_storage().nbytes() != data.numel() * data.itemsize:
            data = data.clone()
        return data.requires_grad_(tensor.requires_grad)

    copies = Copies(moved)
    parts = [model, batch, *others]
    if any(parameter.device.type != device for parameter in model.parameters()):
        return [copies.of(part) for part in parts]
    return [model, copies.of(batch), *others]


def begin_anew(model: nn.Module, batch: object) -> None:
    """Let CUDA's allocator keep nothing of earlier steps, as in a new process."""
    _allocated_without_gradients([*model.parameters(), *tensors_in(batch)])
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def allocator_bytes(
    step: Callable, model: nn.Module, batch: object, state: object
) -> dict[str, int]:
    """Count an unwatched step's bytes by CUDA's own allocator, as a report's fields.

    What other tenants of the process hold, the cuBLAS workspace among them, is what is
    allocated before the step less the tensors that belong to it. What is left at the
    peak is the step's tensors, and what kernels take inside an operator.

    Args:
        state: tensors of the optimizer's state, nested in any way.
    """
    lasting = list(tensors_in([*model.parameters(), *model.buffers(), batch]))
    start_bytes = _allocated_without_gradients(lasting)
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors_in([lasting, state])
        if tensor.is_cuda
    }
    others = start_bytes - sum(map(round_to_block, storages.values()))
    reserved = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    allocated = torch.cuda.max_memory_allocated()
    asked_for = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    torch._C._cuda_clearCublasWorkspaces()
    return {
        "allocator_peak_bytes": allocated - others,
        "padding_bytes": allocated - asked_for,
        "workspace_bytes": start_bytes - _allocated_without_gradients(lasting),
        "reserved_peak_bytes": max(reserved, torch.cuda.max_memory_reserved()),
    }


def _allocated_without_gradients(tensors: list[torch.Tensor]) -> int:
    for tensor in tensors:
        tensor.grad = None
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def time_step_ms(step: Callable[[], object], device: str) -> float:
    """Time one step: by CUDA events on a GPU, by the clock on a CPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1000


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Put the random states of the CPU and of every GPU back at a block's end.

    Those of Python and NumPy, too. PyTorch warns of GPUs that are not named.
    """
    python, numpy = random.getstate(), sys.modules.get("numpy")
    with Undo() as undo:
        undo.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        undo.callback(random.setstate, python)
        if numpy:
            undo.callback(numpy.random.set_state, numpy.random.get_state())
        yield


def memory_bytes(device: str) -> int:
    """Tell how much memory a step can have: what a limit in force allows, if there is
    one, or else all of the GPU's, or what the machine has left.
    """
    if device == "cuda":
        total_bytes = torch.cuda.get_device_properties("cuda").total_memory
        return round(torch.cuda.get_per_process_memory_fraction() * total_bytes)
    return min(limit_in_force() or sys.maxsize, _left_bytes())


def _left_bytes() -> int:
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


def too_large(device: str, needed_bytes: int, fixed_bytes: int = 0) -> str:
    """Say that a step does not fit, what it needs where that is known, and what would.

    Args:
        fixed_bytes: what any batch and any plan need.
    """
    limit_bytes = memory_bytes(device)
    needed, limit = format_bytes(needed_bytes), format_bytes(limit_bytes)
    if needed == limit:  # a few bytes apart
        needed, limit = f"{needed_bytes:,} B", f"{limit_bytes:,} B"
    needs = f"needs {needed} at its peak and " if needed_bytes else ""
    return (
        f"the step {needs}does not fit into the {limit} that it may take on this "
        f"{device.upper()}; {way_out(limit_bytes, fixed_bytes)}"
    )
