"""What a reader's process has of PyTorch, to hold against it what it has later."""

import copy
import random

import torch
import torch.nn.modules.module as modules
import torch.optim.optimizer as optimizers
import torch.utils.flop_counter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

# Attention and dropout are what a dry run acts on, and linear is cast by autocast.
OPERATORS = ("aten::dropout", "aten::scaled_dot_product_attention", "aten::linear")
FUNCTIONS = [
    (torch, "clear_autocast_cache"),
    (torch.UntypedStorage, "resize_"),
    (optimizers, "_get_fused_kernels_supported_devices"),
    (torch.Tensor, "backward"),
    (torch.autograd, "backward"),
    (torch.nn.Module, "__call__"),
]
SETTINGS = [
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.is_autocast_cache_enabled,
    torch.get_default_dtype,
    torch.get_default_device,
    torch.get_num_threads,
    torch.are_deterministic_algorithms_enabled,
    _get_current_dispatch_mode_stack,
    _get_current_function_mode_stack,
    random.getstate,
]


def torch_state() -> dict[str, object]:
    """Return what a helper may change only until it is done, each thing by a name."""
    found: dict[str, object] = {
        operator: torch._C._dispatch_dump(operator) for operator in OPERATORS
    }
    for owner, name in FUNCTIONS:
        found[f"{owner.__name__}.{name}"] = getattr(owner, name)
    found |= {read.__name__: read() for read in SETTINGS}
    for name, hooks in (vars(modules) | vars(optimizers)).items():
        if name.startswith("_global"):
            found[name] = copy.copy(hooks)
    for device in ("cpu", "cuda"):
        cast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        found[f"autocast on {device}"] = cast
    saved = torch._C._autograd._top_saved_tensors_default_hooks(False)
    found["saved tensors' hooks"] = saved
    found["formulas of FLOPs"] = {*torch.utils.flop_counter.flop_registry}
    found["random numbers"] = torch.get_rng_state().tolist()
    return found


def put_back(before: dict[str, object]) -> None:
    """Take away hooks and modes that were left, so that more can be tried."""
    for name, hooks in (vars(modules) | vars(optimizers)).items():
        if name in before and isinstance(hooks, dict):
            hooks.clear()
            hooks.update(before[name])
    left = _get_current_dispatch_mode_stack()
    for _ in left[len(before["_get_current_dispatch_mode_stack"]) :]:
        _pop_mode()


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Name what is no longer what it was."""
    return [name for name in before if before[name] != after[name]]
