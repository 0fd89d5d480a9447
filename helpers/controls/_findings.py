"""What a plan does to a training step, said in one sentence."""

from helpers.checkpointing import Plan
from helpers.measure import StepReport
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
    stem = names[0].rstrip("0123456789")  # of layer1, blocks.0 or 0
    numbered = all(name.removeprefix(stem).isdigit() for name in names)

    def short(name: str) -> str:
        return name.removeprefix(stem) if numbered else name

    runs = [
        f"{short(segment[0])}–{short(segment[-1])}"
        for segment in plan.segments
        if len(segment) > 1
    ]
    alone = [short(segment[0]) for segment in plan.segments if len(segment) == 1]
    parts = []
    if runs:
        ending = "as one segment" if len(runs) == 1 else "as segments"
        parts.append(f"{_listed(runs)} {ending}")
    if alone:
        parts.append(f"{_listed(alone)} {'alone' if len(alone) == 1 else 'each alone'}")
    noun = stem.rstrip(".") or "layer"
    one, many = noun.removesuffix("s"), noun if noun != "layer" else "layers"
    noun = one if len(names) == 1 else many
    return f"{noun} {'; '.join(parts)}" if numbered else "; ".join(parts)


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 7 else f"{names[0]}, …, {names[-1]}"
