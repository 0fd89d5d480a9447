"""What a plan does to a training step, said in one sentence."""

from helpers.checkpointing import Plan
from helpers.report import StepReport
from helpers.units import format_bytes, format_change


def finding(before: StepReport, after: StepReport) -> str:
    """Say what ``after``'s plan changes: peak memory, and FLOPs of the whole step."""
    peak = format_bytes(after.peak_bytes)
    if not after.plan.segments:
        return f"no checkpointing: peak {peak}"
    saved = after.peak_bytes - before.peak_bytes
    change = format_bytes(saved, signed=True) if saved else "unchanged"
    extra = format_change(
        3 * after.forward_flops + after.recompute_flops, 3 * before.forward_flops
    )
    return f"{describe(after.plan)}: peak {peak} ({change}), step {extra} FLOPs"


def describe(plan: Plan) -> str:
    """Name a plan as one would say it: "layers 2–4 as one segment; 6 alone"."""
    names = plan.names
    numbered = all(name.removeprefix("layer").isdigit() for name in names)

    def short(name: str) -> str:
        return name.removeprefix("layer") if numbered else name

    runs = [
        f"{short(segment[0])}–{short(segment[-1])}"
        for segment in plan.segments
        if len(segment) > 1
    ]
    alone = [short(segment[0]) for segment in plan.segments if len(segment) == 1]
    parts = []
    if runs:
        ending = "as one segment" if len(runs) == 1 else "as segments"
        parts.append(f"{', '.join(runs)} {ending}")
    if alone:
        listed = ", ".join(alone) if len(alone) < 7 else f"{alone[0]}, …, {alone[-1]}"
        parts.append(f"{listed} {'alone' if len(alone) == 1 else 'each alone'}")
    noun = "" if not numbered else "layer " if len(names) == 1 else "layers "
    return noun + "; ".join(parts)
