"""Write the snippet that applies a plan with torch alone."""

from torch import nn

from helpers.checkpointing import _lists
from helpers.checkpointing.plan import Plan, listed_segments, runs_by_parent

REPLICAS = """
model._replicate_for_data_parallel = partial(
    torch._assert, False, "use DistributedDataParallel, not nn.DataParallel"
)""".splitlines()  # its copies of a module would run the layers of this one


def snippet(model: nn.Module, plan: Plan) -> str:
    """Write it for a plan that fits the model."""
    if not plan.segments:
        return "# nothing is checkpointed"
    alone = [segment[0] for segment in plan.segments if len(segment) == 1]
    listed = listed_segments(model, plan)
    chains = runs_by_parent(model, plan)
    plain = all(_is_plain(model.get_submodule(name)) for name in chains)
    lines = ["from functools import partial"]
    lines += ["from types import MethodType"] * bool(chains)
    lines += ["", "import torch"] + ["from torch import nn"] * (not plain)
    lines += ["from torch.utils.checkpoint import checkpoint"]
    if alone:
        lines += [
            "",
            f"for name in {alone!r}:",
            "    layer = model.get_submodule(name)",
            "    layer.forward = partial(",
            "        checkpoint, layer.forward, use_reentrant=False",
            "    )",
        ]
    for parent, runs in chains.items():
        lines += _parent_code(model, parent, runs)
    if listed:
        lines += _lists.code(listed)
    return "\n".join([*lines, *REPLICAS])


def _is_plain(module: nn.Module) -> bool:
    """Say whether it can be sliced; a subclass's slice is made by its own __init__."""
    return type(module) is nn.Sequential


def _parent_code(
    model: nn.Module, parent: str, runs: dict[str, tuple[str, ...]]
) -> list[str]:
    """Write a Sequential's forward with its segments spelled out as slices."""
    sequential = model.get_submodule(parent)
    names = list(sequential._modules)
    lines = ["", "", "def forward(self, x):"]
    place = 0
    while place < len(names):
        run = runs.get(names[place])
        starts = [i for i in range(place, len(names)) if names[i] in runs]
        end = place + len(run) if run else min(starts, default=len(names))
        piece = f"[{place}:{end}]"
        if _is_plain(sequential):
            piece = f"self{piece}"
        else:
            piece = f"nn.Sequential(*list(self){piece})"
        if run:
            lines.append(f"    x = checkpoint({piece}, x, use_reentrant=False)")
        else:
            lines.append(f"    x = {piece}(x)")
        place = end
    lines += ["    return x", "", ""]
    if not parent:
        return lines + ["model.forward = MethodType(forward, model)"]
    return lines + [
        f"chain = model.get_submodule({parent!r})",
        "chain.forward = MethodType(forward, chain)",
    ]
