"""What a plan does to a training step, said in one sentence."""

from collections.abc import Sequence

import torch

from helpers.checkpointing import Plan
from helpers.measure import StepReport, Verification, plain_step_flops
from helpers.units import format_bytes, format_change, format_ms


def added_work(report: StepReport, recompute_flops: int) -> str:
    """Say what recomputing adds to a step."""
    flops = plain_step_flops(report)
    return f"step {format_change(flops + recompute_flops, flops)} FLOPs"


def finding(before: StepReport, after: StepReport) -> str:
    """Say what ``after``'s plan changes: peak memory, and FLOPs of the whole step."""
    said = f"{describe(after.plan)}: peak {format_bytes(after.peak_bytes)}"
    if after.plan == before.plan:
        return said
    saved = after.peak_bytes - before.peak_bytes
    change = format_bytes(saved, signed=True) if saved else "unchanged"
    if not before.plan.segments:
        return f"{said} ({change}), {added_work(after, after.recompute_flops)}"
    flops = [plain_step_flops(one) + one.recompute_flops for one in (after, before)]
    work = f"step {format_change(*flops)} FLOPs"
    return f"{said} ({change}), {work}, against {describe(before.plan)}"


def describe(plan: Plan) -> str:
    """Name a plan as one would say it: "layers 2–4 as one segment; 6 alone"."""
    names = plan.names
    if not names:
        return "no checkpointing"
    stem = names[0].rstrip("0123456789")  # of layer1, blocks.0 or 0
    numbered = all(name.removeprefix(stem).isdigit() for name in names)

    def short(name: str) -> str:
        return name.removeprefix(stem) if numbered else name

    runs = [f"{short(s[0])}–{short(s[-1])}" for s in plan.segments if len(s) > 1]
    alone = [short(s[0]) for s in plan.segments if len(s) == 1]
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


def measured_note(
    report: StepReport, base: StepReport, predicted: StepReport, own: StepReport
) -> str:
    """Say what was measured, where, and whether it is what was predicted.

    Args:
        base: what it is compared with, measured in the same run; or itself.
        predicted, own: the prediction that is shown, and that for ``report``'s device;
            or what was measured, where there can be none.
    """
    place = torch.cuda.get_device_name() if report.device == "cuda" else "this CPU"
    word = f"predicted: {format_bytes(own.peak_bytes)}"
    if predicted.source == "measured":
        word = "which no prediction can tell"
    elif report.peak_bytes == predicted.peak_bytes:
        word = "as predicted"
    elif report.peak_bytes == own.peak_bytes:
        word = f"as predicted for a {own.device.upper()} step"
    note = f"measured on {place}: {format_bytes(report.peak_bytes)}, {word}"
    if report.scratch_bytes:
        note += f", {format_bytes(report.scratch_bytes)} of kernels' scratch on top"
    return f"{note}; {timed_note(report, base)}"


def timed_note(report: StepReport, base: StepReport) -> str:
    """Say how long a step took, beside the one that it is compared with."""
    note = f"step {format_ms(report.step_ms)}"
    if report.plan != base.plan and base.step_ms:
        note += f" ({format_change(report.step_ms, base.step_ms)})"
    return f"{note}, median of {report.repeats} runs"


def verified_note(found: Verification | None) -> str:
    """Say what of a step a plan leaves as it is without."""
    if found is None:
        return ""
    exact = "" if found.reproducible else ", within the step's own spread"
    said = "" if found.gradients else f"; gradients as without{exact}"
    return said + _differing("; buffers differ: ", found.buffers)


def cautious(verified: Verification | None, hazards: Sequence[object]) -> str:
    """Say which gradients a plan makes others, and what may go wrong with it."""
    alarm = _differing("gradients differ: ", verified.gradients) if verified else ""
    more = f" (and {len(hazards) - 1} more)" if len(hazards) > 1 else ""
    said = [*filter(None, [alarm]), *(f"{one}{more}" for one in hazards[:1])]
    return f". Careful: {'; '.join(said)}" if said else ""


def _differing(words: str, errors: dict[str, float]) -> str:
    """Name what differs most, by its relative error, and count the rest."""
    if not errors:
        return ""
    name = max(errors, key=errors.get)
    more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
    return f"{words}{name} by {errors[name]:.2g}{more}"
