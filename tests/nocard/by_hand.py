"""What CUDA's allocator says of a loop that is written by hand, with nothing before."""

import gc

import torch

from helpers.checkpointing import Plan, checkpointed
from helpers.timeline import state_tensors, tensors_in
from helpers.units import round_to_block
from tests.nocard.cases import Case

STEPS = 3


def fresh() -> None:
    """Give back all that nothing refers to, cuBLAS's workspaces too."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def allocator_of(case: Case, plan: Plan) -> dict[str, int]:
    """Run a loop of three steps, and count the last; as a report's fields."""
    fresh()
    model, batch, made, step = case.on_device()
    with checkpointed(model, plan):
        for _ in range(STEPS - 1):
            step()
        model.zero_grad()
        lasting = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
        lasting += state_tensors(made) if made else []
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in lasting}
        held = [one.nbytes() for one in storages.values() if one.device.type == "cuda"]
        others = torch.cuda.memory_allocated() - sum(map(round_to_block, held))
        torch.cuda.reset_peak_memory_stats()
        step()
    return {
        "allocator_peak_bytes": torch.cuda.max_memory_allocated() - others,
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
    }
